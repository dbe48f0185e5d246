"""Names that are not UTF-8, and terminals that know few characters: every verb works with both."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT
from tests.command import run

LATIN = os.fsdecode(b"caf\xe9")
Command = Callable[[Path], list[object]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """A directory with a model, a text, a prepared data set and a recipe, all under a name in Latin-1."""
    place = tmp_path_factory.mktemp("names") / LATIN
    try:
        place.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    shutil.copytree(model_directory, place / f"model {LATIN}")
    (place / f"{LATIN}.txt").write_text(TEXT, encoding="utf-8")
    assert run("data", "prepare", place / f"{LATIN}.txt", "--out", place / "data", "--workers", 1).code == 0
    (place / "recipe.yaml").write_text(
        "model: {preset: taipan-tiny, hidden_size: 32, intermediate_size: 32, state_size: 8, mamba_head_dim: 16}\n"
        "data: {train: data, context_length: 16}\n"
        "training: {steps: 2, batch_size: 2, checkpoint_every: 1, calibrate: false}\n"
        "output: run\n",
        encoding="utf-8",
    )
    return place


COMMANDS: dict[str, Command] = {
    "generate": lambda p: ["generate", p / f"model {LATIN}", "abc é", "--max-new-tokens", 4, "--save-state", p / "s"],
    "generate on": lambda p: ["generate", p / f"model {LATIN}", "abc", "--max-new-tokens", 4, "--load-state", p / "s"],
    "generate file": lambda p: ["generate", p / f"model {LATIN}", "--prompt-file", p / f"{LATIN}.txt"],
    "inspect": lambda p: ["inspect", p / f"model {LATIN}", p / f"{LATIN}.txt", "-o", p / f"{LATIN}.html"],
    "evaluate": lambda p: ["evaluate", p / f"model {LATIN}", p / f"{LATIN}.txt", "--json", p / "result.json"],
    "calibrate": lambda p: ["calibrate", p / f"model {LATIN}", p / f"{LATIN}.txt", "--tokens", 64, "--context", 32],
    "upcycle": lambda p: ["convert", "upcycle", p / f"model {LATIN}", p / "up"],
    "train": lambda p: ["train", p / "recipe.yaml"],
    "resume": lambda p: ["train", "--resume", p / "run"],
    "runs": lambda p: ["runs", p],
    "plan": lambda p: ["plan", p / "recipe.yaml", "--gpus", 1],
    "session read": lambda p: [
        "session",
        "read",
        p / f"model {LATIN}",
        p / f"{LATIN}.txt",
        "-o",
        p / f"{LATIN}.session",
    ],
    "session append": lambda p: ["session", "append", p / f"{LATIN}.session", "--file", p / f"{LATIN}.txt"],
    "session ask": lambda p: ["session", "ask", p / f"{LATIN}.session", "abc", "--max-new-tokens", 2],
    "session info": lambda p: ["session", "info", p / f"{LATIN}.session"],
    "data check": lambda p: ["data", "check", p / "data"],
}
REFUSED = ("upcycle",)  # it has attention layers already


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_takes_names_that_are_not_utf8(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    finished = run(*COMMANDS[name](place))
    if name in REFUSED:
        assert finished.code == 2, finished
        assert "attention" in finished.err
    else:
        assert finished.code == 0, finished


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("name", ["generate", "inspect", "evaluate", "calibrate", "plan", "runs", "presets", "doctor"])
def test_every_verb_prints_on_a_terminal_of_few_characters(
    name: str, encoding: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command = COMMANDS[name](place) if name in COMMANDS else [name]
    finished = run(*command, encoding=encoding)
    assert finished.code == 0, finished
    assert finished.out
    if name == "evaluate":
        assert "±" in finished.out or r"\xb1" in finished.out
        assert r"\u03b1" in finished.out  # α


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C"}]
)
def test_tables_and_help_in_a_process_of_their_own(environment: dict[str, str]) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    for words in (["presets"], ["--help"]):
        finished = subprocess.run(
            [sys.executable, "-m", "taipan", *words], env={**kept, **environment}, capture_output=True, check=False
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        assert b"taipan" in finished.stdout
