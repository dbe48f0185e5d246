"""Which implementation of every op the layers of a model ask for."""

from collections.abc import Mapping

from taipan.errors import ConfigError, shown
from taipan.ops.attention import api as attention
from taipan.ops.causal_conv1d import api as causal_conv1d
from taipan.ops.dispatch import AUTO
from taipan.ops.gated_rms_norm import api as gated_rms_norm
from taipan.ops.linear_cross_entropy import api as cross_entropy
from taipan.ops.outranking import api as outranking
from taipan.ops.ssd import api as ssd
from taipan.ops.swiglu import api as swiglu

IMPLEMENTATIONS: dict[str, Mapping[str, object]] = {
    "ssd": ssd.IMPLEMENTATIONS,
    "causal_conv1d": causal_conv1d.IMPLEMENTATIONS,
    "gated_rms_norm": gated_rms_norm.IMPLEMENTATIONS,
    "attention": attention.IMPLEMENTATIONS,
    "linear_cross_entropy": cross_entropy.IMPLEMENTATIONS,
    "swiglu": swiglu.IMPLEMENTATIONS,
    "outranking": outranking.IMPLEMENTATIONS,
}
"""Implementations of every op of the model, by name; the plain norms take that of the gated one."""


def resolve_implementations(implementation: str) -> dict[str, str]:
    """What each op is asked for by the layers of a model.

    Args:
        implementation: `auto` (the best for the device and dtype of each call), or the name of one; an op that has
            none of this name takes the portable one.

    Raises:
        ConfigError: no op has an implementation of this name.
    """
    known = sorted({AUTO, *(name for names in IMPLEMENTATIONS.values() for name in names)})
    if implementation not in known:
        raise ConfigError(f"implementation is {shown(implementation)}, but must be one of {', '.join(known)}.")
    if implementation == AUTO:
        return dict.fromkeys(IMPLEMENTATIONS, AUTO)
    return {op: implementation if implementation in names else "portable" for op, names in IMPLEMENTATIONS.items()}
