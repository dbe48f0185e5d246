"""What a Trainer and a Taipan model must know of each other: which labels count, what a step is, what a loss holds."""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from taipan.errors import ConfigError
from taipan.hf.arguments import PACKING, packed_segments
from taipan.hf.backbone import TaipanBackbone, TrainerLink
from taipan.model import next_tokens

if TYPE_CHECKING:
    from transformers import Trainer  # whose module takes seconds to import


def prepare_trainer(trainer: "Trainer") -> "Trainer":
    """Connect a Trainer, of transformers or of TRL, with its Taipan model.

    Call it before `trainer.train()`. Then

    * labels that no token predicts (first tokens after left padding, or of documents in packed rows) are −100 before
      the Trainer counts them, so that every layout and every accumulation takes the same step;
    * a trainer that computes its own loss (TRL's, label smoothing) gives the budget of Eq. 7 the right weight when it
      accumulates gradients or scales them (float16);
    * weight decay spares A_log and D, as `taipan train` does; a Trainer spares what is named a bias or a norm;
    * gates that forecast gains are clipped by themselves, as by `taipan train` (not with FSDP or DeepSpeed, which clip
      in ways of their own);
    * what is saved is what `evaluate()` reads, with optimizers that train other weights than those of the model
      (`optim="schedule_free_adamw"`); a Trainer saves those that are trained;
    * `evaluate()` reports `eval_cross_entropy`, of a predicted token, and `eval_budget` beside `eval_loss`, which holds
      both and weighs batches by their rows.

    Without this call, whatever is exact without it works; the rest is refused.

    Args:
        trainer: its model is Taipan's, wrapped or not (adapters); with `model_init` that of every training.

    Returns:
        The same trainer.

    Raises:
        ConfigError: the model is not a Taipan model.
    """
    if not _backbones(trainer):
        raise ConfigError(
            f"The trainer's model is a {type(trainer.model).__name__} without a Taipan decoder in it: there is nothing "
            "to prepare."
        )
    trainer.data_collator = PredictedLabels(trainer.data_collator)
    trainer.get_decay_parameter_names = partial(_decayed, trainer.get_decay_parameter_names)
    trainer.add_callback(_Telling(trainer))
    trainer.add_callback(_Settling())
    trainer.add_callback(_Clipping(trainer))
    return trainer


def _backbones(trainer: "Trainer") -> list[TaipanBackbone]:
    """Of the model that the Trainer has now: with `model_init` every training has one of its own."""
    return [module for module in cast(Any, trainer.model).modules() if isinstance(module, TaipanBackbone)]


def _linked(trainer: "Trainer") -> list[TrainerLink]:
    """What the decoders and the Trainer know of each other, made where it is missing."""
    links: list[TrainerLink] = []
    for backbone in _backbones(trainer):
        backbone.link = backbone.link or TrainerLink()
        links.append(backbone.link)
    return links


_NEVER_DECAYED = ("A_log", "D")


def _decayed(by_name: Callable[[nn.Module], list[str]], model: nn.Module) -> list[str]:
    """The parameters that a Trainer decays, without those of Mamba-2 that are no weights (Mamba-2's own training)."""
    return [name for name in by_name(model) if name.rpartition(".")[2] not in _NEVER_DECAYED]


class PredictedLabels:
    """A collator that sets labels to −100 where Taipan predicts nothing, as in its own loss.

    Args:
        collate: makes a batch of features.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, features: Any) -> Any:
        """Make a batch; one without (B, T) labels stays unchanged."""
        batch = self.collate(features)
        if not isinstance(batch, Mapping):
            return batch
        values = cast("MutableMapping[str, Any]", batch)
        tokens, labels = values.get("input_ids"), values.get("labels")
        if isinstance(tokens, Tensor) and isinstance(labels, Tensor) and labels.shape == tokens.shape:
            segments = values.get("segment_ids")
            if segments is None:
                segments = packed_segments(tokens, {name: values.get(name) for name in PACKING}, fresh=True)
            predicted = next_tokens(labels, tokens.shape, values.get("attention_mask"), segments)
            values["labels"] = torch.cat([labels[:, :1], predicted], 1)
        return batch


class _Telling(TrainerCallback):
    """Tells the model the weight of its budget, and adds the parts of the loss to the metrics of an evaluation."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._links = _linked(trainer)
        self._evaluated = torch.zeros(4, dtype=torch.float64)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is the one of this training now."""
        self._links = _linked(self._trainer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step's number of calls is known now."""
        scaler = self._trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        for link in self._links:
            link.share = scale / self._trainer.current_gradient_accumulation_steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Later calls are no steps of this Trainer."""
        for link in self._links:
            link.share = None

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of an evaluation has just been read."""
        for link in self._links:
            rows, tokens, cross_entropy, budget = link.evaluated or (0, 0, 0.0, 0.0)
            sums = [rows, tokens, tokens * cross_entropy, rows * budget]
            self._evaluated += torch.tensor(sums, dtype=torch.float64)
            link.evaluated = None

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """No evaluation."""
        self._evaluated.zero_()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the parts of the loss to the metrics: cross-entropy by predicted tokens, the budget by rows.

        The loss itself weighs every batch by its rows, whatever they hold: where lengths differ it depends on the size
        of the batches, and is not the sum of its parts.
        """
        accelerator = self._trainer.accelerator
        reduced = cast(Tensor, accelerator.reduce(self._evaluated.float().to(accelerator.device)))
        rows, tokens, cross_entropy, budget = reduced.tolist()
        self._evaluated.zero_()
        loss = next((name for name in metrics or {} if name.endswith("_loss")), None)
        if metrics is None or loss is None or not rows:
            return
        prefix = loss.removesuffix("loss")
        found = {f"{prefix}cross_entropy": cross_entropy / max(tokens, 1.0), f"{prefix}budget": budget / rows}
        metrics.update(found)
        if state.log_history and loss in state.log_history[-1]:
            state.log_history[-1].update(found)


class _Settling(TrainerCallback):
    """Puts the weights that an optimizer answers for into the model before they are saved, and at the end of training.

    A Trainer (transformers 5.23.0) does so before it evaluates only, and back before the next step.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint, or the end, comes next."""
        settle = getattr(kwargs.get("optimizer"), "eval", None)
        if (control.should_save or control.should_training_stop) and callable(settle):
            settle()

    on_epoch_end = on_step_end  # the same for checkpoints by epochs


class _Clipping(TrainerCallback):
    """Gives gates that forecast gains a limit of their own, where the Accelerator clips lists of parameters."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Accelerator is the one of this training now."""
        accelerator = self._trainer.accelerator
        plain = accelerator.distributed_type.value in ("NO", "MULTI_CPU", "MULTI_GPU")
        if plain and not isinstance(accelerator.clip_grad_norm_, _ClippedApart):
            accelerator.clip_grad_norm_ = _ClippedApart(cast(Any, accelerator.clip_grad_norm_), self._trainer)


class _ClippedApart:
    """`Accelerator.clip_grad_norm_` with one limit for gates that forecast gains, and one for all else.

    What these gates learn changes nothing but them, and in the first steps of a training theirs is most of the gradient
    (docs/decisions/0037).
    """

    def __init__(self, clip: Callable[..., Tensor], trainer: "Trainer") -> None:
        self._clip, self._trainer = clip, trainer

    def __call__(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip; returns the norm of everything before."""
        every = list(parameters)
        apart = {parameter for backbone in _backbones(self._trainer) for parameter in backbone.forecasting}
        if not apart:
            return self._clip(every, max_norm, norm_type)
        norm = self._clip(every, math.inf, norm_type)  # also takes the scale off, once a step
        torch.nn.utils.clip_grad_norm_([one for one in every if one not in apart], max_norm, norm_type)
        torch.nn.utils.clip_grad_norm_([one for one in every if one in apart], max_norm, norm_type)
        return norm
