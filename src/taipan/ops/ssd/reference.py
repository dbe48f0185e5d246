"""Three independent oracles of the state space duality: plain autograd, fp64-clean, no speed.

Dao & Gu, "Transformers are SSMs" (2024): `ssd_recurrent` is the recurrence (Eq. 2), `ssd_quadratic` the masked matrix
form (Eq. 16, M = L ∘ C Bᵀ) and `ssd_chunked` the block decomposition (section 6). They share only the two helpers
below, which say what a group and what a document is.
"""

import torch
from torch import Tensor

from taipan.ops.precision import accumulation_dtype, outside_autocast
from taipan.ops.ssd.inputs import SSDInputs
from taipan.shapes import BoolBT, FloatBHPN, FloatBTGN, FloatBTHN, FloatBTHP, IntBT


def _one_group_per_head(group_BTGN: FloatBTGN, heads: int) -> FloatBTHN:
    """Give each head its own copy of B or C: head h uses group h // (H / G)."""
    return group_BTGN.repeat_interleave(heads // group_BTGN.shape[2], dim=2)


def _starts(segment_BT: IntBT | None, x_BTHP: FloatBTHP) -> BoolBT:
    """True where a token is the first of a document that is not the initial state's."""
    if segment_BT is None:
        return torch.zeros(x_BTHP.shape[:2], dtype=torch.bool, device=x_BTHP.device)
    return segment_BT != torch.nn.functional.pad(segment_BT, (1, 0))[:, :-1]


def _initial(state_BHPN: FloatBHPN | None, x_BTHP: FloatBTHP, state_size: int) -> FloatBHPN:
    accumulate = accumulation_dtype(x_BTHP.dtype)
    if state_BHPN is None:
        batch, _, heads, head_dim = x_BTHP.shape
        return torch.zeros(batch, heads, head_dim, state_size, dtype=accumulate, device=x_BTHP.device)
    return state_BHPN.to(accumulate)


@outside_autocast
def ssd_recurrent(inputs: SSDInputs) -> tuple[FloatBTHP, FloatBHPN]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ, y_t = h_t C_t + D x_t, token by token. See `taipan.ops.ssd.ssd`."""
    accumulate = accumulation_dtype(inputs.x_BTHP.dtype)
    x, dt, A = inputs.x_BTHP.to(accumulate), inputs.dt_BTH.to(accumulate), inputs.A_H.to(accumulate)
    B_BTHN = _one_group_per_head(inputs.B_BTGN.to(accumulate), x.shape[2])
    C_BTHN = _one_group_per_head(inputs.C_BTGN.to(accumulate), x.shape[2])
    starts_BT = _starts(inputs.segment_BT, inputs.x_BTHP)
    state_BHPN = _initial(inputs.initial_state_BHPN, inputs.x_BTHP, inputs.B_BTGN.shape[3])
    outputs: list[Tensor] = []
    for t in range(x.shape[1]):
        carried_BHPN = torch.where(starts_BT[:, t, None, None, None], 0.0, state_BHPN)
        decay_BH = torch.exp(dt[:, t] * A)
        added_BHPN = (dt[:, t, :, None] * x[:, t])[..., None] * B_BTHN[:, t, :, None, :]
        state_BHPN = decay_BH[..., None, None] * carried_BHPN + added_BHPN
        outputs.append((state_BHPN * C_BTHN[:, t, :, None, :]).sum(-1))
    y_BTHP = torch.stack(outputs, dim=1)
    if inputs.D_H is not None:
        y_BTHP = y_BTHP + inputs.D_H.to(accumulate)[:, None] * x
    return y_BTHP.to(inputs.x_BTHP.dtype), state_BHPN


@outside_autocast
def ssd_quadratic(inputs: SSDInputs) -> tuple[FloatBTHP, FloatBHPN]:
    """y = (L ∘ C Bᵀ) (dt x) with L_ij = exp(Σ_{j<k≤i} dt_k A) for j ≤ i of one document. See `taipan.ops.ssd.ssd`."""
    accumulate = accumulation_dtype(inputs.x_BTHP.dtype)
    x, dt, A = inputs.x_BTHP.to(accumulate), inputs.dt_BTH.to(accumulate), inputs.A_H.to(accumulate)
    B_BTHN = _one_group_per_head(inputs.B_BTGN.to(accumulate), x.shape[2])
    C_BTHN = _one_group_per_head(inputs.C_BTGN.to(accumulate), x.shape[2])
    document_BT = _starts(inputs.segment_BT, inputs.x_BTHP).cumsum(1)
    state_BHPN = _initial(inputs.initial_state_BHPN, inputs.x_BTHP, inputs.B_BTGN.shape[3])

    tokens = x.shape[1]
    log_BHT = (dt * A).cumsum(1).transpose(1, 2)
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
    same_BTT = (document_BT[:, :, None] == document_BT[:, None, :]) & causal_TT
    difference_BHTT = log_BHT[:, :, :, None] - log_BHT[:, :, None, :]
    L_BHTT = torch.exp(difference_BHTT.masked_fill(~same_BTT[:, None], -torch.inf))
    carried_BHT = torch.exp(log_BHT.masked_fill(document_BT[:, None] > 0, -torch.inf))

    M_BHTT = L_BHTT * torch.einsum("bihn,bjhn->bhij", C_BTHN, B_BTHN)
    input_BTHP = dt[..., None] * x
    y_BTHP = torch.einsum("bhij,bjhp->bihp", M_BHTT, input_BTHP)
    y_BTHP = y_BTHP + torch.einsum("bht,bthn,bhpn->bthp", carried_BHT, C_BTHN, state_BHPN)
    final_BHPN = torch.einsum("bhj,bjhp,bjhn->bhpn", L_BHTT[:, :, -1], input_BTHP, B_BTHN)
    final_BHPN = final_BHPN + carried_BHT[:, :, -1, None, None] * state_BHPN
    if inputs.D_H is not None:
        y_BTHP = y_BTHP + inputs.D_H.to(accumulate)[:, None] * x
    return y_BTHP.to(inputs.x_BTHP.dtype), final_BHPN


@outside_autocast
def ssd_chunked(inputs: SSDInputs) -> tuple[FloatBTHP, FloatBHPN]:
    """The matrix form inside chunks, the recurrence between them. See `taipan.ops.ssd.ssd`."""
    accumulate = accumulation_dtype(inputs.x_BTHP.dtype)
    heads = inputs.x_BTHP.shape[2]
    starts_BT = _starts(inputs.segment_BT, inputs.x_BTHP)
    state_BHPN = _initial(inputs.initial_state_BHPN, inputs.x_BTHP, inputs.B_BTGN.shape[3])
    outputs: list[Tensor] = []
    for begin in range(0, inputs.x_BTHP.shape[1], inputs.chunk_size):
        chunk = slice(begin, begin + inputs.chunk_size)
        x, dt = inputs.x_BTHP[:, chunk].to(accumulate), inputs.dt_BTH[:, chunk].to(accumulate)
        B = _one_group_per_head(inputs.B_BTGN[:, chunk].to(accumulate), heads)
        C = _one_group_per_head(inputs.C_BTGN[:, chunk].to(accumulate), heads)
        document_BT = starts_BT[:, chunk].cumsum(1)

        # 1. Decays: between two tokens of the chunk, from its entrance, and to its end.
        log_BHT = (dt * inputs.A_H.to(accumulate)).transpose(1, 2).cumsum(-1)
        log_L_BHTT = log_BHT[..., :, None] - log_BHT[..., None, :]
        later_TT = torch.ones_like(log_L_BHTT[0, 0], dtype=torch.bool).triu(1)
        apart_BTT = (document_BT[:, :, None] != document_BT[:, None, :]) | later_TT
        L_BHTT = log_L_BHTT.masked_fill(apart_BTT[:, None], -torch.inf).exp()
        carried_BTH = (torch.exp(log_BHT) * (document_BT == 0)[:, None]).transpose(1, 2)
        # 2. Inside the chunk (block diagonal), 3. from the state at its entrance (low rank).
        input_BTHP = dt[..., None] * x
        inside = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", C, B, L_BHTT, input_BTHP)
        across = torch.einsum("bthn,bhpn,bth->bthp", C, state_BHPN, carried_BTH)
        outputs.append(inside + across)
        # 4. The state at the end of the chunk.
        added_BHPN = torch.einsum("bthn,bht,bthp->bhpn", B, L_BHTT[:, :, -1], input_BTHP)
        state_BHPN = carried_BTH[:, -1, :, None, None] * state_BHPN + added_BHPN
    y_BTHP = torch.cat(outputs, dim=1)
    if inputs.D_H is not None:
        y_BTHP = y_BTHP + inputs.D_H.to(accumulate)[:, None] * inputs.x_BTHP.to(accumulate)
    return y_BTHP.to(inputs.x_BTHP.dtype), state_BHPN
