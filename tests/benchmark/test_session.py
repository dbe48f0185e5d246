"""Every suite on a model so small that only what is reported matters."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.accounting import parameter_count
from taipan.benchmark import SUITES, Measurement, Session, Settings, run
from taipan.benchmark import session as module
from taipan.benchmark.bandwidth import StreamingRead
from taipan.benchmark.gpt import CompiledGPT
from taipan.benchmark.job import main as job
from taipan.benchmark.models import configuration
from taipan.benchmark.suites import evaluate, loop, memory
from taipan.errors import ConfigError
from taipan.model import IMPLEMENTATIONS
from tests.models import small_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("small")
    small_model(dtype=torch.float32).save_pretrained(path)
    return str(path)


def measured(directory: str, suites: Sequence[str], **settings: Any) -> Session:
    values = {"dtype": "float32", "tokens": (8,), "context": (4,), "new_tokens": 2, "repeats": 2, **settings}
    return run(suites, Settings(model=directory, **values))


@pytest.fixture(scope="module")
def report(directory: str) -> Session:
    settings: dict[str, Any] = {"tokens": (8, 20), "context": (4, 6), "floor": True, "against": "transformers"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taipan.benchmark.suites.decode.StreamingRead", partial(StreamingRead, 2**18))
        return measured(directory, ["prefill", "train", "decode"], **settings)


def test_the_file_holds_everything(report: Session) -> None:
    record = json.loads(json.dumps(report.to_dict("taipan bench")))
    assert record["format"] == "taipan-bench-1"
    assert record["command"] == "taipan bench"
    assert {"taipan", "started", "load", "threads", "dtype", "machine", "settings", "model"} <= set(record)
    assert set(record["implementations"]) == {*IMPLEMENTATIONS, "rms_norm", "linear_cross_entropy"}
    assert set(record["implementations"].values()) <= {"native", "portable"}
    for measurement in record["measurements"]:
        assert set(measurement) == {
            *("suite", "work", "subject", "unit", "values", "median", "lower", "upper"),
            *("tokens", "tokens_per_second", "comparisons", "details"),
        }
        assert len(measurement["values"]) == 2
        assert measurement["lower"] <= measurement["median"] <= measurement["upper"]
        for comparison in measurement["comparisons"]:
            assert len(comparison["ratios"]) == 2
            assert comparison["quantity"] in {"time", "speed", "memory"}


@pytest.mark.parametrize(("suite", "floor"), [("prefill", "linear floor"), ("train", "linear floor")])
def test_ours_is_compared_with_floor_and_peers_of_the_same_run(report: Session, suite: str, floor: str) -> None:
    rows = {(row.subject, row.tokens): row for row in report.measurements if row.suite == suite}
    peers = ("transformers Mamba-2", "transformers Llama")
    assert set(rows) == {(subject, tokens) for subject in ("taipan", floor, *peers) for tokens in (8, 20)}
    ours = rows["taipan", 8]
    assert [comparison.other for comparison in ours.comparisons] == [floor, *peers]
    for comparison in ours.comparisons:
        other = rows[comparison.other, 8].values
        pairs = zip(ours.values, other, strict=True)
        expected = [one / two if comparison.quantity == "time" else two / one for one, two in pairs]
        assert comparison.ratios == pytest.approx(tuple(expected))
    (over_shortest,) = [c for c in rows["taipan", 20].comparisons if c.other.startswith("a token")] or [None]
    assert (over_shortest is not None) == (suite == "prefill")
    if over_shortest is not None:
        pairs = zip(rows["taipan", 20].values, ours.values, strict=True)
        assert over_shortest.ratios == pytest.approx(tuple((long / 20) / (short / 8) for long, short in pairs))


def test_decoding_is_compared_with_the_memory_and_with_a_shorter_context(report: Session) -> None:
    rows = {(row.subject, row.work): row for row in report.measurements if row.suite == "decode"}
    ours, later = (rows["taipan", f"2 tokens after {context}, batch 1"] for context in (4, 6))
    floor = rows["memory floor", ours.work]
    assert ours.comparisons[0].other == "memory floor"
    pairs = zip(ours.values, floor.values, strict=True)
    assert ours.comparisons[0].ratios == pytest.approx(tuple(two / one for one, two in pairs))
    assert later.comparisons[-1].other == "after 4"
    # bytes of two tokens at the bandwidth of the same repetition
    seconds = 2 * floor.details["MB per step"] * 1e6 / (floor.details["GB/s read"] * 1e9)
    assert seconds == pytest.approx(floor.spread.median, rel=0.5)


@pytest.mark.parametrize("repeats", [1, 2])
def test_texts_are_compared_token_by_token_with_the_shortest(
    repeats: int, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = "1,000 texts of 16 to 512 tokens"
    found_seconds = {"one text of 16 tokens": (1.0, 2.0), "one text of 64 tokens": (8.0, 8.0), many: (3.0, 3.0)}

    def timed(runs: dict[str, Any], *_: Any, least_seconds: float) -> dict[str, tuple[float, ...]]:
        assert least_seconds * repeats >= 30  # what is read in less is read again: its rate is not that of a moment
        for function in runs.values():
            function()
        return {work: found_seconds[work][:repeats] for work in runs}

    monkeypatch.setattr(evaluate, "interleaved", timed)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: None)
    shortest, *others = measured(directory, ["evaluate"], tokens=(64, 16), repeats=repeats).measurements
    assert shortest.work == "one text of 16 tokens"
    assert not shortest.comparisons
    assert [row.work for row in others] == ["one text of 64 tokens", many]
    for row, seconds in zip(others, (8.0, 3.0), strict=True):
        (comparison,) = row.comparisons
        assert (comparison.quantity, comparison.other) == ("time", f"a token of {shortest.work}")
        assert row.tokens is not None
        expected = tuple(seconds / row.tokens / (one / 16) for one in (1.0, 2.0)[:repeats])
        assert comparison.ratios == pytest.approx(expected)


def test_what_was_asked_for_is_reported_of_every_op() -> None:
    found = module.implementations("reference", torch.float32)
    assert set(found.values()) == {"reference"}
    assert "rms_norm" in found


def test_several_rows_are_compared_with_one_alone(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(runs: dict[Any, Any], *_: Any) -> dict[Any, tuple[float, ...]]:
        for function in runs.values():
            function()
        return {key: (0.5, 0.25) if key[0] == "one row" else (1.0, 1.0) for key in runs}

    monkeypatch.setattr("taipan.benchmark.suites.decode.interleaved", timed)
    found = measured(directory, ["decode"], repeats=2, batch=3, new_tokens=2, context=(4,)).measurements
    (ours,) = (row for row in found if row.subject == "taipan")
    assert ours.work == "2 tokens after 4, batch 3"
    (alone,) = (comparison for comparison in ours.comparisons if comparison.other == "one row")
    assert (alone.quantity, alone.ratios) == ("speed", (1.5, 0.75))  # three times the tokens


def test_ops_are_measured_both_ways_against_portable(directory: str) -> None:
    found = measured(directory, ["ops"], repeats=1, implementation="reference").measurements
    works = {row.work for row in found}
    for op in ("ssd", "causal_conv1d", "gated_rms_norm", "rms_norm_of_sum", "attention", "linear_cross_entropy"):
        assert sum(work.startswith(f"{op} ") for work in works) == 2, op
    rows = {(row.subject, row.work): row for row in found}
    for (subject, work), row in rows.items():
        if subject == "reference" and not work.startswith("selective"):
            (comparison,) = row.comparisons
            assert comparison.other == "portable"
            assert comparison.ratios == (rows["portable", work].values[0] / row.values[0],)
            assert ("GB/s" in row.details) == work.endswith(", forward")
    for way in (", forward", ", forward and backward"):
        layer = [row for row in found if row.work.startswith("selective attention layer") and row.work.endswith(way)]
        every, *shares = layer
        assert not every.comparisons
        assert sum("keys of selected tokens" in row.work for row in shares) == len(shares) - 1 == 1
        assert all(row.comparisons[0].ratios == (row.values[0] / every.values[0],) for row in shares)


def test_memory_compares_processes(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def peak(settings: Settings, name: str, subject: str) -> float:
        asked.append((name, subject))
        return 3e9 if subject == "taipan" else 15e9

    monkeypatch.setattr(memory, "_peak", peak)
    found = measured(directory, ["memory"], against="transformers-mamba2").measurements
    both = ("taipan", "transformers Mamba-2")
    assert asked == [(name, who) for name in memory.JOBS for who in (both[:1] if name in memory._OURS_ALONE else both)]
    assert {row.unit for row in found} == {"bytes"}
    compared = [row.comparisons[0].ratios for row in found if row.subject == "taipan" and row.comparisons]
    assert compared == [(0.2,)] * (len(memory.JOBS) - len(memory._OURS_ALONE))


@pytest.mark.parametrize("name", memory.JOBS)
@pytest.mark.parametrize("subject", ["taipan", "transformers Mamba-2"])
def test_a_job_prints_the_peak_of_its_process(
    directory: str, name: str, subject: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)  # it cannot be undone
    settings = {"model": directory, "tokens": [8], "context": [4], "new_tokens": 2, "dtype": "float32"}
    job([json.dumps(settings), name, subject])
    assert float(capsys.readouterr().out) > 1e7


@pytest.mark.slow
def test_memory_is_that_of_fresh_processes(directory: str) -> None:
    held = torch.ones(2**28)  # a gigabyte of this process
    found = measured(directory, ["memory"]).measurements
    assert all(row.values[0] < held.nbytes for row in found)


def test_a_process_that_fails_is_told(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(ConfigError, match=r"measures the memory of 'train' for taipan ended early \(exit code 1\)"):
        memory._peak(Settings(model=directory), "train", "taipan")


def test_threads_are_set_for_the_run_only(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measure(settings: Settings, progress: object) -> list[Measurement]:
        seen.append(torch.get_num_threads())
        return []

    monkeypatch.setitem(module._MEASURE, "prefill", measure)
    before = torch.get_num_threads()
    assert measured(directory, ["prefill"], threads=before + 1).threads == before + 1
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_an_unknown_suite_is_refused_with_a_suggestion(directory: str) -> None:
    with pytest.raises(ConfigError, match=r"Unknown suite 'prefil' \(did you mean 'prefill'\?\)"):
        run([SUITES[1], "prefil"], Settings(model=directory))


def test_an_unknown_implementation_is_refused(directory: str) -> None:
    with pytest.raises(ConfigError, match="implementation is 'fast'"):
        run(["ops"], Settings(model=directory, implementation="fast"))


def test_the_whole_loop_is_compared_with_the_floor_and_says_where_its_time_goes(directory: str) -> None:
    found = measured(directory, ["train"], repeats=2, floor=True, loop=True).measurements
    ours, floor = (row for row in found if row.work == "training loop, 8 tokens")
    assert (ours.subject, floor.subject, ours.tokens) == ("taipan", "linear floor", 8)
    (comparison,) = ours.comparisons
    assert (comparison.quantity, comparison.other) == ("time", "linear floor")
    pairs = zip(ours.values, floor.values, strict=True)
    assert comparison.ratios == pytest.approx(tuple(one / two for one, two in pairs))
    parts = {name.removeprefix("ms per step: "): value for name, value in ours.details.items()}
    assert list(parts) == ["data", "forward", "backward", "gates", "clipping", "optimizer", "the rest"]
    assert min(parts.values()) > 0


def test_the_loop_is_that_of_the_models_recipe(tmp_path: Path) -> None:
    made = loop.recipe(Settings(dtype="float32"), 16, 40, tmp_path)
    assert (made.optimizer.name, made.data.packing) == ("muon", "documents")  # the quickstart's
    assert made.training.steps == 40
    made = loop.recipe(Settings(model="mamba2-6m", dtype="float32", batch=3), 16, 20, tmp_path / "other")
    assert (made.optimizer.name, made.training.batch_size, made.data.context_length) == ("adamw", 3, 16)
    assert list(made.model.overrides["layer_types"]) == ["mamba2"] * 6


def test_whole_steps_are_compared_with_those_of_a_plain_gpt_of_equal_size(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes a minute
    found = measured(directory, ["train"], repeats=1, against="pytorch").measurements
    ours, theirs = (row for row in found if row.work == "training step, 8 tokens")
    assert (ours.subject, theirs.subject) == ("taipan", "PyTorch GPT, compiled")
    (comparison,) = ours.comparisons
    assert (comparison.quantity, comparison.ratios) == ("speed", (theirs.values[0] / ours.values[0],))
    with pytest.raises(ConfigError, match="name the suite train"):
        run([], Settings(model=directory, against="pytorch"))


@pytest.mark.parametrize("name", ["quickstart", "mamba2-6m", "taipan-30m"])
def test_the_gpt_has_as_many_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    config = configuration(name)
    peer = CompiledGPT(config, 512)
    before = [parameter.clone() for parameter in peer.model.parameters()]
    count = sum(parameter.numel() for parameter in before)
    assert count == pytest.approx(parameter_count(config), rel=0.12)
    if name == "quickstart":
        peer.step(torch.randint(config.vocab_size, (2, 512)), "float32")
        assert all(not one.equal(two) for one, two in zip(before, peer.model.parameters(), strict=True))
