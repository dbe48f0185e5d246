"""Texts that models are measured on, as files of the reader: encoded once for every tokenizer."""

import gzip
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from taipan.errors import InputError
from taipan.experiments.execution import Run, make_once
from taipan.experiments.laboratory import slug

if TYPE_CHECKING:
    from taipan.data.corpus import Document
    from taipan.data.tokenizer import Tokenizer

ENWIK8 = "enwik8"
"""The name under which the standard file is given, of which the standard test part is read."""
_ENWIK8_BYTES, _ENWIK8_TEST = 100_000_000, 95_000_000


def sha256_of(path: Path) -> str:
    """Digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_text(name: str, path: Path, sha256: str, tokenizer: "Tokenizer", directory: Path) -> str:
    """Encode a text, unless that was done; the name of its directory, which depends on text and tokenizer.

    Args:
        name: of the text; `enwik8` is the standard file, of which the last 5 MB are read.
        path: a file, as `taipan data prepare` reads them.
        sha256: of the file.
        tokenizer: of the model.
        directory: in which that of the text is; its tokens are in `valid`.

    Raises:
        InputError: an `enwik8` that is not the standard one.
        DataError: a file that cannot be read.
    """
    from taipan.data.manifest import MANIFEST_FILE
    from taipan.data.shards import prepare

    settings = {"sha256": sha256, "tokenizer": tokenizer.fingerprint, "part": "test" if name == ENWIK8 else "all"}
    identity = Run(name=slug(name), settings=settings).identity
    data = directory / identity / "valid"
    make_once(
        data / MANIFEST_FILE,
        directory / f"{identity}.lock",
        f"text {name}",
        lambda: prepare(_documents(name, path), tokenizer, data, sources=(path.name,)),
    )
    return identity


def _documents(name: str, path: Path) -> "list[Document]":
    """Those of a file; of enwik8 the standard test part, from the 95-millionth byte on."""
    from taipan.data.corpus import Corpus, Document

    if name != ENWIK8:
        return list(Corpus([str(path)]))
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    if len(content) != _ENWIK8_BYTES:
        raise InputError(
            f"{path} has {len(content):,} bytes of text, but the standard enwik8 has {_ENWIK8_BYTES:,}: give that "
            "file, unpacked or compressed with gzip, or another name to the text."
        )
    return [Document(f"{path.name}, from byte {_ENWIK8_TEST} on", content[_ENWIK8_TEST:].decode())]
