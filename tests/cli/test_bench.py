import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from taipan.benchmark.bandwidth import StreamingRead
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites import generate
from taipan.errors import ConfigError
from tests.cli.conftest import Cli


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)  # it cannot be undone


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    for suite in ("decode", "generate"):
        monkeypatch.setattr(f"taipan.benchmark.suites.{suite}.StreamingRead", partial(StreamingRead, 2**18))


def test_measures_a_model_and_writes_it_down(cli: Cli, model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    sizes = ["--tokens", 8, "--tokens", 12, "--context", 4, "--new-tokens", 2, "--repeats", 2]
    words = ["bench", "prefill", "decode", "--model", model_directory, *sizes, "--floor", "--json", file]
    finished = cli(*words, "--dtype", "float32")
    assert finished.code == 0, finished.err
    for expected in ("prefill 12 tokens", "time", "× linear floor", "2 tokens after 4", "ssd ", "2 repetitions"):
        assert expected in finished.out
    record = json.loads(file.read_text())
    assert record["command"].startswith("taipan bench prefill decode --model")
    assert {row["suite"] for row in record["measurements"]} == {"prefill", "decode"}
    assert str(file) in finished.err


def leaves(*_: object, **__: object) -> None:
    """In place of a table, for a reader who has gone."""
    raise BrokenPipeError


def test_results_are_kept_before_they_are_shown(
    cli: Cli, model_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taipan.cli.console.print_table", leaves)
    file, tasks = tmp_path / "result.json", tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "a", "answers": ["b"]}\n')
    for words in (
        ["bench", "prefill", "--model", model_directory, "--tokens", 8, "--repeats", 1],
        ["evaluate", model_directory, text_file],
        ["evaluate", model_directory, "--tasks", f"own={tasks}"],
    ):
        cli(*words, "--json", file)
        assert json.loads(file.read_text())["command"].startswith(f"taipan {words[0]}")
        file.unlink()


def test_memory_is_shown_as_sizes(cli: Cli, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.benchmark.suites.memory._peak", lambda *arguments: 3.0 * 2**30)
    finished = cli("bench", "memory", "--model", model_directory)
    assert finished.out.count("3.0 GiB") == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["ops", "--model", "taipan-tny"], "did you mean 'taipan-tiny'?"),
        (["ops", "--against", "llama.cpp"], "Known: transformers"),
        (["ops", "--repeats", "0"], "repeats is 0"),
    ],
)
def test_wrong_words_are_refused(refused: Callable[..., str], words: list[str], message: str) -> None:
    assert message in refused("bench", *words)


@pytest.mark.slow
def test_generating_is_measured_beside_step_and_floor(cli: Cli, model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    sizes = ["--new-tokens", 5, "--repeats", 1, "--dtype", "float32"]
    finished = cli("bench", "generate", "--model", model_directory, *sizes, "--floor", "--json", file)
    assert finished.code == 0, finished.err
    rows = {row["work"]: row for row in json.loads(file.read_text())["measurements"] if row["subject"] == "taipan"}
    assert set(rows) == {"5 tokens drawn, generate()", "5 tokens drawn, taipan generate"}
    for row in rows.values():
        assert {comparison["other"] for comparison in row["comparisons"]} == {"the bare step", "memory floor"}


def test_a_command_that_writes_nothing_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not written 6 tokens: .*nothing"):
        generate._command(tmp_path / "nothing", Settings(new_tokens=5), dtype="float32")
