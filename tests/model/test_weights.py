"""The weights of a directory: in one file or in shards, and refused where nothing can compute with them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taipan import TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError
from tests.command import run
from tests.models import random_tokens, small_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.norm.weight"
THRESHOLD = "model.layers.1.mixer.gate.threshold"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256)
    model.save_pretrained(tmp_path / "model", Tokenizer.bytes())
    return tmp_path / "model"


def change(directory: Path, name: str, function: Callable[[Tensor], Tensor]) -> None:
    weights = load_file(directory / WEIGHTS)
    save_file({**weights, name: function(weights[name].clone())}, directory / WEIGHTS)


def one(value: float) -> Callable[[Tensor], Tensor]:
    def write(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return write


def text(directory: Path) -> Path:
    path = directory.parent / "text.txt"
    path.write_text("The taipan waits. " * 30)
    return path


VERBS: dict[str, Callable[[Path], list[object]]] = {
    "evaluate": lambda model: ["evaluate", model, text(model), "--json", model.parent / "out"],
    "generate": lambda model: ["generate", model, "a", "--max-new-tokens", 2, "--save-state", model.parent / "out"],
    "inspect": lambda model: ["inspect", model, text(model), "-o", model.parent / "out"],
    "calibrate": lambda model: ["calibrate", model, text(model), "--tokens", 64, "--context", 32],
    "to-mamba2": lambda model: ["convert", "to-mamba2", model, model.parent / "out"],
    "upcycle": lambda model: ["convert", "upcycle", model, model.parent / "out"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [NORM, "model.layers.0.mixer.A_log", THRESHOLD])
def test_every_verb_refuses_weights_that_are_not_finite_before_it_writes(verb: str, name: str, directory: Path) -> None:
    change(directory, name, one(float("inf") if name.endswith("A_log") else float("nan")))
    command = VERBS[verb](directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    finished = run(*command)
    assert finished.code == 2, finished
    assert f"{WEIGHTS} holds numbers that are not finite in 1 of its tensors ({name})" in " ".join(finished.err.split())
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert not (directory.parent / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "generate", "inspect", "calibrate"])
def test_finite_weights_that_overflow_are_refused_before_anything_is_written(verb: str, directory: Path) -> None:
    change(directory, EMBEDDING, lambda tensor: tensor * 1e37)
    change(directory, "model.layers.0.mixer.A_log", lambda tensor: tensor * 0 + 200)
    command = VERBS[verb](directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    finished = run(*command)
    assert finished.code == 2, finished
    assert re.search("not finite|no usable logits", " ".join(finished.err.split()))
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert not (directory.parent / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.bfloat16),
        (-float("inf"), torch.float16),
    ],
)
def test_one_number_that_is_not_finite_is_found(value: float, dtype: torch.dtype, directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    for name in weights:
        if name.endswith("gate.threshold") and value == value:
            continue
        save_file({**{key: t.to(dtype) for key, t in weights.items()}}, directory / WEIGHTS)
        change(directory, name, one(value))
        with pytest.raises(CheckpointError, match=rf"not finite in 1 of its tensors \({name}\)"):
            TaipanLM.from_pretrained(directory)


@pytest.mark.parametrize(("capacity", "threshold"), [(0.0, float("inf")), (1.0, -float("inf"))])
def test_gates_that_select_none_or_all_are_read_again(capacity: float, threshold: float, directory: Path) -> None:
    finished = run("calibrate", directory, text(directory), "--tokens", 64, "--context", 32, "--capacity", capacity)
    assert finished.code == 0, finished
    loaded = TaipanLM.from_pretrained(directory)
    assert [float(sal.gate.threshold) for sal in loaded.sals] == [threshold] * len(loaded.sals)
    assert [float(gate.rate) for gate in loaded(random_tokens(1, 8)).gates] == [capacity] * len(loaded.sals)


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        (EMBEDDING, torch.int64, rf"no weights: {EMBEDDING} is int64"),
        (NORM, torch.int32, rf"no weights: {NORM} is int32"),
        ("model.layers.0.mixer.A_log", torch.uint8, r"no weights: .*A_log is uint8"),
        (NORM, torch.bool, r"no weights: .* is bool"),
        (NORM, torch.float8_e4m3fn, r"no weights: .* is float8_e4m3fn"),
        (NORM, torch.complex64, r"no weights: .* is complex64"),
        (NORM, torch.float16, rf"mixes dtypes: {NORM} is float16, the others are float32.*--dtype float32"),
        ("model.layers.0.mixer.in_proj.weight", torch.bfloat16, r"mixes dtypes: .*in_proj.weight is bfloat16"),
        (EMBEDDING, torch.float64, rf"mixes dtypes: {EMBEDDING} is float64"),
    ],
)
def test_a_tensor_of_a_wrong_type_is_named(name: str, dtype: torch.dtype, words: str, directory: Path) -> None:
    change(directory, name, lambda tensor: tensor.to(dtype))
    with pytest.raises(CheckpointError, match=words):
        TaipanLM.from_pretrained(directory)
    if dtype.is_floating_point and dtype.itemsize > 1:  # asked for, every tensor is cast
        TaipanLM.from_pretrained(directory, dtype=torch.float32)(random_tokens(1, 3)).logits.sum()
    else:
        with pytest.raises(CheckpointError, match=words):
            TaipanLM.from_pretrained(directory, dtype=torch.float32)


def test_what_is_kept_precise_may_be_wider(directory: Path) -> None:
    model = TaipanLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    assert load_file(directory / WEIGHTS)["model.layers.0.mixer.A_log"].dtype == torch.float32
    TaipanLM.from_pretrained(directory)(random_tokens(1, 3)).logits.sum()


def test_a_head_beside_a_tied_embedding_is_never_left_out(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    save_file({**weights, "lm_head.weight": weights[EMBEDDING].clone()}, directory / WEIGHTS)
    TaipanLM.from_pretrained(directory)
    save_file({**weights, "lm_head.weight": weights[EMBEDDING] + 1}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="has a head of its own"):
        TaipanLM.from_pretrained(directory)


# ---------------------------------------------------------------------- shards


@pytest.fixture
def sharded(directory: Path) -> Path:
    """The same model as transformers writes it in shards."""
    from taipan.hf import TaipanForCausalLM

    target = directory.with_name("sharded")
    TaipanForCausalLM.from_pretrained(directory).save_pretrained(target, max_shard_size="20KB")
    Tokenizer.load(directory).save(target)
    assert len(list(target.glob("model-*.safetensors"))) >= 3
    assert not (target / WEIGHTS).exists()
    return target


def test_shards_are_read_as_the_whole(directory: Path, sharded: Path) -> None:
    whole, parts = TaipanLM.from_pretrained(directory), TaipanLM.from_pretrained(sharded)
    assert parts.fingerprint == whole.fingerprint
    tokens = random_tokens(2, 9)
    assert torch.equal(parts(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("verb", ["evaluate", "generate", "inspect", "calibrate"])
def test_every_verb_reads_shards(verb: str, sharded: Path) -> None:
    finished = run(*VERBS[verb](sharded))
    assert finished.code == 0, finished
    kept = {path.name for path in sharded.iterdir() if path.name.startswith(("model.", "model-"))}
    if verb == "calibrate":  # it writes whole weights, and nothing of the old ones is left beside them
        assert kept == {WEIGHTS}
        TaipanLM.from_pretrained(sharded)
    else:
        assert WEIGHTS not in kept


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing shard", r"model-00002-of-.*does not exist, but .*index\.json names it"),
        ("truncated shard", r"model-00002-of-.*is damaged or truncated"),
        ("exchanged shards", r"model-0000.-of-.*does not hold the tensors that .*index\.json names"),
        ("other directory", r"is in '\.\./model\.safetensors', but must name a file beside it"),
        ("no map", r"index\.json has no weight_map"),
        ("no json", r"index\.json cannot be read as JSON"),
        ("twice", r"index\.json cannot be read as JSON .*'weight_map' stands twice"),
        ("numbers", r"is in 1, but must name a file"),
        ("no tensor", rf"does not hold the tensors that .*index\.json names \({NORM}\)"),
    ],
)
def test_shards_that_are_not_whole_are_named(damage: str, words: str, sharded: Path) -> None:
    index, shards = sharded / INDEX, sorted(sharded.glob("model-*.safetensors"))
    values: dict[str, Any] = json.loads(index.read_text())
    if damage == "missing shard":
        shards[1].unlink()
    elif damage == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-10])
    elif damage == "exchanged shards":
        first = shards[0].read_bytes()
        shards[0].write_bytes(shards[1].read_bytes())
        shards[1].write_bytes(first)
    elif damage == "other directory":
        values["weight_map"][NORM] = "../model.safetensors"
    elif damage == "no map":
        del values["weight_map"]
    elif damage == "numbers":
        values["weight_map"][NORM] = 1
    elif damage == "no tensor":
        del values["weight_map"][NORM]
    index.write_text(json.dumps(values))
    if damage == "no json":
        index.write_text(index.read_text()[:-9])
    elif damage == "twice":
        index.write_text('{"weight_map": {}, ' + index.read_text()[1:])
    with pytest.raises(CheckpointError, match=words):
        TaipanLM.from_pretrained(sharded)


def test_a_directory_without_weights_is_named(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: expected model\.safetensors or .*complete"):
        TaipanLM.from_pretrained(directory)
