"""The scale of the paper: recipes for a cluster, and what to run with them. Nothing is trained here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taipan.config import SETTINGS
from taipan.io import atomic_write
from taipan.training.recipe import Recipe

SIZES = ("190m", "450m", "1.3b")
ARCHITECTURES = ("transformer", "mamba2", "jamba", "taipan")
_COSMOPEDIA = "data/cosmopedia-v2"
_MIXTURE = {
    "data/fineweb-edu-dedup": 0.60,
    _COSMOPEDIA: 0.15,
    "data/openwebmath": 0.08,
    "data/starcoderdata-python-edu": 0.06,
    "data/wikipedia": 0.06,
    "data/metamathqa": 0.02,
    "data/numinamath-cot": 0.02,
    "data/orca-math": 0.01,
}
"""The paper names these corpora, not their shares."""
_ROWS = {"190m": 8, "450m": 8, "1.3b": 4}  # of a forward; 128 of a step


def recipe(architecture: str, size: str, output: str, setting: str = "recommended", **overrides: Any) -> Recipe:
    """The paper's recipe (§4.1, appendix A) for a model of one of its sizes; `recipes/paper/` holds the same.

    Args:
        architecture: one of `ARCHITECTURES`.
        size: one of `SIZES`.
        output: the run directory.
        setting: of the gate.
        overrides: fields of the model, over preset and setting; `learning_rate` is that of the optimizer.
    """
    rate = overrides.pop("learning_rate", 5e-4)
    rows = _ROWS[size]
    return Recipe.from_dict(
        {
            "model": {"preset": f"{architecture}-{size}", "setting": setting, **overrides},
            "data": {"train": _COSMOPEDIA if size == "190m" else _MIXTURE, "context_length": 4096},
            "optimizer": {
                "name": "adamw",
                "learning_rate": rate,
                "weight_decay": 0.01,
                "betas": [0.9, 0.95],
                "clip": 1.0,
            },
            "schedule": {"kind": "cosine", "warmup": 2000, "final": 0.02},
            "training": {
                "tokens": 27_000_000_000 if size == "190m" else 100_000_000_000,
                "batch_size": rows,
                "accumulation": 128 // rows,
                "recompute": True,
                "log_every": 10,
                "evaluate_every": 1000,
                "evaluate_batches": 64,
                "sample_every": 1000,
                "checkpoint_every": 500,
            },
            "output": output,
        }
    )


_READ = (
    "taipan evaluate RUN/model data/books --context 1024 --context 4096 --context 65536 --context 1048576 "
    "--json RUN/books.json"
)
_ASK = (
    "taipan evaluate RUN/model --json RUN/tasks.json --tasks "
    "winogrande,piqa,hellaswag,arc_easy,arc_challenge,openbookqa,truthfulqa_mc2,race,boolq"
)
_RECALL = "taipan evaluate RUN/model --json RUN/recall.json --tasks swde,fda,squad_completion"
_TIME = "taipan bench decode --model RUN/model --context 1024,32768 --dtype bfloat16"

_AFTER: dict[str, tuple[str, ...]] = {
    "perplexity-by-context": (_READ,),
    "latency-by-length": (_TIME,),
    "copying": (_READ,),
    "recall": (_RECALL,),
    "zero-shot": (_ASK,),
    "gate": ("taipan inspect RUN/model book.txt",),
    "capacity": (_RECALL, _ASK),
}
"""What is run with a trained model, beside its held-out loss."""


def recipes(experiment: str) -> Iterator[Recipe]:
    """The recipes of an experiment; their names are those of their outputs."""
    variants = _VARIANTS.get(experiment)
    if variants is None:
        for size in SIZES:
            for architecture in ("taipan",) if experiment == "gate" else ARCHITECTURES:
                yield recipe(architecture, size, f"runs/{architecture}-{size}")
        return
    size = "1.3b" if experiment == "capacity" else "190m"
    for name, overrides in variants.items():
        values = dict(overrides)
        architecture = values.pop("architecture", "taipan")
        yield recipe(architecture, size, f"runs/{experiment}-{name}", values.pop("setting", "recommended"), **values)


def _stack(every: int) -> list[str]:
    """Twelve Mamba-2 layers, and a SAL after every so many."""
    return (["mamba2"] * every + ["selective_attention"]) * (12 // every)


_GUMBEL = {"setting": "gumbel", "refinement": "add"}
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gate-settings": {name: {"setting": name} for name in SETTINGS}
    | {"add": _GUMBEL, "open": {**_GUMBEL, "attention_capacity": 1.0}},
    "learning-rates": {
        f"{architecture}-{rate:g}": {"architecture": architecture, "learning_rate": rate}
        for architecture in ARCHITECTURES
        for rate in (2.5e-4, 5e-4, 1e-3)
    },
    "capacity": {
        f"{budget:.2f}": {"attention_capacity": budget} for budget in (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 1.0)
    },
    "positions": {"without": {}, "rope": {"selective_rope": True}},
    "window": {f"{window}": {"sliding_window": window} for window in (512, 1024, 2048)},
    "scope": {
        "all-positions": {"lookahead": 0},
        "selected-positions": {"lookahead": 0, "key_value_scope": "selected"},
        "selected-selected": {
            "lookahead": 0,
            "key_value_scope": "selected",
            "window_unit": "selected",
        },
    },
    "ratio": {f"{every}-to-1": {"layer_types": _stack(every)} for every in (3, 6, 12)},
    "gap": {
        "paper": {"setting": "paper"},
        "annealed-noisy": {**_GUMBEL, "gumbel_noise_end": 1.0},
        "annealed": _GUMBEL,
        "threshold": {"capacity_window": 0},
        "bounded": {},
    },
    "failures": {
        "no-penalty": {**_GUMBEL, "budget_weight": 0.0},
        "starts-closed": {**_GUMBEL, "gate_bias_init": -8.0, "budget_start": None},
        "cold": {**_GUMBEL, "gumbel_temperature": 0.01, "gumbel_temperature_end": 0.01},
        "hot": {**_GUMBEL, "gumbel_temperature": 100.0, "gumbel_temperature_end": 100.0},
    },
}


def write(experiment: str, claim: str, directory: Path) -> list[Path]:
    """Write the recipes of an experiment and RUN.md, which says what to run; returns the paths, RUN.md the last.

    Args:
        experiment: its id.
        claim: what it shows.
        directory: where to; recipes of earlier calls are replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    lines = [f"# {claim}: the scale of the paper", ""]
    lines += ["Nothing was run here. Prepare the corpora with the Llama-3 tokenizer, each as `data/NAME`:", ""]
    lines += ["```bash", "taipan data prepare CORPUS --tokenizer LLAMA3/tokenizer.json --out data/NAME", "```", ""]
    lines += [
        "Train every model, on one machine with eight GPUs or with Slurm on several (docs/cluster.md):",
        "",
        "```bash",
    ]
    outputs: list[str] = []
    for own in recipes(experiment):
        path = directory / f"{Path(own.output).name}.yaml"
        atomic_write(path, own.to_yaml().encode())
        paths.append(path)
        outputs.append(own.output)
        lines.append(f"torchrun --nproc-per-node 8 -m taipan train {path} --auto-resume")
    lines += ["```", "", "Then, of every run:", "", "```bash"]
    commands = _AFTER.get(experiment, (_READ,))
    lines += [command.replace("RUN", output) for output in outputs for command in commands]
    lines += ["```"]
    if experiment == "capacity":
        lines += ["", "Tokens chosen by chance and every k-th one are gates of the laboratory alone (`--scale small`)."]
    run = directory / "RUN.md"
    atomic_write(run, ("\n".join(lines) + "\n").encode())
    return [*paths, run]
