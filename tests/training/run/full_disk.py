"""Write checkpoints on a file system with more and more room, until one fits; see test_storage_faults.py."""

import json
import os
import sys
from pathlib import Path

import torch

from taipan.config import TaipanConfig
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError
from taipan.model import TaipanLM
from taipan.training.run.checkpoint import checkpoints, latest, save_checkpoint

PAGE = 4096


def main(directory: Path) -> None:
    config = TaipanConfig(vocab_size=257, hidden_size=16, layer_types=("mamba2",), mamba_head_dim=8, state_size=4)
    model, tokenizer, run, ballast = TaipanLM(config), Tokenizer.bytes(), directory / "run", directory / "ballast"
    moments = {"a/moment": torch.randn(5000)}

    def save(step: int) -> None:
        save_checkpoint(run, step, model, tokenizer, moments, {"step": step})

    save(1)
    full = 0
    for room in range(200):
        free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
        ballast.write_bytes(bytes(max(0, free - room * PAGE)))
        try:
            save(2)
        except CheckpointError as error:
            message = str(error)
        else:
            break
        full += 1
        assert "disk is full" in message or "No space left" in message, message
        assert [step for step, _ in checkpoints(run)] == [1]
        assert latest(run).step == 1
        ballast.unlink()
    assert latest(run).step == 2
    print(json.dumps({"full": full}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
