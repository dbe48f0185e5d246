"""torch.compile works, and what records a graph is refused at the call."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taipan.errors import InputError
from tests.hf.models import pair
from tests.models import random_tokens

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys

import torch

from tests.hf.models import pair
from tests.models import random_tokens

backend = sys.argv[1]
tokens = random_tokens(2, 24)
for model in pair():
    model.train()

    def gradients(call):
        torch.manual_seed(0)
        model.zero_grad()
        output = call(tokens, labels=tokens)
        output.loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    compiled = torch.compile(model, backend=backend)
    found = gradients(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, torch._dynamo.utils.counters
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens[:, :9]).logits, model(tokens[:, :9]).logits, rtol=1e-4, atol=1e-4)
"""


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script by itself: the live shape checks of the tests cannot be compiled."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3500, check=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_both_faces_are_compiled_and_compute_the_same(backend: str) -> None:
    done = in_a_process(SCRIPT, backend)
    assert done.returncode == 0, done.stderr[-3000:]


TRAINER = """
import sys

import torch

from tests.hf.trainers import new_model, trainer

found = []
for compiled in ({}, {"torch_compile": True, "torch_compile_backend": sys.argv[1]}):
    model = new_model()
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 4, **compiled}
    run = trainer(model, sys.argv[2], **options)
    run.train()
    found.append((model.state_dict(), run.evaluate()["eval_loss"]))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, torch._dynamo.utils.counters
(expected, loss), (weights, compiled_loss) = found
assert abs(compiled_loss - loss) < 1e-3, (compiled_loss, loss)
for name, tensor in expected.items():
    torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_trainer_compiles_a_model_and_trains_the_same(backend: str, tmp_path: Path) -> None:
    done = in_a_process(TRAINER, backend, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


@pytest.mark.parametrize("face", [0, 1])
@pytest.mark.parametrize(
    "record",
    [
        lambda model, tokens: torch.export.export(model, (tokens,)),
        lambda model, tokens: torch.jit.trace(model, (tokens,)),
        lambda model, tokens: torch.onnx.export(model, (tokens,), "unwritten.onnx", dynamo=False),
    ],
    ids=["export", "trace", "onnx"],
)
def test_what_records_a_graph_is_refused_at_the_call(record: Any, face: int) -> None:
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"cannot be exported .* Use torch\.compile"):
        warnings.simplefilter("ignore")
        record(Logits(pair()[face]), random_tokens(1, 9))
