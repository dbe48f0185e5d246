"""The page that shows a quickstart."""

import json
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from taipan import __version__, hardware
from taipan.accounting import flops_per_token, parameter_count, state_bytes
from taipan.config import TaipanConfig
from taipan.data.mixture import Mixture
from taipan.experiments.phases import Phase
from taipan.experiments.quickstart_findings import SAMPLE_PROMPT, SAMPLE_SETTINGS, Findings
from taipan.io import atomic_write, shareable
from taipan.report.curves import Curve, alpha_figure, loss_figure, position_figure, selection_figure
from taipan.report.page import render
from taipan.report.selection import margins
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
        "position_files": None if findings.position_files is None else asdict(findings.position_files),
        "gates": [asdict(row) for row in findings.gates],
        "sample": {"prompt": SAMPLE_PROMPT, "text": findings.sample},
    }
    atomic_write(directory / _RESULTS, (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())
    shown_directory = Path(shareable(directory))
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
        margin_figure=None if findings.view is None else margins(findings.view.layers),
        view_source=findings.shown,
        context_length=recipe.data.context_length,
        sample_prompt=SAMPLE_PROMPT,
        sample_text=findings.sample,
        sample_tokens=SAMPLE_SETTINGS.max_new_tokens,
        run_in="" if shown_directory == directory else shown_directory.name,
        next_commands=next_commands(shown_directory),
        made_with=_made_with(shown_directory, findings, recipe),
        phases=[*phases, Phase("total", sum(phase.seconds for phase in phases))],
        facts=facts,
        recipe=_shareable_recipe(recipe).to_yaml(),
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
        f"taipan generate {_quoted(directory / 'model')} {shlex.quote(SAMPLE_PROMPT)} "
        f"--max-new-tokens {settings.max_new_tokens} --temperature {settings.temperature} --top-p {settings.top_p} "
        f"--seed {settings.seed} --ignore-eos"
    )


def _made_with(directory: Path, findings: Findings, recipe: Recipe) -> list[str]:
    model = _quoted(directory / "model")
    seconds = "" if recipe.training.seconds is None else f" --seconds {recipe.training.seconds:g}"
    library = """$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"""
    return [
        f"taipan quickstart{seconds} --out {_quoted(directory)}",
        f"taipan evaluate {model} {_quoted(directory / 'data' / 'valid')}",
        f'taipan inspect {model} "{library}"/{shlex.quote(findings.shown)} -o page.html',
        _sample_command(directory),
    ]


def _shareable_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the paths of this machine."""
    train, valid, start = recipe.data.train, recipe.data.valid, recipe.model.start
    sources = shareable(train) if isinstance(train, str) else {shareable(path): part for path, part in train.items()}
    return replace(
        recipe,
        model=replace(recipe.model, start=None if start is None else shareable(start)),
        data=replace(recipe.data, train=sources, valid=None if valid is None else shareable(valid)),
        output=shareable(recipe.output),
    )


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


def headline(model: float, xz: float, seconds: float, machine: str) -> str:
    """What came out, in the words of a newcomer.

    Args:
        model, xz: bits per byte of the same texts.
        seconds: of training.
        machine: what it was trained on.
    """
    percent = round(100 * abs(1 - model / xz))
    size = "As small as" if percent == 0 else f"{percent} % {'smaller' if model < xz else 'larger'} than"
    count, unit = (round(seconds / 60), "minute") if seconds >= 59.5 else (round(seconds), "second")
    return f"{size} xz, after {count} {unit}{'s' * (count != 1)} on {machine}"


def _headline(findings: Findings, config: TaipanConfig, records: Sequence[Record]) -> dict[str, Any]:
    """Title and tiles."""
    total = findings.total
    last = records[-1]
    machine = hardware.describe()
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
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
        "headline": headline(total.model, total.xz, last["seconds"], machine.cuda or cores),
        "model_bits": total.model,
        "gzip_bits": total.gzip,
        "xz_bits": total.xz,
        "parameters": f"{parameter_count(config) / 1e6:.1f} million",
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
    # a line's loss is the mean of the steps since the line before: it belongs in their middle
    middles = [(before + after) / 2 for before, after in zip([0.0, *tokens], tokens, strict=False)]
    loss = [record["cross_entropy"] / math.log(2) / bytes_per_token for record in steps]
    evaluated = [record for record in records if "valid_bits_per_byte" in record]
    valid = Curve(
        [record["tokens"] / 1e6 for record in evaluated], [record["valid_bits_per_byte"] for record in evaluated]
    )
    label = "million tokens read"
    positions, compared = findings.positions, findings.position_files
    position = None
    if compared is not None:
        references = {"gzip −9": compared.gzip, "xz −9": compared.xz}
        position = position_figure(positions, references, recipe.data.context_length)
    return {
        "loss_figure": loss_figure(Curve(middles, loss), valid, label, "bits per byte"),
        **_gate_figures(steps, tokens, config, label),
        "position_figure": position,
        "position_files": 0 if compared is None else compared.files,
        "position_tokens": positions[-1].stop if positions else 0,
    }


def _gate_figures(
    steps: Sequence[Record], tokens: Sequence[float], config: TaipanConfig, label: str
) -> dict[str, Markup | None]:
    """What the gates did over training; None for a model without gates."""
    if not steps[0]["gates"]:
        return {"selection_figure": None, "alpha_figure": None}
    budget = Curve(tokens, [config.capacity_at(min(1.0, record["progress"])) for record in steps])
    layers = {gate["layer"]: number for number, gate in enumerate(steps[0]["gates"])}

    def over_training(name: str) -> dict[int, Curve]:
        return {
            layer: Curve(tokens, [record["gates"][number][name] for record in steps])
            for layer, number in layers.items()
        }

    return {
        "selection_figure": selection_figure(
            over_training("training_rate"), over_training("noise_free_rate"), budget, label
        ),
        "alpha_figure": alpha_figure(
            {layer: selected_alpha(tokens, steps, number) for layer, number in layers.items()}, label
        ),
    }


def selected_alpha(tokens: Sequence[float], steps: Sequence[Record], number: int) -> Curve:
    """Mean α of the tokens that a gate selected, at the steps where it selected any.

    Args:
        tokens: read so far at every step, in millions.
        steps: lines of metrics.jsonl.
        number: which of the gates.
    """
    gates = [(x, record["gates"][number]) for x, record in zip(tokens, steps, strict=True)]
    chosen = [(x, gate["weight_mean"] / gate["rate"]) for x, gate in gates if gate["rate"] > 0]
    return Curve([x for x, _ in chosen], [alpha for _, alpha in chosen])
