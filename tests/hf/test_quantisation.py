"""Quantisers of others: the linears are packed, the gates stay whole, and what cannot be is refused."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig

from taipan import TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, InputError
from taipan.evaluation import TextDocuments, evaluate
from taipan.hf import TaipanForCausalLM
from taipan.layers.linear import PreciseLinear
from tests.models import force_gates, random_tokens, small_model

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "eos_token_id": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "mamba_mlp": True,
    "gate": "mlp",
}
QUANTISERS: dict[str, Any] = {
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int8, activations too": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, **SIZES).save_pretrained(directory)
    return directory


def quantised(directory: Path, name: str) -> Any:
    return TaipanForCausalLM.from_pretrained(directory, quantization_config=QUANTISERS[name]())


def unpacked(linear: nn.Module) -> Tensor:
    """The weight that a quantised linear multiplies with."""
    weight: Any = linear.weight
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(linear, bitsandbytes.nn.Linear8bitLt):
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize()


@pytest.mark.parametrize("name", QUANTISERS)
def test_linears_are_quantised_and_gates_are_whole(name: str, directory: Path) -> None:
    """The logits are those of the native model with the weights that the packed ones mean."""
    model, like = quantised(directory, name), TaipanLM.from_pretrained(directory)
    kinds = Counter("gate" if isinstance(module, PreciseLinear) else type(module) for module in linears(model).values())
    ours = {path: module for path, module in linears(like).items() if path != "lm_head"}
    for path, module in linears(model).items():
        if path == "lm_head":
            continue
        plain = type(module.weight) is nn.Parameter and module.weight.is_floating_point()
        assert plain == (".gate." in path), f"{path} is a {type(module.weight).__name__}"
        if ".gate." in path:
            assert torch.equal(module.weight, ours[path].weight)
        else:
            assert not torch.equal(unpacked(module), ours[path].weight)
            ours[path].weight.data = unpacked(module).float()
    assert kinds["gate"] == 4
    tokens = random_tokens(2, 19)
    seen, expected = model(tokens, labels=tokens), like(tokens, labels=tokens)
    # 8 bit: bitsandbytes and torchao round the activations as well
    tolerance = 0.05 if "8" in name and name != "torchao int8" else 1e-3
    assert float((seen.logits - expected.logits).abs().max()) < tolerance * float(expected.logits.abs().max())
    assert float(seen.cross_entropy) == pytest.approx(float(expected.cross_entropy), rel=tolerance)
    for gate, theirs in zip(seen.gates, expected.gates, strict=True):
        assert float(gate.rate) == pytest.approx(float(theirs.rate), abs=0.06)
    assert model.generate(tokens[:, :5], max_new_tokens=4, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize("name", QUANTISERS)
def test_no_token_selected(name: str, tmp_path: Path) -> None:
    native = small_model(dtype=torch.float32, **SIZES)
    force_gates(native, margin=-9.0)
    native.save_pretrained(tmp_path)
    model = quantised(tmp_path, name)
    tokens = random_tokens(2, 5)
    output = model(tokens, labels=tokens)
    assert [float(gate.rate) for gate in output.gates] == [0.0, 0.0]
    assert output.logits.isfinite().all()
    assert output.loss.isfinite()


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantised_directory_is_loaded_again_and_refused_by_the_native_face(
    name: str, directory: Path, tmp_path: Path
) -> None:
    model, tokens = quantised(directory, name), random_tokens(2, 19)
    model.save_pretrained(tmp_path)
    again = TaipanForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(CheckpointError, match=r"are quantised \('(bitsandbytes|torchao)'\), which only transformers"):
        TaipanLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [name for name in QUANTISERS if "activations" not in name])
def test_adapters_over_quantised_linears_learn(name: str, directory: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(quantised(directory, name), LoraConfig(target_modules=["q_proj", "o_proj", "in_proj"]))
    tokens = random_tokens(2, 19)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    moved = {path: float(p.grad.abs().sum()) for path, p in model.named_parameters() if "lora_B" in path}
    assert moved
    assert all(value > 0 for value in moved.values()), moved


def test_training_through_products_without_a_gradient_is_refused(directory: Path) -> None:
    model, tokens = quantised(directory, "torchao int8, activations too"), random_tokens(2, 19)
    with pytest.raises(
        InputError, match=r"layers\.0\.mixer\.in_proj\.weight is quantised together with its activations"
    ):
        model.train()(tokens, labels=tokens)
    with torch.no_grad():
        model(tokens, labels=tokens)


@pytest.mark.parametrize("settings", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_torchao_on_the_native_model(settings: Any, directory: Path, tmp_path: Path) -> None:
    model, tokens = TaipanLM.from_pretrained(directory), random_tokens(2, 19)
    before = model(tokens, labels=tokens)
    whole = copy.deepcopy(model)
    quantize_(model, settings())
    for path, module in linears(model).items():
        assert (type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor) == (".gate." in path), path
    after = model(tokens, labels=tokens)
    assert float(after.loss) == pytest.approx(float(before.loss), rel=0.01)
    assert model.generate(tokens[:, :5], max_new_tokens=4).shape == (2, 9)
    documents = TextDocuments(["def f(x):", "import os"], Tokenizer.bytes())
    assert evaluate(model, documents).nats_per_token == pytest.approx(
        evaluate(whole, documents).nats_per_token, rel=0.01
    )
    with pytest.raises(CheckpointError, match=r"are no plain tensors \(Int8Tensor\), which a model directory cannot"):
        model.save_pretrained(tmp_path / "no")


def linears(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
