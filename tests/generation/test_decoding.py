"""The native decoding step against the model's own forward, token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taipan import DecoderState, TaipanConfig, TaipanLM
from taipan.errors import ConfigError, InputError, StateError
from taipan.generation import decode, generate, prefill, start_decoding, stream
from taipan.generation.decoding import ModelDecoding, NativeDecoding
from taipan.generation.packing import pack
from taipan.generation.program import DecoderProgram, program_of
from taipan.state import Mamba2State
from tests.compilers import needs_kernels
from tests.models import EVERY_LAYER_TYPE, VARIANTS, force_gates, random_tokens, small_model
from tests.tolerance import relative_error

READINGS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "recall-linear": {"gate_input": "recall", "recall_orders": (2, 4), "recall_rank": 5},
    "lookahead": {"lookahead": 3, "refinement": "add"},
    "groups": {"n_groups": 2, "conv_kernel": 3, "time_step_limit": (0.01, 0.05)},
    "closed": {"attention_capacity": 0.0},
    "untied": {"tie_word_embeddings": False, "conv_kernel": 2, "residual_in_fp32": False},
}
pytestmark = needs_kernels


def ragged_state(model: TaipanLM) -> DecoderState:
    mask = torch.ones(3, 9)
    mask[1, :5] = mask[2, :1] = 0
    return prefill(model, random_tokens(3, 9), mask).state


def worst(found: DecoderState, expected: DecoderState) -> float:
    """Largest relative error of the tensors of a state, which must agree in all else."""
    errors = [0.0]
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        other = found.tensors()[name]
        assert other.shape == tensor.shape, name
        assert other.dtype == tensor.dtype, name
        if not tensor.is_floating_point():
            assert other.equal(tensor), name
        elif tensor.numel():
            errors.append(relative_error(other, tensor.double()))
    return max(errors)


def compare(model: TaipanLM, steps: int, weights: Any = "auto") -> tuple[float, float, NativeDecoding]:
    """Largest errors of logits and final state over many tokens that rows take part in or not."""
    state = ragged_state(model)
    before = state.fork()
    native, plain = start_decoding(model, state, weights=weights), ModelDecoding(model, state)
    assert isinstance(native, NativeDecoding)
    generator, error = torch.Generator().manual_seed(1), 0.0
    for t in range(steps):
        token_B = random_tokens(3, 1, seed=t)[:, 0]
        active_B = torch.rand(3, generator=generator) < 0.7 if t % 3 else None
        found, expected = native.step(token_B, active_B), plain.step(token_B, active_B)
        assert found.isfinite().all()
        rows = slice(None) if active_B is None else active_B
        if expected[rows].numel():
            error = max(error, relative_error(found[rows], expected[rows].double()))
    assert worst(state, before) == 0.0  # it was only read
    return error, worst(native.state, plain.state), native


# fp32: twice the largest error that was seen over all of these, 1.7e-6 and 1.2e-6; fp64 logits are handed out as fp32
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float64, (2e-7, 1e-13)), (torch.float32, (4e-6, 4e-6))])
@pytest.mark.parametrize("reading", READINGS)
def test_every_layer_type_is_the_models_own_step(reading: str, dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=dtype, **READINGS[reading])
    logits, state, _ = compare(model, 24)  # more than three windows
    assert logits < bounds[0]
    assert state < bounds[1]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("margin", [-5.0, 5.0])
@pytest.mark.parametrize("reading", ["all-positions", "selected-selected"])
def test_gates_all_open_or_all_closed(reading: str, margin: float) -> None:
    model = small_model("taipan", **READINGS[reading])
    force_gates(model, margin=margin)
    logits, state, _ = compare(model, 16)
    assert logits < 2e-7
    assert state < 1e-13


def test_the_recommended_setting_decodes_natively_in_every_preset() -> None:
    for name in TaipanConfig.presets():
        assert TaipanConfig.preset(name).remembered_tokens or not name.startswith("taipan")
    config = TaipanConfig.preset("taipan-tiny", capacity_window=40, vocab_size=61, eos_token_id=None)
    model = TaipanLM(config, generator=torch.Generator().manual_seed(0)).double().eval()
    logits, state, _ = compare(model, 60)
    assert logits < 2e-7
    assert state < 1e-12
    assert 0 < float(model(random_tokens(2, 100)).gates[0].rate) < 0.4


def test_full_attention_grows_beyond_its_spare_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.generation.decoding._SPARE", 2)
    logits, state, _ = compare(small_model("jamba"), 12)
    assert logits < 2e-7
    assert state < 1e-13


@pytest.mark.parametrize("reading", ["recall", "selected-selected", "weakest-ahead"])
def test_a_row_goes_on_from_another_text(reading: str) -> None:
    model = small_model(EVERY_LAYER_TYPE, **READINGS[reading])
    texts = [random_tokens(1, length, seed=length) for length in (3, 20, 9)]
    native = start_decoding(model, prefill(model, random_tokens(3, 11)).state)
    for row, text in enumerate(texts):
        native.put(row, prefill(model, text).state)
    more = random_tokens(3, 9, seed=5)
    logits = torch.stack([native.step(more[:, t]) for t in range(9)], 1)
    with torch.no_grad():
        for row, text in enumerate(texts):
            expected = model(torch.cat([text, more[row : row + 1]], 1)).logits[0, -9:]
            torch.testing.assert_close(logits[row], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_rows_do_not_meet(rows: int) -> None:
    model = small_model(EVERY_LAYER_TYPE)
    tokens = random_tokens(rows, 14)
    native = start_decoding(model, model.empty_state(rows))
    logits = torch.stack([native.step(tokens[:, t]) for t in range(14)], 1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["auto", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, 104, 200])  # whole registers, and not
def test_a_row_gets_the_same_bits_alone_and_beside_any_others(hidden: int, dtype: torch.dtype, weights: Any) -> None:
    sizes = {"hidden_size": hidden, "num_attention_heads": 4, "intermediate_size": 3 * hidden // 2 + 1}
    model = small_model(EVERY_LAYER_TYPE, dtype=dtype, **sizes)
    tokens_TB = random_tokens(9, 6).T
    alone = start_decoding(model, model.empty_state(1), weights=weights)
    expected = [alone.step(token_B[:1]) for token_B in tokens_TB]
    for rows in (2, 3, 4, 9):
        beside = start_decoding(model, model.empty_state(rows), weights=weights)
        for token_B, one_1V in zip(tokens_TB, expected, strict=True):
            assert beside.step(token_B[:rows])[:1].equal(one_1V), rows


# ---------------------------------------------------------------------- states that are written seldom


def started(
    model: TaipanLM, state: DecoderState, most_behind: int, in_cache: int = 0, weights: str = "auto"
) -> NativeDecoding:
    """Whose recurrent states may be so many tokens behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taipan.generation.decoding._MOST_BEHIND", most_behind)
        patch.setattr("taipan.generation.decoding._STATES_IN_CACHE", in_cache)
        decoding = start_decoding(model, state, weights=weights)
    assert isinstance(decoding, NativeDecoding)
    return decoding


def test_only_states_that_no_cache_holds_are_written_seldom() -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float32)
    state = model.empty_state(3)
    sizes = [layer.ssm_BHPN.nbytes for layer in state.layers if isinstance(layer, Mamba2State)]
    seldom, always = (started(model, state, 3, sum(sizes) - more) for more in (1, 0))
    for _ in range(2):
        assert seldom.step(torch.tensor([1, 2, 3])).equal(always.step(torch.tensor([1, 2, 3])))
    late, written = seldom._layers[0], always._layers[0]  # pyright: ignore[reportPrivateUsage]
    assert not late.second.any()  # nothing has been written
    assert written.second.any()
    assert worst(seldom.state, always.state) == 0.0
    assert late.second.equal(written.second)


@pytest.mark.parametrize("most_behind", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_is_the_same_however_seldom_it_is_written(dtype: torch.dtype, most_behind: int) -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=dtype, n_groups=2, state_size=33)
    state = ragged_state(model)
    other = prefill(model, random_tokens(1, 5, seed=3)).state
    seldom, always = (started(model, state, behind) for behind in (most_behind, 0))
    generator = torch.Generator().manual_seed(1)
    for t in range(30):
        token_B = random_tokens(3, 1, seed=t)[:, 0]
        active_B = torch.rand(3, generator=generator) < 0.7 if t % 3 else None
        assert seldom.step(token_B, active_B).equal(always.step(token_B, active_B))
        if t % 7 == 3:  # another text takes a row, whose state was behind
            seldom.put(t % 3, other)
            always.put(t % 3, other)
        if t % 11 == 5:
            assert worst(seldom.row(t % 3), always.row(t % 3)) == 0.0
    assert worst(seldom.state, always.state) == 0.0
    token_B = random_tokens(3, 1)[:, 0]
    again = started(model, seldom.state, most_behind)  # a text that goes on from a saved state
    assert again.step(token_B).equal(seldom.step(token_B))


def test_wide_products_with_odd_ends() -> None:
    model = small_model("taipan", dtype=torch.float32, hidden_size=104, num_attention_heads=4, intermediate_size=75)
    logits, state, _ = compare(model, 8)
    assert logits < 4e-6
    assert state < 4e-6


def rounded(model: TaipanLM, weights: str) -> TaipanLM:
    """The model with the matrices that the program reads, back in its own dtype."""
    copy = TaipanLM(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    for name, module in copy.named_modules():
        if isinstance(module, nn.Linear) and ".gate." not in name.replace("mlp.gate_proj", ""):
            module.weight.data.copy_(pack(module.weight, weights).dense())
    return copy


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_narrow_weights_are_the_model_with_rounded_matrices(weights: Any, dtype: torch.dtype) -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float64, tie_word_embeddings=False)
    exact = rounded(model, weights)
    state = ragged_state(model)
    native = start_decoding(model.to(dtype), state, weights=weights)
    plain = ModelDecoding(exact, state)
    bound = 2e-6 if dtype == torch.float64 else 8e-4 if weights == "int4" else 4e-4
    for t in range(20):
        token_B = random_tokens(3, 1, seed=t)[:, 0]
        assert relative_error(native.step(token_B), plain.step(token_B).double()) < bound


@pytest.mark.parametrize("rows", [1, 2])
def test_int8_products_of_one_row_and_of_many(rows: int) -> None:
    model = small_model(EVERY_LAYER_TYPE, hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    exact = rounded(model, "int8")
    state = model.empty_state(rows)
    native, plain = start_decoding(model.float(), state, weights="int8"), ModelDecoding(exact, state)
    for t in range(12):
        token_B = random_tokens(rows, 1, seed=t)[:, 0]
        # one row is rounded to 16 bits on its way into a product: twice what was seen
        assert relative_error(native.step(token_B), plain.step(token_B).double()) < 4e-4


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("weights", "columns"), [("int8", 4096), ("int8", 4176), ("int8", 3 * 4096), ("int4", 4176)])
def test_sums_at_their_largest(weights: Any, columns: int, rows: int) -> None:
    """Weights at the end of their range and all numbers of the vector at theirs: no sum of 16 or 32 bits overflows."""
    model = small_model(("full_attention",), hidden_size=64, intermediate_size=columns, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        layer = model.model.layers[0]
        for name, parameter in layer.named_parameters():
            if "o_proj" in name:
                parameter.zero_()
            elif "gate_proj" in name or "up_proj" in name:
                parameter.fill_(0.1)
            elif "down_proj" in name:  # rows of either end: the norm after it sees their difference
                high = 127.0 if weights == "int8" else 113.0
                end = torch.tensor([high, -127.0]).repeat(32)[:, None].expand_as(parameter).clone()
                if weights == "int4":  # the other end once in a group, so that its scale fits both
                    end[:, ::64] = high - 127 - end[:, :1]
                parameter.copy_(1e-7 * end)
    native, plain = start_decoding(model.float(), model.empty_state(rows), weights=weights), rounded(model, weights)
    found = native.step(torch.arange(rows))
    expected = ModelDecoding(plain, model.empty_state(rows)).step(torch.arange(rows))
    # vectors are rounded to 16 or 15 bits (above); a sum that wraps around is off by more than itself
    assert relative_error(found, expected.double()) < {"int8": 4e-4, "int4": 8e-4}[weights]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(("weights", "bound"), [("auto", 4e-6), ("bfloat16", 4e-6), ("int8", 4e-4), ("int4", 8e-4)])
@pytest.mark.parametrize("hidden", [64, 104, 200])  # whole registers, and not
def test_products_of_any_number_of_rows(hidden: int, weights: Any, bound: float) -> None:
    sizes = {"hidden_size": hidden, "num_attention_heads": 4, "intermediate_size": 75, "tie_word_embeddings": False}
    model = small_model(("mamba2", "full_attention"), dtype=torch.float32, **sizes)
    exact = rounded(model, weights)
    for rows in range(1, 10):
        state = model.empty_state(rows)
        native, plain = start_decoding(model, state, weights=weights), ModelDecoding(exact, state)
        for t in range(3):
            token_B = random_tokens(rows, 1, seed=t)[:, 0]
            found, expected = native.step(token_B), plain.step(token_B).double()
            assert relative_error(found, expected) < bound, rows


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("threads", [2, 3, 7])  # more than any of our machines has cores
def test_it_does_not_matter_who_computes_what(threads: int) -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float32, hidden_size=96, num_attention_heads=4)
    state, before = ragged_state(model), torch.get_num_threads()

    def logits(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        native = start_decoding(model, state)
        steps = [native.step(random_tokens(3, 1, seed=t)[:, 0]) for t in range(40)]
        return torch.stack([*steps, *(native.step(steps[0].argmax(1)) for _ in range(40))])

    try:
        assert logits(threads).equal(logits(1))
    finally:
        torch.set_num_threads(before)


def test_narrow_weights_read_fewer_bytes_and_lose_little() -> None:
    model = small_model("mamba2", dtype=torch.float32, hidden_size=64)
    sizes = {
        weights: program.nbytes
        for weights in ("auto", "bfloat16", "int8", "int4")
        if (program := packed(model, weights))
    }
    assert sizes["bfloat16"] * 2 == sizes["auto"]
    assert sizes["int8"] < 0.3 * sizes["auto"]
    assert sizes["int4"] < sizes["int8"]  # groups of 128 columns are filled up
    for weights, bound in (("bfloat16", 0.02), ("int8", 0.04), ("int4", 0.4)):
        assert 0 < compare(model, 12, weights)[0] < bound


def packed(model: TaipanLM, weights: Any) -> DecoderProgram:
    program = program_of(model, weights)
    assert isinstance(program, DecoderProgram)
    return program


def test_a_model_in_bfloat16_is_read_where_it_is() -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.bfloat16)
    state = ragged_state(model)
    native = start_decoding(model, state)
    assert packed(model, "auto").weights == "bfloat16"
    exact = small_model(EVERY_LAYER_TYPE, dtype=torch.float32)
    exact.load_state_dict(model.state_dict())
    plain = ModelDecoding(exact, state)
    for t in range(8):
        token_B = random_tokens(3, 1, seed=t)[:, 0]
        # what the state keeps is rounded to bfloat16 here
        assert relative_error(native.step(token_B), plain.step(token_B).double()) < 0.05
    # so that going on from a state handed out is going on
    again = start_decoding(model, native.state)
    assert again.step(token_B).equal(native.step(token_B))


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_model_in_bfloat16_decodes_rows_alone_and_together(rows: int) -> None:
    """Several rows are rounded on their way into a product, as in the model's forward; widths are what kernels like."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.bfloat16, **sizes)
    exact = small_model(EVERY_LAYER_TYPE, dtype=torch.float64, **sizes)
    exact.load_state_dict(model.state_dict())
    native = start_decoding(model, model.empty_state(rows))
    plain = ModelDecoding(exact, exact.empty_state(rows))
    for t in range(12):
        token_B = random_tokens(rows, 1, seed=t)[:, 0]
        # twice what was seen, which is half a rounding of bfloat16
        assert relative_error(native.step(token_B), plain.step(token_B)) < 5e-3


def test_changed_weights_are_packed_again() -> None:
    model = small_model("taipan", dtype=torch.float32)
    first = packed(model, "int8")
    assert packed(model, "int8") is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert packed(model, "int8") is not first
    state = ragged_state(model)
    token_B = torch.tensor([1, 2, 3])
    doubled = start_decoding(model, state, weights="int8").step(token_B)
    assert relative_error(doubled, ModelDecoding(model, state).step(token_B).double()) < 0.1


def test_what_is_not_covered_is_read_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(model: Any) -> str:
        found = program_of(model)
        assert isinstance(found, str)
        assert start_decoding(model, model.empty_state(1)).implementation == "model"
        with pytest.raises(ConfigError, match="weights='int8' needs the native decoding step.*Use weights='auto'"):
            generate(model, torch.tensor([[1]]), weights="int8")
        return found

    class Own(TaipanLM):
        pass

    hooked, adapted = small_model("taipan"), small_model("taipan")
    hooked.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hook" in reason(hooked)

    class Adapter(nn.Linear):
        pass

    adapted.model.layers[0].mixer.out_proj.__class__ = Adapter  # pyright: ignore
    assert "Adapter" in reason(adapted)
    assert "portable" in reason(TaipanLM(adapted.config, implementation="portable"))
    assert "forward of its own" in reason(Own(adapted.config))
    mixed = small_model("taipan")
    mixed.lm_head.to(torch.float32)
    mixed.model.norm.float()
    monkeypatch.setattr("taipan.generation.program.native_status", lambda _: NoLibrary())
    assert "no compiler today" in reason(small_model("taipan"))


class NoLibrary:
    library = None
    reason = "no compiler today"


def test_generation_by_the_native_step_is_generation_by_the_model() -> None:
    model = small_model(EVERY_LAYER_TYPE)
    plain = TaipanLM(model.config, implementation="reference").double().eval()
    plain.load_state_dict(model.state_dict())
    tokens = random_tokens(3, 11)
    for options in ({}, {"do_sample": True, "seed": 4}, {"eos_token_id": 7}):
        found = generate(model, tokens, max_new_tokens=12, return_details=True, **options)
        expected = generate(plain, tokens, max_new_tokens=12, return_details=True, **options)
        assert found.sequences.equal(expected.sequences)
        assert worst(found.state, expected.state) < 1e-11
    _, state, chosen = decoded(model, tokens)
    _, expected_state, expected_tokens = decoded(plain, tokens)
    assert chosen.equal(expected_tokens)
    assert worst(state, expected_state) < 1e-11


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 100.0}])  # no token twice
def test_one_token_after_a_state_is_a_step(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(EVERY_LAYER_TYPE)
    plain = TaipanLM(model.config, implementation="reference").double().eval()
    plain.load_state_dict(model.state_dict())
    state, token_B1 = prefill(model, random_tokens(3, 11)).state, random_tokens(3, 1, seed=5)
    options = {"max_new_tokens": 50, "state": state, "return_details": True, "eos_token_id": (), **options}
    expected = generate(plain, token_B1, **options)
    monkeypatch.delattr("taipan.generation.engine.read_prompt")
    found = generate(model, token_B1, **options)
    assert found.sequences.equal(expected.sequences)
    assert worst(found.state, expected.state) < 1e-11


def decoded(model: TaipanLM, tokens: Tensor) -> tuple[Tensor, DecoderState, Tensor]:
    reading = prefill(model, tokens)
    chosen, state = decode(model, reading.state, reading.logits_BV.argmax(1), 5)
    return reading.logits_BV, state, chosen


def test_the_state_of_any_step_can_be_had_at_any_time() -> None:
    model = small_model(EVERY_LAYER_TYPE)
    tokens = random_tokens(2, 5)
    at_once = [step.state for step in stream(model, tokens, max_new_tokens=6, eos_token_id=3)]
    steps = list(stream(model, tokens, max_new_tokens=6, eos_token_id=3))
    for step, state in zip(steps, at_once, strict=True):
        assert worst(step.state, state) < 1e-13


def test_wrong_use_is_named() -> None:
    model = small_model("taipan")
    native = start_decoding(model, model.empty_state(2))
    with pytest.raises(InputError, match=r"shape \(3,\).*2 rows"):
        native.step(torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match="Token id 61 is out of range"):
        native.step(torch.tensor([1, 61]))
    with pytest.raises(StateError, match="another configuration"):
        start_decoding(model, small_model("mamba2").empty_state(2))
    with pytest.raises(InputError, match="weights is 'int2'.*bfloat16, int8, int4"):
        generate(model, torch.tensor([[1]]), weights="int2")
