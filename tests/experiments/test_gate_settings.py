"""The comparison of gates: equal models, every run in its place, and one whole tiny run by its command."""

import json
import math
from pathlib import Path

import pytest

from taipan.accounting import parameter_count
from taipan.experiments.gate_settings import (
    AHEAD,
    JAMBA,
    MAMBA2,
    OPEN,
    SCALES,
    Report,
    beyond,
    declare,
    models,
    settings,
    table,
)
from tests.command import run


def test_models_are_equal_in_parameters() -> None:
    counts = {name: parameter_count(config) for name, config in models(SCALES["small"]).items()}
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts
    assert list(counts) == [MAMBA2, JAMBA, OPEN, AHEAD, *settings()]


def test_every_setting_is_another_run() -> None:
    scale = SCALES["small"]
    declared = [declare(name, config, seed, scale) for seed in scale.seeds for name, config in models(scale).items()]
    assert len({one.path(Path()) for one in declared}) == len(declared)


def test_kept_is_the_share_of_jambas_lead() -> None:
    def result(bits: float) -> dict[str, float]:
        return {"bits_per_byte": bits}

    results = {MAMBA2: [result(1.5), result(1.6)], JAMBA: [result(1.2), result(1.2)], "own": [result(1.3), result(1.7)]}
    report = Report(SCALES["tiny"], results)
    assert report.kept("own") == pytest.approx([2 / 3, -1 / 4])
    assert report.kept(JAMBA) == pytest.approx([1, 1])


def test_beyond_is_a_mean_over_tokens() -> None:
    buckets = [
        {"start": start, "tokens": tokens, "bits_per_byte": bits}
        for start, tokens, bits in ((0, 100, 9.0), (256, 30, 1.0), (512, 10, 2.0))
    ]
    assert beyond({"by_position": buckets}, 64) == pytest.approx(1.25)
    assert math.isnan(beyond({"by_position": buckets}, 200))


def test_the_tiny_one_runs_and_goes_on(tmp_path: Path) -> None:
    arguments = ["reproduce", "gate-settings", "--scale", "tiny", "--out", str(tmp_path), "--workers", "1"]
    first = run(*arguments)
    assert first.code == 0, first.err
    report = json.loads((tmp_path / "tiny" / "results.json").read_text(encoding="utf-8"))
    assert list(report["results"]) == [MAMBA2, JAMBA, OPEN, AHEAD, "recall, lookahead"]
    (own,) = report["results"]["recall, lookahead"]
    assert own["bits_per_byte_open"] != own["bits_per_byte_closed"]
    assert 0 < own["rate"] < 1
    assert own["thresholds"] != [0.0]
    (whole,) = report["results"][OPEN]
    assert whole["rate"] > 0.9
    header, rows = table(Report(SCALES["tiny"], report["results"]))
    assert [len(row) for row in rows] == [len(header)] * 5
    seconds = own["seconds"]
    assert run(*arguments).code == 0
    report = json.loads((tmp_path / "tiny" / "results.json").read_text(encoding="utf-8"))
    assert report["results"]["recall, lookahead"][0]["seconds"] == seconds  # kept, not run again
