"""Time and exactness of the ops of the Mamba-2 mixer: portable against reference, one thread, processor time.

    python benchmarks/ops.py

Figures: docs/decisions/0005-mixer-ops.md.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from taipan.ops.causal_conv1d import causal_conv1d
from taipan.ops.gated_rms_norm import gated_rms_norm
from taipan.ops.ssd import ssd
from taipan.ops.ssd.reference import ssd_recurrent

# (batch, tokens, heads, head dim, state size)
SHAPES = ((4, 1024, 8, 64, 64), (4, 512, 24, 64, 128), (64, 64, 4, 64, 16))
Op = Callable[..., Tensor]


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def row(name: str, op: Op, leaves: list[Tensor], repeats: int) -> None:
    """Print the least and the median milliseconds of a forward without gradients, a forward and a backward."""
    direction = torch.randn_like(op(*leaves))
    bare, forward, backward = [], [], []
    for _ in range(repeats):
        with torch.no_grad():
            bare.append(timed(lambda: op(*leaves)))
        outputs: list[Tensor] = []
        forward.append(timed(lambda: outputs.append(op(*leaves))))  # noqa: B023
        backward.append(timed(lambda: torch.autograd.grad(outputs[0], leaves, direction)))  # noqa: B023
    columns = (f"{min(times):7.1f} / {sorted(times)[repeats // 2]:6.1f}" for times in (bare, forward, backward))
    print(f"{name:48s}", *columns, flush=True)


def inputs_of_ssd(batch: int, tokens: int, heads: int, head_dim: int, state: int) -> list[Tensor]:
    """As in the mixer: slices of one projection, dt from the initial distribution, A from 1 to 16."""
    wide = torch.randn(batch, tokens, heads * head_dim + 2 * state)
    x, b, c = wide.split([heads * head_dim, state, state], dim=-1)
    dt = torch.exp(torch.empty(batch, tokens, heads).uniform_(-6.9, -2.3))
    views = x.unflatten(2, (heads, head_dim)), b.unflatten(2, (1, state)), c.unflatten(2, (1, state))
    tensors = [views[0], dt, -torch.rand(heads) * 15 - 1, *views[1:], torch.ones(heads)]
    return [tensor.detach().requires_grad_() for tensor in tensors]


def exactness(shape: tuple[int, ...]) -> None:
    """Print the error of y and of the gradients in fp32, over the largest value, from the recurrence in fp64."""
    leaves = inputs_of_ssd(*shape)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    names = ("y", "dx", "ddt", "dA", "dB", "dC", "dD")

    def results(op: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> list[Tensor]:
        y, _ = op(*tensors)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return [y, *torch.autograd.grad(y, tensors, direction)]

    exact = results(ssd_recurrent, wide)
    for implementation in ("reference", "portable"):
        actual = results(lambda *tensors: ssd(*tensors, implementation=implementation), leaves)  # noqa: B023
        errors = [
            ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(actual, exact, strict=True)
        ]
        print(f"error of ssd, {implementation}:", *(f"{n} {e:.1e}" for n, e in zip(names, errors, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'milliseconds, least / median':48s}  no gradients          forward         backward")
    for implementation in ("reference", "portable"):
        for shape in SHAPES:
            run = lambda *tensors: ssd(*tensors, implementation=implementation)[0]  # noqa: B023, E731
            row(f"ssd {shape} {implementation}", run, inputs_of_ssd(*shape), repeats)
    for name, op, tensors in (
        ("causal_conv1d (4, 1024, 640)", portable_conv, [torch.randn(4, 1024, 640), torch.randn(640, 4)]),
        ("  torch conv1d and silu", torch_conv, [torch.randn(4, 1024, 640), torch.randn(640, 4)]),
        ("gated_rms_norm (4, 1024, 512)", portable_norm, [torch.randn(4, 1024, 512), torch.randn(4, 1024, 512)]),
        ("  torch silu and rms_norm", torch_norm, [torch.randn(4, 1024, 512), torch.randn(4, 1024, 512)]),
    ):
        weights = [torch.ones(tensors[0].shape[-1])]
        row(name, op, [tensor.requires_grad_() for tensor in [*tensors, *weights]], repeats)
    exactness((1, 512, 8, 64, 64))


def portable_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias)[0]


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=x.shape[2])
    return torch.nn.functional.silu(out).transpose(1, 2)


def portable_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return gated_rms_norm(y, z, weight, group_size=y.shape[2], eps=1e-5)


def torch_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(y * torch.nn.functional.silu(z), (y.shape[2],), weight, 1e-5)


if __name__ == "__main__":
    main()
