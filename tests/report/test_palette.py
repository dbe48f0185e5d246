"""Contrast of every pair of colours that meet on a page, by the formula of WCAG 2."""

import pytest

from taipan.report.palette import DARK, LIGHT, Palette


def luminance(color: str) -> float:
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_a_contrast_of_aa(palette: Palette) -> None:
    pairs = {(text, ground) for text in ("ink", "muted", "accent", "good") for ground in ("paper", "card")}
    pairs |= {("ink", f"heat-{level}") for level in range(1, len(palette.heat) + 1)}  # selected tokens
    pairs |= {("paper", "ink"), ("card", "ink")}  # the scores of a token; a pressed button
    pairs |= {("card", "series-1")}  # the values in the bars
    colors = palette.variables
    ratios = {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in pairs}
    assert min(ratios.values()) >= 4.5, ratios


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_marks_have_a_contrast_of_aa(palette: Palette) -> None:
    ratios = {color: contrast(color, palette.card) for color in (*palette.series, palette.grey, palette.accent)}
    assert min(ratios.values()) >= 3.0, ratios


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_the_ramp_rises(palette: Palette) -> None:
    steps = [contrast(color, palette.card) for color in palette.heat]
    assert steps == sorted(steps)
    assert steps[0] > 1.15, "the weakest selected token is told from an unselected one"
    assert steps[-1] > 2


def test_both_modes_name_the_same_colours() -> None:
    assert LIGHT.variables.keys() == DARK.variables.keys()
