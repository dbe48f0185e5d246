from pathlib import Path

import pytest
import torch

from taipan import TaipanConfig
from taipan.accounting import parameter_count
from taipan.benchmark import Settings
from taipan.benchmark.models import build, configuration, dtype_of, names, random_tokens
from taipan.errors import ConfigError
from tests.models import small_model


def test_the_sizes_are_what_the_names_say() -> None:
    for name, millions in (("mamba2-6m", 5.5), ("mamba2-30m", 30.0), ("mamba2-115m", 115.0), ("taipan-30m", 30.0)):
        assert parameter_count(configuration(name)) == pytest.approx(1e6 * millions, rel=0.05)
    assert set(TaipanConfig.presets()) < set(names())
    assert configuration("quickstart").sliding_window == 512


def test_an_unknown_model_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"Unknown model 'mamba2-115' \(did you mean 'mamba2-115m'\?\)"):
        configuration("mamba2-115")


def test_random_gates_select_their_share() -> None:
    settings = Settings(model="taipan-tiny", dtype="float32")
    model = build(settings, torch.float32)
    with torch.inference_mode():
        (gate,) = model(random_tokens(model.config, 1, 2000, 1)).gates
    assert float(gate.rate) == pytest.approx(model.config.attention_capacity, abs=0.04)


def test_narrow_weights_keep_the_decays_precise() -> None:
    model = build(Settings(model="taipan-tiny"), torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["A_log"] == dtypes["D"] == dtypes["dt_bias"] == torch.float32
    assert dtypes["weight"] == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_directory_has_its_own_weights(tmp_path: Path) -> None:
    own = small_model(dtype=torch.float32)
    own.save_pretrained(tmp_path)
    loaded = build(Settings(model=str(tmp_path)), torch.float32)
    assert loaded.fingerprint == own.fingerprint


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", 0, "batch is 0, but must be at least 1"),
        ("tokens", (1,), "tokens is 1, but must be at least 2"),
        ("context", (0,), "context is 0"),
        ("dtype", "bfloat", r"Unknown dtype 'bfloat' \(did you mean 'bfloat16'\?\)"),
        ("weights", "int2", "Unknown weights 'int2'"),
        ("against", "transformer", r"Unknown against 'transformer' \(did you mean 'transformers'\?\)"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**{field: value})


def test_auto_is_the_dtype_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    assert dtype_of(Settings()) == torch.bfloat16
    assert dtype_of(Settings(dtype="float32")) == torch.float32
