"""The comparison of gates: equal models, every run in its place, and what the table says."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.accounting import parameter_count
from taipan.experiments.comparisons import Models, capacity, deep, positions, ratio, scope, window
from taipan.experiments.gate_settings import (
    AHEAD,
    JAMBA,
    MAMBA2,
    OPEN,
    architectures,
    beyond,
    kept,
    models,
    settings,
    table,
)
from taipan.experiments.laboratory import SCALES, Laboratory, Scale, Text, Training, all_seeds

SMALL = SCALES["small"]


def nobody(*_: object) -> None:
    """Listens to nothing."""


def test_models_are_equal_in_parameters() -> None:
    everything = {**models(SMALL), **architectures(SMALL)}
    counts = {name: parameter_count(config) for name, config in everything.items()}
    assert max(counts.values()) <= 1.025 * min(counts.values()), counts
    assert list(models(SMALL)) == [MAMBA2, JAMBA, OPEN, AHEAD, *settings()]


@pytest.mark.parametrize("listed", [capacity, positions, window, scope])
def test_models_of_a_comparison_are_equal_in_parameters(listed: Callable[[Scale], Models]) -> None:
    counts = {name: parameter_count(config) for name, (config, _) in listed(SMALL).items()}
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts


def test_deep_stacks_have_the_parameters_of_the_others() -> None:
    counts = [parameter_count(deep(SMALL, every)[0]) for every in (3, 6, 12)]
    counts.append(parameter_count(architectures(SMALL)["taipan"]))
    assert max(counts) <= 1.005 * min(counts), counts
    kinds = [deep(SMALL, every)[0].layer_types for every in (3, 6, 12)]
    assert [own.count("mamba2") // own.count("selective_attention") for own in kinds] == [3, 6, 12]


def test_sizes_of_capacity_are_two() -> None:
    small, large = (
        {parameter_count(config) for config, _ in capacity(SMALL, larger=larger).values()} for larger in (False, True)
    )
    assert min(large) > 1.5 * max(small)
    assert max(large) <= 1.01 * min(large)


def test_every_setting_is_another_run(tmp_path: Path) -> None:
    lab = Laboratory(SMALL, Text(), tmp_path, nobody)
    lab.__dict__["_data"] = tmp_path / "text"
    known = [*models(SMALL).items(), *((name, config) for name, (config, _) in ratio(SMALL).items())]
    trainings = [Training(name="one", config=config, seed=seed) for seed in SMALL.seeds for _, config in known]
    trainings += all_seeds(dict(capacity(SMALL)), (4,))
    assert len({lab.declare(training).identity for training in trainings}) == len(trainings) - 3 * 1  # a shared one
    # what is not of the model is not of its name: two experiments that declare a model train it once
    assert lab.declare(trainings[0]).settings == lab.declare(Training(name="two", config=known[0][1], seed=1)).settings


def test_kept_is_the_share_of_jambas_lead() -> None:
    def result(bits: float) -> dict[str, float]:
        return {"bits_per_byte": bits}

    results = {MAMBA2: [result(1.5), result(1.6)], JAMBA: [result(1.2), result(1.2)], "own": [result(1.3), result(1.7)]}
    assert kept(results, "own") == pytest.approx([2 / 3, -1 / 4])
    assert kept(results, JAMBA) == pytest.approx([1, 1])


def test_beyond_is_a_mean_over_tokens() -> None:
    buckets = [
        {"start": start, "tokens": tokens, "bits_per_byte": bits}
        for start, tokens, bits in ((0, 100, 9.0), (256, 30, 1.0), (512, 10, 2.0))
    ]
    assert beyond({"by_position": buckets}, 64) == pytest.approx(1.25)
    assert math.isnan(beyond({"by_position": buckets}, 200))


def test_the_table_has_jambas_lead_only_between_its_anchors() -> None:
    result = {"parameters": 1, "bits_per_byte": 1.0, "rate": None, "rate_beyond": None, "by_position": []}
    for names, more in (((MAMBA2, JAMBA), 1), ((MAMBA2,), 0)):
        found = table({name: [{**result, "bits_per_byte": len(name)}] for name in names}, 64, "Title")
        assert len(found.header) == 8 + more
        assert [len(row) for row in found.rows] == [len(found.header)] * len(names)


@pytest.mark.parametrize(("jamba", "shares"), [(1.2, ["0.00", "1.00", "0.33"]), (1.49, ["–", "–", "–"])])
def test_the_table_tells_no_share_of_a_lead_that_is_noise(jamba: float, shares: list[str]) -> None:
    result = {"parameters": 1, "rate": None, "rate_beyond": None, "by_position": []}
    bits = {MAMBA2: 1.5, JAMBA: jamba, "own": 1.4}
    found = table({name: [{**result, "bits_per_byte": own}] for name, own in bits.items()}, 64, "Title")
    assert [row[found.header.index("of Jamba's lead")] for row in found.rows] == shares
