"""transformers' Trainer on Taipan."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from taipan import TaipanLM
from taipan.errors import ConfigError
from taipan.hf import GateScheduleCallback, TaipanForCausalLM, TaipanHFConfig
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


def right_padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As TRL's collator: padding on the right, labels −100 there."""
    length = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> Tensor:
        return torch.stack(
            [torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=value) for row in rows]
        )

    tokens = fill("input_ids", 0)
    mask = torch.stack([torch.arange(length) < len(row["input_ids"]) for row in rows]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": fill("labels", -100)}


def new_model(**overrides: Any) -> TaipanForCausalLM:
    torch.manual_seed(0)
    config = small_config(("mamba2", "selective_attention"), **overrides)
    return TaipanForCausalLM(TaipanHFConfig.from_native(config))


def trainer(
    model: TaipanForCausalLM,
    directory: Path,
    *callbacks: TrainerCallback,
    dataset: Counting | None = None,
    **options: Any,
) -> Trainer:
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
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=dataset or Counting(),
        eval_dataset=torch.utils.data.Subset(Counting(), range(16)),
        data_collator=cast(Any, right_padded),
        callbacks=list(callbacks),
    )


def test_the_loss_falls_and_the_result_is_a_native_model(tmp_path: Path) -> None:
    model = new_model(budget_weight=0.1)
    run = trainer(model, tmp_path, GateScheduleCallback())
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < 0.6 * before
    run.save_model(str(tmp_path / "model"))
    native = TaipanLM.from_pretrained(tmp_path / "model")
    tokens = Counting()[0]["input_ids"][None]
    assert torch.equal(native(tokens).logits, model.eval()(tokens).logits)


def test_predictions_are_logits_only(tmp_path: Path) -> None:
    run = trainer(new_model(), tmp_path)
    predictions: Any = run.predict(torch.utils.data.Subset(Counting(), range(3))).predictions
    assert predictions.shape[0] == 3
    assert predictions.shape[2] == VOCAB


class Progress(TrainerCallback):
    """Records where the schedules stand when a step begins."""

    def __init__(self) -> None:
        self.capacities: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.capacities.append(kwargs["model"].model.schedule.capacity)


def test_the_schedules_follow_the_steps(tmp_path: Path) -> None:
    model, seen = new_model(budget_anneal=(0.25, 0.75)), Progress()
    trainer(model, tmp_path, GateScheduleCallback(), seen, max_steps=8).train()
    assert seen.capacities == [model.model.config.capacity_at(step / 8) for step in range(8)]
    assert len(set(seen.capacities)) > 3
    assert model.model.schedule.capacity == model.config.attention_capacity


def test_without_the_callback_a_model_stays_where_its_schedules_end(tmp_path: Path) -> None:
    model, seen = new_model(), Progress()
    trainer(model, tmp_path, seen, max_steps=2).train()
    assert set(seen.capacities) == {model.config.attention_capacity}


@pytest.mark.parametrize(("budget_weight", "ragged"), [(0.0, True), (30.0, False)])
def test_accumulated_gradients_are_those_of_the_large_batch(budget_weight: float, ragged: bool, tmp_path: Path) -> None:
    """Rows of several lengths show a mean of means; a budget shows whether it is weighted like the cross-entropy.

    The budget is a function of each micro-batch's own rate, so it is compared where the rates are equal: gates that
    select every token, but not so surely that their gradient vanishes, and rows of one length.
    """
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = new_model(budget_weight=budget_weight, gate_bias_init=6.0, gate_gradient="gathered")
        trainer(
            model,
            tmp_path,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            dataset=Counting(ragged=ragged),
        ).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_mixed_precision_leaves_the_logits_deferred() -> None:
    """accelerate rebuilds outputs to widen their tensors."""
    from accelerate.utils import convert_outputs_to_fp32

    model = new_model()
    model.train()
    tokens = Counting()[0]["input_ids"][None]
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    out = cast(Any, convert_outputs_to_fp32)(model.forward)(tokens, labels=tokens)
    assert out["loss"].requires_grad
    assert not calls
    assert out.logits.shape == (1, tokens.shape[1], VOCAB)


def test_a_threshold_that_nobody_would_move_is_refused(tmp_path: Path) -> None:
    model = new_model(budget_control="threshold")
    with pytest.raises(ConfigError, match="fine-tune with the Trainer"):
        trainer(model, tmp_path, GateScheduleCallback(), max_steps=1).train()
    trainer(model, tmp_path, max_steps=1).train()
