"""Generation, prefill and memory by length, four architectures (Fig. 1b): every measurement in a process of its own."""

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from taipan.experiments.execution import Result, Run
from taipan.experiments.gate_settings import architectures
from taipan.experiments.laboratory import Laboratory, Outcome, Table, Training

if TYPE_CHECKING:
    from taipan.data.shards import TokenDataset
    from taipan.model import TaipanLM

PROMPT = 32
"""Tokens before generation; of the prompt's reading nothing is timed then."""
PIECE = 2048
"""Tokens of a prompt read at once."""
REPEATS = 3
"""Of every measurement; a Transformer takes minutes to generate 32K tokens once."""
_MIB = 2**20


def lengths(lab: Laboratory) -> list[int]:
    """Tokens generated or read."""
    return [16, 64] if lab.scale.name == "tiny" else [1024 * 2**number for number in range(6)]


def measure(directory: Path, run: Run) -> Result:
    """Generate or read, and say how long it took and how much memory it made the process take; for a new process.

    Generation goes on to the greatest length, and what it took so far is noted at each on the way.
    """
    from taipan.data.shards import TokenDataset
    from taipan.hardware import describe
    from taipan.model import TaipanLM
    from taipan.training.watch.record import commits

    values = run.settings
    model = TaipanLM.from_pretrained(directory / "models" / values["model"]).eval()
    valid = TokenDataset.open(directory / "texts" / values["data"] / "valid")
    load = os.getloadavg()[0]
    points = timed(model, valid, values["job"], [int(length) for length in values["lengths"]])
    hardware = describe()
    return {
        "run": run.name,
        "architecture": values["architecture"],
        "seed": values["seed"],
        "job": values["job"],
        "repeat": values["repeat"],
        "points": points,
        "load": load,
        "machine": {"cpu": hardware.cpu, "simd": list(hardware.simd), "torch": hardware.torch_version},
        "commits": commits(),
    }


def timed(model: "TaipanLM", valid: "TokenDataset", job: str, wanted: list[int]) -> list[dict[str, float]]:
    """Generate (`generate`) or read (`prefill`) so many tokens; seconds and bytes of memory at each length.

    Args:
        model: in eval mode.
        valid: text that is read.
        job: `generate` or `prefill`; the second reads the last length alone.
        wanted: lengths in tokens, ascending.
    """
    import torch

    from taipan.generation import inference, prefill, start_decoding
    from taipan.generation.sampling import greedy
    from taipan.hardware import peak_rss_bytes

    count = PROMPT if job == "generate" else wanted[-1]
    ids = [int(valid.read(at, at + 1)[0]) for at in (place % valid.n_tokens for place in range(count))]
    tokens_BT = torch.tensor([ids])
    _forget_peak()
    before = peak_rss_bytes()
    points: list[dict[str, float]] = []

    def note(length: int, began: float) -> None:
        memory = peak_rss_bytes() - before
        points.append({"length": length, "seconds": time.perf_counter() - began, "memory": memory})

    if job == "prefill":
        began = time.perf_counter()
        prefill(model, tokens_BT, chunk=PIECE)
        note(wanted[-1], began)
    else:
        reading = prefill(model, tokens_BT, chunk=PIECE)
        with inference(model):
            decoding = start_decoding(model, reading.state)
            token_B = greedy(reading.logits_BV)
            began = time.perf_counter()
            for number in range(1, wanted[-1] + 1):
                token_B = greedy(decoding.step(token_B))
                if number in wanted:
                    note(number, began)
    return points


def _forget_peak() -> None:
    """Let the process's peak of memory begin where it stands, so that loading is no part of it (Linux, proc(5))."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def latency(lab: Laboratory) -> Outcome:
    """The experiment: models of the first seed, in turn, so that a busy machine hits all alike."""
    from taipan.hardware import describe

    configs = architectures(lab.scale)
    seed = lab.scale.seeds[0]
    trainings = [Training(name=name, config=config, seed=seed) for name, config in configs.items()]
    trained = dict(zip(configs, lab.train(trainings), strict=True))
    models = {training.name: lab.declare(training).identity for training in trainings}
    wanted = lengths(lab)
    jobs = [("generate", wanted), *(("prefill", [length]) for length in wanted)]
    hardware = describe()
    here = {"cpu": hardware.cpu, "torch": hardware.torch_version}
    runs = [
        Run(
            name=f"{job}-{own[-1]}-{name}",
            settings={"architecture": name, "model": models[name], "data": lab.data.name, "seed": seed, "job": job}
            | {"lengths": own, "repeat": repeat, "machine": here},
        )
        for repeat in range(1 if lab.scale.name == "tiny" else REPEATS)
        for job, own in jobs
        for name in _turned(list(configs), repeat)
    ]
    measured = lab.execute(runs, partial(measure, lab.directory), "measured", alone=True)
    results: dict[str, list[Result]] = {}
    for name in configs:
        parts = [part for part in measured if part["architecture"] == name]
        results[name] = [
            {**trained[name], "generate": _points(parts, "generate"), "prefill": _points(parts, "prefill")}
        ]
        results[name][0] |= {"load": [part["load"] for part in parts]}
    tables = tuple(
        Table(f"{title} (median of {len(measured) // (len(jobs) * len(configs))}; least–most)", header, lines)
        for title, header, lines in (
            _table(results, "generate", "seconds", wanted, "Seconds to generate so many tokens"),
            _table(results, "generate", "memory", wanted, "Memory that generation took, MiB"),
            _table(results, "prefill", "seconds", wanted, "Seconds to read so many tokens"),
            _table(results, "prefill", "memory", wanted, "Memory that reading took, MiB"),
        )
    )
    return Outcome(results, tables)


def _turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _points(parts: list[Result], job: str) -> list[dict[str, Any]]:
    """By length, the seconds and bytes of every repetition."""
    points = [point for part in parts if part["job"] == job for point in part["points"]]
    return [
        {
            "length": length,
            **{key: [point[key] for point in points if point["length"] == length] for key in ("seconds", "memory")},
        }
        for length in sorted({int(point["length"]) for point in points})
    ]


def _table(
    results: dict[str, list[Result]], job: str, key: str, wanted: list[int], title: str
) -> tuple[str, list[str], list[list[str]]]:
    scale = _MIB if key == "memory" else 1.0
    lines = [[name, *(_cell(point[key], scale) for point in own[0][job])] for name, own in results.items()]
    return title, ["model", *(f"{length:,}" for length in wanted)], lines


def _cell(values: list[float], scale: float) -> str:
    own = [value / scale for value in values]
    middle = f"{median(own):.3g}"
    return middle if len(own) == 1 else f"{middle} ({min(own):.3g}–{max(own):.3g})"


EXPERIMENTS = {"latency-by-length": latency}
