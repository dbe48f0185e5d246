"""Text in, text out: what `taipan generate` and `taipan evaluate` give, in pieces as in one."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import taipan
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, InputError, StateError
from taipan.evaluation import TextDocuments, evaluate
from taipan.text import DEFAULTS, TextModel, TextState, _pieces
from tests.models import small_model

TEXT = "The taipan waits; été, 日本語, 🐍.\n"
WHOLE = TEXT * 9


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def model(request: pytest.FixtureRequest) -> TextModel:
    tokenizer = Tokenizer.bytes() if request.param == "bytes" else Tokenizer.train_bpe([WHOLE], 290)
    return TextModel(
        small_model(dtype=torch.float64, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id), tokenizer
    )


def pieces_of(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def same_state(found: TextState, expected: TextState) -> None:
    assert found.tokens == expected.tokens
    assert found.last == expected.last
    torch.testing.assert_close(found.logits_BV, expected.logits_BV)
    tensors = expected.decoder.tensors()
    assert found.decoder.tensors().keys() == tensors.keys()
    for name, tensor in found.decoder.tensors().items():
        torch.testing.assert_close(tensor, tensors[name])


def test_loads_lazily_from_the_public_surface() -> None:
    code = "import sys, taipan; assert 'torch' not in sys.modules; taipan.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    assert {"load", "TextModel", "TextScore", "TextState", "TextStream"} <= set(taipan.__all__)


def test_generates_what_the_engine_gives(model: TextModel) -> None:
    ids = model.tokenizer.encode(TEXT)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 0, "max_new_tokens": 12}
    sequence = model.model.generate(torch.tensor([ids]), **options)[0].tolist()
    assert model.generate(TEXT, max_new_tokens=12) == model.tokenizer.decode(sequence[len(ids) :])
    greedy = model.model.generate(torch.tensor([ids]), max_new_tokens=12)[0].tolist()
    expected = model.tokenizer.decode(greedy[len(ids) :])
    assert model.generate(TEXT, max_new_tokens=12, do_sample=False) == expected


def test_a_stream_gives_the_text_and_knows_where_it_stands(model: TextModel) -> None:
    stream = model.generate(TEXT, stream=True, max_new_tokens=12, eos_token_id=())
    assert (stream.tokens_read, stream.tokens_written, stream.finish_reason) == (0, 0, None)
    with pytest.raises(InputError, match="Nothing has been written yet"):
        _ = stream.state
    first = next(stream)
    assert (stream.tokens_read, stream.tokens_written) == (len(model.tokenizer.encode(TEXT)), 1)
    assert first + "".join(stream) == model.generate(TEXT, max_new_tokens=12, eos_token_id=())
    assert (stream.tokens_written, stream.finish_reason) == (12, "length")


def test_reading_in_pieces_is_reading_whole(model: TextModel) -> None:
    expected = model.read(WHOLE)
    assert expected.tokens == len(model.tokenizer.encode(WHOLE))
    same_state(model.read(pieces_of(WHOLE, 5)), expected)
    same_state(model.read(WHOLE, piece=3), expected)
    same_state(model.read(TEXT * 4, state=model.read(TEXT * 5)), expected)


def test_a_state_is_taken_on_by_every_method_and_left_as_it_is(model: TextModel) -> None:
    state = model.read(TEXT * 5)
    kept = {name: tensor.clone() for name, tensor in state.decoder.tensors().items()}
    assert model.generate(TEXT * 4, state=state, max_new_tokens=9) == model.generate(WHOLE, max_new_tokens=9)
    after = model.score(TEXT * 4, state=state)
    whole = model.score(WHOLE)
    # a score without a state begins after an end token, so only the same context gives the same numbers
    torch.testing.assert_close(after.nats_T, model.score(TEXT * 4, state=model.read(pieces_of(TEXT * 5, 3))).nats_T)
    assert len(after.nats_T) < len(whole.nats_T)
    for name, tensor in state.decoder.tensors().items():
        assert torch.equal(tensor, kept[name])


def test_writing_goes_on_from_a_state_without_new_text(model: TextModel) -> None:
    assert model.generate(state=model.read(TEXT), max_new_tokens=9) == model.generate(TEXT, max_new_tokens=9)
    options = {"do_sample": False, "eos_token_id": ()}
    stream = model.generate(TEXT, stream=True, max_new_tokens=4, **options)
    first = "".join(stream)
    second = "".join(model.generate(state=stream.state, stream=True, max_new_tokens=5, **options))
    ids = torch.tensor([model.tokenizer.encode(TEXT)])
    whole = model.model.generate(ids, max_new_tokens=9, eos_token_id=())[0, ids.shape[1] :].tolist()
    assert first == model.tokenizer.decode(whole[:4])
    assert second == model.tokenizer.decode(whole[4:])


def test_the_state_of_a_stream_is_that_of_its_text(model: TextModel) -> None:
    stream = model.generate(TEXT, stream=True, max_new_tokens=6, eos_token_id=())
    for _ in stream:
        pass
    written = list(stream.state.last)[-6:]
    ids = torch.tensor([[*model.tokenizer.encode(TEXT), *written]])
    output = model.model(ids)
    for name, tensor in output.state.tensors().items():
        torch.testing.assert_close(stream.state.decoder.tensors()[name], tensor)
    torch.testing.assert_close(stream.state.logits_BV, output.logits[:, -1].float())


def test_scores_what_evaluate_gives(model: TextModel) -> None:
    score = model.score(WHOLE)
    expected = evaluate(model.model, TextDocuments([WHOLE], model.tokenizer))
    assert score.nats == pytest.approx(expected.nats)
    assert score.bits_per_byte == pytest.approx(expected.bits_per_byte)
    assert score.nats_per_token == pytest.approx(expected.nats_per_token)
    assert score.bits == pytest.approx(8 * len(WHOLE.encode()) * score.bits_per_byte / 8)
    assert score.bytes == len(WHOLE.encode())
    assert score.tokens_T.tolist() == model.tokenizer.encode(WHOLE)
    assert "".join(score.pieces) == WHOLE
    assert len(score.pieces) == len(score.nats_T)
    assert score.nats_T.dtype == torch.float64


@pytest.mark.unchecked_shapes
def test_each_token_is_scored_by_what_the_model_says_of_it(model: TextModel) -> None:
    text = TEXT * 3
    score = model.score(text)
    ids = torch.tensor([[model.tokenizer.eos_id, *model.tokenizer.encode(text)]])
    logits = model.model(ids).logits[0, :-1].log_softmax(-1)
    expected = -logits.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(score.nats_T, expected.double(), rtol=1e-5, atol=1e-5)
    for piece in (1, 4, 1000):
        found = model.score(pieces_of(text, 7), piece=piece).nats_T
        # the first token of a piece is predicted by logits in fp32
        torch.testing.assert_close(found, score.nats_T, rtol=1e-6, atol=4e-6)


def test_a_state_survives_a_file(model: TextModel, tmp_path: Path) -> None:
    model.save_state(model.read(TEXT), tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    assert loaded.tokens == len(model.tokenizer.encode(TEXT))
    assert loaded.nbytes > 0
    assert model.generate(TEXT, state=loaded, max_new_tokens=5) == model.generate(TEXT * 2, max_new_tokens=5)
    with pytest.raises(InputError, match="from a file"):
        model.score(TEXT, state=loaded)
    other = small_model(dtype=torch.float64, vocab_size=model.tokenizer.vocab_size, seed=5)
    with pytest.raises(StateError, match="another model"):
        TextModel(other, model.tokenizer).load_state(tmp_path / "state")


def test_a_document_begins_with_its_token(model: TextModel) -> None:
    begun = model.read(new_document=True)
    assert begun.last == (model.tokenizer.eos_id,)
    assert model.generate(new_document=True, max_new_tokens=5) == model.generate(state=begun, max_new_tokens=5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate(""), "no tokens"),
        (lambda model: model.read([]), "no tokens"),
        (lambda model: model.score(""), "The text is empty"),
        (lambda model: model.generate("a", temprature=1), "did you mean 'temperature'"),
        (lambda model: model.score("\ud800"), "lone surrogate"),
    ],
)
def test_bad_input_is_refused(model: TextModel, call: Callable[[TextModel], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(model)


def test_a_path_is_no_text() -> None:
    with pytest.raises(InputError, match="such as an open file"):
        _pieces(Path("file"))


def test_loads_a_directory(tmp_path: Path) -> None:
    small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256).save_pretrained(tmp_path, Tokenizer.bytes())
    loaded = taipan.load(tmp_path)
    assert loaded.model.lm_head.weight.dtype == torch.float32
    assert taipan.load(str(tmp_path), dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16
    assert set(taipan.load(tmp_path, implementation="portable").model.implementations.values()) == {"portable"}
    assert len(loaded.generate("a", max_new_tokens=3)) <= 3
    with pytest.raises(ConfigError, match="dtype is 'float31' \\(did you mean 'float32'"):
        taipan.load(tmp_path, dtype="float31")
    with pytest.raises(ConfigError, match="does not exist"):
        taipan.load(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        taipan.load(tmp_path)


def test_the_command_line_writes_with_the_same_settings() -> None:
    import inspect

    import typer

    from taipan.cli.main import app

    command = typer.main.get_command(app())
    parameters = {parameter.name: parameter.default for parameter in command.commands["generate"].params}
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "weights"):
        assert parameters[name] == getattr(DEFAULTS, name), name
    assert parameters["prefill_chunk"] == DEFAULTS.prefill_chunk
    assert DEFAULTS.do_sample
    assert parameters["greedy"] is False
    assert inspect.signature(TextModel.generate).parameters["settings"].default is DEFAULTS
