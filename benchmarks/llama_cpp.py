"""Write a Mamba-2 of the benchmark with random weights as a GGUF file, so that llama.cpp is timed on the same sizes.

    pip install gguf
    python benchmarks/llama_cpp.py mamba2-115m mamba2-bf16.gguf --dtype bf16
    llama-bench -m mamba2-bf16.gguf -t 2 -p 512,2048 -n 32 -r 3
    llama-batched-bench -m mamba2-bf16.gguf -t 2 -c 16384 -npp 128 -ntg 32 -npl 1,8

llama.cpp is none of our dependencies: build it by its own instructions. Its file holds no tokenizer; both programs feed
numbers.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from taipan.benchmark.models import build
from taipan.benchmark.settings import Settings
from taipan.layers.mamba2 import Mamba2
from taipan.model import TaipanLM


def tensors(model: TaipanLM) -> Iterator[tuple[str, Tensor, bool]]:
    """Name in GGUF, value, and whether it is a matrix of a linear layer or the embedding."""
    yield "token_embd.weight", model.model.embed_tokens.weight, True
    yield "output_norm.weight", model.model.norm.weight, False
    for number, layer in enumerate(model.model.layers):
        mixer = layer.mixer
        assert isinstance(mixer, Mamba2)
        assert mixer.conv1d.bias is not None
        groups = model.config.n_groups
        for name, value, matrix in (
            ("attn_norm.weight", layer.norm.weight, False),
            ("ssm_in.weight", mixer.in_proj.weight, True),
            ("ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1), False),
            ("ssm_conv1d.bias", mixer.conv1d.bias, False),
            ("ssm_dt.bias", mixer.dt_bias, False),
            ("ssm_a", -mixer.A_log.float().exp()[:, None], False),
            ("ssm_d", mixer.D[:, None], False),
            ("ssm_norm.weight", mixer.norm.weight.view(groups, -1), False),
            ("ssm_out.weight", mixer.out_proj.weight, True),
        ):
            yield f"blk.{number}.{name}", value, matrix


def write(model: TaipanLM, path: str, dtype: str) -> None:
    """Matrices in `dtype` (f32, bf16 or q8_0), all else in fp32."""
    import gguf  # pyright: ignore[reportMissingImports]  # not a dependency

    library: Any = gguf  # pyright: ignore[reportUnknownVariableType]
    kind = library.GGMLQuantizationType[dtype.upper()]
    config = model.config
    writer = library.GGUFWriter(path, "mamba2")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.layer_types))
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.inner_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_mamba_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_tokenizer_model("none")
    for name, value, matrix in tensors(model):
        data = value.detach().float().contiguous().numpy()
        if matrix and dtype != "f32":
            writer.add_tensor(name, library.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a named model of `taipan bench` that is Mamba-2 throughout")
    parser.add_argument("path", help="of the GGUF file")
    parser.add_argument("--dtype", choices=("f32", "bf16", "q8_0"), default="bf16", help="of the matrices")
    arguments = parser.parse_args()
    write(build(Settings(model=arguments.model), torch.float32), arguments.path, arguments.dtype)


if __name__ == "__main__":
    main()
