import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.data.corpus import Document
from tests.cli.conftest import TEXT, Cli

SMALL = [
    "model.vocab_size=300",
    "model.hidden_size=16",
    "model.intermediate_size=16",
    "model.layer_types=[mamba2, selective_attention]",
    "model.state_size=4",
    "model.mamba_head_dim=8",
    "model.num_attention_heads=2",
    "model.sliding_window=8",
    "data.context_length=32",
    "training.batch_size=2",
    "training.log_every=1",
    "training.evaluate_every=2",
    "training.evaluate_batches=1",
    "training.seconds=null",
    "training.steps=4",
]
OVERRIDES = [part for override in SMALL for part in ("-o", override)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """A small standard library."""
    valid = [
        Document("asyncio/queues.py", TEXT),
        Document("asyncio/base.py", "import this\n" * 9),
        Document("xml/sax.py", "<é>" * 30),
    ]
    train = [Document(f"module{number}.py", TEXT[number:]) for number in range(3)]
    monkeypatch.setattr("taipan.data.corpus.stdlib_corpus", lambda: (train, valid))
    return valid


def test_makes_a_model_a_report_and_commands_that_work(
    cli: Cli, refused: Callable[..., str], library: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = cli("quickstart", "--out", "here", *OVERRIDES)
    assert finished.code == 0, finished.err

    # what it measured is what `taipan evaluate` measures, over all files
    results = json.loads(Path("here/results.json").read_text())
    assert cli("evaluate", "here/model", "here/data/valid", "--json", "again.json").code == 0
    [again] = json.loads(Path("again.json").read_text())["results"]
    total = results["packages"][-1]
    assert total["files"] == 3
    assert total["bytes"] == sum(len(document.text.encode()) for document in library) == again["bytes"]
    assert total["model"] == pytest.approx(again["bits_per_byte"], rel=1e-5)
    assert [row["name"] for row in results["packages"]] == ["asyncio", "xml", "all held-out files"]
    [gate], [expected] = results["gates"], again["gates"]
    for name in ("training_rate", "noise_free_rate", "alpha_mean", "alpha_std"):
        assert gate[name] == pytest.approx(expected[name], abs=1e-5)
    for found, bucket in zip(results["positions"], again["by_position"], strict=True):
        assert found["bits_per_byte"] == pytest.approx(bucket["bits_per_byte"], rel=1e-5)

    # the terminal says the same
    for value in (total["gzip"], total["xz"], total["model"]):
        assert f"{value:.3f}" in finished.out
    assert "training" in finished.out
    assert "total" in finished.out
    assert "here/report.html" in finished.err

    page = Path("here/report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', page), "nothing may be loaded"
    assert "NaN" not in page
    assert page.count("<svg") == 4

    # the commands it prints work
    Path("mine.py").write_text(TEXT)
    commands = [line.strip() for line in finished.err.splitlines() if line.startswith("  taipan ")]
    assert {command.split()[1] for command in commands} == {"generate", "inspect", "evaluate", "data", "train"}
    for command in commands:
        words = [
            word.replace("YOUR_FILES", "mine.py").replace("YOUR_FILE.py", "mine.py") for word in shlex.split(command)
        ]
        again_finished = cli(*words[1:])
        assert again_finished.code == 0, (command, again_finished.err)

    # a finished one is kept, unless told otherwise
    message = refused("quickstart", "--out", "here", *OVERRIDES)
    assert "report.html" in message
    assert "--overwrite" in message
    assert cli("quickstart", "--out", "here", "--overwrite", *OVERRIDES, "-o", "training.steps=1").code == 0
    assert json.loads(Path("here/metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_an_interrupted_one_goes_on(
    cli: Cli, library: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from taipan.cli.display import TrainingDisplay
    from taipan.training.listener import StepInfo

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli("quickstart", "--out", whole, *OVERRIDES).code == 0
    shown = TrainingDisplay.stepped

    def interrupting(self: TrainingDisplay, info: StepInfo) -> None:
        shown(self, info)
        if info.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDisplay, "stepped", interrupting)
        finished = cli("quickstart", "--out", out, *OVERRIDES)
    assert finished.code == 130
    assert "Run the same command to go on" in finished.err
    assert not (out / "model").exists()
    assert cli("quickstart", "--out", out, *OVERRIDES).code == 0
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_bad_input_is_refused(refused: Callable[..., str], library: list[Document], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "something else" in refused("quickstart", "--out", other)
    assert "something else" in refused("quickstart", "--out", other, "--overwrite")
    assert (other / "thesis.txt").exists()
    assert "is a file" in refused("quickstart", "--out", other / "thesis.txt")
    assert "did you mean" in refused("quickstart", "--out", tmp_path / "new", "-o", "model.hiden_size=3")
    assert not (tmp_path / "new").exists()
