"""Figures as SVG: drawn once for a wide and once for a narrow page, in the colours of a light or a dark one."""

import io
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from taipan.report.palette import DARK, LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What matplotlib is given for a colour of the palette: replaced when the SVG is written.
_PLACEHOLDERS = {name: f"#01{number:02x}fe" for number, name in enumerate(LIGHT.variables, 1)}
INK = _PLACEHOLDERS["ink"]
CARD = _PLACEHOLDERS["card"]
GREY = _PLACEHOLDERS["grey"]
SERIES = tuple(_PLACEHOLDERS[f"series-{number}"] for number in range(1, len(LIGHT.series) + 1))

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Words:
    """A figure in words, for screen readers.

    Attributes:
        name: its identifier, unique on the page; letters, digits and dashes.
        title: its name in a few words.
        description: what it shows, in a sentence or two, with the numbers that matter.
    """

    name: str
    title: str
    description: str


@contextmanager
def styled() -> Generator[None]:
    """Context in which matplotlib draws in the style of the pages."""
    from matplotlib import rc_context

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's own font
        "svg.hashsalt": "taipan",
        "font.family": "DejaVu Sans",  # measured with the font that matplotlib brings: the same figure everywhere
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "xtick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.color": GREY,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
    with rc_context(style):
        yield


def in_page(draw: Callable[[Any, bool], None], words: Words, *, height: float = 3.3) -> Markup:
    """A figure with one pair of axes as two SVG elements, wide and narrow; the page's style shows one.

    Args:
        draw: draws on axes of matplotlib; its second argument says whether they are narrow.
        words: title and description.
        height: in inches; 9 inches are the width of the wide one, 4.5 of the narrow one.
    """
    from matplotlib.figure import Figure

    parts: list[Markup] = []
    for kind, width in (("wide", 9.0), ("narrow", 4.5)):
        with styled():
            drawing = Figure(figsize=(width, height), layout="constrained")
            draw(drawing.add_subplot(), kind == "narrow")
            parts.append(Markup('<div class="{}">{}</div>').format(kind, _inline(drawing, words, kind)))
    return Markup("").join(parts)


def _inline(drawing: "Figure", words: Words, kind: str) -> Markup:
    """The figure as an SVG element without a background, in the CSS variables of the page."""
    svg = _svg(drawing, f"{words.name}-{kind}", words)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    for name, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return Markup(svg.replace(_MEASURED_FONT, "font-family: inherit"))


def standalone(drawing: "Figure", words: Words) -> str:
    """The figure as an SVG file with its own background, light or dark as the reader prefers.

    A viewer without media queries shows the light one.
    """
    svg = _svg(drawing, words.name, words)
    for name, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, LIGHT.variables[name])
    rules = [
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for (name, light), dark in zip(LIGHT.variables.items(), DARK.variables.values(), strict=True)
        for part in ("fill", "stroke")
        if f"{part}: {light}" in svg or name == "card"
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    ground = f'<rect width="100%" height="100%" rx="10" style="fill: {LIGHT.card}"/>'
    svg = svg.replace("<defs>", f"{style}{ground}<defs>", 1).replace(_MEASURED_FONT, f"font-family: {_FONTS}")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}'


_MEASURED_FONT = "font-family: 'DejaVu Sans'"


def _svg(drawing: "Figure", name: str, words: Words) -> str:
    """An SVG element with title and description; its identifiers are unique on a page."""
    buffer = io.StringIO()
    unwanted = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawing.savefig(buffer, format="svg", transparent=True, metadata=unwanted)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc" ', 1)
    head = f'<title id="{name}-title">{escape(words.title)}</title>'
    head += f'<desc id="{name}-desc">{escape(words.description)}</desc>'
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + head, svg, count=1)


def centred_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of a value and the `reach` values before and after it, for every value that has as many on both sides.

    Every mean is over 2 · `reach` + 1 values, so all are equally smooth; the result is 2 · `reach` values shorter, and
    empty if there are not so many. A straight line stays as it is: what came before does not hold a falling curve up.
    """
    width = 2 * reach + 1
    return [sum(values[start : start + width]) / width for start in range(len(values) - width + 1)]
