"""Largest resident memory of fresh processes that train a step, prefill or decode."""

import json
import subprocess
import sys
from dataclasses import asdict

from taipan.benchmark.models import configuration
from taipan.benchmark.peers import peer_names
from taipan.benchmark.results import Comparison, Measurement
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.timing import Progress
from taipan.errors import ConfigError, shown

JOBS = ("load", "train", "later", "narrow", "lean", "prefill", "decode")
_OURS_ALONE = ("narrow", "lean")  # what no peer is asked to do


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Peak of every job, each in a process of its own: the model alone, AdamW steps, a prompt, some new tokens.

    The optimizer's moments are made at the end of the first step: activations meet them from the second on.
    """
    configuration(settings.model)  # a wrong name is refused here, not in a process
    subjects = [TAIPAN, *peer_names(settings.against)]
    tokens = settings.tokens[0]
    works = {
        "load": "build the model",
        "train": f"a training step, {tokens:,} tokens, batch {settings.batch}",
        "later": f"a later step, {tokens:,} tokens, batch {settings.batch}",
        "narrow": f"a later step, moments in 8 bits, {tokens:,} tokens, batch {settings.batch}",
        "lean": f"a later step, moments in 8 bits, selective recomputation, {tokens:,} tokens, batch {settings.batch}",
        "prefill": f"prefill {tokens:,} tokens, batch {settings.batch}",
        "decode": f"{settings.new_tokens} tokens after {settings.context[0]:,}, batch {settings.batch}",
    }
    peaks: dict[tuple[str, str], float] = {}
    asked = [(job, subject) for job in JOBS for subject in (subjects if job not in _OURS_ALONE else [TAIPAN])]
    for job, subject in asked:
        peaks[job, subject] = _peak(settings, job, subject)
        if progress is not None:
            progress(len(peaks), len(asked))
    found: list[Measurement] = []
    for (job, subject), peak in peaks.items():
        comparisons: tuple[Comparison, ...] = ()
        if subject == TAIPAN:
            comparisons = tuple(
                Comparison("memory", peer, (peak / peaks[job, peer],)) for peer in subjects[1:] if (job, peer) in peaks
            )
        found.append(
            Measurement(
                suite="memory", work=works[job], subject=subject, unit="bytes", values=(peak,), comparisons=comparisons
            )
        )
    return found


def _peak(settings: Settings, job: str, subject: str) -> float:
    command = [sys.executable, "-m", "taipan.benchmark.job", json.dumps(asdict(settings)), job, subject]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = finished.stderr.strip().splitlines()[-1:] or [f"exit code {finished.returncode}"]
        raise ConfigError(
            f"The process that measures the memory of {shown(job)} for {subject} ended early ({last[0]}). "
            "If it ran out of memory, take fewer --tokens."
        )
    return float(finished.stdout)
