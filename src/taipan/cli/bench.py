"""`taipan bench`: how fast a model is on this machine, compared with floors and other libraries."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from taipan.benchmark import Comparison, Measurement, Session


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("bench", rich_help_panel=panel)
    def bench(
        suites: Annotated[
            list[str] | None,
            typer.Argument(
                help="prefill, train, decode, memory, ops [default: all of these]; start, generate, evaluate, mixed; "
                "serve, or one of serve-streams, serve-prefix, serve-gap, serve-session."
            ),
        ] = None,
        model: Annotated[
            str, typer.Option(help="Preset, quickstart, mamba2-6m, -30m, -115m, taipan-30m, or a model directory.")
        ] = "quickstart",
        tokens: Annotated[
            list[int] | None, typer.Option(help="Tokens to prefill and to train on; repeatable. [default: 2048]")
        ] = None,
        batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what training takes here.")] = "auto",
        threads: Annotated[int | None, typer.Option(help="Threads of PyTorch. [default: its choice]")] = None,
        implementation: Annotated[
            str, typer.Option(help="Implementation of the ops: auto, cuda, native, portable or reference.")
        ] = "auto",
        repeats: Annotated[int, typer.Option(help="Repetitions after a warm-up.")] = 5,
        against: Annotated[
            str | None,
            typer.Option(
                help="Also measure transformers, transformers-mamba2 or transformers-llama, in the same run; train: or "
                "pytorch, a plain GPT through torch.compile (whole steps)."
            ),
        ] = None,
        floor: Annotated[
            bool, typer.Option("--floor", help="Also run the linear layers alone (decode: only read the memory).")
        ] = False,
        loop: Annotated[
            bool, typer.Option("--loop", help="train: also the whole loop, from the data to a line of metrics.")
        ] = False,
        context: Annotated[
            list[int] | None, typer.Option(help="Tokens read before decoding; repeatable. [default: 1024]")
        ] = None,
        new_tokens: Annotated[int, typer.Option(help="Tokens decoded in a repetition.")] = 32,
        weights: Annotated[
            str, typer.Option(help="Weights that decoding reads: auto (as stored), bfloat16, int8 or int4.")
        ] = "auto",
        directory: Annotated[
            Path | None,
            typer.Option(file_okay=False, help="serve-session: keep the session here. [default: nowhere]"),
        ] = None,
        json_file: Annotated[
            Path | None, typer.Option("--json", dir_okay=False, help="Write everything to this file.")
        ] = None,
    ) -> None:
        """Measure speed and memory, with medians, spreads and what they are compared with.

        Whatever is compared runs interleaved in one process, and every ratio is the median of the ratios of the
        repetitions. Weights of named models are random.

        Examples:

            taipan bench

            taipan bench prefill train --model mamba2-115m --floor --against transformers --json bench.json

            taipan bench train --loop --floor --model quickstart --tokens 512 --batch 4

            taipan bench decode --model taipan-tiny --context 1024 --context 1000000 --floor
        """
        from taipan.benchmark import Settings, run
        from taipan.cli.console import note
        from taipan.cli.progress import progress_bar
        from taipan.hardware import tune_allocator
        from taipan.io import require_writable

        if json_file is not None:
            require_writable(json_file)
        settings = Settings(
            model=model,
            tokens=tuple(tokens or (2048,)),
            batch=batch,
            dtype=dtype,
            threads=threads,
            implementation=implementation,
            repeats=repeats,
            against=against,
            floor=floor,
            loop=loop,
            context=tuple(context or (1024,)),
            new_tokens=new_tokens,
            weights=weights,
            directory=None if directory is None else str(directory),
        )
        tune_allocator()
        with progress_bar("measuring", "tokens" if suites == ["serve-session"] else "runs") as bar:
            report = run(suites or [], settings, lambda suite, done, total: bar(done, total))
        if json_file is not None:  # first: who reads the tables may stop (`| head`)
            _write(json_file, report)
            note(f"Results: {json_file}")
        _print(report)


def _print(report: "Session") -> None:
    from taipan.accounting import parameter_count
    from taipan.cli.console import console, print_table, quantity

    machine, settings = report.machine, report.settings
    used = ", ".join(f"{op} {name}" for op, name in report.implementations.items())
    facts = [
        ("model", f"{settings.model}, {quantity(parameter_count(report.config))} parameters, {report.dtype}"),
        ("machine", f"{machine.cpu}, {machine.cores} cores ({', '.join(machine.simd)}), {report.threads} threads"),
        ("load before, after", f"{report.load[0]:.2f}, {report.load[1]:.2f}"),
        ("implementations", used),
        ("median of", f"{settings.repeats} repetitions, interleaved (in brackets the quartiles)"),
    ]
    print_table("", ["", ""], facts, text_columns=2)
    columns = ["work", "who", "median", "quartiles", "tokens/s", "compared", "more"]
    for suite in dict.fromkeys(measurement.suite for measurement in report.measurements):
        rows = [list(_row(measurement)) for measurement in report.measurements if measurement.suite == suite]
        print_table(suite, columns, rows, text_columns=2)
    console().print("")


def _row(measurement: "Measurement") -> Iterator[str]:
    spread = measurement.spread
    yield measurement.work
    yield measurement.subject
    yield _value(measurement.unit, spread.median)
    several = len(measurement.values) > 1
    yield f"{_value(measurement.unit, spread.lower)} – {_value(measurement.unit, spread.upper)}" if several else ""
    rate = measurement.tokens_per_second
    yield "" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
    yield "\n".join(map(_compared, measurement.comparisons))
    # sizes of the work are for the file
    telling = ("/", "per", "memory above")
    rates = {unit: number for unit, number in measurement.details.items() if any(word in unit for word in telling)}
    yield ", ".join(f"{number:.3g} {unit}" for unit, number in rates.items())


def _compared(comparison: "Comparison") -> str:
    from taipan.benchmark import Spread

    spread = Spread.of(comparison.ratios)
    range_ = f" ({spread.lower:.2f} – {spread.upper:.2f})" if len(comparison.ratios) > 1 else ""
    return f"{comparison.quantity} {spread.median:.2f} × {comparison.other}{range_}"


def _value(unit: str, value: float) -> str:
    from taipan.cli.console import size

    if unit == "bytes":
        return size(round(value))
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.4g} ms"


def _write(path: Path, report: "Session") -> None:
    import json
    import shlex
    import sys

    from taipan.io import atomic_write

    record = report.to_dict(shlex.join(["taipan", *sys.argv[1:]]))
    atomic_write(path, (json.dumps(record, indent=2) + "\n").encode())
