import xml.etree.ElementTree as ElementTree
from math import isclose

from hypothesis import given
from hypothesis import strategies as st

from taipan.report.curves import Curve, alpha_figure, loss_figure, position_figure, selection_figure
from taipan.report.figures import smooth


def texts(svg: str) -> str:
    return " ".join(element.text or "" for element in ElementTree.fromstring(svg).iter() if element.text)


def test_figures_are_svg_in_the_colours_of_the_page() -> None:
    curve = Curve([0.0, 1.0, 2.0], [3.0, 2.0, 1.5])
    share = Curve([0.0, 1.0, 2.0], [1.0, 0.5, 0.15])
    figures = [
        loss_figure(curve, curve, "tokens", "bits per byte"),
        selection_figure({2: share}, {2: share}, share, "tokens"),
        alpha_figure({2: share}, {2: share}, "tokens"),
        position_figure([(0, 64), (64, 128), (128, 2048)], [3.0, 2.5, 2.0], {"gzip −9": 2.03}, 128),
    ]
    for svg in figures:
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert texts(svg)
    assert "layer 2, noise-free" in texts(figures[1])
    for shown in ("0–64", "128–2K", "2.50", "gzip −9"):
        assert shown in texts(figures[3])


def test_a_run_without_evaluation_has_a_loss_figure() -> None:
    assert "held out" not in texts(loss_figure(Curve([1.0], [2.0]), Curve([], []), "x", "y"))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_smoothing_stays_within_what_was_seen(values: list[float]) -> None:
    smoothed = smooth(values)
    assert len(smoothed) == len(values)
    assert isclose(smoothed[0], values[0], abs_tol=1e-9)
    for number, value in enumerate(smoothed):
        assert min(values[: number + 1]) - 1e-9 <= value <= max(values[: number + 1]) + 1e-9
