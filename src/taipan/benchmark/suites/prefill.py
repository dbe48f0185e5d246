"""Reading a prompt, in pieces as `taipan generate` does."""

from functools import partial

import torch

from taipan.benchmark.linears import LinearFloor, linears, selected_tokens
from taipan.benchmark.models import build, dtype_of, random_tokens
from taipan.benchmark.peers import build_peers
from taipan.benchmark.results import Measurement
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import FLOOR, TAIPAN, measurements
from taipan.benchmark.timing import Progress, Run, interleaved
from taipan.generation import prefill
from taipan.model import TaipanLM

PIECE = 2048


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Time of every length; of the longer ones also the time per token over that of the shortest."""
    dtype = dtype_of(settings)
    model = build(settings, dtype)
    peers = build_peers(settings.against, model.config, dtype)
    runs: dict[tuple[str, int], Run] = {}
    for length in sorted(set(settings.tokens)):
        ids_BT = random_tokens(model.config, settings.batch, length, settings.seed)
        runs[TAIPAN, length] = partial(prefill, model, ids_BT, chunk=PIECE)
        if settings.floor:
            runs[FLOOR, length] = _floor(model, settings, length, dtype)
        for name, peer in peers.items():
            runs[name, length] = partial(peer.prefill, ids_BT)
    return measurements(
        "prefill",
        "prefill {} tokens",
        interleaved(runs, settings.repeats, progress),
        batch=settings.batch,
        peers=list(peers),
        over_shortest=True,
    )


def _floor(model: TaipanLM, settings: Settings, length: int, dtype: torch.dtype) -> Run:
    """The linear layers of every piece; every full piece selects as many tokens as the first."""
    full, rest = divmod(length, PIECE)
    floors: list[tuple[LinearFloor, int]] = []
    for piece, times in ((PIECE, full), (rest, 1)):
        if piece * times == 0:
            continue
        ids_BT = random_tokens(model.config, settings.batch, piece, settings.seed)
        with torch.inference_mode():
            selected = selected_tokens(model(ids_BT))
        layers = linears(model, dtype, rows=settings.batch * piece, head_rows=settings.batch, selected=selected)
        floors.append((LinearFloor(layers, backward=False), times))

    def run() -> None:
        for floor, times in floors:
            for _ in range(times):
                floor()

    return run
