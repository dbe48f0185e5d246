"""Measures how well a model predicts text: bits per byte, by position, at any context length, in bounded memory."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
    """Tokens of a document that are predicted from one empty context."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def evaluate(
    model: TaipanLM,
    data: TokenDataset | Documents,
    *,
    context: int | None = None,
    piece: int = 2048,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Predict every token of every document, each document from an empty context.

    Every byte counts: the first token of a document is predicted from the end-of-document token before it. The end of a
    document is not predicted. With `context`, each document is cut into windows of this length; each starts from an
    empty context with the token before it, so every token is predicted exactly once.

    Memory does not depend on the length of a document: it is read in pieces, the state passed on, and logits are
    never whole.

    Args:
        model: runs as at inference (no noise, calibrated thresholds); its mode is restored.
        data: a prepared data set, `TextDocuments`, or anything like it, of the model's tokenizer.
        context: longest context in tokens; None for whole documents.
        piece: most tokens of a row per forward call.
        batch_tokens: most tokens of all rows per forward call; documents of similar length are read side by side.
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
        for spans in _batches(documents, context, piece, batch_tokens):
            for predicted in _predict(model, documents, spans, piece, tally):
                if progress is not None:
                    progress(predicted, total)
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
    batch_tokens: int = 8192,
) -> Iterator[ReadTokens]:
    """Predict every token as `evaluate` does, and yield the parts of its sums.

    Args:
        model: as in `evaluate`; so are the others, and the errors.
        data: what is predicted.
        context: longest context in tokens.
        piece: most tokens of a row per forward call.
        batch_tokens: most tokens of all rows per forward call.

    Yields:
        Span after span, the longest first.
    """
    documents = _checked(model, data, context, piece, batch_tokens)
    tally = _Tally(torch.from_numpy(documents.token_bytes))
    for spans in _batches(documents, context, piece, batch_tokens):
        seen: list[list[tuple[Tensor, ...]]] = [[] for _ in spans]

        def note(
            target_BT: Tensor, tokens_BT: Tensor, nats_BT: Tensor, gates: Sequence[GateOutput], seen: Any = seen
        ) -> None:
            selected_YBT, margin_YBT = torch.zeros(0, *target_BT.shape).bool(), torch.zeros(0, *target_BT.shape)
            if gates:
                selected_YBT = torch.stack([gate.selected_BT.cpu() for gate in gates])
                margin_YBT = torch.stack([gate.margin_BT.float().cpu() for gate in gates])
            for row, count in enumerate((target_BT >= 0).sum(1).tolist()):
                own = (target_BT, nats_BT, tokens_BT)
                gated = (selected_YBT[:, row, :count], margin_YBT[:, row, :count])
                seen[row].append((*(values[row, :count] for values in own), *gated))

        with inference(model):
            for _ in _predict(model, documents, spans, piece, tally, note):
                pass
        for span, parts in zip(spans, seen, strict=True):
            ids_T, nats_T, before_T, selected_YT, margin_YT = (torch.cat(part, -1) for part in zip(*parts, strict=True))
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


def _batches(documents: Documents, context: int | None, piece: int, batch_tokens: int) -> Iterator[list[_Span]]:
    """Spans of similar length side by side, the longest first."""
    spans = [
        _Span(document, start, min(start + (context or length), length))
        for document, length in enumerate(documents.lengths.tolist())
        for start in range(0, length, context or max(1, length))
    ]
    spans.sort(key=lambda span: -span.length)
    first = 0
    while first < len(spans):
        rows = max(1, batch_tokens // min(piece, spans[first].length))
        yield spans[first : first + rows]
        first += rows


def _predict(
    model: TaipanLM,
    documents: Documents,
    spans: list[_Span],
    piece: int,
    tally: "_Tally",
    note: Callable[[Tensor, Tensor, Tensor, Sequence[GateOutput]], None] | None = None,
) -> Iterator[int]:
    """Read spans (longest first) side by side, piece by piece; rows that have ended are dropped.

    `note` is called with targets, tokens read, nats and gates of every piece.
    """
    state: DecoderState | None = None
    device = model.device
    for begin in range(0, spans[0].length, piece):
        rows = [span for span in spans if span.length > begin]
        if state is not None and len(rows) < state.batch_size:
            state = state.select(torch.arange(len(rows), device=device))
        tokens_BT, target_BT = _piece(documents, rows, begin, piece)
        real_BT = target_BT >= 0
        mask = None if bool(real_BT.all()) else real_BT.to(device)
        output = model(tokens_BT.to(device), state=state, attention_mask=mask)
        target_M = target_BT[real_BT]
        hidden_MD = output.hidden_BTD[real_BT.to(device)]
        nats_M = token_nats(
            model.lm_head, hidden_MD, target_M.to(device), model.implementations["linear_cross_entropy"]
        )
        if not bool(nats_M.isfinite().all()):
            raise CheckpointError(f"What the model says of these texts is not finite. {OVERFLOW}")
        position_BT = (begin + torch.arange(target_BT.shape[1])).expand_as(target_BT)
        tally.add(nats_M.cpu().double(), target_M, position_BT[real_BT])
        tally.gates.add(output.gates)
        if note is not None:
            nats_BT = torch.zeros(target_BT.shape).masked_scatter(real_BT, nats_M.float().cpu())
            note(target_BT, tokens_BT, nats_BT, output.gates)
        if any(span.length > begin + piece for span in rows):
            state = output.state
        yield tally.tokens


def _piece(documents: Documents, rows: list[_Span], begin: int, piece: int) -> tuple[Tensor, Tensor]:
    """Tokens to read and tokens to predict from them (−100 where there is none), both (B, T), from `begin` on."""
    length = min(piece, rows[0].length - begin)
    tokens = np.full((len(rows), length), documents.start_token, np.int64)
    target = np.full((len(rows), length), -100, np.int64)
    for row, span in enumerate(rows):
        start, stop = span.start + begin, min(span.start + begin + length, span.stop)
        before = [documents.start_token] if start == 0 else documents.read(span.document, start - 1, start)
        target[row, : stop - start] = documents.read(span.document, start, stop)
        tokens[row, :1] = before
        tokens[row, 1 : stop - start] = target[row, : stop - start - 1]
    return torch.from_numpy(tokens), torch.from_numpy(target)


class _Tally:
    """Sums by position bucket, in fp64."""

    def __init__(self, token_bytes_V: Tensor) -> None:
        self.gates = GateAverages()
        self._token_bytes_V = token_bytes_V.double()
        self._sums = torch.zeros(3, len(_EDGES) + 1, dtype=torch.float64)  # tokens, nats, bytes of the tokens

    @property
    def tokens(self) -> int:
        return int(self._sums[0].sum())

    def add(self, nats_M: Tensor, target_M: Tensor, position_M: Tensor) -> None:
        bucket_M = torch.bucketize(position_M, _EDGES, right=True)
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
