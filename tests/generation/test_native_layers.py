"""The native counterparts of the layer types: one table, and nothing else in the package that knows a layer type."""

import re
from pathlib import Path

import pytest

from taipan.config import LAYER_TYPES
from taipan.generation import native_layers
from taipan.generation.native_layers import NATIVE_LAYERS, native_layer
from taipan.generation.program import DecoderProgram, program_of
from taipan.layers.mamba2 import Mamba2
from tests.compilers import needs_kernels
from tests.models import EVERY_LAYER_TYPE, small_config, small_model

PACKAGE = Path(native_layers.__file__).parent


def test_every_layer_type_has_one() -> None:
    mixers = [block.mixer for block in small_model(EVERY_LAYER_TYPE).model.layers]
    assert set(small_config(EVERY_LAYER_TYPE).layer_types) == set(LAYER_TYPES)
    assert {type(mixer) for mixer in mixers} == set(NATIVE_LAYERS)
    assert all(native_layer(mixer) is NATIVE_LAYERS[type(mixer)] for mixer in mixers)


def test_a_subclass_has_none() -> None:
    """It may compute something else."""

    class Own(Mamba2):
        pass

    model = small_model("mamba2")
    model.model.layers[0].mixer.__class__ = Own
    assert native_layer(model.model.layers[0].mixer) is None
    found = program_of(model)
    assert isinstance(found, str)
    assert "Own" in found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_nothing_else_knows_a_layer_type(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = [name for name in LAYER_TYPES if re.search(rf'"{name}"', text)]
    imported = re.findall(r"from taipan\.layers\.(?:mamba2|attention|selective_attention) import", text)
    states = re.findall(r"\b(?:Mamba2State|AttentionState|SelectiveState|RetainingState)\b", text)
    if path.name == "native_layers.py":
        assert imported and states and not named  # noqa: PT018 - that this test can see them
    else:
        assert (named, imported, states) == ([], [], [])


@needs_kernels
@pytest.mark.parametrize(
    ("stack", "absent"),
    [("mamba2", ("query_heads", "key_heads", "width", "gate_hidden", "lookahead")), ("transformer", ("inner", "taps"))],
)
def test_the_kernel_is_told_no_sizes_of_layers_that_are_not_there(stack: str, absent: tuple[str, ...]) -> None:
    program = program_of(small_model(stack))
    assert isinstance(program, DecoderProgram)
    assert {getattr(program.sizes, name) for name in absent} == {0}
