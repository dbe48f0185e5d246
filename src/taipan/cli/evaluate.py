"""`taipan evaluate`: how well a model predicts text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from taipan.evaluation import EvaluationResult
    from taipan.text import TextModel


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("evaluate", rich_help_panel=panel)
    def evaluate(
        model: Annotated[Path, typer.Argument(help="Model directory, for example quickstart/model.")],
        data: Annotated[
            list[str] | None, typer.Argument(help="Prepared data set, or text files and directories.")
        ] = None,
        context: Annotated[
            list[int] | None,
            typer.Option(help="Longest context in tokens; repeatable. [default: whole documents]"),
        ] = None,
        piece: Annotated[
            int | None,
            typer.Option(help="Tokens of a document read at once: speed and memory only.", show_default="2048"),
        ] = None,
        batch_tokens: Annotated[
            int | None, typer.Option(help="Tokens of all documents read at once.", show_default="4096")
        ] = None,
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: as stored]")] = None,
        tasks: Annotated[
            list[str] | None,
            typer.Option(
                help="Instead of texts: tasks of lm-eval, or NAME=FILE, with commas between them; repeatable."
            ),
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option(min=1, help="Questions of a task read side by side.", show_default="8")
        ] = None,
        num_fewshot: Annotated[
            int | None, typer.Option(min=0, help="Examples before each question. [default: as the task says]")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. [default: all]")] = None,
        include: Annotated[
            Path | None, typer.Option(file_okay=False, help="Directory with more tasks of lm-eval (YAML).")
        ] = None,
        json_file: Annotated[
            Path | None, typer.Option("--json", dir_okay=False, help="Write all results to this file.")
        ] = None,
    ) -> None:
        """Measure bits per byte, by position in the context, and what the gates select.

        Every document starts from an empty context, and every byte counts. Memory does not depend on the length
        of a document. With --tasks the questions of lm-eval are asked instead (docs/huggingface.md).

        Example:

            taipan evaluate quickstart/model quickstart/data/valid --context 512 --context 4096 --json result.json
        """
        from taipan.cli.console import note
        from taipan.cli.datasets import open_data
        from taipan.cli.progress import progress_bar
        from taipan.errors import InputError
        from taipan.evaluation import evaluate as run
        from taipan.hardware import tune_allocator
        from taipan.io import require_writable
        from taipan.text import load

        tune_allocator()
        asked = ",".join(tasks or [])
        if (not tasks) == (not data):
            raise InputError(
                "Name texts to measure (a prepared data set, files), or tasks to ask (--tasks): one of the two."
            )
        of_texts = {"--batch-tokens": batch_tokens, "--context": context, "--piece": piece}
        of_tasks = {"--batch-size": batch_size, "--include": include, "--limit": limit, "--num-fewshot": num_fewshot}
        idle, kind = (of_tasks, "--tasks") if data else (of_texts, "texts")
        ignored = [option for option, value in idle.items() if value is not None]
        if ignored:
            raise InputError(f"{', '.join(ignored)} are of {kind}, and nothing else: leave out what is not measured.")
        if json_file is not None:
            require_writable(json_file)
        if not data:
            found = _ask(load(model, dtype=dtype), asked, batch_size or 8, num_fewshot, limit, include)
            if json_file is not None:  # first: who reads the tables may stop (`| head`)
                _write(json_file, model, [asked], [found])
                note(f"Results: {json_file}")
            _print_tasks(found)
            return
        loaded = load(model, dtype=dtype)
        results: list[EvaluationResult] = []
        with open_data(data, loaded.tokenizer) as dataset:
            for length in context or [None]:
                with progress_bar("whole documents" if length is None else f"context {length}", "tokens") as report:
                    results.append(
                        run(
                            loaded.model,
                            dataset,
                            context=length,
                            piece=2048 if piece is None else piece,
                            batch_tokens=4096 if batch_tokens is None else batch_tokens,
                            progress=report,
                        )
                    )
        if json_file is not None:  # first: who reads the tables may stop (`| head`)
            _write(json_file, model, data, [result.to_dict() for result in results])
            note(f"Results: {json_file}")
        _print(results)


def _print(results: "list[EvaluationResult]") -> None:
    from taipan.cli.console import print_table

    rows = [
        [
            "whole documents" if result.context is None else f"{result.context:,}",
            f"{result.documents:,}",
            f"{result.tokens:,}",
            f"{result.bytes:,}",
            f"{result.bits_per_byte:.4f}",
            f"{result.nats_per_token:.4f}",
            f"{result.perplexity:,.2f}",
            f"{result.tokens / result.seconds:,.0f}",
        ]
        for result in results
    ]
    columns = ["context", "documents", "tokens", "bytes", "bits/byte", "nats/token", "perplexity", "tokens/s"]
    print_table("", columns, rows)
    last = results[-1]
    positions = [
        [f"{bucket.start:,} – {bucket.stop - 1:,}", f"{bucket.tokens:,}", f"{bucket.bits_per_byte:.4f}"]
        for bucket in last.by_position
    ]
    print_table("By tokens read before", ["position", "tokens", "bits/byte"], positions)
    gates = [
        [
            str(gate.layer),
            f"{100 * gate.rate:.2f} %",
            f"{100 * gate.training_rate:.2f} %",
            f"{100 * gate.noise_free_rate:.2f} %",
            f"{gate.alpha_mean:.3f} ± {gate.alpha_std:.3f}",
            f"{gate.threshold:.3f}",
        ]
        for gate in last.gates
    ]
    if gates:
        print_table("Gates", ["layer", "selected", "training rate", "inference rate", "α", "threshold"], gates)


def _ask(
    text: "TextModel", tasks: str, batch_size: int, num_fewshot: int | None, limit: int | None, include: Path | None
) -> dict[str, Any]:
    """Run tasks of lm-eval."""
    from importlib.util import find_spec

    from taipan.errors import ConfigError, how_to_install

    if find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-eval, which is not installed: {how_to_install('evaluate')}.")
    from taipan.evaluation.harness import evaluate_tasks

    return evaluate_tasks(
        text,
        [task.strip() for task in tasks.split(",") if task.strip()],
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        include=include,
    )


def _print_tasks(found: dict[str, Any]) -> None:
    from taipan.cli.console import note, print_table

    rows = [
        [
            task,
            name,
            f"{value:.4f}",
            " – ".join(f"{bound:.4f}" for bound in found["intervals"].get(task, {}).get(metric, ())),
            f"{found['chance'][task]:.4f}" if task in found["chance"] and name != "mc2" else "",
            f"{found['n-samples'][task]['effective']:,}" if task in found["n-samples"] else "",
        ]
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float)
        for name in [metric.partition(",")[0]]
    ]
    print_table("", ["task", "metric", "value", "95 %", "a guess", "questions"], rows, text_columns=2)
    tokens = found["tokens"]
    note(f"{tokens['read']:,} of {tokens['asked']:,} tokens were read; what questions share, once.")


def _write(path: Path, model: Path, data: list[str], results: list[dict[str, Any]]) -> None:
    import json
    import shlex
    import sys
    from dataclasses import asdict

    from taipan import __version__, hardware
    from taipan.io import atomic_write

    record = {
        "command": shlex.join(["taipan", *sys.argv[1:]]),
        "taipan": __version__,
        "hardware": asdict(hardware.describe()),
        "model": str(model),
        "data": data,
        "results": results,
    }
    atomic_write(path, (json.dumps(record, indent=2) + "\n").encode())
