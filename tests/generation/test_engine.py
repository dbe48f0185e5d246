"""The engine against plain loops on models one can see through."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError
from taipan.generation import GenerateOutput, GenerationSettings, StepOutput, generate, inference, prefill, stream
from tests.generation.models import RecurrentFake, Scripted

examples = settings(max_examples=25, deadline=None)
MODEL = RecurrentFake()
prompts = st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=9), min_size=1, max_size=4)


def naive(prompt: list[int], steps: int, penalty: float = 1.0) -> list[int]:
    """Greedy continuation, the whole sequence read anew for every token."""
    row = list(prompt)
    for _ in range(steps):
        logits = MODEL(torch.tensor([row])).logits[0, -1]
        for token in set(row):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


def padded(rows: list[list[int]], side: str, holes: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Rows in one tensor, padding filled with nonsense, and the mask."""
    width = max(len(row) for row in rows) + (3 if holes is not None else 0)
    tokens = torch.randint(0, 11, (len(rows), width))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        place = torch.arange(len(row)) if side == "right" else torch.arange(width - len(row), width)
        if holes is not None:
            place = torch.randperm(width, generator=holes)[: len(row)].sort().values
        tokens[b, place] = torch.tensor(row)
        mask[b, place] = 1
    return tokens, mask


def details(*args: Any, **options: Any) -> GenerateOutput:
    return generate(*args, return_details=True, **options)


@examples
@given(prompts, st.sampled_from(["left", "right", "holes"]), st.integers(1, 12))
def test_greedy_of_a_ragged_batch_is_the_naive_loop_of_each_row(rows: list[list[int]], side: str, chunk: int) -> None:
    tokens, mask = padded(rows, side, torch.Generator().manual_seed(chunk) if side == "holes" else None)
    out = details(MODEL, tokens, mask, max_new_tokens=5, prefill_chunk=chunk)
    assert out.sequences[:, : tokens.shape[1]].equal(tokens)
    for b, row in enumerate(rows):
        new = naive(row, 5)
        assert out.sequences[b, tokens.shape[1] :].tolist() == new
        torch.testing.assert_close(out.state.h[b], MODEL(torch.tensor([row + new])).state.h[0])


@examples
@given(prompts, st.integers(0, 10), st.sampled_from(["left", "right"]))
def test_rows_end_at_eos_and_their_state_stays(rows: list[list[int]], eos: int, side: str) -> None:
    tokens, mask = padded(rows, side)
    out = details(MODEL, tokens, mask, max_new_tokens=8, eos_token_id=eos, pad_token_id=3)
    for b, row in enumerate(rows):
        new = naive(row, 8)
        ended = eos in new
        new = new[: new.index(eos) + 1] if ended else new
        assert out.finish_reasons[b] == ("eos" if ended else "length")
        assert int(out.lengths[b]) == len(new)
        written = out.sequences[b, tokens.shape[1] :].tolist()
        assert written[: len(new)] == new
        assert set(written[len(new) :]) <= {3}
        torch.testing.assert_close(out.state.h[b], MODEL(torch.tensor([row + new])).state.h[0])
    assert out.sequences.shape[1] == tokens.shape[1] + int(out.lengths.max())


@examples
@given(prompts.filter(lambda rows: len({len(row) for row in rows}) == 1), st.integers(1, 6))
def test_going_on_from_a_state_is_going_on(rows: list[list[int]], steps: int) -> None:
    tokens = torch.tensor(rows)
    first = details(MODEL, tokens, max_new_tokens=steps)
    more = torch.randint(0, 11, (len(rows), 2))
    resumed = generate(MODEL, more, state=first.state, max_new_tokens=4)
    whole = generate(MODEL, torch.cat([first.sequences, more], 1), max_new_tokens=4)
    assert resumed[:, 2:].equal(whole[:, -4:])


@examples
@given(prompts, st.floats(0.3, 4.0), st.sampled_from(["left", "right"]))
def test_repetition_penalty_counts_prompt_and_generated_tokens(
    rows: list[list[int]], penalty: float, side: str
) -> None:
    tokens, mask = padded(rows, side)
    out = generate(MODEL, tokens, mask, max_new_tokens=6, repetition_penalty=penalty, prefill_chunk=3)
    assert out[:, tokens.shape[1] :].tolist() == [naive(row, 6, penalty) for row in rows]


@examples
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 6))
def test_pieces_read_one_by_one_are_the_whole(lengths: list[int], chunk: int) -> None:
    model = RecurrentFake()
    tokens = torch.randint(0, 11, (2, sum(lengths)))
    pulled: list[int] = []

    def pieces() -> Iterator[Tensor]:
        for piece in tokens.split(lengths, 1):
            pulled.append(sum(model.lengths))
            yield piece

    whole = prefill(MODEL, tokens)
    out = prefill(model, pieces(), chunk=chunk)
    torch.testing.assert_close(out.logits_BV, whole.logits_BV)
    torch.testing.assert_close(out.state.h, whole.state.h)
    # never more than a chunk at once, and what has come is read before more is asked for
    assert max(model.lengths) <= chunk
    assert all(sum(lengths[:i]) - read < chunk for i, read in enumerate(pulled))
    options: dict[str, Any] = {"max_new_tokens": 3, "repetition_penalty": 1.7, "prefill_chunk": chunk}
    steps = torch.stack([step.tokens_B for step in stream(MODEL, iter(tokens.split(lengths, 1)), **options)], 1)
    assert steps.equal(generate(MODEL, tokens, **options)[:, tokens.shape[1] :])


def test_memory_of_a_prompt_does_not_depend_on_its_length() -> None:
    model = RecurrentFake()
    generate(model, torch.zeros(1, 1000, dtype=torch.int64), max_new_tokens=1, prefill_chunk=64)
    assert max(model.lengths) == 64


def test_padding_costs_no_calls() -> None:
    model = RecurrentFake()
    mask = torch.zeros(2, 100, dtype=torch.int64)
    mask[0, :3] = mask[1, :2] = 1
    generate(model, torch.zeros(2, 100, dtype=torch.int64), mask, max_new_tokens=1, prefill_chunk=10)
    assert model.lengths == [3]


def test_sampling_is_decided_by_seed_and_row_alone() -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "temperature": 3.0}
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2]])
    out = generate(MODEL, tokens, seed=5, **options)
    assert out.equal(generate(MODEL, tokens, seed=5, **options))
    assert not out.equal(generate(MODEL, tokens, seed=6, **options))
    assert not out[0].equal(out[2])  # equal prompts, other rows
    other = generate(MODEL, torch.tensor([[9, 9], [3, 4], [0, 0]]), seed=5, **options)
    assert out[1].equal(other[1])


def test_sampling_without_a_seed_follows_the_global_generator() -> None:
    def sample() -> Tensor:
        return generate(MODEL, torch.tensor([[1]]), do_sample=True, max_new_tokens=20, temperature=3.0)

    torch.manual_seed(1)
    first, second = sample(), sample()
    torch.manual_seed(1)
    assert sample().equal(first)
    assert not second.equal(first)


def test_samples_follow_the_model() -> None:
    tokens = torch.zeros(4000, 1, dtype=torch.int64)
    out = generate(MODEL, tokens, do_sample=True, seed=1, max_new_tokens=1, temperature=2.0, top_k=4)
    logits = MODEL(tokens[:1]).logits[0, -1] / 2
    best = logits.topk(4)
    expected = torch.zeros(11, dtype=torch.float64).scatter(0, best.indices, best.values.softmax(0)).detach()
    torch.testing.assert_close(out[:, 1].bincount(minlength=11) / 4000, expected.float(), atol=0.03, rtol=0)


def test_sampling_settings_reach_the_choice() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    likeliest = generate(MODEL, tokens, max_new_tokens=6)
    narrow: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}]
    for options in narrow:
        assert generate(MODEL, tokens, max_new_tokens=6, do_sample=True, seed=0, **options).equal(likeliest), options


TEXT = Tokenizer.bytes()


def says(*texts: str) -> Scripted:
    return Scripted([TEXT.encode(text) for text in texts], eos_token_id=256, pad_token_id=0)


def generated(model: Scripted, **options: Any) -> tuple[list[str], GenerateOutput]:
    out = details(model, torch.zeros(len(model.scripts), 1, dtype=torch.int64), tokenizer=TEXT, **options)
    return [
        TEXT.decode(row[1 : 1 + n]) for row, n in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)
    ], out


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("one STOP two", ("STOP",), "one STOP"),
        ("one STOP two", ("two", "STOP"), "one STOP"),
        ("SSTSTOSTOP!", ("STOP",), "SSTSTOSTOP"),  # what looked like a beginning was not one
        ("größer € end", ("€",), "größer €"),  # a character of three tokens
        ("größer € end", "ß", "größ"),
        ("a\n\nb", ("\n\n",), "a\n\n"),
        ("x", ("x",), "x"),
    ],
)
def test_stop_strings_over_many_tokens(said: str, stop: Any, expected: str) -> None:
    texts, out = generated(says(said), stop_strings=stop, max_new_tokens=40)
    assert texts == [expected]
    assert out.finish_reasons == ("stop_string",)


def test_stop_strings_inside_one_token() -> None:
    tokenizer = Tokenizer.train_bpe(["xENDx " * 50], 300)
    ids = tokenizer.encode("xENDx")
    assert len(ids) == 1
    model = Scripted([[*ids, 1, 2]])
    out = details(model, torch.tensor([[0]]), tokenizer=tokenizer, stop_strings=("END",), max_new_tokens=5)
    assert out.sequences.tolist() == [[0, *ids]]


def test_a_broken_character_hides_no_stop_string_and_is_none() -> None:
    model = Scripted([[0xE2, 0x82, *b"END"], [0xE2, 0x82, 0x58, 0x59]])
    out = details(
        model, torch.zeros(2, 1, dtype=torch.int64), tokenizer=TEXT, stop_strings=("END", "€"), max_new_tokens=5
    )
    assert out.finish_reasons == ("stop_string", "length")


def test_each_row_ends_for_its_own_reason() -> None:
    model = says("aXbbbbbb", "cc", "dddddd")
    model.scripts[1].append(256)
    texts, out = generated(model, stop_strings=("X",), max_new_tokens=5)
    assert texts == ["aX", "cc", "ddddd"]
    assert out.finish_reasons == ("stop_string", "eos", "length")
    assert out.lengths.tolist() == [2, 3, 5]
    assert out.state.h.tolist() == [1 + 2, 1 + 3, 1 + 5]  # prompt and own tokens, the last included
    assert out.sequences[0].tolist() == [0, *b"aX", 0, 0, 0]


@pytest.mark.parametrize(
    ("configured", "given", "expected"),
    [(256, None, 2), (256, 100, 1), (256, (98, 256), 0), (256, (), 3), (None, None, 3)],
)
def test_which_tokens_end_a_row(configured: int | None, given: Any, expected: int) -> None:
    model = Scripted([[98, 100, 256, 0]], eos_token_id=configured)
    out = details(model, torch.tensor([[0]]), eos_token_id=given, max_new_tokens=4)
    assert int(out.lengths[0]) == expected + 1


@pytest.mark.parametrize(
    ("configured", "given", "eos", "expected"), [(7, None, 9, 7), (7, 8, 9, 8), (None, None, 9, 9), (None, None, (), 0)]
)
def test_which_token_pads(configured: int | None, given: int | None, eos: Any, expected: int) -> None:
    chosen = GenerationSettings(pad_token_id=given, eos_token_id=eos)
    assert chosen.pad_token(configured, chosen.end_tokens(None)) == expected


def test_a_stream_says_what_generate_returns() -> None:
    tokens = torch.tensor([[1, 1], [3, 8]])
    seen: list[StepOutput] = []
    out = generate(MODEL, tokens, max_new_tokens=6, eos_token_id=1, streamer=seen.append)
    assert torch.stack([step.tokens_B for step in seen], 1).equal(out[:, 2:])
    assert seen[-1].finished_B.all()
    assert not seen[0].finished_B.all()
    assert seen[0].generated_B.all()
    for before, after in itertools.pairwise(seen):
        assert after.generated_B.equal(~before.finished_B)
    for n, step in enumerate(seen):
        if step.generated_B.all():
            torch.testing.assert_close(step.state.h, MODEL(out[:, : 3 + n]).state.h)


def test_asking_for_the_state_of_a_step_costs_no_call() -> None:
    model = RecurrentFake()
    for step in stream(model, torch.tensor([[1, 2]]), max_new_tokens=4):
        assert step.state.h.equal(step.state.h)
    assert model.lengths == [2, 1, 1, 1, 1]
    model.lengths.clear()
    generate(model, torch.tensor([[1, 2]]), max_new_tokens=4)
    assert model.lengths == [2, 1, 1, 1]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_runs_in_evaluation_mode_and_leaves_every_mode_as_it_was() -> None:
    model = RecurrentFake().train()
    model.inner.eval()  # a frozen part stays so
    before = modes(model)
    steps = stream(model, torch.tensor([[1]]), max_new_tokens=2)
    for _ in steps:
        assert modes(model) == before
        assert torch.is_grad_enabled()
    assert model.modes == [(False, False)] * 2
    with pytest.raises(ZeroDivisionError), inference(model):
        raise ZeroDivisionError
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_a_state_can_be_trained_from() -> None:
    out = details(MODEL, torch.tensor([[1, 2]]), max_new_tokens=2)
    read = prefill(MODEL, torch.tensor([[1, 2]]))
    step = next(stream(MODEL, torch.tensor([[1, 2]])))
    for state in (out.state, read.state, step.state):
        MODEL.zero_grad()
        assert not state.h.requires_grad
        MODEL(torch.tensor([[3]]), state=state).logits.sum().backward()
        assert MODEL.recurrent.grad is not None
    assert not any(tensor.is_inference() for tensor in (out.sequences, out.lengths, read.logits_BV, step.tokens_B))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "no tokens.*at least one"),
    ({"tokens": torch.zeros(0, 3, dtype=torch.int64)}, r"\(0, 3\).*\(rows, tokens\)"),
    ({"tokens": torch.tensor([[1, 11]])}, "11 is out of range.*0 to 10.*tokenizer"),
    ({"tokens": torch.tensor([[-1, 1]])}, "-1 is out of range"),
    ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\).*\(2, 2\)"),
    ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, r"rows \[1\] have no real token"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0.*at least 1"),
    ({"max_new_tokens": 2**63}, "max_new_tokens is 9223372036854775808.*64 bits"),
    ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_k": -2}, "top_k is -2"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"eos_token_id": (1, 11)}, "eos_token_id 11 is out of range.*0 to 10"),
    ({"pad_token_id": 99}, "pad_token_id 99 is out of range"),
    ({"stop_strings": ("",)}, "stop_strings.*at least one character"),
    ({"stop_strings": ("x",)}, "stop_strings.*tokenizer"),
    ({"max_tokens": 3}, "Unknown generation setting 'max_tokens'.*did you mean 'max_new_tokens'"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_arguments_are_named_before_anything_is_computed(wrong: dict[str, Any], message: str) -> None:
    model = RecurrentFake()
    arguments: dict[str, Any] = {"tokens": torch.tensor([[1, 2], [3, 4]]), **wrong}
    with pytest.raises(InputError, match=message):
        stream(model, **arguments)  # already here, not when the first token is asked for


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "no tokens"),
        ([torch.zeros(1, 0, dtype=torch.int64)], "no tokens"),
        ([torch.tensor([[1]]), torch.tensor([[1], [2]])], "2 rows after one of 1"),
        ([torch.tensor([[1]]), torch.tensor([[12]])], "12 is out of range"),
        ([torch.tensor([1, 2])], r"shape \(2,\)"),
        ([torch.tensor([[1.5]])], "float32"),
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_wrong_pieces_are_named(pieces: list[Tensor], message: str, penalty: float) -> None:
    with pytest.raises(InputError, match=message):
        next(stream(MODEL, pieces, repetition_penalty=penalty))


def test_pieces_take_no_mask() -> None:
    with pytest.raises(InputError, match="whole tokens"):
        prefill(MODEL, [torch.tensor([[1]])], torch.tensor([[1]]))


def test_settings_can_be_prepared_and_overridden() -> None:
    prepared = GenerationSettings(max_new_tokens=3, do_sample=True, seed=4)
    out = generate(MODEL, torch.tensor([[1]]), settings=prepared)
    assert out.equal(generate(MODEL, torch.tensor([[1]]), max_new_tokens=3, do_sample=True, seed=4))
    assert generate(MODEL, torch.tensor([[1]]), settings=prepared, max_new_tokens=5).shape == (1, 6)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"repetition_penalty": 1.5}])
def test_ids_without_a_token_are_never_drawn(options: dict[str, Any]) -> None:
    """The model wants nothing else: 270 to 299 are no bytes."""
    model = Scripted([[270, 299, 65, 280]], eos_token_id=256)
    tokens = torch.tensor([[66]])
    free = generate(model, tokens, max_new_tokens=4, **options)[0, 1:].tolist()
    if not options.get("do_sample"):
        assert free == [270, 299, 65, 280]
    for known in ({"tokenizer": Tokenizer.bytes()}, {"suppress_tokens": list(range(257, 300))}):
        found = generate(model, tokens, max_new_tokens=40, eos_token_id=(), **known, **options)[0, 1:].tolist()
        assert max(found) < 257
        if not options.get("do_sample"):
            assert found[2] == 65
    assert generate(model, tokens, max_new_tokens=4, suppress_tokens=[270, 280], **options)[0, 1] != 270


def test_a_model_that_wants_only_ids_without_a_token_draws_evenly_from_the_others() -> None:
    model = Scripted([[270] * 300])
    found = generate(
        model, torch.tensor([[66]]), tokenizer=Tokenizer.bytes(), max_new_tokens=300, do_sample=True, seed=0, top_k=5
    )
    assert int(found.max()) < 257


def test_the_text_of_a_prompt_is_before_the_first_stop_string() -> None:
    """Tokenizers with words that hold their space: the first new word has one, unless a text begins with it."""
    tokenizer = sentences()
    snake, waits, end = (tokenizer._backend.token_to_id(token) or 0 for token in ("▁Snake", "▁waits", "</s>"))  # pyright: ignore
    script = [waits, snake, waits, snake]
    mask = torch.tensor([[0, 1], [1, 1]])
    tokens = torch.tensor([[snake, snake], [snake, end]])

    def lengths(prompt: Any, mask: Any, script: list[list[int]], count: int, stop: str) -> list[int]:
        model = Scripted(script, prompt=count)
        options = {"tokenizer": tokenizer, "stop_strings": stop, "max_new_tokens": 4}
        return details(model, prompt, mask, **options).lengths.tolist()

    for stop, expected in ((" waits", 1), ("waits", 1), (" waits Sn", 2), (" Snake waits", 3)):
        assert lengths(torch.tensor([[snake]]), None, [script], 1, stop) == [expected], stop
    assert lengths(torch.tensor([[end]]), None, [script], 1, " waits") == [3]  # the first begins a text
    assert lengths(torch.tensor([[snake, end]]), None, [script], 2, " waits") == [1]
    pieces = iter([torch.tensor([[snake]]), torch.tensor([[end]])])
    model = Scripted([script], prompt=2)
    assert len(list(stream(model, pieces, tokenizer=tokenizer, stop_strings=" waits", max_new_tokens=4))) == 1
    assert lengths(tokens, mask, [[snake, *script], script], 1, " waits") == [2, 2]


def sentences() -> Tokenizer:
    import tokenizers

    words = ["<unk>", "</s>", "▁Snake", "▁waits", "▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    vocabulary = {token: index for index, token in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, "</s>")


def test_a_stop_string_of_bytes_is_found_before_the_run_of_bytes_is_over() -> None:
    tokenizer = sentences()
    han = [tokenizer._backend.token_to_id(f"<0x{value:02X}>") or 0 for value in "漢".encode()]  # pyright: ignore
    out = details(
        Scripted([[*han, *han]]), torch.tensor([[2]]), tokenizer=tokenizer, stop_strings="漢", max_new_tokens=6
    )
    assert out.lengths.tolist() == [3]
