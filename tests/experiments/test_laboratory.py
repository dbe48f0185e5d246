"""The laboratory: texts and models made once, shared by experiments, and every experiment at `tiny` by its command."""

import gzip
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.errors import DataError, InputError
from taipan.evaluation import ReadTokens, read_tokens
from taipan.evaluation.perplexity import evaluate
from taipan.experiments import laboratory, reading
from taipan.experiments.claims import CLAIMS, judge, load
from taipan.experiments.claims_figures import figures
from taipan.experiments.controls import choose_by
from taipan.experiments.execution import Result, Run
from taipan.experiments.gate_settings import architectures
from taipan.experiments.laboratory import SCALES, Laboratory, Text, Training, by_name, spread, write
from taipan.experiments.reading import LongDocuments, bigram_distance, long_contexts, measure_long, token_class
from taipan.experiments.registry import ENTRIES, experiment
from tests.command import run
from tests.models import random_tokens, small_model

TINY = SCALES["tiny"]


class Texts:
    """Documents of given lengths, a byte a token."""

    def __init__(self, *lengths: int) -> None:
        import numpy as np

        self.lengths = np.array(lengths)
        self.n_bytes = sum(lengths)
        self.vocab_size, self.start_token = 61, 60
        self.token_bytes = np.ones(61, np.int64)
        self._ids = [random_tokens(1, length, seed=length)[0].numpy() for length in lengths]

    def read(self, document: int, start: int, stop: int) -> "object":
        return self._ids[document][start:stop]


def prose(tmp_path: Path, count: int = 12) -> Path:
    path = tmp_path / "novels.jsonl.gz"
    lines = (json.dumps({"text": f"Chapter {number}. " + "It was a dark night. " * 400}) for number in range(count))
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path


def test_whole_documents_of_a_file_are_held_out(tmp_path: Path) -> None:
    everything = replace(TINY, training_bytes=None)
    training, held_out = Text(prose(tmp_path)).documents(everything)
    assert len(held_out) == 1
    starts = [document.text[:12] for document in (*training, *held_out)]
    assert len(set(starts)) == len(starts) == 12  # none is on both sides
    fewer, _ = Text(prose(tmp_path)).documents(TINY)
    assert 45_000 <= sum(len(document.text) for document in fewer) <= 75_000
    again = Text(prose(tmp_path)).documents(TINY)
    assert [document.text for document in again[1]] == [document.text for document in held_out]
    with pytest.raises(DataError, match="holds 1 documents: one has to be held out"):
        Text(prose(tmp_path, 1)).documents(TINY)
    with pytest.raises(DataError, match="does not exist"):
        Text(tmp_path / "none").settings()


def test_other_text_is_other_data(tmp_path: Path) -> None:
    first = Text(prose(tmp_path)).settings()
    assert first != Text(prose(tmp_path, 13)).settings()
    assert first["text"] == "novels.jsonl.gz"


def test_results_are_sorted_by_model() -> None:
    results = [{"n": number} for number in range(6)]
    assert by_name(["a", "b", "c"], (1, 2), results) == {
        "a": [{"n": 0}, {"n": 3}],
        "b": [{"n": 1}, {"n": 4}],
        "c": [{"n": 2}, {"n": 5}],
    }
    with pytest.raises(InputError, match="6 results"):
        by_name(["a"], (1, 2), results)
    assert spread([1.0]) == "1.000"
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 (1.0–3.0)"


def test_every_token_is_read_as_it_is_evaluated() -> None:
    model, texts = small_model("taipan"), Texts(23, 9, 40)
    whole = evaluate(model, texts, context=16, piece=5)  # pyright: ignore[reportArgumentType]
    spans = list(read_tokens(model, texts, context=16, piece=5))  # pyright: ignore[reportArgumentType]
    assert sum(len(span.ids_T) for span in spans) == whole.tokens == 72
    assert float(sum(span.nats_T.double().sum() for span in spans)) == pytest.approx(whole.nats, rel=1e-6)
    rates = torch.cat([span.selected_YT for span in spans], 1).double().mean(1)
    assert rates.tolist() == pytest.approx([gate.rate for gate in whole.gates])
    for span in spans:
        ids = random_tokens(1, len(texts.read(span.document, 0, 99)), seed=int(texts.lengths[span.document]))[0]  # pyright: ignore
        assert span.ids_T.equal(ids[span.start : span.start + len(span.ids_T)])
        before = ids[span.start - 1] if span.start else torch.tensor(60)
        assert span.before_T.equal(torch.cat([before[None], span.ids_T[:-1]]))
        assert (span.selected_YT == (span.margin_YT > 0)).all()


def test_the_distance_of_a_bigram() -> None:
    before, ids = torch.tensor([60, 1, 2, 1, 2, 2, 1]), torch.tensor([1, 2, 1, 2, 2, 1, 2])
    span = ReadTokens(0, 0, ids, torch.zeros(7), before, torch.zeros(0, 7).bool(), torch.zeros(0, 7))
    assert bigram_distance(span).tolist() == [0, 0, 0, 2, 0, 3, 3]


def test_long_documents_have_every_position() -> None:
    documents = LongDocuments(Texts(5, 30, 8, 21, 40, 3), at_least=3)
    assert documents.lengths.tolist() == [21, 21, 21]
    assert documents.n_bytes == 63
    assert documents.read(0, 0, 4).tolist() == random_tokens(1, 40, seed=40)[0, :4].tolist()


def test_contexts_of_long_texts() -> None:
    assert long_contexts(512, 1_000_000) == [256, 512, 1024, 2048, 4096, 8192, 16_384, 65_536, 262_144]
    assert long_contexts(64, 70) == [32, 64]


@pytest.mark.parametrize("kind", ["taipan", "jamba"])
def test_the_end_of_a_long_text_is_scored_at_every_context(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, texts = small_model(kind), Texts(90, 30)
    monkeypatch.setattr("taipan.data.shards.TokenDataset.open", lambda path: path)
    monkeypatch.setattr("taipan.evaluation.PreparedDocuments", lambda path: texts)
    monkeypatch.setattr(reading, "ATTENTION_READS", 40)
    options = {"texts": [["a book", "book"]], "contexts": [8, 16, 40, 80, 640], "scored": 16}
    found = measure_long(model, tmp_path / "data", options)["long"]["a book"]
    points = {point["context"]: point for point in found["by_context"]}
    assert list(points) == ([8, 16, 40] if kind == "jamba" else [8, 16, 40, 80])  # 640 is longer than the text
    ids = random_tokens(1, 90, seed=90)
    for context, point in points.items():
        # by hand: the last 16 tokens, each from the tokens since its piece began and the one before
        nats = 0.0
        for start in range(90 - max(context, 16), 90, context):
            with torch.no_grad():
                logits = model(ids[:, start - 1 : min(90, start + context) - 1]).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits.double(), ids[0, start : start + context], reduction="none"
            )
            nats += float(losses[max(0, 74 - start) :].sum())
        assert point["bits_per_byte"] == pytest.approx(nats / math.log(2) / 16, rel=1e-5)  # a byte a token
        assert (point["rate"] is None) == (kind == "jamba")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("def", "word"), (" self_1", "word"), ("42", "number"), ("\n    ", "line end"), ("  ", "space"), ("):", "mark")],
)
def test_classes_of_tokens(text: str, kind: str) -> None:
    assert token_class(text) == kind


@pytest.mark.parametrize(("choice", "off"), [("every", 0.01), ("random", 0.04)])
def test_blind_gates_hold_the_budget_and_do_not_look(choice: str, off: float) -> None:
    model = small_model("taipan", attention_capacity=0.3)
    choose_by(model, choice, 3)
    with torch.no_grad():
        first, other = (model(random_tokens(4, 400, seed=seed)) for seed in (1, 2))
    for gate in (*first.gates, *other.gates):
        assert float(gate.rate) == pytest.approx(0.3, abs=off)
    same = first.gates[0].selected_BT.equal(other.gates[0].selected_BT)
    assert same == (choice == "every")
    if choice == "every":
        places = first.gates[0].selected_BT[0].nonzero()[:, 0]
        assert set(places.diff().tolist()) == {3, 4}


def test_a_tiny_experiment_by_its_command_goes_on(tmp_path: Path) -> None:
    arguments = ["reproduce", "gate", "--scale", "tiny", "--out", str(tmp_path / "lab"), "--workers", "1"]
    arguments += ["--text", str(prose(tmp_path))]
    many = run(*arguments, "--seeds", "2")
    assert many.code == 2
    assert "--seeds is 2, but the scale tiny has 1: give fewer, or none." in many.err
    first = run(*arguments)
    assert first.code == 0, first.err
    (path,) = (tmp_path / "lab" / "tiny" / "reports").glob("novels-*/gate.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["command"] == "taipan reproduce gate --scale tiny --text novels.jsonl.gz"
    (own,) = report["results"]["taipan"]
    assert own["tokens"] == TINY.steps * TINY.rows * TINY.context
    assert own["seed"] == 1
    assert {"machine", "commits", "parameters", "curve"} <= own.keys()
    groups = own["groups"]
    assert groups["all"]["tokens"] == groups["of other ids"]["tokens"] + groups["of the 64 most frequent ids"]["tokens"]
    (model,) = (tmp_path / "lab" / "tiny" / "models").iterdir()
    made = run("generate", str(model), "Chapter", "--max-new-tokens", "3")
    assert made.code == 0, made.err
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert run(*arguments).code == 0
    assert (model / "model.safetensors").stat().st_mtime_ns == before

    written, published = path.read_bytes(), path.rename(tmp_path / "gate-novels.json").parent
    for kept in ("training", "measured", "models"):
        shutil.rmtree(tmp_path / "lab" / "tiny" / kept)
    again = run(*arguments, "--published", str(published))
    assert again.code == 0, again.err
    assert "results of 1 runs of this command" in again.err
    assert path.read_bytes() == written
    assert not (tmp_path / "lab" / "tiny" / "models").exists()  # nothing was trained


def test_results_that_cannot_be_taken_are_refused(tmp_path: Path) -> None:
    nowhere = run("reproduce", "copying", "--scale", "tiny", "--published", str(tmp_path / "none"))
    assert nowhere.code == 2
    assert "is no directory; expected one with results" in nowhere.err
    times = run("reproduce", "latency-by-length", "--scale", "tiny", "--published", str(tmp_path))
    assert times.code == 2
    assert "latency-by-length measures times, which are of one machine." in times.err


def nobody(*_: object) -> None:
    """Listens to nothing."""


def inline(runs: Sequence[Run], function: Callable[[Run], Result], directory: Path, *_: Any, **__: Any) -> list[Result]:
    """As `execute`, in this process: what processes add has its own tests."""
    results: list[Result] = []
    for declared in runs:
        path = declared.path(directory)
        if not path.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(function(declared)), encoding="utf-8")
        results.append(json.loads(path.read_text(encoding="utf-8")))
    return results


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    small = replace(TINY, training_bytes=30_000, held_out_bytes=12_000)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(laboratory, "execute", inline)
        yield Laboratory(small, Text(), tmp_path_factory.mktemp("lab"), nobody)


def local_files(name: str, directory: Path) -> dict[str, Path]:
    """Local files of questions for the experiments that ask them, of long text for the one that reads it."""
    if ENTRIES[name].long:
        (directory / "long.txt").write_text("The taipan waits; a day in May. " * 400)
        return {"a book": directory / "long.txt"}
    lines: dict[str, list[dict[str, Any]]] = {
        "squad": [{"prompt": "import", "answers": ["os", "sys"]}],
        "piqa": [{"query": "The sky is", "choices": ["blue", "red"], "gold": gold} for gold in (0, 1, 0)],
    }
    files: dict[str, Path] = {}
    for task in set(lines) & set(ENTRIES[name].files):
        files[task] = directory / f"{task}.jsonl"
        files[task].write_text("".join(json.dumps(line) + "\n" for line in lines[task]))
    return files


KEYS = {"seed", "tokens", "machine", "commits", "parameters", "curve"}


def test_what_is_published_is_not_made_again(lab: Laboratory, tmp_path: Path) -> None:
    configs = architectures(lab.scale)
    trainings = [Training(name="jamba", config=configs["jamba"], seed=seed) for seed in (1, 2)]
    settings = [lab.declare(training).settings for training in trainings]
    told: dict[str, Any] = {"experiment": "copying", "command": "taipan reproduce copying --scale tiny --seeds 1"}
    told["results"] = {"jamba": [{"run": "jamba", **settings[0], "loss": 1.0}]}
    (tmp_path / "a.json").write_text(json.dumps(told))
    others: dict[str, dict[str, str]] = {
        "b": {"experiment": "gap"},
        "c": {"command": "taipan reproduce copying --scale small"},
        "d": {"command": "taipan reproduce copying --scale tiny --text novels.jsonl.gz"},
    }
    for name, changed in others.items():
        result = {"run": "jamba", **settings[1], "loss": 9.0}
        (tmp_path / f"{name}.json").write_text(json.dumps({**told, "results": {"jamba": [result]}, **changed}))
    (tmp_path / "e.json").write_text("[1, 2]")
    known = laboratory.published(tmp_path, "copying", "taipan reproduce copying --scale tiny")

    fresh = Laboratory(lab.scale, lab.text, lab.directory, nobody, published=known)
    trained: list[str] = []

    def execute(runs: Sequence[Run], work: object, kind: str) -> list[Result]:
        trained.extend(f"{kind} {run.settings['seed']}" for run in runs)
        return [{"run": run.name, "loss": 2.0} for run in runs]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fresh, "execute", execute)
        found = fresh.measure(reading.measure_copying, trainings)
        # another rate is another run, though the name is the same
        quicker = replace(trainings[0], learning_rate=0.5)
        (other,) = fresh.measure(reading.measure_copying, [quicker])
    assert [result["loss"] for result in (*found, other)] == [1.0, 2.0, 2.0]
    assert trained == ["training 2", "measured 2", "training 1", "measured 1"]
    (tmp_path / "f.json").write_text("{")
    with pytest.raises(DataError, match=r"f\.json"):
        laboratory.published(tmp_path, "copying", "taipan reproduce copying --scale tiny")


@pytest.mark.parametrize(
    "changed",
    [
        {"command": None},
        {"command": 5},
        {"results": None},
        {"results": []},
        {"results": {"jamba": {}}},
        {"results": {"jamba": [1]}},
        {"more": []},
        {"more": {"runs": 1}},
    ],
    ids=str,
)
def test_published_results_that_are_nearly_right_are_named(changed: dict[str, Any], tmp_path: Path) -> None:
    command = "taipan reproduce copying --scale tiny"
    told = {"experiment": "copying", "command": command, "results": {}, "more": {}, **changed}
    (tmp_path / "a.json").write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    with pytest.raises(DataError, match=r"a\.json .*take it out of"):
        laboratory.published(tmp_path, "copying", command)


def test_a_published_result_that_lacks_a_measurement_is_named(lab: Laboratory, tmp_path: Path) -> None:
    training = Training(name="jamba", config=architectures(lab.scale)["jamba"], seed=1)
    result = {**lab.declare(training).settings, "found": [{"loss": 1.0}]}
    told = {"experiment": "gap", "command": "taipan reproduce gap", "results": {"jamba": [result]}, "more": {}}
    (tmp_path / "a.json").write_text(json.dumps(told))
    known = laboratory.published(tmp_path, "gap", "taipan reproduce gap")
    own = Laboratory(lab.scale, lab.text, lab.directory, nobody, published=known)
    (found,) = own.measure(reading.measure_copying, [training])
    assert found["found"][0]["loss"] == 1.0
    for lacking, name in ((found, "curve"), (found["found"][0], "accuracy")):
        with pytest.raises(DataError, match=rf"a\.json has no '{name}'.*make it again"):
            lacking[name]


@pytest.mark.parametrize("kept", ["[1]", "{}", '{"seed": 1}', "{"])
def test_a_laboratory_names_a_file_that_is_no_result(kept: str, lab: Laboratory) -> None:
    own = Laboratory(lab.scale, lab.text, lab.directory, nobody)
    path = lab.directory / "training" / "notes.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(kept)
    try:
        with pytest.raises(DataError, match=r"notes\.json"):
            own.declare(Training(name="jamba", config=architectures(lab.scale)["jamba"], seed=1))
    finally:
        path.unlink()


def test_a_model_that_is_gone_is_told_with_what_to_do(lab: Laboratory) -> None:
    training = [Training(name="gone", config=architectures(lab.scale)["mamba2"], seed=7, steps=1)]
    lab.train(training)
    identity = lab.declare(training[0]).identity
    shutil.rmtree(lab.directory / "models" / identity)
    with pytest.raises(DataError, match=rf"remove .*training/{identity}\.json, and the same command"):
        lab.measure(reading.measure_copying, training)


@pytest.mark.slow
@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("name", ENTRIES)
def test_every_experiment_at_tiny(name: str, lab: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lab, "files", local_files(name, tmp_path))
    outcome = experiment(name)(lab)
    assert outcome.results
    for table in outcome.tables:
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
    for model, results in outcome.results.items():
        for result in results:
            assert result.keys() >= KEYS, model
            if ENTRIES[name].text:
                assert result["tokens"] == TINY.steps * TINY.rows * TINY.context, model
            for task in result.get("tasks", {}).values():
                low, high = task["interval"]
                assert low < task["score"] < high, model
            for task, (low, high) in result.get("intervals", {}).items():
                assert low <= result["found"][task] <= high, model
    # what is written is all that the page of the claims needs; results of `tiny` are not shown there
    about = {"scale": "small", "text": "code"}
    _, written = write(name, ENTRIES[name].claim, outcome, tmp_path / "results", "the command", about)
    (kept,) = load(written.parent)[name]
    assert kept.results == json.loads(json.dumps(outcome.results))
    if name != "capacity":  # of which `tiny` has not the budgets that are compared
        (claim,) = [claim for claim in CLAIMS if claim.experiment == name]
        ((_, finding),) = judge(claim, [kept])
        assert finding.verdict != "no result yet"
        assert finding.because.endswith(".")
    for picture, caption in figures(kept, name):
        assert "<svg" in picture
        assert caption
    values = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps({**values, "scale": "tiny"}), encoding="utf-8")
    assert load(written.parent) == {}


def test_a_long_text_that_is_not_there_is_asked_for(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "files", {"a book": Path("none.txt")})
    with pytest.raises(InputError, match=r"'none\.txt' is no file: give the path of a long text"):
        reading._long_texts(lab)


def test_a_rate_that_was_swept_is_of_its_text(tmp_path: Path) -> None:
    small, configs = SCALES["small"], architectures(SCALES["small"])
    for text, rates in ((Text(), {"jamba": 0.02}), (Text(prose(tmp_path)), {})):
        own = Laboratory(small, text, tmp_path, nobody)
        assert {name: own.learning_rate(config) for name, config in configs.items()} == {
            name: rates.get(name, laboratory.LEARNING_RATE) for name in configs
        }


def test_models_that_are_one_are_trained_once(lab: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = architectures(lab.scale)["taipan"]
    monkeypatch.setattr(lab, "directory", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(laboratory, "_train", lambda _, __, run: {"run": run.name, **run.settings})
        lab.train([Training(name="taipan", config=config, seed=1)])
    assert lab.declare(Training(name="another name", config=config, seed=1)).name == "taipan"
    assert lab.declare(Training(name="another seed", config=config, seed=2)).name == "another-seed"
    assert lab.declare(Training(name="a rate", config=config, seed=1, learning_rate=0.02)).name == "a-rate"
    assert lab.declare(Training(name="tasks", config=config, seed=1, tasks=0.5)).name == "tasks"


@pytest.mark.slow
@pytest.mark.unchecked_shapes
def test_gates_that_are_forced_and_rates_that_are_held(lab: Laboratory) -> None:
    results = experiment("gate-settings")(lab).results
    (own,), (whole,) = results["recall, lookahead"], results["taipan, C = 1"]
    assert own["bits_per_byte_open"] != own["bits_per_byte_closed"]
    assert 0 < own["rate"] < 1
    assert own["thresholds"] != [0.0]
    assert whole["rate"] > 0.9
