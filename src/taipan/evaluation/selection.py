"""What every gate decided about every token of a text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from taipan.errors import OVERFLOW, CheckpointError, InputError
from taipan.generation.mode import inference
from taipan.generation.prefill import check_prompt
from taipan.model import TaipanLM
from taipan.shapes import BoolT, FloatT, FloatT2
from taipan.state import DecoderState


@dataclass(frozen=True)
class LayerTrace:
    """One Selective Attention Layer over the T tokens of a text; on the CPU.

    Attributes:
        layer: its number in the stack.
        threshold: on s_1 − s_0; above it a token is selected.
        scores_T2: s of Eq. 1, fp32.
        selected_T: which tokens got attention.
        alpha_T: α of Eq. 5, fp32.
    """

    layer: int
    threshold: float
    scores_T2: FloatT2
    selected_T: BoolT
    alpha_T: FloatT

    @property
    def margin_T(self) -> FloatT:
        """s_1 − s_0."""
        return self.scores_T2[:, 1] - self.scores_T2[:, 0]


def trace(
    model: TaipanLM, tokens: Tensor | Iterable[int], *, piece: int = 2048, state: DecoderState | None = None
) -> tuple[LayerTrace, ...]:
    """Read one text as at inference, in pieces of bounded memory, and note the decisions of every gate.

    Args:
        model: its mode is restored.
        tokens: T token ids.
        piece: tokens per forward call; never changes the result.
        state: what was read before, one row; None starts from an empty context.

    Returns:
        One entry per SAL, in order.

    Raises:
        InputError: no tokens, an id out of range, or a piece below 1.
        CheckpointError: the scores are not finite.
    """
    if piece < 1:
        raise InputError(f"piece is {piece}, but must be a number of tokens of at least 1.")
    tokens_1T = torch.as_tensor(tokens if isinstance(tokens, Tensor) else list(tokens), dtype=torch.int64).reshape(
        1, -1
    )
    check_prompt(tokens_1T, None, model.config.vocab_size)
    pieces = list(_traced_pieces(model, tokens_1T, piece, state))
    traces = tuple(
        LayerTrace(
            layer=parts[0].layer,
            threshold=parts[0].threshold,
            scores_T2=torch.cat([part.scores_T2 for part in parts]),
            selected_T=torch.cat([part.selected_T for part in parts]),
            alpha_T=torch.cat([part.alpha_T for part in parts]),
        )
        for parts in zip(*pieces, strict=True)
    )
    for layer in traces:
        if not bool(layer.scores_T2.isfinite().all()):
            raise CheckpointError(f"The scores of the gate of layer {layer.layer} are not finite. {OVERFLOW}")
    return traces


def _traced_pieces(
    model: TaipanLM, tokens_1T: Tensor, piece: int, state: DecoderState | None
) -> Iterator[list[LayerTrace]]:
    device = model.device
    for part in tokens_1T.split(piece, 1):
        with inference(model):
            output = model(part.to(device), state=state)
            state = output.state
        yield [
            LayerTrace(
                layer=gate.layer,
                threshold=float(gate.threshold),
                scores_T2=gate.scores_BT2[0].float().cpu(),
                selected_T=gate.selected_BT[0].cpu(),
                alpha_T=gate.alpha_BT[0].float().cpu(),
            )
            for gate in output.gates
        ]
