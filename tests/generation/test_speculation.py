"""Speculative decoding: a draft changes how many calls a text takes, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan import TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError
from taipan.generation import GenerationSettings, LookupDraft, ModelDraft, prefill, stream
from taipan.generation.choosing import Chooser
from taipan.text import TextModel
from tests.command import run
from tests.models import VOCAB, random_tokens, small_model
from tests.tokenizers import byte_level

pytestmark = pytest.mark.unchecked_shapes  # test_decoding.py checks the same calls

STACKS = ["taipan", "jamba", "mamba2", "transformer"]
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": 3, "repetition_penalty": 1.1}


class Scripted:
    """A draft that says what it is told, whatever was written; counts nothing itself."""

    def __init__(self, model: TaipanLM, prompt: Tensor, right: list[int], options: dict[str, Any]) -> None:
        text = model.generate(prompt, max_new_tokens=64, eos_token_id=(), **options)[0, prompt.shape[1] :]
        self.text, self.script, self.at = text.tolist(), list(right), 0
        self.tokens, self.guessed, self.right = 4, 0, 0

    def hear(self, tokens_BT: Tensor, real_BT: Tensor | None = None) -> None:
        pass

    def guess(self, written: list[int], most: int, choose: Chooser) -> list[int]:
        self.at += len(written)
        if not self.script or (count := self.script.pop(0)) < 0:
            return []
        guesses = self.text[self.at : self.at + most]
        return [token if place < count else (token + 1) % VOCAB for place, token in enumerate(guesses)]


def write(model: Any, prompt: Any, draft: Any = None, **options: Any) -> list[int]:
    return [int(step.tokens_B[0]) for step in stream(model, prompt, draft=draft, eos_token_id=(), **options)]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stack", STACKS)
def test_any_mix_of_right_and_wrong_guesses_gives_the_same_text(stack: str, options: dict[str, Any]) -> None:
    """Guesses that are right for 0, 1, … 4 tokens, or none at all (-1), one after another."""
    model = small_model(stack)
    prompt = random_tokens(1, 20)
    expected = write(model, prompt, max_new_tokens=40, **options)
    draft = Scripted(model, prompt, [0, 4, 4, 1, -1, 2, -1, -1, 3, 0, 0, 4], options)
    calls = [0]
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    model.forward = counted
    assert write(model, prompt, draft, max_new_tokens=40, **options) == expected
    assert draft.right >= 4 + 4 + 1 + 2 + 3
    assert calls[0] < 40


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lookup", [False, True])
def test_real_drafts_give_the_text_of_the_model_alone(lookup: bool, options: dict[str, Any]) -> None:
    model, other = small_model(), small_model("mamba2", seed=1)
    prompt = random_tokens(1, 12).repeat(1, 3)
    expected = write(model, prompt, max_new_tokens=30, prefill_chunk=7, **options)
    for draft in (LookupDraft(), LookupDraft(3, 1)) if lookup else (ModelDraft(model, 3), ModelDraft(other, 5)):
        assert write(model, prompt, draft, max_new_tokens=30, prefill_chunk=7, **options) == expected
        assert draft.guessed >= draft.right


def test_a_draft_that_is_the_model_itself_is_right_with_the_same_random_numbers() -> None:
    model, prompt = small_model(), random_tokens(1, 20)
    draft = ModelDraft(model, 4)
    write(model, prompt, draft, max_new_tokens=31, **SAMPLED)
    assert draft.guessed == draft.right == 24  # of every five tokens four


def test_a_lookup_finds_what_followed() -> None:
    draft = LookupDraft(tokens=3, longest=2)
    choose = Chooser(GenerationSettings(), VOCAB)
    draft.hear(torch.tensor([[1, 2, 3, 4, 9, 2, 5]]))
    assert draft.guess([1, 2], 3, choose) == [3, 4, 9]  # after "1 2", not after the later "9 2"
    assert draft.guess([7], 3, choose) == []
    assert draft.guess([9], 2, choose) == [2, 5]
    assert LookupDraft().guess([1], 3, choose) == []


def test_it_goes_on_from_a_state_and_every_step_knows_its_own() -> None:
    model, prompt = small_model(), random_tokens(1, 20)
    before = prefill(model, prompt)
    expected = write(model, prompt, max_new_tokens=12)
    for tokens, state in ((before, None), (torch.tensor([expected[:1]]), before.state)):
        written = write(model, tokens, ModelDraft(model), state=state, max_new_tokens=11)
        assert written == (expected[:11] if state is None else expected[1:])
    draft = Scripted(model, prompt, [4, 2, 0, 4], {})
    steps = stream(model, prompt, draft=draft, max_new_tokens=12, eos_token_id=())
    read: list[int] = []
    kept = []
    for step in steps:
        read.append(int(step.tokens_B[0]))
        kept.append(step)
        own = prefill(model, torch.cat([prompt, torch.tensor([read])], 1))
        torch.testing.assert_close(step.reading.logits_BV, own.logits_BV, rtol=1e-5, atol=1e-5)
    third = prefill(model, torch.cat([prompt, torch.tensor([read[:3]])], 1))
    torch.testing.assert_close(kept[2].reading.logits_BV, third.logits_BV, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_a_draft_is_refused() -> None:
    model, prompt = small_model(), random_tokens(1, 4)
    with pytest.raises(InputError, match="The draft knows 11 token ids, but the model 61"):
        stream(model, prompt, draft=ModelDraft(small_model(vocab_size=11)))
    with pytest.raises(InputError, match="one text, but the prompt has 2 rows"):
        stream(model, prompt.repeat(2, 1), draft=LookupDraft())
    with pytest.raises(InputError, match="choose one"):
        stream(small_model(dtype=torch.float32), prompt, draft=LookupDraft(), weights="int8")
    with pytest.raises(InputError, match="guesses 0 tokens"):
        LookupDraft(0)
    text = TextModel(small_model(vocab_size=257, eos_token_id=256), Tokenizer.bytes())
    backend, end = byte_level()
    with pytest.raises(InputError, match="another tokenizer"):
        text.generate("a", draft=TextModel(small_model(vocab_size=257), Tokenizer(backend, end)))


def texts() -> tuple[TextModel, TextModel]:
    model = TextModel(small_model(vocab_size=257, eos_token_id=256, dtype=torch.float32), Tokenizer.bytes())
    return model, TextModel(small_model("mamba2", vocab_size=257, dtype=torch.float32), Tokenizer.bytes())


def test_text_is_the_same_with_a_draft() -> None:
    model, small = texts()
    expected = model.generate("one two one two", max_new_tokens=24)
    assert model.generate("one two one two", max_new_tokens=24, draft=small) == expected
    assert model.generate("one two one two", max_new_tokens=24, draft=LookupDraft()) == expected


@pytest.mark.slow
def test_the_command_line_writes_the_same_with_a_draft(tmp_path: Path) -> None:
    model, small = texts()
    model.model.save_pretrained(tmp_path / "model", model.tokenizer)
    small.model.save_pretrained(tmp_path / "small", small.tokenizer)
    said = ["generate", tmp_path / "model", "one two one two", "--max-new-tokens", "24"]
    expected = run(*said).out
    for draft in ("lookup", str(tmp_path / "small")):
        ran = run(*said, "--draft", draft)
        assert ran.out == expected
        assert "guesses right" in ran.err
