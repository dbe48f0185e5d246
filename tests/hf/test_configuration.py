import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from taipan import TaipanConfig, TaipanLM
from taipan.errors import ConfigError
from taipan.hf import TaipanForCausalLM, TaipanHFConfig
from tests.models import STACKS, small_config


@pytest.mark.parametrize("name", TaipanConfig.presets())
def test_every_preset_survives_the_way_through_transformers(name: str, tmp_path: Path) -> None:
    native = TaipanConfig.preset(name)
    TaipanHFConfig.from_native(native).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TaipanHFConfig)
    assert loaded.to_native() == native
    assert TaipanConfig.from_json_file(tmp_path / "config.json") == native


@settings(max_examples=25, deadline=None)
@given(
    stack=st.sampled_from(sorted(STACKS)),
    limit=st.sampled_from([(0.0, float("inf")), (0.01, 0.5), (0.01, float("inf"))]),
    eos=st.sampled_from([None, 3]),
    window=st.integers(1, 99),
)
def test_fields_are_those_of_the_native_configuration(
    stack: str, limit: tuple[float, float], eos: int | None, window: int
) -> None:
    native = small_config(stack, time_step_limit=limit, eos_token_id=eos, sliding_window=window)
    config = TaipanHFConfig.from_native(native)
    assert config.to_native() == native
    assert TaipanHFConfig.from_dict(json.loads(config.to_json_string())).to_native() == native
    assert config.num_hidden_layers == native.num_hidden_layers


def test_a_native_directory_says_what_transformers_looks_for(tmp_path: Path) -> None:
    native = small_config()
    TaipanLM(native).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TaipanHFConfig)
    assert loaded.architectures == ["TaipanForCausalLM"]
    assert loaded.to_native() == native


def test_fields_can_be_overridden_while_loading(tmp_path: Path) -> None:
    TaipanHFConfig.from_native(small_config()).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, attention_capacity=0.4).to_native().attention_capacity == 0.4


def test_impossible_values_are_refused_by_name() -> None:
    values = small_config().to_dict()
    with pytest.raises(ConfigError, match="n_groups is 7"):
        TaipanHFConfig(**{**values, "n_groups": 7})
    with pytest.raises(ConfigError, match="lacks vocab_size, hidden_size, layer_types"):
        TaipanHFConfig()
    config = TaipanHFConfig(**values)
    config.attention_capacity = 2.0
    with pytest.raises(ConfigError, match="attention_capacity is 2"):
        config.to_native()


def test_an_impossible_configuration_is_not_written(tmp_path: Path) -> None:
    config = TaipanHFConfig.from_native(small_config())
    config.sliding_window = 0
    with pytest.raises(Exception, match="sliding_window is 0"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('"sliding_window": 7', '"sliding_window": 7, "sliding_window": 9', "the name 'sliding_window' stands twice"),
        ('"sliding_window"', '"slidng_window"', "'slidng_window'.*did you mean 'sliding_window'"),
        ('"rope_theta": 10000.0', '"rope_theta": NaN', "rope_theta is nan, but must be a finite number"),
        ('"tie_word_embeddings": true', '"tie_word_embeddings": "false"', "but must be true or false"),
    ],
)
def test_what_a_file_does_not_say_plainly_is_refused_by_both_faces(
    before: str, after: str, words: str, tmp_path: Path
) -> None:
    """transformers' own reader takes the later of two values, and leaves names aside that it does not know."""
    TaipanLM(small_config()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")
    for read in (TaipanLM.from_pretrained, AutoModelForCausalLM.from_pretrained, TaipanForCausalLM.from_pretrained):
        with pytest.raises(ConfigError, match=words):
            read(tmp_path)
    if "slidng" not in after:
        with pytest.raises(ConfigError, match=words):
            TaipanHFConfig.from_pretrained(tmp_path)
