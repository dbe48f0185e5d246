"""The gate's schedules in a `Trainer`."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from taipan.hf.backbone import TaipanBackbone
from taipan.layers.gating import GateSchedule
from taipan.layers.selective_attention import SelectiveAttention


class GateScheduleCallback(TrainerCallback):
    """Moves budget, temperature and noise of every gate along their schedules, step by step of a Trainer.

    Where a threshold holds the budget (`budget_control` = `threshold`), it is moved after every step, as in `taipan
    train`: by how much all calls of the step, on all processes, selected too many or too few tokens.

    Use it to train from random weights. Without it the schedules stand at their end and the thresholds stay as they
    are, which is right for fine-tuning. `Trainer(..., callbacks=[GateScheduleCallback()])`
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the gates whose thresholds will be moved."""
        for backbone in _backbones(kwargs["model"]):
            backbone.watch = [] if backbone.config.budget_control == "threshold" else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress to the share of steps done."""
        _set_progress(kwargs["model"], state.global_step / max(1, state.max_steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the thresholds that hold a budget."""
        for backbone in _backbones(kwargs["model"]):
            if backbone.watch:
                _hold_budget(backbone, torch.stack(backbone.watch).sum(0))
                backbone.watch.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model where its schedules end."""
        _set_progress(kwargs["model"], 1.0)
        for backbone in _backbones(kwargs["model"]):
            backbone.watch = None


def _backbones(model: nn.Module) -> list[TaipanBackbone]:
    # the Trainer's model may be wrapped (distributed, compiled, adapters)
    return [module for module in model.modules() if isinstance(module, TaipanBackbone)]


def _set_progress(model: nn.Module, fraction: float) -> None:
    for backbone in _backbones(model):
        backbone.schedule = GateSchedule.at(backbone.config, min(1.0, fraction))


def _hold_budget(backbone: TaipanBackbone, sums_S4: torch.Tensor) -> None:
    """Move the threshold of every gate by what this step selected; the sums are those of `decisions`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums_S4)
    gates = [module.gate for module in backbone.modules() if isinstance(module, SelectiveAttention)]
    for gate, (tokens, selected, margin, square) in zip(gates, sums_S4.tolist(), strict=True):
        if tokens:
            mean = margin / tokens
            spread = max(0.0, square / tokens - mean**2) ** 0.5
            gate.hold_budget(selected / tokens, spread, backbone.schedule.capacity)
