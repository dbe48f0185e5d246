"""The tasks of lm-eval on a native model: contexts of any length by state, and what texts share is read once.

lm-eval asks for likelihoods of continuations and for generated text. Here the contexts of all questions are a tree: a
beginning that several share (few-shot examples, a passage, the question of several answers) is read once, and its state
is forked. Nothing is ever cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from torch import Tensor

from taipan.errors import ConfigError, InputError, shown
from taipan.evaluation.questions import Kind, read_questions
from taipan.generation import GenerationSettings, Reading, inference, prefill
from taipan.generation import stream as stream_tokens
from taipan.text import TextModel

_SHARED = 32
"""Fewer tokens in common are read again: a fork costs about as much."""
_PIECE = 2048
Ids = tuple[int, ...]


@dataclass
class Counts:
    """What was asked and what it took.

    Attributes:
        asked: tokens of all contexts and continuations, as if each request was read alone.
        read: tokens that were read.
    """

    asked: int = 0
    read: int = 0


class Harness(TemplateLM):
    """A native model as lm-eval calls it.

    Args:
        text: the model and its tokenizer.
        batch_size: rows read side by side; results are the same for any, to rounding.

    Attributes:
        counts: of the requests so far.
    """

    def __init__(self, text: TextModel, *, batch_size: int = 8) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but must be at least 1.")
        self.text = text
        self.batch_size = batch_size
        self.counts = Counts()

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which stands before a text as well."""
        return self.text.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Of lm-eval's cache of requests."""
        return "taipan"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; text is only text."""
        return self.text.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("Chat templates are not applied here: leave apply_chat_template out, or use `taipan chat`.")

    # ------------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        questions: dict[Ids, list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            questions.setdefault(tuple(context), []).append(number)

        def answer(contexts: Sequence[Ids], reading: Reading) -> None:
            pairs = [(row, number) for row, context in enumerate(contexts) for number in questions[context]]
            pairs.sort(key=lambda pair: len(requests[pair[1]][2]))
            for part in _parts(pairs, self.batch_size):
                rows = _rows(reading, [row for row, _ in part])
                scores = self._score(rows, [requests[number][2] for _, number in part])
                for (_, number), score in zip(part, scores, strict=True):
                    results[number] = score

        self.counts.asked += sum(len(context) + len(answer) for _, context, answer in requests)
        self._visit(list(questions), answer)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each after the end of another; never in windows."""
        texts = [self.tok_encode(cast(str, request.args[0])) for request in requests]
        begin = [self.prefix_token_id]
        return [score for score, _ in self._loglikelihood_tokens([(("", ""), begin, ids) for ids in texts])]

    @torch.no_grad()
    def _score(self, reading: Reading, answers: list[list[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of one continuation for each row of a reading, and whether greedy decoding gives it."""
        model, device = self.text.model, reading.logits_BV.device
        nats = [0.0] * len(answers)
        greedy = [True] * len(answers)

        def add(row: int, logits_TV: Tensor, ids: list[int]) -> None:
            target_T = torch.tensor(ids, device=device)
            log_TV = logits_TV.double().log_softmax(-1)
            nats[row] += float(log_TV.gather(1, target_T[:, None]).sum())
            greedy[row] = greedy[row] and bool((log_TV.argmax(-1) == target_T).all())

        for row, ids in enumerate(answers):
            if ids:
                add(row, reading.logits_BV[row : row + 1], ids[:1])
        longest, state = max(len(ids) for ids in answers) - 1, reading.state
        for begin in range(0, longest, _PIECE):
            parts = [ids[begin : begin + _PIECE][: max(0, len(ids) - 1 - begin)] for ids in answers]
            tokens_BT, mask_BT = _padded(parts, device)
            with inference(model):
                output = model(tokens_BT, state=state, attention_mask=mask_BT)
                state = output.state
                for row, part in enumerate(parts):
                    if part:
                        add(row, output.logits[row, : len(part)], answers[row][begin + 1 : begin + 1 + len(part)])
            self.counts.read += sum(map(len, parts))
        return list(zip(nats, greedy, strict=True))

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings.

        Raises:
            InputError: an option of the task is unknown.
        """
        results = [""] * len(requests)
        groups: dict[tuple[Any, ...], dict[Ids, list[int]]] = {}
        for number, request in enumerate(requests):
            context, options = cast("tuple[str, dict[str, Any]]", request.args)
            ids = tuple(self.tok_encode(context)) or (self.prefix_token_id,)
            self.counts.asked += len(ids)
            groups.setdefault(_settings(options), {}).setdefault(ids, []).append(number)
        for (stops, most, sampled), questions in groups.items():
            settings = GenerationSettings(
                max_new_tokens=most, stop_strings=stops, do_sample=bool(sampled), **dict(sampled)
            )
            self._visit(list(questions), partial(self._answer_with_text, questions, settings, results))
        return results

    def _answer_with_text(
        self,
        questions: dict[Ids, list[int]],
        settings: GenerationSettings,
        results: list[str],
        contexts: Sequence[Ids],
        reading: Reading,
    ) -> None:
        for context, text in zip(contexts, self._continue(reading, settings), strict=True):
            for number in questions[context]:
                results[number] = text

    def _continue(self, reading: Reading, settings: GenerationSettings) -> list[str]:
        tokenizer = self.text.tokenizer
        ids: list[list[int]] = [[] for _ in range(len(reading.logits_BV))]
        for step in stream_tokens(self.text.model, reading, tokenizer=tokenizer, settings=settings):
            for row in step.generated_B.nonzero()[:, 0].tolist():
                ids[row].append(step.tokens[row])
        texts: list[str] = []
        for row in ids:
            text = tokenizer.decode([token for token in row if token != tokenizer.eos_id])
            cuts = [text.find(stop) for stop in settings.stop_strings if stop in text]
            texts.append(text[: min(cuts)] if cuts else text)
        return texts

    # ------------------------------------------------------------------ contexts

    def _visit(self, contexts: list[Ids], answer: Callable[[Sequence[Ids], Reading], None]) -> None:
        """Call `answer` with every context once, in batches, and the reading after them."""
        self._descend(sorted(set(contexts)), 0, None, answer)

    def _descend(
        self,
        contexts: list[Ids],
        done: int,
        reading: Reading | None,
        answer: Callable[[Sequence[Ids], Reading], None],
    ) -> None:
        """Contexts in order that share their first `done` tokens, which `reading` (of one row) has read."""
        alone: list[Ids] = []
        for family in _families(contexts, done):
            shared = _common(family[0], family[-1]) if len(family) > 1 else 0
            if shared < done + _SHARED:
                alone += family
                continue
            beginning = self._read([family[0][done:shared]], reading)
            if len(family[0]) == shared:  # a context that is the beginning of the others
                answer(family[:1], beginning)
                family = family[1:]
            self._descend(family, shared, beginning, answer)
        alone.sort(key=len)
        for part in _parts(alone, self.batch_size):
            before = None if reading is None else _rows(reading, [0] * len(part))
            answer(part, self._read([context[done:] for context in part], before))

    def _read(self, parts: Sequence[Ids], before: Reading | None) -> Reading:
        if not all(parts):
            raise InputError("A context has no tokens.")
        self.counts.read += sum(map(len, parts))
        tokens_BT, mask_BT = _padded(parts, next(self.text.model.parameters()).device)
        return prefill(
            self.text.model, tokens_BT, mask_BT, state=None if before is None else before.state, chunk=_PIECE
        )


def _families(contexts: list[Ids], done: int) -> list[list[Ids]]:
    """Neighbours that share at least `_SHARED` more tokens."""
    families: list[list[Ids]] = []
    for context in contexts:
        if families and _common(families[-1][0], context) >= done + _SHARED:
            families[-1].append(context)
        else:
            families.append([context])
    return families


def _common(first: Ids, second: Ids) -> int:
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _parts(values: list[Any], size: int) -> list[list[Any]]:
    return [values[begin : begin + size] for begin in range(0, len(values), size)]


def _rows(reading: Reading, rows: list[int]) -> Reading:
    index_B = torch.tensor(rows, device=reading.logits_BV.device)
    return Reading(reading.logits_BV[index_B], reading.state.select(index_B))


def _padded(parts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids, padded on the right, and where they are real; None where all are."""
    longest = max(map(len, parts))
    tokens_BT = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts], device=device)
    if all(len(part) == longest for part in parts):
        return tokens_BT, None
    length_B1 = torch.tensor([[len(part)] for part in parts], device=device)
    return tokens_BT, torch.arange(longest, device=device) < length_B1


_IGNORED = ("do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks", "max_new_tokens", "max_tokens")


def _settings(options: dict[str, Any]) -> tuple[tuple[str, ...], int, tuple[tuple[str, Any], ...]]:
    """Stop strings, most new tokens and how to sample, of the options of a task."""
    for name in options:
        if name not in _IGNORED:
            raise InputError(f"The task asks to generate with {shown(name)}, which is unknown: {', '.join(_IGNORED)}.")
    until = options.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    most = next(
        (int(options[name]) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in options), 256
    )
    sampled: list[tuple[str, Any]] = []
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        sampled = [(name, options[name]) for name in ("temperature", "top_p", "top_k") if name in options]
        sampled = sampled or [("temperature", 1.0)]
    return tuple(stop for stop in stops if stop), most, tuple(sampled)


# ---------------------------------------------------------------------- tasks


def evaluate_tasks(
    text: TextModel,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval.

    Args:
        text: the model and its tokenizer.
        tasks: names of lm-eval, or NAME=FILE for a local file (`LocalTask`).
        batch_size: rows read side by side.
        num_fewshot: examples before each question; None as the task says.
        limit: questions of each task; None for all.
        include: a directory with more tasks of lm-eval (YAML).

    Returns:
        `results` by task and metric, `versions`, `n-shot`, `n-samples`, as lm-eval gives them; `intervals` (95 %) of
        the same; `chance`: what a guess gets in a local task with choices; `tokens`: how many were asked and read.

    Raises:
        ConfigError: a task is unknown, or named twice; there are fewer questions in a file than examples are wanted.
        DataError: a local file cannot be read, or has no known form.
    """
    _check_names(tasks)
    local = [LocalTask(*task.split("=", 1)) if "=" in task else task for task in tasks]
    named = [task for task in local if isinstance(task, str)]
    # its own thousands of tasks take half a minute to list
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=bool(named))
    unknown = [task for task in named if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(map(shown, unknown))}: `lm-eval ls tasks` lists all. For a local file "
            "write NAME=FILE.jsonl."
        )
    for task in local:
        if isinstance(task, LocalTask):
            task.require_examples(num_fewshot)
    harness = Harness(text, batch_size=batch_size)
    run: Any = simple_evaluate  # its decorator hides what it takes
    found = run(
        model=harness,
        tasks=local,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,  # intervals are ours
    )
    results = {
        task: {key: value for key, value in values.items() if "_stderr" not in key}
        for task, values in found["results"].items()
    }
    return {
        "results": results,
        **{name: found[name] for name in ("versions", "n-shot", "n-samples") if name in found},
        "intervals": {
            task: _intervals(values, found["samples"][task])
            for task, values in results.items()
            if task in found["samples"]
        },
        "chance": {
            task.config.task: chance
            for task in local
            if isinstance(task, LocalTask) and (chance := task.questions.chance(limit)) is not None
        },
        "tokens": {"asked": harness.counts.asked, "read": harness.counts.read},
    }


def _check_names(tasks: Sequence[str]) -> None:
    """Refuse names that lm-eval would take for one: it keeps the last."""
    if not tasks:
        raise ConfigError("No task was named: give names of lm-eval's tasks, or NAME=FILE for local files.")
    seen: set[str] = set()
    for task in tasks:
        name, equals, file = task.partition("=")
        if not name or (equals and not file):
            raise ConfigError(f"{shown(task)} is no task: a local file must be NAME=FILE, for example arc=arc.jsonl.")
        if name in seen:
            raise ConfigError(f"The task {shown(name)} is named twice: give each file a name of its own.")
        seen.add(name)


def _truth(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """MC1: whether the best true choice is likelier than every false one; MC2: the share of all true ones."""
    share_C = torch.tensor([score for score, _ in results], dtype=torch.float64).softmax(-1)
    true_C = torch.tensor(doc["labels"], dtype=torch.bool)
    return {"mc1": float((share_C[0] > share_C[~true_C]).all()), "mc2": float(share_C[true_C].sum())}


def _document_and_ask(doc: dict[str, Any]) -> str:
    return doc["document"] + doc["ask"]


def _contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    said = results[0].lower()
    return {"contains": float(any(answer.lower() in said for answer in doc["answers"]))}


def _means(*metrics: str) -> dict[str, Any]:
    return {"metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]}


# Names of fields stand where lm-eval also takes templates: it would evaluate what a template makes of "[…]" or digits.
_KINDS: dict[Kind, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        **_means("acc", "acc_norm"),
    },
    "schema": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        **_means("acc"),
    },
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *_means("acc")["metric_list"],
        ],
    },
    "truth": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "num_fewshot": 0,  # its examples are in the question
        "process_results": _truth,
        **_means("mc1", "mc2"),
    },
    "recall": {
        "output_type": "generate_until",
        "doc_to_text": _document_and_ask,
        "doc_to_target": "answers",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48},
        "process_results": _contains,
        **_means("contains"),
    },
}


class LocalTask(ConfigurableTask):
    """A task of lm-eval whose questions are in a local file (`questions.read_questions`).

    * `choice`: accuracy, also of the likelihood per character (`acc_norm`);
    * `schema`: accuracy;
    * `continuation`: perplexity of the continuation, and how often greedy decoding gives it;
    * `truth`: `mc1` and `mc2` of TruthfulQA;
    * `recall`: up to 48 tokens or a line are generated; `contains` an answer, whatever the case.

    Raises:
        DataError: the file cannot be read or has no known form.
    """

    def __init__(self, name: str, file: str | Path) -> None:
        self.questions = read_questions(Path(file))
        options = _KINDS[self.questions.kind]
        super().__init__(config={"task": name, "test_split": "test", "fewshot_split": "test", **options})

    def require_examples(self, wanted: int | None) -> None:
        """Raise `ConfigError` unless so many questions can stand before each one; the kind `truth` takes none."""
        count = len(self.questions.items)
        if self.config.num_fewshot != 0 and (wanted or 0) >= count:
            raise ConfigError(
                f"{self.config.task} has {count} questions, so at most {count - 1} can stand as examples before each, "
                f"not {wanted}."
            )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The questions, as lm-eval holds them."""
        self.dataset = {"test": Dataset.from_list(self.questions.items)}


# ---------------------------------------------------------------------- intervals


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean of what each question gave.

    Where it is right or wrong (1 or 0) it is Wilson's (1927), which also says something where all are; else the normal
    one.
    """
    z, count, mean = 1.96, len(values), fmean(values)
    if set(values) <= {0, 1}:
        middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
        return max(0.0, middle - half), min(1.0, middle + half)
    half = z * stdev(values) / math.sqrt(count) if count > 1 else math.inf
    return mean - half, mean + half


def _intervals(results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of the metrics of a task that are means, or perplexities, of what its questions gave."""
    found: dict[str, list[float]] = {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        given: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
        if not given or not isinstance(value, float) or not all(isinstance(each, float | int) for each in given):
            continue
        values = [float(each) for each in given]
        bounds = interval(values)
        if not all(map(math.isfinite, bounds)):
            continue
        if math.isclose(fmean(values), value, rel_tol=1e-6, abs_tol=1e-9):
            found[key] = list(bounds)
        elif metric == "perplexity" and -bounds[0] < _LARGEST_EXPONENT:
            found[key] = [math.exp(-bounds[1]), math.exp(-bounds[0])]
    return found


_LARGEST_EXPONENT = 700  # of what a float can hold
