"""The contract of outranking."""

from collections.abc import Callable, Mapping

from torch import Tensor

from taipan.ops.dispatch import later, select
from taipan.ops.outranking import native, portable
from taipan.shapes import FloatBR, FloatBT, IntBT

IMPLEMENTATIONS: Mapping[str, Callable[[FloatBT, FloatBR, IntBT | None], Tensor]] = {
    "native": native.outranking,
    "portable": portable.outranking,
    "reference": later("taipan.ops.outranking.reference", "outranking"),
}


def outranking(
    score_BT: FloatBT, recent_BR: FloatBR, segment_BT: IntBT | None, *, implementation: str = "auto"
) -> IntBT:
    """Count, for each token, those of the R tokens before it in its document whose score is at least its own.

    Args:
        score_BT: of the tokens, finite.
        recent_BR: of the R tokens before the call, `NOTHING` where there are none.
        segment_BT: running document number of each token, 0 = that of `recent_BR`; None when nothing changes.
        implementation: "auto", "native", "portable" or "reference".

    Returns:
        int64 numbers from 0 to R.

    Raises:
        ConfigError: no such implementation, or not here.
    """
    return select("outranking", IMPLEMENTATIONS, implementation, score_BT)(score_BT, recent_BR, segment_BT)
