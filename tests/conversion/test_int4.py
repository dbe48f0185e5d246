"""Rounding to 4 bits by what products lose, and what is done with such a model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import taipan
from taipan import TaipanLM
from taipan.conversion.gguf import to_gguf
from taipan.conversion.int4 import quantise_directory, quantise_model, rounded
from taipan.conversion.upcycling import upcycle_directory
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, InputError
from taipan.evaluation import evaluate
from taipan.evaluation.documents import TextDocuments
from taipan.generation import start_decoding
from taipan.generation.decoding import ModelDecoding
from taipan.layers.int4 import Int4Linear, quantise
from taipan.native import library
from tests.compilers import needs_kernels
from tests.models import EVERY_LAYER_TYPE, random_tokens, small_model
from tests.tolerance import relative_error

TEXT = "It was the best of times, it was the worst of times. " * 40


def test_products_lose_less_than_by_the_nearest_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator)
    mixing = torch.randn(20, 160, generator=generator)  # inputs that go together, as those of a text do
    x = torch.randn(4000, 20, generator=generator) @ mixing + 0.3 * torch.randn(4000, 160, generator=generator)
    packed, dense = rounded(weight, x.T @ x)
    assert packed.dense().equal(dense)
    lost = [float((x @ (each - weight).T).norm()) for each in (dense, quantise(weight).dense())]
    assert lost[0] < 0.75 * lost[1]


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_a_rounded_model_decodes_as_it_is(tied: bool) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": tied}
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float32, **sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantise_model(model, [random_tokens(2, 60)])
    assert model.in_int4
    kept = {name for name, tensor in model.state_dict().items() if name in before and tensor.equal(before[name])}
    assert all(name in kept for name in before if ".gate.proj" in name or "norm" in name or name.endswith("A_log"))
    assert not any(name.endswith(("in_proj.weight", "lm_head.weight", "embed_tokens.weight")) for name in kept)
    state = model.empty_state(1)
    native, plain = start_decoding(model, state), ModelDecoding(model, state)
    assert native.implementation == "native"
    for t in range(8):
        token_B = random_tokens(1, 1, seed=t)[:, 0]
        assert relative_error(native.step(token_B), plain.step(token_B).double()) < 8e-4


def test_without_tokens_there_is_nothing_to_go_by() -> None:
    with pytest.raises(InputError, match="at least one text"):
        quantise_model(small_model("mamba2"), [])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tokenizer, and the same in 4 bits."""
    directory = tmp_path_factory.mktemp("int4")
    tokenizer = Tokenizer.bytes()
    model = small_model("taipan", dtype=torch.float32, vocab_size=tokenizer.vocab_size, hidden_size=64)
    model.save_pretrained(directory / "whole", tokenizer)
    read = quantise_directory(directory / "whole", directory / "int4", [TEXT[:900], TEXT[900:]], tokens=1200)
    assert read == 1024
    return directory / "whole", directory / "int4"


def test_it_is_saved_and_opened_by_memory_map(directories: tuple[Path, Path], tmp_path: Path) -> None:
    _, packed = directories
    raw = (packed / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    names = json.loads(raw[8 : 8 + header])
    begins = [8 + header + value["data_offsets"][0] for name, value in names.items() if name.endswith(".levels")]
    assert begins
    assert all(begin % 64 == 0 for begin in begins)
    model = TaipanLM.from_pretrained(packed)
    assert isinstance(model.lm_head, Int4Linear)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        address, path = model.lm_head.levels.data_ptr(), str(packed / "model.safetensors")
        held = [line.split()[0].split("-") for line in mapped.read_text().splitlines() if line.endswith(path)]
        assert any(int(begin, 16) <= address < int(end, 16) for begin, end in held)
    model.save_pretrained(tmp_path / "again")
    again = TaipanLM.from_pretrained(tmp_path / "again")
    tensors = again.state_dict()
    assert all(tensor.equal(tensors[name]) for name, tensor in model.state_dict().items())
    assert again.fingerprint == model.fingerprint


@pytest.fixture(params=["with kernels", "without"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "without":
        monkeypatch.setenv(library.SWITCH, "0")
    library._status.cache_clear()
    yield
    monkeypatch.undo()
    library._status.cache_clear()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_verb_reads_it(directories: tuple[Path, Path], dtype: str) -> None:
    whole, packed = (taipan.load(directory, dtype=dtype) for directory in directories)
    plain = taipan.load(directories[0], dtype=dtype)
    tensors = plain.model.state_dict()
    for name, module in packed.model.named_modules():
        if isinstance(module, Int4Linear):
            tensors[f"{name}.weight"].copy_(module.packed.dense())
    text = TEXT[:300]
    assert packed.score(text).bits == pytest.approx(plain.score(text).bits, rel=2e-6 if dtype == "float32" else 2e-3)
    assert packed.score(text).bits != whole.score(text).bits
    assert packed.generate("It was", do_sample=False, max_new_tokens=12)
    result = evaluate(packed.model, TextDocuments([text], packed.tokenizer))
    assert result.nats == pytest.approx(packed.score(text).nats, rel=1e-5 if dtype == "float32" else 1e-2)


def test_a_cast_changes_what_is_not_in_4_bits(directories: tuple[Path, Path]) -> None:
    model = TaipanLM.from_pretrained(directories[1])
    ids = random_tokens(1, 9)
    before = model(ids).logits
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith((".levels", ".scale"))}
    model.double()
    assert model.model.norm.weight.dtype == torch.float64
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in kept.items())
    assert model(ids).logits.dtype == torch.float64
    torch.testing.assert_close(model(ids).logits.float(), before, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        token_B = ids[0, :1]
        native, plain = (start(model, model.empty_state(1)) for start in (start_decoding, ModelDecoding))
        bound = 8e-4 if dtype == torch.float64 else 0.05
        assert relative_error(native.step(token_B), plain.step(token_B).double()) < bound


def test_what_cannot_be_done_with_it_is_said(directories: tuple[Path, Path], tmp_path: Path) -> None:
    _, packed = directories
    for refused in (
        lambda: quantise_directory(packed, tmp_path / "a", [TEXT]),
        lambda: upcycle_directory(packed, tmp_path / "b", every=2),
        lambda: to_gguf(packed, tmp_path / "c.gguf"),
    ):
        with pytest.raises(CheckpointError, match=r"in 4 bits, for reading only.*quantised from"):
            refused()
    with pytest.raises(ConfigError, match="kept in int4"):
        taipan.load(packed).generate("It", weights="int8", max_new_tokens=1)
    with pytest.raises(CheckpointError, match="not an empty directory"):
        quantise_directory(directories[0], packed, [TEXT])
    with pytest.raises(InputError, match="at least 512"):
        quantise_directory(directories[0], tmp_path / "d", ["short"])


def damaged(directory: Path, target: Path, config: dict[str, Any] | None, change: Any) -> Path:
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if config is not None:
        values = json.loads((target / "config.json").read_text())
        values["quantization_config"] |= config
        (target / "config.json").write_text(json.dumps(values))
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".scale"))
    save_file({**tensors, name: change(tensors[name])}, target / "model.safetensors")
    return target


def test_damage_is_said(directories: tuple[Path, Path], tmp_path: Path) -> None:
    _, packed = directories
    for number, (config, change, message) in enumerate(
        [
            ({"group_size": 32}, lambda t: t, "quantised in another way"),
            (None, lambda t: t * float("nan"), "is damaged"),
            (None, lambda t: t.float(), "is damaged"),
            (None, lambda t: t[:-1].contiguous(), "does not fit"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            TaipanLM.from_pretrained(damaged(packed, tmp_path / str(number), config, change))
