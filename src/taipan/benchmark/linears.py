"""The linear floor: the products of a model's linear layers alone, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taipan.layer_types import table_of
from taipan.layer_types.attention import APART
from taipan.model import Block, TaipanLM, TaipanOutput

_OUTPUT_ELEMENTS = 2**26  # outputs per product: the logits of a large vocabulary are never held whole


@dataclass(frozen=True)
class Linear:
    """One linear layer and how many rows go through it.

    Attributes:
        name: of the module.
        weight: (outputs, inputs), in the dtype it multiplies in.
        rows: tokens.
        learnt: those of them, the first, whose gradients go through it; None: all.
    """

    name: str
    weight: Tensor
    rows: int
    learnt: int | None = None


def selected_tokens(output: TaipanOutput) -> dict[int, int]:
    """Number of tokens each SAL selected in a call, padding of shorter rows included, by layer."""
    return {gate.layer: gate.selected_BT.shape[0] * int(gate.selected_BT.sum(1).max()) for gate in output.gates}


def linears(
    model: TaipanLM, dtype: torch.dtype, *, rows: int, head_rows: int, selected: Mapping[int, int]
) -> list[Linear]:
    """Every linear layer of the model with the rows that go through it, in the model's mode.

    Args:
        model: whose weights are taken.
        dtype: of the products; those of the gates are at least fp32, as in the model.
        rows: tokens of the call, all rows of the batch together.
        head_rows: tokens whose logits are computed.
        selected: as `selected_tokens` returns it.

    Raises:
        CheckpointError: the model is in 4 bits, whose products with many tokens are with unpacked weights.
    """
    model.require_plain("as its own linear floor")
    found: list[Linear] = []

    def add(
        name: str, module: nn.Module | None, count: int, kind: torch.dtype = dtype, learnt: int | None = None
    ) -> None:
        if module is not None and count > 0:
            weight = module.weight
            assert isinstance(weight, Tensor)
            found.append(Linear(name=name, weight=weight.detach().to(kind), rows=count, learnt=learnt))

    precise = torch.promote_types(dtype, torch.float32)
    for number, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        mixer, place = block.mixer, f"layers.{number}"
        share = selected[number] / rows if number in selected else None
        table = table_of(model.config.layer_types[number])
        for matrix in table.matrices(model.config, selected=share, training=mixer.training):
            through, count = mixer.get_submodule(matrix.name), round(matrix.share * rows)
            learnt = round(matrix.learnt * count) if rows >= APART else None
            add(f"{place}.{matrix.name}", through, count, dtype if matrix.hidden else precise, learnt)
        if block.mlp is not None:
            add(f"{place}.gate_proj", block.mlp.gate_proj, rows)
            add(f"{place}.up_proj", block.mlp.up_proj, rows)
            add(f"{place}.down_proj", block.mlp.down_proj, rows)
    add("lm_head", model.lm_head, head_rows)
    return found


class LinearFloor:
    """The products of some linear layers on random inputs, into preallocated memory."""

    def __init__(self, layers: list[Linear], *, backward: bool) -> None:
        self._layers = layers
        self._backward = backward
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            outputs, inputs = layer.weight.shape
            sizes = {"x": layer.rows * inputs, "y": _rows_at_once(layer) * outputs}
            if backward:
                sizes |= {"dx": layer.rows * inputs, "dweight": outputs * inputs}
            for name, size in sizes.items():
                known = self._memory.get((name, layer.weight.dtype))
                if known is None or known.numel() < size:
                    values = torch.randn(size, generator=generator)
                    self._memory[name, layer.weight.dtype] = values.to(layer.weight.dtype)

    def __call__(self) -> None:
        """Multiply: y = x Wᵀ, and for the backward dx = dy W and dW = dyᵀ x, with y in place of dy."""
        with torch.inference_mode():
            for layer in self._layers:
                self._multiply(layer)

    def _multiply(self, layer: Linear) -> None:
        outputs, inputs = layer.weight.shape
        step = _rows_at_once(layer)
        learnt = layer.rows if layer.learnt is None else layer.learnt
        x = self._view("x", layer, layer.rows, inputs)
        for start in range(0, layer.rows, step):
            part = x[start : start + step]
            y = self._view("y", layer, len(part), outputs)
            torch.mm(part, layer.weight.T, out=y)
            if not self._backward:
                continue
            y, part = (rows[: max(0, learnt - start)] for rows in (y, part))
            torch.mm(y, layer.weight, out=self._view("dx", layer, layer.rows, inputs)[start : start + len(y)])
            dweight = self._view("dweight", layer, outputs, inputs)
            if start == 0:
                torch.mm(y.T, part, out=dweight)
            else:
                torch.addmm(dweight, y.T, part, out=dweight)

    def _view(self, name: str, layer: Linear, rows: int, columns: int) -> Tensor:
        return self._memory[name, layer.weight.dtype][: rows * columns].view(rows, columns)


def _rows_at_once(layer: Linear) -> int:
    return min(layer.rows, max(1, _OUTPUT_ELEMENTS // layer.weight.shape[0]))
