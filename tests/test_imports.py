"""What an import costs: optional and heavy dependencies are not touched before they are needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from taipan import TaipanConfig, TaipanLM

FACE = {"jinja2", "matplotlib", "rich", "typer", "yaml"}
HUGGING_FACE = {"transformers", "accelerate"}
# pydantic and huggingface_hub come in with other packages; they would cost more than the model itself.
DATA = {"datasets", "pyarrow", "pandas"}
HEAVY = FACE | HUGGING_FACE | DATA | {"huggingface_hub", "pydantic", "pytest"}

REFUSING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Refuse())
"""


def run_without(forbidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which importing any of the forbidden packages fails."""
    script = REFUSING.format(forbidden=forbidden) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("module", ["config", "accounting", "errors", "hardware"])
def test_needs_no_torch(module: str) -> None:
    result = run_without(HEAVY | {"torch", "numpy"}, f"import taipan, taipan.{module}")
    assert result.returncode == 0, result.stderr


def test_the_command_line_answers_without_torch() -> None:
    result = run_without(
        HUGGING_FACE | {"torch", "numpy", "matplotlib"}, "from taipan.cli.main import main; main(['--help'])"
    )
    assert result.returncode == 0, result.stderr


def test_the_model_needs_neither_transformers_nor_the_face() -> None:
    result = run_without(HEAVY, "import taipan, taipan.config, taipan.model; taipan.TaipanLM")
    assert result.returncode == 0, result.stderr


def test_loading_a_model_does_not_import_the_compiler_of_torch(tmp_path: Path) -> None:
    """It takes as long as PyTorch itself, and every command that reads a model would wait for it."""
    TaipanLM(TaipanConfig.preset("taipan-tiny")).save_pretrained(tmp_path)
    code = f"import sys; from taipan import TaipanLM; TaipanLM.from_pretrained({str(tmp_path)!r}); "
    result = run_without(set(), code + "assert 'torch._dynamo' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_no_garbage_is_looked_for_while_the_model_is_imported() -> None:
    """Every look walks what torch has made, hundreds of thousands of objects."""
    code = """
import gc, taipan
looks = []
gc.callbacks.append(lambda phase, info: looks.append(phase))
gc.set_threshold(700, 10, 10)
taipan.TaipanLM
seen = len(looks)
assert gc.isenabled() and not seen, seen
gc.disable()
taipan.TextModel
assert not gc.isenabled()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_refusal_refuses() -> None:
    result = run_without({"torch"}, "import taipan.shapes")
    assert result.returncode != 0
    assert "torch is imported" in result.stderr
