"""From the logits of one step to the next tokens: pure functions, one row never looks at another.

Order of application, the same as in transformers: repetition penalty, temperature, top-k, top-p, min-p, draw. Every
filter sets what it drops to −∞ and keeps at least one token of each row.
"""

import math
from typing import NoReturn

import torch

from taipan.errors import InputError, shown
from taipan.shapes import BoolBV, FloatB, FloatBV, IntB

_SMALLEST = 1e-6  # of a temperature or penalty: below it logits overflow, and that is not the model's fault
# Candidates that top-p looks at before it sorts more of the vocabulary.
_TOP_P_CANDIDATES = 256


def apply_repetition_penalty(logits_BV: FloatBV, seen_BV: BoolBV, penalty: float) -> FloatBV:
    """Make tokens that the row has seen less likely: a positive logit is divided by the penalty, a negative one
    multiplied (CTRL, Keskar et al. 2019, §4.1).

    Args:
        logits_BV: logits of the next token.
        seen_BV: tokens that occurred in the row, prompt or generated.
        penalty: 1 changes nothing, above 1 discourages repetition, below 1 favours it.

    Raises:
        InputError: the penalty is not a number from 1e-6 to 1e6.
    """
    check_repetition_penalty(penalty)
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def apply_temperature(logits_BV: FloatBV, temperature: float) -> FloatBV:
    """Divide the logits by the temperature.

    Raises:
        InputError: the temperature is not a number from 1e-6 to 1e6.
    """
    check_temperature(temperature)
    return logits_BV / temperature


def keep_top_k(logits_BV: FloatBV, k: int) -> FloatBV:
    """Keep the k most likely tokens of each row, exactly k whatever the ties; 0 keeps all.

    Raises:
        InputError: k is negative or not whole.
    """
    check_top_k(k)
    if k == 0 or k >= logits_BV.shape[1]:
        return logits_BV
    values_BK, index_BK = logits_BV.topk(k)
    return torch.full_like(logits_BV, -torch.inf).scatter_(1, index_BK, values_BK)


def keep_top_p(logits_BV: FloatBV, p: float) -> FloatBV:
    """Keep the fewest most likely tokens of each row whose probabilities sum to at least p (nucleus sampling,
    Holtzman et al. 2019).

    Raises:
        InputError: p is not in (0, 1].
    """
    check_top_p(p)
    if p == 1.0:
        return logits_BV
    vocabulary = logits_BV.shape[1]
    total_B1 = logits_BV.logsumexp(1, keepdim=True)
    # A full sort costs more than a decoding step of a small model; the nucleus is nearly always within the first few.
    candidates = min(_TOP_P_CANDIDATES, vocabulary)
    while True:
        values_BK, index_BK = logits_BV.topk(candidates)
        probabilities_BK = (values_BK - total_B1).exp()
        sum_BK = probabilities_BK.cumsum(1)
        if candidates == vocabulary or bool((sum_BK[:, -1] >= p).all()):
            break
        candidates = min(16 * candidates, vocabulary)
    outside_BK = sum_BK - probabilities_BK >= p  # what stands before a token suffices
    outside_BK[:, 0] = False  # nothing stands before the first, and p may be 0 in this dtype
    values_BK = values_BK.masked_fill(outside_BK, -torch.inf)
    return torch.full_like(logits_BV, -torch.inf).scatter_(1, index_BK, values_BK)


def keep_min_p(logits_BV: FloatBV, p: float) -> FloatBV:
    """Keep the tokens at least p times as likely as the likeliest of their row (Nguyen et al. 2024); 0 keeps all.

    Raises:
        InputError: p is not in [0, 1].
    """
    check_min_p(p)
    if p == 0.0:
        return logits_BV
    log_ratio_BV = logits_BV - logits_BV.amax(1, keepdim=True)
    return logits_BV.masked_fill(log_ratio_BV < math.log(p), -torch.inf)


def greedy(logits_BV: FloatBV) -> IntB:
    """The likeliest token of each row; of equals the one with the lowest id.

    Raises:
        InputError: a row holds NaN.
    """
    best_B, token_B = logits_BV.max(1)
    _refuse_nan(best_B)
    return token_B


def draw(logits_BV: FloatBV, uniform_B: FloatB) -> IntB:
    """One token of each row by inversion of its cumulative distribution: a pure function of the row and its number.

    Args:
        logits_BV: logits of the next token, −∞ for dropped ones.
        uniform_B: one fp64 number in [0, 1) for each row.

    Raises:
        InputError: a row holds NaN or no token with a finite logit.
    """
    cumulative_BV = logits_BV.double().softmax(1).cumsum(1)
    total_B = cumulative_BV[:, -1]
    _refuse_nan(total_B)
    # the numbers are at most 1 − 2⁻⁵³, so the product rounds to below the total: never past the last possible token
    point_B = uniform_B.double() * total_B
    return torch.searchsorted(cumulative_BV, point_B[:, None], right=True)[:, 0]


def check_repetition_penalty(value: object) -> None:
    """Raise `InputError` unless the penalty is a positive number that logits can be multiplied with."""
    expected = f"a positive number (1 = none), from {_SMALLEST:g} to {1 / _SMALLEST:g}"
    _require(_SMALLEST <= _number(value) <= 1 / _SMALLEST, "repetition_penalty", value, expected)


def check_temperature(value: object) -> None:
    """Raise `InputError` unless the temperature is a positive number that logits can be divided by."""
    expected = f"a positive number, from {_SMALLEST:g} to {1 / _SMALLEST:g}; for the likeliest token every time use "
    expected += "do_sample=False (command line: --greedy)"
    _require(_SMALLEST <= _number(value) <= 1 / _SMALLEST, "temperature", value, expected)


def check_top_k(value: object) -> None:
    """Raise `InputError` unless k is a whole number of at least 0."""
    whole = isinstance(value, int) and _number(value) >= 0
    _require(whole, "top_k", value, "a whole number of at least 0 (0 = all tokens)")


def check_top_p(value: object) -> None:
    """Raise `InputError` unless p is in (0, 1]."""
    _require(0 < _number(value) <= 1, "top_p", value, "above 0 and at most 1 (1 = all tokens)")


def check_min_p(value: object) -> None:
    """Raise `InputError` unless p is in [0, 1]."""
    _require(0 <= _number(value) <= 1, "min_p", value, "between 0 and 1 (0 = all tokens)")


def _number(value: object) -> float:
    """The value as a float; NaN, which no comparison lets pass, if it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{name} is {shown(value)}, but must be {expected}.")


def _refuse_nan(values_B: FloatB) -> None:
    if values_B.isnan().any():
        refuse(values_B.isnan().nonzero()[:, 0].tolist())


def refuse(rows: list[int]) -> NoReturn:
    """Raise `InputError`: no token can be chosen from the logits of these rows."""
    raise InputError(
        f"The model gave no usable logits for the rows {rows} (NaN, or −∞ for every token): its weights or the "
        "state hold NaN, or its dtype overflows. Load it with dtype float32, or go back to a good checkpoint."
    )
