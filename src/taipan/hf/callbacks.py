"""The gate's schedules in a `Trainer`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from taipan.errors import ConfigError
from taipan.hf.modeling import TaipanForCausalLM


class GateScheduleCallback(TrainerCallback):
    """Moves budget, temperature and noise of every gate along their schedules, step by step of a Trainer.

    Without it a model trains with what its schedules end in, as fits the fine-tuning of a trained model; with it, as
    fits one that starts from nothing. `Trainer(..., callbacks=[GateScheduleCallback()])`

    Raises:
        ConfigError: when training begins, if the model's budget is held by a threshold: no Trainer moves it.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what a Trainer cannot train from nothing."""
        for module in kwargs["model"].modules():
            if isinstance(module, TaipanForCausalLM) and module.model.config.budget_control == "threshold":
                raise ConfigError(
                    "budget_control is 'threshold', which only `taipan train` moves from step to step: train there and "
                    "fine-tune with the Trainer, without GateScheduleCallback, or set budget_control='penalty'."
                )

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
