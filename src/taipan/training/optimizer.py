"""Which parameter gets which optimizer, learning rate and decay; several optimizers behind one face."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from taipan.errors import CheckpointError
from taipan.training.muon import Muon
from taipan.training.recipe import OptimizerSection

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may take this parameter: a matrix from hidden to hidden (not embedding, head or gate)."""
    return parameter.ndim == 2 and name not in _EMBEDDINGS and ".mixer.gate." not in name


def decays(name: str, parameter: Tensor, decay_embeddings: bool) -> bool:
    """Whether weight decay applies: to matrices and convolution taps, never to A_log, D, dt_bias, norms and biases."""
    return parameter.ndim >= 2 and (decay_embeddings or name not in _EMBEDDINGS)


class OptimizerSet:
    """Optimizers over disjoint parameters, used as one. Learning rates are peaks times a common multiplier."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def parameters(self) -> list[Tensor]:
        """All parameters, in a fixed order."""
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return [parameter for group in groups for parameter in group["params"]]

    def scale_learning_rate(self, multiplier: float) -> None:
        """Set every learning rate to its peak times `multiplier`."""
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * multiplier

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; tensors and plain values only."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments and step counts; learning rates and decay stay as this object was built.

        Raises:
            CheckpointError: the state is of other optimizers or of a model with other parameters.
        """
        if len(state["optimizers"]) != len(self._optimizers):
            raise CheckpointError(
                f"The checkpoint holds the state of {len(state['optimizers'])} optimizers, but the recipe makes "
                f"{len(self._optimizers)}: resume with the optimizer.name of the original recipe."
            )
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(saved)
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"The optimizer state of the checkpoint does not fit the model ({error}): "
                    "resume with its own recipe."
                ) from error
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)


def build_optimizer(
    model: nn.Module, section: OptimizerSection, *, muon_dtype: torch.dtype = torch.float32
) -> OptimizerSet:
    """The optimizer a recipe asks for.

    Args:
        model: its parameters carry the names of `TaipanLM`.
        section: the recipe's `optimizer`.
        muon_dtype: dtype of Muon's iteration.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    hidden: list[tuple[str, Tensor]] = []
    if section.name == "muon":
        hidden = [(name, parameter) for name, parameter in parameters if is_hidden_matrix(name, parameter)]
    taken = {name for name, _ in hidden}
    rest = [(name, parameter) for name, parameter in parameters if name not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        matrices = [parameter for _, parameter in hidden]
        optimizers.append(
            Muon(matrices, lr=section.muon_learning_rate, weight_decay=section.weight_decay, dtype=muon_dtype)
        )
    optimizers.append(
        torch.optim.AdamW(
            _decay_groups(rest, section),
            lr=section.learning_rate,
            betas=section.betas,
            eps=section.eps,
            fused=True,
        )
    )
    return OptimizerSet(optimizers)


def _decay_groups(parameters: Iterable[tuple[str, Tensor]], section: OptimizerSection) -> list[dict[str, Any]]:
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in parameters:
        (decayed if decays(name, parameter, section.decay_embeddings) else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
