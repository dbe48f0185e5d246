"""torch.compile: the same training to rounding, or a refusal that says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taipan.errors import ConfigError
from taipan.model import TaipanLM
from taipan.training.recipe import Recipe
from taipan.training.run.loop import train
from taipan.training.step import compilation
from taipan.training.step.compilation import compile_blocks
from taipan.training.watch.metrics import read_records
from tests.models import small_model
from tests.training.conftest import tiny_values
from tests.training.processes import compiled
from tests.training.processes.launch import outcomes

ROOT = Path(__file__).parents[3]
SCRIPT = """
import torch

from taipan.training.step.compilation import compile_blocks
from tests.models import random_tokens, small_model

model = small_model(("mamba2", "selective_attention", "full_attention"), dtype=torch.float32).train()
model.set_progress(0.0)
tokens = random_tokens(2, 24)


def gradients():
    torch.manual_seed(0)
    model.zero_grad()
    model(tokens, segment_ids=(torch.arange(24) // 9).expand(2, 24), labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


expected = gradients()
compile_blocks(model)
found = gradients()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3, torch._dynamo.utils.counters
assert found.keys() == expected.keys()
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_model_trains_the_same() -> None:
    """In a process of its own: the live shape checks of the tests cannot be compiled."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_blocks_on_two_processes_train_as_plain_ones_on_one(
    tmp_path: Path, corpora: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    values = tiny_values(corpora, tmp_path / "plain")
    values["training"] |= {"steps": 4, "evaluate_every": 2, "log_every": 1, "sample_every": 2, "sample_tokens": 4}
    values["training"]["dtype"] = "float32"  # in bfloat16 (`auto` where it is quick) rounding is far above 1e-4
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    for outcome in outcomes(2, Path(compiled.__file__), tmp_path, timeout=3500):
        assert list(outcome) == [*compiled.KINDS, "run"]
        for name, found in outcome.items():
            assert found == "ok", (name, found)
    plain = train(Recipe.from_dict(values))

    def curve(run: Path) -> list[float]:
        return [line[key] for line in read_records(run / "metrics.jsonl") for key in line if key.endswith("loss")]

    assert curve(tmp_path / "compiled") == pytest.approx(curve(plain.run), rel=1e-4)
    resumed = TaipanLM.from_pretrained(tmp_path / "compiled" / "model")  # names and shapes of a plain model
    assert resumed.state_dict().keys() == plain.model.state_dict().keys()


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"training\.compile needs a C\+\+ compiler"):
        compile_blocks(small_model())


def test_it_does_not_go_with_recomputation() -> None:
    values = {
        "model": {"preset": "taipan-tiny"},
        "data": {"train": "data"},
        "training": {"steps": 1, "compile": True, "recompute": True},
        "output": "run",
    }
    with pytest.raises(ConfigError, match=r"training\.compile and training\.recompute"):
        Recipe.from_dict(values)
