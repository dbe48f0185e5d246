"""From a command to its first token, and what importing costs: every sample is a process of its own."""

import subprocess
import sys
from functools import partial

from taipan.benchmark.models import dtype_of
from taipan.benchmark.results import Measurement, time_ratio
from taipan.benchmark.server import model_directory
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.timing import Progress, interleaved
from taipan.errors import ConfigError
from taipan.model.weights import weights_file

FLOOR = "importing torch and reading the file"
TORCH = "importing torch"
_READ = "import sys, torch; open(sys.argv[1], 'rb', buffering=0).read()"
_MODEL = "import taipan; taipan.TaipanLM"


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Time until `taipan generate MODEL x` writes, and until its model class can be used.

    Raises:
        ConfigError: the command fails.
    """
    dtype = dtype_of(settings)
    with model_directory(settings, dtype) as directory:
        weights = str(weights_file(directory))
        options = ["--max-new-tokens", "1", "--weights", settings.weights]
        command = [sys.executable, "-m", "taipan", "generate", str(directory), "x", *options]
        runs = {
            "generate": partial(_first_byte, command),
            FLOOR: partial(_run, [sys.executable, "-c", _READ, weights]),
            "import": partial(_run, [sys.executable, "-c", _MODEL]),
            TORCH: partial(_run, [sys.executable, "-c", "import torch"]),
        }
        seconds = interleaved(runs, settings.repeats, progress)
    works = [
        ("to the first token", TAIPAN, "generate", FLOOR),
        ("to the first token", FLOOR, FLOOR, None),
        ("importing the model", TAIPAN, "import", TORCH),
        ("importing the model", TORCH, TORCH, None),
    ]
    return [
        Measurement(
            suite="start",
            work=work,
            subject=subject,
            unit="seconds",
            values=seconds[name],
            comparisons=() if other is None else (time_ratio(seconds[name], seconds[other], other),),
        )
        for work, subject, name, other in works
    ]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _first_byte(command: list[str]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.read(1):
            said = " ".join(process.stderr.read().decode(errors="replace").strip().splitlines()[-3:])
            raise ConfigError(f"The command that is to be measured has written nothing: {said}")
        process.kill()
