"""State space duality by the Triton kernels of mamba-ssm, forward and backward.

Decays, sums, the state and its gradient are fp32, as the contract says. Operands of products are rounded to the dtype
of x. Calls that the kernels cannot do run the portable implementation (`_kernel_does`).
"""

import inspect

import torch

from taipan.ops.cuda import SCAN, can_compute, can_index, can_multiply
from taipan.ops.documents import running_documents
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.portable import ssd_portable
from taipan.shapes import FloatBHPN, FloatBTHP

_SHORTEST_CHUNK = 16


def _kernel_does(inputs: SSDInputs, chunk: int) -> bool:
    x_BTHP, B_BTGN, C_BTGN = inputs.x_BTHP, inputs.B_BTGN, inputs.C_BTGN
    batch, tokens, heads, head_dim = x_BTHP.shape
    groups, state = B_BTGN.shape[2:]
    if tokens == 1 and inputs.initial_state_BHPN is not None:  # the recurrence itself: nothing to gain
        return False
    if not can_compute(x_BTHP.dtype) or not can_multiply(x_BTHP.dtype):
        return False
    if not x_BTHP.dtype == B_BTGN.dtype == C_BTGN.dtype:  # operands of one product have one dtype
        return False
    chunks = batch * -(-tokens // chunk)
    states_or_scores = chunks * max(heads * head_dim * state, groups * chunk * chunk)
    fits = can_index(x_BTHP, B_BTGN, C_BTGN, elements=states_or_scores, blocks=max(chunks, heads))
    return fits and chunk >= _SHORTEST_CHUNK


def ssd_cuda(inputs: SSDInputs) -> tuple[FloatBTHP, FloatBHPN]:
    """State space duality by mamba-ssm. See `taipan.ops.ssd.ssd`."""
    x_BTHP, initial_state_BHPN = inputs.x_BTHP, inputs.initial_state_BHPN
    chunk = 1 << inputs.chunk_size.bit_length() - 1  # the kernels' blocks are powers of 2
    options: dict[str, object] = {}
    does = _kernel_does(inputs, chunk)
    if does and x_BTHP.dtype != torch.float32 and initial_state_BHPN is not None and initial_state_BHPN.requires_grad:
        # else the gradient of the fp32 state would come in the dtype of x
        options["state_dtype"] = torch.float32
        does = "state_dtype" in inspect.signature(SCAN.load()).parameters
    if not does:
        return ssd_portable(inputs)
    y_BTHP, final_BHPN = SCAN(
        x_BTHP,
        inputs.dt_BTH.float(),
        inputs.A_H.float(),
        inputs.B_BTGN,
        inputs.C_BTGN,
        chunk,
        D=None if inputs.D_H is None else inputs.D_H.float(),
        initial_states=None if initial_state_BHPN is None else initial_state_BHPN.float(),
        # The kernels compare the last tokens of two chunks, so no number may repeat; 0 is the initial state's.
        seq_idx=None if inputs.segment_BT is None else running_documents(inputs.segment_BT),
        return_final_states=True,
        **options,
    )
    return y_BTHP, final_BHPN
