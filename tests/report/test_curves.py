import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from math import exp, isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from taipan.report import figures
from taipan.report.curves import (
    Curve,
    PositionBar,
    alpha_figure,
    loss_figure,
    margin_figure,
    position_figure,
    selection_figure,
    smoothed,
)
from taipan.report.figures import Words, centred_mean, standalone, styled
from taipan.report.palette import DARK, LIGHT
from tests.report.accessible import faults

CURVE = Curve([0.0, 1.0, 2.0], [3.0, 2.0, 1.5])
SHARE = Curve([0.0, 1.0, 2.0], [1.0, 0.5, 0.15])
BARS = [PositionBar(0, 64, 7, 3.0), PositionBar(64, 128, 7, 2.5), PositionBar(128, 2048, 7, 2.0)]
NAMES = ("loss", "selection", "alpha", "position", "margin")


@cache
def drawn(name: str) -> Markup:
    match name:
        case "loss":
            return loss_figure(CURVE, CURVE, "tokens", "bits per byte")
        case "selection":
            return selection_figure({2: SHARE}, {2: SHARE}, SHARE, "tokens")
        case "alpha":
            return alpha_figure({2: SHARE}, "tokens")
        case "position":
            return position_figure(BARS, {"gzip −9": 2.03, "xz −9": 1.9}, 128)
        case _:
            return margin_figure({2: np.linspace(-5, 2, 50), 5: np.linspace(-1, 1, 50)})


def texts(svg: str) -> str:
    root = ElementTree.fromstring(f"<div>{svg}</div>")
    return " ".join(element.text or "" for element in root.iter() if element.text)


@pytest.mark.parametrize("name", NAMES)
def test_figures_come_in_two_widths_in_the_colours_of_the_page(name: str) -> None:
    svg = drawn(name)
    assert svg.count("<svg") == 2
    assert svg.count('class="wide"') == svg.count('class="narrow"') == 1
    assert "var(--ink)" in svg
    assert not re.findall(r"#01[0-9a-f]{2}fe", svg), "a placeholder is left"
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
    assert used <= LIGHT.variables.keys()
    assert not re.findall(r"(?:fill|stroke): #", svg), "a colour that does not follow the page"


def test_figures_have_role_title_and_description() -> None:
    page = f'<html lang="en">{Markup("").join(map(drawn, NAMES))}</html>'
    assert page.count('role="img"') == 2 * len(NAMES)
    assert faults(page) == []


def test_descriptions_say_the_numbers() -> None:
    for shown in ("0–64", "128–2K", "2.50", "gzip −9", "7 files"):
        assert shown in texts(drawn("position"))
    assert "with noise" in texts(drawn("selection"))
    assert "without noise" in texts(drawn("selection"))
    assert "held out" in texts(drawn("loss"))


def test_the_two_rates_have_two_colours() -> None:
    two = selection_figure({2: SHARE, 5: SHARE}, {2: SHARE, 5: SHARE}, SHARE, "tokens")
    wide = two[: two.index('class="narrow"')]
    lines = re.findall(r'<path d="[^"]*" clip-path[^>]*style="([^"]*)"', wide)
    series = [re.search(r"stroke: var\(--(series-\d)\)", line) for line in lines]
    assert [match[1] for match in series if match] == ["series-1", "series-2"] * 2
    for words in ("with noise", "without noise", "layer 2", "layer 5"):
        assert f">{words}<" in wide
    dashed = ["stroke-dasharray" in line for line, match in zip(lines, series, strict=True) if match]
    assert dashed == [False, False, True, True], "layers differ by their dashes"


def test_every_bar_says_how_many_files_it_is_about() -> None:
    wide = drawn("position").split('<div class="narrow"')[0]
    assert texts(wide).count("7 files") == len(BARS) + 1  # and in the description


def test_a_run_without_evaluation_has_a_loss_figure() -> None:
    assert "held" not in texts(loss_figure(Curve([1.0], [2.0]), Curve([], []), "x", "y"))


def test_many_layers_fit() -> None:
    """matplotlib warns, and a warning is an error, if a legend leaves no room for the axes."""
    many = dict.fromkeys(range(6), SHARE)
    for svg in (selection_figure(many, many, SHARE, "tokens"), alpha_figure(many, "tokens")):
        assert svg.count(">layer 5<") == 2


@pytest.mark.parametrize("margins", [[-3.0] * 4, [2.0], [0.0, 0.0], [-1e6, 1e6]])
def test_any_margins_can_be_drawn(margins: list[float]) -> None:
    assert margin_figure({0: np.array(margins)}).count("<svg") == 2


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(0, 9))
def test_a_centred_mean_stays_within_its_window(values: list[float], reach: int) -> None:
    means = centred_mean(values, reach)
    assert len(means) == max(0, len(values) - 2 * reach)
    for place, mean in enumerate(means, reach):
        window = values[place - reach : place + reach + 1]
        assert isclose(mean, sum(window) / len(window), abs_tol=1e-9)


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 40), st.integers(0, 9))
def test_a_centred_mean_leaves_a_straight_line_alone(begin: float, slope: float, count: int, reach: int) -> None:
    line = [begin + slope * place for place in range(count)]
    inside = line[reach : count - reach]
    assert all(isclose(a, b, abs_tol=1e-6) for a, b in zip(centred_mean(line, reach), inside, strict=True))


def test_the_training_curve_is_not_held_up_by_its_past() -> None:
    falling = Curve(range(200), [1.5 + 3 * exp(-place / 40) for place in range(200)])
    mean = smoothed(falling)
    true = dict(zip(falling.x, falling.y, strict=True))
    assert max(abs(y / true[x] - 1) for x, y in zip(mean.x, mean.y, strict=True)) < 0.01


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 200])
def test_the_training_curve_does_not_end_on_a_single_measurement(count: int) -> None:
    """One outlier at either end moves the means no further than one in the middle."""

    def furthest(place: int) -> float:
        values = [0.0] * count
        values[place] = 1.0
        return max(smoothed(Curve(range(count), values)).y)

    width = 2 * int(0.05 * count) + 1
    assert furthest(0) == furthest(-1) == furthest(count // 2) == pytest.approx(1 / width)
    mean = smoothed(Curve(range(count), [0.0] * count))
    assert len(mean.x) == len(mean.y) == count - width + 1
    assert mean.x[0] == count - 1 - mean.x[-1] == width // 2


def test_a_standalone_figure_follows_light_and_dark() -> None:
    from matplotlib.figure import Figure

    with styled():
        drawing = Figure(figsize=(4, 3))
        drawing.add_subplot().plot([1, 2], [3, 4], color=figures.SERIES[0])
        svg = standalone(drawing, Words(name="f", title="T & t", description="D"))
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert "T & t" in texts(svg[svg.index("<svg") :])
    assert f'style="fill: {LIGHT.card}"' in svg
    dark = svg[svg.index("prefers-color-scheme: dark") :]
    for light, instead in (
        (LIGHT.card, DARK.card),
        (LIGHT.ink, DARK.ink),
        (LIGHT.series[0], DARK.series[0]),
        (LIGHT.grey, DARK.grey),
    ):
        assert re.search(rf"{light}\"\] {{ (fill|stroke): {instead} !important", dark)
    without_rules = re.sub(r"<style>@media.*?</style>", "", svg, flags=re.DOTALL)
    assert set(re.findall(r"#[0-9a-f]{6}", without_rules)) <= set(LIGHT.variables.values())
