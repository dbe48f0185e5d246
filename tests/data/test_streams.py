"""Text that comes token by token, for tokenizers of every kind."""

# pyright: reportPrivateUsage=false

import random
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.errors import InputError

decoders, models, pre_tokenizers = tokenizers.decoders, tokenizers.models, tokenizers.pre_tokenizers
BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁Sn",
    "▁wa",
    "its",
    "ake",
    "a",
    "b",
    "s",
    "▁a",
    "▁b",
    "é",
    "漢",
    ".",
    ",",
    "'",
    "n't",
    "\ufffd",
    "▁.",
]
ADDED = ["<tool>", " spaced ", "▁marked", "漢字"]


def wrapped(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.add_tokens([*ADDED, "a"])
    return Tokenizer(backend, "</s>")


def of_words(decoder: object, words: list[str]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoder
    return wrapped(backend)


def llama(spaces: int = 1) -> Tokenizer:
    """As Llama 2 and Mistral: spaces as ▁, bytes as a way out, the first space of a text taken off."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", spaces, 0)]
    return of_words(decoders.Sequence(parts), [*BYTES, *WORDS])


def gemma() -> Tokenizer:
    """As Gemma: the same, but no space is taken off."""
    return of_words(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), [*BYTES, *WORDS]
    )


def bert() -> Tokenizer:
    words = ["[UNK]", "snake", "wait", "##s", "##it", ".", ",", "'", "s", "do", "not", "n't", "a", "##", "漢"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return wrapped(backend)


def clip() -> Tokenizer:
    return of_words(decoders.BPEDecoder("</w>"), ["sn", "ake</w>", "wa", "its</w>", ".</w>", "a", "</w>"])


def unigram() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -2.0) for word in WORDS)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return wrapped(backend)


def gpt2() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(["a snake waits, a 漢字 snake's wait"] * 3, trainer)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "ByteLevel": gpt2,
    "ByteLevel in a sequence": lambda: of_words(
        decoders.Sequence([decoders.ByteLevel()]), ["Ġ", "Ġa", "æ", "¼", "¢", "a"]
    ),
    "Metaspace": unigram,
    "Metaspace, never": lambda: of_words(decoders.Metaspace(prepend_scheme="never"), WORDS),
    "byte fallback": llama,
    "byte fallback, two spaces off": lambda: llama(2),
    "byte fallback, nothing off": gemma,
    "WordPiece": bert,
    "BPE with suffixes": clip,
    "no decoder": lambda: of_words(None, WORDS),
    "bytes": Tokenizer.bytes,
}
KINDS = {name: make() for name, make in MAKERS.items()}


def ids_of(tokenizer: Tokenizer, seed: int, length: int) -> list[int]:
    """Any tokens, runs of one kind among them."""
    draw = random.Random(seed)
    known = sorted(tokenizer._token_bytes)
    rare = [index for index in known if not tokenizer.is_byte(index)]
    return [draw.choice(known if draw.random() < 0.5 else rare) for _ in range(length)]


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> str:
    stream = StreamDecoder(tokenizer, after or [])
    return "".join([*(stream.push(index) for index in ids), stream.flush()])


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 24))
@settings(max_examples=60, deadline=None)
def test_the_pieces_joined_are_decode_of_all_ids(kind: str, seed: int, length: int) -> None:
    tokenizer = KINDS[kind]
    ids = ids_of(tokenizer, seed, length)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 24), cut=st.integers(0, 24))
@settings(max_examples=60, deadline=None)
def test_a_prompt_and_what_follows_it_are_decode_of_both(kind: str, seed: int, length: int, cut: int) -> None:
    """Whether it follows piece by piece or at once."""
    tokenizer = KINDS[kind]
    ids = ids_of(tokenizer, seed, length)
    prompt, new = ids[:cut], ids[cut:]
    # a prompt is text, so its bytes are whole characters, and no run goes on beyond it
    visible = [index for index in prompt if not tokenizer.is_special(index)]
    whole = not visible or not (tokenizer.is_byte(visible[-1]) or tokenizer.decode(prompt).endswith("\ufffd"))
    if whole:
        assert tokenizer.decode(prompt) + streamed(tokenizer, new, prompt) == tokenizer.decode(ids)
        assert tokenizer.decode(prompt) + tokenizer.decode(new, after=prompt) == tokenizer.decode(ids)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [tokenizer._backend.token_to_id(f"<0x{value:02X}>") or 0 for value in data]


def test_the_space_before_the_first_new_word_is_kept() -> None:
    tokenizer = KINDS["byte fallback"]
    prompt, new = (
        [tokenizer._backend.token_to_id(token) or 0 for token in words] for words in (["▁Sn", "ake"], ["▁wa", "its"])
    )
    assert tokenizer.decode(prompt) == "Snake"
    assert streamed(tokenizer, new, prompt) == tokenizer.decode(new, after=prompt) == " waits"
    assert streamed(tokenizer, new) == "waits"  # where a text begins
    assert streamed(tokenizer, new, [tokenizer.eos_id]) == "waits"
    assert streamed(tokenizer, [*prompt, tokenizer.eos_id, *new]) == "Snake waits"


def test_bytes_at_the_end_of_a_prompt_are_not_joined_with_new_ones() -> None:
    tokenizer = KINDS["byte fallback"]
    prompt = [*byte_ids(tokenizer, "é".encode())]
    assert streamed(tokenizer, byte_ids(tokenizer, b"\xff"), prompt) == "\ufffd"
    assert streamed(tokenizer, byte_ids(tokenizer, "漢".encode()), prompt) == "漢"


def test_a_run_of_bytes_is_shown_when_it_is_over() -> None:
    tokenizer = KINDS["byte fallback"]
    stream = StreamDecoder(tokenizer)
    run = byte_ids(tokenizer, "é漢".encode())
    assert [stream.push(index) for index in run] == [""] * 5
    assert stream.held == "é漢"
    assert stream.push(tokenizer._backend.token_to_id("s") or 0) == "é漢s"
    assert stream.held == ""
    assert [stream.push(index) for index in byte_ids(tokenizer, "é".encode() + b"\xff")] == [""] * 3
    assert stream.flush() == "\ufffd" * 3  # what decode says of the whole run


def test_a_token_that_is_none_leaves_the_stream_as_it_was() -> None:
    for tokenizer in KINDS.values():
        stream = StreamDecoder(tokenizer)
        first = stream.push(tokenizer._backend.token_to_id("a") or 0)
        with pytest.raises(InputError, match="9999 is not in the tokenizer's vocabulary"):
            stream.push(9999)
        assert first + stream.flush() == tokenizer.decode([tokenizer._backend.token_to_id("a") or 0])


def test_a_long_prompt_and_a_long_line_of_spaces_cost_little() -> None:
    tokenizer = KINDS["byte fallback"]
    space = tokenizer._backend.token_to_id("▁") or 0
    assert len(tokenizer.context([space] * 100_000)) < 40
    assert len(tokenizer.context(ids_of(tokenizer, 0, 100_000))) < 20
    assert streamed(tokenizer, [space] * 500) == tokenizer.decode([space] * 500) == " " * 499


def test_ids_without_a_token_are_known() -> None:
    assert Tokenizer.bytes().ids_without_token(260) == (257, 258, 259)
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 5}, merges=[]))
    backend.add_special_tokens(["</s>"])
    holes = Tokenizer(backend, "</s>")
    assert holes.vocab_size == 7 - 1 or holes.eos_id in range(7)
    known = set(backend.get_vocab().values())
    assert set(holes.ids_without_token(9)) == set(range(9)) - known
