"""Selection of tokens: order, padding, and that gather and scatter are each other's inverse, gradients included."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan.errors import InputError
from taipan.ops.selection import gather, propose, scatter, select_all, select_tokens


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Boolean (B, T) of any density, with empty rows, empty batches, rows of no tokens and all selected among them."""
    batch, tokens = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    density = draw(st.sampled_from([0.0, 0.15, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(batch, tokens, generator=generator) < density
    if draw(st.booleans()):
        mask[:1] = False
    return mask


@given(masks())
@settings(deadline=None)
def test_each_row_lists_its_selected_times_in_order(mask: Tensor) -> None:
    selection = select_tokens(mask)
    times = [row.nonzero().flatten().tolist() for row in mask]
    longest = max(map(len, times), default=0)
    assert selection.index_BS.tolist() == [row + [0] * (longest - len(row)) for row in times]
    assert selection.present_BS.tolist() == [[s < len(row) for s in range(longest)] for row in times]
    assert selection.count_B.tolist() == [len(row) for row in times]
    assert selection.everything == (longest == mask.shape[1] and bool(mask.all()))


@given(masks())
@settings(deadline=None)
def test_gathered_tokens_are_those_selected_and_zero_where_absent(mask: Tensor) -> None:
    selection = select_tokens(mask)
    x = torch.randn(*mask.shape, 3, requires_grad=True)
    gathered = gather(x, selection)
    assert torch.equal(gathered[selection.present_BS], x[mask])
    assert (gathered[~selection.present_BS] == 0).all()
    (grad,) = torch.autograd.grad(gathered.sum(), x)  # absent entries must not count for token 0
    assert torch.equal(grad, mask[:, :, None].expand_as(x).to(x.dtype))


@given(masks())
@settings(deadline=None)
def test_scattered_rows_replace_the_selected_tokens_only(mask: Tensor) -> None:
    selection = select_tokens(mask)
    base = torch.randn(*mask.shape, 3, requires_grad=True)
    out = torch.randn(*selection.index_BS.shape, 3, requires_grad=True)
    scattered = scatter(out, selection, base)
    assert torch.equal(scattered[mask], out[selection.present_BS])
    assert torch.equal(scattered[~mask], base[~mask])
    weight = torch.randn_like(base)
    grad_out, grad_base = torch.autograd.grad((scattered * weight).sum(), (out, base), materialize_grads=True)
    assert torch.equal(grad_out[selection.present_BS], weight[mask])
    assert (grad_out[~selection.present_BS] == 0).all()
    assert torch.equal(grad_base, weight.masked_fill(mask[:, :, None], 0.0))


def test_selecting_every_token_copies_nothing() -> None:
    selection = select_tokens(torch.ones(2, 5, dtype=torch.bool))
    x, base = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert gather(x, selection) is x
    assert scatter(x, selection, base) is x


@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (3, 0)])
def test_all_tokens_are_those_of_a_mask_that_is_true_everywhere(batch: int, tokens: int) -> None:
    ours = select_all(batch, tokens, torch.device("cpu"))
    theirs = select_tokens(torch.ones(batch, tokens, dtype=torch.bool))
    assert ours.everything == theirs.everything
    for name, value in vars(theirs).items():
        assert torch.equal(getattr(ours, name), value) if isinstance(value, Tensor) else getattr(ours, name) == value


def test_what_does_not_fit_is_refused() -> None:
    select, take, put = (inspect.unwrap(f) for f in (select_tokens, gather, scatter))  # below the tests' shape checks
    with pytest.raises(InputError, match=r"torch.bool \(B, T\)"):
        select(torch.ones(2, 5))
    selection = select_tokens(torch.tensor([[True, False, True]]))
    with pytest.raises(InputError, match=r"needs \(1, 3, D\)"):
        take(torch.zeros(1, 4, 2), selection)
    with pytest.raises(InputError, match=r"needs \(1, 2, D\)"):
        put(torch.zeros(1, 3, 2), selection, torch.zeros(1, 3, 2))
    with pytest.raises(InputError, match="one dtype"):
        put(torch.zeros(1, 2, 2), selection, torch.zeros(1, 3, 2, dtype=torch.float64))


@given(masks())
@settings(deadline=None)
def test_a_proposed_change_is_not_made_but_weighed(mask: Tensor) -> None:
    """The value is the base; gradients are those of base + weight · change, a constant, where weights are 0."""
    selection, generator = select_tokens(mask), torch.Generator().manual_seed(0)
    base, direction = (torch.randn(*mask.shape, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    change = gather(torch.randn(*mask.shape, 3, generator=generator, dtype=torch.float64), selection)
    leaves = base.requires_grad_(), torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    out = propose(*leaves, change, selection)
    assert out.equal(base)
    found = torch.autograd.grad(out, leaves, direction)
    made = base + leaves[1][..., None] * scatter(change, selection, torch.zeros_like(base))
    for one, other in zip(found, torch.autograd.grad(made, leaves, direction), strict=True):
        torch.testing.assert_close(one, other)
