"""The Triton kernels of mamba-ssm and fla themselves, run on the CPU by Triton's interpreter, against our references.

Needs triton and the Python files of both, no GPU (docs/gpu.md says how to get them), and the variable from the
beginning, for Triton reads it when it is imported: `TRITON_INTERPRET=1 python -m pytest -m triton`.
What runs is the whole call: our call site, the package's own wrapper, its kernels forward and backward. Replaced are
the package's `__init__` files, which import compiled code, and what the wrappers ask of the CUDA device.
"""

import inspect
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan.ops.causal_conv1d import cuda as convolution
from taipan.ops.causal_conv1d.api import causal_conv1d
from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.reference import causal_conv1d_reference
from taipan.ops.cuda import NORM, SCAN, TRITON_CONVOLUTION, CudaStatus, Kernel
from taipan.ops.gated_rms_norm.api import gated_rms_norm, rms_norm
from taipan.ops.gated_rms_norm.reference import gated_rms_norm_reference, rms_norm_reference
from taipan.ops.ssd.api import ssd
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.reference import ssd_chunked, ssd_recurrent
from tests.ops.cuda_stand_ins import allow_reduced_precision, run_on_cpu
from tests.ops.fuzz import Case, Draw, results
from tests.ops.records import called_like_the_op
from tests.tolerance import assert_as_exact_as

MISSING = [name for name in ("triton", "mamba_ssm", "fla") if find_spec(name) is None]
if os.environ.get("TRITON_INTERPRET") != "1":
    MISSING.append("TRITON_INTERPRET=1")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)} (docs/gpu.md)"),
    pytest.mark.timeout(1800),
]


# The interpreter computes with the bits of bfloat16 as integers, and where a kernel casts it to fp32, stores it cut off
# instead of rounded: findings/bfloat16_in_tritons_interpreter.sh. float16 goes the same way through the kernels.
DTYPES = (torch.float32, torch.float16)

called: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Import the kernels under the interpreter, each with one configuration: there is nothing to tune on."""
    with pytest.MonkeyPatch.context() as patch, allow_reduced_precision():
        patch.setenv("MAMBA_DETERMINISTIC", "1")
        found = find_spec("mamba_ssm")
        assert found is not None
        assert found.submodule_search_locations is not None
        root = found.submodule_search_locations[0]
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
            module = ModuleType(name)
            module.__path__ = [root + name.removeprefix("mamba_ssm").replace(".", "/")]
            patch.setitem(sys.modules, name, module)
        patch.setattr(torch.cuda, "device", lambda index: nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
        with pytest.warns(UserWarning, match="Deterministic mode"):
            SCAN.load()
        NORM.load()
        TRITON_CONVOLUTION.load()
        from triton.runtime.autotuner import Autotuner

        for kernel in vars(sys.modules["fla.modules.causal_conv1d.ops"]).values():
            while kernel is not None:  # heuristics around a tuner around the kernel
                if isinstance(kernel, Autotuner):
                    del kernel.configs[1:]
                kernel = getattr(kernel, "fn", None) if hasattr(kernel, "run") else None
        patch.setattr(convolution, "cuda_status", lambda op: CudaStatus(True, "", TRITON_CONVOLUTION))
        load = Kernel.load

        def counted(kernel: Kernel) -> Any:
            called[kernel.function] += 1
            return load(kernel)

        patch.setattr(Kernel, "load", counted)
        patch.setenv("MAMBA_DETERMINISTIC", "0")  # sums by atomic additions, as they are by default
        run_on_cpu(patch)
        yield


def check(case: Case, others: list[dict[str, Tensor]], dtype: torch.dtype) -> None:
    """Within twice what references lose in this dtype."""
    called.clear()
    actual = results(case, lambda tensors: case.run(tensors, "cuda"), case.inputs)
    assert called, "the kernel was declined"
    exact = results(case, case.reference, {name: tensor.double() for name, tensor in case.inputs.items()})
    for name, truth in exact.items():
        assert_as_exact_as(actual[name], [other[name] for other in others], truth, dtype, f"{case.about}: {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "groups", "state", "packed", "initial", "skip"),
    [
        (37, 1, 16, False, False, True),
        (50, 2, 24, True, True, True),
        (16, 2, 8, True, False, False),
        (1, 1, 16, False, False, True),
    ],
)
def test_ssd(tokens: int, groups: int, state: int, packed: bool, initial: bool, skip: bool, dtype: torch.dtype) -> None:
    draw = Draw(tokens)
    heads, head_dim, chunk = 2 * groups, 8, 16
    dt = 2 * draw.uniform(1, tokens, heads)
    dt[:, :, 0] *= 20  # a head that forgets at once
    dt[:, :, 1] *= 0.02  # and one that would remember another document
    dt[:, tokens - tokens // 8 :] = 0  # padding
    inputs = {
        "x": draw.normal(1, tokens, heads, head_dim + 2)[..., 1:-1].to(dtype),
        "dt": dt.float(),
        "A": -(draw.uniform(heads) * 4 + 0.05).float(),
        "B": draw.normal(1, tokens, groups, state).to(dtype),
        "C": draw.normal(1, tokens, groups, state).to(dtype),
    }
    if skip:
        inputs["D"] = draw.normal(heads).float()
    if initial:
        inputs["initial"] = draw.normal(1, heads, head_dim, state).float()
    segment = torch.tensor([0] * 5 + [2] * 9 + [0] * (tokens - 14))[None] if packed else None

    def call(function, tensors, **options):
        positional = [tensors.get(name) for name in ("x", "dt", "A", "B", "C", "D")]
        return function(*positional, initial_state_BHPN=tensors.get("initial"), segment_BT=segment, **options)

    wanted = set(inputs)
    if dtype != torch.float32 and "state_dtype" not in inspect.signature(SCAN.load()).parameters:
        wanted.discard("initial")  # else the kernel is declined
    case = Case(
        lambda tensors, name: call(ssd, tensors, chunk_size=chunk, implementation=name),
        lambda tensors: call(called_like_the_op(ssd_recurrent, SSDInputs), tensors),
        inputs,
        wanted,
        [0, 1],
        f"{tokens} tokens, {groups} groups",
    )
    others = [
        results(case, case.reference, inputs),
        results(
            case, lambda tensors: call(called_like_the_op(ssd_chunked, SSDInputs), tensors, chunk_size=chunk), inputs
        ),
    ]
    check(case, others, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "group_size", "groups"), [(7, 16, 3), (5, 33, 1), (1, 24, 2)])
def test_gated_rms_norm(tokens: int, group_size: int, groups: int, dtype: torch.dtype) -> None:
    draw, channels = Draw(tokens), group_size * groups
    inputs = {
        "y": draw.normal(2, tokens, channels + 3)[..., 2:-1].to(dtype),
        "z": draw.normal(2, tokens, channels).to(dtype),
        "weight": draw.normal(channels).to(dtype),
    }
    options = {"group_size": group_size, "eps": 1e-5}
    case = Case(
        lambda tensors, name: (gated_rms_norm(*tensors.values(), **options, implementation=name),),
        lambda tensors: (gated_rms_norm_reference(*tensors.values(), **options),),
        inputs,
        set(inputs),
        about=f"{tokens} tokens, {groups} groups of {group_size}",
    )
    check(case, [results(case, case.reference, inputs)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    draw = Draw(0)
    inputs = {"x": draw.normal(3, 2, 20).to(dtype), "weight": draw.normal(20).to(dtype)}
    case = Case(
        lambda tensors, name: (rms_norm(*tensors.values(), eps=1e-5, implementation=name),),
        lambda tensors: (rms_norm_reference(*tensors.values(), eps=1e-5),),
        inputs,
        set(inputs),
    )
    check(case, [results(case, case.reference, inputs)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "taps", "packed", "initial"),
    [(37, 4, False, False), (70, 4, True, True), (21, 3, True, False), (1, 4, False, False), (66, 2, False, True)],
)
def test_causal_conv1d(tokens: int, taps: int, packed: bool, initial: bool, dtype: torch.dtype) -> None:
    """Also of channels that are no multiple of 8, slices of a projection; a document shorter than the taps."""
    draw, batch, channels = Draw(tokens), 2, 20
    inputs = {
        "x": draw.normal(batch, tokens, channels + 5)[..., 3:-2].to(dtype),
        "weight": draw.normal(channels, taps).to(dtype),
        "bias": draw.normal(channels).to(dtype),
    }
    if initial:
        inputs["columns"] = draw.normal(batch, taps - 1, channels).to(dtype)
    segment = None
    if packed:
        segment = torch.tensor([[0] * 5 + [2] * 9 + [0] * (tokens - 14), [1] * 2 + [3] * (tokens - 2)])

    def call(function, tensors, **options):
        positional = [tensors[name] for name in ("x", "weight", "bias")]
        return function(*positional, initial_columns_BLC=tensors.get("columns"), segment_BT=segment, **options)

    case = Case(
        lambda tensors, name: call(causal_conv1d, tensors, implementation=name),
        lambda tensors: call(called_like_the_op(causal_conv1d_reference, ConvolutionInputs), tensors),
        inputs,
        set() if initial else set(inputs),  # fla's gradient of a state uses a mask that the interpreter refuses
        [0, 1],
        f"{tokens} tokens, {taps} taps",
    )
    check(case, [results(case, case.reference, inputs)], dtype)
