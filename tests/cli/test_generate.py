import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.model import TaipanLM
from taipan.state import DecoderState
from tests.cli.conftest import Cli
from tests.compilers import needs_kernels
from tests.models import small_model

PROMPT = "The taipan waits"


def continuation(directory: Path, prompt: str, **options: object) -> str:
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode(prompt)
    model = TaipanLM.from_pretrained(directory)
    sequence = model.generate(torch.tensor([ids]), tokenizer=tokenizer, **options)[0].tolist()
    return tokenizer.decode(sequence)[len(tokenizer.decode(ids)) :]


def test_prints_what_the_engine_makes(cli: Cli, model_directory: Path) -> None:
    options = ["--max-new-tokens", 10, "--ignore-eos"]
    greedy = cli("generate", model_directory, PROMPT, "--greedy", *options)
    assert greedy.out == continuation(model_directory, PROMPT, max_new_tokens=10, eos_token_id=()) + "\n"
    sampled = cli("generate", model_directory, PROMPT, "--seed", 3, "--temperature", 1.5, "--top-k", 9, *options)
    expected = continuation(
        model_directory,
        PROMPT,
        max_new_tokens=10,
        eos_token_id=(),
        do_sample=True,
        seed=3,
        temperature=1.5,
        top_k=9,
        top_p=0.95,
    )
    assert sampled.out == expected + "\n"
    assert "16 tokens read" in sampled.err


def llama_like() -> Tokenizer:
    """Words with their space, bytes as a way out, and the first space of a text taken off."""
    words = [f"<0x{value:02X}>" for value in range(256)] + [
        "▁The",
        "▁snake",
        "▁waits",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *words])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, ignore_merges=True)
    )
    decoders = tokenizers.decoders
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()  # pyright: ignore
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)  # pyright: ignore
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, "</s>")


@pytest.fixture
def llama_directory(tmp_path: Path) -> Path:
    """Its vocabulary is padded, and it likes words and what is no token."""
    tokenizer = llama_like()
    model = small_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size + 7, eos_token_id=tokenizer.eos_id)
    with torch.no_grad():
        model.model.embed_tokens.weight[:258] *= 0.01
        model.model.embed_tokens.weight[tokenizer.vocab_size :] *= 3
    model.save_pretrained(tmp_path / "llama", tokenizer)
    return tmp_path / "llama"


def test_a_tokenizer_of_words_keeps_its_spaces_and_a_padded_vocabulary_is_not_drawn(
    cli: Cli, llama_directory: Path
) -> None:
    options = ["--max-new-tokens", 60, "--ignore-eos", "--temperature", 2]
    written = [cli("generate", llama_directory, "The snake", "--seed", seed, *options) for seed in range(4)]
    assert [said.code for said in written] == [0] * 4
    assert any(said.out.startswith((" snake", " waits", " The")) for said in written)
    seed, word = next((n, w) for n, said in enumerate(written) for w in (" snake", " waits") if w in said.out)
    stopped = cli("generate", llama_directory, "The snake", "--seed", seed, *options, "--stop", word)
    assert stopped.out == written[seed].out.partition(word)[0] + word + "\n"
    for seed, said in enumerate(written):
        expected = continuation(
            llama_directory,
            "The snake",
            max_new_tokens=60,
            do_sample=True,
            seed=seed,
            temperature=2.0,
            top_p=0.95,
            eos_token_id=(),
        )
        assert said.out == expected + "\n"


def test_a_new_document_begins_with_the_end_token(cli: Cli, model_directory: Path, tmp_path: Path) -> None:
    options = ["--greedy", "--max-new-tokens", 5, "--ignore-eos"]
    model, state = TaipanLM.from_pretrained(model_directory), tmp_path / "state.safetensors"
    expected = model.generate(torch.tensor([[256]]), max_new_tokens=5, eos_token_id=())[0, 1:].tolist()
    for prompt in ([], [""]):
        begun = cli("generate", model_directory, *prompt, "--new-document", *options)
        assert begun.out == Tokenizer.bytes().decode(expected) + "\n"
        assert "1 tokens read" in begun.err
    read = cli("generate", model_directory, "ab", "--new-document", "--max-new-tokens", 0, "--save-state", state)
    assert "3 tokens" in read.err
    found = DecoderState.load(state, model).tensors()
    for name, tensor in model(torch.tensor([[256, 97, 98]])).state.tensors().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_reads_narrow_weights_when_asked_to(cli: Cli, model_directory: Path) -> None:
    said = cli("generate", model_directory, PROMPT, "--greedy", "--max-new-tokens", 10, "--weights", "int8")
    assert said.out == continuation(model_directory, PROMPT, max_new_tokens=10, weights="int8") + "\n"


def test_a_prompt_may_come_from_a_file_or_standard_input(
    cli: Cli, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taipan.cli.text._PIECE_BYTES", 3)  # cuts characters
    prompt = "日本語 été\n" * 20
    options = ["--greedy", "--max-new-tokens", 4, "--ignore-eos"]
    expected = cli("generate", model_directory, prompt, *options).out
    file = tmp_path / "prompt.txt"
    file.write_text(prompt, encoding="utf-8")
    assert cli("generate", model_directory, "--prompt-file", file, *options, "--prefill-chunk", 7).out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert cli("generate", model_directory, "-", *options).out == expected


def remembered(directory: Path, saved: Path, text: str) -> None:
    """A saved state is the one after this text."""
    model = TaipanLM.from_pretrained(directory)
    found = DecoderState.load(saved, model).tensors()
    expected = model(torch.tensor([Tokenizer.load(directory).encode(text)])).state.tensors()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_saved_state_goes_on(cli: Cli, model_directory: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    options = ["--greedy", "--max-new-tokens", 6, "--ignore-eos"]
    whole = cli("generate", model_directory, "The taipan waits", *options).out
    read = cli("generate", model_directory, "The taipan", "--max-new-tokens", 0, "--save-state", state)
    assert read.code == 0
    assert "10 tokens" in read.err
    remembered(model_directory, state, "The taipan")
    assert cli("generate", model_directory, " waits", "--load-state", state, *options).out == whole
    # what was written is part of the state too
    more = ["--seed", 5, "--max-new-tokens", 3, "--ignore-eos", "--save-state", state]
    written = cli("generate", model_directory, " waits", "--load-state", state, *more)
    assert written.code == 0
    position = DecoderState.load(state, TaipanLM.from_pretrained(model_directory)).position_B
    assert position.tolist() == [len("The taipan waits") + 3]


def test_the_state_after_writing_is_that_of_the_text(cli: Cli, tmp_path: Path) -> None:
    model = small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256)
    with torch.no_grad():  # write nothing but ASCII, so that the text says what was written
        model.model.embed_tokens.weight[127:] *= 0.01
    model.save_pretrained(tmp_path / "model", Tokenizer.bytes())
    state = tmp_path / "state.safetensors"
    options = ["--greedy", "--max-new-tokens", 5, "--save-state", state]
    written = cli("generate", tmp_path / "model", "The", *options).out
    assert len(written) == 6
    remembered(tmp_path / "model", state, "The" + written[:-1])


def test_stops_after_a_text(cli: Cli, model_directory: Path) -> None:
    options = ["--max-new-tokens", 30, "--ignore-eos", "--temperature", 3]
    free = cli("generate", model_directory, PROMPT, *options).out
    stop = next(character for character in free if character.isalpha() and character.isascii())
    stopped = cli("generate", model_directory, PROMPT, *options, "--stop", stop).out
    assert stopped == free[: free.index(stop) + 1] + "\n"


def test_bad_input_is_refused(refused: Callable[..., str], model_directory: Path, tmp_path: Path) -> None:
    def message(*arguments: object) -> str:
        return refused("generate", *arguments)

    said = message(model_directory, "")
    assert "no tokens" in said
    assert "--new-document" in said
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.touch()
    latin.write_bytes(b"caf\xe9")
    assert "no tokens" in message(model_directory, "--prompt-file", empty)
    said = message(model_directory, "--prompt-file", latin)
    assert "latin.txt" in said
    assert "offset 3" in said
    assert "does not exist" in message(model_directory, "--prompt-file", tmp_path / "missing.txt")
    assert "directory" in message(model_directory, "--prompt-file", tmp_path)
    assert "--new-document" in message(model_directory)
    assert "PROMPT" in message(model_directory, "a", "--prompt-file", empty)
    said = message(model_directory, "a", "--temperature", 0)
    assert "temperature is 0" in said
    assert "top_p is 1.5" in message(model_directory, "a", "--top-p", 1.5)
    assert "weights is 'int2'" in message(model_directory, "a", "--weights", "int2")
    said = message(model_directory, "a", "--dtype", "float31")
    assert "float31" in said
    assert "float32" in said
    said = message(tmp_path / "nowhere", "a")
    assert "nowhere" in said
    assert "config.json" in said


def test_a_run_is_no_model(refused: Callable[..., str], model_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(model_directory, tmp_path / "run" / "model")
    said = refused("generate", tmp_path / "run", "a")
    assert str(tmp_path / "run" / "model") in said


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "copy"))


def test_damaged_models_are_refused(refused: Callable[..., str], copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    said = refused("generate", copy, "a")
    assert "model.safetensors" in said
    assert "truncated" in said
    weights.unlink()
    assert "holds no weights" in refused("generate", copy, "a")
    weights.write_bytes(whole)
    (copy / "config.json").write_text("{")
    assert "config.json" in refused("generate", copy, "a")


def test_a_tokenizer_of_another_model_is_refused(refused: Callable[..., str], copy: Path, text_file: Path) -> None:
    small_model(dtype=torch.float32, vocab_size=200).save_pretrained(copy)
    said = refused("generate", copy, "a")
    assert "257" in said
    assert "200" in said
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("generate", copy, "a")


def test_a_state_of_another_model_is_refused(
    cli: Cli, refused: Callable[..., str], model_directory: Path, copy: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    assert cli("generate", model_directory, "a", "--max-new-tokens", 0, "--save-state", state).code == 0
    small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256, seed=1).save_pretrained(copy)
    said = refused("generate", copy, "a", "--load-state", state)
    assert "another model" in said
    state.write_bytes(state.read_bytes()[:50])
    assert "state.safetensors" in refused("generate", model_directory, "a", "--load-state", state)
    assert "missing" in refused("generate", model_directory, "a", "--load-state", tmp_path / "missing")
