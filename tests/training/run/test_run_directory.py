"""What a run leaves behind besides its model: samples, its record, a model card; what it can carry and recompute."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, TrainingError
from taipan.model import TaipanLM
from taipan.training.recipe import Recipe
from taipan.training.run.checkpoint import checkpoints
from taipan.training.run.loop import TrainResult, train
from taipan.training.run.model_card import FILE as MODEL_CARD
from taipan.training.watch.listener import RunInfo
from taipan.training.watch.metrics import read_records
from taipan.training.watch.record import RunRecord, read_run_record
from taipan.training.watch.samples import sample_text
from tests.training.run.test_loop import Watcher, assert_equal, interrupt, metrics, weights

MakeRecipe = Callable[..., Recipe]
SAMPLING = {"training.sample_every": 3, "training.sample_prompt": "taipan ", "training.sample_tokens": 9}


def record_of(run: Path) -> dict[str, Any]:
    record = read_run_record(run)
    assert record is not None
    return record


# ---------------------------------------------------------------------- samples


def test_samples_are_those_of_the_model_however_its_activations_are_kept(make_recipe: MakeRecipe) -> None:
    written: list[str] = []
    for recompute in (False, True, "selective"):
        changes = {**SAMPLING, "training.steps": 3, "training.evaluate_every": None, "training.recompute": recompute}
        watcher = Watcher()
        result = train(make_recipe(output=f"{make_recipe().output}-{recompute}", **changes), listener=watcher)
        assert not [message for message in watcher.warnings if "sample" in message]
        written.append((result.run / "samples.jsonl").read_text())
        assert result.model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)
    assert written[0] == written[1] == written[2] != ""


def test_samples_are_written_shown_and_change_nothing(make_recipe: MakeRecipe, whole: TrainResult) -> None:
    watcher = Watcher()
    result = train(make_recipe(**SAMPLING), listener=watcher)
    assert_equal(whole, result)
    samples = read_records(result.run / "samples.jsonl")
    assert [(sample["kind"], sample["step"], sample["prompt"]) for sample in samples] == [
        ("sample", 3, "taipan "),
        ("sample", 6, "taipan "),
    ]
    assert all(0 <= len(sample["text"]) <= 9 for sample in samples)
    assert watcher.samples == samples


def test_a_resumed_run_writes_the_same_samples(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = train(make_recipe(**SAMPLING, output=str(tmp_path / "whole")))
    recipe = make_recipe(**SAMPLING, **{"training.checkpoint_every": 4})
    with pytest.raises(ZeroDivisionError):
        train(
            recipe, listener=Watcher(7, lambda: 1 / 0)
        )  # after the sample of step 6, back to the checkpoint of step 4
    assert len(read_records(Path(recipe.output) / "samples.jsonl")) == 2
    resumed = train(None, resume=recipe.output)
    assert read_records(resumed.run / "samples.jsonl") == read_records(whole.run / "samples.jsonl")


def test_every_sample_is_written_by_the_weights_of_its_step(make_recipe: MakeRecipe) -> None:
    """A fused optimizer leaves no trace of its steps but the values of the weights."""
    changes = {"training.sample_every": 2, "training.checkpoint_every": 2, "training.sample_tokens": 60}
    recipe = make_recipe(**changes, **{"optimizer.learning_rate": 0.03})
    result = train(recipe)
    samples = {sample["step"]: sample["text"] for sample in read_records(result.run / "samples.jsonl")}
    compared = 0
    for step, path in checkpoints(result.run):
        model = TaipanLM.from_pretrained(path)
        alone = sample_text(model, Tokenizer.load(path), recipe.training.sample_prompt, 60, seed=step)
        assert samples[step] == alone, step
        compared += step > 2
    assert compared


def test_a_padded_vocabulary_is_trained_and_never_drawn_from(make_recipe: MakeRecipe) -> None:
    """257 ids of bytes in 320 rows: a new model would draw each fifth token from those that are none."""
    changes = {"training.sample_every": 2, "training.sample_tokens": 60, "training.steps": 4, "model.vocab_size": 320}
    watcher = Watcher()
    result = train(make_recipe(**changes), listener=watcher)
    assert result.model.config.vocab_size == 320
    assert [sample["step"] for sample in read_records(result.run / "samples.jsonl")] == [2, 4]
    assert not any("sample" in warning for warning in watcher.warnings)


def test_a_sample_that_fails_ends_no_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, whole: TrainResult
) -> None:
    def fails(*_: Any, **options: Any) -> str:
        if options["seed"] == 3:
            raise RuntimeError("no memory for a sample")
        return "text"

    monkeypatch.setattr("taipan.training.run.loop.sample_text", fails)
    watcher = Watcher()
    result = train(make_recipe(**SAMPLING), listener=watcher)
    assert_equal(whole, result)
    assert "No sample after step 3: no memory for a sample" in watcher.warnings
    assert [sample["step"] for sample in read_records(result.run / "samples.jsonl")] == [6]


def test_a_start_removes_what_killed_writers_left_in_the_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"training.steps": 2, "training.checkpoint_every": 1})
    run = Path(recipe.output)
    left = [".recipe.yaml", ".run.json", "model/.README.md", ".model", "checkpoints/.step-00000001"]

    def leave() -> None:
        for name in left:
            path = run / f"{name}.0123456789ab.tmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name in left[3:] else path.write_bytes(b"half")

    train(recipe)
    leave()
    (run / ".mine").write_bytes(b"mine")
    train(None, resume=run)
    assert list(run.rglob(".*")) == [run / ".mine"]


def test_an_empty_prompt_begins_a_document(make_recipe: MakeRecipe) -> None:
    changes = {**SAMPLING, "training.sample_prompt": "", "training.steps": 3}
    assert len(read_records(train(make_recipe(**changes)).run / "samples.jsonl")) == 1


# ---------------------------------------------------------------------- record and card


def test_the_record_tells_where_a_run_comes_from_and_how_it_ended(make_recipe: MakeRecipe, whole: TrainResult) -> None:
    cut = train(make_recipe(), listener=Watcher(2, interrupt))
    record = record_of(cut.run)
    assert (record["status"], record["message"]) == ("interrupted", cut.message)
    resumed = train(None, resume=cut.run)
    record = record_of(cut.run)
    assert (record["status"], record["message"]) == ("finished", resumed.message)
    assert [(session["step"], session["last_step"]) for session in record["sessions"]] == [(0, 2), (2, 8)]
    assert record["model"]["parameters"] == sum(parameter.numel() for parameter in resumed.model.parameters())
    assert record["data"]["fingerprint"] == record_of(whole.run)["data"]["fingerprint"]
    assert record["sessions"][0]["implementations"] == resumed.model.implementations


def test_a_run_that_fails_says_so(make_recipe: MakeRecipe) -> None:
    changes = {"optimizer.learning_rate": 1e30, "optimizer.clip": None}
    recipe = make_recipe(**changes, **{"schedule.kind": "constant", "schedule.warmup": 0.0})
    with pytest.raises(TrainingError):
        train(recipe)
    record = record_of(Path(recipe.output))
    assert record["status"] == "failed"
    assert "finite" in record["message"]


class Failing(Watcher):
    """Fails when it is told that the run begins."""

    def started(self, info: RunInfo) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("watcher", [Failing(), Watcher(5, lambda: 1 / 0)], ids=["started", "stepped"])
def test_whatever_fails_in_a_session_ends_it_on_record(
    watcher: Watcher, resumed: bool, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(**{"training.trackers": ["tensorboard"]})
    if resumed:
        train(recipe, listener=Watcher(2, interrupt))
    with pytest.raises(ZeroDivisionError):
        train(recipe, resume=recipe.output if resumed else None, listener=watcher)
    record = record_of(Path(recipe.output))
    assert record["status"] == "failed"
    assert "ZeroDivisionError" in record["message"]
    assert "ended" in record["sessions"][-1]


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = make_recipe(**{"training.trackers": ["wandb"]})
    with pytest.raises(ConfigError, match="wandb"):
        train(recipe)
    assert not Path(recipe.output).exists()


def test_a_copied_run_goes_on_under_an_id_of_its_own_and_a_moved_one_under_the_old(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    cut = train(make_recipe(), listener=Watcher(2, interrupt))
    first, copy, moved = record_of(cut.run)["id"], tmp_path / "copy", tmp_path / "moved"
    shutil.copytree(cut.run, copy)
    watcher = Watcher(3, interrupt)
    train(None, resume=copy, listener=watcher)
    record = record_of(copy)
    assert record["id"] != first == record["copy_of"]
    assert any(f"is a copy of the run in {cut.run}" in text for text in watcher.warnings)
    cut.run.rename(moved)
    again = Watcher()
    train(None, resume=moved, listener=again)
    assert record_of(moved)["id"] == first
    train(None, resume=copy, listener=again)
    assert record_of(copy)["id"] == record["id"]
    assert not any("copy" in text for text in again.warnings)


def test_what_went_wrong_is_told_even_if_it_cannot_be_noted(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("the disk is full")

    with pytest.raises(ZeroDivisionError):
        train(make_recipe(), listener=Watcher(1, lambda: monkeypatch.setattr(RunRecord, "end", full) or 1 / 0))


def test_the_model_card_has_the_facts_and_metadata(whole: TrainResult) -> None:
    assert whole.model_directory is not None
    card = (whole.model_directory / MODEL_CARD).read_text()
    _, head, body = card.split("---\n", 2)
    values = yaml.safe_load(head)
    final = metrics(whole.run)[-1]
    assert values["library_name"] == "taipan"
    (metric,) = values["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "bits_per_byte", "value": round(final["valid_bits_per_byte"], 4)}
    record = record_of(whole.run)
    threshold = whole.calibration[0].threshold
    assert "trust_remote_code=True" in body
    for fact in (record["id"], record["data"]["fingerprint"], "1 mamba2, 1 selective_attention", f"{threshold:.4f}"):
        assert fact in body
    assert f"{sum(parameter.numel() for parameter in whole.model.parameters()):,}" in body
    assert "stay under the licences of those texts" in body
    assert Path(whole.run).is_absolute()
    assert not re.findall(r"(?<![\w:/.])/[\w.-]+/", card), "a path of this machine"


def test_a_card_without_evaluation_calibration_or_gates(make_recipe: MakeRecipe) -> None:
    changes = {"data.valid": None, "training.steps": 1, "model.layer_types": ["mamba2"]}
    result = train(make_recipe(**changes))
    assert result.model_directory is not None
    card = (result.model_directory / MODEL_CARD).read_text()
    assert "model-index" not in card
    assert "threshold" not in card


# ---------------------------------------------------------------------- what a session can be told


def test_trackers_get_what_metrics_get(make_recipe: MakeRecipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(make_recipe(**{"training.trackers": ["tensorboard"]})).run
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    expected = [(record["step"], record["loss"]) for record in metrics(run) if record["kind"] == "train"]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def test_recomputing_changes_no_bit(make_recipe: MakeRecipe, whole: TrainResult) -> None:
    assert_equal(whole, train(make_recipe(**{"training.recompute": True})))


def test_an_implementation_can_be_chosen_and_is_kept_when_resuming(make_recipe: MakeRecipe) -> None:
    cut = train(make_recipe(**{"training.implementation": "reference"}), listener=Watcher(1, interrupt))
    resumed = train(None, resume=cut.run, listener=Watcher(2, interrupt))
    for result in (cut, resumed):
        assert set(result.model.implementations.values()) == {"reference"}
    with pytest.raises(ConfigError, match="implementation is 'fast'"):
        train(make_recipe(**{"training.implementation": "fast"}), resume=cut.run)


def test_training_goes_on_from_a_model_directory(make_recipe: MakeRecipe, whole: TrainResult, tmp_path: Path) -> None:
    changes = {"model": {"from": str(whole.run / "model")}, "optimizer.learning_rate": 1e-12, "training.steps": 1}
    result = train(make_recipe(**changes))
    assert record_of(result.run)["model"]["from"] == str(whole.run / "model")
    for name, tensor in weights(result.model).items():
        if "threshold" not in name:
            torch.testing.assert_close(tensor, weights(whole.model)[name])
    assert Recipe.load(result.run / "recipe.yaml").model.start == str(whole.run / "model")


# ---------------------------------------------------------------------- state passing

PASSING = {
    "training.state_passing": 3,
    "training.accumulation": 2,
    "training.batch_size": 2,
    "training.calibrate": False,
    "data.context_length": 16,
}


def test_with_state_passing_a_step_starts_where_the_one_before_ended(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes = {**PASSING, "training.steps": 3, "training.log_every": 1, "optimizer.learning_rate": 1e-12}
    changes |= {"model.budget_weight": 0.0, "model.gumbel_noise": 0.0, "training.evaluate_every": None}
    pieces = metrics(train(make_recipe(**changes)).run)[:3]
    long = {**changes, "training.state_passing": None, "data.context_length": 48, "training.steps": 1}
    (whole, _) = metrics(train(make_recipe(**long, output=str(tmp_path / "long"))).run)
    apart = {**changes, "training.state_passing": None, "training.steps": 1}
    assert metrics(train(make_recipe(**apart, output=str(tmp_path / "apart"))).run)[0] != pieces[0]
    # the pieces predict what the long windows do, but for the tokens at which they meet
    mean = sum(piece["cross_entropy"] for piece in pieces) / 3
    assert mean == pytest.approx(whole["cross_entropy"], rel=0.01)


@pytest.mark.parametrize("layers", [["mamba2", "selective_attention"], ["full_attention", "mamba2"]])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_run_that_passes_states_resumes_bit_by_bit(
    at: int, layers: list[str], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    changes = {**PASSING, "training.steps": 5, "model.layer_types": layers, "training.recompute": True}
    whole = train(make_recipe(**changes, output=str(tmp_path / "whole")))
    cut = train(make_recipe(**changes), listener=Watcher(at, interrupt))
    (checkpoint,) = (cut.run / "checkpoints").iterdir()
    assert (checkpoint / "carried.safetensors").exists() == (at == 1)  # after three pieces rows begin anew
    assert_equal(whole, train(None, resume=cut.run))


def test_a_run_cannot_be_resumed_with_another_number_of_pieces(make_recipe: MakeRecipe) -> None:
    cut = train(make_recipe(**PASSING), listener=Watcher(1, interrupt))
    with pytest.raises(ConfigError, match="training.state_passing was 3 and is now None"):
        train(make_recipe(**{**PASSING, "training.state_passing": None}), resume=cut.run)


def test_the_finished_model_loads_beside_its_card(whole: TrainResult) -> None:
    assert whole.model_directory is not None
    assert TaipanLM.from_pretrained(whole.model_directory).config == whole.model.config
