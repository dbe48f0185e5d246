"""The run: what it leaves behind, and that interrupting, damaging and resuming it changes nothing."""

import dataclasses
import errno
import itertools
import json
import shutil
import signal
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, DataError, TrainingError
from taipan.io import sha256_file
from taipan.model import TaipanLM, load_tokenizer
from taipan.model import weights as weights_module
from taipan.training.recipe import Recipe
from taipan.training.run.checkpoint import latest
from taipan.training.run.feed import Feed
from taipan.training.run.loop import TrainResult, train
from taipan.training.step.statistics import GateStatistics
from taipan.training.watch.listener import RunInfo, StepInfo, TrainingListener
from taipan.training.watch.metrics import Record, read_records

MakeRecipe = Callable[..., Recipe]
TIMING = ("seconds", "tokens_per_second")


class Watcher(TrainingListener):
    """Keeps what it is told; at a given step it does something to the run."""

    def __init__(self, at: int = -1, action: Callable[[], object] = lambda: None) -> None:
        self.at = at
        self.action = action
        self.info: RunInfo | None = None
        self.steps: list[StepInfo] = []
        self.records: list[Record] = []
        self.paths: list[Path] = []
        self.warnings: list[str] = []
        self.phases: list[str] = []
        self.samples: list[Record] = []

    def started(self, info: RunInfo) -> None:
        self.info = info

    def stepped(self, info: StepInfo) -> None:
        self.steps.append(info)
        if info.step == self.at:
            self.action()

    def recorded(self, record: Record) -> None:
        self.records.append(record)

    def sampled(self, record: Record) -> None:
        self.samples.append(record)

    def saved(self, path: Path) -> None:
        self.paths.append(path)

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def metrics(run: Path) -> list[Record]:
    """What must be equal in two equal runs."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_records(run / "metrics.jsonl")]


def weights(model: TaipanLM) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_equal(one: TrainResult, other: TrainResult) -> None:
    """Bitwise: every parameter, every threshold, every number of every line."""
    assert weights(one.model).keys() == weights(other.model).keys()
    for name, tensor in weights(one.model).items():
        assert torch.equal(tensor, weights(other.model)[name]), name
    assert metrics(one.run) == metrics(other.run)
    assert (one.step, one.tokens, one.calibration) == (other.step, other.tokens, other.calibration)


# ---------------------------------------------------------------------- a whole run


def test_attention_that_gains_nothing_is_told_once_it_should(make_recipe: MakeRecipe) -> None:
    watcher = Watcher()
    train(make_recipe(**{"training.evaluate_every": 1, "model.budget_start": None}), listener=watcher)
    said = [message for message in watcher.warnings if "Attention of the selected tokens lowers the loss by" in message]
    assert len(said) == 1
    late = next(record for record in watcher.records if record["step"] == 5)  # the first in the second half
    assert f"{late['valid_loss_closed']:.3f} without any to {late['valid_loss']:.3f}" in said[0]
    last = Watcher()  # where nothing is evaluated on the way, at the end
    train(make_recipe(**{"training.evaluate_every": None, "output": f"{make_recipe().output}-last"}), listener=last)
    assert f"to {last.records[-1]['valid_loss']:.3f} nats" in last.warnings[-1]


def test_a_run_leaves_a_model_its_recipe_and_its_curve(make_recipe: MakeRecipe) -> None:
    watcher = Watcher()
    result = train(make_recipe(), listener=watcher)
    assert (result.step, result.tokens, result.interrupted) == (8, 8 * 4 * 32, False)
    assert result.model_directory == result.run / "model"
    assert not result.model.training

    loaded = TaipanLM.from_pretrained(result.run / "model")
    assert all(torch.equal(tensor, weights(result.model)[name]) for name, tensor in weights(loaded).items())
    assert load_tokenizer(result.run / "model", loaded.config).vocab_size == 257
    assert loaded.sals[0].gate.threshold.item() == result.calibration[0].threshold != 0.0
    assert result.calibration[0].rate == pytest.approx(0.15, abs=0.01)

    recipe = Recipe.load(result.run / "recipe.yaml")
    assert recipe.model.preset is None
    assert recipe.model.config(257, 256) == loaded.config
    assert recipe.training == make_recipe().training

    assert watcher.records == read_records(result.run / "metrics.jsonl")
    assert [(record["kind"], record["step"]) for record in watcher.records] == [
        ("train", 3),
        ("train", 4),
        ("train", 6),
        ("train", 8),
        ("final", 8),
    ]
    assert ["valid_loss" in record for record in watcher.records] == [False, True, False, False, True]
    assert watcher.records[1]["valid_loss_closed"] != watcher.records[1]["valid_loss"]
    for record in watcher.records[:4]:
        assert record["loss"] == pytest.approx(record["cross_entropy"] + record["budget"])
        assert record["lr"] <= 3e-3
        (gate,) = record["gates"]
        assert list(gate) == [field.name for field in dataclasses.fields(GateStatistics)]
    final = watcher.records[-1]
    # bytes: a token is a byte, but for the ends of documents
    assert final["valid_bits_per_byte"] == pytest.approx(final["valid_loss"] / 0.6931, rel=0.01)
    assert final["valid_gates"][0]["rate"] == pytest.approx(0.15, abs=0.06)

    assert [info.step for info in watcher.steps] == list(range(1, 9))
    assert watcher.steps[-1].progress == 1.0
    assert watcher.steps[-1].seconds_left == 0.0
    assert watcher.paths == [latest(result.run).path, result.run / "model"]
    assert watcher.info is not None
    assert watcher.info.parameters == sum(parameter.numel() for parameter in loaded.parameters())


def test_a_listener_is_told_when_each_part_of_a_step_ends(make_recipe: MakeRecipe) -> None:
    class Parts(TrainingListener):
        def __init__(self) -> None:
            self.told: list[str] = []

        def part(self, name: str) -> None:
            self.told.append(name)

        def stepped(self, info: StepInfo) -> None:
            self.told.append("stepped")

    listener = Parts()
    train(make_recipe(**{"training.steps": 2, "training.accumulation": 2}), listener=listener)
    forwards = ["forward", "backward", "gates"] * 2
    assert listener.told == ["data", *forwards, "clipping", "optimizer", "stepped"] * 2


def test_it_learns(make_recipe: MakeRecipe) -> None:
    changes = {
        "training.steps": 40,
        "training.log_every": 10,
        "training.evaluate_every": None,
        "training.calibrate": False,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 2e-2,
    }
    result = train(make_recipe(**changes))
    curve = [record["cross_entropy"] for record in metrics(result.run) if record["kind"] == "train"]
    # the entropy of single letters is about 2.7
    assert curve[0] > 3.5
    assert curve[-1] < 2.45
    assert metrics(result.run)[-1]["valid_loss"] < 2.5


def test_a_length_in_tokens(make_recipe: MakeRecipe) -> None:
    result = train(make_recipe(**{"training.steps": None, "training.tokens": 3 * 4 * 32}))
    assert (result.step, result.tokens) == (3, 384)


def test_a_length_in_seconds_ends_in_time_whatever_a_step_takes(make_recipe: MakeRecipe) -> None:
    watcher, ticks = Watcher(), itertools.count()
    recipe = make_recipe(**{"training.steps": None, "training.seconds": 24.0, "training.evaluate_every": None})
    result = train(recipe, listener=watcher, clock=lambda: float(next(ticks)))
    assert 22.0 <= result.seconds <= 26.0
    assert watcher.steps[-1].progress > 0.9
    rates = [info.learning_rate_multiplier for info in watcher.steps]
    assert max(rates) > 0.9
    assert rates[-1] < 0.1


def test_a_stable_run_falls_when_it_is_resumed_with_another_length(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Warm-up, stable, decay: from one checkpoint a finished model comes, and the run goes on too."""
    stable = {"schedule.kind": "wsd", "schedule.warmup": 0.0, "schedule.decay": 0.5, "schedule.final": 0.0}
    first, branch, trunk = Watcher(3, interrupt), Watcher(), Watcher()
    result = train(make_recipe(**stable, **{"training.steps": 16}), listener=first)
    shutil.copytree(result.run, tmp_path / "branch")
    short = make_recipe(**stable, **{"training.steps": 6}, output=str(tmp_path / "branch"))
    train(short, resume=tmp_path / "branch", listener=branch)
    train(None, resume=result.run, listener=trunk)
    rates = [[info.learning_rate_multiplier for info in watcher.steps] for watcher in (first, branch, trunk)]
    assert rates[0] == [1.0] * 3
    assert rates[1] == pytest.approx([5 / 6, 3 / 6, 1 / 6])  # a step counts in its middle
    assert rates[2] == pytest.approx([1.0] * 5 + [number / 16 for number in range(15, 0, -2)])


def test_time_adds_up_over_resumes(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"training.steps": None, "training.seconds": 24.0, "training.evaluate_every": None})
    ticks = itertools.count()
    first = train(recipe, listener=Watcher(5, interrupt), clock=lambda: float(next(ticks)))
    assert first.interrupted
    later = itertools.count(10_000)
    watcher = Watcher()
    second = train(None, resume=first.run, listener=watcher, clock=lambda: float(next(later)))
    assert not second.interrupted
    assert first.seconds < watcher.steps[0].seconds < first.seconds + 5
    assert 22.0 <= second.seconds <= 26.0


def test_evaluating_without_held_out_data_is_told(make_recipe: MakeRecipe) -> None:
    watcher = Watcher()
    train(make_recipe(**{"training.steps": 1, "training.evaluate_every": 7, "data.valid": None}), listener=watcher)
    (told,) = watcher.warnings
    assert told.startswith("training.evaluate_every is 7, but the recipe has no data.valid: nothing will be evaluated.")


def test_logging_and_evaluating_do_not_change_the_weights(make_recipe: MakeRecipe, whole: TrainResult) -> None:
    changes = {"training.log_every": 100, "training.evaluate_every": None, "data.valid": None}
    quiet = train(make_recipe(**changes))
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, weights(quiet.model)[name]), name
    assert len(metrics(quiet.run)) == 2


def test_randomness_comes_from_the_recipe_alone_and_the_callers_is_left(
    whole: TrainResult, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = train(make_recipe())
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(whole, again)
    other = train(make_recipe(**{"training.seed": 1}, output=str(tmp_path / "other")))
    assert metrics(other.run) != metrics(whole.run)


def test_packing_decides_whether_documents_see_each_other(make_recipe: MakeRecipe, whole: TrainResult) -> None:
    joined = train(make_recipe(**{"data.packing": "concatenate"}))
    assert metrics(whole.run)[0]["cross_entropy"] != metrics(joined.run)[0]["cross_entropy"]


# ---------------------------------------------------------------------- interrupting and resuming


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_an_interrupted_run_resumes_to_the_same_curve_bit_by_bit(
    at: int, make_recipe: MakeRecipe, whole: TrainResult
) -> None:
    cut = train(make_recipe(), listener=Watcher(at, interrupt))
    assert (cut.interrupted, cut.step, cut.model_directory) == (True, at, None)
    assert f"taipan train --resume {cut.run}" in cut.message
    assert_equal(whole, train(None, resume=cut.run))


def test_so_does_one_with_muon_and_accumulation(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes = {
        "optimizer.name": "muon",
        "training.accumulation": 2,
        "training.batch_size": 2,
        "training.steps": 4,
    }
    whole = train(make_recipe(**changes, output=str(tmp_path / "whole")))
    cut = train(make_recipe(**changes), listener=Watcher(2, interrupt))
    assert_equal(whole, train(None, resume=cut.run))


@pytest.mark.parametrize("measure", ["open_closed", "flipped"])
def test_so_does_one_whose_gates_forecast_gains(measure: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes = {
        "model.gate_objective": "gain",
        "model.budget_control": "threshold",
        "model.budget_anneal": [0.0, 0.25],
        "model.gain_measure": measure,
        "training.steps": 5,
        "training.accumulation": 2,
        "training.batch_size": 2,
    }
    whole = train(make_recipe(**changes, output=str(tmp_path / "whole")))
    cut = train(make_recipe(**changes), listener=Watcher(3, interrupt))
    assert_equal(whole, train(None, resume=cut.run))


def test_interrupted_at_every_step(make_recipe: MakeRecipe, whole: TrainResult) -> None:
    result = train(make_recipe(), listener=Watcher(1, interrupt))
    while result.interrupted:
        result = train(None, resume=result.run, listener=Watcher(result.step + 1, interrupt))
    assert_equal(whole, result)


def test_every_batch_is_read_once_and_in_order_over_interruptions(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    batch = Feed.batch
    monkeypatch.setattr(Feed, "batch", lambda self, number: read.append(number) or batch(self, number))
    changes = {"training.steps": 4, "training.accumulation": 3, "training.calibrate": False, "data.valid": None}
    cut = train(make_recipe(**changes), listener=Watcher(2, interrupt))
    train(None, resume=cut.run)
    assert read == list(range(4 * 3))


WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", WISHES[1:], ids=lambda number: number.name)
def test_other_signals_are_a_wish_to_stop_too_and_the_handlers_are_put_back(
    number: signal.Signals, make_recipe: MakeRecipe
) -> None:
    handlers = [signal.getsignal(other) for other in WISHES]
    result = train(make_recipe(), listener=Watcher(2, lambda: signal.raise_signal(number)))
    assert result.interrupted
    assert f"{number.name} after step 2" in result.message
    assert latest(result.run).step == 2
    assert [signal.getsignal(other) for other in WISHES] == handlers


@pytest.mark.parametrize("number", WISHES, ids=lambda number: number.name)
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals, make_recipe: MakeRecipe) -> None:
    """As `nohup` and shells in the background want it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        recipe = make_recipe(**{"training.steps": 2, "training.calibrate": False})
        result = train(recipe, listener=Watcher(1, lambda: signal.raise_signal(number)))
    finally:
        signal.signal(number, before)
    assert not result.interrupted


def test_a_second_interrupt_stops_at_once_and_loses_only_what_came_after_the_last_checkpoint(
    make_recipe: MakeRecipe, whole: TrainResult
) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    recipe = make_recipe(**{"training.checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, listener=Watcher(7, twice))
    run = Path(recipe.output)
    shutil.rmtree(latest(run).path)  # of step 6, to have more to forget
    assert latest(run).step == 4
    assert metrics(run)[-1]["step"] == 6
    assert_equal(whole, train(None, resume=run))


def test_a_finished_run_can_be_finished_again(make_recipe: MakeRecipe) -> None:
    """As after a crash between the last checkpoint and the model."""
    first = train(make_recipe())
    before = metrics(first.run)
    shutil.rmtree(first.run / "model")
    again = train(None, resume=first.run)
    assert metrics(first.run) == before
    assert_equal(first, again)
    assert (first.run / "model").is_dir()


def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_curve(
    make_recipe: MakeRecipe, whole: TrainResult
) -> None:
    cut = train(make_recipe(**{"training.checkpoint_every": 2}), listener=Watcher(5, interrupt))
    file = latest(cut.run).path / "trainer.json"
    file.write_bytes(file.read_bytes()[:-10])
    watcher = Watcher()
    assert_equal(whole, train(None, resume=cut.run, listener=watcher))
    (warning,) = (text for text in watcher.warnings if "gate" not in text)
    assert "step-00000005/trainer.json is corrupt" in warning
    assert "step-00000004" in warning
    assert watcher.steps[0].step == 5


def test_a_run_may_go_on_with_another_length_or_learning_rate(make_recipe: MakeRecipe) -> None:
    first = train(make_recipe(**{"training.steps": 4}))
    longer = make_recipe(**{"training.steps": 6, "optimizer.learning_rate": 1e-4})
    watcher = Watcher()
    second = train(longer, resume=first.run, listener=watcher)
    assert (second.step, len(watcher.steps)) == (6, 2)
    assert watcher.records[0]["lr"] <= 1e-4
    assert Recipe.load(first.run / "recipe.yaml").training.steps == 6


@pytest.mark.parametrize(
    ("change", "value", "parts"),
    [
        ("model.state_size", 16, ["model.state_size was 8 and is now 16"]),
        ("data.context_length", 16, ["data.context_length was 32 and is now 16"]),
        ("data.packing", "concatenate", ["data.packing was 'documents' and is now 'concatenate'"]),
        ("optimizer.name", "muon", ["optimizer.name was 'adamw' and is now 'muon'"]),
        ("training.batch_size", 2, ["training.batch_size was 4 and is now 2"]),
        ("training.seed", 5, ["training.seed was 0 and is now 5"]),
    ],
)
def test_resuming_another_recipe_is_refused_by_name(
    change: str, value: Any, parts: list[str], make_recipe: MakeRecipe
) -> None:
    run = train(make_recipe(**{"training.steps": 1, "training.calibrate": False})).run
    with pytest.raises(ConfigError) as caught:
        train(make_recipe(**{change: value}), resume=run)
    for part in [*parts, "own recipe"]:
        assert part in str(caught.value)


def test_a_run_from_before_a_field_was_there_goes_on_with_its_default(
    make_recipe: MakeRecipe, whole: TrainResult, tmp_path: Path
) -> None:
    """The older checkpoint is made by hand: its identity and its recipe do not know the newest fields of the model."""
    cut = train(make_recipe(), listener=Watcher(4, interrupt))
    later = ("window_eviction", "window_recent", "gain_measure", "gain_flips", "time_step_limit")
    (checkpoint,) = (cut.run / "checkpoints").iterdir()
    forget_fields(checkpoint, later)
    recipe = (cut.run / "recipe.yaml").read_text().splitlines(keepends=True)
    assert any("gain_measure" in line for line in recipe)
    (cut.run / "recipe.yaml").write_text("".join(line for line in recipe if not line.lstrip().startswith(later[:-1])))
    with pytest.raises(ConfigError, match="model.gain_measure was 'open_closed' and is now 'flipped'"):
        train(make_recipe(**{"model.gain_measure": "flipped"}), resume=cut.run)
    assert_equal(whole, train(None, resume=cut.run))


def forget_fields(checkpoint: Path, fields: tuple[str, ...]) -> None:
    """Take fields of the model out of what a checkpoint says it is of; its manifest is made to fit."""
    trainer, manifest = checkpoint / "trainer.json", checkpoint / "manifest.json"
    values = json.loads(trainer.read_text())
    for field in fields:
        del values["identity"]["model"][field]
    trainer.write_text(json.dumps(values))
    content = json.loads(manifest.read_text())
    content["files"]["trainer.json"] = sha256_file(trainer)
    del content["sha256"]
    content["sha256"] = sha256(json.dumps(content).encode()).hexdigest()
    manifest.write_text(json.dumps(content, indent=2) + "\n")


def test_resuming_on_other_data_is_refused_by_name(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = train(make_recipe(**{"training.steps": 1, "training.calibrate": False})).run
    prepare([Document("other", "something else " * 100)], Tokenizer.bytes(), tmp_path / "other")
    with pytest.raises(ConfigError, match="the tokens of the training data have changed"):
        train(make_recipe(**{"data.train": str(tmp_path / "other")}), resume=run)


def test_data_may_move(make_recipe: MakeRecipe, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    cut = train(make_recipe(), listener=Watcher(4, interrupt))
    shutil.copytree(corpora[0], tmp_path / "moved")
    result = train(make_recipe(**{"data.train": str(tmp_path / "moved")}), resume=cut.run)
    assert not result.interrupted


# ---------------------------------------------------------------------- what goes wrong


def test_a_run_is_not_overwritten(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"training.steps": 1, "training.calibrate": False})
    run = train(recipe).run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        train(recipe)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("made", ["file", "file/run", "data", "model"])
def test_an_output_that_is_something_else_is_refused(
    made: str, make_recipe: MakeRecipe, whole: TrainResult, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    output = {"data": corpora[0], "model": whole.run / "model"}.get(made, tmp_path / made)
    before = sorted(tmp_path.rglob("*")), sorted(corpora[0].iterdir())
    with pytest.raises((ConfigError, CheckpointError), match=made.split("/")[0]):
        train(make_recipe(output=str(output)))
    assert (sorted(tmp_path.rglob("*")), sorted(corpora[0].iterdir())) == before


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(make_recipe: MakeRecipe) -> None:
    changes = {"optimizer.learning_rate": 1e30, "optimizer.clip": None, "training.checkpoint_every": 1}
    recipe = make_recipe(**changes, **{"schedule.kind": "constant", "schedule.warmup": 0.0})
    watcher = Watcher()
    with pytest.raises(TrainingError, match=r"stopped at step \d+.*finite.*last good checkpoint is") as caught:
        train(recipe, listener=watcher)
    found = latest(Path(recipe.output))
    assert found.step == watcher.steps[-1].step >= 1
    assert f"step {found.step + 1}" in str(caught.value)
    assert str(found.path) in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in weights(TaipanLM.from_pretrained(found.path)).values())
    assert not (Path(recipe.output) / "model").exists()


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_resumes_from_it(
    make_recipe: MakeRecipe, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = make_recipe(**{"training.checkpoint_every": 2})
    with monkeypatch.context() as patch:
        watcher = Watcher(3, lambda: patch.setattr(weights_module, "save_file", full))
        with pytest.raises(CheckpointError, match=r"disk is full.*step-00000004"):
            train(recipe, listener=watcher)
    assert latest(Path(recipe.output)).step == 2
    assert_equal(whole, train(None, resume=recipe.output))


def test_data_that_do_not_fit_are_refused_before_anything_is_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prepare([Document("short", "too short")], Tokenizer.bytes(), tmp_path / "short")
    with pytest.raises(DataError, match="10 tokens, and one context is 32"):
        train(make_recipe(**{"data.train": str(tmp_path / "short")}))
    other = Tokenizer.train_bpe(["some words to learn from, some words"] * 5, 260)
    prepare([Document("other", "some words " * 100)], other, tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        train(make_recipe(**{"data.valid": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 100.*257"):
        train(make_recipe(**{"model.vocab_size": 100}))
    assert not (tmp_path / "run").exists()


def test_there_must_be_something_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Neither a recipe nor a run"):
        train(None)
    with pytest.raises(ConfigError, match=r"There is no recipe .*recipe\.yaml"):
        train(None, resume=tmp_path)


def test_it_runs_outside_the_main_thread(make_recipe: MakeRecipe) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(train(make_recipe(**{"training.steps": 1}))))
    thread.start()
    thread.join()
    assert results[0].step == 1


@pytest.mark.parametrize(
    ("sign", "changes"),
    [
        ("selects almost nothing", {"model.gate_bias_init": -9.0, "model.budget_weight": 0.0}),
        ("selects almost everything", {"model.gate_bias_init": 9.0, "model.budget_weight": 0.0}),
        ("without noise, as at inference", {"model.gate_bias_init": -2.0, "model.gumbel_noise_end": 1.0}),
        ("mixing weight α", {"model.gate_bias_init": 9.0, "model.budget_weight": 0.0}),
    ],
)
def test_a_failing_gate_is_reported_once(sign: str, changes: dict[str, Any], make_recipe: MakeRecipe) -> None:
    watcher = Watcher()
    train(make_recipe(**changes, **{"model.budget_start": None, "optimizer.learning_rate": 1e-5}), listener=watcher)
    assert sum(sign in warning for warning in watcher.warnings) == 1


def test_without_a_listener_warnings_are_logged(make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"model.gate_bias_init": -9.0, "model.budget_weight": 0.0, "model.budget_start": None}
    train(make_recipe(**changes))
    assert "selects almost nothing" in caplog.text


def test_metrics_are_one_json_object_a_line(make_recipe: MakeRecipe) -> None:
    run = train(make_recipe(**{"training.steps": 2, "training.log_every": 1})).run
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]
