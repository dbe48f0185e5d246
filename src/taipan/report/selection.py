"""A text coloured by what each selective attention layer selected, for a browser."""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from taipan.report.curves import margin_figure

_MARGIN_STEPS = 128  # per unit of the margin, in 15 bits; the 16th says "selected"
_MARGIN_ZERO = 1 << 14
_STRONG = 0.95  # share of the selected tokens' margins below the strongest colour
_BLOCK_PIECES = 400  # pieces in one block of the browser's layout
_FAVOURITES = 8
_FAVOURITES_SEEN = 8
_SIGNS = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """What one selective attention layer did with a text of T tokens.

    Attributes:
        layer: its number in the stack.
        selected_T: which tokens it selected, bool.
        margin_T: s_1 − s_0 of Eq. 1 for every token, floating.
        capacity: the budget C.
        threshold: the margin above which it selects.
    """

    layer: int
    selected_T: NDArray[np.bool_]
    margin_T: NDArray[np.floating]
    capacity: float
    threshold: float

    @property
    def count(self) -> int:
        """Number of selected tokens."""
        return int(self.selected_T.sum())

    @property
    def share(self) -> float:
        """Share of tokens selected."""
        return float(self.selected_T.mean())

    @property
    def alpha_T(self) -> NDArray[np.floating]:
        """α of Eq. 5 for every token: the second of softmax(s) is the sigmoid of the margin."""
        return 0.5 * (1.0 + np.tanh(0.5 * self.margin_T.astype(np.float64)))

    @property
    def alpha_selected(self) -> float:
        """Mean of α over the selected tokens (NaN if there are none)."""
        return float(self.alpha_T[self.selected_T].mean()) if self.count else float("nan")

    @property
    def scale(self) -> tuple[float, float]:
        """Margins of the weakest and of the strongest colour.

        From the threshold (for an open gate the smallest selected margin) to the margin that 95 % of the selected
        tokens stay below.
        """
        if not self.count:
            return 0.0, 1.0
        chosen = self.margin_T[self.selected_T].astype(np.float64)
        low = self.threshold if np.isfinite(self.threshold) else float(chosen.min())
        return float(low), float(max(np.quantile(chosen, _STRONG), low + 0.01))


def margins(layers: Sequence[LayerSelection]) -> Markup | None:
    """The figure of the margins above the threshold; None if no layer has a threshold."""
    above = {
        layer.layer: layer.margin_T.astype(np.float64) - layer.threshold
        for layer in layers
        if np.isfinite(layer.threshold)
    }
    return margin_figure(above) if above else None


@dataclass(frozen=True, kw_only=True)
class Favourites:
    """The tokens a layer selects most and least often, each with the share of its occurrences selected."""

    layer: int
    most: list[tuple[str, float]]
    least: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class SelectionView:
    """What the templates `selection_*.html.j2` show.

    `vocabulary` is the number of tokens the model knows; `word_pieces` says whether any token is longer than one
    character (those of bytes are not). A piece is the text of one token, or of the few tokens that
    make up one character together. `first_base64` holds the first token of every piece (uint32, little-endian),
    `layers_json` the layers' thresholds and scales of colours and, for every token, the margin and whether it was
    selected.
    """

    tokens: int
    vocabulary: int
    word_pieces: bool
    blocks: list[list[str]]
    layers: Sequence[LayerSelection]
    favourites: list[Favourites]
    favourites_seen: int
    layers_json: Markup
    first_base64: Markup


def selection_view(token_texts: Sequence[str], layers: Sequence[LayerSelection], *, vocabulary: int) -> SelectionView:
    """Prepare a text for the browser.

    Args:
        token_texts: for each of the T tokens the characters it completes; "" if it ends inside a character, which
            then belongs to the token that completes it.
        layers: one entry per selective attention layer, each of T tokens.
        vocabulary: number of tokens the model knows.
    """
    pieces, first = _pieces(token_texts)
    return SelectionView(
        tokens=len(token_texts),
        vocabulary=vocabulary,
        word_pieces=any(len(text) > 1 for text in token_texts),
        blocks=list(_blocks(pieces)),
        layers=layers,
        favourites=[_favourites(token_texts, layer) for layer in layers],
        favourites_seen=_FAVOURITES_SEEN,
        layers_json=Markup(json.dumps([_layer_json(layer) for layer in layers])),
        first_base64=_base64(np.asarray(first, dtype="<u4")),
    )


def _base64(values: NDArray[np.generic]) -> Markup:
    return Markup(base64.b64encode(values.tobytes()).decode("ascii"))


def _layer_json(layer: LayerSelection) -> dict[str, object]:
    steps = np.clip(np.round(layer.margin_T.astype(np.float64) * _MARGIN_STEPS), -_MARGIN_ZERO, _MARGIN_ZERO - 1)
    codes = (steps + _MARGIN_ZERO).astype("<u2") | (layer.selected_T.astype("<u2") << 15)
    threshold = layer.threshold if np.isfinite(layer.threshold) else None  # JSON has no infinity
    low, high = layer.scale
    return {
        "layer": layer.layer,
        "threshold": threshold,
        "low": round(low, 4),
        "high": round(high, 4),
        "codes": str(_base64(codes.astype("<u2"))),
    }


def _pieces(token_texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Texts that are not empty, and the first token of each; tokens without a text belong to the next piece."""
    pieces: list[str] = []
    first: list[int] = []
    begin = 0
    for token, text in enumerate(token_texts):
        if text or token == len(token_texts) - 1:
            pieces.append(text)
            first.append(begin)
            begin = token + 1
    return pieces, first


def _blocks(pieces: Iterable[str]) -> Iterable[list[str]]:
    """Pieces in blocks that end with a line, so that the browser lays out only the blocks in sight."""
    block: list[str] = []
    for piece in pieces:
        block.append(piece)
        if len(block) >= _BLOCK_PIECES and piece.endswith("\n"):
            yield block
            block = []
    if block:
        yield block


def _favourites(token_texts: Sequence[str], layer: LayerSelection) -> Favourites:
    seen = Counter(token_texts)
    chosen = Counter(text for text, selected in zip(token_texts, layer.selected_T.tolist(), strict=True) if selected)
    shares = [(text, chosen[text] / count, count) for text, count in seen.items() if text and count >= _FAVOURITES_SEEN]
    shares.sort(key=lambda entry: (-entry[1], -entry[2], entry[0]))
    ranked = [(_visible(text), share) for text, share, _ in shares]
    most = [entry for entry in ranked[:_FAVOURITES] if entry[1] > 0]
    least = [entry for entry in reversed(ranked[len(most) :][-_FAVOURITES:])]
    return Favourites(layer=layer.layer, most=most, least=least)


def _visible(text: str) -> str:
    """A token's text with signs for what cannot be seen."""
    return "".join(_SIGNS.get(sign, sign if sign.isprintable() else repr(sign)[1:-1]) for sign in text)
