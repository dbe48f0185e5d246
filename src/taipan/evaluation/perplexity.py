"""Measures how well a model predicts text: bits per byte, by position, at any context length, in bounded memory."""

import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from heapq import heapreplace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from taipan.data.shards import TokenDataset
from taipan.errors import OVERFLOW, CheckpointError, DataError, InputError
from taipan.evaluation.documents import Documents, PreparedDocuments
from taipan.evaluation.gates import GateAverages, GateStatistics
from taipan.generation.mode import inference
from taipan.layers.gating import GateOutput
from taipan.layers.head import token_nats
from taipan.model import TaipanLM
from taipan.shapes import BoolYT, FloatT, FloatYT, IntT
from taipan.state import DecoderState

FIRST_BUCKET = 64
"""Positions below this make up the first bucket; every later one is as long as all before it."""
_LARGEST_EXPONENT = math.log(sys.float_info.max)
_EDGES = torch.tensor([FIRST_BUCKET << number for number in range(40)])


@dataclass(frozen=True)
class PositionBucket:
    """Tokens by the number of tokens of their context: `start` ≤ position < `stop`."""

    start: int
    stop: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class EvaluationResult:
    """How well a model predicts a data set.

    Attributes:
        documents: how many there are.
        tokens: predicted tokens: all of every document, without its end.
        bytes: UTF-8 bytes of the texts.
        context: longest context in tokens, or None where every document was read whole.
        nats: −ln of the probability of all the texts.
        nats_per_token, perplexity, bits_per_byte: the same in the usual units.
        by_position: by position in the context; empty buckets are left out.
        gates: what each SAL selected.
        seconds: how long it took.
    """

    documents: int
    tokens: int
    bytes: int
    context: int | None
    nats: float
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    by_position: tuple[PositionBucket, ...]
    gates: tuple[GateStatistics, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, for JSON; infinite numbers (an open gate's threshold) as text."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class _Span:
    """Tokens of a document that are predicted from one empty context, and their place among those of a row."""

    number: int
    document: int
    start: int
    stop: int
    column: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def end(self) -> int:
        return self.column + self.length


@dataclass(frozen=True)
class _Part:
    """Tokens of a span in one call: where they lie in it, and where in the span they begin."""

    span: _Span
    row: int
    columns: slice
    begin: int


@dataclass(frozen=True)
class _Predicted:
    """One call: what was read and predicted (−100 where nothing is), with places in their spans; on the CPU."""

    parts: tuple[_Part, ...]
    tokens_BT: Tensor
    target_BT: Tensor
    position_BT: Tensor
    nats_BT: Tensor
    gates: Sequence[GateOutput]


def evaluate(
    model: TaipanLM,
    data: TokenDataset | Documents,
    *,
    context: int | None = None,
    piece: int = 2048,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Predict every token of every document, each document from an empty context.

    Every byte counts: the first token of a document is predicted from the end-of-document token before it. The end of a
    document is not predicted. With `context`, each document is cut into windows of this length; each starts from an
    empty context with the token before it, so every token is predicted exactly once.

    Documents lie one after the other in a few rows, which are read in pieces of one shape, the state passed on: memory
    depends neither on how long documents are nor on how many, and logits are never whole.

    Args:
        model: runs as at inference (no noise, calibrated thresholds); its mode is restored.
        data: a prepared data set, `TextDocuments`, or anything like it, of the model's tokenizer.
        context: longest context in tokens; None for whole documents.
        piece: most tokens of a row per forward call.
        batch_tokens: most tokens of all rows per forward call.
        progress: called with the tokens predicted so far and in all.

    Raises:
        InputError: a number below 1.
        DataError: there is no token to predict, or the data was made with a larger vocabulary than the model's.
        CheckpointError: what the model says is not finite.
    """
    documents = _checked(model, data, context, piece, batch_tokens)
    total = int(documents.lengths.sum())
    begin = time.perf_counter()
    tally = _Tally(torch.from_numpy(documents.token_bytes))
    with inference(model):
        for call in _predict(model, documents, _rows(documents, context, piece, batch_tokens), piece):
            tally.add(call)
            if progress is not None:
                progress(tally.tokens, total)
    return tally.result(documents, context, time.perf_counter() - begin)


@dataclass(frozen=True)
class ReadTokens:
    """Tokens of a document that were predicted from one empty context, with their losses and gates; on the CPU.

    Attributes:
        document: its number.
        start: place of the first of them in the document.
        ids_T: what was predicted.
        nats_T: −ln of its probability.
        before_T: the token read to predict it; the gates' decisions are about this one.
        selected_YT: which of those each SAL selected; no rows without SALs.
        margin_YT: s_1 − s_0 of the same.
    """

    document: int
    start: int
    ids_T: IntT
    nats_T: FloatT
    before_T: IntT
    selected_YT: BoolYT
    margin_YT: FloatYT


def read_tokens(
    model: TaipanLM,
    data: TokenDataset | Documents,
    *,
    context: int | None = None,
    piece: int = 2048,
    batch_tokens: int = 4096,
) -> Iterator[ReadTokens]:
    """Predict every token as `evaluate` does, and yield the parts of its sums.

    Args:
        model: as in `evaluate`; so are the others, and the errors.
        data: what is predicted.
        context: longest context in tokens.
        piece: most tokens of a row per forward call.
        batch_tokens: most tokens of all rows per forward call.

    Yields:
        Every span as soon as all of it is read.
    """
    documents = _checked(model, data, context, piece, batch_tokens)
    calls = _predict(model, documents, _rows(documents, context, piece, batch_tokens), piece)
    seen: defaultdict[int, list[tuple[Tensor, ...]]] = defaultdict(list)
    while True:
        with inference(model):  # not around what is yielded
            call = next(calls, None)
        if call is None:
            return
        selected_YBT, margin_YBT = (torch.zeros(0, *call.target_BT.shape, dtype=kind) for kind in (torch.bool, None))
        if call.gates:
            selected_YBT = torch.stack([gate.selected_BT.cpu() for gate in call.gates])
            margin_YBT = torch.stack([gate.margin_BT.float().cpu() for gate in call.gates])
        values = (call.target_BT, call.nats_BT.float(), call.tokens_BT, selected_YBT, margin_YBT)
        for part in call.parts:
            span = part.span
            seen[span.number].append(tuple(value[..., part.row, part.columns] for value in values))
            if part.begin + part.columns.stop - part.columns.start < span.length:
                continue
            read = (torch.cat(pieces, -1) for pieces in zip(*seen.pop(span.number), strict=True))
            ids_T, nats_T, before_T, selected_YT, margin_YT = read
            yield ReadTokens(
                document=span.document,
                start=span.start,
                ids_T=ids_T,
                nats_T=nats_T,
                before_T=before_T,
                selected_YT=selected_YT,
                margin_YT=margin_YT,
            )


def _checked(
    model: TaipanLM, data: TokenDataset | Documents, context: int | None, piece: int, batch_tokens: int
) -> Documents:
    for name, value in (("context", context), ("piece", piece), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, but must be a number of tokens of at least 1.")
    documents = PreparedDocuments(data) if isinstance(data, TokenDataset) else data
    if documents.vocab_size > model.config.vocab_size:
        raise DataError(
            f"The data has a vocabulary of {documents.vocab_size} tokens but the model only {model.config.vocab_size}: "
            "they do not belong together. Prepare the data with the tokenizer of the model."
        )
    if int(documents.lengths.sum()) == 0:
        raise DataError("There is nothing to evaluate on: the documents hold no tokens. Name files with text in them.")
    return documents


def _rows(documents: Documents, context: int | None, piece: int, batch_tokens: int) -> list[list[_Span]]:
    """Spans laid one after the other in rows of about one length, the longest first; the longest row first."""
    places = [
        (document, start, min(start + (context or length), length))
        for document, length in enumerate(documents.lengths.tolist())
        for start in range(0, length, context or max(1, length))
    ]
    places.sort(key=lambda place: place[1] - place[2])
    rows: list[list[_Span]] = [[] for _ in range(min(len(places), max(1, batch_tokens // piece)))]
    ends = [(0, row) for row in range(len(rows))]
    for number, (document, start, stop) in enumerate(places):
        column, row = ends[0]
        rows[row].append(_Span(number=number, document=document, start=start, stop=stop, column=column))
        heapreplace(ends, (column + stop - start, row))
    return sorted(rows, key=lambda row: -row[-1].end)


def _predict(model: TaipanLM, documents: Documents, rows: list[list[_Span]], piece: int) -> Iterator[_Predicted]:
    """Read rows (the longest first) side by side, piece by piece; those that have ended are dropped.

    Every call but the last ones of rows has one shape: what libraries keep for a shape, they keep once.
    """
    state: DecoderState | None = None
    device = model.device
    waiting = [deque(row) for row in rows]
    length = rows[0][-1].end
    for begin in range(0, length, piece):
        width = min(piece, length - begin)
        waiting = [row for row in waiting if row]
        if state is not None and len(waiting) < state.batch_size:
            state = state.select(torch.arange(len(waiting), device=device))
        parts = tuple(_parts(waiting, begin, begin + width))
        tokens_BT, target_BT, position_BT, segment_BT = _read(documents, parts, len(waiting), width)
        real_BT = target_BT >= 0
        mask = None if bool(real_BT.all()) else real_BT.to(device)
        output = model(tokens_BT.to(device), state=state, attention_mask=mask, segment_ids=segment_BT.to(device))
        nats_M = token_nats(
            model.lm_head,
            output.hidden_BTD[real_BT.to(device)],
            target_BT[real_BT].to(device),
            model.implementations["linear_cross_entropy"],
        ).cpu()
        if not bool(nats_M.isfinite().all()):
            raise CheckpointError(f"What the model says of these texts is not finite. {OVERFLOW}")
        nats_BT = torch.zeros(target_BT.shape, dtype=nats_M.dtype).masked_scatter(real_BT, nats_M)
        state, gates = output.state if begin + width < length else None, output.gates
        del output  # not held while the next piece is read
        yield _Predicted(
            parts=parts,
            tokens_BT=tokens_BT,
            target_BT=target_BT,
            position_BT=position_BT,
            nats_BT=nats_BT,
            gates=gates,
        )


def _parts(waiting: list[deque[_Span]], begin: int, end: int) -> Iterator[_Part]:
    """What of the spans lies between two columns; spans that end there wait no longer."""
    for number, row in enumerate(waiting):
        while row and row[0].column < end:
            span = row[0]
            first, last = max(span.column, begin), min(span.end, end)
            columns = slice(first - begin, last - begin)
            yield _Part(span=span, row=number, columns=columns, begin=first - span.column)
            if span.end > end:
                break
            row.popleft()


def _read(documents: Documents, parts: Sequence[_Part], rows: int, width: int) -> tuple[Tensor, ...]:
    """Tokens to read, tokens to predict from them (−100: none), their places in the spans and the spans; (B, T)."""
    tokens, target, position, segment = (
        np.full((rows, width), value, np.int64) for value in (documents.start_token, -100, 0, 0)
    )
    for part in parts:
        span, count = part.span, part.columns.stop - part.columns.start
        start = span.start + part.begin
        ids = documents.read(span.document, max(0, start - 1), start + count)
        target[part.row, part.columns] = ids[-count:]
        tokens[part.row, part.columns] = ids[:count] if start else [documents.start_token, *ids[:-1]]
        position[part.row, part.columns] = np.arange(part.begin, part.begin + count)
        segment[part.row, part.columns] = span.number
    return tuple(map(torch.from_numpy, (tokens, target, position, segment)))


class _Tally:
    """Sums by position bucket, in fp64."""

    def __init__(self, token_bytes_V: Tensor) -> None:
        self.gates = GateAverages()
        self._token_bytes_V = token_bytes_V.double()
        self._sums = torch.zeros(3, len(_EDGES) + 1, dtype=torch.float64)  # tokens, nats, bytes of the tokens

    @property
    def tokens(self) -> int:
        return int(self._sums[0].sum())

    def add(self, call: _Predicted) -> None:
        self.gates.add(call.gates)
        real_BT = call.target_BT >= 0
        nats_M, target_M = call.nats_BT[real_BT].double(), call.target_BT[real_BT]
        bucket_M = torch.bucketize(call.position_BT[real_BT], _EDGES, right=True)
        for sums, weight_M in zip(
            self._sums, (torch.ones_like(nats_M), nats_M, self._token_bytes_V[target_M]), strict=True
        ):
            sums.index_add_(0, bucket_M, weight_M)

    def result(self, documents: Documents, context: int | None, seconds: float) -> EvaluationResult:
        tokens, nats, token_bytes = (float(total) for total in self._sums.sum(1))
        # 1, or a factor that spreads the bytes of the text over the tokens if they are not bytes of it
        scale = documents.n_bytes / token_bytes if token_bytes else 0.0
        buckets: list[PositionBucket] = []
        starts = [0, *_EDGES.tolist()]
        for number, (count, total, size) in enumerate(self._sums.T.tolist()):
            if count:
                bits = _bits_per_byte(total, size * scale)
                stop = FIRST_BUCKET << number
                buckets.append(
                    PositionBucket(
                        start=starts[number],
                        stop=stop,
                        tokens=int(count),
                        nats_per_token=total / count,
                        bits_per_byte=bits,
                    )
                )
        return EvaluationResult(
            documents=len(documents.lengths),
            tokens=int(tokens),
            bytes=documents.n_bytes,
            context=context,
            nats=nats,
            nats_per_token=nats / tokens,
            perplexity=math.exp(nats / tokens) if nats / tokens < _LARGEST_EXPONENT else math.inf,
            bits_per_byte=_bits_per_byte(nats, float(documents.n_bytes)),
            by_position=tuple(buckets),
            gates=self.gates.result(),
            seconds=seconds,
        )


def _bits_per_byte(nats: float, n_bytes: float) -> float:
    return nats / math.log(2) / n_bytes if n_bytes else math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in cast("tuple[Any, ...]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
