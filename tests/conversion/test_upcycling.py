"""Upcycling: nothing is lost of what Mamba-2 knew, and everything new can learn."""

from pathlib import Path

import pytest
import torch

from taipan.config import TaipanConfig
from taipan.conversion.upcycling import upcycle, upcycle_directory, upcycled_config
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError
from taipan.model import TaipanLM, load_tokenizer
from tests.models import random_tokens, small_model

DEPTH = 5


def mamba2(**overrides: object) -> TaipanLM:
    return small_model(("mamba2",) * DEPTH, dtype=torch.float32, **overrides)


def upcycled(model: TaipanLM, **options: object) -> TaipanLM:
    """With gates that decide: about half of the tokens are selected."""
    new = upcycle(model, **{"every": 2, "generator": torch.Generator().manual_seed(1), **options})
    with torch.no_grad():
        for sal in new.sals:
            sal.gate.proj.weight.mul_(4)
    return new


@pytest.mark.parametrize("gradient", ["dense", "gathered"])
@pytest.mark.parametrize("overrides", [{}, {"mamba_mlp": True}, {"tie_word_embeddings": False}])
def test_the_first_forward_is_that_of_mamba2_bit_by_bit(overrides: dict[str, object], gradient: str) -> None:
    model = mamba2(**overrides)
    new = upcycled(model, gate_gradient=gradient)
    assert new.config.layer_types == (*("mamba2", "mamba2", "selective_attention") * 2, "mamba2")
    tokens = random_tokens(2, 40)
    segments = (torch.arange(40) // 13).expand(2, 40)
    expected = model(tokens, segment_ids=segments).logits
    for progress, training in ((0.0, False), (0.0, True), (1.0, True)):
        new.train(training).set_progress(progress)
        output = new(tokens, segment_ids=segments)
        assert torch.equal(output.logits, expected)
        assert all(0.1 < gate.rate < 0.95 for gate in output.gates)  # not because nothing was selected


def test_token_by_token_it_is_mamba2_too() -> None:
    model = mamba2()
    new = upcycled(model)
    tokens, state, expected = random_tokens(1, 6), None, None
    for time in range(6):
        mine, theirs = new(tokens[:, time : time + 1], state), model(tokens[:, time : time + 1], expected)
        assert torch.equal(mine.logits, theirs.logits)
        state, expected = mine.state, theirs.state


def test_gradients_reach_the_new_outputs_in_the_first_step_and_everything_in_the_second() -> None:
    new = upcycled(mamba2()).train()
    tokens = random_tokens(4, 40)
    optimizer = torch.optim.SGD(new.parameters(), lr=1e-2)
    reached: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        new(tokens, labels=tokens).loss.backward()
        reached.append(
            {
                name
                for name, parameter in new.named_parameters()
                if parameter.grad is not None and bool(parameter.grad.ne(0).any())
            }
        )
        optimizer.step()
    fresh = {name for name, _ in new.named_parameters() if name.split(".")[:3] in (["model", "layers", "2"],)}
    assert {"model.layers.2.mixer.o_proj.weight", "model.layers.2.mlp.down_proj.weight"} <= reached[0]
    assert {name for name in fresh if ".gate." in name} <= reached[0]  # through the budget
    assert reached[1] == {name for name, _ in new.named_parameters()}


def test_it_learns_past_mamba2_what_only_attention_can_tell() -> None:
    """Nothing but the new layers may move: what is learned, they learn."""
    new = upcycled(mamba2(), every=5, sliding_window=64).train()
    half = random_tokens(16, 24, seed=5)
    tokens = torch.cat([half, half], 1)  # the second half is to be copied
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(".layers.5." in name)
    optimizer = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for step in range(60):
        new.set_progress(step / 60)
        optimizer.zero_grad()
        output = new(tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        losses.append(output.cross_entropy.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_shapes_are_those_of_the_presets() -> None:
    for size, depth in (("190m", 18), ("450m", 36), ("1.3b", 30)):
        taipan = TaipanConfig.preset(f"taipan-{size}")
        config = upcycled_config(TaipanConfig.preset(f"mamba2-{size}", layer_types=["mamba2"] * depth))
        assert config == taipan.replace(refinement="add", intermediate_size=config.intermediate_size)


def test_what_cannot_be_upcycled_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"has selective_attention too"):
        upcycled_config(small_model("taipan").config)
    with pytest.raises(ConfigError, match=r"every is 6, but must be between 1 and the 5 layers"):
        upcycled_config(mamba2().config, every=6)
    with pytest.raises(ConfigError, match="Unknown model setting"):
        upcycled_config(mamba2().config, every=2, sliding_windw=3)
    with pytest.raises(ConfigError, match=r"state_size would change the weights that are to be kept"):
        upcycle(mamba2(), every=2, state_size=4)


def test_a_directory_becomes_a_directory_with_its_tokenizer(tmp_path: Path) -> None:
    model = mamba2(vocab_size=257, eos_token_id=256)
    model.save_pretrained(tmp_path / "mamba2", Tokenizer.bytes())
    config = upcycle_directory(tmp_path / "mamba2", tmp_path / "taipan", every=3, seed=7, sliding_window=9)
    new = TaipanLM.from_pretrained(tmp_path / "taipan")
    assert new.config == config
    assert config.sliding_window == 9
    assert load_tokenizer(tmp_path / "taipan", new.config).eos_id == 256
    tokens = random_tokens(2, 20)
    assert torch.equal(new(tokens).logits, model(tokens).logits)
    again = upcycle(model, every=3, generator=torch.Generator().manual_seed(7), sliding_window=9)
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(CheckpointError, match="not an empty directory"):
        upcycle_directory(tmp_path / "mamba2", tmp_path / "taipan")
