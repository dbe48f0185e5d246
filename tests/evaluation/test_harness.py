"""lm-eval on the native model: what it gives alone, in batches, and with shared beginnings read once."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, InputError
from taipan.evaluation.harness import Harness, evaluate_tasks, interval
from taipan.evaluation.questions import read_questions
from taipan.text import TextModel
from tests.command import run
from tests.models import small_model

FEWSHOT = "Question: is it so?\nAnswer: it is so.\n\n" * 6
QUESTIONS = [FEWSHOT + f"Question: {word}?\nAnswer:" for word in ("who", "whose dog", "what", "whatever it was", "why")]
PAIRS = [(question, answer) for question in QUESTIONS for answer in (" yes", " no, never", " it is so.")]
PAIRS += [("", "A text."), ("short", " one"), (QUESTIONS[0] + " yes", " and no"), ("x", " " + "long " * 420)]


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel(small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256), Tokenizer.bytes())


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def alone(text: TextModel, context: str, answer: str) -> tuple[float, bool]:
    """One forward over both."""
    before = text.tokenizer.encode(context) or [256]
    ids = torch.tensor([before + text.tokenizer.encode(answer)])
    log_TV = text.model(ids).logits[0].double().log_softmax(-1)[len(before) - 1 : -1]
    target_T = ids[0, len(before) :]
    return float(log_TV.gather(1, target_T[:, None]).sum()), bool((log_TV.argmax(-1) == target_T).all())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_likelihoods_are_those_of_one_forward_in_any_batch(batch_size: int, text: TextModel) -> None:
    harness = Harness(text, batch_size=batch_size)
    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in PAIRS])
    for pair, (score, greedy) in zip(PAIRS, found, strict=True):
        expected, likeliest = alone(text, *pair)
        assert score == pytest.approx(expected, rel=1e-5, abs=1e-4), pair
        assert greedy == likeliest
    texts = ["One text.", "Another one, " * 170]
    rolled = harness.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
    assert rolled == pytest.approx([alone(text, "", whole)[0] for whole in texts], rel=1e-5)


def test_what_questions_share_is_read_once(text: TextModel) -> None:
    harness = Harness(text, batch_size=2)
    harness.loglikelihood([request("loglikelihood", *pair) for pair in PAIRS[:15]])
    shared = len(FEWSHOT + "Question: wh")
    # the beginning once, the rest of every question once, of every answer all but the last token
    rest = sum(len(question) - shared for question in QUESTIONS)
    answers = 5 * sum(len(answer) - 1 for answer in (" yes", " no, never", " it is so."))
    assert harness.counts.read == shared + rest + answers
    assert harness.counts.asked == sum(len(context + answer) for context, answer in PAIRS[:15])
    assert harness.counts.asked > 9 * harness.counts.read


@pytest.mark.parametrize("batch_size", [1, 8])
def test_generated_text_ends_at_its_stop_and_is_that_of_the_model(batch_size: int, text: TextModel) -> None:
    harness, options = Harness(text, batch_size=batch_size), {"until": ["\n", "z"], "max_gen_toks": 12}
    found = harness.generate_until([request("generate_until", question, options) for question in QUESTIONS])
    for question, answer in zip(QUESTIONS, found, strict=True):
        prompt = torch.tensor([text.tokenizer.encode(question)])
        ids = text.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
        whole = text.tokenizer.decode([token for token in ids if token != 256])
        assert answer == whole.split("\n")[0].split("z")[0]
    with pytest.raises(InputError, match="num_beams"):
        harness.generate_until([request("generate_until", "a", {"num_beams": 4})])


def test_what_the_harness_cannot_do_is_refused(text: TextModel) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0, but must be at least 1"):
        Harness(text, batch_size=0)
    with pytest.raises(ConfigError, match="Chat templates are not applied here"):
        Harness(text).apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(InputError, match="A context has no tokens"):
        Harness(text)._loglikelihood_tokens([(("", "a"), [], [97])])


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "No task was named"),
        (["a=one.jsonl", "b=two.jsonl", "a=three.jsonl"], "'a' is named twice"),
        (["piqa", "piqa"], "'piqa' is named twice"),
        (["=one.jsonl"], "'=one.jsonl' .* must be NAME=FILE"),
        (["a="], "'a=' .* must be NAME=FILE"),
    ],
)
def test_tasks_that_would_be_lost_are_refused(tasks: list[str], words: str, text: TextModel) -> None:
    """lm-eval keeps the last of a name only."""
    with pytest.raises(ConfigError, match=words):
        evaluate_tasks(text, tasks)


def test_more_examples_than_there_are_questions_are_refused(text: TextModel, tmp_path: Path) -> None:
    tasks = [task for task in written(tmp_path) if task.startswith(("choice", "truth"))]
    with pytest.raises(ConfigError, match="choice has 3 questions, so at most 2 can stand as examples"):
        evaluate_tasks(text, tasks, num_fewshot=3)


LINES: dict[str, list[dict[str, Any]]] = {
    "choice": [{"query": "Is it?", "choices": ["it is", "never"], "gold": gold} for gold in (0, 1, 0)],
    "digits": [{"query": "12", "choices": ["[3]", "4"], "gold": 0}] * 2,  # what templates would evaluate
    "schema": [
        {"context_options": ["The dog because the dog", "The dog because it"], "continuation": "ran", "gold": 1}
    ],
    "word": [{"context": "In my palm is a", "continuation": word} for word in ("stone", "a", "dog")],
    "recall": [{"prompt": "The name is Ann. The name is", "answers": ["Ann"]}],
}
TRUTH = "Question,Best Answer,Correct Answers,Incorrect Answers\nIs it?,It is,It is; Yes,No; Never; [1]\n"


def written(directory: Path) -> list[str]:
    for name, lines in LINES.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "truth.csv").write_text(TRUTH)
    return [*(f"{name}={directory / name}.jsonl" for name in LINES), f"truth={directory}/truth.csv"]


@pytest.mark.slow
def test_local_files_are_tasks(text: TextModel, tmp_path: Path) -> None:
    results = [evaluate_tasks(text, written(tmp_path), batch_size=size) for size in (1, 8)]
    first, second = ({task: {**values} for task, values in result["results"].items()} for result in results)
    for task, values in first.items():
        for metric, value in values.items():
            assert value == second[task][metric] or value == pytest.approx(second[task][metric], rel=1e-4), metric
    assert set(first) == {*LINES, "truth"}
    right = [alone(text, "Is it?", " it is")[0] > alone(text, "Is it?", " never")[0]] * 3
    given = [float(a == b) for a, b in zip(right, (True, False, True), strict=True)]
    assert first["choice"]["acc,none"] == pytest.approx(sum(given) / 3)
    assert results[0]["intervals"]["choice"]["acc,none"] == pytest.approx(interval(given))
    assert results[0]["chance"] == {"choice": 0.5, "digits": 0.5, "schema": 0.5, "truth": 0.25}
    likelier = alone(text, "12", " [3]")[0] > alone(text, "12", " 4")[0]
    assert first["digits"]["acc,none"] == float(likelier)
    scores = [alone(text, context, " ran")[0] for context in LINES["schema"][0]["context_options"]]
    assert first["schema"]["acc,none"] == float(scores[1] > scores[0])
    scores = [alone(text, "In my palm is a", f" {line['continuation']}")[0] for line in LINES["word"]]
    assert first["word"]["perplexity,none"] == pytest.approx(math.exp(-sum(scores) / 3), rel=1e-4)
    bounds = [math.exp(-bound) for bound in reversed(interval(scores))]
    assert results[0]["intervals"]["word"]["perplexity,none"] == pytest.approx(bounds, rel=1e-4)
    assert first["recall"]["contains,none"] in (0.0, 1.0)
    (asked,) = read_questions(tmp_path / "truth.csv").items
    nats = torch.tensor([alone(text, asked["query"], f" {choice}")[0] for choice in asked["choices"]])
    assert asked["choices"] == ["It is", "Yes", "No", "Never", "[1]"]
    assert first["truth"]["mc1,none"] == float(nats[0] > nats[2:].max())
    assert first["truth"]["mc2,none"] == pytest.approx(float(nats.softmax(0)[:2].sum()), rel=1e-4)


def test_the_interval_of_a_share_is_wilsons() -> None:
    """Of none right among ten: 0 to 0.2775 (Newcombe 1998, method 3); of other means the normal one."""
    assert interval([0.0] * 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert interval([0.4, 0.5, 0.6]) == pytest.approx((0.5 - 1.96 * 0.1 / 3**0.5, 0.5 + 1.96 * 0.1 / 3**0.5))
    assert interval([0.5]) == (-math.inf, math.inf)


@pytest.mark.slow
def test_an_unknown_name_is_asked_about(text: TextModel) -> None:
    with pytest.raises(ConfigError, match="knows no task 'arc_esay'"):
        evaluate_tasks(text, ["arc_esay"])


def test_without_lm_eval_the_command_line_says_what_to_install(
    text: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.model.save_pretrained(tmp_path, text.tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finished = run("evaluate", tmp_path, "--tasks", "arc_easy")
    assert finished.code == 2
    assert "--tasks needs lm-eval, which is not installed: pip install '.[evaluate]'" in finished.err


@pytest.mark.slow
def test_the_command_line_asks_tasks(text: TextModel, tmp_path: Path) -> None:
    text.model.save_pretrained(tmp_path / "model", text.tokenizer)
    tasks = ",".join(written(tmp_path))
    finished = run("evaluate", tmp_path / "model", "--tasks", tasks, "--json", tmp_path / "result.json")
    assert finished.code == 0, finished
    assert "perplexity" in finished.out
    assert "0.5000" in finished.out  # a guess
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert set(result["results"]) == {*LINES, "truth"}
    one, other, *_ = written(tmp_path)
    again = run("evaluate", tmp_path / "model", "--tasks", one, "--tasks", other, "--json", tmp_path / "two.json")
    assert again.code == 0, again
    (two,) = json.loads((tmp_path / "two.json").read_text())["results"]
    assert set(two["results"]) == {task.partition("=")[0] for task in (one, other)}  # not the last one alone
    assert run("evaluate", tmp_path / "model").code == 2
    assert "one of the two" in run("evaluate", tmp_path / "model", tmp_path, "--tasks", tasks).err
