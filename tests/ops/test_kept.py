"""What the compiled ops keep for backward is as narrow as what they were given, not its widened copy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.attention.native import windowed_attention
from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.native import causal_conv1d_native
from taipan.ops.gated_rms_norm.native import gated_rms_norm_native, rms_norm_native, rms_norm_of_sum_native
from taipan.ops.ssd import native as ssd_kernels
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.native import ssd_native
from tests.compilers import needs_kernels
from tests.ops.fuzz import Case, Draw, of_mamba2, of_ssd, results

TOKENS = 96


def narrow(*shape: int) -> Tensor:
    return torch.randn(1, TOKENS, *shape).bfloat16().requires_grad_()


INDEX = torch.arange(TOKENS)[None]

RUNS: dict[str, Callable[[], object]] = {
    "attention": lambda: windowed_attention(
        AttentionInputs(narrow(2, 32), narrow(2, 32), narrow(2, 32), INDEX, INDEX, 16)
    ),
    "causal_conv1d": lambda: causal_conv1d_native(ConvolutionInputs(narrow(64), torch.randn(64, 4), torch.randn(64))),
    "gated_rms_norm": lambda: gated_rms_norm_native(narrow(64), narrow(64), torch.ones(64), group_size=64, eps=1e-5),
    "rms_norm": lambda: rms_norm_native(narrow(64), torch.ones(64), eps=1e-5),
    "ssd": lambda: ssd_native(
        SSDInputs(narrow(2, 32), torch.rand(1, TOKENS, 2), -torch.rand(2), narrow(1, 32), narrow(1, 32), torch.randn(2))
    ),
}


@needs_kernels
def test_of_a_sum_only_the_sum_is_kept() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, total = rms_norm_of_sum_native(narrow(64).float(), narrow(64), torch.ones(64), eps=1e-5)
    of_tokens = [tensor for tensor in kept if tensor.numel() >= TOKENS * 32]
    assert [tensor.data_ptr() for tensor in of_tokens] == [total.data_ptr()]


@needs_kernels
@pytest.mark.parametrize("op", RUNS)
def test_nothing_of_the_tokens_is_kept_wide(op: str) -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        RUNS[op]()
    of_tokens = [tensor for tensor in kept if tensor.numel() >= TOKENS * 32 and tensor.ndim < 5]  # states have five
    assert of_tokens
    assert {tensor.dtype for tensor in of_tokens} == {torch.bfloat16}


@needs_kernels
@pytest.mark.parametrize("of", [of_ssd, of_mamba2])
def test_states_that_the_forward_leaves_are_those_that_the_backward_computes(
    of: Callable[[Draw], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, left = ssd_kernels.room_for_entrances, 0

    def counted(*sizes: object) -> Tensor | None:
        nonlocal left
        entrances = room(*sizes)  # pyright: ignore[reportArgumentType]
        left += entrances is not None
        return entrances

    for module in ("ssd", "mamba2"):
        monkeypatch.setattr(f"taipan.ops.{module}.native.room_for_entrances", counted)
    for seed in range(24):
        case = of(Draw(seed))

        def gradients(case: Case = case) -> dict[str, Tensor]:
            return results(case, lambda tensors: case.run(tensors, "native"), case.inputs)

        kept = gradients()
        before = left
        with monkeypatch.context() as patch:
            patch.setattr(ssd_kernels, "KEPT_BYTES", 0)
            computed = gradients()
        assert left == before
        for name, gradient in kept.items():
            assert torch.equal(gradient, computed[name]), f"case {seed}, {case.about}: {name}"
    assert left >= 12
