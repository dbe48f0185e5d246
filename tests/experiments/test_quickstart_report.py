"""What the quickstart's page says, from results that are known."""

import math

import pytest

from taipan.evaluation.perplexity import FIRST_BUCKET, EvaluationResult, PositionBucket
from taipan.experiments.quickstart_findings import positions_of_same_files
from taipan.experiments.quickstart_report import headline, selected_alpha


def result(tokens: int, bits: float) -> EvaluationResult:
    """A file of one byte a token, that costs `bits` in the first bucket and one less in every later one."""
    buckets: list[PositionBucket] = []
    start, stop = 0, FIRST_BUCKET
    while start < tokens:
        count = min(stop, tokens) - start
        each = bits - len(buckets)
        buckets.append(PositionBucket(start, stop, count, each * math.log(2), each))
        start, stop = stop, 2 * stop
    nats = sum(bucket.tokens * bucket.nats_per_token for bucket in buckets)
    return EvaluationResult(
        documents=1,
        tokens=tokens,
        bytes=tokens,
        context=None,
        nats=nats,
        nats_per_token=nats / tokens,
        perplexity=1.0,
        bits_per_byte=nats / tokens / math.log(2),
        by_position=tuple(buckets),
        gates=(),
        seconds=0.0,
    )


def test_every_position_is_about_the_same_files() -> None:
    # ten short files that are easy, two long ones that are hard: 8, 7, 6 bits with more and more context
    results = [result(FIRST_BUCKET, 3.0)] * 10 + [result(300, 8.0), result(256, 8.0)]
    bars, files = positions_of_same_files(results)
    assert files == [10, 11]
    assert [(bar.start, bar.stop, bar.files) for bar in bars] == [(0, 64, 2), (64, 128, 2), (128, 256, 2)]
    assert [bar.bits_per_byte for bar in bars] == pytest.approx([8.0, 7.0, 6.0])


def test_one_long_file_of_many_decides_nothing() -> None:
    bars, files = positions_of_same_files([result(130, 8.0)] * 20 + [result(100_000, 30.0)])
    assert len(files) == 21
    assert bars[-1].stop == 128
    assert bars[0].bits_per_byte == pytest.approx((20 * 8 + 30) / 21)


def test_files_shorter_than_a_bucket_have_no_positions() -> None:
    assert positions_of_same_files([result(FIRST_BUCKET - 1, 8.0)] * 3) == ([], [])


@pytest.mark.parametrize(
    ("model", "xz", "seconds", "machine", "expected"),
    [
        (1.402, 1.975, 242.0, "2 cores", "29 % smaller than xz, after 4 minutes on 2 cores"),
        (2.39, 1.975, 45.0, "1 core", "21 % larger than xz, after 45 seconds on 1 core"),
        (2.0, 2.0, 59.7, "an H200", "As small as xz, after 1 minute on an H200"),
        (1.0, 2.0, 1.0, "2 cores", "50 % smaller than xz, after 1 second on 2 cores"),
    ],
)
def test_the_headline(model: float, xz: float, seconds: float, machine: str, expected: str) -> None:
    assert headline(model, xz, seconds, machine) == expected


def test_alpha_is_that_of_selected_tokens() -> None:
    gates = [{"rate": 1.0, "weight_mean": 0.9}, {"rate": 0.2, "weight_mean": 0.15}, {"rate": 0.0, "weight_mean": 0.0}]
    curve = selected_alpha([1.0, 2.0, 3.0], [{"gates": [gate]} for gate in gates], 0)
    assert list(curve.x) == [1.0, 2.0], "where nothing was selected there is no mean"
    assert list(curve.y) == pytest.approx([0.9, 0.75])
    assert all(0 <= alpha <= 1 for alpha in curve.y)
