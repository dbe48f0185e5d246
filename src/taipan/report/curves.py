"""The figures of a training run and its evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from taipan.report.figures import CARD, GREY, SERIES, Words, centred_mean, in_page

_REACH = 0.05  # share of a curve's points on either side of a centred mean
_BINS = 48
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """Points of one line, x ascending."""

    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class PositionBar:
    """Bits per byte of the tokens that came after `start` to `stop` (exclusive) others, over `files` files."""

    start: int
    stop: int
    files: int
    bits_per_byte: float


def smoothed(curve: Curve) -> Curve:
    """The centred mean of a curve over a tenth of its points; it begins and ends half a window inside the curve."""
    reach = int(_REACH * len(curve.y))
    return Curve(curve.x[reach : len(curve.x) - reach], centred_mean(curve.y, reach))


def loss_figure(train: Curve, valid: Curve, x_label: str, y_label: str) -> Markup:
    """Loss of training steps, as measured and as a centred mean, and of held-out evaluations."""
    mean = smoothed(train)

    def draw(axes: Any, narrow: bool) -> None:
        axes.plot(train.x, train.y, color=SERIES[0], alpha=0.3, linewidth=1)
        axes.plot(mean.x, mean.y, color=SERIES[0], label="training")
        if valid.x:
            axes.plot(valid.x, valid.y, "o-", color=SERIES[1], markersize=5, linewidth=1.2, label="held out")
        shown = [*mean.y, *valid.y[1:]]
        low, high = min(shown), max(shown)  # the first steps would flatten everything after them
        axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(axes)

    ends = f"Training ends at a mean of {mean.y[-1]:.2f}"
    ends += f", held-out text at {valid.y[-1]:.2f}." if valid.y else "."
    words = Words(
        name="loss",
        title="Loss over training",
        description=f"{y_label.capitalize()} against {x_label}, falling from {train.y[0]:.2f}. {ends}",
    )
    return in_page(draw, words)


def selection_figure(
    trained: Mapping[int, Curve], noise_free: Mapping[int, Curve], budget: Curve, x_label: str
) -> Markup:
    """Selection rates over training: one colour under the training noise, one without noise; a dash per layer."""

    def draw(axes: Any, narrow: bool) -> None:
        axes.plot(budget.x, budget.y, color=GREY, linewidth=5, alpha=0.4, label="budget")
        for number, layer in enumerate(trained):
            dash = _DASHES[number % len(_DASHES)]
            for curves, color, name in ((trained, SERIES[0], "with"), (noise_free, SERIES[1], "without")):
                label = None if number else f"{name} noise"
                axes.plot(curves[layer].x, curves[layer].y, dash, color=color, linewidth=1.5, label=label)
            if len(trained) > 1:
                axes.plot([], [], dash, color=GREY, label=f"layer {layer}")
        _shares(axes, "share of tokens selected", x_label)

    ends = "; ".join(
        f"layer {layer} {100 * trained[layer].y[-1]:.1f} % with and {100 * noise_free[layer].y[-1]:.1f} % without noise"
        for layer in trained
    )
    words = Words(
        name="selection",
        title="Share of tokens selected over training",
        description=f"The budget goes from {100 * budget.y[0]:.0f} to {100 * budget.y[-1]:.0f} %. At the end: {ends}.",
    )
    return in_page(draw, words, height=3.0)


def alpha_figure(alpha: Mapping[int, Curve], x_label: str) -> Markup:
    """Mean α of the selected tokens over training, one colour per layer.

    Args:
        alpha: per layer; points where nothing was selected are left out.
        x_label: names the x axis.
    """

    def draw(axes: Any, narrow: bool) -> None:
        for number, (layer, curve) in enumerate(alpha.items()):
            axes.plot(curve.x, curve.y, color=SERIES[number % len(SERIES)], label=f"layer {layer}")
        _shares(axes, "mean α of selected tokens", x_label)

    ends = ", ".join(f"layer {layer} {curve.y[-1]:.2f}" for layer, curve in alpha.items() if curve.y)
    words = Words(
        name="alpha",
        title="α of the selected tokens over training",
        description=f"Mean mixing weight of the tokens that were selected, between 0 and 1. At the end: {ends}.",
    )
    return in_page(draw, words, height=2.5)


def position_figure(bars: Sequence[PositionBar], references: Mapping[str, float], context_length: int) -> Markup:
    """Bits per byte of each bucket of positions over the same files, beside constant references.

    Args:
        bars: in order of position, at least one.
        references: name and bits per byte of the same files.
        context_length: of training.
    """
    bits = [bar.bits_per_byte for bar in bars]
    ranges = [f"{_short(bar.start)}–{_short(bar.stop)}" for bar in bars]

    def draw(axes: Any, narrow: bool) -> None:
        places = list(range(len(bars)))
        axes.bar(places, bits, color=SERIES[0], width=0.76)
        for place, value in zip(places, bits, strict=True):  # at the foot, where no line crosses them
            at_foot = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{value:.2f}", (place, 0), **at_foot, fontsize=9 if narrow else 10, color=CARD)
        for number, (name, value) in enumerate(references.items()):
            axes.axhline(value, color=SERIES[1 + number], linewidth=1.6, linestyle=_DASHES[1 + number], label=name)
        trained = sum(bar.stop <= context_length for bar in bars)
        if 0 < trained < len(bars):
            axes.axvline(trained - 0.5, color=GREY, linewidth=1.4)
        counts = [str(bar.files) if narrow else f"{bar.files} file{'s' * (bar.files != 1)}" for bar in bars]
        labels = [label.replace("–", "–\n") if narrow else label for label in ranges]
        axes.set_xticks(places, [f"{label}\n{count}" for label, count in zip(labels, counts, strict=True)])
        axes.tick_params(axis="x", labelsize=9 if narrow else 10, length=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, max((*bits, *references.values())) * 1.08)
        axes.set_xlabel("tokens of the file read before" + ("; number of files" if narrow else ""))
        axes.set_ylabel("bits per byte")
        _legend(axes)

    values = ", ".join(f"{name}: {value:.2f}" for name, value in zip(ranges, bits, strict=True))
    compared = ", ".join(f"{name} {value:.2f}" for name, value in references.items())
    words = Words(
        name="position",
        title="Bits per byte by tokens read before",
        description=f"{bars[0].files} files, the same in every bar. {values}. For comparison: {compared}.",
    )
    return in_page(draw, words, height=3.5)


def margin_figure(above: Mapping[int, NDArray[np.floating]]) -> Markup:
    """Distribution of the tokens' margins above the threshold of their layer, one colour per layer.

    Args:
        above: per layer s_1 − s_0 − threshold of every token.
    """
    everything = np.concatenate(list(above.values()))
    low, high = (float(np.quantile(everything, share)) for share in (0.005, 0.995))
    width = max(max(high, 0.0) - min(low, 0.0), 1e-3) / _BINS
    # a bin begins at the threshold, so that no bar is partly selected
    edges = width * np.arange(np.floor(min(low, 0.0) / width), max(np.ceil(high / width), 1.0) + 1)

    def draw(axes: Any, narrow: bool) -> None:
        for number, (layer, values) in enumerate(above.items()):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            color = SERIES[number % len(SERIES)]
            axes.stairs(100 * counts / len(values), edges, color=color, linewidth=1.6, label=f"layer {layer}")
            right = edges >= -1e-9
            axes.stairs(100 * counts[right[:-1]] / len(values), edges[right], color=color, fill=True, alpha=0.3)
        axes.axvline(0.0, color=GREY, linewidth=1.4)
        axes.set_xlabel("margin s₁ − s₀ above the threshold")
        axes.set_ylabel("% of tokens")
        _legend(axes)

    shares = ", ".join(f"{100 * float((values > 0).mean()):.1f} % in layer {layer}" for layer, values in above.items())
    words = Words(
        name="margin",
        title="Margins of the gates",
        description=f"How far each token's margin lies above or below the threshold. Above it: {shares}.",
    )
    return in_page(draw, words, height=2.5)


def _shares(axes: Any, y_label: str, x_label: str) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _legend(axes)


def _legend(axes: Any) -> None:
    """Above the axes, where it covers no data."""
    names = axes.get_legend_handles_labels()[1]
    axes.legend(
        ncols=min(4, len(names)), columnspacing=1.2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0
    )


def _short(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)
