"""The gate's schedules in a `Trainer`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from taipan.hf.modeling import TaipanForCausalLM


class GateScheduleCallback(TrainerCallback):
    """Moves budget, temperature and noise of every gate along their schedules, step by step of a Trainer.

    Without it a model trains with what its schedules end in, as fits the fine-tuning of a trained model; with it, as
    fits one that starts from nothing. `Trainer(..., callbacks=[GateScheduleCallback()])`
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress to the share of steps done."""
        _set_progress(kwargs["model"], state.global_step / max(1, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model where its schedules end."""
        _set_progress(kwargs["model"], 1.0)


def _set_progress(model: nn.Module, fraction: float) -> None:
    # the Trainer's model may be wrapped (distributed, compiled, adapters)
    for module in model.modules():
        if isinstance(module, TaipanForCausalLM):
            module.set_progress(min(1.0, fraction))
