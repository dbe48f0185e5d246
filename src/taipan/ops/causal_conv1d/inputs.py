"""What every implementation of the causal convolution gets."""

from dataclasses import dataclass

from torch import Tensor

from taipan.errors import ConfigError, InputError, shown
from taipan.shapes import FloatBLC, FloatBTC, FloatC, FloatCK, IntB, IntBT


@dataclass(frozen=True)
class ConvolutionInputs:
    """The arguments of `taipan.ops.causal_conv1d.causal_conv1d`, which says what they are."""

    x_BTC: FloatBTC
    weight_CK: FloatCK
    bias_C: FloatC
    initial_columns_BLC: FloatBLC | None = None
    segment_BT: IntBT | None = None
    length_B: IntB | None = None
    activation: str | None = "silu"

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What gradients flow to."""
        return self.x_BTC, self.weight_CK, self.bias_C, self.initial_columns_BLC

    def validate(self) -> None:
        """Raise `InputError` or `ConfigError` unless shapes, dtypes and activation fit."""
        if self.activation not in ("silu", None):
            raise ConfigError(f"causal_conv1d: unknown activation {shown(self.activation)}; expected 'silu' or None")
        if self.x_BTC.dim() != 3 or 0 in self.x_BTC.shape:
            raise InputError(
                f"causal_conv1d: x has shape {tuple(self.x_BTC.shape)}; expected (batch, tokens, channels), none 0"
            )
        if self.weight_CK.dim() != 2 or self.weight_CK.shape[1] < 2:
            raise InputError(
                f"causal_conv1d: weight has shape {tuple(self.weight_CK.shape)}; expected (channels, taps) with 2 taps "
                "or more"
            )
        batch, tokens, channels = self.x_BTC.shape
        expected = {
            "weight": (self.weight_CK, (channels, self.weight_CK.shape[1])),
            "bias": (self.bias_C, (channels,)),
            "initial_columns": (self.initial_columns_BLC, (batch, self.weight_CK.shape[1] - 1, channels)),
            "segment": (self.segment_BT, (batch, tokens)),
            "length": (self.length_B, (batch,)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tensor.shape != shape:
                raise InputError(
                    f"causal_conv1d: {name} has shape {tuple(tensor.shape)}; expected {shape} beside x "
                    f"{tuple(self.x_BTC.shape)}"
                )
        floating = {
            "x": self.x_BTC,
            "weight": self.weight_CK,
            "bias": self.bias_C,
            "initial_columns": self.initial_columns_BLC,
        }
        integer = {"segment": self.segment_BT, "length": self.length_B}
        for name, tensor in {**floating, **integer}.items():
            if tensor is not None and tensor.is_floating_point() == (name in integer):
                kind = "integer" if name in integer else "floating point"
                raise InputError(f"causal_conv1d: {name} is {tensor.dtype}; expected {kind}")
