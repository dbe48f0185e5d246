"""Processor time of one Muon step over the hidden matrices of the quickstart's model: ours against PyTorch's.

    python benchmarks/muon.py

Ours iterates in the dtype that training takes on this machine, PyTorch's always in bfloat16. Figures:
docs/decisions/0004-muon.md.
"""

import time
from collections.abc import Callable

import torch

from taipan.hardware import training_dtype
from taipan.training.step.muon import Muon

# in_proj and out_proj of four Mamba-2 layers; attention and SwiGLU of one SAL
SHAPES = [(1160, 256)] * 4 + [(256, 512)] * 4 + [(256, 256)] * 4 + [(768, 256)] * 2 + [(256, 768)]


def seconds_per_step(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], steps: int = 2) -> float:
    """Least processor time of a step, the first one left out."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(parameters)
    times: list[float] = []
    for _ in range(steps + 1):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        began = time.process_time()
        optimizer.step()
        times.append(time.process_time() - began)
    return min(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    choice = training_dtype("auto")
    dtype = torch.bfloat16 if choice.dtype == "bfloat16" else torch.float32
    print(f"{choice.dtype}: {choice.reason}")
    variants: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "taipan": lambda parameters: Muon(parameters, dtype=dtype),
        "torch.optim": lambda parameters: torch.optim.Muon(parameters, lr=0.02, weight_decay=0.0),
    }
    for name, make in variants.items():
        print(f"{name:12} {seconds_per_step(make):.3f} s of processor time a step", flush=True)


if __name__ == "__main__":
    main()
