"""The tasks of lm-eval on a native model: contexts of any length by state, and what texts share is read once.

lm-eval asks for likelihoods of continuations and for generated text. Here the contexts of all questions are a tree: a
beginning that several share (few-shot examples, a passage, the question of several answers) is read once, and its state
is forked. Nothing is ever cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from taipan.errors import ConfigError, DataError, InputError, brief, shown
from taipan.generation import GenerationSettings, Reading, inference, prefill
from taipan.generation import stream as stream_tokens
from taipan.io import parse_json_object
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
                ids[row].append(int(step.tokens_B[row]))
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
        tasks: names of lm-eval, or NAME=FILE for a local file of JSON lines (`local_task`).
        batch_size: rows read side by side.
        num_fewshot: examples before each question; None as the task says.
        limit: questions of each task; None for all.
        include: a directory with more tasks of lm-eval (YAML).

    Returns:
        `results` by task and metric, `versions`, `n-shot`, `n-samples`, as lm-eval gives them, and `tokens`: how many
        were asked and read.

    Raises:
        ConfigError: a task is unknown.
        DataError: a local file cannot be read, or its lines are of no known form.
    """
    local = [local_task(*task.split("=", 1)) if "=" in task else task for task in tasks]
    named = [task for task in local if isinstance(task, str)]
    # its own thousands of tasks take half a minute to list
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=bool(named))
    unknown = [task for task in named if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(map(shown, unknown))}: `lm-eval ls tasks` lists all. For a local file "
            "write NAME=FILE.jsonl."
        )
    harness = Harness(text, batch_size=batch_size)
    run: Any = simple_evaluate  # its decorator hides what it takes
    found = run(
        model=harness,
        tasks=local,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
    )
    kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    return {**kept, "tokens": {"asked": harness.counts.asked, "read": harness.counts.read}}


_FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
        "metric_list": [{"metric": "acc"}],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",  # of this kind of task lm-eval adds no space
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    ("prompt", "answers"): {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48},
    },
}


def local_task(name: str, file: str) -> dict[str, Any]:
    """The configuration of a task over a local file of JSON lines, recognised by what its first line holds.

    * `query`, `choices`, `gold`: the likeliest choice is the answer (also by likelihood per byte);
    * `context_options`, `continuation`, `gold`: which context makes the continuation likeliest (Winograd schemas);
    * `context`, `continuation`: the continuation's perplexity, and whether greedy decoding gives it (LAMBADA);
    * `prompt`, `answers`: up to 48 generated tokens or a line; right if they contain an answer, whatever the case
      (FDA, SWDE, SQuAD completion).

    Raises:
        DataError: the file cannot be read, or its first line is of another form.
    """
    path = Path(file)
    try:
        with path.open("rb") as opened:
            first = opened.readline()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    keys = set(parse_json_object(first, f"{path}, line 1"))
    form = next((form for form in _FORMS if set(form) <= keys), None)
    if form is None:
        forms = "; ".join(", ".join(names) for names in _FORMS)
        raise DataError(
            f"{path} holds {brief(', '.join(sorted(keys)))} in its first line, which is no known form of a task. "
            f"Known: {forms}. See docs/huggingface.md."
        )
    values: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "fewshot_split": "test",
        **_FORMS[form],
    }
    if form == ("prompt", "answers"):
        values["process_results"] = _contains
        values["metric_list"] = [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}]
    return values


def _contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    said = results[0].lower()
    return {"contains": float(any(str(answer).lower() in said for answer in doc["answers"]))}
