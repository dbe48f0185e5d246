"""Implementations of ops called like the op itself, and ops below the shape checks that only tests have."""

from collections.abc import Callable
from typing import Any

import jaxtyping

from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.ssd.inputs import SSDInputs


def called_like_the_op(
    implementation: Callable[[Any], Any], record: type[SSDInputs] | type[ConvolutionInputs] | type[AttentionInputs]
) -> Callable[..., Any]:
    """The implementation with the arguments of its record."""
    return lambda *positional, **options: implementation(record(*positional, **options))


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and whatever it calls, without live checks of shapes."""

    def call(*positional: Any, **options: Any) -> Any:
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return function(*positional, **options)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    return call
