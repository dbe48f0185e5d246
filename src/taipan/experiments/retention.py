"""Keys stated at the beginning of a text and asked for up to a million tokens later: what a window has kept of them.

One small model is trained on short rows, in which nothing has to leave its window. Its weights are then read in two
ways: the oldest entry leaves the window of the SAL, or the weakest does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from taipan.config import TaipanConfig, WindowEviction
from taipan.data.hidden_keys import KINDS, VOCABULARY, Filler, Key, draw_keys, statements, training_row
from taipan.experiments.execution import Result, Run, settings_of
from taipan.experiments.gate_settings import WINNER
from taipan.experiments.laboratory import Laboratory, Outcome, Table, spread

if TYPE_CHECKING:
    from taipan.model import TaipanLM
    from taipan.state import DecoderState

EVICTIONS: tuple[WindowEviction, ...] = ("oldest", "weakest")
_QUOTES = 10  # of a thousand tokens of filler begin a quote: in training, and in the texts that have any
_PIECE = 4096  # tokens read at once


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the experiment is run.

    Attributes:
        hidden: width of the model.
        steps: of training, of `rows` rows of `context` tokens.
        rows: of a batch.
        context: tokens of a row, and slots of the window.
        keys: stated in a row of training, at most, and of each kind in a text that is read.
        texts: of each way to state.
        lengths: tokens between statements and questions.
    """

    hidden: int
    steps: int
    rows: int
    context: int
    keys: int
    texts: int
    lengths: tuple[int, ...]


SCALES: dict[str, Scale] = {
    "small": Scale(
        hidden=64,
        steps=1500,
        rows=32,
        context=128,
        keys=8,
        texts=2,
        lengths=(1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20),
    ),
    "tiny": Scale(hidden=32, steps=4, rows=4, context=64, keys=2, texts=1, lengths=(64, 256)),
}


@dataclass(frozen=True)
class Way:
    """How the keys of a text are stated, and among what.

    Attributes:
        times: in succession.
        quotes: whether the filler has quotes, which compete for the window.
    """

    times: int
    quotes: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"stated {('once', 'twice')[self.times - 1]}{', quotes in the filler' if self.quotes else ''}"


WAYS = (Way(times=2, quotes=False), Way(times=2, quotes=True), Way(times=1, quotes=False))


def config_of(scale: Scale) -> TaipanConfig:
    """The model: the recommended setting, but for a gate that sees the stream alone.

    What a token repeats of the last W tokens says nothing of keys that were stated a million tokens ago.
    """
    hidden = scale.hidden
    base: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": hidden, "mamba_head_dim": hidden // 2}
    base |= {"intermediate_size": 2 * hidden, "state_size": 16, "num_attention_heads": 2}
    base |= {"layer_types": ["mamba2", "mamba2", "selective_attention", "mamba2"], "sliding_window": scale.context}
    gate = {**WINNER, "gate_input": "normed", "capacity_window": scale.context, "budget_anneal": (0.4, 0.7)}
    return TaipanConfig.from_dict({**base, **gate})


def declare(scale: Scale, seed: int) -> Run:
    """One run of the experiment: training and all readings."""
    settings: dict[str, Any] = {"config": settings_of(config_of(scale)), "seed": seed, "steps": scale.steps}
    settings |= {"rows": scale.rows, "context": scale.context, "keys": scale.keys, "texts": scale.texts}
    return Run(name="retention", settings={**settings, "lengths": list(scale.lengths)})


def work(scale: Scale, directory: Path, dtype: str, run: Run) -> Result:
    """Train the model and read the texts both ways; a module-level function for worker processes."""
    import torch

    from taipan.experiments.course import UNFINISHED, from_scratch, seen
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.step.batch import Batch

    seed = int(run.settings["seed"])

    def batch(step: int) -> Batch:
        rows = [training_row(scale.context, scale.keys, _QUOTES, seed, step, row) for row in range(scale.rows)]
        return {"tokens": torch.tensor(rows)}

    model, course = from_scratch(
        run,
        batch,
        OptimizerSection(name="muon", learning_rate=0.01, muon_learning_rate=0.01, weight_decay=0.01),
        ScheduleSection(kind="linear", warmup=0.02, final=0.02),
        init="retention-init",
        dtype=dtype,
        directory=directory / UNFINISHED,
    )
    trained = seen(model, course)
    model.save_pretrained(directory / "models" / run.identity)
    model.eval()
    answers = [
        {"eviction": eviction, **answer} for eviction in EVICTIONS for answer in read(model, eviction, scale, seed)
    ]
    return {"run": run.name, **run.settings, "dtype": dtype, **trained, "answers": answers}


@dataclass(frozen=True)
class Text:
    """A text that is read: keys at its beginning, then filler."""

    way: Way
    keys: tuple[Key, ...]
    filler: Filler

    @property
    def start(self) -> list[int]:
        """Its statements."""
        return statements(self.keys, self.way.times)

    def carrier(self, key: Key) -> int:
        """The place of the token whose entry has all of a key's answer, where it was last stated.

        The entry is found by the key of the token two before, the name, and holds that token and all since.
        """
        before = sum(len(own.statement) for own in self.keys[: self.keys.index(key)]) * self.way.times
        return before + (self.way.times - 1) * len(key.statement) + 3


def texts_of(scale: Scale, seed: int) -> list[Text]:
    """The texts of a seed; those of every way have the same keys and the same filler, but for its quotes."""
    from taipan.seeding import seeded_generator

    texts: list[Text] = []
    for way in WAYS:
        for number in range(scale.texts):
            generator = seeded_generator(seed, "retention", number)
            drawn = draw_keys(2 * scale.keys, generator)
            keys = [Key.of(KINDS[at % 2], key.name, generator) for at, key in enumerate(drawn)]
            filler = Filler(seed + number, _QUOTES if way.quotes else 0)
            texts.append(Text(way=way, keys=tuple(keys), filler=filler))
    return texts


def read(model: "TaipanLM", eviction: WindowEviction, scale: Scale, seed: int) -> Iterator[dict[str, Any]]:
    """Read the texts of a seed and ask for every key at every length.

    Yields:
        `way`, `kind`, `length`; of the keys: `found`, the share whose answer the model gives; `kept`, the share whose
        answer is in the window; `asked`, the share at whose question the gate is open.
    """
    import torch

    from taipan.model import TaipanLM

    reader = TaipanLM(model.config.replace(window_eviction=eviction)).eval()
    reader.load_state_dict(model.state_dict())
    texts = texts_of(scale, seed)
    with torch.inference_mode():
        states = [reader(torch.tensor([text.start])).state for text in texts]
        known = 0
        for length in scale.lengths:
            while known < length:
                piece = min(_PIECE, length - known)
                for at, text in enumerate(texts):
                    states[at] = reader(
                        torch.tensor([text.filler.take(piece)]), state=states[at], logits_to_keep=1
                    ).state
                known += piece
            for way in WAYS:
                own = [(text, state) for text, state in zip(texts, states, strict=True) if text.way == way]
                for kind in KINDS:
                    asked = [ask(reader, text, state, kind) for text, state in own]
                    means = {name: mean(answer[name] for answer in asked) for name in asked[0]}
                    yield {"way": way.name, "kind": kind, "length": length, **means}


def ask(model: "TaipanLM", text: Text, state: "DecoderState", kind: str) -> dict[str, float]:
    """What a model answers after a text, of which nothing is changed; see `read`."""
    import torch

    keys = [key for key in text.keys if key.kind == kind]
    tokens = torch.tensor([[*key.question, *key.answer] for key in keys])
    output = model(tokens, state=state.select(torch.zeros(len(keys), dtype=torch.int64)))
    first = len(keys[0].question)
    right = (output.logits[:, first - 1 : -1].argmax(-1) == tokens[:, first:]).all(1)
    window: Any = next(layer for layer in state.layers if hasattr(layer, "index_BW"))
    places = torch.tensor([text.carrier(key) for key in keys])
    there = places[:, None] == window.index_BW[0]
    values = {"found": right, "kept": there.any(1), "asked": output.gates[0].selected_BT[:, first - 1]}
    return {name: float(value.double().mean()) for name, value in values.items()}


def retention(lab: Laboratory) -> Outcome:
    """The experiment."""
    scale = SCALES[lab.scale.name]
    runs = [declare(scale, seed) for seed in lab.scale.seeds]
    results = lab.complete(runs, partial(work, scale, lab.directory, lab.dtype), "retention")
    shown = {"found": "Keys found", "kept": "Keys in the window", "asked": "Questions at which the gate is open"}
    return Outcome({"taipan": results}, tuple(_table(what, title, scale, results) for what, title in shown.items()))


def share(results: Sequence[Result], what: str, eviction: str, way: str, length: int) -> list[float]:
    """Seed by seed, the mean over both kinds of keys."""
    return [
        mean(
            answer[what]
            for answer in result["answers"]
            if (answer["eviction"], answer["way"], answer["length"]) == (eviction, way, length)
        )
        for result in results
    ]


def _table(what: str, title: str, scale: Scale, results: Sequence[Result]) -> Table:
    header = ["what leaves the window", "keys", *(f"{length:,} tokens later" for length in scale.lengths)]
    rows = [
        [
            f"the {eviction}",
            way.name,
            *(spread(share(results, what, eviction, way.name, length), 2) for length in scale.lengths),
        ]
        for eviction in EVICTIONS
        for way in WAYS
    ]
    return Table(title, header, rows)


EXPERIMENTS = {"retention": retention}
