"""The colours of the pages and their figures, once for a light and once for a dark page."""

from dataclasses import dataclass, fields

_HEAT_LEVELS = 8


def _mix(ground: str, color: str, share: float) -> str:
    """`share` of a colour over a ground, both as #rrggbb."""
    pairs = [(int(ground[i : i + 2], 16), int(color[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in pairs)


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours as #rrggbb. Text has a contrast of at least 4.5, lines and marks of at least 3 (WCAG AA).

    Attributes:
        paper, card: backgrounds of the page and of its boxes.
        ink, muted: text, and text of less weight.
        line: borders and rules, without meaning.
        accent: links, focus and the one number that matters.
        good: the best value of a row.
        grey: axes and references in figures.
        series: lines and bars of figures, in order.
        glow: the strongest background of a selected token, under text in ink.
    """

    paper: str
    card: str
    ink: str
    muted: str
    line: str
    accent: str
    good: str
    grey: str
    series: tuple[str, ...]
    glow: str

    @property
    def heat(self) -> tuple[str, ...]:
        """Backgrounds of selected tokens, from the weakest to the strongest."""
        levels = range(1, _HEAT_LEVELS + 1)
        return tuple(_mix(self.card, self.glow, 0.25 + 0.75 * (level - 1) / (_HEAT_LEVELS - 1)) for level in levels)

    @property
    def variables(self) -> dict[str, str]:
        """Every colour by the name of its CSS variable (without the dashes)."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "series"}
        series = {f"series-{number}": color for number, color in enumerate(self.series, 1)}
        heat = {f"heat-{number}": color for number, color in enumerate(self.heat, 1)}
        return {**plain, **series, **heat}


LIGHT = Palette(
    paper="#fdfdfb",
    card="#ffffff",
    ink="#1b1f27",
    muted="#5b6472",
    line="#e3e5ea",
    accent="#b93c0a",
    good="#15703a",
    grey="#6b7380",
    series=("#c2410c", "#1d6fb8", "#15803d", "#8e44ad", "#8a6d00", "#b8326b"),
    glow="#fb8a3c",
)
DARK = Palette(
    paper="#13161b",
    card="#1a1e25",
    ink="#e9ebef",
    muted="#a2abb8",
    line="#2c323c",
    accent="#fb923c",
    good="#4ade80",
    grey="#97a1af",
    series=("#fb923c", "#60a5fa", "#4ade80", "#c792ea", "#e6c84a", "#f472b6"),
    glow="#a84a10",
)
