"""The figures of a training run and its evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from taipan.report.figures import COLORS, GREY, figure, smooth, to_svg


@dataclass(frozen=True)
class Curve:
    """Points of one line, x ascending."""

    x: Sequence[float]
    y: Sequence[float]


def loss_figure(train: Curve, valid: Curve, x_label: str, y_label: str) -> Markup:
    """Loss of training steps, raw and smoothed, and of held-out evaluations."""
    with figure() as (drawing, axes):
        axes.plot(train.x, train.y, color=COLORS[0], alpha=0.25, linewidth=1)
        axes.plot(train.x, smooth(train.y), color=COLORS[0], label="training")
        if valid.x:
            axes.plot(valid.x, valid.y, "o-", color=COLORS[1], markersize=4, linewidth=1.2, label="held out")
        shown = [value for value in (*smooth(train.y)[len(train.y) // 20 :], *valid.y[1:])]
        if shown:  # the first steps would flatten everything after them
            low, high = min(shown), max(shown)
            axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend()
        return to_svg(drawing)


def selection_figure(
    trained: Mapping[int, Curve], noise_free: Mapping[int, Curve], budget: Curve, x_label: str
) -> Markup:
    """Selection rates over training: one colour per layer, solid as trained, dashed by the noise-free rule."""
    with figure(height=3.0) as (drawing, axes):
        axes.plot(budget.x, budget.y, color=GREY, linewidth=4, alpha=0.5, label="budget")
        for number, (layer, curve) in enumerate(trained.items()):
            color = COLORS[number % len(COLORS)]
            axes.plot(curve.x, curve.y, color=color, linewidth=1.4, label=f"layer {layer}, as trained")
            free = noise_free[layer]
            axes.plot(free.x, free.y, "--", color=color, linewidth=1.4, label=f"layer {layer}, noise-free")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of tokens selected")
        axes.legend()
        return to_svg(drawing)


def alpha_figure(mean: Mapping[int, Curve], spread: Mapping[int, Curve], x_label: str) -> Markup:
    """Mean of α over training with a band of one standard deviation, one colour per layer."""
    with figure(height=2.4) as (drawing, axes):
        for number, (layer, curve) in enumerate(mean.items()):
            color = COLORS[number % len(COLORS)]
            low = [m - s for m, s in zip(curve.y, spread[layer].y, strict=True)]
            high = [m + s for m, s in zip(curve.y, spread[layer].y, strict=True)]
            axes.fill_between(curve.x, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(curve.x, curve.y, color=color, label=f"layer {layer}")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(x_label)
        axes.set_ylabel("α")
        axes.legend()
        return to_svg(drawing)


def position_figure(
    edges: Sequence[tuple[int, int]], bits: Sequence[float], references: Mapping[str, float], context_length: int
) -> Markup:
    """Bits per byte of each bucket of positions, beside constant references."""
    with figure() as (drawing, axes):
        labels = [f"{_short(low)}–{_short(high)}" for low, high in edges]
        places = list(range(len(labels)))
        axes.bar(places, bits, color=COLORS[0], width=0.72, alpha=0.85)
        for place, value in zip(places, bits, strict=True):
            axes.annotate(f"{value:.2f}", (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=10)
        for number, (name, value) in enumerate(references.items()):
            axes.axhline(value, color=COLORS[1 + number], linewidth=1.4, linestyle="--", label=f"{name}, whole file")
        trained = sum(high <= context_length for _, high in edges)
        if 0 < trained < len(edges):
            axes.axvline(trained - 0.5, color=GREY, linewidth=1.4)
        axes.set_xticks(places, labels)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, max((*bits, *references.values())) * 1.18)
        axes.set_xlabel("tokens of the file read before")
        axes.set_ylabel("bits per byte")
        axes.legend(ncols=2, loc="upper right")
        return to_svg(drawing)


def _short(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)
