"""What the quickstart measures after training: held-out text file by file, the gates, a sample."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.evaluation import EvaluationResult, TextDocuments, compress, evaluate
from taipan.experiments.phases import PhaseTimer
from taipan.generation import GenerationSettings, stream
from taipan.model import TaipanLM, load_tokenizer
from taipan.report.curves import PositionBar
from taipan.report.selection import SelectionView
from taipan.report.traced import traced_view

if TYPE_CHECKING:
    from taipan.data.corpus import Document

SAMPLE_PROMPT = '''import os


class Reader:
    """Read the lines of a file."""

    def __init__(self, path):
        self.path = path

    def read(self, size):
        '''
SAMPLE_SETTINGS = GenerationSettings(
    max_new_tokens=240,
    do_sample=True,
    temperature=0.7,
    top_p=0.9,
    seed=0,
    eos_token_id=(),  # a model after little training ends its text early: the sample would show nothing
)
_SHOWN = "asyncio/queues.py"
_LONG_FILES = 0.1  # share of the files, the longest ones, that the bits by position are about


@dataclass(frozen=True)
class Compared:
    """Bits per byte of one file, or of several together."""

    name: str
    files: int
    bytes: int
    gzip: float
    xz: float
    model: float


@dataclass(frozen=True)
class GateFindings:
    """Selection of one layer over all held-out text; shares of tokens, and the mean α of the selected ones."""

    layer: int
    capacity: float
    training_rate: float
    noise_free_rate: float
    alpha_selected: float | None


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        files: every held-out file.
        packages: the files of each package together, and last of all together.
        positions: by how much of the file came before, over the same files for every entry; may be empty.
        position_files: those files as a whole; None if there are none.
        gates: one entry per selective attention layer.
        sample: what the model wrote after `SAMPLE_PROMPT`.
        shown: the held-out file on the coloured page, as a path below the standard library.
        view: the coloured page; None for a model without selective attention.
    """

    files: Sequence[Compared]
    packages: Sequence[Compared]
    positions: Sequence[PositionBar]
    position_files: Compared | None
    gates: Sequence[GateFindings]
    sample: str
    shown: str
    view: SelectionView | None

    @property
    def total(self) -> Compared:
        """All held-out files together."""
        return self.packages[-1]


@dataclass(frozen=True)
class _File:
    name: str
    gzip_bytes: int
    xz_bytes: int
    result: EvaluationResult


def measure(directory: Path, documents: "Sequence[Document]", timer: PhaseTimer) -> Findings:
    """Evaluate the model of a quickstart on the held-out files and let it write.

    Args:
        directory: of the quickstart.
        documents: the held-out files.
        timer: times the parts.
    """
    model = TaipanLM.from_pretrained(directory / "model")
    tokenizer = load_tokenizer(directory / "model", model.config)
    with timer("evaluation", f"Evaluating on {len(documents)} held-out files"):
        files = [_evaluate(model, tokenizer, document) for document in documents]
        shown = next((document for document in documents if document.source == _SHOWN), documents[0])
        view = traced_view(model, tokenizer, shown.text) if model.sals else None
    with timer("sample", "Writing a sample"):
        sample = _sample(model, tokenizer)
    packages = dict.fromkeys(file.name.split("/")[0] for file in files)
    results = [file.result for file in files]
    positions, long_files = positions_of_same_files(results)
    return Findings(
        files=[_compared(file.name, [file]) for file in files],
        packages=[
            *(_compared(name, [file for file in files if file.name.split("/")[0] == name]) for name in packages),
            _compared("all held-out files", files),
        ],
        positions=positions,
        position_files=_compared("files by position", [files[number] for number in long_files]) if long_files else None,
        gates=list(_gates(results, model.config.attention_capacity)),
        sample=sample,
        shown=shown.source,
        view=view,
    )


def _evaluate(model: TaipanLM, tokenizer: Tokenizer, document: "Document") -> _File:
    packed = compress([document.text])
    result = evaluate(model, TextDocuments([document.text], tokenizer))
    return _File(name=document.source, gzip_bytes=packed.gzip_bytes, xz_bytes=packed.xz_bytes, result=result)


def _compared(name: str, files: Sequence[_File]) -> Compared:
    size = sum(file.result.bytes for file in files)
    return Compared(
        name=name,
        files=len(files),
        bytes=size,
        gzip=8 * sum(file.gzip_bytes for file in files) / size,
        xz=8 * sum(file.xz_bytes for file in files) / size,
        model=sum(file.result.nats for file in files) / math.log(2) / size,
    )


def positions_of_same_files(results: Sequence[EvaluationResult]) -> tuple[list[PositionBar], list[int]]:
    """Bits per byte by position, with the same files in every bucket, and which files those are.

    Files differ. If every file counted wherever it has tokens, the last buckets would hold only a few long files, and
    buckets would differ by their files, not by context. So only the longest tenth of the files (at least one) count,
    and only the buckets that each of them fills.

    Returns:
        The buckets in order and the numbers of the files; both empty if no file fills the first bucket.
    """
    ends = sorted({bucket.stop for result in results for bucket in result.by_position})
    reached = {end: [number for number, result in enumerate(results) if result.tokens >= end] for end in ends}
    wanted = max(1, math.ceil(_LONG_FILES * len(results)))
    shared = [end for end in ends if len(reached[end]) >= wanted]
    if not shared:
        return [], []
    chosen = reached[shared[-1]]
    bars: list[PositionBar] = []
    for edges in zip(
        *([bucket for bucket in results[number].by_position if bucket.stop <= shared[-1]] for number in chosen),
        strict=True,
    ):
        bits = [bucket.tokens * bucket.nats_per_token / math.log(2) for bucket in edges]
        size = sum(amount / bucket.bits_per_byte for amount, bucket in zip(bits, edges, strict=True))
        bars.append(
            PositionBar(start=edges[0].start, stop=edges[0].stop, files=len(chosen), bits_per_byte=sum(bits) / size)
        )
    return bars, chosen


def _gates(results: Sequence[EvaluationResult], capacity: float) -> Iterator[GateFindings]:
    """Statistics of all files together, weighted by their tokens."""
    tokens = sum(result.tokens for result in results)

    def mean(number: int, name: str) -> float:
        return sum(result.tokens / tokens * getattr(result.gates[number], name) for result in results)

    for number, gate in enumerate(results[0].gates):
        rate = mean(number, "rate")
        yield GateFindings(
            layer=gate.layer,
            capacity=capacity,
            training_rate=mean(number, "training_rate"),
            noise_free_rate=mean(number, "noise_free_rate"),
            alpha_selected=mean(number, "weight_mean") / rate if rate > 0 else None,
        )


def _sample(model: TaipanLM, tokenizer: Tokenizer) -> str:
    prompt = tokenizer.encode(SAMPLE_PROMPT)
    decoder = StreamDecoder(tokenizer, prompt)
    text = ""
    for step in stream(model, torch.tensor([prompt]), tokenizer=tokenizer, settings=SAMPLE_SETTINGS):
        text += decoder.push(step.tokens[0])
    return text + decoder.flush()
