"""Measuring how well a model predicts texts, as `taipan evaluate` does: one long text, and many short ones."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from taipan import hardware
from taipan.benchmark.models import build, dtype_of
from taipan.benchmark.results import Measurement, time_ratio
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.timing import Progress, interleaved
from taipan.evaluation import evaluate

SHORT = 1000
"""Short documents, of 16 to 512 tokens."""
ENOUGH_SECONDS = 30.0
"""All repetitions read a text for as long at least, again and again: hours are compared with more than a moment."""
_BLOCK = 1 << 16
MEMORY = "MB of memory above the shortest text's"
"""Peak of the first reading, over that of the shortest text."""


class RandomDocuments:
    """Random ids without memory for them: a block, over and over.

    Args:
        lengths: of the documents.
        vocabulary: of the ids; the last one begins a document.
        seed: of the block.
    """

    def __init__(self, lengths: NDArray[np.int64], vocabulary: int, seed: int) -> None:
        self.lengths = lengths
        self.n_bytes = 4 * int(lengths.sum())
        self.vocab_size, self.start_token = vocabulary, vocabulary - 1
        self.token_bytes = np.full(vocabulary, 4, np.int64)
        self._block = np.random.default_rng(seed).integers(0, vocabulary - 1, _BLOCK)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """See `taipan.evaluation.documents.Documents`."""
        return self._block[(np.arange(start, stop) + 7919 * document) % _BLOCK]


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Time for one text of every length in `tokens`, and for a thousand short texts.

    Longer texts are compared with the shortest, and so are the short texts, token by token; so are the peaks of the
    process (on Linux by themselves; elsewhere none is below one before it).
    """
    model = build(settings, dtype_of(settings))
    vocabulary = model.config.vocab_size
    lengths = sorted(set(settings.tokens))
    short = np.random.default_rng(settings.seed).integers(16, 513, SHORT)
    texts = {f"one text of {length:,} tokens": np.array([length]) for length in lengths}
    texts[f"{SHORT:,} texts of 16 to 512 tokens"] = short
    peaks: dict[str, int] = {}

    def read(work: str, documents: RandomDocuments) -> None:
        hardware.forget_peak_rss()
        evaluate(model, documents)
        peaks.setdefault(work, hardware.peak_rss_bytes())  # later readings begin with what others left in the heap

    runs: dict[str, Callable[[], None]] = {
        work: partial(read, work, RandomDocuments(sizes, vocabulary, settings.seed)) for work, sizes in texts.items()
    }
    least = ENOUGH_SECONDS / settings.repeats
    seconds = interleaved(runs, settings.repeats, progress, least_seconds=least)
    first = next(iter(texts))
    per_token = {work: [value / int(texts[work].sum()) for value in values] for work, values in seconds.items()}
    return [
        Measurement(
            suite="evaluate",
            work=work,
            subject=TAIPAN,
            unit="seconds",
            values=values,
            tokens=int(texts[work].sum()),
            comparisons=()
            if work == first
            else (time_ratio(per_token[work], per_token[first], f"a token of {first}"),),
            details={MEMORY: (peaks[work] - peaks[first]) / 1e6},
        )
        for work, values in seconds.items()
    ]
