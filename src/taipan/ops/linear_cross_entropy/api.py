"""The contract of the language model's loss: head and cross-entropy in one."""

from collections.abc import Callable, Mapping

import torch

from taipan.errors import InputError
from taipan.ops.dispatch import later, select
from taipan.ops.linear_cross_entropy import native, portable
from taipan.shapes import Float0, FloatM, FloatMD, FloatVD, IntM

IMPLEMENTATIONS: Mapping[str, Callable[[FloatMD, FloatVD, IntM], Float0]] = {
    "reference": later("taipan.ops.linear_cross_entropy.reference", "linear_cross_entropy"),
    "native": native.linear_cross_entropy,
    "portable": portable.linear_cross_entropy,
}
PER_TOKEN_IMPLEMENTATIONS: Mapping[str, Callable[[FloatMD, FloatVD, IntM], FloatM]] = {
    "reference": later("taipan.ops.linear_cross_entropy.reference", "linear_cross_entropy_per_token"),
    "native": native.linear_cross_entropy_per_token,
    "portable": portable.linear_cross_entropy_per_token,
}


def linear_cross_entropy(
    hidden_MD: FloatMD,
    weight_VD: FloatVD,
    target_M: IntM,
    *,
    ignore_index: int = -100,
    implementation: str = "auto",
) -> tuple[Float0, int]:
    """Sum over the tokens of ``−log softmax(hidden · weightᵀ)[target]``, and the number of tokens summed (Eq. 7).

    Args:
        hidden_MD: what the head reads, one row per token; float64, float32 or bfloat16.
        weight_VD: the head's weight, same dtype.
        target_M: int64 class of each token, or ``ignore_index`` for a token that counts for nothing.
        ignore_index: see ``target_M``.
        implementation: a name in ``IMPLEMENTATIONS``.

    Under autocast both tensors are cast to its dtype, as in `torch.nn.functional.linear`.

    Returns:
        The sum in nats, float32 (float64 for float64 inputs), 0 with zero gradients if no token counts; and the
        number of tokens that count.

    Raises:
        InputError: shapes or dtypes that do not fit together, or a target that is no class.
        ConfigError: an unknown implementation.
    """
    loss_sum = select("linear_cross_entropy", IMPLEMENTATIONS, implementation, hidden_MD)
    kept_N = _validated_kept_rows(hidden_MD, weight_VD, target_M, ignore_index)
    hidden_ND, target_N = _rows(hidden_MD, kept_N), _rows(target_M, kept_N)
    hidden_ND, weight_VD = _in_dtype_of_products(hidden_ND, weight_VD)
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return loss_sum(hidden_ND, weight_VD, target_N), kept_N.numel()


@torch.no_grad()
def linear_cross_entropy_per_token(
    hidden_MD: FloatMD,
    weight_VD: FloatVD,
    target_M: IntM,
    *,
    ignore_index: int = -100,
    implementation: str = "auto",
) -> FloatM:
    """``−log softmax(hidden · weightᵀ)[target]`` of each token, in nats, for evaluation: no gradient.

    Arguments, errors and dtype as in `linear_cross_entropy`; a token with target ``ignore_index`` gets 0, and nothing
    is computed for it.
    `implementation` is a name in ``PER_TOKEN_IMPLEMENTATIONS``.
    """
    per_token = select("linear_cross_entropy", PER_TOKEN_IMPLEMENTATIONS, implementation, hidden_MD)
    kept_N = _validated_kept_rows(hidden_MD, weight_VD, target_M, ignore_index)
    hidden_ND, target_N = _rows(hidden_MD, kept_N), _rows(target_M, kept_N)
    hidden_ND, weight_VD = _in_dtype_of_products(hidden_ND, weight_VD)
    with torch.autocast(hidden_MD.device.type, enabled=False):
        nats_N = per_token(hidden_ND, weight_VD, target_N)
    return nats_N.new_zeros(target_M.shape).index_copy_(0, kept_N, nats_N)


def _rows(tensor: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
    """The rows that count; the tensor itself where all do."""
    return tensor if len(kept_N) == len(tensor) else tensor.index_select(0, kept_N)


def _in_dtype_of_products(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as autocast takes them, if it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _validated_kept_rows(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Check the inputs; return the indices of the rows that count."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise InputError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"target {tuple(target.shape)}; expected (M, D), (V, D) and (M,)."
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise InputError(f"linear_cross_entropy: hidden is {hidden.dtype}, weight {weight.dtype}; give them one dtype.")
    if target.dtype != torch.int64:
        raise InputError(f"linear_cross_entropy: target is {target.dtype}; expected torch.int64.")
    ignored = target == ignore_index
    classes = weight.shape[0]
    bad = ((target < 0) | (target >= classes)) & ~ignored
    wrong, kept = torch.stack((bad.sum(), (~ignored).sum())).tolist()  # the one read from the device
    if wrong:
        raise InputError(
            f"linear_cross_entropy: target {int(target[bad][0])} is no class; "
            f"expected 0 … {classes - 1}, or {ignore_index} to ignore a token."
        )
    return (~ignored).nonzero_static(size=kept).flatten()
