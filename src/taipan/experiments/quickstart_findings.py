"""What the quickstart measures after training: held-out text file by file, the gates, a sample."""

import math
import sysconfig
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
from taipan.report.selection import SelectionView
from taipan.report.traced import traced_view

if TYPE_CHECKING:
    from taipan.data.corpus import Document

SAMPLE_PROMPT = "def read_lines(path):"
SAMPLE_SETTINGS = GenerationSettings(max_new_tokens=240, do_sample=True, temperature=0.8, top_p=0.95, seed=0)
_SHOWN = "asyncio/queues.py"


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
class PositionFindings:
    """Bits per byte of the tokens that came after `start` to `stop` (exclusive) others of their file."""

    start: int
    stop: int
    bits_per_byte: float


@dataclass(frozen=True)
class GateFindings:
    """Selection of one layer over all held-out text; shares of tokens."""

    layer: int
    capacity: float
    training_rate: float
    noise_free_rate: float
    alpha_mean: float
    alpha_std: float


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        files: every held-out file.
        packages: the files of each package together, and last of all together.
        positions: by how much of the file came before.
        gates: one entry per selective attention layer.
        sample: what the model wrote after `SAMPLE_PROMPT`.
        shown: path of the held-out file on the coloured page.
        view: the coloured page; None for a model without selective attention.
    """

    files: Sequence[Compared]
    packages: Sequence[Compared]
    positions: Sequence[PositionFindings]
    gates: Sequence[GateFindings]
    sample: str
    shown: Path
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
    return Findings(
        files=[_compared(file.name, [file]) for file in files],
        packages=[
            *(_compared(name, [file for file in files if file.name.split("/")[0] == name]) for name in packages),
            _compared("all held-out files", files),
        ],
        positions=list(_positions(results)),
        gates=list(_gates(results, model.config.attention_capacity)),
        sample=sample,
        shown=Path(sysconfig.get_path("stdlib"), shown.source),
        view=view,
    )


def _evaluate(model: TaipanLM, tokenizer: Tokenizer, document: "Document") -> _File:
    packed = compress([document.text])
    result = evaluate(model, TextDocuments([document.text], tokenizer))
    return _File(document.source, packed.gzip_bytes, packed.xz_bytes, result)


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


def _positions(results: Sequence[EvaluationResult]) -> Iterator[PositionFindings]:
    """Buckets of all files together: bits over bytes, both summed."""
    bits: dict[tuple[int, int], float] = {}
    size: dict[tuple[int, int], float] = {}
    for result in results:
        for bucket in result.by_position:
            edges = (bucket.start, bucket.stop)
            amount = bucket.tokens * bucket.nats_per_token / math.log(2)
            bits[edges] = bits.get(edges, 0.0) + amount
            size[edges] = size.get(edges, 0.0) + amount / bucket.bits_per_byte
    for start, stop in sorted(bits):
        yield PositionFindings(start, stop, bits[start, stop] / size[start, stop])


def _gates(results: Sequence[EvaluationResult], capacity: float) -> Iterator[GateFindings]:
    """Statistics of all files together, weighted by their tokens."""
    tokens = sum(result.tokens for result in results)
    for number, gate in enumerate(results[0].gates):
        entries = [(result.tokens / tokens, result.gates[number]) for result in results]
        mean = sum(weight * entry.alpha_mean for weight, entry in entries)
        square = sum(weight * (entry.alpha_std**2 + entry.alpha_mean**2) for weight, entry in entries)
        yield GateFindings(
            layer=gate.layer,
            capacity=capacity,
            training_rate=sum(weight * entry.training_rate for weight, entry in entries),
            noise_free_rate=sum(weight * entry.noise_free_rate for weight, entry in entries),
            alpha_mean=mean,
            alpha_std=math.sqrt(max(0.0, square - mean**2)),
        )


def _sample(model: TaipanLM, tokenizer: Tokenizer) -> str:
    prompt = tokenizer.encode(SAMPLE_PROMPT)
    decoder = StreamDecoder(tokenizer, prompt)
    text = ""
    for step in stream(model, torch.tensor([prompt]), tokenizer=tokenizer, settings=SAMPLE_SETTINGS):
        text += decoder.push(int(step.tokens_B[0]))
    return text + decoder.flush()
