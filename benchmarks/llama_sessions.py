"""A text that was read, after a restart: a saved slot of llama.cpp's server beside a session of `taipan serve`.

    pip install gguf
    python benchmarks/llama_sessions.py --server llama.cpp/build/bin/llama-server --context 16384 --json sessions.json

The same Mamba-2 with random weights, bf16, in both: read a prompt, save it, end the server, start it again, restore,
and ask with eight tokens more; then ask something else about the same prompt. Told are the tokens that are read again
and the seconds to the first new token, over HTTP. llama.cpp is built by its own instructions.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

from taipan import hardware
from taipan.benchmark import server as ours
from taipan.benchmark.models import build, configuration, random_tokens
from taipan.benchmark.results import Spread
from taipan.benchmark.settings import Settings
from taipan.conversion.gguf import write_gguf

HOST = ours.HOST
QUESTION = 8


@dataclass
class Run:
    """What one program did in one repetition.

    Attributes:
        read_seconds: to read the prompt, before the restart.
        restore_seconds: to restore what was saved; opening a session is part of the request.
        again: tokens of the next request that were read, besides the question.
        first_seconds: from the next request to its first new token.
        other_again: as `again`, of the request after it, with another question about the same prompt.
        other_seconds: of that one.
        saved_bytes: on disk.
    """

    read_seconds: float
    restore_seconds: float
    again: int
    first_seconds: float
    other_again: int
    other_seconds: float
    saved_bytes: int


def add_words(writer: Any, size: int) -> None:
    """A byte-level tokenizer of GPT-2's kind, filled up with words that no text has: the server needs one."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = [f"word{number}" for number in range(size - 258)]
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "th", *words, "<|endoftext|>"])
    writer.add_token_types([1] * (size - 1) + [3])  # normal, and one that is control
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(size - 1)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


def post(port: int, path: str, body: Any) -> Any:
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.loads(response.read())


class Llama:
    """llama.cpp's server."""

    def __init__(self, program: str, model: Path, slots: Path, context: int, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = int(probe.getsockname()[1])
        command = [program, "-m", str(model), "--host", HOST, "--port", str(self.port), "-t", str(threads), "-np", "1"]
        command += ["-c", str(context), "--slot-save-path", f"{slots}/", "--no-webui"]
        self.log = (slots / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while True:
            if self.process.poll() is not None:
                sys.exit(f"llama-server has ended; see its last lines:\n{(slots / 'log').read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (OSError, urllib.error.URLError):
                time.sleep(0.05)

    def complete(self, ids: list[int]) -> tuple[int, float]:
        """Tokens of the prompt that were read, and seconds to the first new one."""
        begin = time.perf_counter()
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": True, "id_slot": 0}
        answer = post(self.port, "/completion", body)
        return int(answer["timings"]["prompt_n"]), time.perf_counter() - begin

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def llama(program: str, model: Path, home: Path, prompt: list[int], questions: list[list[int]], threads: int) -> Run:
    room = len(prompt) + 1024
    server = Llama(program, model, home, room, threads)
    try:
        _, read_seconds = server.complete(prompt)
        post(server.port, "/slots/0?action=save", {"filename": "saved"})
    finally:
        server.stop()
    server = Llama(program, model, home, room, threads)
    try:
        begin = time.perf_counter()
        post(server.port, "/slots/0?action=restore", {"filename": "saved"})
        restore_seconds = time.perf_counter() - begin
        told = [server.complete([*prompt, *question]) for question in questions]
    finally:
        server.stop()
    (read, seconds), (other, other_seconds) = told
    size = (home / "saved").stat().st_size
    return Run(read_seconds, restore_seconds, read - QUESTION, seconds, other - QUESTION, other_seconds, size)


def taipan(model: Path, home: Path, prompt: list[int], questions: list[list[int]]) -> Run:
    options = ("--sessions", str(home), "--dtype", "bfloat16", "--prefix-memory", "0")
    server = ours.start(model, *options)
    try:
        begin = time.perf_counter()
        post(server.port, "/v1/sessions", {"id": "saved", "tokens": prompt})
        read_seconds = time.perf_counter() - begin
    finally:
        server.stop()
    size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    server = ours.start(model, *options)
    try:
        seconds: list[float] = []
        counts = [0]
        for question in questions:
            seconds.append(asyncio.run(server.stream(question, 1, session="saved")).first)
            counts.append(int(server.metric("taipan_prompt_tokens_total")))
    finally:
        server.stop()
    first, other = (later - earlier - QUESTION for earlier, later in pairwise(counts))
    return Run(read_seconds, 0.0, first, seconds[0], other, seconds[1], size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="llama.cpp's llama-server")
    parser.add_argument(
        "--model", default="mamba2-30m", help="a named model of `taipan bench` that is Mamba-2 throughout"
    )
    parser.add_argument("--context", type=int, default=16_384, help="tokens that are read before the restart")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write everything to this file")
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, dtype="bfloat16")
    config = configuration(arguments.model)
    threads = os.cpu_count() or 1
    runs: dict[str, list[Run]] = {"llama.cpp": [], "taipan": []}
    with tempfile.TemporaryDirectory() as scratch, ours.model_directory(settings, torch.bfloat16) as directory:
        gguf = Path(scratch, "model.gguf")
        write_gguf(build(settings, torch.float32), gguf, "mamba2", "bf16", partial(add_words, size=config.vocab_size))
        for number in range(arguments.repeats):
            prompt = random_tokens(config, 1, arguments.context, number)[0].tolist()
            questions = random_tokens(config, 2, QUESTION, 1000 + number).tolist()
            for name in list(runs)[:: 1 if number % 2 else -1]:
                home = Path(scratch, f"{name}-{number}")
                home.mkdir()
                if name == "taipan":
                    runs[name].append(taipan(directory, home, prompt, questions))
                else:
                    runs[name].append(llama(arguments.server, gguf, home, prompt, questions, threads))
                print(f"{number + 1} of {arguments.repeats}: {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    print(f"\n{arguments.model}, bf16, {arguments.context:,} tokens; median (lowest – highest)\n")
    print(
        "| program | reading, s | restoring, s | read again | first token, s | read again for another | s | saved, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, found in runs.items():
        again = ", ".join(sorted({f"{run.again:,}" for run in found}))
        other_again = ", ".join(sorted({f"{run.other_again:,}" for run in found}))
        read, restore, first, other, size = (
            shown([getattr(run, field) / scale for run in found])
            for field, scale in (
                ("read_seconds", 1),
                ("restore_seconds", 1),
                ("first_seconds", 1),
                ("other_seconds", 1),
                ("saved_bytes", 1e6),
            )
        )
        print(f"| {name} | {read} | {restore} | {again} | {first} | {other_again} | {other} | {size} |")
    if arguments.json:
        record = {
            "command": " ".join(sys.argv),
            "machine": asdict(hardware.describe()),
            "model": arguments.model,
            "context": arguments.context,
            "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
        }
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def shown(values: list[float]) -> str:
    return f"{Spread.of(values).median:.3g} ({min(values):.3g} – {max(values):.3g})"


if __name__ == "__main__":
    main()
