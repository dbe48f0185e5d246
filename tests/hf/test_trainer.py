"""transformers' Trainer on Taipan."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from taipan import TaipanLM
from taipan.hf import GateScheduleCallback
from tests.hf.models import pair
from tests.hf.trainers import Counting, new_model, padded, trainer
from tests.models import VOCAB, random_tokens

ROOT = Path(__file__).parents[2]


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


def test_a_threshold_is_moved_by_what_all_calls_of_a_step_selected() -> None:
    """As `taipan train` moves it: by the rate and the spread over the tokens of the whole step."""
    _, face = pair(budget_control="threshold", threshold_step=0.5, attention_capacity=0.3)
    face.train()
    callback, tokens = GateScheduleCallback(), random_tokens(6, 17)
    mask = torch.ones_like(tokens)
    mask[4, 9:] = 0
    arguments: Any = (None, TrainerState(max_steps=10, global_step=9), None)
    callback.on_train_begin(*arguments, model=face)
    callback.on_step_begin(*arguments, model=face)
    torch.manual_seed(1)
    parts = [face(tokens[i : i + 3], attention_mask=mask[i : i + 3], labels=tokens[i : i + 3]).gates for i in (0, 3)]
    callback.on_step_end(*arguments, model=face)
    thresholds = [float(layer.mixer.gate.threshold) for layer in face.model.layers if hasattr(layer.mixer, "gate")]
    for found, outputs in zip(thresholds, zip(*parts, strict=True), strict=True):
        real = [torch.ones_like(out.selected_BT) if out.real_BT is None else out.real_BT for out in outputs]
        selected = torch.cat([out.selected_BT[r] for out, r in zip(outputs, real, strict=True)]).double()
        margin = torch.cat([out.margin_BT[r] for out, r in zip(outputs, real, strict=True)]).double()
        capacity = face.model.config.capacity_at(0.9)
        expected = 0.5 * float(margin.std(unbiased=False)) * (float(selected.mean()) - capacity)
        assert found == pytest.approx(expected, rel=1e-4)
        assert expected != 0
    callback.on_train_end(*arguments, model=face)
    assert face.model.watch is None


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["straight_through", "gain"])
def test_a_threshold_holds_the_budget_in_a_trainer(objective: str, tmp_path: Path) -> None:
    rates: list[float] = []
    for callbacks in ([GateScheduleCallback()], []):
        model = new_model(
            budget_control="threshold",
            gate_objective=objective,
            attention_capacity=0.2,
            threshold_step=0.5,
            gate_bias_init=1.0,
            gumbel_noise=0.0,
            budget_anneal=(0.0, 0.1),
        )
        run = trainer(model, tmp_path, *callbacks, max_steps=25, learning_rate=1e-3)
        run.train()
        with torch.no_grad():
            rates.append(float(model.eval()(**padded([Counting()[i] for i in range(32)])).gates[0].noise_free_rate))
    assert abs(rates[0] - 0.2) < 0.1 < abs(rates[1] - 0.2)


def test_fine_tuning_leaves_a_threshold_where_it_is(tmp_path: Path) -> None:
    model = new_model(budget_control="threshold")
    trainer(model, tmp_path, max_steps=2).train()
    assert float(model.model.layers[1].mixer.gate.threshold) == 0.0


PROCESSES = """
import sys

import torch

from taipan.hf import prepare_trainer
from tests.hf.trainers import new_model, trainer

model = new_model(budget_weight=0.0)
options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 3}
run = trainer(model, sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), **options)
prepare_trainer(run).train()
if run.is_world_process_zero():
    torch.save((run.args.world_size, model.state_dict()), sys.argv[1] + "/weights.pt")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_on_a_cpu_is_one_run_of_all_its_processes(tmp_path: Path) -> None:
    """With `use_cpu=True`, as docs/fine_tuning.md says: two processes train as one does on rows twice as many."""
    (tmp_path / "script.py").write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found: list[tuple[int, dict[str, torch.Tensor]]] = []
    for processes, rows in ((1, 8), (2, 4)):
        out = tmp_path / str(processes)
        out.mkdir()
        command = [*launch, str(processes), str(tmp_path / "script.py"), str(out), str(rows)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out / "weights.pt"))
    assert [world for world, _ in found] == [1, 2]
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
