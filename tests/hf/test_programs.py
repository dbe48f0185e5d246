"""Programs that have not imported Taipan find it through the model directory."""

import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoTokenizer

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
assert "taipan.hf" in sys.modules
assert not {"peft", "bitsandbytes"} & {*sys.modules}, "seconds of imports that a reader of models does not need"
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


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NEW_TOKENS = 8
QUESTIONS = [
    {"query": "A snake", "choices": ["sleeps", "flies away"], "gold": 0},
    {"query": "It is", "choices": ["late", "a"], "gold": 1},
]
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def programs(directory: Path) -> dict[str, str]:
    """The environment of a program that is installed, and reads nothing from afar."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(directory / "modules")}


@contextmanager
def serving(directory: Path, scratch: Path) -> Iterator[str]:
    """`transformers serve` of a directory; its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = ["transformers", "serve", str(directory), "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    with (scratch / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=scratch, env=programs(scratch), stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://localhost:{port}"
        while True:
            assert process.poll() is None, (scratch / "log").read_text()[-3000:]
            try:
                urlopen(f"{address}/health").close()
                break
            except URLError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def asked(url: str, **body: Any) -> Any:
    """The answer of a server to a JSON request."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_transformers_serve_and_chat_answer_from_a_directory(directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    TaipanForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    native = TaipanLM.from_pretrained(directory)

    def answer(ids: list[int]) -> str:
        tokens = torch.tensor([ids])
        return tokenizer.decode(native.generate(tokens, max_new_tokens=NEW_TOKENS, eos_token_id=())[0, len(ids) :])

    messages = [{"role": "user", "content": "hello"}]
    limits = {"model": str(tmp_path / "model"), "max_tokens": NEW_TOKENS, "temperature": 0.0}
    with serving(tmp_path / "model", tmp_path) as address:
        completion = asked(f"{address}/v1/completions", prompt="The snake", **limits)
        assert completion["choices"][0]["text"] == answer(tokenizer("The snake").input_ids)
        reply = asked(f"{address}/v1/chat/completions", messages=messages, **limits)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert reply["choices"][0]["message"]["content"] == answer(ids)
        done = subprocess.run(
            ["transformers", "chat", str(tmp_path / "model"), address, f"max_new_tokens={NEW_TOKENS}"],
            input="hello\nn\n!exit\n",
            env={**programs(tmp_path), "HF_HUB_OFFLINE": "0", "COLUMNS": "200"},  # it would not even ask this machine
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"\b{NEW_TOKENS} tokens in ", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lm_eval_asks_a_directory_from_its_command_line(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS))
    (tmp_path / "letters.yaml").write_text(TASK.format(questions=tmp_path / "questions.jsonl"))
    arguments = ["--model", "hf", "--model_args", f"pretrained={directory}", "--trust_remote_code", "--device", "cpu"]
    arguments += ["--tasks", "letters", "--include_path", str(tmp_path), "--batch_size", "2"]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**programs(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "data"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(["lm_eval", *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_letters*.jsonl")
    native, tokenizer = TaipanLM.from_pretrained(directory), Tokenizer.load(directory)
    for question, line in zip(QUESTIONS, samples.read_text().splitlines(), strict=True):
        found = [float(answer[0][0]) for answer in json.loads(line)["resps"]]
        context = tokenizer.encode(question["query"])
        for choice, likelihood in zip(question["choices"], found, strict=True):
            ids = tokenizer.encode(f" {choice}")
            logits = native(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
            expected = logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()
            assert likelihood == pytest.approx(float(expected), rel=1e-4)


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
    """As TRL and `transformers serve` do, whose module is the first: by `architectures` of config.json."""
    import transformers
    import transformers.processing_utils  # which makes another module `transformers`

    assert transformers.TaipanForCausalLM is TaipanForCausalLM
    assert sys.modules["transformers"].TaipanForCausalLM is TaipanForCausalLM
