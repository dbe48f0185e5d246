"""The first 50 steps of each architecture as committed numbers: what changes training shows here.

Make them again, after a change that is meant to change training:

    python -m tests.training.golden_curves
"""

import json
import platform
from pathlib import Path

import torch

from taipan.config import TaipanConfig
from taipan.hardware import describe
from taipan.model import TaipanLM
from taipan.seeding import seeded_generator
from taipan.training.recipe import OptimizerSection, ScheduleSection
from taipan.training.step.batch import Batch
from taipan.training.step.stepper import Stepper

FILE = Path(__file__).with_suffix(".json")
STEPS = 50
VOCAB = 48

STACKS: dict[str, tuple[str, ...]] = {
    "taipan": ("mamba2", "mamba2", "selective_attention", "mamba2"),
    "mamba2": ("mamba2", "mamba2", "mamba2", "mamba2"),
    "jamba": ("mamba2", "mamba2", "full_attention", "mamba2"),
    "transformer": ("full_attention", "full_attention", "full_attention"),
}

Curve = dict[str, list[float]]


def machine() -> dict[str, str]:
    """What the last bits depend on: the libraries and the kernels they choose for this processor."""
    hardware = describe()
    return {
        "torch": torch.__version__.partition("+")[0],
        "architecture": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": hardware.cpu,
        "simd": " ".join(hardware.simd),
    }


def batch(step: int) -> Batch:
    """Rows of a noisy counter in packed documents: each token is mostly the one before plus the row's stride."""
    generator = seeded_generator(0, "golden", step)
    rows, length = 4, 48
    stride = torch.randint(1, 4, (rows, 1), generator=generator)
    noise = torch.randint(0, 8, (rows, length), generator=generator) // 7
    tokens = (torch.randint(VOCAB, (rows, 1), generator=generator) + (stride + noise).cumsum(1)) % VOCAB
    boundary = torch.randint(0, 20, (rows, length), generator=generator) == 0
    return {"tokens": tokens, "segment_ids": boundary.cumsum(1)}


def curve(name: str) -> Curve:
    """Losses and gradient norms of 50 steps, one thread, portable implementations, all schedules passed through."""
    config = TaipanConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        layer_types=STACKS[name],
        state_size=8,
        mamba_head_dim=8,
        chunk_size=16,
        num_attention_heads=2,
        sliding_window=16,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = TaipanLM(config, implementation="portable", generator=seeded_generator(0, "init"))
        stepper = Stepper.build(
            model,
            OptimizerSection(learning_rate=3e-3),
            ScheduleSection(warmup=0.1),
            total_steps=STEPS,
            dtype="float32",
            seed=0,
        )
        results = [stepper.step(number, (number - 0.5) / STEPS, [batch(number)]) for number in range(1, STEPS + 1)]
    finally:
        torch.set_num_threads(threads)
    return {"loss": [result.loss for result in results], "grad_norm": [result.grad_norm for result in results]}


def load() -> tuple[dict[str, str], dict[str, Curve]]:
    """The machine the committed curves come from, and the curves."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    curves = {
        name: {key: [float.fromhex(number) for number in numbers] for key, numbers in curve.items()}
        for name, curve in values["curves"].items()
    }
    return values["machine"], curves


def main() -> None:
    """Write the curves of this machine."""
    curves = {
        name: {key: [number.hex() for number in numbers] for key, numbers in curve(name).items()} for name in STACKS
    }
    FILE.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
