"""What a training run looks like while it runs: a live panel on a terminal, plain lines in a pipe."""

import math
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from taipan.cli.console import console, duration, quantity
from taipan.training.watch.listener import RunInfo, StepInfo, TrainingListener
from taipan.training.watch.metrics import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_LINE_SECONDS = 10.0  # between two plain lines
_SMOOTHING = 0.9


class TrainingDisplay(TrainingListener):
    """Shows a run on standard error; a context manager, so that the terminal is left in order.

    Args:
        live: draw and redraw a panel; None: if standard error is a terminal.
    """

    def __init__(self, *, live: bool | None = None) -> None:
        self._console = console(err=True)
        self._is_live = self._console.is_terminal if live is None else live
        self._live: Live | None = None
        self._info: RunInfo | None = None
        self._step: StepInfo | None = None
        self._bytes_per_token = 1.0
        self._loss: Any = 0.0  # on the device, until it is shown
        self._weight = 0.0
        self._valid: float | None = None
        self._phase = ""
        self._printed = -math.inf

    def __enter__(self) -> "TrainingDisplay":
        if self._is_live:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self.panel)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    # ------------------------------------------------------------------ what the run tells

    def started(self, info: RunInfo) -> None:
        """Say what is trained on what."""
        from taipan.data.mixture import Mixture

        self._info = info
        self._bytes_per_token = Mixture.open(info.recipe.data.train, verify=False).bytes_per_token
        kinds = info.config.layer_types
        layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        self._print(
            f"Training {quantity(info.parameters)} parameters ({layers}) on {quantity(info.train_tokens)} tokens; "
            f"{info.dtype} ({info.dtype_reason})"
        )
        if info.processes > 1:
            self._print(f"On {info.processes} processes ({info.strategy}).")
        if info.step:
            self._print(f"Going on after step {info.step}.")

    def stepped(self, info: StepInfo) -> None:
        """Add a step."""
        self._step = info
        self._phase = ""
        self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * info.result.losses[1]
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        now = time.monotonic()
        if not self._is_live and (now - self._printed >= _LINE_SECONDS or info.progress >= 1.0):
            self._printed = now
            self._print(self._line(info))

    def recorded(self, record: Record) -> None:
        """Add an evaluation."""
        self._valid = record.get("valid_bits_per_byte", self._valid)
        if not self._is_live and "valid_bits_per_byte" in record:
            self._print(f"step {record['step']}: held out {record['valid_bits_per_byte']:.3f} bits/byte")

    def sampled(self, record: Record) -> None:
        """Show what the model wrote, above the panel."""
        self._print(f"step {record['step']} writes: {record['prompt']}{record['text']}")

    def phase(self, text: str) -> None:
        """Say what takes a while."""
        self._phase = text

    def saved(self, path: Path) -> None:
        """Say where something was saved."""
        self._phase = f"saved {path.name}"
        if not self._is_live:
            self._print(f"saved {path}")

    def warned(self, message: str) -> None:
        """Show a warning above the panel."""
        with suppress(OSError):
            self._console.print(f"Warning: {message}", style="yellow", markup=False)

    def note(self, message: str) -> None:
        """Print a line above the panel, and take the panel's content away: another part begins."""
        self._step = None
        self._phase = message
        if not self._is_live:
            self._print(message)
        else:
            self._print(f"[{time.strftime('%H:%M:%S')}] {message}")

    # ------------------------------------------------------------------ how it looks

    def _print(self, message: str) -> None:
        with suppress(OSError):  # the terminal was closed: the run has something to save
            self._console.print(message, markup=False)

    @property
    def _mean_loss(self) -> float:
        return float(self._loss) / max(self._weight, 1e-9)

    def _bits(self, nats: float) -> float:
        return nats / math.log(2) / self._bytes_per_token

    def _line(self, info: StepInfo) -> str:
        gates = "".join(
            f", layer {gate.layer} selects {gate.rate:.2f} "
            f"(noise-free {gate.noise_free_rate:.2f}, α {gate.alpha_mean:.2f})"
            for gate in info.result.gates
        )
        return (
            f"{100 * info.progress:3.0f} %  step {info.step}: loss {self._mean_loss:.3f} "
            f"({self._bits(self._mean_loss):.3f} bits/byte), {info.tokens_per_second:,.0f} tokens/s, "
            f"{duration(info.seconds_left)} left{gates}"
        )

    def panel(self) -> "RenderableType":
        """What is redrawn on a terminal: where the run stands, the loss, and what every gate does."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        info, run = self._step, self._info
        if info is None or run is None:
            return Text("")
        top = Table.grid(expand=True, padding=(0, 2))
        cells = [
            f"step {info.step}",
            f"{quantity(info.tokens)} tokens",
            f"{info.tokens_per_second:,.0f} tokens/s",
            self._phase or f"{duration(info.seconds_left)} left",
        ]
        top.add_row(*(Text(cell, style="bold") for cell in cells))
        bar = Table.grid(expand=True)  # a bare bar would not end its line
        bar.add_row(ProgressBar(total=1.0, completed=info.progress))
        loss = f"loss {self._mean_loss:.3f} nats/token, {self._bits(self._mean_loss):.3f} bits/byte"
        held_out = "" if self._valid is None else f"; held out {self._valid:.3f} bits/byte"
        parts: list[RenderableType] = [top, bar, Text(loss + held_out, style="bold")]
        if info.result.gates:
            gates = Table(box=None, padding=(0, 2), header_style="dim")
            for name in ("layer", "budget", "selected", "", "noise-free", "α"):
                gates.add_column(name, justify="left" if name == "" else "right")
            budget = run.config.capacity_at(info.progress)
            for gate in info.result.gates:
                gates.add_row(
                    str(gate.layer),
                    f"{100 * budget:.0f} %",
                    f"{100 * gate.rate:.1f} %",
                    ProgressBar(total=1.0, completed=gate.rate, width=20),
                    f"{100 * gate.noise_free_rate:.1f} %",
                    f"{gate.alpha_mean:.2f} ± {gate.alpha_std:.2f}",
                )
            parts.append(gates)
        return Panel(Group(*parts), title=Text(str(run.run)), border_style="dim", width=min(self._console.width, 92))
