"""Conversion of Mamba-2 checkpoints: bit by bit, in both directions and layouts; bad input by name."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2ForCausalLM

from taipan import TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError
from taipan.hf import from_mamba2, to_mamba2
from tests.hf.mamba2 import LIMIT, SIZES, VOCABULARY, foreign_model, write_state_spaces
from tests.models import small_model

SMALL = SIZES["one-group"]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("size", [*SIZES, "limit"])
def test_transformers_and_back_bit_by_bit(size: str, tmp_path: Path) -> None:
    foreign = foreign_model(**{**SIZES, "limit": LIMIT}[size])
    foreign.save_pretrained(tmp_path / "foreign")
    config = from_mamba2(tmp_path / "foreign", tmp_path / "ours")
    assert config.eos_token_id == 3
    to_mamba2(tmp_path / "ours", tmp_path / "back")
    back = Mamba2ForCausalLM.from_pretrained(tmp_path / "back")
    equal(weights(back), weights(foreign))
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype"}
    before, after = (model.config.to_dict() for model in (foreign, back))
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in before.items() if k not in ignored}


@pytest.mark.parametrize("size", ["one-group", "two-groups", "tied", "wide"])
def test_state_spaces_gives_the_same_model_and_back(size: str, tmp_path: Path) -> None:
    foreign = foreign_model(**SIZES[size])
    write_state_spaces(foreign, tmp_path / "foreign")
    from_mamba2(tmp_path / "foreign", tmp_path / "ours")
    ours = TaipanLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(0, VOCABULARY, (2, 11))
    torch.testing.assert_close(ours(tokens).logits, foreign(tokens).logits, rtol=0.0, atol=1e-4)
    to_mamba2(tmp_path / "ours", tmp_path / "back", layout="state-spaces")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("foreign", "back"))
    defaults = {"d_state": 128, "headdim": 64, "ngroups": 1, "expand": 2, "d_conv": 4, "chunk_size": 256}
    for values in (before, after):
        values["ssm_cfg"] = {**defaults, **values["ssm_cfg"]}
    assert after == before
    before, after = (torch.load(tmp_path / name / "pytorch_model.bin") for name in ("foreign", "back"))
    equal(dict(before), after)


def test_a_published_configuration_is_our_preset(tmp_path: Path) -> None:
    """config.json of state-spaces/mamba2-130m."""
    from taipan import TaipanConfig
    from taipan.hf.mamba2_config import read_config

    published = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    # the preset's own chunk size: speed only; a file that knows no gate has the fields' defaults
    preset = TaipanConfig.preset("mamba2-130m", setting="gumbel")
    assert read_config(tmp_path).replace(chunk_size=64) == preset.replace(chunk_size=64)


def test_shards_and_narrow_weights(tmp_path: Path) -> None:
    foreign = foreign_model(**SIZES["two-groups"]).to(torch.bfloat16)
    foreign.save_pretrained(tmp_path / "foreign", max_shard_size="20KB")
    assert (tmp_path / "foreign" / "model.safetensors.index.json").is_file()
    from_mamba2(tmp_path / "foreign", tmp_path / "ours")
    ours = weights(TaipanLM.from_pretrained(tmp_path / "ours"))
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    to_mamba2(tmp_path / "ours", tmp_path / "back")
    equal(weights(Mamba2ForCausalLM.from_pretrained(tmp_path / "back")), weights(foreign))
    shard = sorted((tmp_path / "foreign").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} does not exist"):
        from_mamba2(tmp_path / "foreign", tmp_path / "again")


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_state_spaces(foreign_model(**SMALL, vocab_size=257), tmp_path / "foreign")
    Tokenizer.bytes().save(tmp_path / "foreign")
    assert from_mamba2(tmp_path / "foreign", tmp_path / "ours").eos_token_id == 256
    to_mamba2(tmp_path / "ours", tmp_path / "back")
    assert Tokenizer.load(tmp_path / "back").fingerprint == Tokenizer.bytes().fingerprint


# ---------------------------------------------------------------------- what cannot be converted, and broken files


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_ssm(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(directory / "config.json", ssm_cfg={**config["ssm_cfg"], **values})


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.norm_f.weight"][0] = torch.nan


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.norm_f.weight"] = torch.ones(3)


TRANSFORMERS_FAULTS: list[tuple[str, Callable[[Path], object]]] = [
    ("config.json does not exist", lambda d: (d / "config.json").unlink()),
    ("cannot be read as JSON", lambda d: (d / "config.json").write_text("{")),
    ("must hold a JSON object", lambda d: (d / "config.json").write_text("[]")),
    ("model_type 'mamba'", lambda d: edit(d / "config.json", model_type="mamba")),
    ("Taipan model already", lambda d: edit(d / "config.json", model_type="taipan")),
    ("use_bias = True", lambda d: edit(d / "config.json", use_bias=True)),
    ("use_conv_bias = False", lambda d: edit(d / "config.json", use_conv_bias=False)),
    ("hidden_act = 'gelu'", lambda d: edit(d / "config.json", hidden_act="gelu")),
    ("no possible Mamba-2", lambda d: edit(d / "config.json", hidden_size="wide")),
    ("no possible Mamba-2", lambda d: edit(d / "config.json", num_heads=5)),
    ("n_groups", lambda d: edit(d / "config.json", n_groups=3)),
    ("eos_token_id = 99", lambda d: edit(d / "config.json", eos_token_id=99)),
    ("eos_token_id = \\[1, 2\\]", lambda d: edit(d / "config.json", eos_token_id=[1, 2])),
    ("holds no weights", lambda d: (d / "model.safetensors").unlink()),
    ("not finite in 1 of its tensors", lambda d: change_weights(d, not_finite)),
    ("model.safetensors is damaged", lambda d: os.truncate(d / "model.safetensors", 900)),
    ("missing lm_head.weight", lambda d: change_weights(d, lambda t: t.pop("lm_head.weight"))),
    ("unexpected backbone.extra", lambda d: change_weights(d, lambda t: t.update({"backbone.extra": torch.ones(1)}))),
    ("model.norm.weight is \\(3,\\) instead of \\(32,\\)", lambda d: change_weights(d, wrong_shape)),
    ("has a head of its own", lambda d: edit(d / "config.json", tie_word_embeddings=True)),
]

STATE_SPACES_FAULTS: list[tuple[str, Callable[[Path], object]]] = [
    ("ssm_cfg.layer 'Mamba1'", lambda d: edit(d / "config.json", ssm_cfg={})),
    ("attention in layers 1, 3", lambda d: edit(d / "config.json", attn_layer_idx=[1, 3])),
    ("d_intermediate = 64", lambda d: edit(d / "config.json", d_intermediate=64)),
    ("rms_norm = False", lambda d: edit(d / "config.json", rms_norm=False)),
    ("ssm_cfg.norm_before_gate = True", lambda d: edit_ssm(d, norm_before_gate=True)),
    ("ssm_cfg.d_ssm = 8", lambda d: edit_ssm(d, d_ssm=8)),
    ("did you mean 'headdim'", lambda d: edit_ssm(d, head_dim=8)),
    ("no possible Mamba-2", lambda d: edit_ssm(d, ngroups=3)),
    ("no possible Mamba-2", lambda d: edit(d / "config.json", vocab_size="many")),
    ("tokenizer in .* does not fit", lambda d: (d / "tokenizer.json").write_text("{}")),
    ("pytorch_model.bin is damaged", lambda d: os.truncate(d / "pytorch_model.bin", 900)),
    ("pytorch_model.bin cannot be read as tensors alone", lambda d: (d / "pytorch_model.bin").write_bytes(b"nothing")),
    ("no dictionary of tensors", lambda d: torch.save([1, 2], d / "pytorch_model.bin")),
    ("model.embed_tokens.weight is \\(50, 32\\)", lambda d: edit(d / "config.json", pad_vocab_size_multiple=16)),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    model = foreign_model(**SMALL)
    model.save_pretrained(directory / "transformers")
    write_state_spaces(model, directory / "state-spaces")
    return directory


@pytest.mark.parametrize(
    ("layout", "message", "spoil"),
    [
        *(("transformers", *fault) for fault in TRANSFORMERS_FAULTS),
        *(("state-spaces", *fault) for fault in STATE_SPACES_FAULTS),
    ],
)
def test_faults_are_named_and_nothing_is_written(
    layout: str, message: str, spoil: Callable[[Path], object], good: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(good / layout, source)
    spoil(source)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_mamba2(source, tmp_path / "target")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "target").exists()


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_not_run(good: Path, tmp_path: Path) -> None:
    source, touched = tmp_path / "source", tmp_path / "touched"
    shutil.copytree(good / "state-spaces", source)
    torch.save({"weight": Exploit(touched)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="would run code"):
        from_mamba2(source, tmp_path / "target")
    assert not touched.exists()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(touched), protocol=2))
    with pytest.raises(CheckpointError, match="would run code"):
        from_mamba2(source, tmp_path / "target")
    assert not touched.exists()


def test_other_layers_are_refused_by_number_and_name(tmp_path: Path) -> None:
    small_model("taipan", dtype=torch.float32).save_pretrained(tmp_path / "taipan")
    small_model("jamba", dtype=torch.float32).save_pretrained(tmp_path / "jamba")
    small_model("mamba2", dtype=torch.float32, mamba_mlp=True).save_pretrained(tmp_path / "mlp")
    small_model("mamba2", dtype=torch.float32, norm_eps=1e-6).save_pretrained(tmp_path / "epsilon")
    with pytest.raises(CheckpointError, match=r"1 \(selective_attention\), 3 \(selective_attention\)"):
        to_mamba2(tmp_path / "taipan", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"1 \(full_attention\)"):
        to_mamba2(tmp_path / "jamba", tmp_path / "out")
    with pytest.raises(CheckpointError, match="mamba_mlp"):
        to_mamba2(tmp_path / "mlp", tmp_path / "out")
    with pytest.raises(CheckpointError, match="norm_eps = 1e-06"):
        to_mamba2(tmp_path / "epsilon", tmp_path / "out", layout="state-spaces")
    assert not (tmp_path / "out").exists()
    to_mamba2(tmp_path / "epsilon", tmp_path / "out")
    assert Mamba2ForCausalLM.from_pretrained(tmp_path / "out").config.layer_norm_epsilon == 1e-6


def test_paths_and_layouts_are_checked_first(good: Path, tmp_path: Path) -> None:
    source = good / "transformers"
    with pytest.raises(CheckpointError, match="is no directory"):
        from_mamba2(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is also the source"):
        from_mamba2(source, source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        from_mamba2(source, tmp_path / "full")
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep"
    with pytest.raises(ConfigError, match="did you mean 'state-spaces'"):
        to_mamba2(source, tmp_path / "out", layout="state-space")
    with pytest.raises(CheckpointError, match="not a Taipan configuration"):
        to_mamba2(source, tmp_path / "out")
