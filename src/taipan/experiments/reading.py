"""How the architectures read on: loss by context and position, tokens that copy, and what the gates select."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taipan.config import TaipanConfig
from taipan.errors import InputError, shown
from taipan.experiments.execution import Result
from taipan.experiments.gate_settings import WINNER, architectures, hybrid
from taipan.experiments.laboratory import (
    Choice,
    Laboratory,
    Outcome,
    Table,
    all_seeds,
    by_name,
    model_config,
    spread,
)
from taipan.experiments.texts import prepare_text, sha256_of

if TYPE_CHECKING:
    from taipan.data.shards import TokenDataset
    from taipan.data.tokenizer import Tokenizer
    from taipan.evaluation import Documents, ReadTokens
    from taipan.model import TaipanLM

_DISTANCES = (16, 64, 256)  # and the window, and beyond it
LONGEST = 32_768
"""Tokens of the held-out documents that are read, at most."""
SCORED = 16_384
"""Tokens of a long text whose loss is told, the last ones; what is read before them is the context."""
ATTENTION_READS = 65_536
"""Longest context at which models of full attention read a long text: their time grows with its square."""


def _architectures(lab: Laboratory) -> dict[str, tuple[TaipanConfig, Choice]]:
    return {name: (config, "gate") for name, config in architectures(lab.scale).items()}


def _measured(lab: Laboratory, function: Any, options: Any) -> dict[str, list[Result]]:
    models, seeds = _architectures(lab), lab.scale.seeds
    return by_name(list(models), seeds, lab.measure(function, all_seeds(models, seeds), options))


# ---------------------------------------------------------------------- loss by context


def measure_contexts(model: "TaipanLM", data: Path, training: int) -> Result:
    """Bits per byte of the same long documents, cut to contexts from half the training length on, and by position.

    The documents are those held out that are longest, cut to one length of at most `LONGEST`, so that every position
    has the same ones.

    Args:
        model: read.
        data: prepared text.
        training: the training length.
    """
    from taipan.data.shards import TokenDataset
    from taipan.evaluation import PreparedDocuments
    from taipan.evaluation.perplexity import evaluate

    documents = LongDocuments(PreparedDocuments(TokenDataset.open(data / "valid")), longest=LONGEST)
    contexts = [training // 2]
    while contexts[-1] < documents.length:
        contexts.append(2 * contexts[-1])
    by_context = [
        {"context": context, "bits_per_byte": evaluate(model, documents, context=context).bits_per_byte}
        for context in contexts
    ]
    whole = evaluate(model, documents)
    return {
        "documents": len(documents.lengths),
        "length": documents.length,
        "by_context": by_context,
        "by_position": [asdict(bucket) for bucket in whole.by_position],
        "rates": [gate.rate for gate in whole.gates],
    }


class LongDocuments:
    """The longest documents of a data set, all cut to the length of the shortest of them.

    Args:
        documents: of which.
        at_least: how many; fewer where there are not so many.
        longest: tokens of each, at most; None for no such bound.
    """

    def __init__(self, documents: Any, at_least: int = 4, longest: int | None = None) -> None:
        import numpy as np

        order = np.argsort(-documents.lengths, kind="stable")[:at_least]
        self.length = int(documents.lengths[order].min())
        if longest is not None:
            self.length = min(self.length, longest)
        self._documents, self._order = documents, order
        self.lengths = np.full(len(order), self.length, np.int64)
        self.vocab_size, self.start_token = documents.vocab_size, documents.start_token
        self.token_bytes = documents.token_bytes
        tokens = (documents.read(int(number), 0, self.length) for number in order)
        self.n_bytes = int(sum(self.token_bytes[ids].sum() for ids in tokens))

    def read(self, document: int, start: int, stop: int) -> Any:
        """See `taipan.evaluation.Documents.read`."""
        return self._documents.read(int(self._order[document]), start, stop)


def measure_long(model: "TaipanLM", data: Path, options: Any) -> Result:
    """Bits per byte of the same last tokens of long texts, by how much of the text before them is read.

    At contexts up to `SCORED` those tokens are cut into pieces of that length, each from an empty state. At longer ones
    one reading begins so many tokens before the end, and the loss of the last `SCORED` is told.

    Args:
        model: read; one with full attention reads contexts up to `ATTENTION_READS`.
        data: prepared text, beside which the long ones are.
        options: `texts`: name, directory (under that of all texts) of each; `contexts`; `scored`.
    """
    from taipan.data.shards import TokenDataset
    from taipan.evaluation import PreparedDocuments

    longest = ATTENTION_READS if "full_attention" in model.config.layer_types else max(options["contexts"])
    found: Result = {}
    for name, directory in options["texts"]:
        documents = PreparedDocuments(TokenDataset.open(data.parent / directory / "valid"))
        known = [context for context in options["contexts"] if context <= min(longest, int(documents.lengths.max()))]
        scored = min(options["scored"], int(documents.lengths.max()))
        points = [_score_the_end(model, Ending(documents, max(context, scored)), context, scored) for context in known]
        found[name] = {"scored": scored, "by_context": points}
    return {"long": found}


def _score_the_end(model: "TaipanLM", ending: "Ending", context: int, scored: int) -> Result:
    """Loss of the last tokens, in bits per byte, and the share of them that is selected."""
    from taipan.evaluation import read_tokens

    nats, n_bytes, selected = 0.0, 0, 0.0
    first = int(ending.lengths[0]) - scored
    for span in read_tokens(model, ending, context=context):
        kept = slice(max(0, first - span.start), None)
        nats += float(span.nats_T[kept].double().sum())
        n_bytes += int(ending.token_bytes[span.ids_T[kept].numpy()].sum())
        selected += float(span.selected_YT[:, kept].double().mean(0).sum()) if len(span.selected_YT) else 0.0
    rate = selected / scored if model.sals else None
    return {"context": context, "bits_per_byte": nats / math.log(2) / n_bytes, "rate": rate}


class Ending:
    """The last tokens of the longest document of a data set, as a document.

    Args:
        documents: of which.
        length: tokens, at most those of the document.
    """

    def __init__(self, documents: Any, length: int) -> None:
        import numpy as np

        self._documents, self._number = documents, int(np.argmax(documents.lengths))
        self._first = int(documents.lengths[self._number]) - length
        self.lengths = np.array([length])
        self.vocab_size, self.token_bytes = documents.vocab_size, documents.token_bytes
        # the first token is predicted from the one before it, as every piece of a document is
        self.start_token = int(self.read(0, -1, 0)[0]) if self._first else documents.start_token

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the tokens."""
        return int(self.token_bytes[self.read(0, 0, int(self.lengths[0]))].sum())

    def read(self, document: int, start: int, stop: int) -> Any:
        """See `taipan.evaluation.Documents.read`."""
        return self._documents.read(self._number, self._first + start, self._first + stop)


def long_contexts(training: int, longest: int) -> list[int]:
    """From half the training length on twice as many up to `SCORED`, then four times, up to the longest text."""
    contexts = [training // 2]
    while (step := contexts[-1] * (2 if contexts[-1] < SCORED else 4)) <= longest:
        contexts.append(step)
    return contexts


def _long_texts(lab: Laboratory) -> tuple[list[list[str]], int]:
    """Name and prepared directory of every long text that was given, and the tokens of the longest.

    Raises:
        InputError: a file is not there.
    """
    from taipan.data.shards import TokenDataset
    from taipan.evaluation import PreparedDocuments

    texts, longest = lab.data.parent, 0
    tokenizer = TokenDataset.open(lab.data / "train").tokenizer()
    found: list[list[str]] = []
    for name, path in lab.files.items():
        if not path.is_file():
            raise InputError(f"{shown(str(path))} is no file: give the path of a long text.")
        found.append([name, prepare_text(name, path, sha256_of(path), tokenizer, texts)])
        longest = max(longest, int(PreparedDocuments(TokenDataset.open(texts / found[-1][1] / "valid")).lengths.max()))
    return found, longest


def perplexity_by_context(lab: Laboratory) -> Outcome:
    """Fig. 1a: four architectures, the same long documents at every length, and the end of long texts."""
    context = lab.scale.context
    results = _measured(lab, measure_contexts, context)
    first = next(iter(results.values()))[0]
    title = f"Bits per byte of {first['documents']} held-out documents of {first['length']:,} tokens, by context"
    tables = [
        _by_length(results, "by_context", "context", title),
        _by_length(results, "by_position", "start", "The same read whole, by position (from)"),
    ]
    texts, longest = _long_texts(lab)
    if texts:
        options = {"texts": texts, "contexts": long_contexts(context, longest), "scored": SCORED}
        read = _measured(lab, measure_long, options)
        results = {
            name: [{**own, "long": other["long"]} for own, other in zip(seeds, read[name], strict=True)]
            for name, seeds in results.items()
        }
        for text, _ in texts:
            end = {name: [own["long"][text] for own in seeds] for name, seeds in results.items()}
            title = f"Bits per byte of the last {end['taipan'][0]['scored']:,} tokens of {text}, by context"
            tables.append(_by_length(end, "by_context", "context", title))
    return Outcome(results, tuple(tables))


def _by_length(results: dict[str, list[Result]], key: str, place: str, title: str) -> Table:
    """Bits per byte at every length that some model has."""
    known = sorted({point[place] for seeds in results.values() for point in seeds[0][key]})
    rows: list[list[str]] = []
    for name, seeds in results.items():
        values = [{point[place]: point["bits_per_byte"] for point in own[key]} for own in seeds]
        rows.append([name, *(spread([own[at] for own in values]) if at in values[0] else "–" for at in known)])
    return Table(title, ["model", *(f"{at:,}" for at in known)], rows)


# ---------------------------------------------------------------------- copying


def measure_copying(model: "TaipanLM", data: Path, training: int) -> Result:
    """Nats of tokens that complete a bigram which occurred before in the context, by distance, and of all others.

    A token is a *recall hit* (as zoology slices text) if it and the token before it stood side by side earlier.

    Args:
        model: read.
        data: prepared text.
        training: the training length; contexts are that, and 8 times that.
    """
    from taipan.data.shards import TokenDataset

    return copying_of(model, TokenDataset.open(data / "valid"), training)


def copying_of(model: "TaipanLM", documents: "TokenDataset | Documents", training: int) -> Result:
    """As `measure_copying`, of any documents."""
    from taipan.evaluation import read_tokens

    found: Result = {}
    for name, context in (("inside", training), ("beyond", 8 * training)):
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for tokens in read_tokens(model, documents, context=context):
            distance_T = bigram_distance(tokens)
            for bucket, low, high in _distance_buckets(training):
                mask_T = (distance_T >= low) & (distance_T < high)
                sums[bucket][0] += float(mask_T.sum())
                sums[bucket][1] += float(tokens.nats_T[mask_T].double().sum())
        found[name] = {bucket: {"tokens": count, "nats": nats} for bucket, (count, nats) in sums.items()}
    return found


def _distance_buckets(window: int) -> list[tuple[str, int, int]]:
    edges = sorted({1, *(distance for distance in _DISTANCES if distance < window), window, 1 << 60})
    pairs = list(pairwise(edges))
    names = [f"hit, {low}–{high - 1} back" for low, high in pairs[:-1]] + [f"hit, from {window} back"]
    return [("no hit", 0, 1), *((name, low, high) for name, (low, high) in zip(names, pairs, strict=True))]


def bigram_distance(tokens: "ReadTokens") -> Any:
    """How many tokens before each token the same bigram ended last, within the span; 0 where it is new; (T,)."""
    import torch

    last: dict[tuple[int, int], int] = {}
    distances: list[int] = []
    for place, bigram in enumerate(zip(tokens.before_T.tolist(), tokens.ids_T.tolist(), strict=True)):
        distances.append(place - last[bigram] if bigram in last else 0)
        last[bigram] = place
    return torch.tensor(distances)


def copying(lab: Laboratory) -> Outcome:
    """Where attention's lead lies, and how much of it Taipan keeps."""
    results = _measured(lab, measure_copying, lab.scale.context)
    tables: list[Table] = []
    for where, title in (("inside", "Contexts of the training length"), ("beyond", "Contexts of 8 times that")):
        buckets = [name for name, sums in next(iter(results.values()))[0][where].items() if sums["tokens"]]
        rows = [["tokens", *(f"{next(iter(results.values()))[0][where][bucket]['tokens']:,.0f}" for bucket in buckets)]]
        for name, seeds in results.items():
            means = ([_mean(own[where][bucket]) for own in seeds] for bucket in buckets)
            rows.append([name, *(spread(values) for values in means)])
        tables.append(Table(f"{title}: nats per token", ["model", *buckets], rows))
    return Outcome(results, tuple(tables))


def _mean(sums: dict[str, float]) -> float:
    return sums["nats"] / sums["tokens"]


# ---------------------------------------------------------------------- what the gate selects


def measure_gate(model: "TaipanLM", data: Path, training: int) -> Result:
    """Rates of selection of the first SAL by what a token is, and how its score goes with what comes.

    Args:
        model: read.
        data: prepared text.
        training: the training length, and the context.
    """
    from taipan.data.shards import TokenDataset

    valid = TokenDataset.open(data / "valid")
    return gate_of(model, valid, valid.tokenizer(), training)


def gate_of(model: "TaipanLM", documents: "TokenDataset | Documents", tokenizer: "Tokenizer", training: int) -> Result:
    """As `measure_gate`, of any documents."""
    import torch

    from taipan.evaluation import read_tokens

    counts = torch.zeros(model.config.vocab_size)
    spans = list(read_tokens(model, documents, context=training))
    for span in spans:
        counts += torch.bincount(span.before_T, minlength=len(counts))
    frequent = counts >= counts.sort(descending=True).values[min(len(counts) - 1, 64)]
    kinds = [token_class(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)]
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(group: str, mask_T: Any, selected_T: Any) -> None:
        sums[group][0] += float(mask_T.sum())
        sums[group][1] += float(selected_T[mask_T].sum())

    for span in spans:
        selected_T, place_T = span.selected_YT[0], torch.arange(len(span.ids_T))
        repeats_T = bigram_distance(span) > 0
        before_T = torch.cat([torch.zeros(1, dtype=torch.bool), repeats_T[:-1]])
        add("all", torch.ones_like(selected_T), selected_T)
        for kind in sorted(set(kinds)):
            add(f"class: {kind}", torch.tensor([kinds[token] == kind for token in span.before_T.tolist()]), selected_T)
        add("of the 64 most frequent ids", frequent[span.before_T], selected_T)
        add("of other ids", ~frequent[span.before_T], selected_T)
        add("completes a bigram seen before", before_T, selected_T)
        add("completes a new bigram", ~before_T, selected_T)
        add("the next token is a recall hit", repeats_T, selected_T)
        add("the next token is not", ~repeats_T, selected_T)
        for low, high in ((0, training // 4), (training // 4, training // 2), (training // 2, training)):
            add(f"place {low}–{high - 1} of the context", (place_T >= low) & (place_T < high), selected_T)
    nats_T = torch.cat([span.nats_T for span in spans])
    margin_T = torch.cat([span.margin_YT[0] for span in spans])
    agreement = float(torch.corrcoef(torch.stack([nats_T.double(), margin_T.double()]))[0, 1])
    groups = {name: {"tokens": count, "selected": selected} for name, (count, selected) in sums.items()}
    return {"groups": groups, "correlation_of_score_and_surprise": agreement}


def token_class(text: str) -> str:
    """What a token looks like: `word`, `number`, `space`, `line end`, `mark`, or `other`."""
    bare = text.strip()
    if not bare:
        return "line end" if "\n" in text else "space"
    if bare.isalpha() or (bare.replace("_", "").isalnum() and not bare.isdigit()):
        return "word"
    if bare.isdigit():
        return "number"
    return "mark" if all(not character.isalnum() for character in bare) else "other"


def gate(lab: Laboratory) -> Outcome:
    """What the trained gate selects."""
    config = model_config(lab.scale, hybrid("selective_attention"), **WINNER)
    models: dict[str, tuple[TaipanConfig, Choice]] = {"taipan": (config, "gate")}
    seeds = lab.scale.seeds
    results = by_name(["taipan"], seeds, lab.measure(measure_gate, all_seeds(models, seeds), lab.scale.context))
    groups: Sequence[str] = list(results["taipan"][0]["groups"])
    rows: list[list[str]] = []
    for group in groups:
        own = [result["groups"][group] for result in results["taipan"] if group in result["groups"]]
        rates = [entry["selected"] / entry["tokens"] for entry in own if entry["tokens"]]
        rows.append([group, f"{own[0]['tokens']:,.0f}", spread(rates) if rates else "–"])
    correlation = spread([result["correlation_of_score_and_surprise"] for result in results["taipan"]], 2)
    rows.append(["correlation of score and surprise (nats of the next token)", "", correlation])
    return Outcome(results, (Table("Share of the tokens that is selected", ["tokens", "number", "rate"], rows),))


EXPERIMENTS = {"perplexity-by-context": perplexity_by_context, "copying": copying, "gate": gate}
