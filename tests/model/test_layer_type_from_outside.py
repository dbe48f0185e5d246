"""CONTRIBUTING's "Adding a layer type" is enough: a mixer from outside trains, decodes, saves, loads, is counted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from taipan import DecoderState, TaipanConfig, TaipanLM
from taipan.accounting import flops_per_token, parameter_count, state_bytes
from taipan.benchmark.bandwidth import bytes_per_token
from taipan.benchmark.linears import linears
from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, StateError
from taipan.generation.decoding import start_decoding
from taipan.hf import TaipanForCausalLM
from taipan.layers.registry import register, unregister
from taipan.planning import activation_bytes, hidden_matrix_parameters
from taipan.training.recipe import Recipe
from taipan.training.run.loop import train
from tests.model.average import Average, AverageTable
from tests.models import random_tokens, small_config, small_model

KIND = "average"
STACK = (KIND, "selective_attention", "mamba2", KIND)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(KIND, AverageTable(), Average)
    yield
    unregister(KIND)


def test_it_is_counted() -> None:
    config = small_config(STACK)
    model = TaipanLM(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(config, 100, batch=3) == model.empty_state(3).nbytes
    one, two = small_config((KIND,)), small_config((KIND, KIND))
    matrices = 2 * 24 * 24 + 3 * 24 * 20  # its own and its MLP's
    assert hidden_matrix_parameters(two) - hidden_matrix_parameters(one) == matrices
    assert flops_per_token(two, 64) - flops_per_token(one, 64) == 2 * matrices
    assert activation_bytes(one, 0, 64, narrow=4) > 0
    found = linears(model, torch.float32, rows=8, head_rows=8, selected={1: 2})
    assert [layer.rows for layer in found if layer.name.startswith("layers.0.")] == [8] * 5
    state = model.eval()(random_tokens(1, 5)).state
    states = state.layers[0].bytes_per_token
    assert states == 2 * 24 * 4
    assert bytes_per_token(model, state) > states


@torch.no_grad()
def test_any_split_is_the_whole_with_padding_and_documents() -> None:
    model = small_model(STACK)
    tokens = random_tokens(2, 20)
    documents = torch.tensor([[0] * 9 + [1] * 11, [4] * 3 + [5] * 17])
    whole = model(tokens, segment_ids=documents)
    state, logits = None, []
    for begin, end in ((0, 4), (4, 5), (5, 20)):
        output = model(tokens[:, begin:end], state=state, segment_ids=documents[:, begin:end])
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits)
    padded = torch.cat([torch.zeros_like(tokens[:, :3]), tokens], 1)
    mask = torch.ones_like(padded).index_fill_(1, torch.arange(3), 0)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], model(tokens).logits)


def test_it_trains_and_its_run_ends_in_a_model(tmp_path: Path) -> None:
    documents = [Document(f"{i}", "a taipan selects what it attends to, and averages the rest. " * 4) for i in range(4)]
    prepare(documents, Tokenizer.bytes(), tmp_path / "data")
    recipe: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": [KIND, "selective_attention"],
            "num_attention_heads": 2,
            "sliding_window": 16,
        },
        "data": {"train": str(tmp_path / "data"), "context_length": 32},
        "optimizer": {"name": "muon", "learning_rate": 1e-2},
        "training": {"steps": 12, "batch_size": 4, "checkpoint_every": 6, "threads": 1, "recompute": True},
        "output": str(tmp_path / "run"),
    }
    result = train(Recipe.from_dict(recipe))
    assert result.step == 12
    loaded = TaipanLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.layer_types == (KIND, "selective_attention")
    untrained = TaipanLM(loaded.config).eval()
    tokens = torch.tensor([Tokenizer.bytes().encode(documents[0].text)])
    with torch.no_grad():
        before, after = (float(model(tokens, labels=tokens).cross_entropy) for model in (untrained, loaded))
    assert after < before - 0.5


def test_it_decodes_saves_and_loads_in_both_faces(tmp_path: Path) -> None:
    model = small_model(STACK, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    again = TaipanLM.from_pretrained(tmp_path / "model")
    tokens = random_tokens(2, 12)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.generate(tokens, max_new_tokens=5).shape == (2, 17)
    assert start_decoding(again, again.empty_state(2)).implementation == "model"  # no native counterpart
    face = cast(Any, TaipanForCausalLM.from_pretrained(tmp_path / "model")).eval()
    assert torch.equal(face(input_ids=tokens).logits, model(tokens).logits)

    state = model(tokens).state
    state.save(tmp_path / "state", model)
    loaded = DecoderState.load(tmp_path / "state", model)
    for name, tensor in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    tensors = load_file(tmp_path / "state")
    tensors["layers.0.mean_BD"] = tensors["layers.0.mean_BD"][:, :5].contiguous()
    save_file(tensors, tmp_path / "other", {"format": "taipan-state-3", "model": model.fingerprint})
    with pytest.raises(StateError, match=r"layers\.0\.mean_BD"):
        DecoderState.load(tmp_path / "other", model)


def test_a_name_is_one_layer_type() -> None:
    with pytest.raises(ConfigError, match="'average' is there already"):
        register(KIND, AverageTable(), Average)
    with pytest.raises(ConfigError, match=r"layer_types\[1\] is 'averge'.*did you mean 'average'.*imported"):
        TaipanConfig(vocab_size=10, hidden_size=8, layer_types=(KIND, "averge"))
