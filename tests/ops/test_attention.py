"""Windowed attention: portable = native = reference = PyTorch's own where that can say it; cost; absent queries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taipan.errors import ConfigError, InputError
from taipan.ops.attention import portable, windowed_attention
from taipan.ops.retention import NEVER
from tests.compilers import NATIVE, needs_kernels
from tests.ops.records import unchecked


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    query_index: Tensor
    key_index: Tensor
    window: int | None
    query_segment: Tensor | None = None
    key_segment: Tensor | None = None
    key_until: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def run(self, implementation: str) -> Tensor:
        return windowed_attention(
            self.q,
            self.k,
            self.v,
            query_index_BQ=self.query_index,
            key_index_BJ=self.key_index,
            window=self.window,
            query_segment_BQ=self.query_segment,
            key_segment_BJ=self.key_segment,
            key_until_BJ=self.key_until,
            implementation=implementation,
        )

    def run_with_gradients(self, implementation: str, grad_out: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        out = replace(self, q=leaves[0], k=leaves[1], v=leaves[2]).run(implementation)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype)))


def dense(batch: int, length: int, heads: int, groups: int, width: int, window: int | None) -> Case:
    """Every position a query and a key."""
    index = torch.arange(length).expand(batch, length)
    q, k, v = (torch.randn(batch, length, n, width, dtype=torch.float64) for n in (heads, groups, groups))
    return Case(q, k, v, index, index, window)


def _ragged(
    coordinates: list[Tensor], front: list[int], length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(segment, index) rows of different lengths at different offsets, −1 (in any segment) around them."""
    index = torch.full((len(coordinates), length), -1)
    segment = torch.randint(4, index.shape, generator=generator)
    for row, (entries, offset) in enumerate(zip(coordinates, front, strict=True)):
        segment[row, offset : offset + len(entries)], index[row, offset : offset + len(entries)] = entries.unbind(1)
    return segment, index


@st.composite
def ragged_cases(draw: st.DrawFn, longest: int) -> Case:
    """Rows of documents; each row's queries and keys are random subsets of its tokens, padded in front and behind."""
    batch, groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with_segments = draw(st.booleans())

    def subset(tokens: Tensor, density: float) -> Tensor:
        return tokens[torch.rand(len(tokens), generator=generator) < density]

    stride = draw(st.sampled_from([1, 1, 3]))  # tokens that share a coordinate, as ordinals do
    rows: list[Tensor] = []
    for _ in range(batch):
        documents = draw(st.lists(st.integers(0, longest), min_size=1, max_size=3 if with_segments else 1))
        rows.append(
            torch.cat(
                [torch.stack([torch.full((n,), d), torch.arange(n) // stride], 1) for d, n in enumerate(documents)]
            )
        )
    queries = [subset(row, draw(st.sampled_from([0.0, 0.15, 1.0]))) for row in rows]
    keys = [subset(row, draw(st.sampled_from([0.0, 0.3, 1.0]))) for row in rows]
    padded: list[tuple[Tensor, Tensor]] = []
    for entries in (queries, keys):
        front = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
        back = draw(st.integers(0, 3))
        length = max(offset + len(row) for row, offset in zip(entries, front, strict=True)) + back
        padded.append(_ragged(entries, front, length, generator))
    (query_segment, query_index), (key_segment, key_index) = padded
    q, k, v = (
        torch.randn(batch, index.shape[1], heads, 4, dtype=torch.float64, generator=generator)
        for index, heads in ((query_index, groups * shared), (key_index, groups), (key_index, groups))
    )
    window = draw(st.one_of(st.none(), st.integers(1, 2 * longest)))
    segments = (query_segment, key_segment) if with_segments else (None, None)
    until = None
    if draw(st.booleans()):  # some keys are never seen, and some for as long as there are queries
        stay = torch.rand(key_index.shape, generator=generator) * draw(st.sampled_from([3, longest, 5 * longest]))
        until = (key_index + stay.long()).masked_fill(torch.rand(key_index.shape, generator=generator) < 0.2, NEVER)
    return Case(q, k, v, query_index, key_index, window, *segments, until)


def assert_implementations_agree(case: Case, implementation: str = "portable") -> None:
    grad_out = torch.randn_like(case.q)
    for ours, oracle in zip(
        case.run_with_gradients(implementation, grad_out), case.run_with_gradients("reference", grad_out), strict=True
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-10)


@given(ragged_cases(longest=12))
@settings(max_examples=60, deadline=None)
def test_portable_is_the_reference_within_one_block(case: Case) -> None:
    assert_implementations_agree(case)


@given(ragged_cases(longest=60), st.sampled_from([4, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_portable_is_the_reference_over_many_blocks(case: Case, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "block_size", lambda window: size)
        assert_implementations_agree(case)


@needs_kernels
@given(st.one_of(ragged_cases(longest=12), ragged_cases(longest=200)))
@settings(max_examples=100, deadline=None)
def test_native_is_the_reference(case: Case) -> None:
    assert_implementations_agree(case, "native")


@needs_kernels
@pytest.mark.parametrize("window", [1, 100, 300, None])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "length"), [(2, 1, 5, 701), (6, 2, 16, 533), (1, 1, 33, 701), (130, 1, 4, 301)]
)
def test_native_is_the_reference_over_many_blocks(
    window: int | None, heads: int, groups: int, width: int, length: int
) -> None:
    """Blocks of queries and of keys (256), slices of keys; few ask, some keys are absent, the last row is short."""
    case = dense(2, length, heads, groups, width, window)
    asks, there = torch.rand(2, length) < 0.4, torch.rand(2, length) < 0.9
    query_index, key_index = case.query_index.where(asks, -1), case.key_index.where(there, -1)
    key_index[1, 5 * length // 7 :] = query_index[1, 5 * length // 7 :] = -1
    assert_implementations_agree(replace(case, query_index=query_index, key_index=key_index), "native")


@pytest.mark.parametrize("implementation", ["portable", NATIVE])
@pytest.mark.parametrize("segments", [False, True])
def test_keys_that_leave_one_by_one_over_many_blocks(implementation: str, segments: bool) -> None:
    """Few keys stay: blocks of queries far behind need keys that lie far apart, and whole blocks of keys have gone."""
    case = dense(2, 1100, 4, 2, 8, None)
    stay = torch.where(torch.rand(2, 1100) < 0.03, 2000, torch.randint(0, 40, (2, 1100)))
    segment = torch.arange(1100).expand(2, -1) // 700 if segments else None
    index = case.key_index if segment is None else case.key_index - 700 * segment
    case = replace(case, query_index=index, key_index=index, query_segment=segment, key_segment=segment)
    assert_implementations_agree(replace(case, key_until=index + stay), implementation)


@needs_kernels
def test_native_adds_up_in_the_same_order_whatever_the_threads() -> None:
    case = dense(1, 900, 2, 1, 16, window=700).to(torch.float32)
    grad_out, threads = torch.randn_like(case.q), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = case.run_with_gradients("native", grad_out)
        torch.set_num_threads(3)
        together = [case.run_with_gradients("native", grad_out) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    for results in together:
        assert all(torch.equal(one, other) for one, other in zip(alone, results, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_reads_tensors_where_they_lie(dtype: torch.dtype) -> None:
    """Parts of one projection, rows in another order, a gradient that is one number everywhere."""
    batch, length, heads, width = 2, 150, 2, 20
    whole = torch.randn(length, batch, heads, 3 * width).to(dtype).transpose(0, 1)
    index = torch.arange(length).expand(batch, length)
    q, k, v = whole.split(width, dim=-1)
    case = Case(q, k, v, index, index, 40)
    compact = replace(case, q=q.contiguous(), k=k.contiguous(), v=v.contiguous())
    one = torch.ones((), dtype=dtype)
    for ours, expected in zip(
        case.run_with_gradients("native", one.expand_as(q)),
        compact.run_with_gradients("native", torch.ones_like(compact.q)),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("recorded", [0, 100])
@pytest.mark.parametrize("window", [1, 130, None])
def test_rows_that_need_keys_far_apart_are_gathered(
    window: int | None, recorded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 0 selects densely at its start, row 1 at its end: the union of their keys is most of the sequence."""
    monkeypatch.setattr(portable, "MAX_RECORDED_BLOCKS", recorded)
    index = torch.arange(1200)
    query_index = torch.stack([index[:300], index[-300:]])
    q, k, v = (torch.randn(2, n, 2, 4, dtype=torch.float64) for n in (300, 1200, 1200))
    assert_implementations_agree(Case(q, k, v, query_index, index.expand(2, -1), window))


@pytest.mark.parametrize("implementation", ["portable", "reference", NATIVE])
@pytest.mark.parametrize("length", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_window_of_the_whole_length_is_causal_attention(length: int, dtype: torch.dtype, implementation: str) -> None:
    case = dense(2, length, 4, 2, 8, window=length).to(dtype)
    expected = F.scaled_dot_product_attention(
        case.q.transpose(1, 2), case.k.transpose(1, 2), case.v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(case.run(implementation), expected)
    torch.testing.assert_close(replace(case, window=None).run(implementation), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [50, 400])
def test_precision_is_that_of_the_dtype(dtype: torch.dtype, length: int) -> None:
    """Values and gradients against the float64 oracle of the same (rounded) inputs."""
    for error in errors(dense(2, length, 4, 2, 16, window=100).to(dtype), "portable"):
        assert error < 4 * torch.finfo(dtype).eps


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [50, 400])
def test_native_loses_what_the_reference_loses(dtype: torch.dtype, length: int) -> None:
    """Beside a rounding of the result, and by the factor that the random cases have, too (`tests.ops.fuzz`)."""
    case = dense(2, length, 4, 2, 16, window=100).to(dtype)
    for error, lost in zip(errors(case, "native"), errors(case, "reference"), strict=True):
        assert error < 2 * (lost + torch.finfo(dtype).eps)


def errors(case: Case, implementation: str) -> list[float]:
    """Of values and gradients, relative to the largest, against the float64 oracle of the same (rounded) inputs."""
    grad_out = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(0)).to(case.q.dtype)
    ours = case.run_with_gradients(implementation, grad_out)
    oracle = case.to(torch.float64).run_with_gradients("reference", grad_out.to(torch.float64))
    assert all(got.dtype == case.q.dtype for got in ours)
    return [
        float((got - expected).abs().max() / expected.abs().max()) for got, expected in zip(ours, oracle, strict=True)
    ]


@pytest.mark.parametrize("implementation", ["portable", NATIVE])
def test_gradients_of_a_key_in_many_blocks_are_summed_precisely(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value gets many small gradients of one sign, which a bfloat16 sum would lose beside the large ones."""
    monkeypatch.setattr(portable, "block_size", lambda window: 16)
    case = dense(1, 1024, 1, 1, 4, window=None).to(torch.bfloat16)
    case = replace(case, q=torch.zeros_like(case.q))
    grad_out = torch.ones_like(case.q)
    ours = case.run_with_gradients(implementation, grad_out)[3].to(torch.float64)
    oracle = case.to(torch.float64).run_with_gradients("reference", grad_out.to(torch.float64))[3]
    assert ((ours - oracle).abs() / oracle).max() < 2 * torch.finfo(torch.bfloat16).eps


def test_reference_passes_gradcheck() -> None:
    index = torch.tensor([[-1, 0, 1, 2, 0, 1], [0, 1, 2, 3, -1, -1]])
    segment = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    q, k, v = (torch.randn(2, 6, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Case(q, k, v, index, index, 2, segment, segment).run("reference")

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("implementation", ["portable", "reference", NATIVE])
@pytest.mark.parametrize("length", [8, 400])
def test_absent_and_lonely_queries_give_zero_and_no_gradient(implementation: str, length: int) -> None:
    index = torch.arange(length).expand(2, length).clone()
    query_index, key_index = index.clone(), index.clone()
    query_index[0, -3:] = -1  # absent
    key_index[1, :5] = -1  # queries 0…3 of row 1 have no key in their window of 2; query 4 neither
    q, k, v = (torch.randn(2, length, 2, 4) for _ in range(3))
    out, *gradients = Case(q, k, v, query_index, key_index, 2).run_with_gradients(implementation, torch.ones_like(q))
    silent = torch.zeros(2, length, dtype=torch.bool)
    silent[0, -3:] = silent[1, :5] = True
    assert (out[silent] == 0).all()
    assert (out[~silent] != 0).all()
    assert (gradients[0][silent] == 0).all()
    assert all((gradient[1, :5] == 0).all() for gradient in gradients[1:])
    assert all(gradient.isfinite().all() for gradient in (out, *gradients))


@pytest.mark.parametrize("implementation", ["portable", "reference", NATIVE])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0), (600, 0), (0, 600)])
def test_no_queries_or_no_keys(implementation: str, queries: int, keys: int) -> None:
    segments = (torch.zeros(2, queries, dtype=torch.int64), torch.zeros(2, keys, dtype=torch.int64))
    index = (torch.arange(queries).expand(2, -1), torch.arange(keys).expand(2, -1))
    q, k, v = (torch.randn(2, n, 2, 4) for n in (queries, keys, keys))
    for more in ((), segments):
        case = Case(q, k, v, *index, 100, *more)
        out, *gradients = case.run_with_gradients(implementation, torch.ones_like(q))
        assert (out == 0).all()
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ["portable", NATIVE])
def test_decoding_one_query_is_the_last_row_of_the_whole(implementation: str) -> None:
    case = dense(2, 700, 4, 2, 8, window=64)
    last = replace(case, q=case.q[:, -1:], query_index=case.query_index[:, -1:])
    torch.testing.assert_close(last.run(implementation), case.run(implementation)[:, -1:])


@pytest.mark.parametrize("implementation", ["portable", NATIVE])
def test_autocast_does_not_change_the_dtype(implementation: str) -> None:
    for length in (20, 300):
        case = dense(1, length, 2, 1, 8, window=50).to(torch.float32)
        expected = case.run_with_gradients(implementation, torch.ones_like(case.q))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = case.run_with_gradients(implementation, torch.ones_like(case.q))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_does_not_reach_inside_the_oracle() -> None:
    case = dense(1, 20, 2, 1, 8, window=50).to(torch.float32)
    expected = case.run("reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run("reference"), expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.elements = max(self.elements, *made, 0)
        return result


def padded_at_both_ends(length: int, window: int) -> Case:
    """Twenty tokens with much absence before and behind them, among the queries and among the keys."""
    index = torch.full((1, length), -1)
    index[0, length // 2 : length // 2 + 20] = torch.arange(20) + 300
    q, k, v = torch.randn(3, 1, length, 1, 8).unbind(0)
    around = slice(length // 2 - 100, length // 2 + 100)
    return Case(q[:, around], k, v, index[:, around], index, window)


def absent_among_the_last(length: int, window: int) -> Case:
    """The last tokens ask, with absence around them."""
    index = torch.full((1, 200), -1)
    index[0, 100:120] = torch.arange(length - 20, length)
    q, k, v = torch.randn(1, 200, 1, 8), torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8)
    return Case(q, k, v, index, torch.arange(length)[None], window)


def rows_far_apart(length: int, window: int) -> Case:
    """Few queries, those of row 0 at the start of the keys and those of row 1 at the end."""
    index = torch.arange(length)
    q, k, v = torch.randn(2, 300, 1, 8), torch.randn(2, length, 1, 8), torch.randn(2, length, 1, 8)
    return Case(q, k, v, torch.stack([index[:300], index[-300:]]), index.expand(2, -1), window)


def one_long_row(length: int, window: int) -> Case:
    return dense(1, length, 1, 1, 8, window).to(torch.float32)


@pytest.mark.parametrize("make", [one_long_row, padded_at_both_ends, absent_among_the_last, rows_far_apart])
@pytest.mark.parametrize("implementation", ["portable", NATIVE])
def test_memory_follows_the_window_not_the_length(make: Callable[[int, int], Case], implementation: str) -> None:
    window = 256
    case = make(16400, window)  # the last block is a short one
    with LargestTensor() as largest:
        case.run_with_gradients(implementation, torch.ones_like(case.q))
    batch, _, heads, _ = case.q.shape
    block = window  # at most
    if implementation == "native":  # no mask; some gradients of queries twice, where their keys are of two tasks
        assert largest.elements <= 1.25 * max(case.q.numel(), case.k.numel())
    else:
        assert largest.elements <= max(block * (window + block) * batch * heads, case.k.numel())


@pytest.mark.parametrize(
    ("implementation", "more"), [("portable", 0.0), pytest.param("native", 0.75, marks=needs_kernels)]
)
def test_a_long_row_keeps_little_but_its_inputs_for_backward(implementation: str, more: float) -> None:
    """Native also keeps its result, and a few numbers of each query and key."""
    case = one_long_row(4096, 64)
    leaves = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        case.run(implementation)
    inputs = sum(leaf.numel() for leaf in leaves)
    assert inputs <= kept <= (1 + more) * inputs


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ConfigError, "window is 0"),
        ({"q": torch.zeros(2, 6, 3, 8)}, InputError, "3 query heads cannot share 2"),
        ({"q": torch.zeros(1, 6, 4, 8)}, InputError, r"expected \(B, Q, H, E\)"),
        ({"v": torch.zeros(2, 6, 2, 8, dtype=torch.float64)}, InputError, "one dtype"),
        ({"query_index": torch.zeros(2, 6, dtype=torch.int32)}, InputError, "query_index is torch.int32"),
        ({"query_segment": torch.zeros(2, 6, dtype=torch.int64)}, InputError, "segments for both"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = replace(dense(2, 6, 4, 2, 8, window=4).to(torch.float32), **change)
    checked_by_us = unchecked(windowed_attention)
    with pytest.raises(error, match=message):
        checked_by_us(
            case.q,
            case.k,
            case.v,
            query_index_BQ=case.query_index,
            key_index_BJ=case.key_index,
            window=case.window,
            query_segment_BQ=case.query_segment,
            key_segment_BJ=case.key_segment,
        )


def test_an_unknown_implementation_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="portable"):
        dense(1, 2, 1, 1, 2, window=None).run("fast")
