"""Write a Mamba-2 of the benchmark with random weights as a GGUF file, so that llama.cpp is timed on the same sizes.

    pip install gguf
    python benchmarks/llama_cpp.py mamba2-115m mamba2-bf16.gguf --dtype bf16
    llama-bench -m mamba2-bf16.gguf -t 2 -p 512,2048 -n 32 -r 3
    llama-batched-bench -m mamba2-bf16.gguf -t 2 -c 16384 -npp 128 -ntg 32 -npl 1,8

llama.cpp is none of our dependencies: build it by its own instructions. Its file holds no tokenizer; both programs feed
numbers. A model directory is written by `taipan convert to-gguf`.
"""

import argparse
from pathlib import Path

import torch

from taipan.benchmark.models import build
from taipan.benchmark.settings import Settings
from taipan.conversion.gguf import DTYPES, architecture_of, write_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a named model of `taipan bench` that is Mamba-2 throughout")
    parser.add_argument("path", type=Path, help="of the GGUF file")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the matrices")
    arguments = parser.parse_args()
    model = build(Settings(model=arguments.model), torch.float32)
    write_gguf(model, arguments.path, architecture_of(model.config, arguments.model), arguments.dtype)


if __name__ == "__main__":
    main()
