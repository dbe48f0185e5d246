"""Evaluation against the definition: one forward per context, whole logits."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan import TaipanLM
from taipan.data.corpus import Document
from taipan.data.shards import TokenDataset, prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import DataError, InputError
from taipan.evaluation import EvaluationResult, TextDocuments, evaluate
from tests.models import small_model

EOS = 256
BYTES = Tokenizer.bytes()
TEXTS = ["A first text, of some length: " + "word " * 20, "", "ä€x", "short", "z" * 70, "the end"]


@pytest.fixture(scope="module")
def model() -> TaipanLM:
    return small_model(("mamba2", "selective_attention"), vocab_size=257)


@cache
def naive(model: TaipanLM, context: int | None) -> tuple[list[float], list[int]]:
    """Nats and position of every token of all texts."""
    nats: list[float] = []
    positions: list[int] = []
    for text in TEXTS:
        ids = [EOS, *text.encode()]
        for start in range(1, len(ids), context or len(ids)):
            target = torch.tensor(ids[start : start + (context or len(ids))])
            with torch.no_grad():
                logits = model(torch.tensor([ids[start - 1 : start - 1 + len(target)]])).logits[0]
            nats += torch.nn.functional.cross_entropy(logits.double(), target, reduction="none").tolist()
            positions += range(len(target))
    return nats, positions


@settings(max_examples=5, deadline=None)
@given(context=st.sampled_from([None, 7, 64, 65, 500]), piece=st.integers(16, 90), batch=st.integers(80, 500))
def test_every_token_is_predicted_once_from_its_context(
    model: TaipanLM, context: int | None, piece: int, batch: int
) -> None:
    result = evaluate(model, TextDocuments(TEXTS, BYTES), context=context, piece=piece, batch_tokens=batch)
    nats, positions = naive(model, context)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (result.documents, result.tokens, result.bytes) == (len(TEXTS), n_bytes, n_bytes)
    assert result.nats == pytest.approx(sum(nats))
    assert result.nats_per_token == pytest.approx(sum(nats) / n_bytes)
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / n_bytes))
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / n_bytes)
    for bucket in result.by_position:
        inside = [n for n, p in zip(nats, positions, strict=True) if bucket.start <= p < bucket.stop]
        assert bucket.tokens == len(inside)
        assert bucket.nats_per_token == pytest.approx(sum(inside) / len(inside))
        assert bucket.bits_per_byte == pytest.approx(sum(inside) / len(inside) / math.log(2))
    assert sum(bucket.tokens for bucket in result.by_position) == n_bytes


@pytest.mark.parametrize("stack", [("full_attention", "mamba2"), ("mamba2", "sliding_attention")])
def test_every_layer_type_is_read_in_pieces(stack: tuple[str, ...]) -> None:
    other = small_model(stack, vocab_size=257)
    result = evaluate(other, TextDocuments(TEXTS, BYTES), piece=32, batch_tokens=100)
    assert result.nats == pytest.approx(sum(naive(other, None)[0]))
    assert result.gates == ()


def test_a_model_that_knows_nothing_pays_for_every_byte() -> None:
    model = small_model("taipan", vocab_size=257)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate(model, TextDocuments(TEXTS, BYTES))
    assert result.bits_per_byte == pytest.approx(math.log2(257))
    assert all(bucket.bits_per_byte == pytest.approx(math.log2(257)) for bucket in result.by_position)


def test_buckets_double_and_touch(model: TaipanLM) -> None:
    result = evaluate(model, TextDocuments(["x" * 600], BYTES))
    edges = [(bucket.start, bucket.stop) for bucket in result.by_position]
    assert edges == [(0, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    assert [bucket.tokens for bucket in result.by_position] == [64, 64, 128, 256, 88]


def test_bytes_of_a_bucket_are_those_of_its_tokens() -> None:
    tokenizer = Tokenizer.train_bpe(["tree house " * 200, "leaf"], 280)
    model = small_model("taipan", vocab_size=tokenizer.vocab_size)
    texts = ["tree house " * 100, "leaf leaf €"]
    result = evaluate(model, TextDocuments(texts, tokenizer), piece=64)
    parts = [
        bucket.tokens * bucket.nats_per_token / math.log(2) / bucket.bits_per_byte for bucket in result.by_position
    ]
    assert sum(parts) == pytest.approx(result.bytes)
    ids = [tokenizer.encode(text) for text in texts]
    assert parts[0] == pytest.approx(sum(len(tokenizer.decode(row[:64]).encode()) for row in ids))


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return prepare([Document(f"{n}", text) for n, text in enumerate(TEXTS)], BYTES, tmp_path / "data", shard_tokens=50)


def without_time(result: EvaluationResult) -> dict[str, Any]:
    return {key: value for key, value in result.to_dict().items() if key != "seconds"}


def test_a_prepared_data_set_is_its_texts(model: TaipanLM, dataset: TokenDataset) -> None:
    for context in (None, 16):
        prepared = evaluate(model, dataset, context=context, piece=32)
        assert without_time(prepared) == without_time(
            evaluate(model, TextDocuments(TEXTS, BYTES), context=context, piece=32)
        )


def test_gates_are_counted_over_all_tokens() -> None:
    model = small_model("taipan", vocab_size=257, gumbel_noise_end=1.0)
    model.sals[0].gate.threshold.fill_(0.3)
    text = "what a gate selects " * 12
    result = evaluate(model, TextDocuments([text, text[:50]], BYTES), piece=37)
    with torch.no_grad():
        rows = [model(torch.tensor([[EOS, *part.encode()][:-1]])) for part in (text, text[:50])]
    for number, gate in enumerate(result.gates):
        margin = torch.cat([row.gates[number].margin_BT[0] for row in rows])
        alpha = torch.cat([row.gates[number].alpha_BT[0] for row in rows]).double()
        assert gate.layer == (1, 3)[number]
        assert gate.threshold == pytest.approx((0.3, 0.0)[number])
        assert gate.noise_free_rate == gate.rate == pytest.approx(float((margin > gate.threshold).double().mean()))
        assert gate.training_rate == pytest.approx(float(margin.sigmoid().mean()))
        assert gate.alpha_mean == pytest.approx(float(alpha.mean()))
        assert gate.alpha_std == pytest.approx(float(alpha.std(correction=0)), rel=1e-4)
        assert 0.05 < gate.rate < 0.95
        assert gate.alpha_selected == pytest.approx(float(alpha[margin > gate.threshold].mean()))


def test_a_closed_gate_has_no_selected_alpha() -> None:
    model = small_model("taipan", vocab_size=257, attention_capacity=0.0)
    assert {gate.alpha_selected for gate in evaluate(model, TextDocuments(["text"], BYTES)).gates} == {None}


def test_the_result_is_plain_json(model: TaipanLM) -> None:
    result = evaluate(model, TextDocuments(["some text"], BYTES))
    read = json.loads(json.dumps(result.to_dict()))
    assert read["bits_per_byte"] == result.bits_per_byte
    assert read["by_position"][0]["tokens"] == 9
    assert [gate["layer"] for gate in read["gates"]] == [1]


def test_an_open_gate_is_valid_json_too() -> None:
    model = small_model("taipan", vocab_size=257)
    model.sals[1].gate.threshold.fill_(-math.inf)
    result = evaluate(model, TextDocuments(["some text"], BYTES))
    assert result.gates[1].rate == 1
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert float(read["gates"][1]["threshold"]) == -math.inf


def test_forward_calls_are_bounded_and_ended_rows_are_dropped(model: TaipanLM) -> None:
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    evaluate(model, TextDocuments(["z" * 10, "x" * 100, "ab", "y" * 30], BYTES), piece=16, batch_tokens=32)
    hook.remove()
    assert shapes == [(2, 16)] * 3 + [(1, 16)] * 3 + [(1, 4)]


def test_many_short_documents_take_the_memory_of_a_long_one(model: TaipanLM) -> None:
    """Neither a state for each of them nor another shape for every call, for which libraries keep something."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    texts = TextDocuments(["z" * length for length in range(1, 61)], BYTES)
    result = evaluate(model, texts, piece=64, batch_tokens=256)
    hook.remove()
    assert result.tokens == sum(range(1, 61))
    assert set(shapes[:-1]) == {(4, 64)}
    assert len(shapes) == -(-result.tokens // 256)


def test_progress_is_told_token_by_token(model: TaipanLM) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, TextDocuments(TEXTS, BYTES), piece=50, progress=lambda done, total: seen.append((done, total)))
    total = sum(len(text.encode()) for text in TEXTS)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_the_model_is_left_in_its_mode_and_runs_without_noise() -> None:
    noisy = small_model("taipan", vocab_size=257, gumbel_noise_end=1.0)
    expected = evaluate(noisy, TextDocuments(TEXTS, BYTES))
    assert without_time(evaluate(noisy.train(), TextDocuments(TEXTS, BYTES))) == without_time(expected)
    assert all(module.training for module in noisy.modules())


@pytest.mark.parametrize("name", ["context", "piece", "batch_tokens"])
def test_numbers_below_one_are_named(model: TaipanLM, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0.*at least 1"):
        evaluate(model, TextDocuments(TEXTS, BYTES), **{name: 0})


def test_nothing_to_predict_is_an_error(model: TaipanLM) -> None:
    with pytest.raises(DataError, match="no tokens"):
        evaluate(model, TextDocuments(["", ""], BYTES))


def test_data_of_a_larger_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="257 tokens but the model only 61"):
        evaluate(small_model("taipan"), TextDocuments(TEXTS, BYTES))
