"""State space duality in PyTorch operations that run everywhere, with a backward written by hand.

The sequence is cut into chunks of Q tokens (Dao & Gu 2024, section 6). With s = cumsum(dt A) inside a chunk, S the
state at its entrance and S' at its end,

    y  = ((C Bᵀ) ∘ L) (dt x) + e^s (C S) + D x          L_ij = e^(s_i - s_j), j ≤ i
    S' = e^(s_Q) S + Σ_j e^(s_Q - s_j) dt_j x_j B_jᵀ

and every exponent is ≤ 0, so nothing overflows however fast a head forgets. The chunks are visited in tiles that fit
the cache: a tile is either one chunk of several rows or several consecutive chunks of one row, so that it is one batch
dimension (n) of the products below. The heads of a group share C Bᵀ and one product with the state. The diagonal of the
matrix, where L is 1, is left out and added like the skip connection. The backward keeps the inputs, the output without
the diagonal ("past") and the states between chunks; it computes decays again.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.ops.documents import running_documents
from taipan.ops.precision import accumulation_dtype, no_autocast
from taipan.ops.ssd.inputs import SSDInputs
from taipan.shapes import FloatBHPN, FloatBTHP

# Elements of the (n, H, Q, Q) decays of a tile: few enough for the cache, many enough to make the calls worth it.
_TILE_ELEMENTS = 8 * 8 * 64 * 64


# A decay with a larger exponent is below a rounding, even in fp64.
_NOTHING_PASSES = -40.0


def best_chunk(head_dim: int, state_size: int) -> int:
    """Tokens per chunk: the matrices cost Q a token, the states P · N / Q; measured on AVX2 cores with 512 KB of L2."""
    return 32 if head_dim * state_size <= 32 * 32 else 64


def _unflatten(tensor: Tensor, dim: int, outer: int) -> Tensor:
    """View dimension ``dim`` as (outer, rest)."""
    shape = tensor.shape
    return tensor.view(*shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :])


class _Tile(NamedTuple):
    """Chunks [first, first + chunks) of rows [row, row + rows), tokens [begin, begin + chunks * size)."""

    row: int
    rows: int
    first: int
    chunks: int
    begin: int
    size: int

    def tokens(self, tensor_BT: Tensor) -> Tensor:
        """View (B, T, …) as (n, Q, …)."""
        if self.chunks == 1:
            return tensor_BT[self.row : self.row + self.rows, self.begin : self.begin + self.size]
        end = self.begin + self.chunks * self.size
        return _unflatten(tensor_BT[self.row, self.begin : end], 0, self.chunks)

    def states(self, states_BC: Tensor, offset: int) -> Tensor:
        """View (B, chunks + 1, …) as (n, …): states at the entrances (offset 0) or ends (offset 1) of chunks."""
        first = self.first + offset
        if self.chunks == 1:
            return states_BC[self.row : self.row + self.rows, first]
        return states_BC[self.row, first : first + self.chunks]


def _tiles(batch: int, tokens: int, heads: int, chunk: int) -> Iterator[_Tile]:
    """Cut (batch, tokens) into tiles, earlier tokens of a row first; the last chunk of a row may be shorter."""
    whole, rest = divmod(tokens, chunk)
    width = max(1, _TILE_ELEMENTS // (heads * chunk * chunk))
    if batch >= width or whole <= 1:
        for row in range(0, batch, width):
            for first in range(whole):
                yield _Tile(
                    row=row, rows=min(width, batch - row), first=first, chunks=1, begin=first * chunk, size=chunk
                )
    else:
        for row in range(batch):
            for first in range(0, whole, width):
                yield _Tile(
                    row=row, rows=1, first=first, chunks=min(width, whole - first), begin=first * chunk, size=chunk
                )
    if rest:
        width = max(1, _TILE_ELEMENTS // (heads * rest * rest))
        for row in range(0, batch, width):
            yield _Tile(row=row, rows=min(width, batch - row), first=whole, chunks=1, begin=whole * chunk, size=rest)


def _running_segment(segment_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Number of resets up to each token, and up to the token before it."""
    running_BT = running_documents(segment_BT)
    before_BT = torch.zeros_like(running_BT)
    before_BT[:, 1:] = running_BT[:, :-1]
    return running_BT, before_BT


class _Decay(NamedTuple):
    """Decays of a tile: between tokens of a chunk, from its entrance, to its end, and through it."""

    inside_nHQQ: Tensor
    entrance_nQH: Tensor
    end_nQH: Tensor
    through_nH: Tensor
    mask_nQQ: Tensor | None


def _sums_in_two_parts(rate_nHQ: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums with about twice the digits of fp64: exact sums of multiples of a step, and sums of the rests."""
    longest = rate_nHQ.abs().amax(-1, keepdim=True) * rate_nHQ.shape[-1]
    _, exponent = torch.frexp(longest.clamp_min(torch.finfo(torch.float64).tiny))
    step = torch.ldexp(torch.ones_like(longest), (exponent - 52).clamp_min(-1000))
    multiple_nHQ = (rate_nHQ / step).round_().mul_(step)
    return multiple_nHQ.cumsum(-1), (rate_nHQ - multiple_nHQ).cumsum(-1)


def _decay(dt_nQH: Tensor, A_H: Tensor, segment_nQ: Tensor | None, before_nQ: Tensor | None) -> _Decay:
    # Powers of 2, because exp2 is about twice as fast as exp on the CPU. The sums are fp64 and differences of them are
    # taken in two parts: a slow token after a fast one (large sums, small difference) then loses no digits.
    rate_nHQ = (dt_nQH.double() * (A_H.double() * math.log2(math.e))).transpose(1, 2)
    if A_H.dtype == torch.float64:
        high_nHQ, low_nHQ = _sums_in_two_parts(rate_nHQ)
        entrance_nHQ = (high_nHQ + low_nHQ).exp2_()
    else:
        log_nHQ = rate_nHQ.cumsum(-1)
        high_nHQ = log_nHQ.to(A_H.dtype)
        low_nHQ = (log_nHQ - high_nHQ).to(A_H.dtype)
        entrance_nHQ = high_nHQ.exp2()
    inside_nHQQ = high_nHQ[..., :, None] - high_nHQ[..., None, :]
    inside_nHQQ.add_(low_nHQ[..., :, None]).sub_(low_nHQ[..., None, :])
    # Above the diagonal the difference is positive; the clamp keeps it finite until C Bᵀ, which is 0 there, meets it.
    inside_nHQQ.clamp_max_(0).exp2_()
    end_nHQ = (high_nHQ[..., -1:] - high_nHQ).add_(low_nHQ[..., -1:] - low_nHQ).exp2_()
    through_nH = entrance_nHQ[..., -1]
    mask_nQQ = None
    if segment_nQ is not None and before_nQ is not None:
        incoming_n1 = before_nQ[:, :1]
        mask_nQQ = segment_nQ[:, :, None] == segment_nQ[:, None, :]
        entrance_nHQ = entrance_nHQ * (segment_nQ == incoming_n1)[:, None]
        end_nHQ = end_nHQ * (segment_nQ == segment_nQ[:, -1:])[:, None]
        through_nH = through_nH * (segment_nQ[:, -1:] == incoming_n1)
    return _Decay(
        inside_nHQQ=inside_nHQQ,
        entrance_nQH=entrance_nHQ.transpose(1, 2),
        end_nQH=end_nHQ.transpose(1, 2),
        through_nH=through_nH,
        mask_nQQ=mask_nQQ,
    )


def _by_group(tensor_nQG: Tensor, groups: int) -> Tensor:
    """(n, Q, G, …) as (n · G, Q, …), without a copy when G is 1."""
    return _unflatten(tensor_nQG, 2, groups).transpose(1, 2).flatten(3).flatten(0, 1)


def _by_token(tensor_nGQ: Tensor, groups: int) -> Tensor:
    """(n · G, Q, F) as (n, Q, G, F): the inverse of `_by_group`."""
    return _unflatten(tensor_nGQ, 0, tensor_nGQ.shape[0] // groups).transpose(1, 2)


def _state_by_group(state_nHPN: Tensor, groups: int) -> Tensor:
    """(n, H, P, N) as (n · G, H / G · P, N)."""
    return _unflatten(state_nHPN, 1, groups).flatten(2, 3).flatten(0, 1)


def _scores(B_nQN: Tensor, C_nQN: Tensor, groups: int, mask_nQQ: Tensor | None) -> tuple[Tensor, Tensor]:
    """C Bᵀ of each group: strictly below the diagonal and inside documents (n, G, Q, Q), and the diagonal (n, Q, G)."""
    scores_nGQQ = torch.bmm(C_nQN, B_nQN.transpose(1, 2))
    scores_nGQQ = _unflatten(scores_nGQQ, 0, scores_nGQQ.shape[0] // groups)
    diagonal_nQG = scores_nGQQ.diagonal(dim1=2, dim2=3).transpose(1, 2).clone()
    scores_nGQQ.tril_(-1)
    if mask_nQQ is not None:
        scores_nGQQ *= mask_nQQ[:, None]
    return scores_nGQQ, diagonal_nQG


def _heads_first(x_nQHP: Tensor, factor_nQH: Tensor | None = None) -> Tensor:
    """x, times the factor, as contiguous (n · H, Q, P)."""
    batch, size, heads, head_dim = x_nQHP.shape
    out_nHQP = x_nQHP.new_empty(batch, heads, size, head_dim)
    if factor_nQH is None:
        out_nHQP.copy_(x_nQHP.transpose(1, 2))
    else:
        torch.mul(x_nQHP.transpose(1, 2), factor_nQH.transpose(1, 2)[..., None], out=out_nHQP)
    return out_nHQP.flatten(0, 1)


def _scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    segment_BT: Tensor | None,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y, its part from the past in the dtype of accumulation, and the states between chunks.

    The states are (B, chunks + 1, H, P, N). Without ``keep`` there is no past to return, and the states are
    (B, 1, H, P, N), the last one only, whatever the length.
    """
    accumulate = accumulation_dtype(x_BTHP.dtype)
    batch, tokens, heads, head_dim = x_BTHP.shape
    groups, state_size = B_BTGN.shape[2:]
    chunks = -(-tokens // chunk)
    y_BTHP = x_BTHP.new_empty(x_BTHP.shape)
    past_BTHP = x_BTHP.new_empty(x_BTHP.shape, dtype=accumulate) if keep else None
    slots = chunks + 1 if keep else 1
    states = x_BTHP.new_empty(batch, slots, heads, head_dim, state_size, dtype=accumulate)
    if initial_state_BHPN is None:
        states[:, 0] = 0
    else:
        states[:, 0] = initial_state_BHPN
    running_BT, before_BT = (None, None) if segment_BT is None else _running_segment(segment_BT)
    A = A_H.to(accumulate)
    D = A.new_zeros(heads) if D_H is None else D_H.to(accumulate)

    for tile in _tiles(batch, tokens, heads, chunk):
        x, dt = tile.tokens(x_BTHP).to(accumulate), tile.tokens(dt_BTH).to(accumulate)
        B = _by_group(tile.tokens(B_BTGN).to(accumulate), groups)
        C = _by_group(tile.tokens(C_BTGN).to(accumulate), groups)
        segment = None if running_BT is None else tile.tokens(running_BT)
        before = None if before_BT is None else tile.tokens(before_BT)
        decay = _decay(dt, A, segment, before)
        size = tile.size

        # The state at the end of each chunk: what the chunk adds, then the recurrence over the chunks of the tile.
        weighted = _by_group(x * (decay.end_nQH * dt)[..., None], groups)
        added = torch.bmm(weighted.transpose(1, 2), B).view(-1, heads, head_dim, state_size)
        through = decay.through_nH[..., None, None]
        if keep:
            entrance, end = tile.states(states, 0), tile.states(states, 1)
        elif tile.chunks == 1:
            entrance = states[tile.row : tile.row + tile.rows, 0]
            end = added
        else:
            entrance = torch.empty_like(added)
            entrance[0] = states[tile.row, 0]
            end = torch.empty_like(added)
        if tile.chunks == 1:
            torch.addcmul(added, through, entrance, out=end)
        else:
            state = entrance[0]
            for index in range(tile.chunks):
                if not keep:
                    entrance[index] = state
                state = torch.addcmul(added[index], through[index], state, out=end[index])
        entrance_by_group = _state_by_group(entrance, groups)

        # The output: from tokens before in the chunk, from the state at its entrance, and from the token itself.
        scores, diagonal = _scores(B, C, groups, decay.mask_nQQ)
        matrix = decay.inside_nHQQ
        _unflatten(matrix, 1, groups).mul_(scores[:, :, None])
        inside = torch.bmm(matrix.flatten(0, 1), _heads_first(x, dt)).view(-1, heads, size, head_dim)
        across = _by_token(torch.bmm(C, entrance_by_group.transpose(1, 2)), groups).reshape(-1, size, heads, head_dim)
        past = None if past_BTHP is None else tile.tokens(past_BTHP)
        past = torch.addcmul(inside.transpose(1, 2), across, decay.entrance_nQH[..., None], out=past)
        itself = torch.addcmul(D, dt, diagonal.repeat_interleave(heads // groups, dim=2))
        y = tile.tokens(y_BTHP)
        if y.dtype == accumulate:
            torch.addcmul(past, x, itself[..., None], out=y)
        else:
            y.copy_(torch.addcmul(past, x, itself[..., None]))
        if not keep:
            last = end if tile.chunks == 1 else end[-1:]
            states[tile.row : tile.row + tile.rows, 0] = last
    return y_BTHP, past_BTHP, states


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        D_H: Tensor | None,
        initial_state_BHPN: Tensor | None,
        segment_BT: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y_BTHP, past_BTHP, states = _scan(
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, segment_BT, chunk, keep=True
        )
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, segment_BT, past_BTHP, states)
        ctx.chunk = chunk
        ctx.state_dtype = None if initial_state_BHPN is None else initial_state_BHPN.dtype
        ctx.set_materialize_grads(False)
        return y_BTHP, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = cast(tuple[Any, ...], ctx.saved_tensors)
        dy_BTHP, dfinal_BHPN = grad_outputs
        with no_autocast(saved[0].device.type):
            *gradients, dinitial = _scan_backward(*saved, chunk=ctx.chunk, dy_BTHP=dy_BTHP, dfinal_BHPN=dfinal_BHPN)
        return *gradients, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), None, None


_apply = cast(Callable[..., tuple[Tensor, Tensor]], _SSD.apply)


def _scan_backward(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    segment_BT: Tensor | None,
    past_BTHP: Tensor,
    states: Tensor,
    *,
    chunk: int,
    dy_BTHP: Tensor | None,
    dfinal_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state.

    With s_i the exponent of token i, the past of y_i is proportional to e^(s_i) and what token j adds to a later one of
    the chunk to e^(-s_j), so ds_t = dy_t · past_t - dt_t x_t · dinside_t, where dinside_t is the gradient that dt_t x_t
    gets from those later ones. s is the running sum of dt A, so dt_t A gets the ds of token t and after. The end
    state adds what passes token t: the state at the entrance, and the tokens before t. (The state less what tokens from
    t on added would be equal, but if a head forgets, only rounding is left of that difference.) No gradient of the
    (Q, Q) decays is needed, and where a head forgets at once both terms are 0.
    """
    accumulate = past_BTHP.dtype
    batch, tokens, heads, head_dim = x_BTHP.shape
    groups, state_size = B_BTGN.shape[2:]
    dy_BTHP = torch.zeros_like(x_BTHP) if dy_BTHP is None else dy_BTHP
    dx_BTHP, ddt_BTH = torch.empty_like(x_BTHP), torch.empty_like(dt_BTH)
    dB_BTGN, dC_BTGN = torch.empty_like(B_BTGN), torch.empty_like(C_BTGN)
    dA_H, dD_H = past_BTHP.new_zeros(heads), past_BTHP.new_zeros(heads)
    dstate_BHPN = torch.empty_like(states[:, 0])
    dstate_BHPN.copy_(dstate_BHPN.new_zeros(()) if dfinal_BHPN is None else dfinal_BHPN)
    running_BT, before_BT = (None, None) if segment_BT is None else _running_segment(segment_BT)
    A = A_H.to(accumulate)
    D = A.new_zeros(heads) if D_H is None else D_H.to(accumulate)

    for tile in reversed(list(_tiles(batch, tokens, heads, chunk))):
        x, dt = tile.tokens(x_BTHP).to(accumulate), tile.tokens(dt_BTH).to(accumulate)
        dy = tile.tokens(dy_BTHP).to(accumulate)
        B = _by_group(tile.tokens(B_BTGN).to(accumulate), groups)
        C = _by_group(tile.tokens(C_BTGN).to(accumulate), groups)
        segment = None if running_BT is None else tile.tokens(running_BT)
        before = None if before_BT is None else tile.tokens(before_BT)
        decay = _decay(dt, A, segment, before)
        size = tile.size
        rows = slice(tile.row, tile.row + tile.rows)

        # The recurrence over chunks, backwards: dend is the gradient of the state at the end of each chunk.
        dacross = _by_group(dy * decay.entrance_nQH[..., None], groups)
        dentrance = torch.bmm(dacross.transpose(1, 2), C).view(-1, heads, head_dim, state_size)
        through = decay.through_nH[..., None, None]
        if tile.chunks == 1:
            dend = dstate_BHPN[rows].clone()
            torch.addcmul(dentrance, through, dend, out=dstate_BHPN[rows])
        else:
            dend = torch.empty_like(dentrance)
            dend[-1] = dstate_BHPN[tile.row]
            for index in range(tile.chunks - 1, 0, -1):
                torch.addcmul(dentrance[index], through[index], dend[index], out=dend[index - 1])
            torch.addcmul(dentrance[0], through[0], dend[0], out=dstate_BHPN[tile.row])
        dend_by_group = _state_by_group(dend, groups)
        entrance = _state_by_group(tile.states(states, 0), groups)
        dthrough_nH = decay.through_nH * torch.linalg.vecdot(dend.flatten(2), tile.states(states, 0).flatten(2))

        # The matrix form: gradients of C Bᵀ and of dt x, the latter without the diagonal.
        heads_dy = _heads_first(dy)
        dmatrix = torch.bmm(heads_dy, _heads_first(x, dt).transpose(1, 2)).view(-1, heads, size, size)
        dmatrix.mul_(decay.inside_nHQQ)
        dscores = _unflatten(dmatrix, 1, groups).sum(2).tril_()
        if decay.mask_nQQ is not None:
            dscores *= decay.mask_nQQ[:, None]
        dscores = dscores.flatten(0, 1)
        scores, diagonal = _scores(B, C, groups, decay.mask_nQQ)
        matrix = decay.inside_nHQQ
        _unflatten(matrix, 1, groups).mul_(scores[:, :, None])
        dinside = torch.bmm(matrix.flatten(0, 1).transpose(1, 2), heads_dy).view(-1, heads, size, head_dim)

        # The products with the states.
        weighted = _by_group(x * (decay.end_nQH * dt)[..., None], groups)
        dB = torch.bmm(weighted, dend_by_group).baddbmm_(dscores.transpose(1, 2), C)
        dC = torch.bmm(dacross, entrance).baddbmm_(dscores, B)
        tile.tokens(dB_BTGN).copy_(_by_token(dB, groups))
        tile.tokens(dC_BTGN).copy_(_by_token(dC, groups))
        dadded = _by_token(torch.bmm(B, dend_by_group.transpose(1, 2)), groups).reshape(-1, size, heads, head_dim)
        dinside, dadded = dinside.transpose(1, 2), dadded.mul_(decay.end_nQH[..., None])

        # Gradients of x, D, dt and A.
        diagonal = diagonal.repeat_interleave(heads // groups, dim=2)
        ditself = torch.linalg.vecdot(dy, x)
        dD_H += ditself.sum((0, 1))
        ddt, dkept = torch.linalg.vecdot(x, dinside), torch.linalg.vecdot(x, dadded)
        dlog = torch.linalg.vecdot(dy, tile.tokens(past_BTHP)).addcmul_(dt, ddt, value=-1)
        # Such a decay lets less than a rounding pass; a difference of sums would add their rounding, times dt.
        dlog = dlog.flip(1).cumsum(1).flip(1).add_(dthrough_nH[:, None])
        dlog[:, 1:] += (dt * dkept).cumsum(1)[:, :-1]
        dlog.mul_(dt * A > _NOTHING_PASSES)
        ddt += dkept
        dA_H += (dt * dlog).sum((0, 1))
        tile.tokens(ddt_BTH).copy_(ddt.addcmul_(dlog, A).addcmul_(diagonal, ditself))
        dx = (dinside + dadded).mul_(dt[..., None]).addcmul_(dy, torch.addcmul(D, dt, diagonal)[..., None])
        tile.tokens(dx_BTHP).copy_(dx)
    dD = None if D_H is None else dD_H.to(D_H.dtype)
    return dx_BTHP, ddt_BTH, dA_H.to(A_H.dtype), dB_BTGN, dC_BTGN, dD, dstate_BHPN


def step(inputs: SSDInputs, initial_state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself, in plain autograd."""
    accumulate = accumulation_dtype(inputs.x_BTHP.dtype)
    x_BHP, dt_BH = inputs.x_BTHP[:, 0].to(accumulate), inputs.dt_BTH[:, 0].to(accumulate)
    batch, heads, head_dim = x_BHP.shape
    groups, state_size = inputs.B_BTGN.shape[2:]
    b, c = inputs.B_BTGN.transpose(1, 2).to(accumulate), inputs.C_BTGN.transpose(1, 2).to(accumulate)
    decay_BH = torch.exp(dt_BH * inputs.A_H.to(accumulate))
    if inputs.segment_BT is not None:
        decay_BH = decay_BH * (inputs.segment_BT == 0)
    state_BHPN = initial_state_BHPN.to(accumulate) * decay_BH[..., None, None]
    # The heads of a group side by side: (B, G, H / G · P, N).
    state = state_BHPN.reshape(batch, groups, -1, state_size)
    state = state.addcmul_((dt_BH[..., None] * x_BHP).reshape(batch, groups, -1, 1), b)
    # A row times the transpose is several times faster than the matrix times a column.
    y_BHP = torch.matmul(c, state.transpose(2, 3)).view(batch, heads, head_dim)
    if inputs.D_H is not None:
        y_BHP = torch.addcmul(y_BHP, inputs.D_H.to(accumulate)[:, None], x_BHP)
    return y_BHP[:, None].to(inputs.x_BTHP.dtype), state.view(batch, heads, head_dim, state_size)


def ssd_portable(inputs: SSDInputs) -> tuple[FloatBTHP, FloatBHPN]:
    """State space duality by the chunked form. See `taipan.ops.ssd.ssd`."""
    with no_autocast(inputs.x_BTHP.device.type):
        if inputs.x_BTHP.shape[1] == 1 and inputs.initial_state_BHPN is not None:
            return step(inputs, inputs.initial_state_BHPN)
        chunk = min(inputs.chunk_size, best_chunk(inputs.x_BTHP.shape[3], inputs.B_BTGN.shape[3]))
        tensors = inputs.tensors
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return _apply(*tensors, inputs.segment_BT, chunk)
        y_BTHP, _, states = _scan(*tensors, inputs.segment_BT, chunk, keep=False)
        return y_BTHP, states[:, 0]
