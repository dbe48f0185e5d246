"""Beginnings of texts that are known: in memory, on disk below it, after a restart, damaged, by two processes."""

import os
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError
from taipan.generation import GenerationSettings, Reading, generate, prefill
from taipan.serving.counts import Counts
from taipan.serving.engine import Engine, Request
from taipan.serving.events import EndEvent, Event, PromptEvent, TokenEvent
from taipan.serving.prefixes import GRAIN, Chain, PrefixStore
from taipan.serving.shelf import Shelf
from taipan.state import DecoderState
from taipan.text import TextModel
from tests.models import random_tokens, small_model

BLOCK = 8
SETTINGS = GenerationSettings(max_new_tokens=4, eos_token_id=())


@pytest.fixture(scope="module")
def model() -> TextModel:
    return TextModel(small_model("taipan", vocab_size=257, dtype=torch.float32), Tokenizer.bytes())


def prompt(length: int, seed: int) -> list[int]:
    return (random_tokens(1, length, seed=seed)[0] % 257).tolist()


def on(directory: Path, model: TextModel, most: int = 1 << 30) -> Callable[[Counts], Shelf]:
    return lambda counts: Shelf(directory, most, model.model, counts)


def run(engine: Engine, ids: list[int], **options: Any) -> tuple[int, list[int]]:
    """Tokens that were not read again, and the new ones."""
    events: queue.Queue[Event] = queue.Queue()
    engine.submit(Request(ids, SETTINGS, events.put, **options))
    told = [events.get(timeout=60)]
    while not isinstance(told[-1], EndEvent):
        told.append(events.get(timeout=60))
    assert told[-1] == EndEvent("length")
    reused = next(event.reused for event in told if isinstance(event, PromptEvent))
    return reused, [event.id for event in told if isinstance(event, TokenEvent)]


def alone(model: TextModel, ids: list[int]) -> list[int]:
    return generate(model.model, torch.tensor([ids]), settings=SETTINGS)[0, len(ids) :].tolist()


def filled(directory: Path, model: TextModel, ids: list[int]) -> None:
    engine = Engine(model, rows=2, block=BLOCK, shelf=on(directory, model))
    assert run(engine, ids) == (0, alone(model, ids))
    engine.stop()
    assert engine.counts["prefix_written"] == len(os.listdir(directory)) > 0


def test_what_was_read_is_found_after_a_restart(tmp_path: Path, model: TextModel) -> None:
    shared = prompt(19, 0)
    filled(tmp_path, model, [*shared, *prompt(6, 1)])
    engine = Engine(model, rows=2, block=BLOCK, shelf=on(tmp_path, model))
    other, longer = [*shared, *prompt(6, 2)], [*shared, *prompt(6, 1), 5]
    assert run(engine, other) == (16, alone(model, other))
    assert run(engine, longer) == (25, alone(model, longer))  # all of the first
    assert engine.counts["prefix_disk_hits"] == 2
    assert engine.counts["prefix_hits"] == 2
    assert run(engine, other)[0] == 25  # in memory now, its end included
    engine.stop()


def test_the_same_text_leaves_one_token_to_read(tmp_path: Path, model: TextModel) -> None:
    ids = prompt(16, 0)
    filled(tmp_path, model, ids)
    engine = Engine(model, rows=2, block=BLOCK, shelf=on(tmp_path, model))
    assert run(engine, ids) == (8, alone(model, ids))
    engine.stop()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "another model"])
def test_damaged_entries_are_refused_and_dropped(damage: str, tmp_path: Path, model: TextModel) -> None:
    ids = prompt(20, 0)
    filled(tmp_path, model, ids)
    other = small_model("taipan", seed=1, vocab_size=257, dtype=torch.float32)
    for file in sorted(tmp_path.iterdir()):
        if damage == "another model":
            prefill(other, torch.tensor([ids])).state.save(file, other)
            continue
        data = file.read_bytes()
        middle = len(data) // 2
        changed = bytes([data[middle] ^ 1])
        kinds = {"flipped": data[:middle] + changed + data[middle + 1 :], "cut": data[:middle], "empty": b""}
        file.write_bytes(kinds[damage])
    engine = Engine(model, rows=2, block=BLOCK, shelf=on(tmp_path, model))
    asked = [*ids[:17], *prompt(8, 3)]
    assert run(engine, asked) == (0, alone(model, asked))
    assert engine.counts["prefix_damaged"] == 2  # at 8 and at 16
    engine.stop()
    again = Engine(model, rows=2, block=BLOCK, shelf=on(tmp_path, model))
    assert run(again, asked) == (24, alone(model, asked))  # written anew
    again.stop()


def reading(model: TextModel, ids: list[int]) -> Reading:
    return prefill(model.model, torch.tensor([ids]))


def test_the_least_recently_used_go_first(tmp_path: Path, model: TextModel) -> None:
    counts = Counts()
    chains = [Chain(prompt(BLOCK, seed), b"", BLOCK) for seed in range(4)]
    state = reading(model, prompt(BLOCK, 0)).state
    state.save(tmp_path / "probe", model.model)
    size = (tmp_path / "probe").stat().st_size
    (tmp_path / "probe").unlink()
    shelf = Shelf(tmp_path, 3 * size + size // 2, model.model, counts)
    longer = [Chain([*prompt(BLOCK, seed), 1], b"", BLOCK) for seed in range(4)]
    for seed in (0, 1, 2):
        shelf.add(chains[seed], BLOCK, state)
        shelf.add(chains[seed], BLOCK, state)  # there already
    shelf.close()
    for number, seed in enumerate((0, 1, 2)):
        name = next(name for name in os.listdir(tmp_path) if chains[seed].key(BLOCK).hex() in name)
        os.utime(tmp_path / name, (number + 1, number + 1))
    shelf = Shelf(tmp_path, 3 * size + size // 2, model.model, counts)
    found = shelf.longest(longer[0])  # used: 1 is the oldest now
    assert found is not None
    assert found[1].result(60) is not None
    shelf.add(chains[3], BLOCK, state)
    shelf.close()
    shelf = Shelf(tmp_path, 3 * size + size // 2, model.model, counts)
    assert [shelf.longest(chain) is not None for chain in longer] == [True, False, True, True]
    shelf.close()
    assert counts["prefix_disk_bytes"] == 3 * size
    assert counts["prefix_written"] == 4


def test_two_processes_share_a_directory(tmp_path: Path, model: TextModel) -> None:
    one, two = (Engine(model, rows=2, block=BLOCK, shelf=on(tmp_path, model)) for _ in range(2))
    ids = prompt(20, 0)
    assert run(one, ids)[0] == 0
    one.stop()
    assert run(two, [*ids, 7]) == (20, alone(model, [*ids, 7]))
    two.stop()


def test_a_full_disk_costs_only_time(tmp_path: Path, model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("The disk is full.")

    monkeypatch.setattr(DecoderState, "save", full)
    engine = Engine(model, rows=2, block=BLOCK, shelf=on(tmp_path, model))
    ids = prompt(20, 0)
    assert run(engine, ids) == (0, alone(model, ids))
    engine.stop()
    assert engine.counts["prefix_unwritten"] == 3  # at 8, 16 and 20
    with pytest.raises(CheckpointError, match="cannot be made"):
        Shelf(Path("/proc/nothing"), 1, model.model, Counts())


# ---------------------------------------------------------------------- chains

SYMBOLS = st.lists(st.integers(0, 1), max_size=12)


@given(texts=st.lists(SYMBOLS, max_size=6), asked=SYMBOLS, above=st.integers(0, 12))
def test_the_longest_known_beginning(texts: list[list[int]], asked: list[int], above: int) -> None:
    store = PrefixStore(1 << 30)
    empty = DecoderState((), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), "")
    for text in texts:
        store.add(Chain(text, b"m", 4), len(text), Reading(torch.zeros(1, len(text) + 1), empty))
    known = [len(text) for text in texts if text == asked[: len(text)] and above < len(text) <= len(asked)]
    length, found = store.longest(Chain(asked, b"m", 4), above)
    assert length == max(known, default=0)
    assert (found is None) == (not known)
    if found is not None:
        assert found.logits_BV.shape[1] == length + 1
    assert store.longest(Chain(asked, b"another", 4), above) == (0, None)


def test_texts_that_begin_alike_are_read_once(model: TextModel) -> None:
    """What two have shared is kept for the third, wherever they part."""
    engine = Engine(model, rows=2)
    shared = prompt(5 * GRAIN + 3, 0)
    asked = [[*shared, *prompt(150, seed)] for seed in (1, 2, 3)]
    reused = [run(engine, ids)[0] for ids in asked]
    assert reused == [0, 0, 5 * GRAIN]
    assert run(engine, [*asked[0], 1])[0] == len(asked[0])
    engine.stop()


def test_places_where_states_are_kept() -> None:
    store = PrefixStore(1 << 30)
    ids = np.arange(5000)
    assert store.stops(Chain(ids[:100], b"")) == [100]
    assert store.stops(Chain(ids[1:301], b"")) == [256, 300]
    assert store.stops(Chain(ids + 9999, b"")) == [2048, 64 * 63, 4096, 64 * 75, 64 * 78, 5000]
    assert PrefixStore(0).stops(Chain(ids, b"")) == [5000]
