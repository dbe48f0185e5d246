"""Every option of every verb, with a value it should not have: refused in words, or taken and done."""

import dataclasses
import io
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from taipan import TaipanConfig
from taipan.training.recipe import Recipe
from tests.command import run
from tests.fuzz.test_verbs import YAML_VALUES, made

VALUES = (
    *("", " ", "-1", "0", "1", "2", "0.5", "-0.5", "1e-300", "1e300", "nan", "inf", "-inf", "1e999", "true", "None"),
    *("18446744073709551616", "9" * 5000, "é", "caf\udce9", "../x", "/", "--", "-", "a\0b", "[" * 2000, "y" * 1000),
    *(
        "float32",
        "bfloat16",
        "int8",
        "auto",
        "bpe:99999999999999999999",
        "bpe:-1",
        "bpe:1",
        "training.steps=x",
        "=",
        "a=b",
    ),
)
# words of a valid command, and the options to change; {place} is the directory with everything
VERBS: dict[str, tuple[list[str], list[str]]] = {
    "generate": (
        ["generate", "{place}/model", "abc", "--max-new-tokens", "2"],
        [
            *("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed"),
            *("--stop", "--prefill-chunk", "--save-state", "--load-state", "--dtype", "--weights", "--prompt-file"),
        ],
    ),
    "evaluate": (
        ["evaluate", "{place}/model", "{place}/text.txt"],
        ["--context", "--piece", "--batch-tokens", "--dtype", "--json", "--tasks", "--batch-size"],
    ),
    "inspect": (["inspect", "{place}/model", "{place}/text.txt", "-o", "page.html"], ["-o"]),
    "calibrate": (
        ["calibrate", "{copy}/model", "{place}/text.txt", "--tokens", "32", "--context", "16"],
        ["--capacity", "--context", "--tokens", "--seed"],
    ),
    "upcycle": (["convert", "upcycle", "{place}/mamba2", "up"], ["--every", "--window", "--seed"]),
    "to-mamba2": (["convert", "to-mamba2", "{place}/mamba2", "out"], ["--layout"]),
    "to-gguf": (["convert", "to-gguf", "{place}/mamba2", "out.gguf"], ["--dtype"]),
    "plan": (
        ["plan", "taipan-tiny", "--gpus", "2"],
        ["--gpus", "--gpu-memory", "--gpus-per-node", "--tflops", "--utilisation", "--bandwidth", "-o"],
    ),
    "runs": (["runs", "{place}/runs"], []),
    "presets": (["presets"], []),
    "doctor": (["doctor"], []),
    "bench": (
        ["bench", "decode", "--model", "{place}/model", "--context", "4", "--new-tokens", "2", "--repeats", "1"],
        ["--model", "--batch", "--dtype", "--threads", "--implementation", "--repeats", "--against", "--weights"],
    ),
    "session read": (
        ["session", "read", "{place}/model", "{place}/text.txt", "-o", "{new}"],
        ["-o", "--dtype", "--every", "--keep", "--chunk"],
    ),
    "session append": (["session", "append", "{copy}/session", "more"], ["--file", "--model", "--dtype"]),
    "session ask": (
        ["session", "ask", "{place}/session", "abc", "--max-new-tokens", "2"],
        ["--max-new-tokens", "--temperature", "--top-p", "--seed", "--stop", "--model", "--dtype"],
    ),
    "session fork": (["session", "fork", "{place}/session", "{new}"], ["--model"]),
    "session mark": (["session", "mark", "{copy}/session", "here"], ["--model"]),
    "session rollback": (["session", "rollback", "{copy}/session", "8"], ["--model"]),
    "session info": (["session", "info", "{place}/session"], []),
    "session verify": (["session", "verify", "{place}/session"], ["--model"]),
    "serve": (  # up to the moment where it would listen
        ["serve", "{place}/model"],
        [
            *("--host", "--port", "--name", "--rows", "--waiting", "--prefix-memory", "--prompt-tokens"),
            *("--new-tokens", "--api-key", "--dtype", "--weights"),
        ],
    ),
}
TRAIN = ["train", "{place}/recipe.yaml", "-odata.train={place}/data", "-ooutput={new}", "-otraining.steps=1"]


def recipe_keys() -> Iterator[str]:
    """Every key that a recipe may have."""
    for section in dataclasses.fields(Recipe):
        yield section.name
        if section.name == "model":
            names = ["from", "preset", "setting", *(field.name for field in dataclasses.fields(TaipanConfig))]
        else:
            names = [field.name for field in dataclasses.fields(section.type)] if section.name != "output" else []  # pyright: ignore[reportArgumentType]
        yield from (f"{section.name}.{name}" for name in names)


def cases() -> Iterator[tuple[str, list[str]]]:
    """(verb, words): one option given once more with another value, or one positional argument changed or added."""
    for verb, (words, options) in VERBS.items():
        for value in VALUES:
            for option in options:
                yield verb, [*words, f"{option}{value}" if len(option) == 2 else f"{option}={value}"]
            for place in range(1, len(words)):
                if not words[place].startswith("-") and not words[place - 1].startswith("-"):
                    yield verb, [*words[:place], value, *words[place + 1 :]]
            yield verb, [*words, value]
            yield verb, [*words, f"--{value}"]
    for key in recipe_keys():
        for value in YAML_VALUES:
            yield "train", [*TRAIN, f"-o{key}={value}"]


def of_verb(verb: str) -> list[tuple[str, list[str]]]:
    return [case for case in cases() if case[0] == verb]


def check(selected: list[tuple[str, list[str]]], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made() / "model", scratch / "copy" / "model")
    shutil.copytree(made() / "session", scratch / "copy" / "session")
    (scratch / "here").mkdir()
    monkeypatch.chdir(scratch / "here")
    monkeypatch.setattr("uvicorn.Server.run", lambda *arguments, **options: None)
    threads = torch.get_num_threads()
    for number, (verb, words) in enumerate(selected):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text"), "utf-8"))
        places = {"{place}": made(), "{copy}": scratch / "copy", "{new}": scratch / f"new {number}"}
        given = words
        for name, path in places.items():
            given = [word.replace(name, str(path)) for word in given]
        finished = run(*given)
        torch.set_num_threads(threads)
        shown = [word[:100] for word in given]
        assert finished.code in (0, 2), (verb, shown, finished.err[-2000:])
        assert len(finished.err) < 6000, (verb, shown, finished.err[:300])


def test_an_option_is_taken_or_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    check([case for verb in (*VERBS, "train") for case in draw.sample(of_verb(verb), 5)], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(4800)
@pytest.mark.parametrize("verb", [*VERBS, "train"])
def test_every_option_is_taken_or_refused_in_words(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(of_verb(verb), tmp_path, monkeypatch)
