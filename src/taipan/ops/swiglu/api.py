"""The contract of the product inside of a SwiGLU."""

from collections.abc import Callable, Mapping

from torch import Tensor

from taipan.errors import InputError
from taipan.ops.dispatch import later, select
from taipan.ops.swiglu.native import swiglu_native
from taipan.ops.swiglu.portable import swiglu_portable
from taipan.shapes import FloatXD

IMPLEMENTATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "native": swiglu_native,
    "portable": swiglu_portable,
    "reference": later("taipan.ops.swiglu.reference", "swiglu_reference"),
}


def swiglu(gate: FloatXD, up: FloatXD, *, implementation: str = "auto") -> FloatXD:
    """silu(gate) · up (Shazeer 2020, Eq. 6 without its linear maps).

    Args:
        gate: any leading dimensions, then the features; fp64, fp32, fp16 or bf16.
        up: of the same shape and dtype.
        implementation: "auto", "native", "portable" or "reference". The native one is for bfloat16 and rounds once; in
            other dtypes it is the portable one.

    Returns:
        The product, in the dtype of both. Differentiable.

    Raises:
        InputError: shapes or dtypes do not fit.
        ConfigError: no such implementation, or not here.
    """
    run = select("swiglu", IMPLEMENTATIONS, implementation, gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(
            f"swiglu: gate is {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}; give them one "
            "shape and one dtype"
        )
    return run(gate, up)
