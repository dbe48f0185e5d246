"""Which parameter gets which optimizer, learning rate and decay; several optimizers behind one face."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taipan.errors import CheckpointError, ConfigError, shown
from taipan.hardware import return_free_memory
from taipan.model.sharding import is_sharded
from taipan.native.memory import Arena
from taipan.training.recipe import OptimizerSection
from taipan.training.step.adamw8 import FEWEST, AdamW8bit, state_of
from taipan.training.step.muon import Muon

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may take this parameter: a matrix from hidden to hidden (not embedding, head or gate)."""
    return parameter.ndim == 2 and name not in _EMBEDDINGS and ".mixer.gate." not in name


def decays(name: str, parameter: Tensor, decay_embeddings: bool) -> bool:
    """Whether weight decay applies: to matrices and convolution taps, never to A_log, D, dt_bias, norms and biases."""
    return parameter.ndim >= 2 and (decay_embeddings or name not in _EMBEDDINGS)


class OptimizerSet:
    """Optimizers over disjoint parameters, used as one. Learning rates are peaks times a common multiplier.

    Args:
        optimizers: AdamW, with moments of 32 or 8 bits, or Muon.
        names: of all parameters, by which their states are saved.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> None:
        self._optimizers = optimizers
        self._names = names
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, as `torch.optim` has them."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def parameters(self) -> list[Tensor]:
        """All parameters, in a fixed order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def scale_learning_rate(self, multiplier: float) -> None:
        """Set every learning rate to its peak times `multiplier`."""
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * multiplier

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.AdamW | AdamW8bit):
                _make_moments(optimizer)
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, called `parameter/what`; sharded like its parameter."""
        return {
            f"{self._names[parameter]}/{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def blank_state(self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Empty tensors to read a saved state into, sharded like the parameters here.

        Args:
            saved: shape and dtype of every tensor of the `state_dict` that was saved.

        Raises:
            CheckpointError: the state is of other optimizers or of a model with other parameters.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        keys: dict[str, set[str]] = {}
        blank: dict[str, Tensor] = {}
        for entry, (shape, dtype) in saved.items():
            name, _, key = entry.rpartition("/")
            keys.setdefault(name, set()).add(key)
            parameter = parameters.get(name)
            scales = key.endswith("_scale")
            if parameter is None or not (scales or shape in (parameter.shape, torch.Size())):
                raise CheckpointError(
                    f"The optimizer state of the checkpoint does not fit the model ({shown(entry)} of shape "
                    f"{tuple(shape)}):"
                    " resume with its own recipe."
                )
            like = parameter.detach()
            if shape == like.shape and dtype.is_floating_point:
                blank[entry] = torch.zeros_like(like)
            else:
                blank[entry] = torch.zeros(shape, dtype=dtype, device=like.device)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name, expected = self._names[parameter], _remembered(optimizer, parameter)
                    found = {key: blank[f"{name}/{key}"] for key in keys.get(name, ())}
                    if found and found.keys() != expected.keys():
                        raise CheckpointError(
                            f"The checkpoint holds {', '.join(sorted(found))} for {name}, but the recipe's "
                            f"optimizer needs {', '.join(sorted(expected))}: resume with the optimizer.name and "
                            "optimizer.moments of the original recipe."
                        )
                    for key, tensor in found.items():
                        if (tensor.shape, tensor.dtype) != expected[key]:
                            raise CheckpointError(
                                f"{name}/{key} of the checkpoint is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                                f"expected {expected[key][1]} of shape {tuple(expected[key][0])}: use an earlier "
                                "checkpoint."
                            )
        return blank

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load moments and step counts (not copied); learning rates and decay stay as they are.

        Raises:
            CheckpointError: as `blank_state`.
        """
        self.blank_state({entry: (value.shape, value.dtype) for entry, value in state.items()})
        owners = {
            self._names[parameter]: (optimizer, parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for entry, value in state.items():
            name, _, key = entry.rpartition("/")
            optimizer, parameter = owners[name]
            optimizer.state[parameter][key] = value


def _remembered(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of everything an optimizer remembers of a parameter."""
    like, count = (parameter.shape, parameter.dtype), (torch.Size(), torch.float32)
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": like}
    if isinstance(optimizer, AdamW8bit):
        return {"step": count, **state_of(parameter)}
    return {"step": count, "exp_avg": like, "exp_avg_sq": like}


def _make_moments(optimizer: torch.optim.AdamW | AdamW8bit) -> None:
    """The first moments of parameters on a CPU, side by side, before the optimizer makes them one by one.

    They live as long as the run. Each in its own hole between what a step has freed, they would leave the activations
    of the next one no room there; so those holes go back to the system, and the moments lie elsewhere
    (docs/performance.md).
    """
    new = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and not optimizer.state[parameter]
    ]
    made = {
        parameter: {key: value for key, value in _remembered(optimizer, parameter).items() if key != "step"}
        for parameter in new
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu"
    }
    if not made:
        return
    return_free_memory()
    arena = Arena([entry for entries in made.values() for entry in entries.values()])
    for parameter, entries in made.items():
        state = optimizer.state[parameter]
        state["step"] = torch.zeros(())
        state.update({key: arena.take(shape, dtype) for key, (shape, dtype) in entries.items()})


def build_optimizer(
    model: nn.Module, section: OptimizerSection, *, muon_dtype: torch.dtype = torch.float32
) -> OptimizerSet:
    """The optimizer a recipe asks for.

    Args:
        model: its parameters carry the names of `TaipanLM`.
        section: the recipe's `optimizer`.
        muon_dtype: dtype of Muon's iteration.

    Raises:
        ConfigError: moments in 8 bits of parameters that are spread over processes.
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
    settings: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.eps}
    if section.moments == "int8":
        if any(is_sharded(parameter) for _, parameter in rest):
            raise ConfigError(
                "optimizer.moments is int8, but parallel.strategy spreads the parameters over the processes, whose "
                "parts have no blocks of their own: take float32, or the strategy ddp."
            )
        large = [entry for entry in rest if entry[1].numel() >= FEWEST and entry[1].is_contiguous()]
        taken |= {name for name, _ in large}
        rest = [(name, parameter) for name, parameter in rest if name not in taken]
        if large:
            optimizers.append(AdamW8bit(_decay_groups(large, section), **settings))
    if rest:
        optimizers.append(torch.optim.AdamW(_decay_groups(rest, section), **settings, fused=True))
    return OptimizerSet(optimizers, {parameter: name for name, parameter in parameters})


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
