"""Writes GGUF files for llama.cpp, of models whose layers it knows.

llama.cpp has a fixed list of architectures, and none has Selective Attention Layers. Of our models it can run plain
Mamba-2 (`mamba2`), full attention with rotary embedding in every layer (`llama`), and stacks of both (`granitehybrid`;
its `jamba` is Mamba-1). In the last every layer has an MLP: a Mamba-2 layer without one gets an MLP of zeros, which
adds nothing. Weights are written directly from a model: the converter of llama.cpp rounds a vocabulary up without
filling the embedding, and drops a finite `time_step_limit`, which is refused here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from taipan.config import READABLE, TaipanConfig
from taipan.errors import CheckpointError, ConfigError, how_to_install, shown, suggestion
from taipan.io import atomic_file, remove_abandoned
from taipan.layers.attention import Attention
from taipan.layers.mamba2 import Mamba2
from taipan.model import Block, TaipanLM

DTYPES = ("f32", "bf16", "q8_0", "q4_0")
_BLOCK = 32  # numbers that share a scale in q8_0 and q4_0
Architecture = Literal["mamba2", "llama", "granitehybrid"]


def to_gguf(source: str | Path, target: str | Path, dtype: str = "bf16") -> Architecture:
    """Write a model directory as a GGUF file.

    The file holds no tokenizer: programs feed and get token ids.

    Args:
        source: a Taipan model directory.
        target: the file, new; it appears whole or not at all.
        dtype: of the matrices, f32, bf16, q8_0 or q4_0 (8 or 4 bits with a scale for every 32); all else is f32.

    Returns:
        The architecture's name in llama.cpp.

    Raises:
        CheckpointError: the model cannot be read, the file not written, or llama.cpp has no such architecture; the
            message names why.
        ConfigError: the dtype is unknown, or the package gguf is not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype is {shown(dtype)}, but must be one of {', '.join(DTYPES)}{suggestion(dtype, list(DTYPES))}."
        )
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists: name a new file, or remove it first.")
    model = TaipanLM.from_pretrained(source)
    model.require_plain("for other programs")
    architecture = architecture_of(model.config, str(source))
    if dtype in ("q8_0", "q4_0"):
        odd = next((name for name, value, matrix in _tensors(model) if matrix and value.shape[1] % _BLOCK), None)
        if odd is not None:
            raise CheckpointError(
                f"{odd} of {source} has rows that are no multiple of {_BLOCK} numbers, as {dtype} needs: use bf16."
            )
    remove_abandoned(target.parent, target.name)
    with atomic_file(target) as temporary:
        write_gguf(model, temporary, architecture, dtype)
    return architecture


def architecture_of(config: TaipanConfig, name: str) -> Architecture:
    """The architecture of llama.cpp for a configuration.

    Raises:
        CheckpointError: it has none.
    """
    kinds, why = set(config.layer_types), ""
    low, high = config.time_step_limit
    if not kinds <= {"mamba2", "full_attention"}:
        why = f"its layers are {', '.join(sorted(kinds))}"
    elif "mamba2" in kinds and (low > 0.0 or high != float("inf")):
        why = f"its time_step_limit is {shown(config.time_step_limit)}, and llama.cpp clamps no time step"
    elif kinds == {"mamba2"}:
        if not config.mamba_mlp:
            return "mamba2"
        why = "its Mamba-2 layers have MLPs and no other layer is among them"
    elif kinds == {"full_attention"}:
        if config.attention_rope:
            return "llama"
        why = "its attention has no rotary embedding"
    elif config.inner_size != 2 * config.hidden_size:
        why = f"its Mamba-2 layers are {config.inner_size} wide, and llama.cpp takes twice the hidden size only"
    else:
        return "granitehybrid"
    raise CheckpointError(
        f"{name} cannot be written for llama.cpp: {why}. It knows models whose layers are all mamba2 without MLPs, all "
        "full_attention with rotary embedding, or both."
    )


def write_gguf(
    model: TaipanLM,
    target: Path,
    architecture: Architecture,
    dtype: str,
    add_tokenizer: Callable[[Any], object] | None = None,
) -> None:
    """Write the file; matrices in `dtype`, all else in fp32; with what `add_tokenizer` adds to the writer."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"Writing GGUF needs gguf, which is not installed: {how_to_install('gguf')}.") from error

    library: Any = gguf
    kind = library.GGMLQuantizationType[dtype.upper()]
    config = model.config
    writer = library.GGUFWriter(str(target), architecture)
    writer.add_context_length(READABLE)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if add_tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer)
    if architecture != "llama":
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.inner_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.num_mamba_heads)
        writer.add_ssm_group_count(config.n_groups)
    if architecture == "mamba2":
        writer.add_feed_forward_length(0)
        writer.add_head_count(config.num_mamba_heads)  # some builds (b9190) take the heads from here, not from the rank
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        if architecture == "llama":
            writer.add_head_count_kv(config.kv_heads)
        else:  # a layer without heads is recurrent
            writer.add_head_count_kv([0 if kind == "mamba2" else config.kv_heads for kind in config.layer_types])
            writer.add_rope_scaling_finetuned(config.attention_rope)  # its switch for rotary embedding
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
    for name, value, matrix in _tensors(model):
        data = value.detach().float().contiguous().numpy()
        if matrix and dtype != "f32":
            writer.add_tensor(name, library.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: TaipanLM) -> Iterator[tuple[str, Tensor, bool]]:
    """Name in GGUF, value, and whether it is a matrix of a linear layer or the embedding."""
    yield "token_embd.weight", model.model.embed_tokens.weight, True
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight, True
    yield "output_norm.weight", model.model.norm.weight, False
    for number, layer in enumerate(model.model.layers):
        block = cast(Block, layer)
        parts = _mamba2(block, model.config) if isinstance(block.mixer, Mamba2) else _attention(block, model.config)
        for name, value, matrix in (*parts, *_mlp(block, model)):
            yield f"blk.{number}.{name}", value, matrix


def _mamba2(block: Block, config: TaipanConfig) -> Iterator[tuple[str, Tensor, bool]]:
    mixer = cast(Mamba2, block.mixer)
    assert mixer.conv1d.bias is not None
    yield "attn_norm.weight", block.norm.weight, False
    yield "ssm_in.weight", mixer.in_proj.weight, True
    yield "ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1), False
    yield "ssm_conv1d.bias", mixer.conv1d.bias, False
    yield "ssm_dt.bias", mixer.dt_bias, False
    yield "ssm_a", -mixer.A_log.float().exp()[:, None], False
    yield "ssm_d", mixer.D[:, None], False
    yield "ssm_norm.weight", mixer.norm.weight.view(config.n_groups, -1), False
    yield "ssm_out.weight", mixer.out_proj.weight, True


def _attention(block: Block, config: TaipanConfig) -> Iterator[tuple[str, Tensor, bool]]:
    mixer = cast(Attention, block.mixer)
    turned: Callable[[Tensor, int], Tensor] = _interleaved if config.attention_rope else lambda weight, _: weight
    yield "attn_norm.weight", block.norm.weight, False
    yield "attn_q.weight", turned(mixer.q_proj.weight, config.num_attention_heads), True
    yield "attn_k.weight", turned(mixer.k_proj.weight, config.kv_heads), True
    yield "attn_v.weight", mixer.v_proj.weight, True
    yield "attn_output.weight", mixer.o_proj.weight, True


def _mlp(block: Block, model: TaipanLM) -> Iterator[tuple[str, Tensor, bool]]:
    """The MLP of a layer; where the architecture asks for one and there is none, zeros."""
    if block.mlp is not None and block.mlp_norm is not None:
        yield "ffn_norm.weight", block.mlp_norm.weight, False
        yield "ffn_gate.weight", block.mlp.gate_proj.weight, True
        yield "ffn_up.weight", block.mlp.up_proj.weight, True
        yield "ffn_down.weight", block.mlp.down_proj.weight, True
    elif "full_attention" in model.config.layer_types:
        wide = torch.zeros(model.config.intermediate_size, model.config.hidden_size)
        yield "ffn_norm.weight", torch.ones(model.config.hidden_size), False
        yield "ffn_gate.weight", wide, True
        yield "ffn_up.weight", wide, True
        yield "ffn_down.weight", wide.T, True


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order that llama.cpp rotates for a Llama: the two halves of a head interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
