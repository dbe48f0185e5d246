"""Call sites of CUDA kernels, with stand-ins for the kernels: arguments, layouts, limits, when they are declined."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from taipan import TaipanLM
from taipan.errors import ConfigError
from taipan.model import decoder
from taipan.ops import attention, cuda
from taipan.ops.causal_conv1d import cuda as convolution
from taipan.ops.causal_conv1d.api import causal_conv1d
from taipan.ops.cuda import ATTENTION, SCAN, TRITON_CONVOLUTION, CudaStatus, Kernel, can_index, cuda_status
from taipan.ops.dispatch import chosen, select
from taipan.ops.gated_rms_norm.api import rms_norm
from taipan.ops.ssd.api import ssd
from tests.models import random_tokens, small_config, small_model
from tests.ops.cuda_stand_ins import SIGNATURE, newer_mamba_chunk_scan_combined, stand_ins, varlen_attn
from tests.ops.fuzz import OPS, Draw, describe, results

CASES = 24
# Of so many random cases the kernels must do at least these, or the test would show nothing.
EXPECTED = {
    "ssd": ("mamba_chunk_scan_combined", 8),
    "causal_conv1d": ("causal_conv1d_fn", 4),
    "gated_rms_norm": ("rmsnorm_fn", 12),
    "rms_norm": ("rmsnorm_fn", 12),
}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """The stand-ins are references, so that only the order of sums may differ."""
    assert actual.keys() == expected.keys()
    for name, one in expected.items():
        dtype = min(one.dtype, torch.float32, key=lambda dtype: -torch.finfo(dtype).eps)
        scale = max(one.abs().max().item(), 1e-3) if one.numel() else 1.0
        bound = scale * (64 * torch.finfo(dtype).eps)
        torch.testing.assert_close(
            actual[name], one, atol=bound, rtol=0, msg=lambda text, name=name: f"{what}, {name}: {text}"
        )


@pytest.mark.parametrize("op", EXPECTED)
def test_a_call_site_gives_what_the_reference_gives(op: str) -> None:
    function, least = EXPECTED[op]
    make: Callable[[Draw], object] = OPS[op][0]
    called = 0
    for seed in range(CASES):
        case = make(Draw(seed))
        with stand_ins(mamba_chunk_scan_combined=newer_mamba_chunk_scan_combined) as calls:
            actual = results(case, lambda tensors, case=case: case.run(tensors, "cuda"), case.inputs)
        if not calls[function]:
            continue  # declined: the portable implementation, tested elsewhere
        called += 1
        assert_near(actual, results(case, case.reference, case.inputs), f"case {seed}: {describe(case)}")
    assert called >= least


def test_the_convolution_by_triton_gives_what_the_reference_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, numbers that come again, and states, of several rows, become sequences."""
    monkeypatch.setattr(convolution, "cuda_status", lambda op: CudaStatus(True, "", TRITON_CONVOLUTION))
    called = 0
    for seed in range(CASES):
        case = OPS["causal_conv1d"][0](Draw(seed))
        with stand_ins() as calls:
            actual = results(case, lambda tensors, case=case: case.run(tensors, "cuda"), case.inputs)
        called += calls["causal_conv1d"]
        assert_near(actual, results(case, case.reference, case.inputs), f"case {seed}: {describe(case)}")
    assert called >= CASES // 4


class Tokens:
    """Rows of documents, numbered in each; queries are the last of them, keys all; absent ones in front and behind."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = Draw(seed)
        batch, self.groups, self.shared = draw.number(1, 2, 3), draw.number(1, 2), draw.number(1, 2, 3)
        self.packed = draw.chance(0.5)
        rows: list[Tensor] = []
        for _ in range(batch):
            lengths = [draw.random.randint(0, 12) for _ in range(draw.number(1, 2, 4) if self.packed else 1)]
            documents = [torch.stack([torch.full((n,), d), torch.arange(n)], 1) for d, n in enumerate(lengths)]
            rows.append(torch.cat(documents))
        cached = [
            draw.random.randint(0, max(int((row[:, 0] == row[0, 0]).sum()) - 1, 0)) if len(row) else 0 for row in rows
        ]
        self.key_segment, self.key_index = self.placed(rows)
        queries = [row[count:] for row, count in zip(rows, cached, strict=True)]
        self.query_segment, self.query_index = self.placed(queries)
        self.window = draw.random.choice([None, 1, 3, 16])

    def placed(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        fronts = [self.draw.random.randint(0, 3) for _ in rows]
        length = max(len(row) + front for row, front in zip(rows, fronts, strict=True)) + self.draw.number(0, 2)
        index = torch.full((len(rows), max(length, 2)), -1)
        segment = torch.zeros_like(index)
        for number, (row, front) in enumerate(zip(rows, fronts, strict=True)):
            segment[number, front : front + len(row)], index[number, front : front + len(row)] = row.unbind(1)
        return segment, index

    def run(self, implementation: str) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def normal(index: Tensor, heads: int) -> Tensor:
            return torch.randn(*index.shape, heads, 16, generator=generator).bfloat16().requires_grad_()

        q = normal(self.query_index, self.groups * self.shared)
        k, v = normal(self.key_index, self.groups), normal(self.key_index, self.groups)
        out = attention.windowed_attention(
            q,
            k,
            v,
            query_index_BQ=self.query_index,
            key_index_BJ=self.key_index,
            window=self.window,
            query_segment_BQ=self.query_segment if self.packed else None,
            key_segment_BJ=self.key_segment if self.packed else None,
            implementation=implementation,
        )
        grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


@pytest.mark.parametrize("seed", range(40))
def test_attention_to_the_last_tokens_is_the_kernel_s(seed: int) -> None:
    tokens = Tokens(seed)
    with stand_ins() as calls:
        actual = tokens.run("cuda")
    assert calls["varlen_attn"] == bool((tokens.query_index >= 0).any())
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, tokens.run("reference"), strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gap", ["query", "key", "number", "lonely"])
def test_attention_with_gaps_is_declined(gap: str) -> None:
    tokens = Tokens(0)
    tokens.packed, tokens.window = False, 4
    tokens.query_index = tokens.key_index = torch.arange(12).expand(2, 12)
    if gap == "number":  # positions of selected tokens: the window counts what lies between them
        tokens.query_index = tokens.key_index = torch.tensor([0, 1, 5, 6, 9]).expand(2, 5)
    elif gap == "lonely":  # the first query has no key
        tokens.query_index, tokens.key_index = torch.tensor([[0, 1]]), torch.tensor([[1]])
    else:  # one of the second row is missing in the middle
        index = tokens.key_index.clone()
        index[1, 6] = -1
        tokens.query_index, tokens.key_index = (
            (index, tokens.key_index) if gap == "query" else (tokens.key_index, index)
        )
    with stand_ins() as calls:
        actual = tokens.run("cuda")
    assert calls["varlen_attn"] == 0
    torch.testing.assert_close(actual, tokens.run("reference"), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("stack", "attention"),
    [
        (("sliding_attention", "full_attention"), True),
        ("taipan", True),
        ("mamba2", False),
    ],
)
def test_a_model_is_what_it_is_by_the_references(stack: str | tuple[str, ...], attention: bool, packed: bool) -> None:
    """In pieces with a state, padded or packed, forward and backward."""
    overrides = {"attention_head_dim": 8, "hidden_size": 32, "chunk_size": 16}
    config = small_config(
        stack, key_value_scope="selected", window_unit="selected", gate_gradient="gathered", **overrides
    )
    tokens, cut = random_tokens(2, 40), 23
    options: dict[str, Tensor] = {}
    if packed:
        options["segment_ids"] = (torch.rand(2, 40) < 0.1).cumsum(1)
    else:
        options["attention_mask"] = torch.ones(2, 40, dtype=torch.long)
        options["attention_mask"][1, :9] = 0

    def run(implementation: str) -> dict[str, Tensor]:
        model = TaipanLM(config, implementation=implementation, generator=torch.Generator().manual_seed(0))
        model = model.to(torch.bfloat16).eval()
        first = model(tokens[:, :cut], **{name: value[:, :cut] for name, value in options.items()})
        rest = {name: value[:, cut:] for name, value in options.items()}
        second = model(tokens[:, cut:], state=first.state, **rest)
        logits = torch.cat([first.logits, second.logits], 1)
        logits.float().square().mean().backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return {"logits": logits.detach(), **found}

    with stand_ins(mamba_chunk_scan_combined=newer_mamba_chunk_scan_combined) as calls:
        actual = run("cuda")
    assert (calls["varlen_attn"] > 0) == attention
    assert (calls["mamba_chunk_scan_combined"] > 0) == (stack in ("taipan", "mamba2"))
    expected = run("reference")
    assert actual.keys() == expected.keys()
    for name, one in expected.items():
        scale = one.float().abs().max().item()
        torch.testing.assert_close(
            actual[name].float(), one.float(), atol=0.05 * scale, rtol=0, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_the_stand_in_of_attention_has_the_signature_of_the_kernel() -> None:
    assert ATTENTION.load() is SIGNATURE
    assert inspect.signature(varlen_attn) != inspect.signature(SIGNATURE)  # it binds to it instead
    names = list(inspect.signature(SIGNATURE).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "enable_gqa", "scale"} <= set(names)


def _ssd_inputs(dtype: torch.dtype, tokens: int = 20) -> dict[str, Tensor]:
    return {
        "x_BTHP": torch.randn(1, tokens, 2, 8, dtype=dtype),
        "dt_BTH": torch.rand(1, tokens, 2),
        "A_H": -torch.rand(2),
        "B_BTGN": torch.randn(1, tokens, 1, 16, dtype=dtype),
        "C_BTGN": torch.randn(1, tokens, 1, 16, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("dtype", "precision", "variable", "called"),
    [
        (torch.float64, "high", None, 0),
        (torch.float32, "highest", None, 0),
        (torch.float32, "highest", "ieee", 1),
        (torch.float32, "high", None, 1),
        (torch.bfloat16, "highest", None, 1),
    ],
)
def test_products_in_tf32_are_taken_only_by_those_who_allow_them(
    dtype: torch.dtype, precision: str, variable: str | None, called: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("TRITON_F32_DEFAULT", variable)
    with stand_ins() as calls:
        torch.set_float32_matmul_precision(precision)
        ssd(**_ssd_inputs(dtype), implementation="cuda")
    assert calls["mamba_chunk_scan_combined"] == called


@pytest.mark.parametrize(("newer", "called"), [(False, 0), (True, 1)])
def test_the_gradient_of_a_state_is_fp32_or_the_kernel_is_declined(newer: bool, called: int) -> None:
    state = torch.randn(1, 2, 8, 16, requires_grad=True)
    others = {"mamba_chunk_scan_combined": newer_mamba_chunk_scan_combined} if newer else {}
    with stand_ins(**others) as calls:
        y, _ = ssd(**_ssd_inputs(torch.bfloat16), initial_state_BHPN=state, implementation="cuda")
    assert calls["mamba_chunk_scan_combined"] == called
    y.float().sum().backward()
    assert state.grad is not None
    assert state.grad.dtype == torch.float32


def test_the_convolution_gets_inputs_and_gradients_in_its_layout() -> None:
    """Of another width, at an address no vector begins at, transposed, of one token."""
    wide, multiple = torch.randn(1, 11, 8 + 16 + 3), torch.randn(1, 11, 2 + 16 + 6)
    weight, bias = torch.randn(16, 4), torch.randn(16)
    with stand_ins() as calls:
        for x in (wide[..., 8:-3], multiple[..., 2:-6], torch.randn(1, 16, 11).transpose(1, 2), wide[:, :1, 8:-3]):
            x = x.detach().requires_grad_()
            y, _ = causal_conv1d(x, weight, bias, implementation="cuda")
            torch.autograd.grad(y, x, x.detach())
    assert calls["causal_conv1d_fn"] == 4


@pytest.mark.parametrize(("width", "called"), [(16384, 1), (16385, 0)])
def test_a_group_beyond_64_kilobytes_is_declined(width: int, called: int) -> None:
    with stand_ins() as calls:
        rms_norm(torch.randn(1, width), torch.randn(width), eps=1e-5, implementation="cuda")
    assert calls["rmsnorm_fn"] == called


@pytest.mark.parametrize(("channels", "taps"), [(12, 4), (16, 5)])
def test_channels_and_taps_that_the_convolution_has_not_are_declined(channels: int, taps: int) -> None:
    x, weight, bias = torch.randn(1, 9, channels), torch.randn(channels, taps), torch.randn(channels)
    with stand_ins() as calls:
        y, _ = causal_conv1d(x, weight, bias, implementation="cuda")
    assert calls["causal_conv1d_fn"] == 0
    torch.testing.assert_close(y, causal_conv1d(x, weight, bias, implementation="reference")[0])


def test_one_token_with_a_state_and_small_chunks_are_declined() -> None:
    state = torch.randn(1, 2, 8, 16)
    with stand_ins() as calls:
        ssd(**_ssd_inputs(torch.bfloat16, 1), initial_state_BHPN=state, implementation="cuda")
        ssd(**_ssd_inputs(torch.bfloat16), chunk_size=15, implementation="cuda")
        assert calls["mamba_chunk_scan_combined"] == 0
        ssd(**_ssd_inputs(torch.bfloat16, 1), implementation="cuda")
        assert calls["mamba_chunk_scan_combined"] == 1


def test_offsets_beyond_32_bits_are_declined() -> None:
    def rows(count: int) -> Tensor:
        return torch.empty_strided((count, 8), (2**30, 1), device="meta")

    assert can_index(rows(2), rows(1), blocks=65535)
    assert not can_index(rows(2), rows(3))
    assert not can_index(rows(1), elements=2**31)
    assert not can_index(rows(1), blocks=65536)


class OnGpu(Tensor):
    """Says that it is on a CUDA device."""

    is_cuda = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A tensor on a machine with a CUDA device and mamba_ssm, whose import a test decides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "find_spec", lambda name: ModuleSpec(name, None))
    cuda_status.cache_clear()
    monkeypatch.setattr(cuda.Kernel, "load", lambda kernel: print)
    return torch.zeros(1).as_subclass(OnGpu)


@pytest.fixture(autouse=True)
def forget() -> object:
    cuda_status.cache_clear()
    yield
    cuda_status.cache_clear()


def test_auto_takes_cuda_where_it_can(gpu: Tensor) -> None:
    table = {"cuda": 1, "native": 2, "portable": 3}
    assert chosen("ssd", table, gpu) == "cuda"
    assert select("ssd", table, "cuda", gpu) == 1
    assert chosen("ssd", {"portable": 3}, gpu) == "portable"
    assert chosen("ssd", table, torch.zeros(1)) != "cuda"
    with pytest.raises(ConfigError, match="ssd: the cuda implementation cannot run: the tensor is on cpu"):
        select("ssd", table, "cuda", torch.zeros(1))


def test_a_missing_package_is_named_and_portable_runs(gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert chosen("ssd", {"cuda": 1, "portable": 3}, gpu) == "portable"
    with pytest.raises(ConfigError, match="cannot run: mamba_ssm is not installed: pip install .*gpu"):
        select("ssd", {"cuda": 1, "portable": 3}, "cuda", gpu)


def test_a_package_that_does_not_import_is_named_and_portable_runs(
    gpu: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(kernel: cuda.Kernel) -> object:
        raise OSError("undefined symbol: c10")

    monkeypatch.setattr(cuda.Kernel, "load", load)
    assert chosen("ssd", {"cuda": 1, "portable": 3}, gpu) == "portable"
    assert "cannot be imported: OSError: undefined symbol: c10" in cuda_status("ssd").reason


def test_the_second_kernel_is_taken_where_the_first_is_not_there(gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: ModuleSpec(name, None) if name == "fla" else None)
    assert cuda_status("causal_conv1d").kernel is TRITON_CONVOLUTION
    assert cuda_status("causal_conv1d").reason == "causal_conv1d of fla"
    assert "mamba_ssm is not installed" in cuda_status("ssd").reason


def test_triton_files_are_imported_without_the_compiled_ones_of_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SCAN.files_alone
    package = tmp_path / "half_a_package"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").write_text("import half_a_package_compiled\n")
    (package / "kernels" / "good.py").write_text("import half_a_package.kernels.other\ndef run(): return 'ran'\n")
    (package / "kernels" / "__init__.py").write_text("")
    (package / "kernels" / "other.py").write_text("")
    (package / "kernels" / "bad.py").write_text("import half_a_package_compiled\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("half_a_package", "half_a_package.kernels.{}", "run")

    def kernel(module: str, files_alone: bool) -> Kernel:
        return Kernel(names[0], names[1].format(module), names[2], files_alone)

    for module, files_alone in (("good", False), ("bad", True)):
        with pytest.raises(ModuleNotFoundError, match="half_a_package_compiled"):
            kernel(module, files_alone).load()
        assert "half_a_package" not in sys.modules
    assert kernel("good", True).load()() == "ran"
    for name in [name for name in sys.modules if name.startswith("half_a_package")]:
        del sys.modules[name]


def test_without_a_device_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_status("ssd").reason == "mamba_chunk_scan_combined of mamba_ssm is there, but no CUDA device"
    assert "no kernel of another package" in cuda_status("linear_cross_entropy").reason


class Reads(TorchFunctionMode):
    """Counts the calls that bring numbers to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.count += name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recorded", "reads"), [(False, 1), (True, 0)])
def test_a_step_of_mamba2_reads_nothing_but_the_range_of_its_ids(
    recorded: bool, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a CUDA graph can be made of it, while which nothing can be read."""
    monkeypatch.setattr(decoder, "_recorded", lambda tokens: recorded)
    model = small_model(("mamba2", "mamba2"), dtype=torch.float32)
    tokens = random_tokens(2, 1)
    with torch.no_grad():
        state = model(tokens).state
        with Reads() as mode:
            model(tokens, state=state).state.tensors()
    assert mode.count == reads


def test_importing_taipan_imports_no_kernel() -> None:
    code = "import sys, taipan; assert not {'mamba_ssm', 'causal_conv1d', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
