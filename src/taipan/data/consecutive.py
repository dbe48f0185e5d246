"""Long windows in consecutive pieces: each row of a batch continues the same row of the batch before."""

from torch import Tensor

from taipan.data.mixture import MixtureSampler
from taipan.data.sampler import batch
from taipan.shapes import IntT


class ConsecutivePieces:
    """Pieces of long windows, row by row in consecutive steps.

    Step s reads piece ``s % pieces`` of as many long windows as it has rows; after ``pieces`` steps every row begins
    another one. Sample ``index`` is row ``index % rows`` of step ``index // rows``: a pure function of its number, as
    the order of the long windows is.

    Args:
        samples: windows of ``pieces`` × T tokens.
        pieces: pieces of each.
        rows: samples of a step, over all micro-batches and processes.
    """

    def __init__(self, samples: MixtureSampler, pieces: int, rows: int) -> None:
        self._samples = samples
        self._pieces = pieces
        self._rows = rows
        self.n_windows = samples.n_windows * pieces
        """Pieces, and so samples, per epoch."""

    def window(self, index: int) -> tuple[IntT, IntT]:
        """Return ``(tokens_T, segment_T)`` of one sample; segments count from the start of the long window."""
        step, row = divmod(index, self._rows)
        group, piece = divmod(step, self._pieces)
        tokens, segments = self._samples.window(group * self._rows + row)
        length = len(tokens) // self._pieces
        part = slice(piece * length, (piece + 1) * length)
        return tokens[part], segments[part]

    def batch(self, step: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
        """Return (a part of) the samples ``step * batch_size`` and following, see :func:`sampler.batch`."""
        return batch(self, step, batch_size, part)
