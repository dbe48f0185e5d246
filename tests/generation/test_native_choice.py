"""Tokens chosen by the compiled kernels, alone and several in a call, against sampling.py and single steps."""

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan import DecoderState
from taipan.errors import InputError
from taipan.generation import GenerationSettings, StepOutput, prefill, sampling, start_decoding, stream
from taipan.generation import decoding as decoding_module
from taipan.generation.choosing import Chooser
from taipan.generation.decoding import ModelDecoding, NativeDecoding, Progress, Writer
from tests.compilers import needs_kernels
from tests.models import EVERY_LAYER_TYPE, VOCAB, random_tokens, small_model

pytestmark = [needs_kernels, pytest.mark.unchecked_shapes]  # test_decoding.py checks the same calls
ROUNDING = 2e-6
"""Of cumulative probabilities: several times what sums over the largest vocabulary here lose in fp32."""


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """Rows of logits without ties, with −∞, of any spread and size; and how to choose from them."""
    vocabulary = draw(st.sampled_from([1, 2, 5, 15, 16, 17, 63, 300, 4099]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits_BV = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    logits_BV = (logits_BV * draw(st.sampled_from([1e-3, 1.0, 5.0, 200.0]))).float()
    if draw(st.booleans()):
        logits_BV[torch.rand(2, vocabulary, generator=generator) < 0.4] = -torch.inf
        logits_BV[:, 0] = 0.0
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "top_k": draw(st.sampled_from([0, 1, 7, 50])),
        "top_p": draw(st.sampled_from([1.0, 0.95, 0.5, 1e-9, 1 - 1e-12])),
        "min_p": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "suppress_tokens": draw(st.sampled_from([(), (1,)])) if vocabulary > 1 else (),
        "seed": draw(st.integers(0, 99)),
        "do_sample": True,
    }
    return logits_BV, options


class Beside(Chooser):
    """The filters in fp64, with a random number and a top-p a little off: what rounding in fp32 may make of them."""

    def __init__(self, how: GenerationSettings, vocabulary: int, uniform: float, top_p: float) -> None:
        super().__init__(replace(how, top_p=min(1.0, how.top_p * (1 + top_p))), vocabulary)
        self.off = uniform

    def __call__(self, logits_BV: Tensor) -> Tensor:
        return self._by_sampling(logits_BV.double())

    def _uniform(self, rows: int) -> Tensor:
        return (super()._uniform(rows) + self.off).clamp(0.0, 1 - 2**-53)


@settings(max_examples=150, deadline=None)
@given(choices())
def test_the_kernel_chooses_what_the_filters_choose(choice: tuple[Tensor, dict[str, Any]]) -> None:
    logits_BV, options = choice
    how, vocabulary = GenerationSettings(**options), logits_BV.shape[1]
    native = Chooser(how, vocabulary)
    off = (0.0, -ROUNDING, ROUNDING)
    plain = [Beside(how, vocabulary, uniform, top_p) for uniform in off for top_p in off]
    for _ in range(4):
        found_B = native(logits_BV)
        expected_BX = torch.stack([chooser(logits_BV) for chooser in plain], 1)
        # equal logits are told apart by their ids here, and by nobody knows what in topk
        best_B1, known_BX = logits_BV.gather(1, found_B[:, None]), logits_BV.gather(1, expected_BX)
        assert (best_B1 == known_BX).any(1).all()
        for chooser in (native, *plain):
            chooser.hear(found_B[:, None])


def test_of_equal_logits_the_lowest_ids_are_kept_exactly_so_many() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 3.0, 3.0, 3.0, -1.0]])
    for options, kept in (({"top_k": 2}, {1, 2}), ({"top_p": 0.45}, {1, 2})):
        how = GenerationSettings(do_sample=True, seed=0, **options)  # pyright: ignore[reportArgumentType]
        choose = Chooser(how, 6)
        assert {int(choose(logits_BV)) for _ in range(60)} == kept


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_usable_logit_are_named(bad: float) -> None:
    logits_BV = torch.zeros(3, 20)
    logits_BV[1] = bad
    choose = Chooser(GenerationSettings(do_sample=True, seed=0, top_p=0.9), 20)
    with pytest.raises(InputError, match=r"rows \[1\]"):
        choose(logits_BV)


def test_random_numbers_at_once_are_those_one_by_one() -> None:
    how = GenerationSettings(do_sample=True, seed=3)
    alone = Chooser(how, 5)
    single = torch.stack([alone._uniform(1)[0] for _ in range(70)])  # pyright: ignore[reportPrivateUsage]
    several = Chooser(how, 5)
    for asked, used in ((70, 0), (5, 3), (67, 67)):  # what was not used comes again
        place = 70 - (70 if asked == 70 else 70 if asked == 5 else 67)
        assert several.random_numbers(asked).equal(single[place : place + asked])
        several.used(used)


def steps(state: DecoderState, model: Any, **options: Any) -> tuple[list[StepOutput], list[DecoderState]]:
    """Every step, and the state after it: asked for at once, and again at the end."""
    out, states = [], []
    for number, step in enumerate(stream(model, random_tokens(1, 1), state=state, **options)):
        out.append(step)
        if number % 3 == 0:
            states.append(step.state)
    return out, states


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.8, "seed": 5, "repetition_penalty": 1.2}])
@pytest.mark.parametrize(("dtype", "kept_after"), [(torch.float32, 0.0), (torch.float64, 1e9)])
def test_tokens_written_several_in_a_call_are_those_of_single_steps(
    options: dict[str, Any], dtype: torch.dtype, kept_after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = tuple(kind for kind in EVERY_LAYER_TYPE if kind != "full_attention")
    model = small_model(fixed, dtype=dtype)
    state = prefill(model, random_tokens(1, 9)).state
    monkeypatch.setattr(decoding_module, "_MOST_STEPS", 1)
    single, before = steps(state, model, max_new_tokens=40, **options)
    monkeypatch.setattr(decoding_module, "_MOST_STEPS", 7)
    monkeypatch.setattr(decoding_module, "_CALL_SECONDS", 1e9)
    monkeypatch.setattr(decoding_module, "_KEPT_SECONDS", kept_after)
    several, after = steps(state, model, max_new_tokens=40, **options)
    assert [int(step.tokens_B) for step in several] == [int(step.tokens_B) for step in single]
    assert [step.finish_reasons for step in several] == [step.finish_reasons for step in single]
    for one, other in zip(before, after, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        assert all(tensor.equal(other.tensors()[name]) for name, tensor in one.tensors().items())
    for one, other in zip(single[-8:], several[-8:], strict=True):
        assert one.reading.logits_BV.equal(other.reading.logits_BV)


def test_writing_copies_no_state_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy before every call of some 2 ms took a fifth of the time of taipan-tiny."""
    model = small_model("taipan", dtype=torch.float32)
    state, copy = prefill(model, random_tokens(1, 9)).state, NativeDecoding.row
    asking: list[str] = []

    def asked(own: NativeDecoding) -> DecoderState:
        asking.append(sys._getframe(1).f_code.co_name)  # pyright: ignore[reportPrivateUsage]
        return copy(own, 0)  # there is one row

    monkeypatch.setattr(NativeDecoding, "state", property(asked))
    monkeypatch.setattr(decoding_module, "_MOST_STEPS", 7)
    monkeypatch.setattr(decoding_module, "_CALL_SECONDS", 1e9)
    monkeypatch.setattr(decoding_module, "_KEPT_SECONDS", 1e9)
    last = list(stream(model, random_tokens(1, 1), state=state, max_new_tokens=60, eos_token_id=()))[-1]
    assert "write" not in asking
    assert int(last.state.position_B) == int(state.position_B) + 61


WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_p": 0.8, "seed": 5},
    {"repetition_penalty": 1.3, "suppress_tokens": (7,)},
    {"do_sample": True, "top_k": 9, "seed": 6, "repetition_penalty": 1.2},
]


def written(decoding: Any, rows: list[int], most: int, steps: int, ends: tuple[int, ...] = ()) -> list[list[int]]:
    """What these rows write, each in its way, in calls of so many steps."""
    progress, told = Progress(), []
    ends_E = torch.tensor(ends, dtype=torch.int64)
    choosers = [Chooser(GenerationSettings(**WAYS[row % 4]), VOCAB) for row in rows]
    writers = [Writer(row, choose, ends_E, 3 + row) for row, choose in zip(rows, choosers, strict=True)]
    while len(told) < most:
        progress.begin(steps, len(rows))
        with torch.inference_mode():
            decoding.write(writers, steps, progress)
        told += progress.tokens_SR[: progress.written].tolist()
        assert [writer.token for writer in writers] == told[-1]
    return told[:most]


@pytest.mark.parametrize("rows", [[1], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_several_rows_write_in_a_call_what_each_writes_alone(rows: list[int]) -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float32)
    state = prefill(model, random_tokens(5, 9)).state
    expected = [written(ModelDecoding(model, state), [row], 30, 1) for row in rows]
    for steps in (1, 7):
        for ends in ((), (written(start_decoding(model, state), rows, 30, 1)[4][0],)):  # which ends calls, and no more
            decoding = start_decoding(model, state)
            assert isinstance(decoding, NativeDecoding)
            told = written(decoding, rows, 30, steps, ends)
            assert [list(own) for own in zip(*told, strict=True)] == [[token for (token,) in own] for own in expected]


def test_calls_write_the_same_however_seldom_states_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float32)
    state = prefill(model, random_tokens(5, 9)).state
    always = start_decoding(model, state)
    expected = written(always, [0, 2, 3], 20, 1)
    monkeypatch.setattr(decoding_module, "_STATES_IN_CACHE", 0)
    for steps in (1, 2, 5, 10):
        decoding = start_decoding(model, state)
        assert isinstance(decoding, NativeDecoding)
        assert written(decoding, [0, 2, 3], 20, steps) == expected
        assert decoding._behind_B.any()  # pyright: ignore[reportPrivateUsage]
        for name, tensor in decoding.state.tensors().items():
            assert tensor.equal(always.state.tensors()[name]), name


def test_a_call_that_is_watched_tells_of_itself_and_ends_when_told_to() -> None:
    model = small_model("mamba2", dtype=torch.float32)
    heard, signal = os.pipe()
    os.set_blocking(heard, False)
    os.set_blocking(signal, False)
    progress, decoding = Progress(signal), start_decoding(model, model.empty_state(2))
    none_E = torch.empty(0, dtype=torch.int64)
    writers = [Writer(row, Chooser(GenerationSettings(), VOCAB), none_E, 5) for row in range(2)]
    for halted, steps in ((False, 9), (True, 1), (False, 9)):
        progress.begin(9, 2)
        progress.halt(halted)
        decoding.write(writers, 9, progress)
        assert progress.written == steps
        assert os.read(heard, 100) == b"\0"  # one, however many steps there were
        with pytest.raises(BlockingIOError):
            os.read(heard, 1)
        assert progress.hear()
        assert not progress.hear()
    os.close(heard)
    os.close(signal)


def test_a_reading_is_gone_on_from_with_a_penalty_as_by_the_model() -> None:
    model = small_model("mamba2", dtype=torch.float32)
    reading = prefill(model, random_tokens(1, 9))
    how: dict[str, Any] = {"max_new_tokens": 30, "repetition_penalty": 1.5}
    native = [int(step.tokens_B) for step in stream(model, reading, **how)]
    model.lm_head.register_forward_pre_hook(lambda module, inputs: None)  # what the native step would pass by
    assert native == [int(step.tokens_B) for step in stream(model, reading, **how)]


def test_an_end_token_ends_the_call_and_nothing_is_read_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_module, "_CALL_SECONDS", 1e9)
    model = small_model(("mamba2", "mamba2"))
    state = prefill(model, random_tokens(1, 9)).state
    free, _ = steps(state, model, max_new_tokens=20)
    end = int(free[10].tokens_B)
    first = [int(step.tokens_B) for step in free].index(end)
    ended, _ = steps(state, model, max_new_tokens=20, eos_token_id=end)
    assert len(ended) == first + 1
    assert ended[-1].finish_reasons == ("eos",)
    assert int(ended[-1].state.position_B) == int(state.position_B) + 1 + first + 1


def test_a_model_that_overflows_says_so_in_the_middle_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_module, "_CALL_SECONDS", 1e9)
    model = small_model(("mamba2", "mamba2"))
    state = prefill(model, random_tokens(1, 9)).state
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="no usable logits"):
        list(stream(model, random_tokens(1, 1), state=state, max_new_tokens=9))


def test_greedy_of_the_kernel_is_the_first_of_the_best() -> None:
    model = small_model(("mamba2",))
    model.lm_head.weight.data.zero_()  # every logit is equal
    first = next(stream(model, random_tokens(1, 4), max_new_tokens=1))
    assert int(first.tokens_B) == int(sampling.greedy(torch.zeros(1, model.config.vocab_size)))
