"""forward over T tokens = any split of it; padding and packing change nothing at the real tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan import DecoderState, TaipanLM
from tests.models import STACKS, VARIANTS, random_tokens, small_model

pytestmark = pytest.mark.unchecked_shapes  # test_state.py and test_model_oracles.py check the same calls

CASES = [(stack, {}) for stack in STACKS] + [("taipan", options) for options in VARIANTS.values()]
IDS = [*STACKS, *(f"taipan-{name}" for name in VARIANTS)]
EXACT = 1e-11  # fp64, relative to the largest value compared


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected)
        return
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= tolerance * scale


def assert_same_state(actual: DecoderState, expected: DecoderState, tolerance: float = EXACT) -> None:
    ours, theirs = actual.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_same(ours[name], theirs[name], tolerance)


def in_pieces(
    model: TaipanLM, tokens: torch.Tensor, cuts: list[int], segment_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, DecoderState]:
    state, logits = None, []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        ids = None if segment_ids is None else segment_ids[:, begin:end]
        out = model(tokens[:, begin:end], state=state, segment_ids=ids)
        state = out.state
        logits.append(out.logits)
    assert state is not None
    return torch.cat(logits, 1), state


@pytest.mark.parametrize(("stack", "options"), CASES, ids=IDS)
@torch.no_grad()
def test_token_by_token_is_whole(stack: str, options: dict) -> None:
    model, tokens = small_model(stack, **options), random_tokens(2, 18)
    whole = model(tokens)
    logits, state = in_pieces(model, tokens, list(range(1, 18)))
    assert_same(logits, whole.logits)
    assert_same_state(state, whole.state)
    if model.sals:
        assert all(0.1 < gate.rate < 0.9 for gate in whole.gates), "the gates must really decide"


@pytest.mark.parametrize(("stack", "options"), CASES, ids=IDS)
@given(length=st.integers(2, 33), cuts=st.sets(st.integers(1, 32), max_size=3), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
@torch.no_grad()
def test_any_split_is_whole(stack: str, options: dict, length: int, cuts: set[int], seed: int) -> None:
    model, tokens = small_model(stack, **options), random_tokens(2, length, seed)
    whole = model(tokens)
    logits, state = in_pieces(model, tokens, sorted(cut for cut in cuts if cut < length))
    assert_same(logits, whole.logits)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize(("stack", "options"), CASES, ids=IDS)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=2, max_size=3),
    side=st.sampled_from(["left", "right", "holes"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
@torch.no_grad()
def test_padding_changes_nothing(stack: str, options: dict, lengths: list[int], side: str, seed: int) -> None:
    model, width = small_model(stack, **options), max(lengths) + 2
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(len(lengths), width, seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        places = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "holes": torch.randperm(width, generator=generator)[:length].sort().values,
        }[side]
        mask[row, places] = 1
    padded = model(tokens, attention_mask=mask)
    follow = random_tokens(len(lengths), 3, seed + 1)
    padded_next = model(follow, state=padded.state)
    for row in range(len(lengths)):
        real = mask[row].bool()
        alone = model(tokens[row : row + 1, real])
        assert_same(padded.logits[row, real], alone.logits[0])
        for gate, gate_alone in zip(padded.gates, alone.gates, strict=True):
            assert torch.equal(gate.selected_BT[row, real], gate_alone.selected_BT[0])
            assert not gate.selected_BT[row, ~real].any()
        alone_next = model(follow[row : row + 1], state=alone.state)
        assert_same(padded_next.logits[row], alone_next.logits[0])
        if "full_attention" not in model.config.layer_types:  # that one grows with the longest row
            assert_same_state(padded.state.select(torch.tensor([row])), alone.state)


@pytest.mark.parametrize(("stack", "options"), CASES, ids=IDS)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    cuts=st.sets(st.integers(1, 18), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
@torch.no_grad()
def test_packed_documents_are_separate_documents(
    stack: str, options: dict, lengths: list[int], cuts: set[int], seed: int
) -> None:
    model, total = small_model(stack, **options), sum(lengths)
    tokens = random_tokens(1, total, seed)
    ids = torch.repeat_interleave(torch.arange(len(lengths)) + 5, torch.tensor(lengths))[None]
    logits, state = in_pieces(model, tokens, sorted(cut for cut in cuts if cut < total), ids)
    begin, alone = 0, None
    for length in lengths:
        alone = model(tokens[:, begin : begin + length], segment_ids=ids[:, begin : begin + length])
        assert_same(logits[:, begin : begin + length], alone.logits)
        begin += length
    assert alone is not None
    if "full_attention" in model.config.layer_types:
        follow = random_tokens(1, 3, seed + 1)
        assert_same(model(follow, state=state).logits, model(follow, state=alone.state).logits)
    else:
        assert_same_state(state, alone.state)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_packed_and_padded_rows_together(options: dict) -> None:
    model, tokens = small_model("taipan", **options), random_tokens(2, 12)
    ids = torch.tensor([[1] * 5 + [2] * 7, [4] * 3 + [9] * 9])
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :2], mask[1, 9:] = 0, 0
    out = model(tokens, attention_mask=mask, segment_ids=ids)
    for row, begin, end in ((0, 2, 5), (0, 5, 12), (1, 0, 3), (1, 3, 9)):
        assert_same(out.logits[row, begin:end], model(tokens[row : row + 1, begin:end]).logits[0])


@torch.no_grad()
def test_the_first_segment_ids_continue_the_document_of_a_state_without_any() -> None:
    model, tokens = small_model("taipan"), random_tokens(1, 15)
    ids = torch.tensor([[7] * 4 + [8] * 5])
    before = model(tokens[:, :6]).state
    out = model(tokens[:, 6:], state=before, segment_ids=ids)
    assert_same(out.logits[:, :4], model(tokens[:, :10]).logits[:, 6:])
    assert_same(out.logits[:, 4:], model(tokens[:, 10:]).logits)


@pytest.mark.parametrize("stack", ["taipan", "jamba", "samba"])
@torch.no_grad()
def test_fp32_splits_stay_within_1e5_of_the_fp64_oracle(stack: str) -> None:
    tokens = random_tokens(2, 40)
    oracle = small_model(stack)(tokens)
    model = small_model(stack, dtype=torch.float32)
    for cuts in ([], [1], [13, 14, 30], list(range(1, 40))):
        logits, state = in_pieces(model, tokens, cuts)
        assert_same(logits.double(), oracle.logits, 1e-5)
        for name, tensor in state.tensors().items():
            reference = oracle.state.tensors()[name]
            assert_same(tensor.double() if tensor.is_floating_point() else tensor, reference, 1e-5)


@pytest.mark.parametrize("stack", ["mamba2", "samba"])
@torch.no_grad()
def test_bf16_splits_stay_within_the_measured_rounding(stack: str) -> None:
    """The bound is twice the error that the whole forward itself makes against fp64 (no gates: a flip is no error)."""
    tokens = random_tokens(2, 24)
    oracle = small_model(stack)(tokens).logits
    model = small_model(stack, dtype=torch.bfloat16)
    error = (model(tokens).logits.double() - oracle).abs().max().item()
    for cuts in ([7], list(range(1, 24))):
        logits, _ = in_pieces(model, tokens, cuts)
        assert (logits.double() - oracle).abs().max().item() <= 2 * error
