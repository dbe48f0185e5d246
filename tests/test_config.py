"""Configuration: presets, matched sizes, and errors for people."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan import TaipanConfig, TaipanLM
from taipan.accounting import flops_per_token, parameter_count
from taipan.errors import CheckpointError, ConfigError, InputError, TaipanError
from tests.models import STACKS, VARIANTS, force_gates, random_tokens, small_config, small_model


@pytest.mark.parametrize("size", ["190m", "450m", "1.3b"])
def test_baselines_have_the_parameters_of_taipan(size: str) -> None:
    target = parameter_count(TaipanConfig.preset(f"taipan-{size}"))
    for family in ("transformer", "mamba2", "jamba"):
        count = parameter_count(TaipanConfig.preset(f"{family}-{size}"))
        assert abs(count / target - 1) < 0.03, (family, size, count, target)


def test_the_share_of_a_preset_is_bounded_over_one_window() -> None:
    found = {name: TaipanConfig.preset(name) for name in TaipanConfig.presets() if name.startswith("taipan")}
    assert {name: config.capacity_window for name, config in found.items()} == {
        name: config.sliding_window for name, config in found.items()
    }
    assert found["taipan-tiny"].capacity_window == 256
    assert TaipanConfig.preset("taipan-tiny", setting="gumbel").capacity_window == 0


@pytest.mark.parametrize("name", TaipanConfig.presets())
def test_parameter_count_is_that_of_the_built_model(name: str) -> None:
    config = TaipanConfig.preset(name)
    with torch.device("meta"):
        model = TaipanLM(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_of_every_switch(stack: str, variant: str) -> None:
    for tie in (True, False):
        config = small_config(stack, tie_word_embeddings=tie, **VARIANTS[variant])
        assert parameter_count(config) == sum(p.numel() for p in TaipanLM(config).parameters())


@pytest.mark.parametrize("length", [64, 200])
@pytest.mark.parametrize("stack", STACKS)
def test_flops_are_those_of_the_matrix_products(stack: str, length: int) -> None:
    """PyTorch's counter sees the products of the linears and of the scan; the attended pairs are counted here."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config(stack, hidden_size=64, mamba_head_dim=16, state_size=16, intermediate_size=160)
    model = TaipanLM(config, implementation="portable").eval()
    force_gates(model, margin=5.0)
    config = config.replace(attention_capacity=1.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_tokens(1, length)).logits  # noqa: B018
    products = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    counted = sum(flops for op, flops in products.items() if "mm" in op)
    for kind in config.layer_types:
        window = {"mamba2": 0, "full_attention": length}.get(kind, config.sliding_window)
        pairs = sum(min(query + 1, window) for query in range(length))
        counted += 4 * config.num_attention_heads * config.head_dim * pairs
    # a row's first chunk needs no state from before, which the formula leaves out of account
    assert flops_per_token(config, length) * length == pytest.approx(counted, rel=0.03)
    assert flops_per_token(config, length, training=True) == 3 * flops_per_token(config, length)
    forecasts = config.replace(gate_objective="gain", budget_control="threshold", gain_rows=0.25)
    passes = 3.5 if "selective_attention" in config.layer_types else 3  # two forwards of a quarter of the rows
    assert flops_per_token(forecasts, length, training=True) == passes * flops_per_token(config, length)
    flipped = forecasts.replace(gain_measure="flipped", gain_flips=0.1)
    again = flops_per_token(flipped, length, training=True) - 3 * flops_per_token(config, length)
    if passes == 3:
        assert again == 0
    else:  # without the first layer, with a tenth of the head for each of two gates, less a hundredth, twice
        first, head = config.replace(layer_types=("mamba2",)), 2 * config.vocab_size * config.hidden_size
        layers = flops_per_token(config, length) - flops_per_token(first, length)
        assert again == pytest.approx(0.25 * (layers + 2 * 0.19 * head))


def test_selected_share_decides_what_attention_costs() -> None:
    base = TaipanConfig.preset("taipan-190m")
    cost = [flops_per_token(base.replace(attention_capacity=c), 8192) for c in (1e-9, 0.15, 1.0)]
    assert cost[0] < cost[1] < cost[2]
    assert (cost[1] - cost[0]) / (cost[2] - cost[0]) == pytest.approx(0.15)
    closed = flops_per_token(base.replace(attention_capacity=0.0), 8192)
    assert closed < cost[0]  # no keys and values either


@pytest.mark.parametrize("name", TaipanConfig.presets())
def test_dictionary_round_trip(name: str) -> None:
    config = TaipanConfig.preset(name)
    assert TaipanConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 5}, r"num_attention_heads is 5, but must be a divisor of hidden_size = 24"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3.*divisor of num_attention_heads = 2"),
        ({"mamba_head_dim": 7}, r"mamba_head_dim is 7.*divisor of expand × hidden_size = 48"),
        ({"n_groups": 4}, r"n_groups is 4.*divisor of the number of Mamba-2 heads, 6"),
        ({"sliding_window": 0}, r"sliding_window is 0.*at least 1"),
        ({"attention_capacity": 1.2}, r"attention_capacity is 1.2.*between 0 and 1"),
        ({"attention_capacity": -0.1}, r"attention_capacity is -0.1.*between 0 and 1"),
        ({"layer_types": ()}, r"layer_types is empty"),
        ({"window_unit": "selected"}, r"window_unit is 'selected'.*Set key_value_scope='selected'"),
        ({"gumbel_temperature": 0.0}, r"gumbel_temperature is 0.0, but must be above 0"),
        ({"budget_anneal": (0.6, 0.2)}, r"budget_anneal is \(0.6, 0.2\).*0 ≤ begin ≤ until ≤ 1"),
        ({"intermediate_size": 0}, r"intermediate_size is 0.*at least 1"),
        ({"hidden_size": 0}, r"hidden_size is 0.*at least 1"),
        ({"eos_token_id": 61}, r"eos_token_id is 61.*below vocab_size = 61"),
        ({"attention_head_dim": 5}, r"attention_head_dim is 5.*even for RoPE"),
    ],
)
def test_impossible_values_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config("taipan", **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer_types": ["mamba"]}, "layer_types[0] is 'mamba', but must be one of mamba2, "),
        ({"layer_types": ["mamba"]}, "(did you mean 'mamba2'?)"),
        ({"key_value_scope": "select"}, "key_value_scope is 'select', but must be one of all, selected (did"),
        ({"key_value_scope": "select"}, "(did you mean 'selected'?)"),
    ],
)
def test_misspelt_choices_get_a_suggestion(overrides: dict[str, Any], message: str) -> None:
    """In a process of its own: here the live type checks would refuse the value before the configuration does."""
    code = f"from taipan import TaipanConfig; TaipanConfig.preset('taipan-tiny', **{overrides!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "taipan.errors.ConfigError" in result.stderr.splitlines()[-1]
    assert message in result.stderr.splitlines()[-1]


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'taipan-190m'"):
        TaipanConfig.preset("taipan-190")
    with pytest.raises(ConfigError, match="'hiden_size' .did you mean 'hidden_size'"):
        TaipanConfig.preset("taipan-tiny", hiden_size=3)
    with pytest.raises(ConfigError, match="Known: recommended, gumbel, paper"):
        TaipanConfig.preset("taipan-tiny", setting="best")
    with pytest.raises(ConfigError, match="norm_eps is 'small', but must be a number"):
        TaipanConfig.preset("taipan-tiny", norm_eps="small")
    with pytest.raises(ConfigError, match="must be one of auto, cuda, native, portable, reference"):
        TaipanLM(small_config(), implementation="gpu")


def test_bad_tokens_are_named() -> None:
    model = small_model("taipan", dtype=torch.float32)
    with pytest.raises(InputError, match="Token id 61 is out of range: this model knows ids 0 to 60"):
        model(torch.tensor([[1, 61]]))
    with pytest.raises(InputError, match="Token id -1"):
        model(torch.tensor([[1, -1]]))
    with pytest.raises(InputError, match="at least one row and one token"):
        model(torch.zeros(1, 0, dtype=torch.int64))
    tokens = random_tokens(1, 4)
    for name in ("attention_mask", "segment_ids"):
        with pytest.raises(InputError, match=f"{name} has shape"):
            model(tokens, **{name: tokens[:, 1:]})
    with pytest.raises(InputError, match="labels have shape"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(ConfigError, match=r"progress of training is 1.5"):
        model.set_progress(1.5)


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_reference_implementation_gives_the_same_model(stack: str) -> None:
    model = small_model(stack)
    oracle = TaipanLM(model.config, implementation="reference").double().eval()
    oracle.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 30)
    torch.testing.assert_close(model(tokens).logits, oracle(tokens).logits, rtol=1e-9, atol=1e-9)


def test_save_and_load(tmp_path: Path) -> None:
    model = small_model("taipan", dtype=torch.float32)
    model.sals[0].gate.threshold.fill_(0.25)
    model.save_pretrained(tmp_path / "model")
    loaded = TaipanLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = random_tokens(1, 9)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert TaipanLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).sals[0].gate.threshold == 0.25


@pytest.mark.parametrize(
    "damage", ["truncate", "flip header", "missing weights", "other shapes", "missing config", "config"]
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "model"
    small_model("taipan", dtype=torch.float32).save_pretrained(directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "flip header":
        data = bytearray(weights.read_bytes())
        data[20] ^= 0xFF
        weights.write_bytes(bytes(data))
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "other shapes":
        config.write_text(config.read_text().replace('"state_size": 8', '"state_size": 16'))
    elif damage == "missing config":
        config.unlink()
    else:
        config.write_text(config.read_text()[:50])
    with pytest.raises((CheckpointError, ConfigError), match=r"model\.safetensors|config\.json"):
        TaipanLM.from_pretrained(directory)


def test_saving_keeps_the_old_model_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "model"
    model = small_model("taipan", dtype=torch.float32)
    model.save_pretrained(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taipan.model.weights.save_file", full)
    with pytest.raises(TaipanError, match="untouched"):
        small_model("taipan", dtype=torch.float32, seed=1).save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
