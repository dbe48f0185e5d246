"""How far a result may be from the truth: measured, not guessed.

The truth is an oracle run in fp64. The measure is the largest error over the oracle's largest value. The bound is twice
what oracles lose when they are run in the dtype under test (the worst of them, where there are several ways to sum),
plus the band within which that dtype rounds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error over the largest absolute value of ``exact`` (over 1 if that is smaller than rounding)."""
    scale = exact.abs().max().item()
    return (actual.double() - exact).abs().max().item() / (scale if scale > 1e-12 else 1.0)


def assert_as_exact_as(
    actual: Tensor,
    references: Sequence[Tensor],
    exact: Tensor,
    dtype: torch.dtype,
    what: str,
    magnitude: Tensor | None = None,
) -> None:
    """``actual`` errs at most 2 × (the error of ``references`` + a rounding of ``dtype``) from the fp64 ``exact``.

    What is a long sum of terms that cancel rounds at the sum of their absolute values: give it as ``magnitude``.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.isfinite().all(), f"{what}: not finite"
    rounding = torch.finfo(dtype).eps
    if magnitude is not None:
        rounding *= (magnitude.max() / exact.abs().max()).item()
    bound = 2 * (max(relative_error(reference, exact) for reference in references) + rounding)
    error = relative_error(actual, exact)
    assert error <= bound, f"{what}: error {error:.2e} of the scale, bound {bound:.2e}"


def assert_equal_to(actual: Sequence[Tensor], exact: Sequence[Tensor], bound: float, what: str) -> None:
    """Each tensor errs at most ``bound`` of the scale of its counterpart."""
    for index, (one, other) in enumerate(zip(actual, exact, strict=True)):
        assert one.shape == other.shape, f"{what}[{index}]: shape {tuple(one.shape)}, expected {tuple(other.shape)}"
        assert one.isfinite().all(), f"{what}[{index}]: not finite"
        error = relative_error(one, other.double())
        assert error <= bound, f"{what}[{index}]: error {error:.2e} of the scale, bound {bound:.2e}"
