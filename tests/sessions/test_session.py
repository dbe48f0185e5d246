"""Sessions: after any operations, what reading everything again would have given."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from taipan import TaipanLM
from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError, StateError
from taipan.generation import GenerationSettings, Reading, generate, prefill
from taipan.sessions import ObjectStore, ReadingCache, Session, SessionBusyError
from taipan.sessions.manifest import Segment
from taipan.state import DecoderState
from taipan.text import TextModel
from tests.models import random_tokens, small_model

TEXT = "A text of some length, read in pieces. " * 3
GREEDY = GenerationSettings(max_new_tokens=6, eos_token_id=())


def text_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> TextModel:
    return TextModel(small_model("taipan", vocab_size=257, dtype=dtype, seed=seed), Tokenizer.bytes())


@pytest.fixture(scope="module")
def model() -> TextModel:
    return text_model()


@pytest.fixture
def session(tmp_path: Path, model: TextModel) -> Session:
    made = Session.create(tmp_path / "doc.session", model, every=30, most=2)
    made.append(TEXT, piece=11)
    return made


def assert_knows(session: Session, ids: list[int]) -> None:
    """The session's tokens are these, and what it knows is what a fresh reading of them gives."""
    assert session.tokens == len(ids)
    assert session.ids() == ids
    known = session.state
    if known is None:
        assert not ids
        return
    expected = prefill(session.model.model, torch.tensor([ids]))
    assert known.last == tuple(ids[-64:])
    torch.testing.assert_close(known.logits_BV, expected.logits_BV, atol=1e-4, rtol=1e-4)
    found, wanted = known.decoder.tensors(), expected.state.tensors()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def reopened(session: Session) -> Session:
    return Session.open(session.directory, session.model)


def test_an_opened_session_knows_what_was_read(session: Session) -> None:
    ids = list(TEXT.encode())
    assert_knows(session, ids)
    assert_knows(reopened(session), ids)


def test_the_first_token_after_opening_reads_nothing_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(session.model.model, torch.tensor([session.ids()]), settings=GREEDY)[
        0, session.tokens :
    ].tolist()
    again = reopened(session)
    read: list[int] = []
    forward = TaipanLM.forward
    monkeypatch.setattr(
        TaipanLM,
        "forward",
        lambda self, tokens, *a, **k: read.append(tokens.shape[1]) or forward(self, tokens, *a, **k),
    )
    answer = again.ask(settings=GREEDY)
    assert list(answer.tokens) == expected
    assert read in ([], [1] * 5)  # only new tokens, where the native step does not read them


def test_the_bytes_of_a_state_are_hashed_once_when_it_is_opened(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(_: object) -> str:
        raise AssertionError

    opened, model = reopened(session), session.model.model
    monkeypatch.setattr("taipan.state._checksum", again)
    assert opened.state is not None
    file = session.directory / "objects" / f"{session.manifest.snapshots[-1].state}.safetensors"
    with pytest.raises(AssertionError):  # whom nobody has told that it is whole computes it
        DecoderState.load(file, model)


def test_opening_reads_as_much_of_a_long_text_as_of_a_short_one(
    tmp_path: Path, model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last state, the logits of the next token and the last tokens: no other object is touched, none grows."""
    opened: list[tuple[str, int]] = []
    check = ObjectStore.check

    def noted(self: ObjectStore, digest: str) -> None:
        opened.append((digest, self.path(digest).stat().st_size))
        check(self, digest)

    monkeypatch.setattr(ObjectStore, "check", noted)
    read: list[dict[str, int]] = []
    ids = random_tokens(1, 80_000)[0].tolist()
    for length in (10_000, 80_000):
        made = Session.create(tmp_path / str(length), model)
        known = prefill(model.model, torch.tensor([ids[:100]]))
        made.extend(ids[:length], known)  # as a server does with a prompt of any length
        opened.clear()
        again = reopened(made)
        again.ask(settings=GREEDY)
        state, logits, tokens = (found[digest] for found in [dict(opened)] for digest in (
            again.manifest.snapshots[-1].state, again.manifest.snapshots[-1].logits, again.manifest.segments[-1].ids
        ))  # fmt: skip
        assert len(opened) == 3
        assert tokens <= 2 * 32_768 + 200
        read.append({"state": state, "logits": logits})
        assert again.ids() == ids[:length]
        assert made.nbytes - state - logits < 2 * length + 1000  # two bytes for each token, and nothing else
    assert read[0] == read[1]


def test_ids_beyond_two_bytes_take_four(tmp_path: Path) -> None:
    large = TextModel(small_model("taipan", vocab_size=70_000), Tokenizer.bytes())
    made = Session.create(tmp_path / "s", large)
    made.append_tokens([[1, 69_999, 65_536, 7]])
    assert reopened(made).ids() == [1, 69_999, 65_536, 7]
    assert made.rollback(3) == 3
    assert reopened(made).ids() == [1, 69_999, 65_536]


def test_tokens_in_four_bytes_are_read_as_ever(session: Session) -> None:
    ids = session.ids()
    objects = ObjectStore.of(session.directory)
    wide = Segment(len(ids), objects.put({"ids": torch.tensor(ids, dtype=torch.int32)}))
    replace(session.manifest, segments=(wide,)).save(session.directory)
    again = reopened(session)
    again.append("x")
    assert_knows(again, [*ids, ord("x")])


def test_what_is_looked_at_together_is_of_one_moment(session: Session) -> None:
    looking = reopened(session)
    seen: list[int] = []

    def look() -> tuple[list[int], list[int]]:
        seen.append(looking.tokens)
        first = looking.ids(0, 10)
        if len(seen) == 1:
            session.rollback(0)
            session.append("Something else was read.")
        return first, looking.ids(0, 20)

    first, second = looking.as_it_is(look)
    assert second[:10] == first == list(b"Something ")
    assert seen == [len(TEXT), session.tokens]


def test_a_question_leaves_the_session_as_it_was_unless_kept(session: Session) -> None:
    before = {path: path.read_bytes() for path in session.directory.rglob("*") if path.is_file()}
    ids = session.ids()
    said: list[str] = []
    answer = session.ask("And now?", said=said.append, settings=GREEDY)
    assert "".join(said) == answer.text
    assert {path: path.read_bytes() for path in session.directory.rglob("*") if path.is_file()} == before
    assert session.ask("And now?", keep=True, settings=GREEDY) == answer
    assert_knows(session, [*ids, *b"And now?", *answer.tokens])


def test_an_empty_session_and_an_empty_question(tmp_path: Path, model: TextModel) -> None:
    session = Session.create(tmp_path / "s", model)
    with pytest.raises(InputError, match="no tokens"):
        session.ask(settings=GREEDY)
    assert session.ask("x", settings=GREEDY).tokens


def test_rolling_back_reads_only_what_lies_behind_the_nearest_snapshot(session: Session) -> None:
    ids = session.ids()
    session.mark("here")
    session.append("More.")
    assert session.rollback("here") == 0
    assert_knows(session, ids)
    every = session.manifest.every
    for place in (57, 33, 9, 0):
        assert session.rollback(place) < 2 * every
        assert_knows(reopened(session), ids[:place])


def test_snapshots_are_bounded_and_spread_out(session: Session) -> None:
    for _ in range(8):
        session.append("twenty more letters.")
    places = [snapshot.tokens for snapshot in session.manifest.snapshots]
    assert len(places) <= session.manifest.most + 1
    assert max(b - a for a, b in zip([0, *places], places, strict=False)) <= 3 * session.manifest.every
    objects = set(os.listdir(session.directory / "objects"))
    assert objects == {f"{digest}.safetensors" for digest in session.manifest.objects}  # nothing is left over


def test_a_fork_shares_its_files_and_goes_its_own_way(session: Session, tmp_path: Path) -> None:
    ids = session.ids()
    fork = session.fork(tmp_path / "fork")
    for digest in session.manifest.objects:
        name = f"objects/{digest}.safetensors"
        assert (fork.directory / name).samefile(session.directory / name)
    fork.append("b")
    session.append("a")
    assert_knows(reopened(fork), [*ids, *b"b"])
    assert_knows(reopened(session), [*ids, *b"a"])


def test_marks(session: Session) -> None:
    session.mark("one")
    place = session.tokens
    session.append("xyz")
    session.mark("two")
    assert session.manifest.marks == {"one": place, "two": place + 3}
    session.rollback("one")
    assert reopened(session).manifest.marks == {"one": place}
    for name in ("12", "", "a b", "x" * 65):
        with pytest.raises(StateError, match="cannot name a mark"):
            session.mark(name)
    with pytest.raises(StateError, match=r"no mark 'three'; its marks: one"):
        session.rollback("three")
    with pytest.raises(StateError, match="no place in it"):
        session.rollback(place + 1)


def test_another_model_and_another_tokenizer_are_refused(session: Session) -> None:
    with pytest.raises(StateError, match="belongs to another model"):
        Session.open(session.directory, text_model(seed=1))
    other = TextModel(session.model.model, Tokenizer.train_bpe(["a b c a b c"], 300))
    with pytest.raises(StateError, match="another tokenizer"):
        Session.open(session.directory, other)


def test_damage_is_refused_by_name(session: Session, tmp_path: Path) -> None:
    session.mark("here")
    for number, file in enumerate(sorted((session.directory / "objects").iterdir())):
        copy = tmp_path / str(number)
        shutil.copytree(session.directory, copy)
        target = copy / "objects" / file.name
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
        with pytest.raises(StateError, match=file.name):
            Session.open(copy, session.model).verify()
        target.write_bytes(data[:-1])
        with pytest.raises(StateError, match=file.name):
            Session.open(copy, session.model).verify()
        target.unlink()
        with pytest.raises(StateError, match="does not exist"):
            Session.open(copy, session.model).verify()
    session.verify()


def edited(text: str, change: tuple[str, str]) -> str:
    assert change[0] in text
    return text.replace(*change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"most": 2', '"most": 5'), "checksum"),
        (('"version": 1', '"version": 2'), "version 2"),
        (('"taipan-session"', '"other"'), "not the record of a session"),
        (('"marks"', '"marks"]'), "cannot be read as JSON"),
    ],
)
def test_an_edited_record_is_refused(session: Session, change: tuple[str, str], message: str) -> None:
    file = session.directory / "session.json"
    file.write_text(edited(file.read_text(), change))
    with pytest.raises(StateError, match=message):
        reopened(session)


def test_one_changes_it_at_a_time(session: Session) -> None:
    with session.changing():
        with pytest.raises(SessionBusyError, match=rf"being changed by this process {os.getpid()} on .*, since 20"):
            reopened(session).append("x")
        assert reopened(session).ask("x", settings=GREEDY).tokens  # who only reads need not wait
    reopened(session).append("x")


def test_several_changes_are_one_for_the_others(session: Session) -> None:
    ids = session.ids()
    before = reopened(session)
    reopened(session).append("seen by who holds the lock: ")
    with before.changing():
        assert before.tokens == len(ids) + 28
        before.mark("here")
        before.append("x")
        with pytest.raises(SessionBusyError):
            reopened(session).mark("there")
    assert reopened(session).manifest.marks == {"here": len(ids) + 28}


def test_what_was_read_elsewhere_is_added(session: Session) -> None:
    ids = session.ids()
    known = session.state
    assert known is not None
    more = list(b"more")
    session.extend(more, prefill(session.model.model, torch.tensor([more]), state=known.decoder))
    assert_knows(reopened(session), [*ids, *more])


def test_a_shared_cache_is_bounded_and_saves_the_disk(session: Session, tmp_path: Path) -> None:
    one = reopened(session).state
    assert one is not None
    assert one.logits_BV is not None
    cache = ReadingCache(2 * (one.nbytes + one.logits_BV.nbytes))
    paths = [session.directory, *(session.fork(tmp_path / str(number)).directory for number in range(3))]
    for number, path in enumerate(paths):
        opened = Session.open(path, session.model, cache=cache)
        opened.append("x" * (number + 1))
        assert cache.nbytes <= 2 * (one.nbytes + one.logits_BV.nbytes)
    assert len(cache) == 2
    last = Session.open(paths[-1], session.model, cache=cache)
    for snapshot in last.manifest.snapshots[-1:]:
        (paths[-1] / "objects" / f"{snapshot.state}.safetensors").unlink()
    assert last.state is not None
    with pytest.raises(StateError, match="does not exist"):
        print(reopened(last).state)


def test_who_reads_may_be_somebody_else(session: Session) -> None:
    ids = session.ids()
    read: list[int] = []

    def elsewhere(new: list[int], before: Reading | None) -> Reading:
        read.extend(new)
        state = None if before is None else before.state
        return prefill(session.model.model, torch.tensor([new]), state=state)

    own = Session.open(session.directory, session.model, read=elsewhere)
    own.append("more")
    own.rollback(len(ids) + 2)
    assert bytes(read).startswith(b"more")
    assert_knows(reopened(session), [*ids, *b"mo"])


def test_a_deleted_session_is_gone_for_everyone(session: Session) -> None:
    other = reopened(session)
    with other.changing(), pytest.raises(SessionBusyError):
        session.delete()
    session.delete()
    assert list(session.directory.parent.iterdir()) == []
    for change in (lambda: other.append("x"), lambda: other.mark("a"), other.delete):
        with pytest.raises(StateError, match="not there any more"):
            change()


def test_what_is_there_is_not_written_over(session: Session, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="there already"):
        Session.create(session.directory, session.model)
    with pytest.raises(StateError, match="is not a session"):
        Session.open(tmp_path / "nothing", session.model)


def test_files_are_read_each_with_its_end(tmp_path: Path, model: TextModel) -> None:
    texts = {"a": ["First ", "file."], "b": ["Second."]}
    session = Session.create(tmp_path / "s", model)
    session.read_files(texts, lambda name: texts[name])
    assert_knows(session, [*b"First file.", 256, *b"Second.", 256])
    with pytest.raises(StateError, match="append to it"):
        session.read_files(texts, lambda name: texts[name])


def test_a_reading_that_has_read_nothing_may_read_something_else(tmp_path: Path, model: TextModel) -> None:
    session = Session.create(tmp_path / "s", model)

    def stops(_: str) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read_files(["book"], stops)
    assert reopened(session).manifest.reading == ("book",)
    reopened(session).read_files(["other"], lambda _: ["x"])
    assert reopened(session).ids() == [ord("x"), 256]


def test_a_stopped_reading_goes_on(tmp_path: Path, model: TextModel) -> None:
    text = "Some lines of text to be read.\n" * 10
    session = Session.create(tmp_path / "s", model, every=16)

    def stops(_: str) -> Any:
        yield text[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read_files(["book"], stops)
    again = reopened(session)
    assert again.tokens == 96
    with pytest.raises(StateError, match="give the same files"):
        again.read_files(["other"], lambda _: [text])
    with pytest.raises(StateError, match="another text now"):
        again.read_files(["book"], lambda _: ["x" + text])
    with pytest.raises(StateError, match="another text now"):
        again.read_files(["book"], lambda _: [text[:50]])
    assert again.read_files(["book"], lambda _: [text]) == len(text) + 1 - 96
    assert_knows(reopened(again), [*text.encode(), 256])


class Machine(RuleBasedStateMachine):
    """Any sequence of operations on any number of forks."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.home = Path(tempfile.mkdtemp())
        self.model = MODEL
        self.known: dict[Path, list[int]] = {}
        self.marked: dict[Path, dict[str, int]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    @initialize(target=sessions, every=st.integers(1, 9), most=st.integers(1, 4))
    def begin(self, every: int, most: int) -> Path:
        path = self.home / "0"
        Session.create(path, self.model, every=every, most=most)
        self.known[path], self.marked[path] = [], {}
        return path

    @rule(path=sessions, ids=st.lists(st.integers(0, 256), min_size=1, max_size=20), piece=st.integers(1, 9))
    def append(self, path: Path, ids: list[int], piece: int) -> None:
        Session.open(path, self.model).append_tokens([ids], piece=piece)
        self.known[path] += ids

    @rule(path=sessions, name=st.sampled_from("abc"))
    def mark(self, path: Path, name: str) -> None:
        Session.open(path, self.model).mark(name)
        self.marked[path][name] = len(self.known[path])

    @rule(path=sessions, name=st.sampled_from("abc"))
    def rollback_to_mark(self, path: Path, name: str) -> None:
        if name in self.marked[path]:
            session = Session.open(path, self.model)
            assert session.rollback(name) == 0
            self.cut(path, self.marked[path][name])

    @rule(path=sessions, share=st.floats(0, 1))
    def rollback(self, path: Path, share: float) -> None:
        place = int(share * len(self.known[path]))
        Session.open(path, self.model).rollback(place)
        self.cut(path, place)

    def cut(self, path: Path, place: int) -> None:
        self.known[path] = self.known[path][:place]
        self.marked[path] = {name: at for name, at in self.marked[path].items() if at <= place}

    @rule(target=sessions, path=sessions)
    def fork(self, path: Path) -> Path:
        other = self.home / str(len(self.known))
        Session.open(path, self.model).fork(other)
        self.known[other], self.marked[other] = list(self.known[path]), dict(self.marked[path])
        return other

    @invariant()
    def all_know_what_they_read(self) -> None:
        for path, ids in self.known.items():
            session = Session.open(path, self.model)
            assert_knows(session, ids)
            assert session.manifest.marks == self.marked[path]


MODEL = text_model(dtype=torch.float64)
Machine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase
