"""Rotary position embedding (Su et al. 2021), in the half-split convention of Llama."""

import torch

from taipan.errors import ConfigError
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBTHE, IntBT


def rotate(x_BTHE: FloatBTHE, position_BT: IntBT, theta: float) -> FloatBTHE:
    """Rotate each pair (x_i, x_{i+E/2}) by the angle ``position · theta^(−2i/E)``.

    The product of a rotated query and a rotated key depends on their distance alone.

    Args:
        x_BTHE: queries or keys; E even.
        position_BT: integer position of each token in its document.
        theta: base of the wavelengths (10,000 in Llama), > 0.

    Returns:
        The rotated tensor in the dtype of ``x_BTHE``; angles and products are computed in at least float32.

    Raises:
        ConfigError: E is odd, or theta is not above 0.
    """
    width = x_BTHE.shape[-1]
    if width % 2 != 0:
        raise ConfigError(f"rotate: the head dimension is {width}; rotary embedding needs an even one.")
    if theta <= 0:
        raise ConfigError(f"rotate: theta is {theta}; give a number above 0.")
    dtype = accumulation_dtype(x_BTHE.dtype)
    frequency = 1 / theta ** (torch.arange(0, width, 2, dtype=dtype, device=x_BTHE.device) / width)
    angle = (position_BT[:, :, None].to(dtype) * frequency)[:, :, None, :]  # (B, T, 1, E / 2), for every head
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BTHE.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHE.dtype)
