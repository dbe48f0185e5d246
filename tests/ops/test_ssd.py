"""The oracles of SSD agree, and the fast implementations agree with them: outputs, final state, every gradient."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan.errors import ConfigError, InputError
from taipan.ops.ssd import native, portable, reference, ssd
from taipan.ops.ssd.inputs import SSDInputs
from tests.compilers import NATIVE, needs_kernels
from tests.ops.records import called_like_the_op, unchecked
from tests.tolerance import assert_as_exact_as, assert_equal_to

ssd_native = called_like_the_op(native.ssd_native, SSDInputs)
ssd_portable = called_like_the_op(portable.ssd_portable, SSDInputs)
ssd_recurrent = called_like_the_op(reference.ssd_recurrent, SSDInputs)
ssd_quadratic = called_like_the_op(reference.ssd_quadratic, SSDInputs)
ssd_chunked = called_like_the_op(reference.ssd_chunked, SSDInputs)

LENGTHS = [1, 2, 31, 63, 64, 65, 127, 200]
GROUPS = [(4, 1), (4, 2), (3, 3)]
NAMES = ("y", "final state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")


FAST = [ssd_portable]  # what is tested


IMPLEMENTATIONS = [
    pytest.param(ssd_native, marks=needs_kernels, id="native"),
    pytest.param(ssd_portable, id="portable"),
]
ORACLES = [
    pytest.param(oracle, id=name)
    for name, oracle in (("recurrent", ssd_recurrent), ("quadratic", ssd_quadratic), ("chunked", ssd_chunked))
]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def fast(request: pytest.FixtureRequest) -> None:
    """Every test for both fast implementations."""
    FAST[:] = [request.param]


oracles_too = pytest.mark.parametrize("fast", [*IMPLEMENTATIONS, *ORACLES], indirect=True)
oracles_only = pytest.mark.parametrize("fast", ORACLES, indirect=True)


def ssd_fast(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return FAST[0](*args, **options)


@dataclass
class Inputs:
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    initial: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(*[None if tensor is None else change(tensor) for tensor in self.tensors()])

    def tokens(self, part: slice) -> "Inputs":
        """The same with some of the tokens only."""
        return replace(self, x=self.x[:, part], dt=self.dt[:, part], B=self.B[:, part], C=self.C[:, part])

    def rows(self, part: slice) -> "Inputs":
        initial = None if self.initial is None else self.initial[part]
        one = replace(self, x=self.x[part], dt=self.dt[part], B=self.B[part], C=self.C[part])
        return replace(one, initial=initial)


def make(batch: int, tokens: int, heads: int, groups: int, head_dim: int = 5, state: int = 7) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return Inputs(
        x=normal(batch, tokens, heads, head_dim),
        dt=torch.rand(batch, tokens, heads, dtype=torch.float64) * 0.5,
        A=-torch.rand(heads, dtype=torch.float64) * 4 - 0.05,
        B=normal(batch, tokens, groups, state),
        C=normal(batch, tokens, groups, state),
        D=normal(heads),
        initial=normal(batch, heads, head_dim, state),
    )


def make_segments(batch: int, tokens: int) -> Tensor:
    """Up to four documents, odd rows beginning with a new one; what counts is that the number changes."""
    ordinal = torch.randint(0, 4, (batch, tokens)).sort(dim=1).values
    ordinal[0::2, 0] = 0
    ordinal[1::2] += 1
    return torch.tensor([0, 1, 0, 2, 3])[ordinal]


def run(op: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: object) -> tuple[Tensor, Tensor]:
    i = inputs
    return op(i.x, i.dt, i.A, i.B, i.C, i.D, initial_state_BHPN=i.initial, **options)


def everything(op: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: object) -> list[Tensor]:
    """y, final state and the gradients of all inputs, for one random direction of the outputs."""
    leaves = inputs.map(lambda tensor: tensor.clone().requires_grad_())
    y, state = run(op, leaves, **options)
    given_leaves = [leaf for leaf in leaves.tensors() if leaf is not None]
    gradients = torch.autograd.grad([y, state], given_leaves, directions((y, state)), allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(given_leaves, gradients, strict=True)]
    return [y.detach(), state.detach(), *filled]


class Judged:
    """Several draws together, and what the oracles make of them: how far cancelling terms are off is luck in one."""

    def __init__(self, draws: list[Inputs]) -> None:
        self.draws = draws
        self.exact = self.together(ssd_recurrent, precise=True)
        self.oracles = [self.together(op) for op in (ssd_recurrent, ssd_quadratic, ssd_chunked)]
        self.magnitude_of_dA = torch.stack([magnitude_of_dA(draw) for draw in draws])

    def together(self, op: Callable[..., tuple[Tensor, Tensor]], precise: bool = False) -> list[Tensor]:
        draws = [draw.map(lambda tensor: tensor.double()) if precise else draw for draw in self.draws]
        return [torch.stack(tensors) for tensors in zip(*(everything(op, draw) for draw in draws), strict=True)]

    def assert_fast_is_as_exact(self) -> None:
        narrow = ("y", "dx", "dB", "dC")
        for name, actual, truth, *near in zip(NAMES, self.together(ssd_fast), self.exact, *self.oracles, strict=True):
            dtype = self.draws[0].x.dtype if name in narrow else torch.float32
            magnitude = self.magnitude_of_dA if name == "dA" else None
            assert_as_exact_as(actual, near, truth, dtype, name, magnitude)


def magnitude_of_dA(inputs: Inputs) -> Tensor:
    """Σ |dt_t ∂/∂(dt_t A)|, of which dA is the sum without the bars."""
    inputs = inputs.map(lambda tensor: tensor.double())
    exponent = (inputs.dt * inputs.A).requires_grad_()
    # The same map with -1 for A: only the decays depend on the exponent.
    same = replace(inputs, x=inputs.x * inputs.dt[..., None] / -exponent[..., None], dt=-exponent, D=None)
    outputs = run(ssd_recurrent, replace(same, A=-torch.ones_like(inputs.A)))
    terms = inputs.dt * torch.autograd.grad(outputs, exponent, directions(outputs))[0]
    return terms.abs().sum((0, 1))


def directions(outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """One random direction for y and the final state, always the same, of numbers that every dtype can hold."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]


@pytest.mark.parametrize(("heads", "groups"), GROUPS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_all_agree_in_fp64(tokens: int, heads: int, groups: int, packed: bool) -> None:
    inputs, segment, exact = agreed(tokens, heads, groups, packed)
    for chunk in (16, 64):
        fast = everything(ssd_fast, inputs, segment_BT=segment, chunk_size=chunk)
        assert_equal_to(fast, exact, 1e-10, "fast")


@cache
def agreed(tokens: int, heads: int, groups: int, packed: bool) -> tuple[Inputs, Tensor | None, list[Tensor]]:
    """Inputs and what all oracles make of them, once for the implementations: every test has the same seed."""
    inputs = make(3, tokens, heads, groups)
    segment = make_segments(3, tokens) if packed else None
    exact = everything(ssd_recurrent, inputs, segment_BT=segment)
    assert_equal_to(everything(ssd_quadratic, inputs, segment_BT=segment), exact, 1e-10, "quadratic")
    for chunk in (16, 64):
        assert_equal_to(everything(ssd_chunked, inputs, segment_BT=segment, chunk_size=chunk), exact, 1e-10, "chunked")
    return inputs, segment, exact


@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_without_skip_and_initial_state(tokens: int) -> None:
    inputs = replace(make(2, tokens, 4, 2), D=None, initial=None)
    exact = everything(ssd_recurrent, inputs)
    for op in (ssd_quadratic, ssd_chunked, ssd_fast):
        # Without a state before it, the decay of the only token moves nothing: dA is 0 but for rounding.
        assert_equal_to(everything(op, inputs), exact, 1e-10 if tokens > 1 else 1e-9, op.__name__)


@oracles_too
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradcheck(tokens: int) -> None:
    inputs = make(1, tokens, 2, 2, head_dim=1, state=2).map(lambda tensor: tensor.requires_grad_())
    segment = torch.tensor([[0, 0, 1, 1, 2]])[:, :tokens]
    options = {} if FAST[0] in (ssd_recurrent, ssd_quadratic) else {"chunk_size": 3}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(ssd_fast, Inputs(*tensors), segment_BT=segment, **options)

    assert torch.autograd.gradcheck(function, inputs.tensors(), fast_mode=False)


def in_model_dtypes(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Only x, B and C are narrow; dt, A, D and the state are fp32."""
    inputs = inputs.map(lambda tensor: tensor.float())
    return replace(inputs, x=inputs.x.to(dtype), B=inputs.B.to(dtype), C=inputs.C.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "head_dim", "state"), [(1, 16, 16), (65, 16, 16), (140, 16, 16), (150, 64, 128), (97, 48, 80)]
)
def test_fast_is_as_exact_as_the_reference(dtype: torch.dtype, tokens: int, head_dim: int, state: int) -> None:
    judged = judged_of_sizes(dtype, tokens, head_dim, state)
    y, final = run(ssd_fast, judged.draws[0])
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    judged.assert_fast_is_as_exact()


@cache
def judged_of_sizes(dtype: torch.dtype, tokens: int, head_dim: int, state: int) -> Judged:
    sizes = [make(2, tokens, 4, 1, head_dim, state) for _ in range(6 if state == 16 else 2)]
    return Judged([in_model_dtypes(inputs, dtype) for inputs in sizes])


def test_without_gradients_the_result_is_the_same() -> None:
    inputs = make(3, 200, 4, 2)
    segment = make_segments(3, 200)
    exact = everything(ssd_recurrent, inputs, segment_BT=segment)[:2]
    with torch.no_grad():
        assert_equal_to(run(ssd_fast, inputs, segment_BT=segment), exact, 1e-10, "no_grad")
    assert_equal_to(run(ssd_fast, inputs, segment_BT=segment), exact, 1e-10, "nothing requires grad")


@pytest.mark.parametrize(("batch", "tokens"), [(1, 500), (2, 300), (7, 150)])
def test_tiles_of_many_chunks_and_of_many_rows(batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few long rows make tiles of several chunks of one row, many rows tiles of one chunk of several rows."""
    monkeypatch.setattr(portable, "_TILE_ELEMENTS", 3 * 2 * 32 * 32)
    inputs = make(batch, tokens, 2, 1)
    segment = make_segments(batch, tokens)
    exact = everything(ssd_chunked, inputs, segment_BT=segment, chunk_size=50)
    assert_equal_to(everything(ssd_fast, inputs, segment_BT=segment), exact, 1e-10, "fast")
    with torch.no_grad():
        assert_equal_to(run(ssd_fast, inputs, segment_BT=segment), exact[:2], 1e-10, "without gradients")


@pytest.mark.parametrize("tokens", [63, 64, 65, 130])
def test_large_states_have_longer_chunks(tokens: int) -> None:
    inputs = make(1, tokens, 2, 1, head_dim=32, state=64)
    assert_equal_to(everything(ssd_fast, inputs), everything(ssd_chunked, inputs), 1e-10, "fast")


def test_strided_views_and_unused_gradients() -> None:
    """x, B and C are slices of one projection; the final state may be used without y, and y without it."""
    inputs = make(2, 70, 4, 2)
    wide = torch.cat([inputs.x.flatten(2), inputs.B.flatten(2), inputs.C.flatten(2)], dim=-1).requires_grad_()

    def outputs(op: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, B, C = wide.split([20, 14, 14], dim=-1)
        views = replace(inputs, x=x.unflatten(2, (4, 5)), B=B.unflatten(2, (2, 7)), C=C.unflatten(2, (2, 7)))
        return run(op, views)

    for index in (0, 1):
        actual, exact = (outputs(op)[index].square().sum() for op in (ssd_fast, ssd_recurrent))
        gradients = [torch.autograd.grad(value, wide)[0] for value in (actual, exact)]
        assert_equal_to(gradients[:1], gradients[1:], 1e-10, "dwide")


def test_used_twice_and_backward_twice() -> None:
    """One op whose output feeds another, and a graph walked twice, give the same gradients."""
    inputs = make(2, 70, 2, 1).map(lambda tensor: tensor.requires_grad_())
    leaves = inputs.tensors()

    def loss(op: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        y, state = run(op, inputs)
        again, state = run(op, replace(inputs, x=y, initial=state))
        return again.square().mean() + state.square().mean()

    portable = loss(ssd_fast)
    first = torch.autograd.grad(portable, leaves, retain_graph=True)
    second = torch.autograd.grad(portable, leaves)
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    assert_equal_to(first, torch.autograd.grad(loss(ssd_recurrent), leaves), 1e-10, "gradients")


def test_arguments_are_not_written_to() -> None:
    inputs = make(2, 70, 2, 1)
    before = inputs.map(torch.clone)
    everything(ssd_fast, inputs)
    with torch.no_grad():
        run(ssd_fast, inputs)
        run(ssd_fast, inputs.tokens(slice(0, 1)))
    assert all(one.equal(other) for one, other in zip(inputs.tensors(), before.tensors(), strict=True))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tokens=st.integers(2, 150), packed=st.booleans())
def test_any_split_is_the_whole(data: st.DataObject, tokens: int, packed: bool) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=5)))
    inputs = make(2, tokens, 2, 1)
    segment = make_segments(2, tokens) if packed else torch.zeros(2, tokens, dtype=torch.int64)
    whole = everything(ssd_recurrent, inputs, segment_BT=segment)

    def in_pieces(x, dt, A, B, C, D, *, initial_state_BHPN, segment_BT) -> tuple[Tensor, Tensor]:
        state, current, outputs = initial_state_BHPN, torch.zeros(2, 1, dtype=torch.int64), []
        for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True):
            part = slice(begin, end)
            y, state = ssd(
                x[:, part],
                dt[:, part],
                A,
                B[:, part],
                C[:, part],
                D,
                initial_state_BHPN=state,
                segment_BT=segment_BT[:, part] - current,
            )
            current = segment_BT[:, end - 1 : end]
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert_equal_to(everything(in_pieces, inputs, segment_BT=segment), whole, 1e-10, f"cuts {cuts}")


@oracles_too
def test_segments_are_separate_runs() -> None:
    inputs = make(1, 150, 2, 1)
    ends = [40, 41, 104, 150]
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor([40, 1, 63, 46]))[None]
    y, state = run(ssd_fast, inputs, segment_BT=segment)
    begin, initial = 0, inputs.initial
    for end in ends:
        alone, last = run(ssd_recurrent, replace(inputs.tokens(slice(begin, end)), initial=initial))
        assert_equal_to([y[:, begin:end]], [alone], 1e-12, f"tokens {begin} … {end}")
        begin, initial = end, None
    assert_equal_to([state], [last], 1e-12, "final state")


def test_a_document_knows_nothing_of_its_neighbours() -> None:
    """Not even when they are infinite: what is masked is not multiplied."""
    inputs = make(1, 100, 2, 1)
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor([30, 40, 30]))[None]
    y, _ = run(ssd_fast, inputs, segment_BT=segment)
    inputs.x[:, :30] *= 1e100
    inputs.x[:, 70:] *= 1e100
    assert run(ssd_fast, inputs, segment_BT=segment)[0][:, 30:70].equal(y[:, 30:70])


@oracles_too
@pytest.mark.parametrize("real", [0, 1, 64, 69])
def test_padding_leaves_the_state_where_it_is(real: int) -> None:
    inputs = make(2, 70, 2, 1)
    inputs.dt[:, real:] = 0.0
    y, state = run(ssd_fast, inputs, segment_BT=torch.zeros(2, 70, dtype=torch.int64))
    if real == 0:
        assert state.equal(inputs.initial)
        return
    y_alone, state_alone = run(ssd_recurrent, inputs.tokens(slice(0, real)))
    assert_equal_to([y[:, :real], state], [y_alone, state_alone], 1e-12, "padded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fast_decay_neither_overflows_nor_leaks(dtype: torch.dtype) -> None:
    """Sums of dt · A in the thousands inside a chunk, in fp32, where exp(89) is infinite."""
    judged_of_fast_decay(dtype).assert_fast_is_as_exact()


@cache
def judged_of_fast_decay(dtype: torch.dtype) -> Judged:
    draws: list[Inputs] = []
    for _ in range(4):
        inputs = in_model_dtypes(make(2, 140, 4, 1), dtype)
        inputs = replace(inputs, dt=inputs.dt * torch.rand(2, 140, 4).mul(12).exp() / 100, A=inputs.A * 10)
        assert (inputs.dt * inputs.A)[:, :64].sum(1).min() < -3000
        draws.append(inputs)
    return Judged(draws)


def test_a_decay_to_zero_takes_no_gradient_from_rounding() -> None:
    """Before and after a token with dt = 1e6 the head remembers; what rounds there must not be multiplied by 1e6."""
    inputs = make(1, 60, 2, 1).map(lambda tensor: tensor.float())
    inputs.dt[:, 30] = 1e6
    inputs.B[:, 30] = 0.0
    exact = everything(ssd_recurrent, inputs.map(lambda tensor: tensor.double()))
    assert_equal_to(everything(ssd_fast, inputs), exact, 1e-5, "gradients")


def test_autocast_does_not_reach_inside() -> None:
    inputs = make(2, 70, 2, 1).map(lambda tensor: tensor.float())
    plain = everything(ssd_fast, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = everything(ssd_fast, inputs)
        one = run(ssd_fast, inputs.tokens(slice(0, 1)))
    assert all(a.equal(b) for a, b in zip(plain, cast, strict=True))
    assert all(a.equal(b) for a, b in zip(run(ssd_fast, inputs.tokens(slice(0, 1))), one, strict=True))


def test_unknown_implementation_lists_the_known() -> None:
    inputs = make(1, 4, 2, 1)
    with pytest.raises(ConfigError, match="'quick'; expected one of 'auto', 'cuda', 'native', 'portable', 'reference'"):
        run(ssd, inputs, implementation="quick")


@pytest.mark.parametrize("implementation", [NATIVE, "portable", "reference"])
def test_dispatch_runs_what_was_named(implementation: str) -> None:
    inputs = make(1, 70, 2, 1)
    assert_equal_to(run(ssd, inputs, implementation=implementation), run(ssd_recurrent, inputs), 1e-12, implementation)


unchecked_ssd = unchecked(ssd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(1, 5, 2)}, r"dt has shape \(1, 5, 2\); expected \(1, 4, 2\)"),
        ({"A": torch.zeros(3)}, r"A has shape \(3,\); expected \(2,\)"),
        ({"C": torch.zeros(1, 4, 1, 8)}, r"C has shape .*; expected \(1, 4, 1, 7\)"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\); expected \(2,\)"),
        ({"initial": torch.zeros(1, 2, 7, 5)}, r"initial_state has shape"),
        ({"B": torch.zeros(1, 4, 3, 7), "C": torch.zeros(1, 4, 3, 7)}, "2 heads do not divide into the 3 groups"),
        ({"x": torch.zeros(1, 0, 2, 5)}, r"x has shape \(1, 0, 2, 5\); expected"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(unchecked_ssd, replace(make(1, 4, 2, 1), **change))


def test_segments_and_chunk_size_that_do_not_fit_are_named() -> None:
    inputs = make(1, 4, 2, 1)
    with pytest.raises(InputError, match="segment is torch.float32; expected integer"):
        run(unchecked_ssd, inputs, segment_BT=torch.zeros(1, 4))
    with pytest.raises(InputError, match="chunk_size is 0; expected at least 1"):
        run(ssd, inputs, chunk_size=0)


@oracles_only
def test_autocast_does_not_reach_inside_the_oracles() -> None:
    x, dt, A = torch.randn(1, 12, 2, 4), torch.rand(1, 12, 2), -torch.rand(2)
    B, C = torch.randn(2, 1, 12, 1, 3)
    expected = ssd_fast(x, dt, A, B, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ssd_fast(x, dt, A, B, C)
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)
