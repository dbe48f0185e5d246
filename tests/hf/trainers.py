"""Trainers of transformers on small models, with batches in every layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from taipan.hf import TaipanForCausalLM, TaipanHFConfig
from tests.models import VOCAB, small_config


class Counting(Dataset[dict[str, Tensor]]):
    """Rows that count up from a random start: a few steps are enough to learn them."""

    def __init__(self, *, ragged: bool = True) -> None:
        self.ragged = ragged

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        start, length = torch.randint(0, VOCAB, (2,), generator=generator).tolist()
        tokens = (start + torch.arange(8 + (length % 9 if self.ragged else 0))) % VOCAB
        return {"input_ids": tokens, "labels": tokens.clone()}


def padded(rows: list[dict[str, Tensor]], *, left: bool = False) -> dict[str, Tensor]:
    """Rows of one length, labels −100 at the padding, as transformers' and TRL's collators make them."""
    length = max(len(row["input_ids"]) for row in rows)

    def fill(values: list[Tensor], value: int) -> Tensor:
        free = [length - len(row) for row in values]
        sides = [(n, 0) if left else (0, n) for n in free]
        return torch.stack([F.pad(row, side, value=value) for row, side in zip(values, sides, strict=True)])

    return {
        "input_ids": fill([row["input_ids"] for row in rows], 0),
        "attention_mask": fill([torch.ones_like(row["input_ids"]) for row in rows], 0),
        "labels": fill([row["labels"] for row in rows], -100),
    }


def packed(rows: list[dict[str, Tensor]], *, name: str) -> dict[str, Tensor]:
    """One row of all of them, whose documents `segment_ids` or restarting `position_ids` tell; every label is there."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    documents = {
        "segment_ids": torch.arange(len(rows)).repeat_interleave(lengths),
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths]),
    }
    joined = {part: torch.cat([row[part] for row in rows])[None] for part in ("input_ids", "labels")}
    return {**joined, name: documents[name][None]}


def new_model(**overrides: Any) -> TaipanForCausalLM:
    torch.manual_seed(0)
    config = small_config(("mamba2", "selective_attention"), **overrides)
    return TaipanForCausalLM(TaipanHFConfig.from_native(config))


def trainer(
    model: TaipanForCausalLM | Callable[[], TaipanForCausalLM],
    directory: Path,
    *callbacks: TrainerCallback,
    dataset: Counting | None = None,
    collate: Any = padded,
    **options: Any,
) -> Trainer:
    """A Trainer of a model, or of the one that a function makes when training begins."""
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "logging_steps": 5,
        "dataloader_pin_memory": False,
        **options,
    }
    given: dict[str, Any] = {"model" if isinstance(model, torch.nn.Module) else "model_init": model}
    return Trainer(
        **given,
        args=TrainingArguments(**settings),
        train_dataset=dataset or Counting(),
        eval_dataset=torch.utils.data.Subset(Counting(), range(16)),
        data_collator=collate,
        callbacks=list(callbacks),
    )
