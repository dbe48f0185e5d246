"""State space duality in PyTorch operations that run everywhere, with a backward written by hand.

The sequence is cut into chunks of Q tokens (Dao & Gu 2024, section 6). With s = cumsum(dt A) inside a chunk, S the
state at its entrance and S' at its end,

    y  = ((C Bᵀ) ∘ L) (dt x) + e^s (C S) + D x          L_ij = e^(s_i - s_j), j ≤ i
    S' = e^(s_Q) S + Σ_j e^(s_Q - s_j) dt_j x_j B_jᵀ

and every exponent is ≤ 0, so nothing overflows however fast a head forgets. The chunks are visited in tiles that fit
the cache: a tile is either one chunk of several rows or several consecutive chunks of one row, so that it is one batch
dimension (n) of the products below. C Bᵀ is shared by the heads of a group, and the products with the state are one
product for all heads of a group. What is kept for the backward is the inputs, the output and the states between
chunks; decays are computed again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBHPN, FloatBTGN, FloatBTH, FloatBTHP, FloatH, IntBT

# Measured on 2 AVX2 cores with 512 KB of L2 each (B 4, T 1024, H 8, P 64, N 64 and H 24, N 128): see benchmarks.
_CHUNK = 64
_TILE_ELEMENTS = 4 * 8 * 64 * 64


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
                yield _Tile(row, min(width, batch - row), first, 1, first * chunk, chunk)
    else:
        for row in range(batch):
            for first in range(0, whole, width):
                yield _Tile(row, 1, first, min(width, whole - first), first * chunk, chunk)
    if rest:
        width = max(1, _TILE_ELEMENTS // (heads * rest * rest))
        for row in range(0, batch, width):
            yield _Tile(row, min(width, batch - row), whole, 1, whole * chunk, rest)


def _running_segment(segment_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Number of resets up to each token, and up to the token before it."""
    before_BT = torch.zeros_like(segment_BT)
    before_BT[:, 1:] = segment_BT[:, :-1]
    running_BT = (segment_BT != before_BT).cumsum(1)
    before_BT[:, 1:] = running_BT[:, :-1]
    return running_BT, before_BT


class _Decay(NamedTuple):
    """Decays of a tile: between tokens of a chunk, from its entrance, to its end, and through it."""

    inside_nHQQ: Tensor
    entrance_nQH: Tensor
    end_nQH: Tensor
    through_nH: Tensor
    mask_nQQ: Tensor | None


def _decay(dt_nQH: Tensor, A_H: Tensor, segment_nQ: Tensor | None, before_nQ: Tensor | None) -> _Decay:
    log_nHQ = (dt_nQH * A_H).transpose(1, 2).cumsum(-1)
    # Above the diagonal the difference is positive; the clamp keeps it finite until C Bᵀ, which is 0 there, meets it.
    inside_nHQQ = (log_nHQ[..., :, None] - log_nHQ[..., None, :]).clamp_max_(0).exp_()
    entrance_nHQ = log_nHQ.exp()
    end_nHQ = (log_nHQ[..., -1:] - log_nHQ).exp_()
    through_nH = entrance_nHQ[..., -1]
    mask_nQQ = None
    if segment_nQ is not None and before_nQ is not None:
        incoming_n1 = before_nQ[:, :1]
        mask_nQQ = segment_nQ[:, :, None] == segment_nQ[:, None, :]
        entrance_nHQ = entrance_nHQ * (segment_nQ == incoming_n1)[:, None]
        end_nHQ = end_nHQ * (segment_nQ == segment_nQ[:, -1:])[:, None]
        through_nH = through_nH * (segment_nQ[:, -1:] == incoming_n1)
    return _Decay(inside_nHQQ, entrance_nHQ.transpose(1, 2), end_nHQ.transpose(1, 2), through_nH, mask_nQQ)


def _by_group(tensor_nQG: Tensor, groups: int) -> Tensor:
    """(n, Q, G, …) as (n · G, Q, …), without a copy when G is 1."""
    return _unflatten(tensor_nQG, 2, groups).transpose(1, 2).flatten(3).flatten(0, 1)


def _by_token(tensor_nGQ: Tensor, groups: int) -> Tensor:
    """(n · G, Q, F) as (n, Q, G, F): the inverse of `_by_group`."""
    return _unflatten(tensor_nGQ, 0, tensor_nGQ.shape[0] // groups).transpose(1, 2)


def _state_by_group(state_nHPN: Tensor, groups: int) -> Tensor:
    """(n, H, P, N) as (n · G, H / G · P, N)."""
    return _unflatten(state_nHPN, 1, groups).flatten(2, 3).flatten(0, 1)


def _causal_(scores_nGQQ: Tensor, groups: int, mask_nQQ: Tensor | None) -> Tensor:
    """Zero what lies above the diagonal or in another document, in place; returns (n, G, Q, Q)."""
    scores_nGQQ = _unflatten(scores_nGQQ.tril_(), 0, scores_nGQQ.shape[0] // groups)
    return scores_nGQQ if mask_nQQ is None else scores_nGQQ.mul_(mask_nQQ[:, None])


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
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """Return y in the dtype of accumulation, and the states between chunks (B, chunks + 1, H, P, N).

    Without ``keep_states`` the states are (B, 1, H, P, N), the last one only, whatever the length.
    """
    accumulate = accumulation_dtype(x_BTHP.dtype)
    batch, tokens, heads, head_dim = x_BTHP.shape
    groups, state_size = B_BTGN.shape[2:]
    chunks = -(-tokens // chunk)
    y_BTHP = torch.empty(batch, tokens, heads, head_dim, dtype=accumulate, device=x_BTHP.device)
    slots = chunks + 1 if keep_states else 1
    states = y_BTHP.new_empty(batch, slots, heads, head_dim, state_size)
    if initial_state_BHPN is None:
        states[:, 0] = 0
    else:
        states[:, 0] = initial_state_BHPN
    running_BT, before_BT = (None, None) if segment_BT is None else _running_segment(segment_BT)
    A = A_H.to(accumulate)
    D_H1 = None if D_H is None else D_H.to(accumulate)[:, None]

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
        if keep_states:
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
                if not keep_states:
                    entrance[index] = state
                state = torch.addcmul(added[index], through[index], state, out=end[index])
        entrance_by_group = _state_by_group(entrance, groups)

        # The output: inside the chunk, from the state at its entrance, and the skip connection.
        scores = _causal_(torch.bmm(C, B.transpose(1, 2)), groups, decay.mask_nQQ)
        matrix = decay.inside_nHQQ
        _unflatten(matrix, 1, groups).mul_(scores[:, :, None])
        inputs = (x * dt[..., None]).transpose(1, 2).reshape(-1, size, head_dim)
        inside = torch.bmm(matrix.flatten(0, 1), inputs).view(-1, heads, size, head_dim)
        across = _by_token(torch.bmm(C, entrance_by_group.transpose(1, 2)), groups).reshape(-1, size, heads, head_dim)
        y = tile.tokens(y_BTHP)
        torch.addcmul(inside.transpose(1, 2), across, decay.entrance_nQH[..., None], out=y)
        if D_H1 is not None:
            y.addcmul_(x, D_H1)
        if not keep_states:
            last = end if tile.chunks == 1 else end[-1:]
            states[tile.row : tile.row + tile.rows, 0] = last
    return y_BTHP, states


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
        with torch.autocast(x_BTHP.device.type, enabled=False):
            y_BTHP, states = _scan(
                x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, segment_BT, chunk, keep_states=True
            )
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, segment_BT, y_BTHP, states)
        ctx.chunk = chunk
        ctx.state_dtype = None if initial_state_BHPN is None else initial_state_BHPN.dtype
        ctx.set_materialize_grads(False)
        return y_BTHP.to(x_BTHP.dtype), states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = cast(tuple[Any, ...], ctx.saved_tensors)
        dy_BTHP, dfinal_BHPN = grad_outputs
        with torch.autocast(saved[0].device.type, enabled=False):
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
    y_BTHP: Tensor,
    states: Tensor,
    *,
    chunk: int,
    dy_BTHP: Tensor | None,
    dfinal_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state.

    With s_i the exponent of token i, y_i - D x_i is proportional to e^(s_i) and the terms made of token j to
    e^(-s_j), so ds_t = dy_t · (y_t - D x_t) - dt_t x_t · d(dt_t x_t), and the end of the chunk adds dS' · S'. No
    gradient of the (Q, Q) decays is needed.
    """
    accumulate = y_BTHP.dtype
    batch, tokens, heads, head_dim = x_BTHP.shape
    groups, state_size = B_BTGN.shape[2:]
    dy_BTHP = torch.zeros_like(x_BTHP) if dy_BTHP is None else dy_BTHP
    dx_BTHP, ddt_BTH = torch.empty_like(x_BTHP), torch.empty_like(dt_BTH)
    dB_BTGN, dC_BTGN = torch.empty_like(B_BTGN), torch.empty_like(C_BTGN)
    dA_H = y_BTHP.new_zeros(heads)
    dD_H = None if D_H is None else y_BTHP.new_zeros(heads)
    dstate_BHPN = y_BTHP.new_zeros(states[:, 0].shape) if dfinal_BHPN is None else dfinal_BHPN.to(accumulate).clone()
    running_BT, before_BT = (None, None) if segment_BT is None else _running_segment(segment_BT)
    A = A_H.to(accumulate)
    D_H1 = None if D_H is None else D_H.to(accumulate)[:, None]

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
        dlast_nH = (dend * tile.states(states, 1)).sum((-2, -1))

        # The matrix form: gradients of C Bᵀ and of the inputs dt x.
        inputs = x * dt[..., None]
        heads_dy = dy.transpose(1, 2).reshape(-1, size, head_dim)
        heads_inputs = inputs.transpose(1, 2).reshape(-1, size, head_dim)
        dmatrix = torch.bmm(heads_dy, heads_inputs.transpose(1, 2)).view(-1, heads, size, size)
        dmatrix.mul_(decay.inside_nHQQ)
        dscores = _unflatten(dmatrix, 1, groups).sum(2).flatten(0, 1)
        dscores = _causal_(dscores, groups, decay.mask_nQQ).flatten(0, 1)
        scores = _causal_(torch.bmm(C, B.transpose(1, 2)), groups, decay.mask_nQQ)
        matrix = decay.inside_nHQQ
        _unflatten(matrix, 1, groups).mul_(scores[:, :, None])
        dinside = torch.bmm(matrix.flatten(0, 1).transpose(1, 2), heads_dy).view(-1, heads, size, head_dim)

        # The products with the states.
        weighted = _by_group(inputs * decay.end_nQH[..., None], groups)
        dB = torch.bmm(weighted, dend_by_group).baddbmm_(dscores.transpose(1, 2), C)
        dC = torch.bmm(dacross, entrance).baddbmm_(dscores, B)
        tile.tokens(dB_BTGN).copy_(_by_token(dB, groups))
        tile.tokens(dC_BTGN).copy_(_by_token(dC, groups))
        dadded = _by_token(torch.bmm(B, dend_by_group.transpose(1, 2)), groups).reshape(-1, size, heads, head_dim)
        dinputs = torch.addcmul(dinside.transpose(1, 2), dadded, decay.end_nQH[..., None])

        # Gradients of x, D, dt and A.
        ddt = (x * dinputs).sum(-1)
        dlog = (dy * tile.tokens(y_BTHP)).sum(-1) - dt * ddt
        dx = dinputs.mul_(dt[..., None])
        if D_H1 is not None and dD_H is not None:
            dskip = (dy * x).sum(-1)
            dD_H += dskip.sum((0, 1))
            dlog -= D_H1[:, 0] * dskip
            dx.addcmul_(dy, D_H1)
        tile.tokens(dx_BTHP).copy_(dx)
        dlog[:, -1] += dlast_nH
        dlog = dlog.flip(1).cumsum(1).flip(1)
        dA_H += (dt * dlog).sum((0, 1))
        tile.tokens(ddt_BTH).copy_(ddt.addcmul_(dlog, A))
    dD = None if dD_H is None or D_H is None else dD_H.to(D_H.dtype)
    return dx_BTHP, ddt_BTH, dA_H.to(A_H.dtype), dB_BTGN, dC_BTGN, dD, dstate_BHPN


def _step(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor,
    segment_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself, in plain autograd."""
    accumulate = accumulation_dtype(x_BTHP.dtype)
    x_BHP, dt_BH = x_BTHP[:, 0].to(accumulate), dt_BTH[:, 0].to(accumulate)
    b, c = B_BTGN[:, 0].to(accumulate), C_BTGN[:, 0].to(accumulate)
    if b.shape[1] > 1:
        b, c = (group.repeat_interleave(x_BHP.shape[1] // group.shape[1], dim=1) for group in (b, c))
    decay_BH = torch.exp(dt_BH * A_H.to(accumulate))
    if segment_BT is not None:
        decay_BH = decay_BH * (segment_BT == 0)
    state_BHPN = decay_BH[..., None, None] * initial_state_BHPN.to(accumulate)
    state_BHPN = torch.addcmul(state_BHPN, (dt_BH[..., None] * x_BHP)[..., None], b[:, :, None])
    y_BHP = (state_BHPN * c[:, :, None]).sum(-1)
    if D_H is not None:
        y_BHP = torch.addcmul(y_BHP, D_H.to(accumulate)[:, None], x_BHP)
    return y_BHP[:, None].to(x_BTHP.dtype), state_BHPN


def ssd_portable(
    x_BTHP: FloatBTHP,
    dt_BTH: FloatBTH,
    A_H: FloatH,
    B_BTGN: FloatBTGN,
    C_BTGN: FloatBTGN,
    D_H: FloatH | None = None,
    *,
    initial_state_BHPN: FloatBHPN | None = None,
    segment_BT: IntBT | None = None,
    chunk_size: int = _CHUNK,
) -> tuple[FloatBTHP, FloatBHPN]:
    """State space duality by the chunked form. See `taipan.ops.ssd.ssd`."""
    tensors = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN)
    if x_BTHP.shape[1] == 1 and initial_state_BHPN is not None:
        return _step(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, segment_BT)
    chunk = min(chunk_size, _CHUNK)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _apply(*tensors, segment_BT, chunk)
    with torch.autocast(x_BTHP.device.type, enabled=False):
        y_BTHP, states = _scan(*tensors, segment_BT, chunk, keep_states=False)
    return y_BTHP.to(x_BTHP.dtype), states[:, 0]
