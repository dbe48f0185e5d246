"""Figures as inline SVG that follow the page's light or dark colours."""

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Readable on white and on near-black.
COLORS = ("#d9580d", "#3b82c4", "#2f9e5f", "#a35bc0", "#c9a20a", "#c43b6b")
GREY = "#8b93a0"
# Stands for "the colour of the surrounding text"; replaced when the SVG is written.
_INK = "#010203"


@contextmanager
def figure(width: float = 9.0, height: float = 3.4) -> Generator[tuple["Figure", "Axes"]]:
    """A figure with one pair of axes in the style of the pages; sizes in inches at 72 dpi."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's own font
        "svg.hashsalt": "taipan",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "xtick.labelcolor": _INK,
        "ytick.color": GREY,
        "ytick.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
    with rc_context(style):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing, drawing.add_subplot()


def to_svg(drawing: "Figure") -> Markup:
    """The figure as an SVG element without a background, its text in the colour of the page."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("sans-serif", "inherit")
    return Markup(svg)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Running mean with exponentially falling weights, corrected for its start."""
    smoothed: list[float] = []
    mean, mass = 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass)
    return smoothed
