"""What the quantisers of transformers find in a model: its linears as they look for them, its gates kept whole.

A gate decides by the sign of a small difference, and its weight is 1/10,000 of all: rounding it moves what is selected
and saves nothing. Quantisers by type (bitsandbytes) take only modules that are exactly `nn.Linear`; all leave out what
`_keep_in_fp32_modules` names.
"""

from torch import nn

from taipan.errors import InputError
from taipan.layers.linear import Linear

GATES = r".*\.gate"
"""The modules to leave whole, as transformers matches them."""


def prepare(model: nn.Module) -> None:
    """Give a model that has no weights yet the linears that quantisers by type know; in place."""
    for name, module in list(model.named_modules()):
        if type(module) is Linear:
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = module.weight  # the head's may be the embedding's
            model.set_submodule(name, plain)


def refuse_training(model: nn.Module) -> None:
    """Refuse to train through products that have no gradient: adapters below them would stay as they are.

    Raises:
        InputError: torchao rounds the activations, too.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "act_quant_kwargs", None) is not None:
            raise InputError(
                f"{name} is quantised together with its activations, and torchao gives such products no gradient: "
                "adapters would learn in the last layers only. Train over weights that are quantised alone "
                "(torchao's Int8WeightOnlyConfig, bitsandbytes), or not quantised."
            )
