"""Configurations of plain Mamba-2 models, from and to the two layouts of the world."""

import json
import math
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import Mamba2Config

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError, ConfigError, shown, suggestion
from taipan.hf.weights import read_json

STATE_SPACES_EPS = 1e-5  # of every norm there; not in the configuration
# keyword of Mamba2 in mamba_ssm/modules/mamba2.py: (field of TaipanConfig, its default there)
_SSM_FIELDS: dict[str, tuple[str, Any]] = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("mamba_head_dim", 64),
    "ngroups": ("n_groups", 1),
    "A_init_range": ("A_init_range", (1.0, 16.0)),
    "dt_min": ("time_step_min", 1e-3),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "dt_limit": ("time_step_limit", (0.0, math.inf)),
    "chunk_size": ("chunk_size", 256),
}
# keywords that have one value Taipan can represent; the others of that signature do not touch the result
_SSM_FIXED: dict[str, Any] = {
    "bias": False,
    "conv_bias": True,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "d_ssm": None,
}
_SSM_IRRELEVANT = ("layer", "conv_init", "use_mem_eff_path", "process_group", "sequence_parallel")


def read_config(directory: str | Path) -> TaipanConfig:
    """Configuration of a Mamba-2 checkpoint in either layout.

    Raises:
        CheckpointError: `config.json` is missing or damaged, or describes something else than a plain Mamba-2.
    """
    path = Path(directory) / "config.json"
    values = read_json(path)
    try:
        if "d_model" in values and "n_layer" in values:
            return _from_state_spaces(path, values)
        if values.get("model_type") == "mamba2":
            return _from_transformers(path, values)
    except CheckpointError:
        raise
    except (StrictDataclassError, ConfigError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no possible Mamba-2 configuration: {shown(error)}. Correct or restore it."
        ) from error
    hint = " It is a Taipan model already." if values.get("model_type") == "taipan" else ""
    raise CheckpointError(
        f"{path} has model_type {shown(values.get('model_type'))}, but must be a Mamba-2: 'mamba2' (transformers) or "
        f"d_model, n_layer and ssm_cfg (state-spaces).{hint}"
    )


def _from_transformers(path: Path, values: dict[str, Any]) -> TaipanConfig:
    foreign = cast(Any, Mamba2Config.from_pretrained(path))
    _require(path, "use_bias", foreign.use_bias, False)
    _require(path, "use_conv_bias", foreign.use_conv_bias, True)
    if foreign.hidden_act not in ("silu", "swish"):
        _require(path, "hidden_act", foreign.hidden_act, "silu")
    return TaipanConfig(
        vocab_size=foreign.vocab_size,
        hidden_size=foreign.hidden_size,
        layer_types=("mamba2",) * foreign.num_hidden_layers,
        tie_word_embeddings=foreign.tie_word_embeddings,
        norm_eps=foreign.layer_norm_epsilon,
        initializer_range=foreign.initializer_range,
        residual_in_fp32=foreign.residual_in_fp32,
        state_size=foreign.state_size,
        mamba_head_dim=foreign.head_dim,
        n_groups=foreign.n_groups,
        expand=foreign.expand,
        conv_kernel=foreign.conv_kernel,
        chunk_size=foreign.chunk_size,
        time_step_min=foreign.time_step_min,
        time_step_max=foreign.time_step_max,
        time_step_floor=foreign.time_step_floor,
        time_step_limit=tuple(foreign.time_step_limit),
        # absent means absent: the defaults of Mamba2Config are ids of no particular tokenizer
        eos_token_id=_token_id(path, "eos_token_id", values, foreign.vocab_size),
        pad_token_id=_token_id(path, "pad_token_id", values, foreign.vocab_size),
    )


def _from_state_spaces(path: Path, values: dict[str, Any]) -> TaipanConfig:
    ssm = dict(values.get("ssm_cfg") or {})
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba2":
        raise CheckpointError(f"{path} has ssm_cfg.layer {shown(layer)}, but only 'Mamba2' can be converted.")
    if values.get("attn_layer_idx"):
        raise CheckpointError(
            f"{path} has attention in layers {', '.join(map(str, values['attn_layer_idx']))}: only models whose layers "
            "are all Mamba-2 can be converted."
        )
    _require(path, "d_intermediate", values.get("d_intermediate", 0), 0)
    _require(path, "rms_norm", values.get("rms_norm", True), True)
    for name, value in _SSM_FIXED.items():
        _require(path, f"ssm_cfg.{name}", ssm.get(name, value), value)
    known = [*_SSM_FIELDS, *_SSM_FIXED, *_SSM_IRRELEVANT]
    for name in ssm:
        if name not in known:
            raise CheckpointError(
                f"{path} has an unknown ssm_cfg.{name}{suggestion(name, known)}: its meaning is not known."
            )
    multiple = int(values.get("pad_vocab_size_multiple", 8))
    tie = bool(values.get("tie_embeddings", True))
    return TaipanConfig(
        vocab_size=math.ceil(int(values["vocab_size"]) / multiple) * multiple,
        hidden_size=values["d_model"],
        layer_types=("mamba2",) * int(values["n_layer"]),
        tie_word_embeddings=tie,
        norm_eps=STATE_SPACES_EPS,
        residual_in_fp32=values.get("residual_in_fp32", True),
        **{field: _like(default, ssm.get(name, default)) for name, (field, default) in _SSM_FIELDS.items()},
    )


def _like(default: object, value: Any) -> Any:
    """A value from JSON, which knows no tuples and writes 1.0 as 1."""
    return tuple(float(item) for item in value) if isinstance(default, tuple) else value


def transformers_config(config: TaipanConfig) -> dict[str, Any]:
    """`config.json` of transformers' `Mamba2ForCausalLM`."""
    return json.loads(mamba2_config(config).to_json_string())


def mamba2_config(config: TaipanConfig) -> Mamba2Config:
    """Configuration of transformers' `Mamba2ForCausalLM` of the same sizes."""
    return Mamba2Config(
        architectures=["Mamba2ForCausalLM"],
        num_heads=config.num_mamba_heads,
        head_dim=config.mamba_head_dim,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        num_hidden_layers=config.num_hidden_layers,
        layer_norm_epsilon=config.norm_eps,
        pad_token_id=config.pad_token_id,
        bos_token_id=None,
        eos_token_id=config.eos_token_id,
        expand=config.expand,
        conv_kernel=config.conv_kernel,
        n_groups=config.n_groups,
        initializer_range=config.initializer_range,
        residual_in_fp32=config.residual_in_fp32,
        time_step_min=config.time_step_min,
        time_step_max=config.time_step_max,
        time_step_floor=config.time_step_floor,
        time_step_limit=config.time_step_limit,
        chunk_size=config.chunk_size,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def state_spaces_config(config: TaipanConfig) -> dict[str, Any]:
    """`config.json` of state-spaces' `MambaLMHeadModel`."""
    ssm = {name: getattr(config, field) for name, (field, _) in _SSM_FIELDS.items()}
    changed = {name: value for name, value in ssm.items() if value != _SSM_FIELDS[name][1]}
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **changed},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _require(path: Path, name: str, value: object, expected: object) -> None:
    if value != expected:
        raise CheckpointError(
            f"{path} has {name} = {shown(value)}, but only {shown(expected)} can be converted: Taipan's Mamba-2 has "
            "no other "
            "form."
        )


def _token_id(path: Path, name: str, values: dict[str, Any], vocab_size: int) -> int | None:
    value = values.get(name)
    if isinstance(value, list) and len(cast("list[object]", value)) == 1:
        value = cast("list[object]", value)[0]
    if value is None or (isinstance(value, int) and 0 <= value < vocab_size):
        return value
    raise CheckpointError(
        f"{path} has {name} = {shown(value)}, but Taipan has one id from 0 to {vocab_size - 1}: set one there."
    )
