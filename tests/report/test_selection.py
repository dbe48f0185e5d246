import base64
import html
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taipan.report.page import render
from taipan.report.selection import LayerSelection, SelectionView, margins, selection_view

TEXTS = st.lists(st.text(alphabet='ab\n <&>"é🐍', max_size=4), min_size=1, max_size=60)


def layers_for(tokens: int, seed: int, count: int = 2) -> list[LayerSelection]:
    generator = np.random.default_rng(seed)
    layers: list[LayerSelection] = []
    for number in range(count):
        margin_T = generator.normal(-1, 2, tokens)
        layers.append(
            LayerSelection(
                layer=3 * number, selected_T=margin_T > 0.25, margin_T=margin_T, capacity=0.15, threshold=0.25
            )
        )
    return layers


def inspect_page(view: SelectionView, source: str = "s") -> str:
    words = {"title": "t", "version": "0", "made": "", "source": source, "model": "m", "command": "c"}
    return render("inspect.html.j2", **words, view=view, margin_figure=None)


@given(texts=TEXTS, seed=st.integers(0, 9))
def test_the_page_holds_the_text_and_what_was_selected(texts: list[str], seed: int) -> None:
    layers = layers_for(len(texts), seed)
    view = selection_view(texts, layers, vocabulary=257)
    page = inspect_page(view)
    # the text, escaped, in order
    shown = re.findall(r"<b(?: n)?>(.*?)</b>", page, flags=re.DOTALL)
    assert "".join(html.unescape(piece) for piece in shown) == "".join(texts)
    # as the browser reads it
    data = re.search(r'id="selection">(.*?)</script>', page)
    first = re.search(r'id="first">(.*?)</script>', page)
    assert data is not None
    assert first is not None
    for layer, read in zip(layers, json.loads(data[1]), strict=True):
        codes = np.frombuffer(base64.b64decode(read["codes"]), "<u2")
        assert read["layer"] == layer.layer
        np.testing.assert_array_equal(codes >= 32768, layer.selected_T)
        np.testing.assert_allclose(((codes & 32767).astype(float) - 16384) / 128, layer.margin_T, atol=1 / 256)
        assert read["threshold"] == layer.threshold
    begins = np.frombuffer(base64.b64decode(first[1]), "<u4").tolist()
    assert len(begins) == len(shown)
    ends = [*begins[1:], len(texts)]
    for piece, begin, end in zip(shown, begins, ends, strict=True):
        assert html.unescape(piece) == "".join(texts[begin:end])


def test_nothing_in_a_text_can_leave_its_place() -> None:
    texts = ["</script>", "<script>alert(1)</script>", "{{ 7*7 }}", '"><img src=x>']
    view = selection_view(texts, layers_for(len(texts), 0), vocabulary=257)
    page = inspect_page(view, source="<s>")
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<s>" not in page
    assert "{{ 7*7 }}" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)


def test_statistics_are_those_of_the_tokens() -> None:
    [layer] = layers_for(500, 1, count=1)
    assert layer.count == int(layer.selected_T.sum())
    assert layer.share == pytest.approx(layer.count / 500)
    alpha_T = 1 / (1 + np.exp(-layer.margin_T))
    np.testing.assert_allclose(layer.alpha_T, alpha_T)
    assert layer.alpha_selected == pytest.approx(float(alpha_T[layer.margin_T > 0.25].mean()))
    assert 0.5 < layer.alpha_selected < 1


def test_the_colours_reach_from_the_threshold_to_the_largest_margins() -> None:
    margin_T = np.linspace(-10, 10, 401)
    layer = LayerSelection(layer=0, selected_T=margin_T > 2, margin_T=margin_T, capacity=0.1, threshold=2.0)
    assert layer.scale == (2.0, pytest.approx(9.6, abs=0.1))
    for threshold, selected_T in ((float("inf"), margin_T > 99), (float("-inf"), margin_T > -99), (0.0, margin_T > 99)):
        odd = LayerSelection(layer=0, selected_T=selected_T, margin_T=margin_T, capacity=0.1, threshold=threshold)
        low, high = odd.scale
        assert np.isfinite(low)
        assert low < high < 99


def test_margins_beyond_the_code_are_cut_and_stay_selected() -> None:
    margin_T = np.array([-1e5, 1e5, 0.0])
    layer = LayerSelection(layer=0, selected_T=margin_T > 0, margin_T=margin_T, capacity=0.1, threshold=0.0)
    view = selection_view(["a", "b", "c"], [layer], vocabulary=257)
    codes = np.frombuffer(base64.b64decode(json.loads(view.layers_json)[0]["codes"]), "<u2")
    assert (codes & 32767).tolist() == [0, 32767, 16384]
    assert (codes >= 32768).tolist() == [False, True, False]


def test_what_cannot_be_seen_of_a_token_has_a_sign() -> None:
    texts = [" a", "\n", "\t", "\x00"] * 8
    layer = LayerSelection(layer=0, selected_T=np.ones(32, bool), margin_T=np.ones(32), capacity=0.1, threshold=0.0)
    [favourites] = selection_view(texts, [layer], vocabulary=257).favourites
    assert {text for text, _ in favourites.most} == {"␣a", "↵", "⇥", "\\x00"}


@pytest.mark.parametrize("threshold", [float("inf"), float("-inf")])
def test_closed_and_open_gates(threshold: float) -> None:
    selected_T = np.full(3, threshold < 0)
    layer = LayerSelection(layer=0, selected_T=selected_T, margin_T=np.zeros(3), capacity=0.0, threshold=threshold)
    view = selection_view(["a", "b", "c"], [layer], vocabulary=257)
    page = inspect_page(view)
    assert margins([layer]) is None, "there is no threshold to be above of"
    assert "Infinity" not in str(view.layers_json)
    assert "nan" not in page


def test_word_pieces_are_explained_where_there_are_any() -> None:
    for texts, words in (
        (["The", " taipan"], "word pieces, from a vocabulary of 257"),
        (["a", "é", ""], "single characters"),
    ):
        assert words in inspect_page(selection_view(texts, layers_for(len(texts), 0), vocabulary=257))


def test_favourites_are_the_most_and_least_selected() -> None:
    texts = ["often"] * 20 + ["never"] * 20 + ["half"] * 20 + ["rare"] * 2
    selected_T = np.array([True] * 20 + [False] * 20 + [True, False] * 10 + [True] * 2)
    layer = LayerSelection(layer=1, selected_T=selected_T, margin_T=np.ones(62), capacity=0.5, threshold=0.0)
    [favourites] = selection_view(texts, [layer], vocabulary=257).favourites
    assert favourites.most[0] == ("often", 1.0)
    assert favourites.most[1] == ("half", 0.5)
    assert favourites.least == [("never", 0.0)]


def test_long_texts_come_in_blocks_that_end_with_a_line() -> None:
    texts = [f"word{number}" if number % 7 else "\n" for number in range(5000)]
    view = selection_view(texts, layers_for(len(texts), 2), vocabulary=257)
    assert len(view.blocks) > 5
    assert all(block[-1] == "\n" for block in view.blocks[:-1])
    assert [piece for block in view.blocks for piece in block] == texts
