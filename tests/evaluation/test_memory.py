"""A million tokens, and a thousand texts, take the memory of ten thousand tokens."""

import subprocess
import sys

import pytest

MEGABYTE = 1 << 20
ALLOWED = 200 * MEGABYTE

SCRIPT = """
import sys
import torch
from taipan import TaipanConfig, TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.evaluation import TextDocuments, evaluate
from taipan.generation import stream
from taipan.hardware import peak_rss_bytes

tokens = int(sys.argv[2])
model = TaipanLM(TaipanConfig.preset("taipan-tiny")).eval()
if sys.argv[1] == "generate":
    pieces = (torch.randint(0, 256, (1, 1000)) for _ in range(tokens // 1000))
    assert len(list(stream(model, pieces, max_new_tokens=5, eos_token_id=()))) == 5
elif sys.argv[1] == "texts":
    texts = ["0123456789" * (2 + number % 50) for number in range(tokens // 265)]
    assert evaluate(model, TextDocuments(texts, Tokenizer.bytes())).documents == tokens // 265
else:
    assert evaluate(model, TextDocuments(["0123456789" * (tokens // 10)], Tokenizer.bytes())).tokens == tokens
print(peak_rss_bytes())
"""


def peak(verb: str, tokens: int) -> int:
    command = [sys.executable, "-c", SCRIPT, verb, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_memory_does_not_grow_with_the_context(verb: str) -> None:
    short, long = peak(verb, 10_000), peak(verb, 1_000_000)
    assert long - short <= ALLOWED, (
        f"{verb}: {short / MEGABYTE:.0f} MB at 10,000 tokens, {long / MEGABYTE:.0f} at 1,000,000"
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_number_of_texts() -> None:
    one, thousand = peak("evaluate", 10_000), peak("texts", 265_000)
    assert thousand - one <= ALLOWED, f"{one / MEGABYTE:.0f} MB for one text, {thousand / MEGABYTE:.0f} for a thousand"
