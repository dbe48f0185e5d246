"""The suites of the server, at the smallest sizes: what they say they measured is what was done."""

import pytest

from taipan.benchmark import Measurement, Settings, run
from taipan.benchmark.server import tokenizer_of
from taipan.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def measured(suite: str, **options: object) -> dict[str, Measurement]:
    settings = Settings(**{"model": "taipan-tiny", "dtype": "float32", "repeats": 1, **options})  # pyright: ignore[reportArgumentType]
    return {measurement.work: measurement for measurement in run([suite], settings).measurements}


def test_streams() -> None:
    found = measured("serve-streams", batch=3, new_tokens=8)
    assert list(found) == ["8 tokens, taipan generate", "8 tokens, 1 stream", "8 tokens each, 3 streams"]
    assert [row.tokens for row in found.values()] == [8, 8, 24]
    assert [[c.other for c in row.comparisons] for row in found.values()] == [[], ["taipan generate"], ["one stream"]]


def test_a_shared_beginning_is_read_once() -> None:
    first, second = measured("serve-prefix", tokens=(4096,)).values()
    assert second.values[0] < first.values[0]
    assert second.comparisons[0].ratios == (first.values[0] / second.values[0],)


def test_the_gap_beside_a_long_prompt() -> None:
    median, last = measured("serve-gap", tokens=(20_000,)).values()
    assert median.details["gaps"] == last.details["gaps"] > 2
    assert median.values[0] <= last.values[0]


def test_a_session_is_read_in_several_runs_and_opened(tmp_path: object) -> None:
    directory = str(tmp_path)
    short = measured("serve-session", context=(5_000,), directory=directory)
    assert list(short) == [
        "read 5,000 tokens into a session",
        "open a session of 5,000 tokens, first new token",
    ]
    reading, opening = measured("serve-session", context=(20_000,), directory=directory).values()
    assert reading.tokens == 20_000
    assert reading.values[0] > next(iter(short.values())).values[0]
    assert opening.details["tokens read again"] == 0
    states = {name: size for name, size in opening.details.items() if name.startswith("MB of the state")}
    assert len(set(states.values())) == 1, states  # whatever the context


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(ConfigError, match="has no config"):
        measured("serve-prefix", model="/proc")


def test_the_tokenizer_is_as_large_as_the_model_wants() -> None:
    assert tokenizer_of(2000, 0).vocab_size == 2000
    assert tokenizer_of(300, 0).vocab_size == 257
