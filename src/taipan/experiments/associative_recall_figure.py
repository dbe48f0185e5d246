"""The figure of the associative-recall experiment, and the numbers it is drawn from, kept beside it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, get_type_hints

from taipan.errors import ConfigError, DataError
from taipan.experiments.associative_recall import TASKS, Report, accuracy
from taipan.io import atomic_write, parse_json_object, read_text
from taipan.report.figures import GREY, SERIES, Words, standalone, styled
from taipan.schema import convert

NAME = "associative_recall"
QUERIES = mean(pairs / length for length, pairs in TASKS)
"""Share of the positions that are queries."""
_DODGE = 1.07
_MODELS = {"taipan": "Taipan", "taipan, C = 0": "without attention (C = 0)", "mamba2": "Mamba-2"}
_RATES = {"rate": "selected with noise", "noise_free_rate": "without noise"}
_SCOPES = {"all": "keys of all tokens", "selected": "of selected tokens"}


@dataclass(frozen=True, kw_only=True)
class FigureData:
    """What the figure shows.

    Attributes:
        command: that made the results.
        origin: where the numbers come from, in a sentence.
        pairs: numbers of key–value pairs.
        accuracy: by model, for every number of pairs the accuracy of each seed.
        gate: of Taipan over training: `step`, `capacity` (the budget), `rate` and `noise_free_rate` (shares of tokens).
        capacity: by scope of keys and values, pairs of C and mean accuracy.
    """

    command: str
    origin: str
    pairs: tuple[int, ...]
    accuracy: dict[str, tuple[tuple[float, ...], ...]]
    gate: dict[str, tuple[float, ...]]
    capacity: dict[str, tuple[tuple[float, float], ...]]

    @classmethod
    def of(cls, report: Report, command: str) -> "FigureData":
        """The part of all results that the figure shows; the gate is that of the first seed."""
        curve = report.comparison["taipan"][0]["curve"]
        tests = range(len(TASKS))
        return cls(
            command=command,
            origin=f"Seeds {', '.join(map(str, report.scale.seeds))}, in this order.",
            pairs=tuple(pairs for _, pairs in TASKS),
            accuracy={
                name: tuple(tuple(result["tests"][test]["accuracy"] for result in results) for test in tests)
                for name, results in report.comparison.items()
            },
            gate={name: tuple(point[name] for point in curve) for name in ("step", "capacity", *_RATES)},
            capacity={
                scope: tuple((result["config"]["attention_capacity"], accuracy(result)) for result in results)
                for scope, results in report.capacity.items()
            },
        )

    @classmethod
    def load(cls, path: Path) -> "FigureData":
        """Read what `save` wrote.

        Raises:
            DataError: the file cannot be read or is something else.
        """
        values = parse_json_object(read_text(path), str(path))
        try:
            known = get_type_hints(cls)
            if values.keys() != known.keys():
                raise ConfigError(f"it has {', '.join(values) or 'nothing'}, expected {', '.join(known)}")
            data = cls(**{name: convert(value, known[name], name) for name, value in values.items()})
            data.check()
        except ConfigError as error:
            raise DataError(
                f"{path} does not hold the numbers of the associative-recall figure ({error}): give the {NAME}.json "
                "that `taipan reproduce associative-recall` wrote."
            ) from error
        return data

    def check(self) -> None:
        """Check that the parts fit together.

        Raises:
            ConfigError: they do not.
        """
        names = ("step", "capacity", *_RATES)
        if not self.pairs or any(len(rows) != len(self.pairs) or not all(rows) for rows in self.accuracy.values()):
            raise ConfigError("accuracy must have an entry with at least one seed for every number of pairs")
        points = {len(values) for values in self.gate.values()}
        if self.gate.keys() != set(names) or len(points) != 1 or 0 in points:
            raise ConfigError(f"gate must have equally many values of {', '.join(names)}")

    def save(self, path: Path) -> None:
        """Write the numbers as JSON."""
        atomic_write(path, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())


def write_figure(data: FigureData, directory: Path) -> list[Path]:
    """Write the figure side by side and, for narrow pages, one below the other; returns the paths.

    Both are SVG files that follow the reader's light or dark mode.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{NAME}.svg", directory / f"{NAME}-narrow.svg"]
    for path, narrow in zip(paths, (False, True), strict=True):
        atomic_write(path, figure(data, narrow=narrow).encode())
    return paths


def figure(data: FigureData, *, narrow: bool) -> str:
    """SVG: accuracy by number of pairs with every seed, the gate over training, accuracy against C."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    draws = [_recall, _gate, *([_capacity] if data.capacity else [])]
    size = (4.7, 3.3 * len(draws)) if narrow else (3.6 * len(draws), 3.8)
    with styled():
        drawing = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14))
        shape = (len(draws), 1) if narrow else (1, len(draws))
        for axes, draw in zip(drawing.subplots(*shape).flat, draws, strict=True):
            draw(axes, data)
        return standalone(drawing, _words(data))


def _recall(axes: Any, data: FigureData) -> None:
    for number, (name, rows) in enumerate(data.accuracy.items()):
        color = SERIES[number]
        axes.plot(data.pairs, [mean(row) for row in rows], color=color, label=_MODELS.get(name, name))
        for pairs, row in zip(data.pairs, rows, strict=True):
            beside = pairs * _DODGE ** (number - (len(data.accuracy) - 1) / 2)  # no dot hides another model's
            axes.plot([beside] * len(row), row, "o", color=color, markersize=4.5, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xticks(data.pairs, [str(pairs) for pairs in data.pairs], minor=False)
    axes.minorticks_off()
    _finish(axes, "Recall by number of pairs", "key–value pairs", "accuracy")


def _gate(axes: Any, data: FigureData) -> None:
    steps = data.gate["step"]
    axes.plot(steps, data.gate["capacity"], color=GREY, linewidth=5, alpha=0.4, label="budget C")
    for color, (name, label) in zip(SERIES, _RATES.items(), strict=False):
        axes.plot(steps, data.gate[name], color=color, linewidth=1.5, label=label)
    _finish(axes, "The gate over training", "step", "share of tokens")


def _capacity(axes: Any, data: FigureData) -> None:
    for color, (scope, points) in zip(SERIES, data.capacity.items(), strict=False):
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=5, label=_SCOPES.get(scope, scope))
    axes.axvline(QUERIES, color=GREY, linewidth=1.4, linestyle=":", label="share of queries")
    _finish(axes, "Recall against the budget", "budget C", "mean accuracy")


def _finish(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    lines = len(axes.get_legend_handles_labels()[1])
    axes.set_title(title, pad=8 + 14 * lines, fontweight="bold")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.0, fontsize=9.5, labelspacing=0.25)


def _words(data: FigureData) -> Words:
    most = data.pairs[-1]
    seeds = {name: rows[-1] for name, rows in data.accuracy.items()}
    values = "; ".join(
        f"{_MODELS.get(name, name)} {', '.join(f'{score:.2f}' for score in sorted(scores))}"
        for name, scores in seeds.items()
    )
    description = f"Accuracy of every seed with {most} pairs: {values}. At the end of training Taipan's gate selects "
    description += f"{data.gate['noise_free_rate'][-1]:.2f} of the tokens without noise."
    if data.capacity:
        points = ", ".join(f"{score:.2f} at C = {c:.2f}" for c, score in data.capacity["all"])
        description += f" Mean accuracy against the budget, keys and values of all tokens: {points}."
    return Words(name="associative-recall", title="Multi-query associative recall", description=description)
