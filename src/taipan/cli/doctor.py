"""`taipan doctor`: what this machine offers, what is used of it, and why."""

import os
from collections.abc import Iterator
from importlib import metadata

import typer

# Distribution → purpose; the first group is required, the second optional.
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
_COLUMNS = 80  # so that what is pasted into a message stays a table
_MISSING = "not installed"
_EXTRA = {
    "transformers": ("hf", "taipan.hf"),
    "accelerate": ("hf", "Trainer of taipan.hf"),
    "pyarrow": ("data", "Parquet and .zst"),
    "datasets": ("datasets", "Hugging Face data sets"),
    "mamba-ssm": ("gpu", "SSD and norms on a GPU"),
    "causal-conv1d": ("gpu", "convolution on a GPU"),
}


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("doctor", rich_help_panel=panel)
    def doctor() -> None:
        """Show the hardware, the versions, and which implementations are in use and why.

        Example:

            taipan doctor
        """
        from taipan.cli.console import print_table

        for title, columns, rows in (
            ("Machine", ["what", "found"], _machine()),
            ("In use", ["what", "choice", "why"], _choices()),
            ("Ops", ["op", "here", "on a GPU", "its kernel on a GPU"], _ops()),
            ("Versions", ["package", "version", "for"], _versions()),
        ):
            print_table(title, columns, list(rows), text_columns=len(columns), width=_COLUMNS)


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
    from taipan.native import native_status

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
    products = hardware.float32_products()
    yield "float32 products", products.library, products.reason
    kernels = native_status()
    made = "compiled" if kernels.seconds is None else f"compiled in {kernels.seconds:.0f} s"
    yield "native kernels", "none" if kernels.library is None else made, kernels.reason
    if kernels.flags:
        name, _, flags = kernels.flags.partition(" ")
        yield "compiled by", name, flags
        yield "bfloat16 products", kernels.products, "the best this processor and system offer inside an op"
        yield "4-bit products", kernels.int4, "of decoding: AVX512-VNNI, else AVX2, else numbers one by one"
    ops = "portable" if kernels.library is None else "native"
    yield "ops", f"{ops} (below)", "compiled kernels where there are any; else PyTorch's operations"
    inside = "op by op" if kernels.library is None else "one call"
    yield "Mamba-2's inside", inside, "one call: convolution, ssd and gated norm compiled together"
    decoding = "the model's forward" if kernels.library is None else "native"
    yield "decoding step", decoding, "one call a token; --weights bfloat16, int8 or int4 is faster and less exact"


def _ops() -> Iterator[tuple[str, str, str, str]]:
    import torch

    from taipan.model import IMPLEMENTATIONS
    from taipan.ops.cuda import cuda_status
    from taipan.ops.dispatch import chosen

    for op, implementations in IMPLEMENTATIONS.items():
        on_gpu = cuda_status(op)
        here = chosen(op, implementations, torch.zeros(1))
        yield op, here, "cuda" if on_gpu.available else "portable", on_gpu.reason


def _versions() -> Iterator[tuple[str, str, str]]:
    from taipan.errors import how_to_install

    yield "taipan-lm", _version("taipan-lm"), "this"
    for name in _NEEDED:
        yield name, _version(name), "needed"
    for name, (extra, purpose) in _EXTRA.items():
        version = _version(name)
        yield name, version, f"{purpose}: {how_to_install(extra)}" if version == _MISSING else purpose


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return _MISSING
