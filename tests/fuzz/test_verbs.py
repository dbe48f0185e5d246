"""Every verb but the readers of data, on recipes, configurations, weights, states and runs that are nearly right.

Data are read in `test_readers`; the harness is that of both.
"""

import random
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from tests.command import run
from tests.fuzz.harness import RAW_VALUES, Subject, bytes_changed, fuzz, json_changed, json_lines_changed
from tests.models import small_model

RECIPE = """\
model:
  preset: taipan-tiny
  hidden_size: 16
  intermediate_size: 16
  state_size: 4
  mamba_head_dim: 8
  num_attention_heads: 2
  layer_types: [mamba2, selective_attention]
  time_step_limit: [0, null]
  A_init_range: [1, 16]
data:
  train: data
  context_length: 16
  packing: documents
optimizer: {name: adamw, learning_rate: 1e-3, betas: [0.9, 0.95], clip: 1.0}
schedule: {kind: cosine, warmup: 0.1}
training:
  steps: 2
  batch_size: 2
  seed: 0
  dtype: float32
  checkpoint_every: 1
  calibrate: false
  trackers: []
parallel: {strategy: auto}
output: run
"""
TEXT = "The taipan waits; été, 日本語. " * 20
YAML_VALUES = (
    *RAW_VALUES[:23],
    *("010", "1:30", "2024-01-01", "1e-3", "0x10", ".nan", ".inf", "-.inf", "yes", "~", "!!int x", "!!python/none x"),
    *(
        "*a",
        "&a [*a]",
        "{a: 1, a: 2}",
        "[1, 2, 3]",
        "{<<: 1}",
        "|",
        ">",
        "? a",
        "- a",
        "@",
        "`",
        "%",
        "\t",
        "é",
        "'",
        '"',
    ),
    *("9" * 5000, "[" * 5000, "{a: " * 5000, f"'{'y' * 70_000}'", "mamba2", "sgd", "7", "24", "0.5", "1.5", "-3"),
)


def anything(work: Path, file: Path) -> str:
    """What a message must hold where it names the key of a recipe, not the file."""
    return ""


def yaml_changed(data: bytes, draw: random.Random) -> bytes:
    """A value of a recipe becomes another one, or a line is left out, repeated, renamed or moved."""
    lines = data.decode().splitlines(keepends=True)
    place = draw.randrange(len(lines))
    line = lines[place]
    kind = draw.choice(("value", "value", "value", "value", "drop", "twice", "rename", "indent", "swap"))
    values = list(re.finditer(r"(?<=[:\[,] )[^\s,\]}{\[]+", line))
    if kind == "value" and values:
        found = draw.choice(values)
        lines[place] = line[: found.start()] + draw.choice(YAML_VALUES) + line[found.end() :]
    elif kind == "drop":
        del lines[place]
    elif kind == "twice":
        lines.insert(draw.randrange(len(lines)), line)
    elif kind == "rename":
        lines[place] = line.replace(":", draw.choice(("x:", ";", "", " :", ": :", ":\t")), 1)
    elif kind == "indent":
        lines[place] = draw.choice((" ", "  ", "\t", "- ")) + line
    else:
        other = draw.randrange(len(lines))
        lines[place], lines[other] = lines[other], line
    return "".join(lines).encode()


# ---------------------------------------------------------------------- valid inputs, made once


@cache
def made() -> Path:
    """Models, a data set, a state and two finished runs, to copy from."""
    place = Path(mkdtemp(prefix="taipan-fuzz-"))
    values = {"vocab_size": 257, "eos_token_id": 256}
    small_model(dtype=torch.float32, **values).save_pretrained(place / "model", Tokenizer.bytes())
    small_model("mamba2", dtype=torch.float32, **values).save_pretrained(place / "mamba2", Tokenizer.bytes())
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for words in (
        ["data", "prepare", place / "text.txt", "--out", place / "data", "--workers", 1],
        ["generate", place / "model", "abc", "--max-new-tokens", 1, "--save-state", place / "state.safetensors"],
        ["convert", "to-mamba2", place / "mamba2", place / "foreign"],
        ["session", "read", place / "model", place / "text.txt", "-o", place / "session"],
        *(
            ["train", place / "recipe.yaml", "-o", f"output={place}/{name}", "-o", f"data.train={place}/data"]
            for name in ("runs/a", "runs/b")
        ),
    ):
        finished = run(*words)
        assert finished.code == 0, finished
    return place


def copied(*names: str, mutated: Sequence[str]) -> Callable[[Path], list[Path]]:
    def make(directory: Path) -> list[Path]:
        for name in names:
            source, target = made() / name, directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        return [path for pattern in mutated for path in sorted(directory.glob(pattern))]

    return make


def model_verb(name: str, *words: object, directory: str = "model") -> list[Subject]:
    """A verb of a model directory: its configuration changed, and its weights."""

    def command(work: Path) -> list[object]:
        return [word.format(work=work) if isinstance(word, str) else word for word in words]

    def named(work: Path, file: Path) -> str:
        return str(work / directory)

    configuration = copied(directory, "text.txt", mutated=[f"{directory}/config.json"])
    weights = copied(directory, "text.txt", mutated=[f"{directory}/*.safetensors"])
    return [
        Subject(f"{name}, configuration", configuration, command, [json_changed, json_changed, bytes_changed], named),
        Subject(f"{name}, weights", weights, command, [bytes_changed], named),
    ]


def record_changed(data: bytes, draw: random.Random) -> bytes:
    """A value of a JSON document changed, or bytes of any file."""
    return draw.choice((json_changed, bytes_changed) if data[:1] == b"{" else (bytes_changed,))(data, draw)


LIMITS = [f"-o{key}={value}" for key, value in {"training.steps": 1, "training.sample_every": "null"}.items()]

SUBJECTS = [
    Subject(
        "train",
        copied("recipe.yaml", "data", mutated=["recipe.yaml"]),
        lambda work: ["train", work / "recipe.yaml", *LIMITS, f"-odata.train={work}/data", f"-ooutput={work}/run"],
        [yaml_changed],
        anything,
    ),
    Subject(
        "plan",
        copied("recipe.yaml", mutated=["recipe.yaml"]),
        lambda work: ["plan", work / "recipe.yaml", "--gpus", 2, "-o", "training.batch_size=2"],
        [yaml_changed, yaml_changed, bytes_changed],
        anything,
    ),
    Subject(
        "resume",
        copied("runs/a", "data", mutated=["runs/a/recipe.yaml"]),
        lambda work: ["train", "--resume", work / "runs/a"],
        [yaml_changed],
        anything,
    ),
    Subject(
        "resume, records",
        copied(
            "runs/a", mutated=["runs/a/run.json", "runs/a/checkpoints/*/*.json", "runs/a/checkpoints/*/optimizer/*"]
        ),
        lambda work: ["train", "--resume", work / "runs/a"],
        [record_changed],
        anything,
    ),
    Subject(
        "resume, metrics",
        copied("runs/a", "data", mutated=["runs/a/metrics.jsonl"]),
        lambda work: ["train", "--resume", work / "runs/a"],
        [json_lines_changed, bytes_changed],
        anything,
    ),
    *(
        Subject(
            f"{name}, {file}",
            copied("runs", mutated=[f"runs/a/{file}"]),
            command,
            mutators,
            anything,
        )
        for name, command in {
            "runs": lambda work: ["runs", work / "runs"],
            "runs as JSON": lambda work: ["runs", work / "runs", "--json"],
            "runs compared": lambda work: ["runs", work / "runs/a", work / "runs/b"],
        }.items()
        for file, mutators in {
            "recipe.yaml": [yaml_changed, bytes_changed],
            "run.json": [json_changed, bytes_changed],
            "metrics.jsonl": [json_lines_changed, bytes_changed],
        }.items()
    ),
    *model_verb("generate", "generate", "{work}/model", "abc", "--max-new-tokens", 2),
    *model_verb("evaluate", "evaluate", "{work}/model", "{work}/text.txt", "--json", "{work}/result.json"),
    *model_verb("inspect", "inspect", "{work}/model", "{work}/text.txt", "-o", "{work}/page.html"),
    *model_verb("calibrate", "calibrate", "{work}/model", "{work}/text.txt", "--tokens", 32, "--context", 16),
    *model_verb("to-mamba2", "convert", "to-mamba2", "{work}/mamba2", "{work}/out", directory="mamba2"),
    *model_verb("from-mamba2", "convert", "from-mamba2", "{work}/foreign", "{work}/out", directory="foreign"),
    *model_verb("upcycle", "convert", "upcycle", "{work}/mamba2", "{work}/out", "--every", 1, directory="mamba2"),
    Subject(
        "generate, state",
        copied("model", "state.safetensors", mutated=["state.safetensors"]),
        lambda work: [
            "generate",
            work / "model",
            "a",
            "--max-new-tokens",
            1,
            "--load-state",
            work / "state.safetensors",
        ],
        [bytes_changed],
    ),
]


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_verb_takes_a_file_or_says_what_is_wrong(subject: Subject, tmp_path: Path) -> None:
    fuzz(subject, range(-(-100 // len(SUBJECTS))), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_verb_takes_any_file_or_says_what_is_wrong(subject: Subject, tmp_path: Path) -> None:
    fuzz(subject, range(-(-2000 // len(SUBJECTS))), tmp_path)
