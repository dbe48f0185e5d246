"""What a Trainer counts and what the model predicts are the same, in every layout, accumulation and evaluation."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taipan.errors import ConfigError, InputError
from taipan.hf import TaipanForCausalLM, prepare_trainer
from taipan.training.step.optimizer import decays
from tests.hf.trainers import Counting, new_model, packed, padded, trainer

LAYOUTS: dict[str, Any] = {
    "right": padded,
    "left": partial(padded, left=True),
    "segment_ids": partial(packed, name="segment_ids"),
    "position_ids": partial(packed, name="position_ids"),
}
ROWS = [Counting()[index] for index in range(16)]


def step(layout: str, size: int, directory: Path, *, prepare: bool = True) -> tuple[float, dict[str, Tensor]]:
    """One step of SGD on 16 rows; the loss that is logged, and the weights."""
    model = new_model(budget_weight=0.0)
    run = trainer(
        model,
        directory,
        collate=LAYOUTS[layout],
        max_steps=1,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
    )
    if prepare:
        prepare_trainer(run)
    run.train()
    return run.state.log_history[0]["loss"], model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, Tensor]]:
    return step("right", 16, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [16, 4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_layout_and_accumulation_takes_the_same_step(
    layout: str, size: int, whole: tuple[float, dict[str, Tensor]], tmp_path: Path
) -> None:
    loss, weights = step(layout, size, tmp_path)
    assert loss == pytest.approx(whole[0], rel=1e-5)
    for name, tensor in whole[1].items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", ["left", "segment_ids", "position_ids"])
def test_a_trainer_that_was_not_prepared_is_right_where_a_batch_is_a_step_and_else_refused(
    layout: str, whole: tuple[float, dict[str, Tensor]], tmp_path: Path
) -> None:
    loss, _ = step(layout, 16, tmp_path, prepare=False)
    assert loss == pytest.approx(whole[0], rel=1e-5)
    with pytest.raises(InputError, match=r"are predicted: a first token .*prepare_trainer\(trainer\)"):
        step(layout, 4, tmp_path, prepare=False)


def test_right_padding_needs_no_preparation(whole: tuple[float, dict[str, Tensor]], tmp_path: Path) -> None:
    for size in (4, 1):
        assert step("right", size, tmp_path, prepare=False)[0] == pytest.approx(whole[0], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prepare", [True, False])
def test_an_evaluation_is_the_loss_of_the_model_with_its_parts_beside_it(
    layout: str, prepare: bool, tmp_path: Path
) -> None:
    model = new_model(budget_weight=30.0)
    run = trainer(model, tmp_path, collate=LAYOUTS[layout], per_device_eval_batch_size=16)
    if prepare:
        prepare_trainer(run)
    found = run.evaluate()
    own = model.eval()(**LAYOUTS[layout](ROWS))
    assert found["eval_loss"] == pytest.approx(float(own.loss), rel=1e-5)
    if prepare:
        assert found["eval_cross_entropy"] == pytest.approx(float(own.cross_entropy), rel=1e-5)
        assert found["eval_budget"] == pytest.approx(float(own.budget), rel=1e-5)
        assert float(own.budget) > 0.1
        assert run.state.log_history[-1]["eval_cross_entropy"] == found["eval_cross_entropy"]
        model(**padded(ROWS[:3]))  # calls of others, and predictions, are no part of an evaluation
        run.predict(ROWS[:5])  # pyright: ignore[reportArgumentType]
        assert run.evaluate()["eval_budget"] == pytest.approx(found["eval_budget"])


@pytest.mark.parametrize("size", [16, 5, 1])
def test_the_cross_entropy_of_an_evaluation_is_that_of_a_token_whatever_the_batches(size: int, tmp_path: Path) -> None:
    model = new_model(budget_weight=0.0)
    run = prepare_trainer(trainer(model, tmp_path, per_device_eval_batch_size=size))
    found = run.evaluate(metric_key_prefix="test")
    own = model.eval()(**padded(ROWS))
    assert found["test_cross_entropy"] == pytest.approx(float(own.cross_entropy), rel=1e-5)
    # a Trainer weighs the batches by their rows (findings/an_evaluation_depends_on_the_batch_size.sh)
    assert (found["test_loss"] == pytest.approx(float(own.loss), rel=1e-5)) == (size == 16)


def test_the_budget_of_an_evaluation_is_the_mean_over_rows(tmp_path: Path) -> None:
    model = new_model(budget_weight=30.0)
    found = prepare_trainer(trainer(model, tmp_path, per_device_eval_batch_size=5)).evaluate()
    batches = [ROWS[start : start + 5] for start in range(0, 16, 5)]
    budgets = [float(model.eval()(**padded(rows)).budget) * len(rows) for rows in batches]
    assert found["eval_budget"] == pytest.approx(sum(budgets) / 16, rel=1e-5)
    assert sum(budgets) > 0.1


def smoothed(model: TaipanForCausalLM, rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Cross-entropy against smoothed targets, and the budget, as the definitions have them."""
    out = model(**padded(rows))
    labels = padded(rows)["labels"][:, 1:]
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    return loss, out.budget


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_smoothing_shifts_the_labels_and_keeps_the_budget(layout: str, tmp_path: Path) -> None:
    model = new_model(budget_weight=30.0)
    run = prepare_trainer(trainer(model, tmp_path, collate=LAYOUTS[layout], label_smoothing_factor=0.1))
    model.eval()  # without noise; the budget rides on the logits in training mode only
    batch = run.data_collator(ROWS)
    found = run.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, smoothed(model, ROWS)[0])


def test_the_gradient_of_label_smoothing_is_that_of_the_loss_and_the_budget(tmp_path: Path) -> None:
    gradients: list[dict[str, Tensor]] = []
    model = new_model(budget_weight=30.0)
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    for own in (True, False):
        torch.manual_seed(3)
        model.train()
        model.zero_grad()
        loss = sum(smoothed(model, ROWS)) if own else run.compute_loss(model, run.data_collator(ROWS))
        assert isinstance(loss, Tensor)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_label_smoothing_over_labels_that_nothing_predicts_is_refused(tmp_path: Path) -> None:
    run = trainer(new_model(), tmp_path, collate=LAYOUTS["left"], label_smoothing_factor=0.1, max_steps=1)
    with pytest.raises(InputError, match=r"label smoothing.*prepare_trainer\(trainer\)"):
        run.train()


def test_only_a_trainer_of_a_taipan_model_is_prepared(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    run = trainer(LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)), tmp_path)  # pyright: ignore
    with pytest.raises(ConfigError, match="LlamaForCausalLM without a Taipan decoder"):
        prepare_trainer(run)


def test_weight_decay_takes_what_it_takes_in_our_own_training(tmp_path: Path) -> None:
    model = new_model()
    prepared = prepare_trainer(trainer(model, tmp_path, weight_decay=0.1))
    groups = prepared.create_optimizer().param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == decays(name, parameter, decay_embeddings=True), name


class Apart(torch.optim.SGD):
    """Trains other weights than it answers for, as schedule-free optimizers do: larger by one."""

    training = True

    def shift(self, training: bool) -> None:
        if training != self.training:
            self.training = training
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 1.0 if training else -1.0

    def train(self) -> None:
        self.shift(True)

    def eval(self) -> None:
        self.shift(False)


@pytest.mark.parametrize("by", ["steps", "epoch"])
def test_what_is_saved_is_what_is_evaluated(by: str, tmp_path: Path) -> None:
    """The rate is 0: the weights that the optimizer answers for are those of the start, less one."""
    model = new_model()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    when: dict[str, Any] = (
        {"max_steps": 3, "save_steps": 2} if by == "steps" else {"max_steps": -1, "num_train_epochs": 2}
    )
    rows: Any = torch.utils.data.Subset(Counting(), range(16))
    run = trainer(model, tmp_path, dataset=rows, save_strategy=by, **when)
    run.optimizer = Apart(model.parameters(), lr=0.0)
    prepare_trainer(run).train()
    run.save_model(str(tmp_path / "last"))
    for place in ("checkpoint-2", "last"):
        saved = TaipanForCausalLM.from_pretrained(tmp_path / place)
        for name, weight in saved.named_parameters():
            torch.testing.assert_close(weight, start[name] - 1.0, msg=f"{place}: {name}")


def moved(directory: Path, *, prepare: bool, **options: Any) -> tuple[float, float, float]:
    """One step of SGD at a rate of 1: how far gates and all else went, and the norm that is logged."""
    model = new_model(gate_objective="gain", budget_control="threshold")
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = {"max_steps": 1, "logging_steps": 1, "optim": "sgd", "learning_rate": 1.0, **options}
    run = trainer(model, directory, gradient_accumulation_steps=2, **settings)
    (prepare_trainer(run) if prepare else run).train()
    moves = {name: float((weight.detach() - start[name]).norm()) for name, weight in model.named_parameters()}
    parts = [[move for name, move in moves.items() if (".gate." in name) == gates] for gates in (True, False)]
    gates, rest = (math.hypot(*part) for part in parts)
    return gates, rest, run.state.log_history[0]["grad_norm"]


def test_gates_that_forecast_gains_are_clipped_by_themselves(tmp_path: Path) -> None:
    gates, rest, norm = moved(tmp_path, prepare=True, max_grad_norm=1e9)
    assert norm == pytest.approx(math.hypot(gates, rest), rel=1e-4)
    for limit in (min(gates, rest) / 10, math.sqrt(gates * rest)):  # both are above it, or one
        expected = (min(gates, limit), min(rest, limit), norm)
        assert moved(tmp_path, prepare=True, max_grad_norm=limit) == pytest.approx(expected, rel=1e-3)
    together = moved(tmp_path, prepare=False, max_grad_norm=norm / 10)
    assert (math.hypot(*together[:2]), together[2]) == pytest.approx((norm / 10, norm), rel=1e-3)


def test_a_model_that_is_made_when_training_begins_is_prepared_too(tmp_path: Path) -> None:
    """As in a search for hyperparameters, where every trial has a model of its own (`model_init`)."""

    def made() -> TaipanForCausalLM:
        with torch.random.fork_rng(devices=[]):
            return new_model(gate_objective="gain", budget_control="threshold")

    options: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    options |= {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    given, drawn = (prepare_trainer(trainer(model, tmp_path, **options)) for model in (made(), made))
    evaluated: list[dict[str, float]] = []
    for run in (given, drawn):
        run.train()
        evaluated.append(run.evaluate())
    parts = ("eval_loss", "eval_cross_entropy", "eval_budget")
    assert [evaluated[1].get(name) for name in parts] == [evaluated[0][name] for name in parts]
    drawn.train()  # the next trial: another model
    again = drawn.evaluate()
    assert [again.get(name) for name in parts] == [evaluated[0][name] for name in parts]
