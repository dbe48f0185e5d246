"""The experiment of retention: which entry has an answer, and readings that change nothing of each other."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from taipan.data.hidden_keys import KINDS
from taipan.experiments import laboratory
from taipan.experiments.execution import Result, Run, settings_of
from taipan.experiments.laboratory import Laboratory, Outcome, Table, Text
from taipan.experiments.mqar import mqar
from taipan.experiments.retention import EVICTIONS, SCALES, WAYS, ask, config_of, read, retention, share, texts_of
from taipan.layers.gating import Gate
from taipan.model import TaipanLM

TINY = SCALES["tiny"]


def test_the_carrier_of_a_key_has_its_name_and_its_whole_answer() -> None:
    lookahead = config_of(TINY).lookahead
    for text in texts_of(TINY, 1):
        start = text.start
        for key in text.keys:
            place = text.carrier(key)
            assert start[place - lookahead] == key.name
            assert start[place - lookahead + 1 : place + 1][: len(key.answer)] == list(key.answer)
            # of the last time it was stated
            assert key.name not in start[place - lookahead + 1 :]


def test_texts_differ_in_how_keys_are_stated_only() -> None:
    texts = texts_of(TINY, 1)
    assert [text.way for text in texts] == list(WAYS)
    assert len({text.keys for text in texts}) == 1
    assert {key.kind for key in texts[0].keys} == set(KINDS)
    assert texts[0].filler.take(50) == texts[2].filler.take(50)


@torch.no_grad()
def test_a_window_that_keeps_the_strongest_has_what_a_sliding_one_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gates that score statements higher than all else: what training is to bring about."""
    starts = {len(text.start) for text in texts_of(TINY, 1)}

    def scores(_: Gate, x: torch.Tensor, recalled: object = None) -> torch.Tensor:
        margin = torch.full(x.shape[:2], 1.0 if x.shape[1] in starts else -1.0)
        return torch.stack([-margin / 2, margin / 2], -1)

    monkeypatch.setattr(Gate, "scores", scores)
    model = TaipanLM(config_of(TINY), generator=torch.Generator().manual_seed(0)).eval()
    answers = {eviction: list(read(model, eviction, TINY, 1)) for eviction in EVICTIONS}
    assert [(a["way"], a["kind"], a["length"]) for a in answers["oldest"]] == [
        (way.name, kind, length) for length in TINY.lengths for way in WAYS for kind in KINDS
    ]
    results = [{"answers": [{"eviction": how, **answer} for how in EVICTIONS for answer in answers[how]]}]
    for way in WAYS:
        assert share(results, "kept", "oldest", way.name, TINY.lengths[-1]) == [0.0]
        assert share(results, "kept", "weakest", way.name, TINY.lengths[-1]) == [1.0]


@torch.no_grad()
def test_questions_change_nothing_of_the_text() -> None:
    model = TaipanLM(config_of(TINY), generator=torch.Generator().manual_seed(0)).eval()
    text = texts_of(TINY, 1)[0]
    state = model(torch.tensor([text.start])).state
    before = state.fork()
    assert ask(model, text, state, "pairs")["kept"] == 1.0  # nothing has left yet
    assert all(torch.equal(tensor, before.tensors()[name]) for name, tensor in state.tensors().items())


def test_a_run_kept_before_there_was_a_choice_is_the_same_run() -> None:
    """What identifies a run names the fields that came later only where they are not what was before."""
    config = config_of(TINY)
    assert "window_eviction" not in settings_of(config)
    later = {"window_eviction": "weakest", "gain_measure": "flipped", "gain_flips": 0.1}
    for name, value in later.items():
        assert name not in settings_of(config)
        assert settings_of(dataclasses.replace(config, **{name: value})) == {**settings_of(config), name: value}


class Made:
    """In place of `Laboratory.execute`: what each run would be, told of without training."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def __call__(self, runs: Sequence[Run], *_: object) -> list[Result]:
        self.runs += runs
        tests = [{"accuracy": 1.0, "gates": []}]
        return [{"run": run.name, "tests": tests, "answers": [], "parameters": 1, **run.settings} for run in runs]


@pytest.mark.parametrize("experiment", [retention, mqar])
def test_the_seeds_are_those_of_the_laboratory_and_what_is_published_is_taken(
    experiment: Callable[[Laboratory], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(*_: object) -> Table:
        return Table("", [], [])

    def listener(*_: object) -> None:
        pass

    made, name = Made(), experiment.__name__
    monkeypatch.setattr(Laboratory, "execute", lambda _, runs, *others: made(runs))
    monkeypatch.setattr("taipan.experiments.retention._table", table)
    scale = dataclasses.replace(laboratory.SCALES["tiny"], seeds=(5, 6))
    outcome = experiment(Laboratory(scale, Text(), tmp_path, listener))
    assert {run.settings["seed"] for run in made.runs} == {5, 6}

    every = len({run.identity for run in made.runs})
    laboratory.write(name, "", outcome, tmp_path, f"taipan reproduce {name}", {"scale": "tiny"})
    known = laboratory.published(tmp_path, name, f"taipan reproduce {name}")
    assert len(known) == every  # those of a sweep, and of shorter trainings, too
    made.runs.clear()
    assert experiment(Laboratory(scale, Text(), tmp_path, listener, published=known)) == outcome
    assert made.runs == []
    longer = dataclasses.replace(scale, seeds=(5, 6, 7))
    experiment(Laboratory(longer, Text(), tmp_path, listener, published=known))
    assert {run.settings["seed"] for run in made.runs} == {7}
