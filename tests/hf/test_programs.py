"""Programs that have not imported Taipan find it through the model directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taipan import TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.hf import TaipanForCausalLM
from taipan.model.hub import AUTO_MAP, REMOTE_CODE
from tests.models import random_tokens, small_model

_LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
directory, target = sys.argv[1:]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokens = torch.arange(12)[None]
torch.save(model(tokens).logits, target + "/logits.pt")
assert AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("a").input_ids == [97]
model.save_pretrained(target)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256).save_pretrained(directory, Tokenizer.bytes())
    return directory


def python(code: str, *arguments: object, modules: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_a_program_that_trusts_the_directory_loads_the_model_and_saves_it_again(
    directory: Path, tmp_path: Path
) -> None:
    done = python(_LOAD, directory, tmp_path, modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    native = TaipanLM.from_pretrained(directory)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), native(torch.arange(12)[None]).logits)
    assert TaipanLM.from_pretrained(tmp_path).fingerprint == native.fingerprint
    # not a copy of our sources: the same small module, named in the same way
    assert (tmp_path / REMOTE_CODE).read_bytes() == (directory / REMOTE_CODE).read_bytes()
    assert [path.name for path in tmp_path.glob("*.py")] == [REMOTE_CODE]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.slow
def test_without_the_package_the_directory_says_what_to_install(directory: Path, tmp_path: Path) -> None:
    done = python(
        f"import sys; sys.modules['taipan'] = None\n{_LOAD}", directory, tmp_path, modules=tmp_path / "modules"
    )
    assert "package taipan-lm, extra hf: pip install '.[hf]' in your clone of Taipan" in done.stderr


def test_both_faces_write_the_same_module(directory: Path, tmp_path: Path) -> None:
    face = TaipanForCausalLM.from_pretrained(directory)
    face.save_pretrained(tmp_path)
    assert (tmp_path / REMOTE_CODE).read_bytes() == (directory / REMOTE_CODE).read_bytes()
    assert face.config.auto_map == AUTO_MAP == json.loads((directory / "config.json").read_text())["auto_map"]
    assert face(random_tokens(1, 3)).logits.isfinite().all()


def test_programs_find_the_class_by_its_name() -> None:
    """As `transformers serve` and TRL do: by `architectures` of config.json."""
    import transformers
    import transformers.processing_utils  # which makes another module `transformers`

    assert transformers.TaipanForCausalLM is TaipanForCausalLM
    assert sys.modules["transformers"].TaipanForCausalLM is TaipanForCausalLM
