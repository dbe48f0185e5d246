"""The experiment `mqar`: its models against zoology's, what is trained for longer, and what is not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from taipan.experiments import laboratory
from taipan.experiments.execution import Result, Run
from taipan.experiments.laboratory import Laboratory, Text, slug
from taipan.experiments.mqar import PUBLISHED, SCALES, models, mqar, state_bytes

FIRST = SCALES["tiny"].steps
SOLVES, STOPS, GOES_ON = "attention", "Mamba-2, 16 KiB", "Mamba-2, 32 KiB"
REACHED = {
    SOLVES: lambda steps: 0.995,  # what another 0.01 would be more than all
    STOPS: lambda steps: 0.4 if steps == FIRST else 0.405,
    GOES_ON: lambda steps: 0.4 + 0.1 * (steps // FIRST).bit_length(),
}


def test_trained_for_longer_is_what_improves_and_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: dict[str, list[int]] = {}

    def execute(_: Laboratory, runs: Sequence[Run], *others: object) -> list[Result]:
        results: list[Result] = []
        for run in runs:
            name = next((name for name in REACHED if slug(name) == run.name), SOLVES)
            steps = run.settings["steps"]
            trained.setdefault(name, []).append(steps)
            tests = [{"accuracy": REACHED[name](steps), "gates": []}]
            results.append({"run": run.name, "tests": tests, "parameters": 1, **run.settings})
        return results

    monkeypatch.setattr(Laboratory, "execute", execute)
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], doublings=2))
    outcome = mqar(Laboratory(laboratory.SCALES["tiny"], Text(), tmp_path, lambda *_: None))
    assert set(trained[SOLVES]) == {FIRST}
    assert trained[STOPS] == [FIRST, 2 * FIRST]
    assert trained[GOES_ON] == [FIRST, 2 * FIRST, 4 * FIRST]
    assert outcome.more["still improving"] == [GOES_ON]
    last = {row[0]: row[-1] for row in outcome.tables[1].rows}
    assert (last[SOLVES], last[STOPS], last[GOES_ON]) == ("no", "no", "yes")
    windows = {row[0]: row[3] for row in outcome.tables[0].rows}
    assert (windows["attention"], windows["Mamba-2, 16 KiB"]) == ("all tokens", "0")


def test_models_are_those_of_the_published_plot() -> None:
    """One layer that attends, without positions, over one that does not; states of the sizes the plot has."""
    own = models(SCALES["small"])
    for name in ("attention", "sliding window of 128"):
        below, above = own[name].layer_types
        assert (below, "attention" in above, own[name].attention_rope) == ("mamba2", True, False)
    sizes = {name: state_bytes(own[name]) for name in PUBLISHED}
    assert {name: sizes[f"Mamba-2, {name} KiB"][0] for name in (16, 32, 48)} == {16: 16384, 32: 32768, 48: 49152}
    # 2 * 128 tokens * 128 numbers of fp32; what the layer below keeps is 1 KiB
    assert sizes["sliding window of 128"] == (1024, 131072)
    assert sizes["attention"][0] == 1024
