import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.data import tokenizer as module
from taipan.data.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer
from taipan.errors import ConfigError, DataError, InputError
from tests.tokenizers import BACKENDS

CODE = "\n\n".join(
    f"class C{i}(Base):\n    def get_value_{i % 7}(self, x, *, key=None):\n"
    f"        # größer als {i * 37}\n        return self.values[x] if key else None  \n"
    for i in range(60)
)
BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe([CODE, "Ein Text mit Umlauten: äöü, 漢字 and 👩‍👩‍👧 emoji.\r\n" * 5], 350)
OURS = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

# Text made of what is hard: line ends, indents, exotic spaces, split characters, the names of special tokens.
hard_text = st.lists(
    st.one_of(
        st.sampled_from(
            ["\n", "\r\n", "\r", "    ", "\t", " ", "\x0b", "\x1c", "\x85", "\u2028", "\u3000", "'s", "\0"]
        ),
        st.sampled_from(
            [END_OF_TEXT, "return self.x", "(\n", "):\n    ", "é", "漢字", "👩‍👩‍👧", "12345", "…", "e\u0301"]
        ),
        st.text(max_size=5),
    ),
    max_size=30,
).map("".join)


def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: words with a leading ▁, and bytes as a way out."""
    words = ["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "▁a", "b", "c", "▁den"]
    vocabulary = {token: index for index, token in enumerate(words)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, "</s>")


@OURS
@given(text=hard_text)
@settings(max_examples=200, deadline=None)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids, "text is only text: it cannot end a document"
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert b"".join(tokenizer.token_bytes(index) for index in ids) == text.encode()


def knowing_its_end(kind: str) -> Tokenizer:
    """A foreign tokenizer whose model or whose added words know the name of its end as text."""
    models, letters = tokenizers.models, {"<": 0, "/": 1, "s": 2, ">": 3, "a": 4, " ": 5}
    if kind == "unigram":
        words = [("?", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in letters)]
        backend = tokenizers.Tokenizer(models.Unigram(words, unk_id=0))
    elif kind == "whole words":
        backend = tokenizers.Tokenizer(models.BPE(vocab={**letters, "</s>": 6}, merges=[], ignore_merges=True))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")
    else:
        backend = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
        backend.add_tokens([tokenizers.AddedToken("</s>", special=False, lstrip=kind == "added with spaces")])
    if not kind.startswith("added"):
        backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, "</s>")


@pytest.mark.parametrize("kind", ["unigram", "whole words", "added", "added with spaces"])
@pytest.mark.parametrize("text", ["</s>", "a</s>a", "</s></s>", "a </s> a  </s>", "</</s>s>"])
def test_no_text_ends_a_document_of_a_foreign_tokenizer_either(kind: str, text: str) -> None:
    tokenizer = knowing_its_end(kind)
    assert tokenizer._backend.encode("</s>", add_special_tokens=False).ids == [tokenizer.eos_id]  # pyright: ignore
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert "".join(tokenizer._backend.id_to_token(index) or "" for index in ids) == text  # pyright: ignore


def test_an_end_of_one_character_is_refused_in_a_text() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "\x03": 1}, merges=[]))
    backend.add_special_tokens(["\x03"])
    tokenizer = Tokenizer(backend, "\x03")
    assert tokenizer.encode("aa") == [0, 0]
    with pytest.raises(InputError, match=r"encodes '\\x03' as '\\x03', its end-of-document token"):
        tokenizer.encode("a\x03")


@OURS
@given(parts=st.lists(hard_text, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_template_has_special_tokens_by_their_names(tokenizer: Tokenizer, parts: list[str]) -> None:
    plain = [part.replace(END_OF_TEXT, "") for part in parts]
    expected = tokenizer.encode(plain[0])
    for part in plain[1:]:
        expected += [tokenizer.eos_id, *tokenizer.encode(part)]
    assert tokenizer.encode_template(END_OF_TEXT.join(plain)) == expected
    assert tokenizer.eos_id not in tokenizer.encode(END_OF_TEXT), "text stays text afterwards"


def test_a_surrogate_is_refused_in_a_template() -> None:
    with pytest.raises(InputError, match="a lone surrogate"):
        BYTES.encode_template("\ud800")


@given(text=hard_text)
@settings(max_examples=100, deadline=None)
def test_the_id_of_a_byte_is_its_value(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    library = BYTES._backend.encode(text, add_special_tokens=False).ids  # pyright: ignore
    assert ids == library, "the fast path is the library's own answer"
    assert (BYTES.vocab_size, BYTES.eos_id) == (257, 256)


@OURS
@given(ids=st.lists(st.integers(0, 256), max_size=40))
@settings(max_examples=200, deadline=None)
def test_stream_joins_to_decode_and_decode_is_the_librarys(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = StreamDecoder(tokenizer)
    whole = tokenizer.decode(ids)
    assert "".join([*(stream.push(index) for index in ids), stream.flush()]) == whole
    assert whole == tokenizer._backend.decode(ids, skip_special_tokens=True)  # pyright: ignore


@pytest.mark.parametrize("make", [lambda: BYTES, lambda: BPE, metaspace_tokenizer], ids=["bytes", "bpe", "metaspace"])
def test_stream_never_shows_a_part_of_a_character(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    text = "a漢é👩‍👩‍👧b den a"
    stream, shown = StreamDecoder(tokenizer), ""
    ids = tokenizer.encode(text)
    for index in ids:
        shown += stream.push(index)
        assert tokenizer.decode(ids).startswith(shown), shown
    if tokenizer.is_byte_level:
        assert stream.flush() == ""
    else:
        shown += stream.flush()  # a run of bytes that no other token has ended yet
    assert shown == tokenizer.decode(ids)
    assert "\ufffd" not in shown


@pytest.mark.parametrize("make", [lambda: BYTES, metaspace_tokenizer], ids=["bytes", "metaspace"])
def test_stream_flush_shows_what_was_never_completed(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    stream = StreamDecoder(tokenizer)
    assert [stream.push(index) for index in tokenizer.encode("漢")[:-1]] == ["", ""]
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == "", "flushing leaves nothing behind"


@given(text=hard_text, cuts=st.lists(st.integers(0, 200), max_size=6), size=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_encoding_in_pieces_is_encoding_the_whole(text: str, cuts: list[int], size: int) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARS", size)
        for tokenizer in (BYTES, BPE):
            assert [i for ids in tokenizer.iter_encode(iter(pieces)) for i in ids] == tokenizer.encode(text)
            apart = list(tokenizer.cut(text))
            assert "".join(apart) == text
            assert [i for piece in apart for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@given(text=hard_text)
@settings(max_examples=300, deadline=None)
def test_the_split_does_not_look_past_the_start_of_a_line(text: str) -> None:
    # Stronger than equal ids, which a vocabulary without the right merges would give by chance.
    split = BPE._backend.pre_tokenizer  # pyright: ignore
    assert split is not None
    cut = module._last_line_start(text)  # pyright: ignore
    parts = [word for part in (text[:cut], text[cut:]) for word, _ in split.pre_tokenize_str(part)]
    assert parts == [word for word, _ in split.pre_tokenize_str(text)]


def test_encoding_in_pieces_holds_back_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", 200)
    parts = list(BPE.iter_encode(CODE[i : i + 50] for i in range(0, len(CODE), 50)))
    assert len(parts) > 10
    assert max(len(BPE.decode(part)) for part in parts) < 600
    foreign = metaspace_tokenizer()
    assert list(foreign.iter_encode(["a\nb", "\nc"])) == [foreign.encode("a\nb\nc")], "unknown rules: encoded whole"


def test_bpe_keeps_indents_and_is_reproducible() -> None:
    assert BPE.vocab_size == 350
    assert BPE.eos_id == 349, "the end of a document is the last id"
    newline_indent = [token for token in range(350) if BPE.token_bytes(token).endswith(b"\n        ")]
    assert newline_indent, "a line break and the indent after it make one token"
    again = Tokenizer.train_bpe([CODE, "Ein Text mit Umlauten: äöü, 漢字 and 👩‍👩‍👧 emoji.\r\n" * 5], 350)
    assert again.fingerprint == BPE.fingerprint != BYTES.fingerprint
    assert len(BPE.encode(CODE)) < len(CODE.encode()) / 2
    assert Tokenizer.train_bpe(["ab"], 5000).vocab_size == 257, "no more tokens than the corpus supports"


@OURS
def test_save_and_load_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
        text = f"x = 1\n    {END_OF_TEXT} é"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_saving_keeps_the_template_and_the_names_that_stood_there(tmp_path: Path) -> None:
    said = {
        "chat_template": "{{ bos_token }}",
        "bos_token": {"content": "a"},
        "pad_token": "unknown to it",
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "padding_side": "right",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    Tokenizer.bytes().save(tmp_path)
    Tokenizer.load(tmp_path).save(tmp_path)
    kept = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert kept == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "padding_side": "left",
        "model_max_length": 2**31 - 1,
        "chat_template": "{{ bos_token }}",
        "bos_token": {"content": "a"},
    }


def test_the_end_token_is_taken_from_the_configuration_beside_it(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BYTES._backend.to_str())  # pyright: ignore
    backend.add_special_tokens(["<stop>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).eos_token == END_OF_TEXT
    for value in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        loaded = Tokenizer.load(tmp_path)
        assert (loaded.eos_token, loaded.eos_id) == ("<stop>", 257)
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").eos_token == "<stop>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(DataError, match="<none>"):
        Tokenizer.load(tmp_path)


def test_a_byte_order_mark_before_a_file_of_a_tokenizer_is_taken_off(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Tokenizer.load(tmp_path).fingerprint == BPE.fingerprint


def test_a_long_name_of_the_end_makes_no_long_message(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "y" * 70_000}))
    with pytest.raises(DataError, match="has none of the tokens yyy") as caught:
        Tokenizer.load(tmp_path)
    assert len(str(caught.value)) < 1000


def test_specifications(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    assert Tokenizer.from_spec("bytes").fingerprint == BYTES.fingerprint
    assert Tokenizer.from_spec("bpe:300", [CODE]).vocab_size == 300
    assert Tokenizer.from_spec(str(tmp_path)).fingerprint == BPE.fingerprint


@pytest.mark.parametrize(
    ("spec", "corpus", "error", "words"),
    [
        ("byte", None, ConfigError, "'byte' is not known; expected bytes"),
        ("bpe:4k", [CODE], ConfigError, "'4k' is not a vocabulary size"),
        ("bpe:4096", None, ConfigError, "none was given"),
        ("bpe:256", [CODE], ConfigError, "at least 257"),
        ("bpe:300", [], DataError, "holds no text"),
        ("bpe:300", [""], DataError, "holds no text"),
    ],
)
def test_bad_specifications_are_named(spec: str, corpus: list[str] | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Tokenizer.from_spec(spec, corpus)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 1}', json.dumps({"version": "1.0"})])
def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_missing_files_and_end_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no token '<x>'"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), "<x>")
    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(DataError, match="to end a document with"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        Tokenizer.load(tmp_path)


@OURS
def test_what_cannot_be_encoded_or_decoded_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="token id 4711 is not in the tokenizer's vocabulary"):
        tokenizer.decode([65, 4711])
    with pytest.raises(InputError, match="token id -1"):
        StreamDecoder(tokenizer).push(-1)
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.encode("") == []


def test_a_long_text_is_cut_into_short_pieces_a_foreign_one_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", 40)
    text = "def f(x):\n    return x\n" * 30
    for tokenizer in (BYTES, BPE):
        assert all(0 < len(piece) <= 40 for piece in tokenizer.cut(text))
    assert list(BPE.cut("x" * 500)) == ["x" * 500], "no line begins"
    foreign = json.loads(BPE.to_json())
    foreign["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "x"}
    assert list(Tokenizer.from_json(json.dumps(foreign), "<|endoftext|>").cut(text)) == [text]
    assert [list(tokenizer.cut("")) for tokenizer in (BYTES, BPE)] == [[], []]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_arrays_are_the_lists_and_json_keeps_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = ["", "abc é", "日本 🐍\n"]
    again = Tokenizer.from_json(tokenizer.to_json(), tokenizer.eos_token)
    assert again.fingerprint == tokenizer.fingerprint
    arrays = again.encode_arrays(texts, np.dtype("<u4"))
    assert [array.tolist() for array in arrays] == tokenizer.encode_batch(texts)
    assert {array.dtype for array in arrays} == {np.dtype("<u4")}
    assert [int(tokenizer.byte_lengths[ids].sum()) for ids in arrays] == [len(text.encode()) for text in texts]
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[tokenizer.eos_id] == 0
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode_arrays(["ab\ud800"], np.dtype("<u4"))


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_bytes_of_tokens_are_those_of_their_text(kind: str) -> None:
    backend, end = BACKENDS[kind]()
    tokenizer = Tokenizer(backend, end)
    text = "it waits again, été, 日本語, 🐍" if kind != "WordPiece" else "it waits again, 日本語"
    ids = tokenizer.encode(text + ("🐢." if kind in ("Llama", "bytes") else ""))  # bytes of which no token is made
    joined = b"".join(tokenizer.token_bytes(index) for index in ids)
    assert joined.decode().removeprefix(" ") == tokenizer.decode(ids), "a text begins with a word like others"
    assert tokenizer.byte_lengths[ids].tolist() == [len(tokenizer.token_bytes(index)) for index in ids]


def test_importing_the_module_does_not_import_the_library() -> None:
    code = "import sys, taipan.data.tokenizer; assert 'tokenizers' not in sys.modules"
    source = str(Path(module.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": source})


@pytest.mark.parametrize("size", ["99999999999999999999", "18446744073709551615", "4294967296", "16777217", "9" * 5000])
def test_a_vocabulary_larger_than_any_is_refused(size: str) -> None:
    """The library ends the process, or an integer is too big to convert."""
    with pytest.raises(ConfigError, match="expected at most 16,777,216|is not a vocabulary size") as error:
        Tokenizer.from_spec(f"bpe:{size}", ["The taipan waits."])
    assert len(str(error.value)) < 600
