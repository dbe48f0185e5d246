"""Writing token by token, greedily, as `taipan generate` does."""

from functools import partial

from torch import Tensor

from taipan.benchmark.bandwidth import StreamingRead, bytes_per_token
from taipan.benchmark.models import build, dtype_of, random_tokens
from taipan.benchmark.peers import build_peers
from taipan.benchmark.results import Comparison, Measurement, Spread, speed_ratio, time_ratio
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.suites.prefill import PIECE
from taipan.benchmark.timing import Progress, Run, interleaved
from taipan.generation import GenerationSettings, prefill, stream
from taipan.model import TaipanLM
from taipan.state import DecoderState

FLOOR = "memory floor"
ALONE = "one row"
"""One row alone: several rows are compared with it, by tokens per second."""
INT8 = "weights int8"
"""The same model with weights in 8 bits: those in 4 bits are compared with it."""
_READ = ("streaming read", 0)


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Time of `new_tokens` after every length of context, which is really read; each repetition continues the last.

    The floor is the time to read weights and states once a token (and to write the states, at the same rate) at the
    bandwidth of a streaming read in the same repetition. Several rows are also compared with one row alone, and weights
    in 4 bits with those in 8.
    """
    dtype = dtype_of(settings)
    model = build(settings, dtype)
    peers = build_peers(settings.against, model.config, dtype)
    contexts, steps = sorted(set(settings.context)), settings.new_tokens
    first_B1 = random_tokens(model.config, settings.batch, 1, settings.seed)
    runs: dict[tuple[str, int], Run] = {}
    moved: dict[int, int] = {}
    reader = StreamingRead() if settings.floor else None
    if reader is not None:
        runs[_READ] = reader
    for context in contexts:
        ids_BT = random_tokens(model.config, settings.batch, context, settings.seed)
        state = prefill(model, ids_BT, chunk=PIECE).state
        moved[context] = bytes_per_token(model, state, settings.weights)
        runs[TAIPAN, context] = _Writing(model, first_B1, state, steps, settings.weights)
        if settings.batch > 1:
            alone = prefill(model, ids_BT[:1], chunk=PIECE).state
            runs[ALONE, context] = _Writing(model, first_B1[:1], alone, steps, settings.weights)
        if settings.weights == "int4":
            runs[INT8, context] = _Writing(model, first_B1, state, steps, "int8")
        for name, peer in peers.items():
            runs[name, context] = partial(peer.decode, first_B1, peer.prefill(ids_BT), steps)
    seconds = interleaved(runs, settings.repeats, progress)
    if reader is not None:
        for context in contexts:
            per_byte = steps * moved[context] / reader.nbytes
            seconds[FLOOR, context] = tuple(value * per_byte for value in seconds[_READ])
    found: list[Measurement] = []
    for (subject, context), values in seconds.items():
        if (subject, context) == _READ or subject in (ALONE, INT8):
            continue
        comparisons: list[Comparison] = []
        if subject == TAIPAN:
            if settings.batch > 1:
                by_tokens = tuple(settings.batch * value for value in seconds[ALONE, context])
                comparisons.append(speed_ratio(values, by_tokens, ALONE))
            others = [FLOOR] if reader is not None else []
            others += [INT8] if (INT8, context) in seconds else []
            others += list(peers)
            comparisons += [speed_ratio(values, seconds[other, context], other) for other in others]
        if subject != FLOOR and context > contexts[0]:
            comparisons.append(time_ratio(values, seconds[subject, contexts[0]], f"after {contexts[0]:,}"))
        details = {"MB per step": moved[context] / 1e6} if subject in (TAIPAN, FLOOR) else {}
        if subject == FLOOR and reader is not None:
            details["GB/s read"] = reader.nbytes / Spread.of(seconds[_READ]).median / 1e9
        work = f"{steps} tokens after {context:,}, batch {settings.batch}"
        if settings.weights != "auto":
            work += f", weights {settings.weights}"
        tokens = settings.batch * steps
        found.append(
            Measurement(
                suite="decode",
                work=work,
                subject=subject,
                unit="seconds",
                values=values,
                tokens=tokens,
                comparisons=tuple(comparisons),
                details=details,
            )
        )
    return found


class _Writing:
    """Read a token and choose the next, so many times a call; copying the state is part of the first call only."""

    def __init__(self, model: TaipanLM, first_B1: Tensor, state: DecoderState, steps: int, weights: str) -> None:
        settings = GenerationSettings(max_new_tokens=2**40, eos_token_id=(), do_sample=False, weights=weights)
        self._tokens = stream(model, first_B1, state=state, settings=settings)
        self._steps = steps

    def __call__(self) -> None:
        """Write the next tokens."""
        for _ in range(self._steps):
            next(self._tokens)
