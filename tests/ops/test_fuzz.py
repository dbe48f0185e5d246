"""Random cases against the fp64 reference: outputs and gradients, for every implementation (see `tests.ops.fuzz`)."""

import pytest

from tests.kernels import needs_kernels
from tests.ops.fuzz import OPS, worst

ALLOWED = 2.0  # times what is measured
# attention is measured by `python -m tests.ops.fuzz`: gradients in which all cancels need a magnitude first.
NAMES = ("ssd", "causal_conv1d", "gated_rms_norm", "rms_norm", "linear_cross_entropy")
# The gradient of A is all cancellation where heads forget at once: test_ssd.py measures it against its magnitude.
CANCELLING = {("ssd", "dA")}
# In fp64 the portable ssd sums dt A in one part only, so large sums cost it digits that no one misses.
INEXACT = {("ssd", "portable")}


def check(op: str, implementation: str, seeds: range) -> None:
    for name, (ratio, seed) in worst(op, implementation, seeds).items():
        if (op, name) in CANCELLING:
            continue
        assert ratio <= ALLOWED, f"{op}, {implementation}, case {seed}: {name} is {ratio:.2f} times what is measured"


@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_kernels) if op == "ssd" else op for op in NAMES])
def test_what_runs_is_the_reference(op: str) -> None:
    check(op, "auto", range(12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        pytest.param(op, name, marks=needs_kernels if name == "native" else ())
        for op in NAMES
        for name in sorted(OPS[op][1].keys() - {"cuda", "reference"})
        if (op, name) not in INEXACT
    ],
)
@pytest.mark.timeout(1200)
def test_every_implementation_is_the_reference(op: str, implementation: str) -> None:
    check(op, implementation, range(500))
