"""The claims of the paper, what was found of each, and a verdict: from kept results alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from taipan.errors import DataError
from taipan.experiments.associative_recall_figure import NAME as ASSOCIATIVE_RECALL
from taipan.experiments.associative_recall_figure import FigureData
from taipan.experiments.execution import Result, of_file
from taipan.io import parse_json_object, read_text

Verdict = Literal["holds", "holds in part", "does not hold", "no result yet"]
FOUR = ("transformer", "mamba2", "jamba", "taipan")
NAMES = {"transformer": "Transformer++", "mamba2": "Mamba-2", "jamba": "Jamba", "taipan": "Taipan"}
SEEDS = 3
"""That a claim needs to hold."""
_WITHOUT_SEEDS = ("latency-by-length", "learning-rates")  # repeated, or one seed by design
_TIE = 0.005
"""Of bits per byte: what is nearer than that is equal where one seed says it, whose spread is not known."""
_CLEAR = 0.01
"""Of bits per byte: what is nearer than that is not clearly better."""
_ONE = 0.02
"""Shares that are nearer than that are one."""
_HEALTHY = "nothing provoked"
_WORSE, _OFF = 0.02, 0.1
"""A gate has failed where bits per byte are so much above those of the healthy one, or the rate so far from C."""
_FLAT = 1.02
"""Loss at the longest context over that at the training length: at most this is flat."""
_LINEAR = 2.3
"""Time for twice as many tokens over time for so many: at most this is linear."""


@dataclass(frozen=True)
class Kept:
    """Results of an experiment, as `taipan reproduce` wrote them.

    Attributes:
        file: their name.
        text: what the models were trained on; empty where that is no text.
        scale: of the experiment.
        command: that made them.
        results: per model those of all seeds.
        more: what else was found.
        tables: title, header and rows of each.
    """

    file: str
    text: str
    scale: str
    command: str
    results: dict[str, list[Result]]
    more: dict[str, Any]
    tables: tuple[dict[str, Any], ...]

    @property
    def seeds(self) -> int:
        """How many every model has, at least."""
        return min(len({result.get("seed", at) for at, result in enumerate(own)}) for own in self.results.values())

    def mean(self, name: str, value: Callable[[Result], float]) -> float:
        """Over the seeds of a model."""
        return mean(value(result) for result in self.results[name])

    def below(self, low: str, high: str, value: Callable[[Result], float]) -> bool:
        """Whether every seed of a model has less than every seed of another."""
        return max(map(value, self.results[low])) < min(map(value, self.results[high]))

    def lowest(self, name: str, value: Callable[[Result], float]) -> bool:
        """Whether every seed of a model has less than every seed of all others."""
        return all(self.below(name, other, value) for other in self.results if other != name)


@dataclass(frozen=True)
class Finding:
    """A verdict, and why."""

    verdict: Verdict
    because: str


@dataclass(frozen=True)
class Claim:
    """What the paper says, or what is asked here.

    Attributes:
        experiment: the id of the experiment that tests it.
        place: where the paper says it; empty for questions of ours.
        words: what it says.
        judge: from kept results to a finding.
    """

    experiment: str
    place: str
    words: str
    judge: Callable[[Kept], Finding]


def load(directory: Path) -> dict[str, list[Kept]]:
    """All results of a directory that `taipan reproduce` wrote, by experiment; those of `tiny` show nothing.

    Raises:
        DataError: a file is damaged, or there is no such directory.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is no directory; expected one with results of `taipan reproduce` (JSON).")
    found: dict[str, list[Kept]] = {}
    for path in sorted(directory.glob("*.json")):
        values = of_file(parse_json_object(read_text(path), str(path)), str(path))
        if path.name == f"{ASSOCIATIVE_RECALL}.json":
            found["associative-recall"] = [_associative_recall_of(path)]
        if "experiment" not in values or values.get("scale") == "tiny":
            continue
        kept = Kept(
            file=path.name,
            text=values.get("text", ""),
            scale=values["scale"],
            command=values["command"],
            results=values["results"],
            more=values["more"],
            tables=tuple(values["tables"]),
        )
        found.setdefault(values["experiment"], []).append(kept)
    return found


def _associative_recall_of(path: Path) -> Kept:
    """The numbers of the figure of `associative-recall`, which has a form of its own."""
    data = FigureData.load(path)
    accuracy: dict[str, list[Result]] = {
        name: [{"accuracy": mean(seeds)} for seeds in zip(*rows, strict=True)] for name, rows in data.accuracy.items()
    }
    return Kept(file=path.name, text="", scale="full", command=data.command, results=accuracy, more={}, tables=())


def _verdict(whole: bool, part: bool) -> Verdict:
    if whole:
        return "holds"
    return "holds in part" if part else "does not hold"


def _list(values: Mapping[str, float], digits: int = 3) -> str:
    return "; ".join(f"{NAMES.get(name, name)}: {value:.{digits}f}" for name, value in values.items())


def _least(values: Mapping[str, float]) -> str:
    return min(values, key=lambda name: values[name])


# ---------------------------------------------------------------------- judges


def by_context(kept: Kept, name: str, text: str | None) -> dict[int, float]:
    """Mean bits per byte of a model by context: of the end of a long text, or of held-out documents (None)."""
    curves = [_points(own, text) for own in kept.results[name]]
    return {context: mean(curve[context] for curve in curves) for context in curves[0]}


def furthest(kept: Kept) -> str | None:
    """The long text that was read with the longest context; None where none was read."""
    texts: dict[str, Any] = kept.results["taipan"][0].get("long", {})
    return max(texts, key=lambda name: texts[name]["by_context"][-1]["context"], default=None)


def _points(own: Result, text: str | None) -> dict[int, float]:
    points = own["by_context"] if text is None else own["long"][text]["by_context"]
    return {point["context"]: point["bits_per_byte"] for point in points}


def _contexts(kept: Kept) -> Finding:
    training = kept.results["taipan"][0]["context"]
    text = furthest(kept)
    curves = {name: by_context(kept, name, text) for name in kept.results}
    longest = max(curves["taipan"])
    ends = {name: max(curve) for name, curve in curves.items()}
    at_end = {name: curve[ends[name]] for name, curve in curves.items()}
    inside = {name: curve[training] for name, curve in curves.items()}
    flat = at_end["taipan"] <= _FLAT * inside["taipan"]
    # a model of full attention that is read less far is compared where its reading ends
    lowest = all(
        max(_points(own, text)[ends[other]] for own in kept.results["taipan"])
        < min(_points(own, text)[ends[other]] for own in kept.results[other])
        for other in kept.results
        if other != "taipan"
    )
    from_first = kept.lowest("taipan", lambda own: _points(own, text)[training])
    broken = at_end["transformer"] > _FLAT * inside["transformer"]
    shorter = {name: f"{end:,}" for name, end in ends.items() if end < longest}
    because = f"Bits per byte at {training:,} tokens ({_list(inside)}), and at {longest:,} ({_list(at_end)}"
    because += "".join(f"; {NAMES.get(name, name)} only to {end}" for name, end in shorter.items()) + ")."
    because += "" if text is None else f" Text: the end of {text}."
    return Finding(_verdict(lowest and from_first and flat and broken, lowest or flat), because)


def _latency(kept: Kept) -> Finding:
    points = {name: own[0]["generate"] for name, own in kept.results.items()}
    seconds = {name: median(own[-1]["seconds"]) for name, own in points.items()}
    memory = {name: median(own[-1]["memory"]) / 2**20 for name, own in points.items()}
    length = points["taipan"][-1]["length"]
    growth = seconds["taipan"] / median(points["taipan"][-2]["seconds"])
    lowest = _least(seconds) == "taipan"
    because = f"{length:,} tokens take seconds ({_list(seconds, 1)}) and MiB ({_list(memory, 0)}). "
    because += f"Taipan takes {growth:.2f} times as long for twice as many; the Transformer "
    because += f"{seconds['transformer'] / seconds['taipan']:.1f} times as long as Taipan."
    return Finding(
        _verdict(lowest and growth <= _LINEAR, growth <= _LINEAR and seconds["taipan"] < seconds["transformer"]),
        because,
    )


@dataclass(frozen=True)
class Lead:
    """What a model is ahead of Mamba-2 by.

    Attributes:
        nats: a token; less than 0 where it is behind.
        relative: the same as a share of Mamba-2's loss.
        on_hits: share of it on recall hits.
    """

    nats: float
    relative: float
    on_hits: float


def lead(kept: Kept, name: str, where: str) -> Lead:
    """A model's lead over Mamba-2 in copying: `inside` the training length, or `beyond`."""

    def nats(name: str, hits: bool | None = None) -> float:
        def sums(own: Result) -> float:
            return sum(
                entry["nats"] for bucket, entry in own[where].items() if hits is None or hits == (bucket != "no hit")
            )

        return kept.mean(name, sums)

    tokens = sum(entry["tokens"] for entry in kept.results[name][0][where].values())
    whole = nats("mamba2") - nats(name)
    on_hits = (nats("mamba2", True) - nats(name, True)) / whole if whole else 0.0
    return Lead(nats=whole / tokens, relative=whole / nats("mamba2"), on_hits=on_hits)


def _copying(kept: Kept) -> Finding:
    from taipan.experiments.gate_settings import LEAST_LEAD

    jamba, taipan = lead(kept, "jamba", "inside"), lead(kept, "taipan", "inside")
    if jamba.relative < LEAST_LEAD:  # a share of it would be a share of noise
        because = f"Jamba's lead over Mamba-2 is {jamba.nats:.3f} nats a token, too little to keep a share of. Taipan "
        because += f"leads by {taipan.nats:.3f}; {taipan.on_hits:.0%} of it is on tokens that repeat a bigram."
        ahead = taipan.nats > jamba.nats
        return Finding(_verdict(ahead and taipan.on_hits >= 0.8, ahead), because)
    own = taipan.nats / jamba.nats
    beyond = lead(kept, "taipan", "beyond").nats / lead(kept, "jamba", "beyond").nats
    because = (
        f"Jamba leads Mamba-2 by {jamba.nats:.3f} nats a token; {jamba.on_hits:.0%} of it is on tokens that repeat a "
    )
    because += (
        f"bigram. Taipan keeps {own:.0%} of the lead inside the training length and {beyond:.0%} in eight times that."
    )
    return Finding(_verdict(jamba.on_hits >= 0.8 and own >= 2 / 3, jamba.on_hits >= 0.8 or own >= 1 / 3), because)


def found(kept: Kept, name: str) -> dict[str, float]:
    """Of recall: the mean share of answers found in every local file, and of hidden keys by kind."""
    own = kept.results[name]
    shares = {task: mean(result["found"][task] for result in own) for task in own[0]["found"]}
    for kind in ("passkey", "pairs"):
        shares[kind] = mean(cell[3] for result in own for cell in result["hidden"] if cell[0] == kind)
    return shares


def _recall(kept: Kept) -> Finding:
    trained = {name: f"{name}, with tasks" for name in FOUR}
    shares = {name: mean(found(kept, full).values()) for name, full in trained.items() if full in kept.results}

    def missed(own: Result) -> float:
        hidden = [cell[3] for cell in own["hidden"]]
        return 1.0 - mean([*own["found"].values(), *hidden])

    ahead = all(
        kept.below(trained[one], trained[other], missed) for one, other in pairwise(("taipan", "jamba", "mamba2"))
    )
    order = ahead and shares["transformer"] >= shares["taipan"]
    because = f"Mean share of answers found, models trained with a share of such tasks: {_list(shares, 2)}."
    missing = kept.more.get("without a file")
    if missing:
        because += f" No file was given for {', '.join(missing)}."
    return Finding(_verdict(order, shares["taipan"] > shares["mamba2"]), because)


def reach(kept: Kept, eviction: str, way: str) -> dict[int, float]:
    """Of retention: the mean share of keys found, by tokens between statement and question."""
    from taipan.experiments.retention import share

    lengths = sorted({answer["length"] for answer in kept.results["taipan"][0]["answers"]})
    return {length: mean(share(kept.results["taipan"], "found", eviction, way, length)) for length in lengths}


def _retention(kept: Kept) -> Finding:
    from taipan.experiments.retention import WAYS

    curves = {
        (eviction, way.name): reach(kept, eviction, way.name) for eviction in ("oldest", "weakest") for way in WAYS
    }
    longest = max(next(iter(curves.values())))
    sliding = curves["oldest", WAYS[0].name][longest]
    strong, quoted, once = (curves["weakest", way.name][longest] for way in WAYS)
    because = (
        f"Of keys {WAYS[0].name}, asked for {longest:,} tokens later, a window that keeps the strongest entries finds "
    )
    because += (
        f"{strong:.0%}, a sliding one {sliding:.0%}; with quotes in the filler the first finds {quoted:.0%}, and of "
    )
    because += f"keys {WAYS[2].name} {once:.0%}."
    return Finding(_verdict(min(strong, quoted, once) >= 0.9 and sliding <= 0.1, strong > sliding + 0.1), because)


def _mqar(kept: Kept) -> Finding:
    from taipan.experiments.mqar import PUBLISHED, accuracy, error

    own = {name: kept.mean(name, accuracy) for name in kept.results}
    off = max(abs(own[name] - value) for name, value in PUBLISHED.items())
    taipan = own["Taipan, recurrent state of 32 KiB"]
    above = kept.below("Taipan, recurrent state of 32 KiB", "Mamba-2, 32 KiB", error)
    because = f"Taipan {taipan:.3f}, Mamba-2 of equal recurrent state {own['Mamba-2, 32 KiB']:.3f}, with its window as "
    because += (
        f"large as that state {own['Taipan, 32 KiB with its window']:.3f}. Ours are within {off:.2f} of zoology's."
    )
    if kept.more["still improving"]:
        because += f" Still improving when training ended: {'; '.join(kept.more['still improving'])}."
    return Finding(_verdict(above and off <= 0.05, above), because)


def _zero_shot(kept: Kept) -> Finding:
    from taipan.experiments.tasks import above_chance

    tasks = list(kept.results["taipan"][0]["tasks"])
    scores = {
        name: mean(result["tasks"][task]["score"] for result in own for task in tasks)
        for name, own in kept.results.items()
    }
    above = [task for task in tasks if above_chance([result["tasks"][task] for result in kept.results["taipan"]])]
    best = max(scores, key=lambda name: scores[name])
    because = f"Averages over {len(tasks)} tasks: {_list(scores)}. Taipan's interval is above chance in "
    because += f"{', '.join(above) or 'none of them: everything here is chance'}."
    return Finding(_verdict(best == "taipan" and len(above) > len(tasks) / 2, bool(above)), because)


def budgets(kept: Kept, size: str = "") -> dict[float, float]:
    """Of capacity: mean bits per byte by C, of the smaller model or, with `, larger`, of the other."""
    return {
        float(name.removeprefix("C = ").removesuffix(size)): kept.mean(name, lambda own: own["bits_per_byte"])
        for name in kept.results
        if name.startswith("C = ") and "chance" not in name and "k-th" not in name and name.endswith(size)
        if size or not name.endswith("larger")
    }


def _capacity(kept: Kept) -> Finding:
    curve = budgets(kept)
    learned, whole, none = curve[0.15], curve[1.0], curve[0.0]
    chance = kept.mean("C = 0.15, by chance", lambda own: own["bits_per_byte"])
    gained = (none - learned) / (none - whole)
    per_token = (learned - curve[0.30]) / (none - learned)
    because = (
        f"Bits per byte at C = 0, 0.15, 0.30 and 1: {none:.3f}, {learned:.3f}, {curve[0.30]:.3f}, {whole:.3f}; at "
    )
    because += f"0.15 by chance {chance:.3f}. 0.15 has {gained:.0%} of what 1 gains; the next 0.15 add {per_token:.0%} "
    because += "of what the first brought."
    better = kept.below("C = 0.15", "C = 0.15, by chance", lambda own: own["bits_per_byte"])
    return Finding(_verdict(better and per_token < 1 / 3, better), because)


def _positions(kept: Kept) -> Finding:
    from taipan.experiments.gate_settings import beyond

    training = kept.results["without"][0]["context"]
    inside = {name: kept.mean(name, lambda own: own["bits_per_byte"]) for name in kept.results}
    far = {name: kept.mean(name, lambda own: beyond(own, training)) for name in kept.results}
    equal = abs(inside["without"] / inside["RoPE"] - 1) < _CLEAR
    better = kept.below("without", "RoPE", lambda own: beyond(own, training))
    clearly = better and far["without"] < (1 - _CLEAR) * far["RoPE"]
    because = f"Bits per byte inside the training length ({_list(inside)}), and beyond 4 times that ({_list(far)})."
    return Finding(_verdict(equal and clearly, better), because)


def _default(name: str) -> Callable[[Kept], Finding]:
    """Whether what we take by default is best; in part if it is within what seeds differ by (one seed: `_TIE`)."""

    def judged(kept: Kept) -> Finding:
        values = {own: kept.mean(own, lambda result: result["bits_per_byte"]) for own in kept.results}
        bits = [[result["bits_per_byte"] for result in own] for own in kept.results.values()]
        spread = max(max(own) - min(own) for own in bits)
        taken, best = name.format(context=kept.results[next(iter(values))][0]["context"]), _least(values)
        differ = f"seeds differ by up to {spread:.3f}"
        if kept.seeds == 1:
            spread = _TIE * values[best]
            differ = f"one seed, nearer than {spread:.3f} is equal"
        because = f"Bits per byte: {_list(values)}; {differ}. Best: {best}; default: {taken}."
        return Finding(_verdict(best == taken, values[taken] - values[best] <= spread), because)

    return judged


def _gap(kept: Kept) -> Finding:
    gaps = {
        name: kept.mean(name, lambda own: abs(own["as trained"]["rate"] - own["curve"][-1]["rate"]))
        for name in kept.results
    }
    best, default = _least(gaps), list(gaps)[-1]
    because = f"Between the share selected in training and on held-out text: {_list(gaps)}. Default: {default}."
    return Finding(_verdict(gaps[default] < _ONE, gaps[best] < _ONE), because)


def _gate(kept: Kept) -> Finding:
    def rate(group: str) -> float:
        return kept.mean(
            "taipan", lambda own: own["groups"][group]["selected"] / max(1, own["groups"][group]["tokens"])
        )

    hits, others = rate("the next token is a recall hit"), rate("the next token is not")
    because = f"It selects {hits:.0%} of the tokens before a recall hit and {others:.0%} of the others."
    return Finding(_verdict(hits > 2 * others, hits > others), because)


def _failures(kept: Kept) -> Finding:
    base = kept.mean(_HEALTHY, lambda own: own["bits_per_byte"])
    failed: list[str] = []
    harmless: list[str] = []
    for name, own in kept.results.items():
        worse = kept.mean(name, lambda result: result["bits_per_byte"]) / base - 1
        off = max(abs(result["rate"] - result["config"]["attention_capacity"]) for result in own)
        if name != _HEALTHY:
            (failed if worse > _WORSE or off > _OFF else harmless).append(name)
    quiet = [name for name in failed if not all(result["warnings"] for result in kept.results[name])]
    because = f"{len(failed) - len(quiet)} of {len(failed)} failures were warned of in training with every seed."
    if quiet:
        because += f" Not: {'; '.join(quiet)}."
    if harmless:
        because += f" Provoked in vain, the model did not fail: {'; '.join(harmless)}."
    return Finding(_verdict(bool(failed) and not quiet, len(failed) > len(quiet)), because)


def _rates(kept: Kept) -> Finding:
    edges = [name for name, own in kept.more.items() if own["edge"]]
    others = [name for name, own in kept.more.items() if own["best"] != own["taken"]]
    because = "; ".join(
        f"{NAMES.get(name, name)}: best {own['best']:g}, taken {own['taken']:g}" for name, own in kept.more.items()
    )
    return Finding(_verdict(not edges and not others, not edges), f"{because}.")


def _settings(kept: Kept) -> Finding:
    from taipan.experiments.gate_settings import LEAST_LEAD
    from taipan.experiments.gate_settings import kept as share

    bits = {name: kept.mean(name, lambda own: own["bits_per_byte"]) for name in kept.results}
    lead, own = 1 - bits["jamba"] / bits["mamba2"], bits["recall, lookahead"]
    if lead < LEAST_LEAD:  # a share of it would be a share of noise
        because = f"Jamba's lead over Mamba-2 is {lead:.1%}, too little to keep. Bits per byte: {_list(bits)}."
        return Finding(_verdict(own <= bits["jamba"], own <= bits["mamba2"]), because)
    shares = {name: mean(share(kept.results, name)) for name in kept.results if name not in ("mamba2", "jamba")}
    own = shares["recall, lookahead"]
    because = f"Of Jamba's lead over Mamba-2, {_list(shares, 2)}."
    return Finding(_verdict(own >= 2 / 3 and own == max(shares.values()), own >= 1 / 3), because)


def _associative_recall(kept: Kept) -> Finding:
    values = {name: kept.mean(name, lambda own: own["accuracy"]) for name in kept.results}
    closed = values["taipan, C = 0"]
    because = f"Accuracy, mean over pairs and seeds: {_list(values)}."
    return Finding(_verdict(values["taipan"] >= 0.99 and closed < 0.9, values["taipan"] > closed), because)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        experiment="perplexity-by-context",
        place="Fig. 1a",
        words="Taipan has the lowest loss and stays flat to a million tokens; models of full attention break past "
        "their training length, Mamba-2 degrades slowly.",
        judge=_contexts,
    ),
    Claim(
        experiment="latency-by-length",
        place="Fig. 1b",
        words="Taipan generates with the lowest latency, linear in length, in constant memory; 3 to 5 times below the "
        "Transformer at 32K tokens.",
        judge=_latency,
    ),
    Claim(
        experiment="recall", place="Fig. 4", words="Recall: Transformer++ ≥ Taipan > Jamba > Mamba-2.", judge=_recall
    ),
    Claim(
        experiment="retention",
        place="",
        words="Beyond the paper: a window of the strongest entries, not the last ones, keeps keys in reach at any "
        "distance.",
        judge=_retention,
    ),
    Claim(
        experiment="mqar",
        place="",
        words="At equal recurrent state Taipan recalls more than Mamba-2; baselines reach zoology's.",
        judge=_mqar,
    ),
    Claim(
        experiment="associative-recall",
        place="",
        words="C = 0.15 solves a memory task that C = 0 and a Mamba-2 of equal parameters and recurrent state do not.",
        judge=_associative_recall,
    ),
    Claim(
        experiment="zero-shot",
        place="Table 1",
        words="Taipan has the best average of nine zero-shot tasks at every size.",
        judge=_zero_shot,
    ),
    Claim(
        experiment="capacity",
        place="Fig. 5",
        words="C = 0.15 is the knee; learned selection beats chance.",
        judge=_capacity,
    ),
    Claim(
        experiment="positions",
        place="Fig. 6",
        words="A SAL without rotary embedding is as good inside the training length and clearly better beyond.",
        judge=_positions,
    ),
    Claim(
        experiment="copying",
        place="",
        words="Attention's lead lies on tokens that repeat what was read, and Taipan keeps it.",
        judge=_copying,
    ),
    Claim(
        experiment="gate-settings",
        place="",
        words="A gate at C = 0.15 keeps two thirds of attention's lead.",
        judge=_settings,
    ),
    Claim(
        experiment="gap",
        place="",
        words="The shares selected in training and at inference can be made one.",
        judge=_gap,
    ),
    Claim(experiment="gate", place="", words="The gate selects the tokens that recall needs.", judge=_gate),
    Claim(
        experiment="window",
        place="",
        words="The default window, as long as training contexts, is best.",
        judge=_default("W = {context}"),
    ),
    Claim(
        experiment="scope",
        place="",
        words="Keys of all tokens and a window of positions are best.",
        judge=_default("all, positions"),
    ),
    Claim(
        experiment="ratio",
        place="",
        words="One SAL in the middle of the stack is best.",
        judge=_default("one SAL, in the middle"),
    ),
    Claim(
        experiment="failures",
        place="",
        words="Every failure that was provoked is warned of in training.",
        judge=_failures,
    ),
    Claim(
        experiment="learning-rates",
        place="",
        words="Every architecture has its best learning rate, and none is an edge.",
        judge=_rates,
    ),
)


def judge(claim: Claim, results: Sequence[Kept]) -> list[tuple[Kept | None, Finding]]:
    """The finding of every text; one that says so where there is no result.

    Raises:
        DataError: results lack a model or a measurement.
    """
    if not results:
        return [(None, Finding("no result yet", f"`taipan reproduce {claim.experiment}` makes one."))]
    return [(kept, _enough_seeds(claim, kept, _judged(claim, kept))) for kept in results]


def _judged(claim: Claim, kept: Kept) -> Finding:
    try:
        return claim.judge(kept)
    except KeyError as error:  # of what it made from the file's objects, which name their file themselves
        raise DataError(
            f"{kept.file} has no results of {error}, which {claim.experiment} compares: restore it, or make it again."
        ) from error


def _enough_seeds(claim: Claim, kept: Kept, finding: Finding) -> Finding:
    """Nothing holds because one or two seeds say so."""
    if finding.verdict != "holds" or kept.seeds >= SEEDS or claim.experiment in _WITHOUT_SEEDS:
        return finding
    return Finding("holds in part", f"{finding.because} With {kept.seeds} of {SEEDS} seeds.")
