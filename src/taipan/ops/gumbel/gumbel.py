"""Hard selection by Gumbel-softmax over two scores, with a straight-through gradient (Eq. 2 and 3)."""

import math

import torch
from torch import Tensor

from taipan.errors import ConfigError
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import BoolBT, FloatBT, FloatBT2


def gumbel_select(
    scores_BT2: FloatBT2,
    *,
    temperature: float,
    noise: float,
    threshold: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[BoolBT, FloatBT]:
    """Select the tokens whose score 1 beats their score 0, after Gumbel noise (Eq. 2, 3).

    With two classes only the margin ``s_1 − s_0 + noise·(g_1 − g_0)`` matters: a token is selected if it exceeds
    ``threshold``, and the soft mask is ``sigmoid(margin / temperature)``, which is the softmax of Eq. 2. So the chance
    of selection is that of `expected_rate` for every temperature.

    Args:
        scores_BT2: gate scores of (skip, attend).
        temperature: τ of the soft mask, > 0.
        noise: scale of the Gumbel noise: 1 as in the paper, 0 for none (deterministic, draws no random numbers).
        threshold: a number or a tensor that broadcasts to (B, T).
        generator: where the noise is drawn from; None for the global generator of the device.
        part: (number, count): these rows are this one of so many equal parts of a batch. The noise is drawn for the
            whole batch, so that a row gets the same noise however the batch is spread over processes.

    Returns:
        hard_BT: bool, the selected tokens.
        mask_BT: its value as 0 or 1 in the dtype of the scores, with the gradient of the soft mask (straight-through).

    Raises:
        ConfigError: temperature not positive and finite, or noise negative or not finite.
    """
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"gumbel_select: temperature is {temperature}; give a finite number above 0.")
    _check_noise("gumbel_select", noise)
    margin_BT = _margin(scores_BT2)
    if noise > 0.0:
        # g = −log(Exponential) is Gumbel; −log(−log(u)) would not do, as a float32 u can round to 1
        (number, count), rows = part, scores_BT2.shape[0]
        shape = (count * rows, *scores_BT2.shape[1:])
        whole = torch.empty(shape, dtype=margin_BT.dtype, device=scores_BT2.device).exponential_(generator=generator)
        exponential_BT2 = whole[number * rows : (number + 1) * rows]
        log_BT2 = exponential_BT2.clamp_(min=torch.finfo(margin_BT.dtype).tiny).log_()
        margin_BT = margin_BT + noise * (log_BT2[..., 0] - log_BT2[..., 1])
    hard_BT = margin_BT > threshold
    soft_BT = torch.sigmoid(margin_BT / temperature).to(scores_BT2.dtype)
    # the bracket is exactly 0; (hard + soft) − soft would not be exactly hard
    return hard_BT, hard_BT.to(soft_BT.dtype) + (soft_BT - soft_BT.detach())


def expected_rate(scores_BT2: FloatBT2, noise: float, *, threshold: float | Tensor = 0.0) -> FloatBT:
    """Probability that `gumbel_select` selects each token: sigmoid of (margin − threshold) / noise.

    The difference of two Gumbel variables is logistic, so the temperature does not matter. Without noise the
    probability is 0 or 1.

    Args:
        scores_BT2: gate scores of (skip, attend).
        noise: scale of the Gumbel noise, >= 0.
        threshold: as in `gumbel_select`.

    Returns:
        Probabilities in float32 (float64 for float64 scores), differentiable if there is noise.

    Raises:
        ConfigError: noise negative or not finite.
    """
    _check_noise("expected_rate", noise)
    excess_BT = _margin(scores_BT2) - threshold
    return torch.sigmoid(excess_BT / noise) if noise > 0.0 else (excess_BT > 0).to(excess_BT.dtype)


def _margin(scores_BT2: FloatBT2) -> FloatBT:
    skip_BT, attend_BT = scores_BT2.to(accumulation_dtype(scores_BT2.dtype)).unbind(dim=-1)
    return attend_BT - skip_BT


def _check_noise(op: str, noise: float) -> None:
    if not 0.0 <= noise < math.inf:
        raise ConfigError(f"{op}: noise is {noise}; give a finite number >= 0 (0 for a deterministic choice).")
