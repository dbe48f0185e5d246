"""Figures of the claims, from kept results; what the paper gives in numbers stands beside ours."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from markupsafe import Markup

from taipan.config import TaipanConfig
from taipan.experiments.claims import FOUR, NAMES, Kept, budgets, by_context, found, furthest, reach
from taipan.experiments.laboratory import slug
from taipan.report.figures import GREY, SERIES, Words, in_page, standalone, styled

COLORS: dict[str, str] = dict(zip(("taipan", "jamba", "transformer", "mamba2"), SERIES, strict=False))
"""The same colour for an architecture in every figure."""
_MIB = 2**20
_PAPER_RECALL: dict[str, dict[str, tuple[float, float, float]]] = {
    "450M": {
        "transformer": (43.0, 48.7, 18.1),
        "mamba2": (27.9, 9.8, 12.5),
        "jamba": (35.4, 36.6, 16.3),
        "taipan": (41.4, 39.6, 17.8),
    },
    "1.3B": {
        "transformer": (64.2, 64.5, 41.2),
        "mamba2": (48.6, 32.3, 31.2),
        "jamba": (56.4, 49.7, 33.4),
        "taipan": (61.5, 59.7, 36.9),
    },
}
"""Fig. 4 of the paper: SWDE, FDA, SQuAD."""
_PAPER_ZERO_SHOT: dict[str, dict[str, float]] = {
    "190M": {"transformer": 38.1, "mamba2": 39.4, "jamba": 39.1, "taipan": 39.9},
    "450M": {"transformer": 45.3, "mamba2": 45.3, "jamba": 46.3, "taipan": 48.2},
    "1.3B": {"transformer": 49.9, "mamba2": 51.7, "jamba": 51.8, "taipan": 53.3},
}
"""Table 1 of the paper, averages."""


def figures(kept: Kept, experiment: str) -> list[tuple[Markup, str]]:
    """The figures of an experiment's results, each with its caption; none where tables say it all."""
    draw = _DRAWN.get(experiment)
    return [] if draw is None else draw(kept)


def _lines(
    kept: Kept,
    what: str,
    title: str,
    curves: Mapping[str, Mapping[float, float]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    mark: float | None = None,
) -> Markup:
    """Lines over a logarithmic axis, one for each architecture; a grey line at `mark`."""
    draw = _drawn_lines(curves, x_label, y_label, log_y, mark)
    return in_page(draw, _line_words(_name(kept, what), title, curves, x_label, y_label))


def _line_words(
    name: str, title: str, curves: Mapping[str, Mapping[float, float]], x_label: str, y_label: str
) -> Words:
    ends = ", ".join(f"{NAMES[name]} {list(curve.values())[-1]:.3g}" for name, curve in curves.items())
    return Words(name=name, title=title, description=f"{y_label} by {x_label}. At the right end: {ends}.")


def _drawn_lines(
    curves: Mapping[str, Mapping[float, float]], x_label: str, y_label: str, log_y: bool, mark: float | None
) -> Callable[[Any, bool], None]:
    def draw(axes: Any, narrow: bool) -> None:
        for name, curve in curves.items():
            axes.plot(list(curve), list(curve.values()), "o-", color=COLORS[name], markersize=4, label=NAMES[name])
        axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
        if mark is not None:
            axes.axvline(mark, color=GREY, linewidth=1.4, linestyle=":")
        points = sorted({point for curve in curves.values() for point in curve})
        shown = points[:: 2 if narrow and len(points) > 6 else 1]
        axes.set_xticks(shown, [_short(point) for point in shown], minor=False)
        axes.minorticks_off()
        _finish(axes, x_label, y_label, narrow)

    return draw


def _finish(axes: Any, x_label: str, y_label: str, narrow: bool) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(
        ncols=2 if narrow else 4, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, columnspacing=1.2
    )


def _short(value: float) -> str:
    if value >= 2**20 and value % 2**20 == 0:
        return f"{value / 2**20:.0f}M"
    return f"{value / 1024:.0f}K" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _place(bucket: Mapping[str, int]) -> int:
    """Where a bucket of positions is drawn: at its start, and the first in its middle, for the axis has no zero."""
    return max(bucket["start"], bucket["stop"] // 2)


def _name(kept: Kept, what: str) -> str:
    return slug(f"{what}-{kept.file.removesuffix('.json')}")


_CONTEXT, _BITS, _FIGURE = "context, tokens", "bits per byte", "loss-by-context"


def _context_curves(kept: Kept, text: str | None) -> dict[str, dict[float, float]]:
    return {name: {float(x): y for x, y in by_context(kept, name, text).items()} for name in FOUR}


def context_figure(found: Sequence[Kept]) -> dict[str, str]:
    """Loss by context as SVG files by name, wide and narrow: of every result the text that was read furthest."""
    from matplotlib.figure import Figure

    panels = [(text, kept, _context_curves(kept, text)) for kept in found if (text := furthest(kept)) is not None]
    if not panels:
        return {}
    told = [_line_words(_FIGURE, "", curves, _CONTEXT, f"the end of {text}, {_BITS}") for text, _, curves in panels]
    words = Words(name=_FIGURE, title="Loss by context", description=" ".join(own.description for own in told))
    made: dict[str, str] = {}
    for narrow in (False, True):
        with styled():
            size = (4.7, 3.4 * len(panels)) if narrow else (4.7 * max(2, len(panels)), 3.6)
            drawing = Figure(figsize=size, layout="constrained")
            shape = (len(panels), 1) if narrow else (1, len(panels))
            for (text, kept, curves), axes in zip(panels, drawing.subplots(*shape, squeeze=False).flat, strict=True):
                _drawn_lines(curves, _CONTEXT, _BITS, False, kept.results["taipan"][0]["context"])(axes, True)
                axes.set_title(f"the end of {text}", fontweight="bold", pad=42)
                axes.get_legend().set(loc="lower left", bbox_to_anchor=(-0.02, 1.0))
            made[f"{_FIGURE}{'-narrow' if narrow else ''}.svg"] = standalone(drawing, words)
    return made


def _contexts(kept: Kept) -> list[tuple[Markup, str]]:
    first = kept.results["taipan"][0]
    training = first["context"]
    positions = {
        name: {
            float(_place(bucket)): kept.mean(name, lambda own, at=at: own["by_position"][at]["bits_per_byte"])
            for at, bucket in enumerate(first["by_position"])
        }
        for name in FOUR
    }
    shape = (
        "The paper's figure 1a (1K to 1M tokens): Taipan lowest and flat, Transformer and Jamba blow up beyond their "
        f"training length, Mamba-2 degrades slowly. Dotted: our training length of {training:,}."
    )
    pictures: list[tuple[Markup, str]] = []
    texts: dict[str, Any] = first.get("long", {})
    for text in (*texts, None):
        of = f"{first['documents']} held-out documents of {first['length']:,} tokens"
        if text is not None:
            of = f"the last {texts[text]['scored']:,} tokens of {text}, the same at every context"
        what = "context" if text is None else f"context-{text}"
        picture = _lines(kept, what, "Loss by context", _context_curves(kept, text), _CONTEXT, _BITS, mark=training)
        pictures.append((picture, f"Loss by context, ours: {of}. {shape}"))
    picture = _lines(kept, "position", "Loss by position", positions, "tokens read before", _BITS, mark=training)
    caption = f"Loss by position, {first['documents']} documents read whole: every point has the same documents."
    return [*pictures, (picture, caption)]


def _latency(kept: Kept) -> list[tuple[Markup, str]]:
    def curve(name: str, job: str, key: str, scale: float) -> dict[float, float]:
        return {float(point["length"]): median(point[key]) / scale for point in kept.results[name][0][job]}

    made = {
        (job, key): {name: curve(name, job, key, scale) for name in FOUR}
        for job in ("generate", "prefill")
        for key, scale in (("seconds", 1.0), ("memory", _MIB))
    }
    shape = "The paper's figure 1b: Taipan lowest and linear, 3 to 5 times below the Transformer at 32K tokens."
    machine = kept.results["taipan"][0]["machine"]["cpu"]
    many = len(kept.results["taipan"][0]["generate"][0]["seconds"])
    ours = f"Time of generation, ours: medians of {many}, each measured in a process of its own ({machine})."
    return [
        (
            _lines(kept, "time", "Time of generation", made["generate", "seconds"], "tokens", "seconds", log_y=True),
            f"{ours} {shape}",
        ),
        (
            _lines(kept, "memory", "Memory of generation", made["generate", "memory"], "tokens", "MiB"),
            "Memory of generation: what the process took beyond the model.",
        ),
        (
            _lines(kept, "prefill", "Time of prefill", made["prefill", "seconds"], "tokens", "seconds", log_y=True),
            "Time of reading a prompt.",
        ),
    ]


def _copying(kept: Kept) -> list[tuple[Markup, str]]:
    first = kept.results["taipan"][0]["beyond"]
    buckets = [bucket for bucket in first if first[bucket]["tokens"]]

    def nats(name: str, bucket: str) -> float:
        return kept.mean(name, lambda own: own["beyond"][bucket]["nats"] / max(1.0, own["beyond"][bucket]["tokens"]))

    values = {NAMES[name]: [nats(name, bucket) for bucket in buckets] for name in FOUR}
    labels = [bucket.removeprefix("hit, ") for bucket in buckets]
    title = "Loss of tokens that repeat a bigram, by how far back"
    picture = _bars(kept, "copying", title, values, labels, "nats per token", FOUR)
    caption = "Loss of tokens by what they repeat, in contexts of eight times the training length. “No hit” are all "
    caption += "tokens that repeat nothing."
    return [(picture, caption)]


def _recall(kept: Kept) -> list[tuple[Markup, str]]:
    ours = {name: found(kept, f"{name}, with tasks") for name in FOUR if f"{name}, with tasks" in kept.results}
    tasks = list(next(iter(ours.values())))
    pictures = [
        (
            _bars(
                kept,
                "recall",
                "Answers found, ours",
                {NAMES[name]: [100 * shares[task] for task in tasks] for name, shares in ours.items()},
                tasks,
                "% of the questions",
                list(ours),
            ),
            "Answers found, ours: models trained with a share of such tasks; pass keys and pairs are means over "
            "lengths and depths.",
        )
    ]
    for size, values in _PAPER_RECALL.items():
        named = {NAMES[name]: list(values[name]) for name in FOUR}
        title = f"Answers found, the paper's models of {size}"
        picture = _bars(kept, f"recall-{size}", title, named, ["SWDE", "FDA", "SQuAD"], "% of the questions", FOUR)
        pictures.append((picture, f"Answers found, the paper's figure 4, {size}."))
    return pictures


def _zero_shot(kept: Kept) -> list[tuple[Markup, str]]:
    tasks = list(kept.results["taipan"][0]["tasks"])
    own = {
        name: 100 * mean(result["tasks"][task]["score"] for result in kept.results[name] for task in tasks)
        for name in FOUR
    }
    sizes = ["ours", *_PAPER_ZERO_SHOT]
    values = {NAMES[name]: [own[name], *(row[name] for row in _PAPER_ZERO_SHOT.values())] for name in FOUR}
    picture = _bars(kept, "zero-shot", "Averages of zero-shot tasks", values, sizes, "%", FOUR)
    return [(picture, f"Average accuracy, ours over {len(tasks)} tasks, the paper's over nine (Table 1).")]


def _bars(
    kept: Kept,
    what: str,
    title: str,
    values: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    y_label: str,
    names: Sequence[str],
) -> Markup:
    """Groups of bars, one for each architecture."""

    def draw(axes: Any, narrow: bool) -> None:
        width = 0.8 / len(values)
        for number, (name, own) in enumerate(values.items()):
            places = [at + (number - (len(values) - 1) / 2) * width for at in range(len(labels))]
            axes.bar(places, own, width * 0.92, color=COLORS[names[number]], label=name)
        shown = [label.replace(" ", "\n") for label in labels] if narrow else labels
        axes.set_xticks(range(len(labels)), shown)
        axes.tick_params(axis="x", labelsize=9 if narrow else 10, length=0)
        axes.grid(axis="x", visible=False)
        _finish(axes, "", y_label, narrow)

    told = "; ".join(f"{name} {', '.join(f'{value:.3g}' for value in own)}" for name, own in values.items())
    words = Words(name=_name(kept, what), title=title, description=f"{', '.join(labels)}, {y_label}: {told}.")
    return in_page(draw, words)


def _capacity(kept: Kept) -> list[tuple[Markup, str]]:
    pictures: list[tuple[Markup, str]] = []
    shape = "The paper's figure 5 (SWDE and HellaSwag at 1.3B, C from 0.10 to 0.25): 0.15 is the knee."
    for size in ("", ", larger"):
        curve = budgets(kept, size)
        if not curve:
            continue
        blind = {
            label: kept.mean(f"C = 0.15, {way}{size}", lambda own: own["bits_per_byte"])
            for way, label in (("by chance", "chosen by chance"), ("every k-th", "every k-th"))
        }

        def draw(axes: Any, narrow: bool, curve: dict[float, float] = curve, blind: dict[str, float] = blind) -> None:
            axes.plot(list(curve), list(curve.values()), "o-", color=SERIES[0], markersize=5, label="learned")
            for number, (label, value) in enumerate(blind.items()):
                axes.plot([0.15], [value], "sD"[number], color=SERIES[1 + number], markersize=7, label=label)
            _finish(axes, "budget C", "bits per byte", narrow)

        told = ", ".join(f"{value:.3f} at C = {c:.2f}" for c, value in curve.items())
        words = Words(
            name=_name(kept, f"capacity{size}"),
            title=f"Loss by budget{size}",
            description=f"Held-out bits per byte: {told}; {', '.join(f'{k} {v:.3f}' for k, v in blind.items())}.",
        )
        pictures.append((in_page(draw, words), f"Loss by budget, ours{size}. {shape}"))
    return pictures


def _positions(kept: Kept) -> list[tuple[Markup, str]]:
    first = kept.results["without"][0]
    training = first["context"]

    def draw(axes: Any, narrow: bool) -> None:
        for number, name in enumerate(("without", "RoPE")):
            points = [
                (_place(bucket), kept.mean(name, lambda own, at=at: own["by_position"][at]["bits_per_byte"]))
                for at, bucket in enumerate(first["by_position"])
            ]
            label = "no positional embedding" if name == "without" else name
            axes.plot(*zip(*points, strict=True), "o-", color=SERIES[number], markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.axvline(training, color=GREY, linewidth=1.4, linestyle=":")
        _finish(axes, "tokens read before", "bits per byte", narrow)

    words = Words(
        name=_name(kept, "positions"),
        title="A SAL with rotary embedding and without",
        description="Held-out bits per byte by position; the table has the numbers.",
    )
    shape = (
        "The paper's figure 6 (1K to 128K tokens): equal up to the training length, without is clearly better beyond."
    )
    return [(in_page(draw, words), f"Loss by position, ours; the dotted line is the training length. {shape}")]


def _retention(kept: Kept) -> list[tuple[Markup, str]]:
    from taipan.experiments.retention import EVICTIONS, WAYS

    curves = {(eviction, way.name): reach(kept, eviction, way.name) for eviction in EVICTIONS for way in WAYS}

    def draw(axes: Any, narrow: bool) -> None:
        for (eviction, way), curve in curves.items():
            color = SERIES[[own.name for own in WAYS].index(way)]
            style = "o-" if eviction == "weakest" else "o:"
            axes.plot(list(curve), list(curve.values()), style, color=color, markersize=4, label=f"{eviction}: {way}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.03)
        points = list(next(iter(curves.values())))
        axes.set_xticks(points, [_short(point) for point in points], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("tokens between statement and question")
        axes.set_ylabel("share of the keys found")
        axes.legend(ncols=1 if narrow else 2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)

    longest = max(next(iter(curves.values())))
    told = "; ".join(f"{eviction}, {way}: {curve[longest]:.2f}" for (eviction, way), curve in curves.items())
    words = Words(
        name=_name(kept, "retention"),
        title="Keys found, by how long ago they were stated",
        description=f"Share of the keys found {longest:,} tokens later, by what leaves the window: {told}.",
    )
    slots = kept.results["taipan"][0]["config"]["sliding_window"]
    caption = (
        f"Pass keys and key–value pairs, one model read in two ways, {slots} slots: whether the weakest entry leaves "
    )
    caption += "its window (lines) or the oldest (dotted)."
    return [(in_page(draw, words), caption)]


def _mqar(kept: Kept) -> list[tuple[Markup, str]]:
    from taipan.experiments.mqar import PUBLISHED, accuracy, state_bytes

    points: dict[str, tuple[float, float]] = {}
    for name, own in kept.results.items():
        config = TaipanConfig.from_dict(own[0]["config"])
        recurrent, window = state_bytes(config)
        if "full_attention" not in config.layer_types:  # whose state has no size
            points[name] = ((recurrent + window) / 1024, kept.mean(name, accuracy))

    def draw(axes: Any, narrow: bool) -> None:
        for number, family in enumerate(("Taipan", "Mamba-2", "sliding")):
            own = {name: point for name, point in points.items() if name.startswith(family)}
            axes.plot(
                *zip(*own.values(), strict=True), "o", color=SERIES[number], markersize=7, label=f"{family}, ours"
            )
            known = [(points[name][0], PUBLISHED[name]) for name in own if name in PUBLISHED]
            if known:
                style = {"markerfacecolor": "none", "markersize": 10}
                axes.plot(*zip(*known, strict=True), "o", color=SERIES[number], **style, label=f"{family}, zoology")
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.03)
        _finish(axes, "state of all layers, KiB", "mean accuracy", narrow)

    told = ", ".join(f"{name} {value:.3f} with {size:.0f} KiB" for name, (size, value) in points.items())
    words = Words(name=_name(kept, "mqar"), title="Recall by size of state", description=f"{told}.")
    return [(in_page(draw, words), "Multi-query associative recall; rings are read off zoology's published plot.")]


_DRAWN: dict[str, Callable[[Kept], list[tuple[Markup, str]]]] = {
    "perplexity-by-context": _contexts,
    "latency-by-length": _latency,
    "copying": _copying,
    "recall": _recall,
    "zero-shot": _zero_shot,
    "capacity": _capacity,
    "positions": _positions,
    "retention": _retention,
    "mqar": _mqar,
}
