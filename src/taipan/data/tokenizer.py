"""Text to token ids and back: a thin layer over ``tokenizers`` (imported only when a tokenizer is made)."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from taipan.config import READABLE
from taipan.errors import ConfigError, DataError, InputError, brief, shown
from taipan.io import atomic_write, parse_json_object, read_text
from taipan.shipped import model_directory, shipped_models

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

_CONFIG_FILE = "tokenizer_config.json"
_REPLACEMENT = "\ufffd"
_PIECE_CHARS = 1 << 16
_MOST_SPACES = 32  # more than any decoder takes from the beginning of a text
# Names of the end-of-document token in GPT-2/NeoX, Llama 3, SentencePiece models and Gemma.
_EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")

# GPT-4's split, with the indentation of a line kept together with the line break (and the punctuation) before it.
# CPython's asyncio, email and xml at 4096 tokens: 3.86 bytes per token; GPT-4's split 3.60, GPT-2's 3.57.
# A line break followed by something visible always ends a piece, and no alternative looks past it:
# `Tokenizer.iter_encode` relies on that.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:\s*[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)|\s+"
)
_MOST_TOKENS = 1 << 24  # the library allocates tables of this size, and ends the process if it cannot


class Tokenizer:
    """Encodes any text to token ids; for the tokenizers made here, decoding gives exactly the text back.

    A text is encoded alone: what the post-processor of a foreign ``tokenizer.json`` puts before and behind it (`<s>`)
    is taken out of it, so that training, generation, evaluation and, with what :meth:`save` writes, transformers
    encode a text in one way.

    Text is only text: the name of a special token inside it is encoded letter by letter, so no document can end
    itself. Code that joins documents adds the end-of-document token (:attr:`eos_id`). If a foreign tokenizer has the
    name of its end token as a word of its vocabulary, such a text is encoded in two pieces, cut inside the name. Only
    the output of a chat template has special tokens by their names: :meth:`encode_template`.

    Args:
        backend: the tokenizer of the ``tokenizers`` library; padding and truncation are switched off.
        eos_token: the name of its end-of-document token.

    Raises:
        DataError: the tokenizer has no token of that name.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", eos_token: str = END_OF_TEXT) -> None:
        self.added_tokens: bool = backend.num_special_tokens_to_add(False) > 0
        """Whether the backend, as it was given, puts tokens before or behind a text."""
        if self.added_tokens:
            backend = _without_added_tokens(backend)
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(f"the tokenizer has no token {shown(eos_token)} to end a document with. Use one that has.")
        self._backend = backend
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        """One more than the largest token id (special tokens included)."""

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Make the byte tokenizer: the id of a byte is its value, and 256 ends a document."""
        return cls(_bytes_backend())

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE; its last id ends a document.

        A small corpus may not have enough repeated pairs for ``vocab_size`` tokens; :attr:`vocab_size` tells.

        Args:
            texts: the documents to train on.
            vocab_size: number of tokens, including the 256 bytes and the end-of-document token.

        Raises:
            ConfigError: ``vocab_size`` is less than 257, or more than 2²⁴.
            DataError: ``texts`` holds no text.
        """
        if vocab_size < 257:
            raise ConfigError(f"a byte-level BPE got vocab_size {vocab_size}; expected at least 257 (256 bytes + end).")
        if vocab_size > _MOST_TOKENS:
            raise ConfigError(
                f"a byte-level BPE got vocab_size {shown(vocab_size)}; expected at most {_MOST_TOKENS:,}."
            )
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        characters = 0

        def counted() -> Iterator[str]:
            nonlocal characters
            for text in texts:
                characters += len(text)
                yield from cut_at_lines(text)

        backend.train_from_iterator(counted(), trainer)
        if characters == 0:
            raise DataError("cannot train a tokenizer: the corpus holds no text. Name files with text in them.")
        _add_end_of_text(backend)
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load a ``tokenizer.json``, or the one in a directory.

        The end-of-document token is the ``eos_token`` of the ``tokenizer_config.json`` beside it, or else the first
        of ``<|endoftext|>``, ``<|end_of_text|>``, ``</s>``, ``<eos>`` that the tokenizer knows.

        Raises:
            DataError: the file is missing, is not a tokenizer, or names no end-of-document token.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        text = read_text(file)
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{file} is not a tokenizer of the `tokenizers` library: {brief(error)}. Copy or save it again."
            ) from error
        name = _configured_eos(file.parent / _CONFIG_FILE)
        names = _EOS_NAMES if name is None else (name,)
        known = [name for name in names if backend.token_to_id(name) is not None]
        if not known:
            raise DataError(
                f"{file} has none of the tokens {brief(', '.join(names))} to end a document with. "
                f'Name its end token in a {_CONFIG_FILE} beside it: {{"eos_token": "…"}}'
            )
        return cls(backend, known[0])

    @classmethod
    def from_json(cls, text: str, eos_token: str) -> "Tokenizer":
        """Make the tokenizer that :meth:`to_json` wrote down."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(text), eos_token)

    @classmethod
    def from_spec(cls, spec: str, corpus: Iterable[str] | None = None) -> "Tokenizer":
        """Make the tokenizer that a user named: ``bytes``, ``bpe:4096`` (trained on ``corpus``), a path, or a model.

        Raises:
            ConfigError: the specification is none of these, or ``bpe`` was named without a corpus.
            DataError: the file is missing or is not a tokenizer, or the corpus is empty.
        """
        kind, colon, size = spec.partition(":")
        if spec == "bytes":
            return cls.bytes()
        if kind == "bpe" and colon:
            if not size.isdecimal() or len(size) > 100:
                raise ConfigError(
                    f"tokenizer {shown(spec)}: {shown(size)} is not a vocabulary size; expected for example bpe:4096"
                )
            if corpus is None:
                raise ConfigError(f"tokenizer {shown(spec)} is trained on a corpus, and none was given.")
            return cls.train_bpe(corpus, int(size))
        path = model_directory(spec)
        if not path.exists():
            known = shipped_models()
            names = f", or a model that comes with Taipan ({', '.join(known)})" if known else ""
            raise ConfigError(
                f"tokenizer {shown(spec)} is not known; expected bytes, bpe:SIZE (for example bpe:4096), "
                f"or the path of a tokenizer.json or of a directory that holds one{names}."
            )
        return cls.load(path)

    def to_json(self) -> str:
        """Return the text of a ``tokenizer.json``."""
        return self._backend.to_str(pretty=True)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and a ``tokenizer_config.json`` (which names the end token) into a directory.

        Of a ``tokenizer_config.json`` that stands there the chat template stays, and the names that it may use of
        special tokens that this tokenizer has.

        Raises:
            CheckpointError: the directory cannot be written or the disk is full.
            DataError: the ``tokenizer_config.json`` that stands there cannot be read.
        """
        atomic_write(Path(directory, TOKENIZER_FILE), self.to_json().encode())
        # on the left, for batched generation with transformers
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "padding_side": "left",
            "model_max_length": READABLE,  # else evaluation harnesses take 2,048 and cut longer texts
            **self._kept_of(Path(directory, _CONFIG_FILE)),
        }
        atomic_write(Path(directory, _CONFIG_FILE), (json.dumps(config, indent=2) + "\n").encode())

    def _kept_of(self, file: Path) -> dict[str, Any]:
        """What :meth:`save` leaves of a configuration; whatever could change how a text is encoded is none of it."""
        if not file.is_file():
            return {}
        said = parse_json_object(read_text(file), str(file))
        tokens = {key: _token_name(value) for key, value in said.items() if key.endswith("_token")}
        known = [key for key, name in tokens.items() if name and self._backend.token_to_id(name) is not None]
        return {key: said[key] for key in ("chat_template", *known) if key in said and key != "eos_token"}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end-of-document token.

        Raises:
            InputError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_batch([text])[0]

    def encode_template(self, text: str) -> list[int]:
        """Return the token ids of a chat template's output: names of special tokens become those tokens.

        No token is added: a template writes its own begin and end tokens. The ids are those of transformers'
        ``apply_chat_template(tokenize=True)``. A name inside a user's message becomes a token as well; only
        :meth:`encode` prevents that.

        Raises:
            InputError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        _utf8([text])
        return self._template_backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts; byte-pair encoding runs on all cores.

        Raises:
            InputError: a text holds a lone surrogate, which no UTF-8 text can; or a character that a foreign tokenizer
                takes for the end of a document.
        """
        data = _utf8(texts)
        if self._is_bytes:
            return [list(utf8) for utf8 in data]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        return [self._without_end(text) if self.eos_id in ids else ids for text, ids in zip(texts, found, strict=True)]

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
        """Return the token ids of several texts as arrays; for bytes this is quicker than :meth:`encode_batch`.

        Raises:
            InputError: a text holds a lone surrogate, which no UTF-8 text can.
        """
        if self._is_bytes:
            return [np.frombuffer(utf8, np.uint8).astype(dtype) for utf8 in _utf8(texts)]
        return [np.array(ids, dtype) for ids in self.encode_batch(texts)]

    def cut(self, text: str) -> Iterator[str]:
        """Cut a text into pieces to encode separately: the lists joined are ``encode`` of the text.

        The pieces of a tokenizer made here are short (some 64 thousand characters, more only where a text has no line
        breaks); a foreign one gets the text whole.
        """
        if self._is_bytes:
            yield from (text[i : i + _PIECE_CHARS] for i in range(0, len(text), _PIECE_CHARS))
        elif self._ends_at_lines:
            yield from cut_at_lines(text)
        elif text:
            yield text

    def iter_encode(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """Encode a text that comes in pieces of any size, in memory that does not grow with the text.

        The lists joined are ``encode`` of the joined pieces. The text is cut at line breaks, where that is exact for
        the tokenizers made here; for a foreign one the text is gathered and encoded whole.
        """
        if self._is_bytes:
            yield from (self.encode(piece) for piece in pieces)
            return
        gathered: list[str] = []
        n_chars = 0
        for piece in pieces:
            gathered.append(piece)
            n_chars += len(piece)
            if self._ends_at_lines and n_chars >= _PIECE_CHARS:
                text = "".join(gathered)
                cut = _last_line_start(text)
                if cut:
                    yield self.encode(text[:cut])
                gathered = [text[cut:]]
                n_chars = 0  # so that text without line breaks is joined once per piece's worth, not once per piece
        if text := "".join(gathered):
            yield self.encode(text)

    def decode(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> str:
        """Return the text of token ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: the tokens.
            after: tokens that come before them, as those of a prompt (the last few are enough): many tokenizers drop
                the space of a word that begins a text, and only of that one.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        ids = list(ids)
        data = [self.token_bytes(index) for index in ids]
        if self.is_byte_level:
            return b"".join(data).decode("utf-8", errors="replace")
        context = self.context(after)
        return self.text([*context, *ids])[len(self.text(context)) :]

    def context(self, ids: Sequence[int]) -> list[int]:
        """Return the last of some ids, so many that what comes next is decoded as after all of them.

        Special tokens leave no trace in a text. Nor do bytes at the end: they form one run with the next bytes (a run
        that is not UTF-8 becomes one U+FFFD). Ids without visible text do not count as a beginning.
        """
        context: list[int] = []
        for index in reversed(ids):
            if self.is_special(index) or (not context and self.is_byte(index)):
                continue
            context.insert(0, index)
            if not self.is_byte(index):
                text = self.text(context)
                if text.strip() or len(text) > _MOST_SPACES:
                    break
        return context

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The names of its special tokens, in the order of their ids."""
        named = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}
        return tuple(named[index] for index in sorted(self._special))

    def is_special(self, index: int) -> bool:
        """Whether a token leaves no trace in a text, as the end of a document."""
        return index in self._special

    def is_byte(self, index: int) -> bool:
        """Whether a token is one byte of a run that is decoded together (byte fallback)."""
        return index in self._fallback_bytes

    def ids_without_token(self, size: int) -> tuple[int, ...]:
        """Return the ids below `size` that are no token: a model's vocabulary is often padded to a round number."""
        known = np.zeros(max(size, self.vocab_size), bool)
        known[self._ids] = True
        return tuple(np.flatnonzero(~known[:size]).tolist())

    def token_bytes(self, index: int) -> "bytes":
        """Return the bytes of one token, as it stands within a text: b"" for a special token.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        try:
            data = self._token_bytes[index]
        except KeyError:
            raise InputError(
                f"token id {index} is not in the tokenizer's vocabulary of {self.vocab_size}. "
                "The model and the tokenizer may not belong together."
            ) from None
        if data is None:
            data = self._token_bytes[index] = self._bytes_within(index)
        return data

    def text(self, ids: Sequence[int]) -> str:
        """Return what the ``tokenizers`` library makes of known ids: `decode` of tokens that begin a text."""
        return self._backend.decode(ids, skip_special_tokens=True)

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Number of bytes of each id; 0 for special tokens and unused ids; ``(vocab_size,)``."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for index in self._token_bytes:
            lengths[index] = len(self.token_bytes(index))
        return lengths

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the text of tokens is the UTF-8 of their joined bytes (as for GPT-2, NeoX, Llama 3 and ours)."""
        decoder = self._json["decoder"]
        return decoder is not None and decoder["type"] == "ByteLevel"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON: equal for tokenizers that encode equally by construction."""
        canonical = json.dumps(self._json, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _without_end(self, text: str) -> list[int]:
        """The ids of a text in which the backend sees the end of a document: cut wherever it sees one."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ends = [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == self.eos_id]
        if not ends:
            return encoding.ids
        cuts = [0, *((start + stop) // 2 for start, stop in ends), len(text)]
        if any(start >= stop for start, stop in pairwise(cuts)):
            raise InputError(
                f"the tokenizer encodes {shown(text[slice(*ends[0])])} as {shown(self.eos_token)}, its "
                "end-of-document token: "
                "remove it from the text, or use another tokenizer."
            )
        return [index for start, stop in pairwise(cuts) for index in self._without_end(text[start:stop])]

    @cached_property
    def _template_backend(self) -> "tokenizers.Tokenizer":
        """The same tokenizer, but one that sees special tokens in a text (the library keeps no such setting)."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self._backend.to_str())

    @property
    def _json(self) -> dict[str, Any]:
        return json.loads(self._backend.to_str())

    @cached_property
    def _is_bytes(self) -> bool:
        # The library treats a text as one word of this tokenizer; Python's own encoding is the same, and fast.
        return self.vocab_size == 257 and self._backend.to_str() == _bytes_backend().to_str()

    @cached_property
    def _ends_at_lines(self) -> bool:
        parts = (self._json["pre_tokenizer"] or {}).get("pretokenizers", [])
        return any(part.get("pattern") == {"Regex": _SPLIT} for part in parts)

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        return np.fromiter(self._token_bytes, np.int64)

    @cached_property
    def _special(self) -> "set[int]":
        return {index for index, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _fallback_bytes(self) -> "set[int]":
        if '"ByteFallback"' not in json.dumps(self._json["decoder"]):
            return set()
        byte = re.compile("<0x[0-9A-Fa-f]{2}>")
        return {index for token, index in self._backend.get_vocab().items() if byte.fullmatch(token)} - self._special

    @cached_property
    def _token_bytes(self) -> "dict[int, bytes | None]":
        """Bytes of each token; None where the decoder has to say them (`_bytes_within`), which takes its time."""
        value_of = {character: value for value, character in enumerate(_byte_alphabet())}

        def text_bytes(token: str) -> "bytes | None":
            if not self.is_byte_level:
                return None
            known = all(character in value_of for character in token)
            return bytes(value_of[character] for character in token) if known else token.encode()

        vocabulary = self._backend.get_vocab().items()
        return {index: b"" if index in self._special else text_bytes(token) for token, index in vocabulary}

    def _bytes_within(self, index: int) -> "bytes":
        """What a token adds to a text that has begun; its name may say it otherwise (``▁the``, ``##s``, ``<0xE6>``)."""
        if self.is_byte(index):
            name = cast(str, self._backend.id_to_token(index))
            return bytes([int(name[3:5], 16)])
        beginning, text = self._beginning
        return self.text([*beginning, index])[len(text) :].encode()

    @cached_property
    def _beginning(self) -> tuple[list[int], str]:
        """A token with which a text can begin, and its text; none where there is no such token."""
        for index in self._ids.tolist():
            if index not in self._special and not self.is_byte(index) and (text := self.text([index])).isalnum():
                return [index], text
        return [], ""


class StreamDecoder:
    """Turns token ids that come one by one into text, holding back a character until all of its bytes are there.

    The pieces joined are ``tokenizer.decode`` of all the ids. Bytes that can no longer become a character are shown
    as U+FFFD; the first bytes of a character that may still be completed never are. Bytes of a tokenizer that falls
    back to them are held until another token comes, since a later one may make the whole run invalid.

    Args:
        tokenizer: of the ids.
        after: tokens that come before the first, as those of a prompt: see ``Tokenizer.decode``.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._within = False  # a character whose other bytes are still to come
        self._characters = 0  # shown so far
        # For tokenizers whose tokens are not bytes: tokens that the next text depends on, and tokens not shown yet.
        self._context: list[int] = []
        self._shown = ""
        self._held: list[int] = []
        self._stand_after([] if tokenizer.is_byte_level else after)

    def push(self, index: int) -> str:
        """Return the text that is complete now that the token ``index`` has come.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        tokenizer = self._tokenizer
        data = tokenizer.token_bytes(index)
        if tokenizer.is_byte_level:
            if not self._within and data.isascii():  # nearly always, and the decoder takes ten times as long
                self._characters += len(data)
                return data.decode("ascii")
            text = self._utf8.decode(data)
            self._characters += len(text)
            self._within = bool(self._utf8.getstate()[0])
            return text
        if tokenizer.is_special(index):
            return ""
        self._held.append(index)
        if tokenizer.is_byte(index) or (text := self.held).endswith(_REPLACEMENT):
            return ""
        self._characters += len(text)
        self._stand_after([*self._context, *self._held])
        return text

    @property
    def held(self) -> str:
        """The text held back, as it is if no byte follows."""
        if not self._held:
            return ""
        return self._tokenizer.text([*self._context, *self._held])[len(self._shown) :]

    @property
    def place(self) -> int:
        """Characters that are whole so far, those held back too."""
        return self._characters + len(self.held.rstrip(_REPLACEMENT))

    def flush(self) -> str:
        """Return the rest at the end of the stream: U+FFFD for an incomplete character."""
        rest = self._utf8.decode(b"", final=True) + self.held
        self._utf8.reset()
        self._within = False
        self._stand_after([])
        return rest

    def _stand_after(self, ids: Sequence[int]) -> None:
        self._context = self._tokenizer.context(ids)
        self._shown = self._tokenizer.text(self._context)
        self._held = []


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each byte: itself where it is printable, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(value if value in printable else next(spare)) for value in range(256)]


def _bytes_backend() -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: value for value, character in enumerate(_byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    _add_end_of_text(backend)
    return backend


def _add_end_of_text(backend: "tokenizers.Tokenizer") -> None:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])


def _without_added_tokens(backend: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """The same tokenizer, but for the steps of its post-processor that put tokens before or behind a text."""
    from tokenizers import Tokenizer

    values = json.loads(backend.to_str())
    step = values["post_processor"]
    steps = step["processors"] if step["type"] == "Sequence" else [step]
    kept = [part for part in steps if part["type"] == "ByteLevel"]  # the others exist to add tokens
    values["post_processor"] = kept[0] if kept else None
    return Tokenizer.from_str(json.dumps(values))


def _configured_eos(file: Path) -> str | None:
    if not file.exists():
        return None
    return _token_name(parse_json_object(read_text(file), str(file)).get("eos_token"))


def _token_name(token: object) -> str | None:
    """The name of a token as a configuration gives it: a text, or an object with its `content`."""
    if isinstance(token, dict):
        token = cast("dict[str, object]", token).get("content")
    return token if isinstance(token, str) else None


def _utf8(texts: Sequence[str]) -> list[bytes]:
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise InputError(
            f"cannot encode the character {shown(error.object[error.start])} at offset {error.start}: a lone surrogate "
            "is not text. Read the text as UTF-8, without errors='surrogateescape'."
        ) from error


def _last_line_start(text: str, start: int = 0, stop: int | None = None) -> int:
    """Return the start of the last line within the range that begins with something visible, or 0."""
    stop = len(text) if stop is None else stop
    end = stop
    while (newline := text.rfind("\n", start, end)) >= 0:
        if newline + 1 < stop and not text[newline + 1].isspace():
            return newline + 1
        end = newline
    return 0


def cut_at_lines(text: str) -> Iterator[str]:
    """Cut a text where a line begins with something visible, which always ends a piece of ``_SPLIT``."""
    start = 0
    while start < len(text):
        stop = start + _PIECE_CHARS
        while stop < len(text):  # no such line yet: look twice as far
            if line := _last_line_start(text, start, stop):
                stop = line
                break
            stop += stop - start
        yield text[start:stop]
        start = stop
