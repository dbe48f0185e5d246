"""run.json: sessions, environment, commits, the fingerprint of the data."""

import json
import platform
import subprocess
from pathlib import Path

import pytest

from taipan.training.run.identity import data_fingerprint
from taipan.training.watch import record
from taipan.training.watch.record import RunRecord, read_run_record

FACTS = {"model": {"preset": "x"}, "data": {"fingerprint": "f"}, "settings": {"dtype": "float32"}}


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_sessions_add_up_under_one_id(tmp_path: Path) -> None:
    first = RunRecord(tmp_path, resumed=False)
    first.begin(step=0, **FACTS)
    values = read_run_record(tmp_path)
    assert values is not None
    assert values["status"] == "running"
    first.end("interrupted", step=4, message="by hand")
    second = RunRecord(tmp_path, resumed=True)
    second.begin(step=4, **FACTS)
    second.end("finished", step=9, message="done")
    values = read_run_record(tmp_path)
    assert values is not None
    assert values == second.values
    assert (values["id"], values["status"], values["message"]) == (first.id, "finished", "done")
    assert [(session["step"], session["last_step"]) for session in values["sessions"]] == [(0, 4), (4, 9)]
    assert RunRecord(tmp_path, resumed=False).id != first.id  # another run in the place of this one
    environment = values["sessions"][0]["environment"]
    assert {"taipan", "python", "torch", "threads", "cpu", "cores", "memory_bytes", "simd"} <= environment.keys()


PLACE = {"host": platform.node(), "path": "/where/it/was", "inode": 1}


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({"inode": "same"}, True),  # moved
        ({"path": "same"}, True),  # copied over, and the first is gone
        ({"path": "same", "host": "elsewhere"}, False),  # on the disk of another machine
        ({"path": "same", "host": "elsewhere", "inode": "same"}, True),  # a shared disk, or a host with a new name
        ({}, False),
    ],
)
def test_a_copy_has_an_id_of_its_own(changes: dict[str, str], keeps: bool, tmp_path: Path) -> None:
    here = {"path": str(tmp_path.resolve()), "inode": tmp_path.stat().st_ino}
    first = RunRecord(tmp_path, resumed=False)
    first.begin(step=0, **FACTS)
    values = {**first.values, "place": {**PLACE, **{key: here.get(key, value) for key, value in changes.items()}}}
    (tmp_path / record.FILE).write_text(json.dumps(values))
    second = RunRecord(tmp_path, resumed=True)
    assert (second.id == first.id) == keeps == (second.copied_from is None)
    assert second.values["place"] == first.values["place"]
    assert second.values.get("copy_of") == (None if keeps else first.id)


@pytest.mark.parametrize("place", [None, 3, {"path": "x"}])
def test_a_record_from_before_places_were_noted_keeps_its_id(place: object, tmp_path: Path) -> None:
    first = RunRecord(tmp_path, resumed=False)
    first.begin(step=0, **FACTS)
    (tmp_path / record.FILE).write_text(json.dumps({**first.values, "place": place}))
    assert RunRecord(tmp_path, resumed=True).id == first.id


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "another"}'])
def test_a_damaged_record_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / record.FILE).write_text(text)
    assert read_run_record(tmp_path) is None
    RunRecord(tmp_path, resumed=True).begin(step=0, **FACTS)
    assert read_run_record(tmp_path) is not None


def test_the_commit_of_the_project_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "project" not in record.commits()
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    found = record.commits()["project"]
    assert len(found["commit"]) == 40
    assert not found["changed"]
    (tmp_path / "file").write_text("2")
    assert record.commits()["project"] == {"commit": found["commit"], "changed": True}
    monkeypatch.setenv("PATH", "")  # no git at all
    assert record.commits() == {}


def test_the_fingerprint_is_that_of_the_data_not_of_how_they_are_cut() -> None:
    data = {"tokens": ["a", "b"], "documents": "d", "tokenizer": "t", "weights": [1], "context_length": 8}
    same = data_fingerprint({"data": {**data, "context_length": 16, "packing": "documents"}})
    assert same == data_fingerprint({"data": data})
    for change in ({"tokens": ["b", "a"]}, {"documents": "e"}, {"tokenizer": "u"}, {"weights": [2]}):
        assert data_fingerprint({"data": {**data, **change}}) != same
