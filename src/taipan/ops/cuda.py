"""CUDA kernels of other packages: which op uses which, whether it can run here, and their common limits.

They are imported only when a CUDA tensor needs them. How the call sites were checked: docs/gpu.md.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from taipan.errors import how_to_install
from taipan.ops.precision import no_autocast


@dataclass(frozen=True)
class Kernel:
    """A function of another package.

    Attributes:
        package: the name it is imported by.
        module: where the function is.
        function: its name.
        files_alone: its module can be imported without the package's `__init__`, where that needs compiled files.
    """

    package: str
    module: str
    function: str
    files_alone: bool = False

    def load(self) -> Callable[..., Any]:
        """Import it (once per process)."""
        return cast(Callable[..., Any], getattr(self._module(), self.function))

    def _module(self) -> ModuleType:
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            spec = find_spec(self.package)
            if not self.files_alone or spec is None or error.name == self.package:
                raise
            sys.modules[self.package] = module_from_spec(spec)  # with its path, not yet run
            try:
                return import_module(self.module)
            except BaseException:
                del sys.modules[self.package]
                raise

    def __call__(self, *arguments: object, **options: object) -> Any:
        """Call it; products keep the dtype they are given."""
        with no_autocast("cuda"):
            return self.load()(*arguments, **options)


SCAN = Kernel("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", files_alone=True)
NORM = Kernel("mamba_ssm", "mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn", files_alone=True)
CONVOLUTION = Kernel("causal_conv1d", "causal_conv1d", "causal_conv1d_fn")
ATTENTION = Kernel("torch", "torch.nn.attention.varlen", "varlen_attn")
TRITON_CONVOLUTION = Kernel("fla", "fla.modules.causal_conv1d", "causal_conv1d")
KERNELS = {
    "ssd": (SCAN,),
    "causal_conv1d": (CONVOLUTION, TRITON_CONVOLUTION),
    "gated_rms_norm": (NORM,),
    "rms_norm": (NORM,),
    "attention": (ATTENTION,),
}
"""What the `cuda` implementation of an op calls: the first that is there."""


@dataclass(frozen=True)
class CudaStatus:
    """Whether the `cuda` implementation of an op can run here, and why or why not."""

    available: bool
    reason: str
    kernel: Kernel | None = None


@cache
def cuda_status(op: str) -> CudaStatus:
    """Find the kernel of an op. Imports it only if there is a CUDA device. Never raises."""
    if op not in KERNELS:
        return CudaStatus(False, "no kernel of another package is used for it")
    found = [_status(kernel) for kernel in KERNELS[op]]
    return next((status for status in found if status.available), found[0])


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported already, not from a file
        return True


def _status(kernel: Kernel) -> CudaStatus:
    if not _is_there(kernel.package):
        return CudaStatus(False, f"{kernel.package} is not installed: {how_to_install('gpu')} (docs/gpu.md)")
    if not torch.cuda.is_available():
        return CudaStatus(False, f"{kernel.function} of {kernel.package} is there, but no CUDA device")
    if kernel is ATTENTION and not torch.backends.cuda.is_flash_attention_available():
        return CudaStatus(False, "this build of PyTorch has no Flash Attention")
    try:
        kernel.load()
    except Exception as error:  # of other people's compiled code: whatever it is, the portable implementation runs
        return CudaStatus(False, f"{kernel.module} cannot be imported: {type(error).__name__}: {error}")
    return CudaStatus(True, f"{kernel.function} of {kernel.package}", kernel)


_WIDTHS = (torch.float16, torch.bfloat16, torch.float32)
_MOST_ELEMENTS = 2**31
_MOST_BLOCKS = 65535


def can_compute(dtype: torch.dtype) -> bool:
    """Whether the kernels take this dtype: they compute in fp32 and do not support fp64."""
    return dtype in _WIDTHS


def can_index(*tensors: Tensor, elements: int = 0, blocks: int = 1) -> bool:
    """Whether offsets fit the kernels' 32 bits, and the number of blocks fits a grid's second dimension.

    Args:
        tensors: read and written as they lie in memory.
        elements: of the largest tensor that a kernel allocates itself.
        blocks: of the largest second or third dimension of a grid.
    """
    ends = (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return max(elements, *ends) < _MOST_ELEMENTS and blocks <= _MOST_BLOCKS


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether Triton's products of this dtype are as precise as the user asked for.

    It multiplies fp32 in TF32 (10 bits) unless TRITON_F32_DEFAULT=ieee. That is allowed only if the user allows it for
    PyTorch's own products, with `torch.set_float32_matmul_precision`.
    """
    if dtype != torch.float32:
        return True
    return torch.get_float32_matmul_precision() != "highest" or os.environ.get("TRITON_F32_DEFAULT") == "ieee"
