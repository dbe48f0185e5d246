"""Which implementation of each op really runs: in both faces, in training and in evaluation."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from taipan import TaipanLM
from taipan.hf import TaipanForCausalLM, TaipanHFConfig
from taipan.model import IMPLEMENTATIONS, compute_loss
from taipan.ops.gated_rms_norm import api as norms
from taipan.ops.mamba2 import api as mamba2
from taipan.ops.mamba2.inputs import Mamba2Inputs
from tests.compilers import needs_kernels
from tests.models import random_tokens, small_config

TABLES = {**IMPLEMENTATIONS, "gated": norms.GATED_IMPLEMENTATIONS, "norm of a sum": norms.SUM_IMPLEMENTATIONS}
FACES = ("native face", "Hugging Face")
NAMES = ("portable", "reference", pytest.param("native", marks=needs_kernels))

Ran = set[tuple[str, str]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """(op, name) of every implementation that is called; Mamba-2's one call is three of them."""
    seen: Ran = set()

    def recorded(what: tuple[str, str], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            seen.add(what)
            return function(*arguments, **options)

        return run

    for op, table in TABLES.items():
        for name, function in table.items():
            wrapped = recorded((op, name), cast(Callable[..., Any], function))
            monkeypatch.setitem(cast(dict[str, Any], table), name, wrapped)
    one_call = mamba2.mamba2_native

    def together(inputs: Mamba2Inputs) -> Any:
        seen.update((op, "native") for op in ("causal_conv1d", "ssd", "gated"))
        return one_call(inputs)

    monkeypatch.setattr(mamba2, "mamba2_native", together)
    return seen


def run(face: str, implementation: str, *, training: bool) -> None:
    """A call with a loss, its backward in training, and the logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "mamba_head_dim": 16, "state_size": 16}
    config = small_config("taipan", **sizes, attention_capacity=0.3, capacity_window=9)
    tokens = random_tokens(2, 20)
    if face == "native face":
        model = TaipanLM(config, implementation=implementation).train(training)
        output: Any = model(tokens, labels=tokens)
    else:
        other: Any = TaipanForCausalLM(TaipanHFConfig.from_native(config), implementation=implementation)
        output = other.train(training)(input_ids=tokens, labels=tokens)
    if training:
        output.loss.backward()
    assert output.logits.isfinite().all()
    assert output.loss.isfinite()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("implementation", NAMES)
def test_every_op_runs_what_the_model_was_built_for(ran: Ran, implementation: str, face: str, training: bool) -> None:
    run(face, implementation, training=training)
    assert ran == {(op, implementation) for op in TABLES}


@needs_kernels
@pytest.mark.parametrize("face", FACES)
def test_auto_is_native_where_there_are_kernels(ran: Ran, face: str) -> None:
    run(face, "auto", training=True)
    assert ran >= {(op, "native") for op in TABLES}


def test_both_faces_call_the_loss_by_names() -> None:
    """A forgotten argument is an error, not a default."""
    with pytest.raises(TypeError, match="positional"):
        compute_loss(None, None, None)  # pyright: ignore
    with pytest.raises(TypeError, match="implementation"):
        compute_loss(  # pyright: ignore
            cast(Any, None),
            head=cast(Any, None),
            config=cast(Any, None),
            schedule=cast(Any, None),
            labels=cast(Any, None),
            attention_mask=None,
            segment_ids=None,
            num_items_in_batch=None,
        )


def test_the_recorder_records(ran: Ran) -> None:
    assert ran == set()
    norms.rms_norm(torch.ones(2, 3), torch.ones(3), eps=1e-5, implementation="portable")
    assert ran == {("gated_rms_norm", "portable")}
