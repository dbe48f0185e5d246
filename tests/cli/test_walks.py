"""From somebody else's files to a model that writes: prepare, train, be killed, resume, evaluate, generate."""

import gzip
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from taipan.data.shards import TokenDataset
from tests.cli.conftest import Cli
from tests.tokenizers import llama
from tests.training.processes.launch import environment

TEXTS = [f"Document {number}: the taipan waits; été, 日本語, 🐍." for number in range(40)]


class Start(NamedTuple):
    """A corpus, and what is to be known about it.

    Attributes:
        write: writes it into the directory `corpus`, and what else is needed beside it.
        words: after `taipan data prepare corpus`.
        said: what the command tells about it.
    """

    write: Callable[[Path], object]
    words: Sequence[str]
    said: str


def _polars(directory: Path) -> None:
    import polars

    rows = {"id": [1, 2], "body": ["first", None]}
    polars.DataFrame(rows).write_parquet(directory / "0.parquet")
    body = polars.Series("body", TEXTS, polars.Categorical())
    frame = polars.DataFrame([polars.Series("id", range(len(TEXTS))), body])
    frame.write_parquet(directory / "1.parquet", compression="zstd", row_group_size=7)


def _c4(directory: Path) -> None:
    for number, part in enumerate((TEXTS[:25], TEXTS[25:])):
        lines = (json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "x"}) for text in part)
        data = "".join(f"{line}\n" for line in lines).encode()
        (directory / f"c4-train.{number:05d}-of-00002.json.gz").write_bytes(gzip.compress(data))


def _llama(directory: Path) -> None:
    for number, text in enumerate(TEXTS):
        (directory / f"{number:02d}.txt").write_text(f"\ufeff{text}", encoding="utf-8")
    backend, end = llama()
    Path("tokenizer").mkdir()
    backend.save("tokenizer/tokenizer.json")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": end, "add_bos_token": True}
    Path("tokenizer/tokenizer_config.json").write_text(json.dumps(config))


STARTS = {
    "Polars Parquet": Start(_polars, ["--text-column", "body", "--tokenizer", "bpe:300"], "passed over: 1 null"),
    "C4's JSON lines": Start(_c4, ["--tokenizer", "bytes"], "2 files of JSON lines"),
    "Llama's tokenizer": Start(_llama, ["--tokenizer", "tokenizer"], "data/train"),
}


KILLED = """
import os, signal
from taipan.cli.display import TrainingDisplay
from taipan.cli.main import main

def stepped(self, info):
    if info.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

TrainingDisplay.stepped = stepped
main(["train", "recipe.yaml"])
"""


@pytest.mark.parametrize(
    "name", [next(iter(STARTS)), *(pytest.param(name, marks=pytest.mark.slow) for name in [*STARTS][1:])]
)
def test_from_files_to_a_model_that_writes(
    cli: Cli, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = STARTS[name]
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    start.write(Path("corpus"))
    options = ["--valid-fraction", 0.2, "--workers", 1, "--out", "data"]
    prepared = cli("data", "prepare", "corpus", *start.words, *options)
    assert prepared.code == 0, prepared.err
    assert start.said in prepared.err
    assert _texts(Path("data/train")) | _texts(Path("data/valid")) == {*TEXTS, *(["first"] if "Polars" in name else [])}

    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment(0, 1, 1), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not Path("run/model").exists()
    resumed = cli("train", "--resume", "run")
    assert resumed.code == 0, resumed.err
    assert "Going on after step 2" in resumed.err

    evaluated = cli("evaluate", "run/model", "data/valid")
    assert evaluated.code == 0, evaluated.err
    assert "bits/byte" in evaluated.out
    written = cli("generate", "run/model", "The taipan", "--max-new-tokens", 8, "--seed", 1)
    assert written.code == 0, written.err
    assert written.out.strip()


RECIPE = {
    "model": {
        "hidden_size": 16,
        "layer_types": ["mamba2", "selective_attention"],
        "intermediate_size": 16,
        "state_size": 4,
        "mamba_head_dim": 8,
        "num_attention_heads": 2,
        "sliding_window": 8,
        "chunk_size": 8,
    },
    "data": {"train": "data/train", "valid": "data/valid", "context_length": 32},
    "training": {"steps": 5, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "calibrate": False},
    "output": "run",
}


def _texts(directory: Path) -> set[str]:
    dataset = TokenDataset.open(directory)
    tokenizer = dataset.tokenizer()
    return {tokenizer.decode(dataset.document(index)[:-1].tolist()) for index in range(dataset.n_documents)}
