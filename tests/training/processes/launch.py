"""Start one script as several processes of a run, as torchrun does, and collect what each found."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(size: int, script: Path, *arguments: str, timeout: float) -> None:
    """Run the script on `size` processes to its end; an exit code other than 0, or a hang, is an error."""
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, str(script), *arguments], env=environment(rank, size, port))
        for rank in range(size)
    ]
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * size


def outcomes(size: int, script: Path, directory: Path, *arguments: str, timeout: float) -> list[dict[str, Any]]:
    """What each process wrote into `directory/RANK.json`."""
    launch(size, script, str(directory), *arguments, timeout=timeout)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]
