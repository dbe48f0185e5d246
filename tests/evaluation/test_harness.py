"""lm-eval on the native model: what it gives alone, in batches, and with shared beginnings read once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, DataError, InputError
from taipan.evaluation.harness import Harness, evaluate_tasks, local_task
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


LINES: dict[str, list[dict[str, Any]]] = {
    "choice": [{"query": "Is it?", "choices": ["it is", "never"], "gold": gold} for gold in (0, 1, 0)],
    "schema": [
        {"context_options": ["The dog because the dog", "The dog because it"], "continuation": "ran", "gold": 1}
    ],
    "word": [{"context": "In my palm is a", "continuation": "stone"}],
    "recall": [{"prompt": "The name is Ann. The name is", "answers": ["Ann"]}],
}


def written(directory: Path) -> list[str]:
    for name, lines in LINES.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"{name}={directory / name}.jsonl" for name in LINES]


@pytest.mark.slow
def test_local_files_are_tasks(text: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = [evaluate_tasks(text, written(tmp_path), batch_size=size) for size in (1, 8)]
    first, second = ({task: {**values} for task, values in result["results"].items()} for result in results)
    for task, values in first.items():
        for metric, value in values.items():
            assert value == second[task][metric] or value == pytest.approx(second[task][metric], rel=1e-4), metric
    assert set(first) == set(LINES)
    right = [alone(text, "Is it?", " it is")[0] > alone(text, "Is it?", " never")[0]] * 3
    assert first["choice"]["acc,none"] == pytest.approx(
        sum(a == b for a, b in zip(right, (True, False, True), strict=True)) / 3
    )
    scores = [alone(text, context, " ran")[0] for context in LINES["schema"][0]["context_options"]]
    assert first["schema"]["acc,none"] == float(scores[1] > scores[0])
    assert first["word"]["perplexity,none"] == pytest.approx(
        2.718281828459045 ** -alone(text, "In my palm is a", " stone")[0], rel=1e-4
    )
    assert first["recall"]["contains,none"] in (0.0, 1.0)


def test_what_is_no_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(DataError, match=r"holds question in its first line, which is no known form"):
        local_task("odd", str(tmp_path / "odd.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        local_task("odd", str(tmp_path / "none.jsonl"))


@pytest.mark.slow
def test_an_unknown_name_is_asked_about(text: TextModel) -> None:
    with pytest.raises(ConfigError, match="knows no task 'arc_esay'"):
        evaluate_tasks(text, ["arc_esay"])


@pytest.mark.slow
def test_the_command_line_asks_tasks(text: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text.model.save_pretrained(tmp_path / "model", text.tokenizer)
    tasks = ",".join(written(tmp_path))
    finished = run("evaluate", tmp_path / "model", "--tasks", tasks, "--json", tmp_path / "result.json")
    assert finished.code == 0, finished
    assert "perplexity" in finished.out
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert set(result["results"]) == set(LINES)
    assert run("evaluate", tmp_path / "model").code == 2
    assert "one of the two" in run("evaluate", tmp_path / "model", tmp_path, "--tasks", tasks).err
