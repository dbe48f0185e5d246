"""A million tokens through the command line, in the memory of ten thousand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taipan import TaipanConfig, TaipanLM
from taipan.data.tokenizer import Tokenizer

MEASURED = """
import sys
from taipan.cli.main import main
from taipan.hardware import peak_rss_bytes
try:
    main(sys.argv[1:])
finally:
    print("peak", peak_rss_bytes(), file=sys.stderr)
"""
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    TaipanLM(TaipanConfig.preset("taipan-tiny")).save_pretrained(directory, Tokenizer.bytes())
    return directory


def peak(*arguments: object) -> int:
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stderr.split("peak ")[-1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_memory_does_not_grow_with_the_text(tiny: Path, tmp_path: Path, verb: str) -> None:
    peaks: list[int] = []
    for tokens in (10_000, 1_000_000):
        text = tmp_path / f"{tokens}.txt"
        text.write_text("The taipan waits.\n" * (tokens // 18 + 1), encoding="utf-8")
        assert text.stat().st_size >= tokens
        options = ["evaluate", tiny, text]
        if verb == "generate":
            options = ["generate", tiny, "--prompt-file", text, "--max-new-tokens", 5]
        peaks.append(peak(*options))
    assert peaks[1] - peaks[0] < 200 * MEGABYTE, [value / MEGABYTE for value in peaks]
