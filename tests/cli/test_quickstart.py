import html
import json
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.experiments.quickstart import quickstart_recipe
from tests.cli.conftest import TEXT, Cli, interrupt_after
from tests.report.accessible import faults

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
    "training.batch_size=16",
    "training.log_every=1",
    "training.evaluate_every=2",
    "training.evaluate_batches=1",
    "training.seconds=null",
    "training.steps=4",
]
OVERRIDES = [part for override in SMALL for part in ("-o", override)]


VALID = [
    Document("asyncio/queues.py", TEXT),
    Document("asyncio/base.py", "import this\n" * 9),
    Document("xml/sax.py", "<é>" * 30),
]
TRAIN = [Document(f"module{number}.py", TEXT[number:]) for number in range(3)]


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """A small standard library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taipan.data.corpus.stdlib_corpus", lambda: (TRAIN, VALID))
        yield


@dataclass(frozen=True)
class Made:
    """A quickstart in the directory `here` of a place, and what it printed."""

    place: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def made(cli: Cli, library: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        finished = cli("quickstart", "--out", "here", *OVERRIDES)
    assert finished.code == 0, finished.err
    return Made(place, finished.out, finished.err)


@pytest.fixture(autouse=True)
def in_place(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.place)


def test_measures_what_evaluate_measures(cli: Cli, made: Made) -> None:
    results = json.loads(Path("here/results.json").read_text())
    assert cli("evaluate", "here/model", "here/data/valid", "--json", "again.json").code == 0
    [again] = json.loads(Path("again.json").read_text())["results"]
    assert [row["name"] for row in results["packages"]] == ["asyncio", "xml", "all held-out files"]
    total = results["packages"][-1]
    assert total["files"] == 3
    assert total["bytes"] == sum(len(document.text.encode()) for document in VALID) == again["bytes"]
    assert total["model"] == pytest.approx(again["bits_per_byte"], rel=1e-5)
    [gate], [expected] = results["gates"], again["gates"]
    for name in ("training_rate", "noise_free_rate"):
        assert gate[name] == pytest.approx(expected[name], abs=1e-5)
    assert gate["alpha_selected"] == pytest.approx(expected["weight_mean"] / expected["rate"], abs=1e-5)
    # one file is longer than the others: the positions are about it alone, up to the last bucket it fills
    assert results["position_files"]["bytes"] == len(TEXT.encode())
    assert {found["files"] for found in results["positions"]} == {1}
    Path("long.py").write_text(TEXT)
    assert cli("evaluate", "here/model", "long.py", "--json", "long.json").code == 0
    [long] = json.loads(Path("long.json").read_text())["results"]
    full = [bucket for bucket in long["by_position"] if bucket["stop"] <= long["tokens"]]
    for found, bucket in zip(results["positions"], full, strict=True):
        assert found["bits_per_byte"] == pytest.approx(bucket["bits_per_byte"], rel=1e-5)
    # and the terminal says the same
    for value in (total["gzip"], total["xz"], total["model"]):
        assert f"{value:.3f}" in made.out
    assert "training" in made.out
    assert "total" in made.out
    assert "here/report.html" in made.err


def test_the_report_is_self_contained() -> None:
    page = Path("here/report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "url(http" not in page
    assert "NaN" not in page
    assert page.count("<svg") == 2 * 5
    assert faults(page) == []


def test_the_report_says_nothing_of_this_machine_but_what_it_is(cli: Cli, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert cli("quickstart", "--out", out, *OVERRIDES, "-o", "training.steps=1").code == 0
    for page in (out / "report.html", Path("here/report.html")):
        content = page.read_text()
        for path in (tmp_path, made.place, Path.home(), Path(sysconfig.get_path("stdlib")), Path(sys.prefix)):
            assert f"{path}" not in content or path == Path("/")
    content = (out / "report.html").read_text()
    assert "In the directory that holds <code>mine</code>" in content
    assert "taipan evaluate mine/model" in content


def test_the_headline_is_for_newcomers() -> None:
    page = Path("here/report.html").read_text()
    [headline] = re.findall("<h1>(.*?)</h1>", page)
    assert re.fullmatch(r"\d+ % (smaller|larger) than xz, after \d+ (second|minute)s? on .+", headline)
    assert "<strong>What bits per byte are.</strong>" in page
    assert "arXiv:2410.18572" in page
    assert '<meta name="description" content="' + headline in page


def test_the_sample_can_be_made_again_and_is_no_line(cli: Cli, made: Made) -> None:
    sample = json.loads(Path("here/results.json").read_text())["sample"]
    assert "\n" in sample["prompt"]
    [command] = re.findall("(taipan generate [^<]*--ignore-eos)", Path("here/report.html").read_text())
    words = shlex.split(html.unescape(command))
    again = cli(*words[1:])
    assert again.out.replace("\r", "\n") == sample["text"].replace("\r", "\n") + "\n"  # as a text stream reads them
    assert words[words.index("--max-new-tokens") + 1] == "240"
    assert "240 written" in again.err.replace("tokens ", "")


def test_the_commands_it_prints_work(cli: Cli, made: Made) -> None:
    Path("mine.py").write_text(TEXT)
    commands = [line.strip() for line in made.err.splitlines() if line.startswith("  taipan ")]
    assert {command.split()[1] for command in commands} == {"generate", "inspect", "evaluate", "data", "train"}
    for command in commands:
        command = command.replace("YOUR_FILES", "mine.py").replace("YOUR_FILE.py", "mine.py")
        tried = cli(*shlex.split(command)[1:])
        assert tried.code == 0, (command, tried.err)


def test_a_finished_one_is_kept_unless_told_otherwise(cli: Cli, refused: Callable[..., str], tmp_path: Path) -> None:
    copy = shutil.copytree("here", tmp_path / "copy")
    (copy / "data" / "notes.txt").write_text("mine")
    message = refused("quickstart", "--out", copy, *OVERRIDES)
    assert "report.html" in message
    assert "--overwrite" in message
    assert cli("quickstart", "--out", copy, "--overwrite", *OVERRIDES, "-o", "training.steps=1").code == 0
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    assert (copy / "data" / "notes.txt").read_text() == "mine", "only what a quickstart made is replaced"


def test_an_interrupted_one_goes_on(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        interrupted = cli("quickstart", "--out", out, *OVERRIDES)
    assert interrupted.code == 130
    assert "Run the same command to go on" in interrupted.err
    assert not (out / "model").exists()
    assert cli("quickstart", "--out", out, *OVERRIDES).code == 0
    assert (out / "model/model.safetensors").read_bytes() == Path("here/model/model.safetensors").read_bytes()


def test_bad_input_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    prepare(VALID, Tokenizer.bytes(), other / "data" / "train", sources=["mine"])
    (other / "report.html").write_text("my report")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert "--out" in refused("quickstart", "--out", other)
    assert "--out" in refused("quickstart", "--out", other, "--overwrite")
    (other / "report.html").unlink()
    assert "something else" in refused("quickstart", "--out", other)
    assert "something else" in refused("quickstart", "--out", other, "--overwrite")
    (other / "report.html").write_text("my report")
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    assert "is a file" in refused("quickstart", "--out", other / "thesis.txt")
    assert "did you mean" in refused("quickstart", "--out", tmp_path / "new", "-o", "model.hiden_size=3")
    assert not (tmp_path / "new").exists()


def test_the_help_says_how_long_it_trains(cli: Cli) -> None:
    assert f"[default: {quickstart_recipe(Path('quickstart')).training.seconds:g}]" in " ".join(
        cli("quickstart", "--help").out.split()
    )
