"""A conversation: nothing is read twice, and what is known is what reading all of it again would give."""

from pathlib import Path

import pytest
import torch

from taipan.chat import Conversation, PlainFormat
from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError, StateError
from taipan.generation import GenerationSettings, prefill
from taipan.model import TaipanLM
from taipan.sessions import Session
from taipan.text import TextModel
from tests.models import small_model
from tests.tokenizers import TEXTS

GREEDY = GenerationSettings(max_new_tokens=9)
SAMPLED = GenerationSettings(max_new_tokens=400, do_sample=True, seed=3, eos_token_id=())


@pytest.fixture(scope="module")
def model() -> TextModel:
    return TextModel(small_model("taipan", vocab_size=257, dtype=torch.float32), Tokenizer.bytes())


@pytest.fixture
def talk(model: TextModel) -> Conversation:
    return Conversation(model, PlainFormat(model.tokenizer), "Be brief.")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward call."""
    counts: list[int] = []
    forward = TaipanLM.forward
    monkeypatch.setattr(
        TaipanLM,
        "forward",
        lambda self, tokens, *a, **k: counts.append(tokens.shape[1]) or forward(self, tokens, *a, **k),
    )
    return counts


def assert_knows(talk: Conversation, session: Session) -> list[int]:
    """A saved conversation knows what a fresh reading of its tokens gives."""
    ids = session.ids()
    assert len(ids) == talk.tokens == session.tokens
    known = session.state
    assert known is not None
    expected = prefill(session.model.model, torch.tensor([ids]))
    torch.testing.assert_close(known.logits_BV, expected.logits_BV, atol=1e-4, rtol=1e-4)
    for name, tensor in expected.state.tensors().items():
        torch.testing.assert_close(known.decoder.tensors()[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    return ids


def test_a_turn_reads_only_what_is_new(talk: Conversation, read: list[int]) -> None:
    list(talk.say("Hello", GREEDY))
    assert sum(count for count in read if count > 1) == len("Be brief.\nUser: Hello\nAssistant:")
    read.clear()
    list(talk.say("And?", GREEDY))
    assert sum(count for count in read if count > 1) == len("\nUser: And?\nAssistant:")


def test_a_conversation_is_what_its_tokens_say(talk: Conversation, tmp_path: Path) -> None:
    answers = ["".join(talk.say(text, GREEDY)) for text in ("Hello", "And?")]
    ids = assert_knows(talk, talk.save(tmp_path / "talk"))
    assert bytes(ids).decode(errors="replace") == (
        f"Be brief.\nUser: Hello\nAssistant:{answers[0]}\nUser: And?\nAssistant:{answers[1]}"
    )


def test_undo_and_fork(talk: Conversation, tmp_path: Path) -> None:
    list(talk.say("Hello", GREEDY))
    one = talk.tokens
    answer = list(talk.say("And?", GREEDY))
    fork = talk.fork()
    assert talk.undo() == "And?"
    assert (talk.tokens, talk.exchanges, fork.exchanges) == (one, 1, 2)
    assert list(talk.say("And?", GREEDY)) == answer
    list(fork.say("More?", GREEDY))
    assert_knows(fork, fork.save(tmp_path / "fork"))
    for _ in range(2):
        talk.undo()
    assert (talk.tokens, fork.exchanges) == (0, 3)
    with pytest.raises(InputError, match="nothing to take back"):
        talk.undo()
    with pytest.raises(InputError, match="nothing to save"):
        talk.save(tmp_path / "nothing")


def test_a_stopped_answer_is_kept_as_far_as_it_came(talk: Conversation, tmp_path: Path) -> None:
    answer = talk.say("Hello", SAMPLED)
    told = "".join(next(answer) for _ in range(5))
    answer.close()
    assert talk.exchanges == 1
    ids = assert_knows(talk, talk.save(tmp_path / "talk"))
    assert bytes(ids).decode(errors="replace").partition("Assistant:")[2].startswith(told)
    talk.say("never asked for").close()
    assert talk.exchanges == 1


@pytest.mark.parametrize("length", [1, 2])
def test_an_answer_ends_where_the_next_turn_would_begin(model: TextModel, tmp_path: Path, length: int) -> None:
    """The text of a stop string is no part of the answer, but may have been written: it is not written twice."""
    form = PlainFormat(model.tokenizer)
    probe = Conversation(model, form)
    told = "".join(probe.say("Hello", GenerationSettings(max_new_tokens=12, eos_token_id=())))
    form.stop_strings = (told[4 : 4 + length],)  # pyright: ignore[reportAttributeAccessIssue]
    talk = Conversation(model, form)
    settings = GenerationSettings(max_new_tokens=12, eos_token_id=())
    assert "".join(talk.say("Hello", settings)) == told[: told.index(form.stop_strings[0])]
    list(talk.say("And?", settings))
    assert_knows(talk, talk.save(tmp_path / "talk"))


def test_a_token_that_goes_beyond_the_end_of_an_answer_is_taken_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(TEXTS, 330)
    model = TextModel(small_model("taipan", vocab_size=tokenizer.vocab_size, dtype=torch.float32), tokenizer)
    form = PlainFormat(tokenizer)
    settings = GenerationSettings(max_new_tokens=300, do_sample=True, seed=1, temperature=3.0, eos_token_id=())
    probe = Conversation(model, form)
    list(probe.say("x", settings))
    session = probe.save(tmp_path / "probe")
    ids = session.ids()
    long = next(place for place in range(12, len(ids)) if len(tokenizer.decode([ids[place]])) > 2)
    stop = tokenizer.decode([ids[long]])[:2]
    form.stop_strings = (stop,)  # pyright: ignore[reportAttributeAccessIssue]
    talk = Conversation(model, form)
    told = "".join(talk.say("x", settings))
    assert tokenizer.decode(assert_knows(talk, talk.save(tmp_path / "talk"))) == f"User: x\nAssistant:{told}"


def test_a_saved_conversation_goes_on_and_back(talk: Conversation, tmp_path: Path, read: list[int]) -> None:
    for text in ("One", "Two", "Three"):
        list(talk.say(text, GREEDY))
    session = talk.save(tmp_path / "talk", model_path=tmp_path)
    assert session.manifest.marks.keys() == {"turn_0", "turn_1", "turn_2", "turn_3"}
    read.clear()
    again = Conversation.of(Session.open(tmp_path / "talk", talk.model), talk.form)
    assert (again.exchanges, again.tokens) == (3, talk.tokens)
    assert list(again.say("Four", GREEDY)) == list(talk.say("Four", GREEDY))
    assert_knows(again, again.save(tmp_path / "talk"))
    for _ in range(3):
        again.undo()
        talk.undo()
    assert again.tokens == talk.tokens
    read.clear()
    answer = list(again.say("Else", GREEDY))
    session = again.save(tmp_path / "talk")
    assert sum(count for count in read if count > 1) == len("\nUser: Else\nAssistant:")
    assert_knows(again, session)
    assert list(talk.say("Else", GREEDY)) == answer
    assert session.turns == [0, *session.turns[1:]]
    assert len(session.turns) == 3


def test_a_conversation_about_a_text_that_was_read(talk: Conversation, tmp_path: Path) -> None:
    book = Session.create(tmp_path / "book", talk.model)
    book.append("A book of some length.\n")
    before = book.ids()
    about = Conversation.of(book, talk.form)
    assert (about.exchanges, about.tokens) == (0, len(before))
    list(about.say("What was it?", GREEDY))
    saved = about.save(tmp_path / "talk")
    assert assert_knows(about, saved)[: len(before)] == before
    assert Session.open(tmp_path / "book", talk.model).ids() == before
    about.undo()
    list(about.say("Again?", GREEDY))
    assert_knows(about, about.save(tmp_path / "talk"))
    with pytest.raises(StateError, match="there already"):
        about.save(tmp_path / "book")


def test_of_many_turns_the_last_ones_are_marked(model: TextModel, tmp_path: Path) -> None:
    talk = Conversation(model, PlainFormat(model.tokenizer))
    for number in range(20):
        list(talk.say(str(number), GenerationSettings(max_new_tokens=2)))
    session = talk.save(tmp_path / "talk")
    assert [name for name in session.manifest.marks if name.startswith("turn_")] == [f"turn_{n}" for n in range(4, 21)]
    again = Conversation.of(Session.open(tmp_path / "talk", model), talk.form)
    assert (again.exchanges, again.tokens) == (16, talk.tokens)
    assert list(again.say("x", GREEDY)) == list(talk.say("x", GREEDY))
    for _ in range(17):
        again.undo()
    for _ in range(17):
        talk.undo()
    assert list(again.say("y", GREEDY)) == list(talk.say("y", GREEDY))
