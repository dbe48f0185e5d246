"""`taipan doctor`: what this machine offers, what is used of it, and why."""

import os
from collections.abc import Iterator
from importlib import metadata

import typer

# Distribution → what it is for; the first group is needed, the second adds doors.
_NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "jaxtyping",
    "typer",
    "rich",
    "PyYAML",
    "matplotlib",
    "Jinja2",
)
_EXTRA = {
    "transformers": ("hf", "taipan.hf"),
    "accelerate": ("hf", "Trainer of taipan.hf"),
    "pyarrow": ("data", "Parquet and .zst"),
    "datasets": ("datasets", "Hugging Face data sets"),
    "mamba-ssm": ("gpu", "SSD and norms on a GPU"),
    "causal-conv1d": ("gpu", "convolution on a GPU"),
}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""

    @app.command("doctor")
    def doctor() -> None:
        """Show the hardware, the versions, and which implementations are in use and why.

        Example:

            taipan doctor
        """
        from taipan.cli.console import print_table

        print_table("Machine", ["what", "found"], list(_machine()), text_columns=2)
        print_table("In use", ["what", "choice", "why"], list(_choices()), text_columns=3)
        print_table("Versions", ["package", "version", "for"], list(_versions()), text_columns=3)


def _machine() -> Iterator[tuple[str, str]]:
    import platform

    from taipan import hardware
    from taipan.cli.console import size

    found = hardware.describe()
    yield "system", f"{found.system}, {found.architecture}"
    yield "CPU", found.cpu
    yield "cores for this process", str(found.cores)
    yield "memory for this process", size(found.memory_bytes) if found.memory_bytes else "unknown"
    yield "instruction sets", ", ".join(found.simd) or "none of those that matter here"
    yield "CUDA device", found.cuda or "none"
    yield "C++ compiler", found.compiler or "none"
    yield "Python", f"{platform.python_implementation()} {platform.python_version()}"


def _choices() -> Iterator[tuple[str, str, str]]:
    import torch

    from taipan import hardware
    from taipan.model import IMPLEMENTATIONS
    from taipan.native import native_status
    from taipan.ops.cuda import cuda_status
    from taipan.ops.dispatch import chosen

    dtype = hardware.training_dtype("auto")
    yield "training dtype", dtype.dtype, dtype.reason
    given = os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={given}" if given else f"PyTorch's choice for {hardware.usable_cores()} usable cores"
    yield "threads", str(torch.get_num_threads()), why
    tuned = hardware.tune_allocator()
    yield (
        "allocator",
        "keeps large blocks" if tuned else "as it is",
        "glibc: freed tensors are reused without page faults" if tuned else "not glibc's: no settings to change",
    )
    kernels = native_status()
    made = "compiled" if kernels.seconds is None else f"compiled in {kernels.seconds:.0f} s"
    yield "native kernels", "none" if kernels.library is None else made, kernels.reason
    if kernels.flags:
        name, _, flags = kernels.flags.partition(" ")
        yield "their compiler and flags", name, flags
        yield "their products of bfloat16", kernels.products, "the best this processor and system offer inside an op"
    for op, implementations in IMPLEMENTATIONS.items():
        choice = chosen(op, implementations, torch.zeros(1))
        others = [name for name in implementations if name not in (choice, "cuda")]
        yield f"op {op}", choice, f"the best that runs here; also there: {', '.join(others)}"
    for op in IMPLEMENTATIONS:
        status = cuda_status(op)
        yield f"op {op} on a GPU", "cuda" if status.available else "portable", status.reason
    decoding = "the model's forward" if kernels.library is None else "native"
    yield "decoding step", decoding, "one call a token; --weights bfloat16 or int8 reads less memory, less exactly"


def _versions() -> Iterator[tuple[str, str, str]]:
    from taipan.errors import how_to_install

    yield "taipan-lm", _version("taipan-lm"), "this"
    for name in _NEEDED:
        yield name, _version(name), "needed"
    for name, (extra, purpose) in _EXTRA.items():
        yield name, _version(name), f"{purpose} ({how_to_install(extra)})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
