"""The page that shows a quickstart."""

import json
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from taipan import __version__, hardware
from taipan.accounting import flops_per_token, parameter_count, state_bytes
from taipan.config import TaipanConfig
from taipan.data.mixture import Mixture
from taipan.experiments.phases import Phase
from taipan.experiments.quickstart_findings import SAMPLE_PROMPT, SAMPLE_SETTINGS, Findings
from taipan.io import atomic_write
from taipan.report.curves import Curve, alpha_figure, loss_figure, position_figure, selection_figure
from taipan.report.page import render
from taipan.training.recipe import Recipe
from taipan.training.watch.metrics import Record, read_records

_RESULTS = "results.json"


def write_report(directory: Path, path: Path, findings: Findings, phases: Sequence[Phase]) -> None:
    """Write the self-contained page, and `results.json` with the same numbers into the directory.

    Args:
        directory: of the quickstart, with a finished training.
        path: of the page.
        findings: what was measured.
        phases: the parts so far.

    Raises:
        CheckpointError: they cannot be written.
    """
    config = TaipanConfig.from_json_file(directory / "model" / "config.json")
    recipe = Recipe.load(directory / "recipe.yaml")
    records = read_records(directory / "metrics.jsonl")
    facts = _facts(recipe, config)
    plain = {
        "phases": [asdict(phase) for phase in phases],
        "facts": dict(facts),
        "packages": [asdict(row) for row in findings.packages],
        "files": [asdict(row) for row in findings.files],
        "positions": [asdict(row) for row in findings.positions],
        "gates": [asdict(row) for row in findings.gates],
        "sample": {"prompt": SAMPLE_PROMPT, "text": findings.sample},
    }
    atomic_write(directory / _RESULTS, (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())
    page = render(
        "quickstart.html.j2",
        title="Taipan quickstart",
        version=__version__,
        made=date.today().isoformat(),
        **_headline(findings, config, records),
        **_figures(directory, findings, config, recipe, records),
        packages=findings.packages,
        files=findings.files,
        gates=findings.gates,
        view=findings.view,
        view_source=findings.shown.name,
        context_length=recipe.data.context_length,
        sample_prompt=SAMPLE_PROMPT,
        sample_text=findings.sample,
        sample_command=_sample_command(directory),
        next_commands=next_commands(directory),
        made_with=_made_with(directory, findings, recipe),
        phases=[*phases, Phase("total", sum(phase.seconds for phase in phases))],
        facts=facts,
        recipe=recipe.to_yaml(),
    )
    atomic_write(path, page.encode())


def next_commands(directory: Path) -> list[str]:
    """Commands that work after a quickstart in this directory."""
    model, recipe = _quoted(directory / "model"), _quoted(directory / "recipe.yaml")
    return [
        f'taipan generate {model} "def "',
        f"taipan inspect {model} YOUR_FILE.py -o page.html",
        f"taipan evaluate {model} YOUR_FILE.py",
        f"taipan data prepare YOUR_FILES --tokenizer {model} --valid-fraction 0.05 --out mydata",
        f"taipan train {recipe} -o data.train=mydata/train -o data.valid=mydata/valid -o output=runs/mine",
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _sample_command(directory: Path) -> str:
    settings = SAMPLE_SETTINGS
    return (
        f'taipan generate {_quoted(directory / "model")} "{SAMPLE_PROMPT}" --max-new-tokens {settings.max_new_tokens} '
        f"--temperature {settings.temperature} --top-p {settings.top_p} --seed {settings.seed}"
    )


def _made_with(directory: Path, findings: Findings, recipe: Recipe) -> list[str]:
    model = _quoted(directory / "model")
    seconds = "" if recipe.training.seconds is None else f" --seconds {recipe.training.seconds:g}"
    return [
        f"taipan quickstart{seconds} --out {_quoted(directory)}",
        f"taipan evaluate {model} {_quoted(directory / 'data' / 'valid')}",
        f"taipan inspect {model} {_quoted(findings.shown)} -o page.html",
        _sample_command(directory),
    ]


def _facts(recipe: Recipe, config: TaipanConfig) -> list[tuple[str, str]]:
    machine = hardware.describe()
    dtype = hardware.training_dtype(recipe.training.dtype)
    names = ("torch", "numpy", "tokenizers", "safetensors")
    return [
        ("CPU", machine.cpu),
        ("cores", str(machine.cores)),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("instruction sets", ", ".join(machine.simd) or "none of note"),
        ("system", machine.system),
        ("Python", platform.python_version()),
        ("taipan", __version__),
        *((name, metadata.version(name)) for name in names),
        ("dtype", f"{dtype.dtype}: {dtype.reason}"),
        ("threads", str(torch.get_num_threads())),
        ("seed", str(recipe.training.seed)),
        ("peak memory", f"{hardware.peak_rss_bytes() / 2**20:.0f} MiB"),
        ("parameters", f"{parameter_count(config):,}"),
        ("FLOPs per token", f"{flops_per_token(config, recipe.data.context_length):,.0f}"),
        ("state of one row", f"{state_bytes(config, recipe.data.context_length) / 2**10:,.0f} KiB"),
    ]


def _headline(findings: Findings, config: TaipanConfig, records: Sequence[Record]) -> dict[str, Any]:
    """Title and tiles."""
    total = findings.total
    last = records[-1]
    machine = hardware.describe()
    minutes = last["seconds"] / 60
    tiles = [
        (f"{total.model:.3f}", "bits per byte on held-out modules"),
        (f"{total.gzip:.2f} · {total.xz:.2f}", "gzip −9 · xz −9, bits per byte"),
        (f"{last['tokens'] / last['seconds']:,.0f}", "tokens per second in training"),
        (f"{last['tokens'] / 1e6:.2f} M", f"tokens read in {last['step']:,} steps"),
    ]
    if findings.gates:
        rates = " · ".join(f"{100 * gate.noise_free_rate:.1f} %" for gate in findings.gates)
        budget = f"{100 * config.attention_capacity:.0f} %"
        tiles.append((rates, f"of the tokens selected at inference; the budget is {budget}"))
    names = [row.name for row in findings.packages[:-1]]
    return {
        "model_bits": total.model,
        "gzip_bits": total.gzip,
        "xz_bits": total.xz,
        "trained_for": f"{minutes:.1f} minutes" if minutes >= 1 else f"{last['seconds']:.0f} seconds",
        "parameters": f"{parameter_count(config) / 1e6:.1f} million",
        "machine_short": f"{machine.cores} CPU cores" if machine.cuda is None else machine.cuda,
        "python": f"Python {platform.python_version()}",
        "held_out": f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0],
        "tiles": [{"value": value, "meaning": meaning} for value, meaning in tiles],
    }


def _figures(
    directory: Path, findings: Findings, config: TaipanConfig, recipe: Recipe, records: Sequence[Record]
) -> dict[str, Any]:
    """The figures, from the run's metrics."""
    steps = [record for record in records if record["kind"] == "train"]
    bytes_per_token = Mixture.open(recipe.data.train, verify=False).bytes_per_token
    tokens = [record["tokens"] / 1e6 for record in steps]
    loss = [record["cross_entropy"] / math.log(2) / bytes_per_token for record in steps]
    evaluated = [record for record in records if "valid_bits_per_byte" in record]
    valid = Curve(
        [record["tokens"] / 1e6 for record in evaluated], [record["valid_bits_per_byte"] for record in evaluated]
    )
    budget = Curve(tokens, [config.capacity_at(min(1.0, record["progress"])) for record in steps])

    def gates(name: str) -> dict[int, Curve]:
        layers = [gate["layer"] for gate in steps[0]["gates"]]
        return {
            layer: Curve(tokens, [record["gates"][number][name] for record in steps])
            for number, layer in enumerate(layers)
        }

    label = "million tokens read"
    has_gates = bool(steps[0]["gates"])
    return {
        "loss_figure": loss_figure(Curve(tokens, loss), valid, label, "bits per byte"),
        "selection_figure": selection_figure(gates("rate"), gates("noise_free_rate"), budget, label)
        if has_gates
        else None,
        "alpha_figure": alpha_figure(gates("alpha_mean"), gates("alpha_std"), label) if has_gates else None,
        "position_figure": position_figure(
            [(row.start, row.stop) for row in findings.positions],
            [row.bits_per_byte for row in findings.positions],
            {"gzip −9": findings.total.gzip, "xz −9": findings.total.xz},
            recipe.data.context_length,
        ),
    }
