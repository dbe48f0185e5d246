"""One job in a process of its own, for `taipan.benchmark.suites.memory`; prints the peak of its memory in bytes."""

import json
import sys
from typing import Any

import torch

from taipan import hardware
from taipan.benchmark.models import build, configuration, dtype_of, random_tokens
from taipan.benchmark.peers import build_peer
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.suites.prefill import PIECE
from taipan.generation import prefill, stream
from taipan.training.recipe import OptimizerSection
from taipan.training.step.batch import precision
from taipan.training.step.optimizer import build_optimizer
from taipan.training.step.train_step import train_step


def run(settings: Settings, job: str, subject: str) -> None:
    """Do a job of `taipan.benchmark.suites.memory.JOBS`."""
    hardware.tune_allocator()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = dtype_of(settings)
    training = {"train": 1, "later": 2, "narrow": 2, "lean": 2}.get(job, 0)  # steps
    weights = torch.float32 if training else dtype
    config = configuration(settings.model)
    ids_BT = random_tokens(config, settings.batch, settings.tokens[0], settings.seed)
    context_BT = random_tokens(config, settings.batch, settings.context[0], settings.seed)
    if subject != TAIPAN:
        peer = build_peer(subject, config, weights)
        if training:
            optimizer = torch.optim.AdamW(peer.model.parameters())
            with precision(ids_BT.device, str(dtype).removeprefix("torch.")):
                for _ in range(training):
                    peer.train(ids_BT, optimizer)
        elif job == "prefill":
            peer.prefill(ids_BT)
        elif job == "decode":
            peer.decode(ids_BT[:, :1], peer.prefill(context_BT), settings.new_tokens)
        return
    model = build(settings, weights)
    if training:
        section = OptimizerSection(moments="int8" if job in ("narrow", "lean") else "float32")
        model.set_recompute("selective" if job == "lean" else False)
        optimizers = build_optimizer(model.train(), section)
        for _ in range(training):
            train_step(model, optimizers, [{"tokens": ids_BT}], dtype=str(dtype).removeprefix("torch."))
    elif job == "prefill":
        prefill(model, ids_BT, chunk=PIECE)
    elif job == "decode":
        steps = settings.new_tokens
        for _ in stream(model, context_BT, prefill_chunk=PIECE, max_new_tokens=steps, eos_token_id=()):
            pass


def main(arguments: list[str]) -> None:
    """Read settings (JSON), job and subject; do it; print the peak."""
    given: dict[str, Any] = json.loads(arguments[0])
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    run(Settings(**values), arguments[1], arguments[2])
    print(hardware.peak_rss_bytes())


if __name__ == "__main__":
    main(sys.argv[1:])
