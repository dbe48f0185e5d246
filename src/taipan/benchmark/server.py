"""`taipan serve` in a process of its own, and a client that costs next to nothing beside it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch

from taipan.benchmark.models import build, names
from taipan.benchmark.settings import Settings
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError
from taipan.io import parse_json_object
from taipan.seeding import seeded_generator

HOST = "127.0.0.1"
NAME = "measured"
_START_SECONDS = 120.0


@dataclass
class Streamed:
    """What came of one streamed completion.

    Attributes:
        sent: when the request had been sent, in seconds of `time.perf_counter`.
        times: when each token came.
        status: of the answer; 0 where there was none.
        error: what the server said instead of tokens.
    """

    sent: float = 0.0
    times: list[float] = field(default_factory=list[float])
    status: int = 0
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in pairwise(self.times)]


class Server:
    """A running server.

    Attributes:
        process: its (first) process.
        port: where it listens.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, said: IO[bytes]) -> None:
        self.process = process
        self.port = port
        self._said = said

    @property
    def said(self) -> str:
        """What it wrote for people."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def get(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def load(self) -> dict[str, Any]:
        """What `/health` says."""
        return parse_json_object(self.get("/health"), "what /health says")

    async def post(self, path: str, body: dict[str, Any]) -> "tuple[asyncio.StreamReader, asyncio.StreamWriter]":
        """Send a request."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return reader, writer

    async def stream(
        self,
        ids: Sequence[int],
        tokens: int,
        *,
        into: Streamed | None = None,
        stop: asyncio.Event | None = None,
        **fields: Any,
    ) -> Streamed:
        """Let a greedy completion be streamed.

        Args:
            ids: the prompt.
            tokens: new tokens.
            into: filled as tokens come; a new record if it is None.
            stop: go away as soon as it is set.
            fields: further fields of the request.
        """
        told = into or Streamed()
        body = {"model": NAME, "prompt": list(ids), "max_tokens": tokens, "temperature": 0, "stream": True, **fields}
        reader, writer = await self.post("/v1/completions", body)
        told.sent = time.perf_counter()
        try:
            told.status = int((await reader.readline()).split()[1])
            while line := await reader.readline():
                now = time.perf_counter()
                if line.startswith(b"data: {"):
                    if line.startswith(b'data: {"error"'):
                        told.error = line.decode()
                    elif b'"finish_reason": null' in line:
                        told.times.append(now)
                elif told.status != 200 and line.startswith(b"{"):
                    told.error = line.decode()
                if line.startswith(b"data: [DONE]") or (stop is not None and stop.is_set()):
                    break
        finally:
            writer.close()
        return told

    def kill(self) -> None:
        """End all its processes at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._said.close()

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        self.process.terminate()
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._said.close()
        return code


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def start(model: Path, *options: str, port: int | None = None) -> Server:
    """Start a server of a model directory, and wait until it answers.

    Raises:
        ConfigError: it has ended, or does not answer for two minutes.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "taipan", "serve", str(model), "--port", str(port), "--name", NAME, *options]
    # open as long as the server runs
    said = tempfile.TemporaryFile()  # noqa: SIM115
    server = Server(subprocess.Popen(command, stderr=said, start_new_session=True), port, said)
    begin = time.perf_counter()
    while time.perf_counter() - begin < _START_SECONDS:
        if server.process.poll() is not None:
            last = " ".join(server.said.strip().splitlines()[-3:])
            said.close()
            raise ConfigError(f"The server that is to be measured has ended: {last}")
        try:
            server.get("/health")
            return server
        except OSError:
            time.sleep(0.05)
    server.kill()
    raise ConfigError(f"The server that is to be measured did not answer for {_START_SECONDS:.0f} s.")


@contextmanager
def model_directory(settings: Settings, dtype: torch.dtype) -> Generator[Path]:
    """The directory of the model to measure: a named one is written with random weights, and removed afterwards."""
    if settings.model not in names():
        yield Path(settings.model)
        return
    with tempfile.TemporaryDirectory(prefix="taipan-bench-") as scratch:
        model = build(settings, dtype)
        model.config = replace(model.config, eos_token_id=None)  # random weights say the end token at any moment
        model.save_pretrained(scratch, tokenizer_of(model.config.vocab_size, settings.seed))
        del model
        yield Path(scratch)


def tokenizer_of(size: int, seed: int) -> Tokenizer:
    """A byte-level BPE of about so many tokens, of words that do not exist."""
    if size < 512:
        return Tokenizer.bytes()
    generator = seeded_generator(seed, "words")
    letters = torch.randint(97, 123, (size, 7), generator=generator, dtype=torch.uint8)
    words = [bytes(word).decode() for word in letters.tolist()]
    return Tokenizer.train_bpe([" ".join(words), " ".join(reversed(words))], size)
