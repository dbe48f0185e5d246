"""What a data set says about itself, and whether its files are those it speaks of."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from taipan.errors import DataError
from taipan.io import read_text, sha256_file

MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.bin"
FORMAT = "taipan-tokens"
VERSION = 1
LICENCE_NOTE = "These tokens are a copy of the texts of the sources and stay under the licences of those texts."

_SELF_CHECK = "manifest_sha256"


@dataclass(frozen=True)
class Shard:
    """A file of token ids."""

    file: str
    n_tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set says about itself; ``n_bytes`` counts the UTF-8 bytes of the texts, ends not included."""

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    tokenizer_sha256: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    shard_tokens: int
    shards: tuple[Shard, ...]
    documents_sha256: str
    sources: tuple[str, ...]
    licence: str


def manifest_to_json(manifest: Manifest) -> str:
    """Return the text of the manifest's file, which holds a checksum of itself."""
    fields = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    return json.dumps({**fields, _SELF_CHECK: _checksum(fields)}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a data set.

    Raises:
        DataError: there is none, it is damaged or changed, of another format or of another version.
    """
    file = directory / MANIFEST_FILE
    if directory.is_file():
        raise DataError(
            f"{directory} is a file, not a prepared data set (a directory). `taipan data prepare` makes one of text, "
            "`taipan data import` of the tokens of nanoGPT, llm.c or Megatron."
        )
    if not file.is_file():
        raise DataError(
            f"{directory} is not a prepared data set: there is no {MANIFEST_FILE}. Make one with `taipan data prepare`."
        )
    try:
        loaded: object = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is damaged: {error}. Prepare the data again.") from error
    fields = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
    if fields.get("format") != FORMAT:
        raise DataError(
            f"{file} is not the manifest of a data set: format {fields.get('format')!r}, expected {FORMAT!r}."
        )
    if fields.get("version") != VERSION:
        raise DataError(
            f"{file} is of version {fields.get('version')}, this program reads version {VERSION}. "
            "Prepare the data again."
        )
    if fields.pop(_SELF_CHECK, None) != _checksum(fields):
        raise DataError(f"{file} was changed after it was written: its checksum does not fit. Prepare the data again.")
    del fields["format"], fields["version"]
    fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
    fields["sources"] = tuple(fields["sources"])
    return Manifest(**fields)


def check_file(file: Path, n_bytes: int | None, sha256: str, verify: bool) -> None:
    """Refuse a file that is not the one of the manifest.

    Args:
        file: the file.
        n_bytes: its size, or None if the manifest does not say.
        sha256: its checksum.
        verify: whether to compute the checksum.

    Raises:
        DataError: it is missing, of another size, or (with ``verify``) changed; names the file.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing from the data set. Copy it again or prepare the data again.")
    size = file.stat().st_size
    if n_bytes is not None and size != n_bytes:
        raise DataError(
            f"{file} has {size:,} bytes, expected {n_bytes:,}: it is truncated or not of this data set. "
            "Copy it again or prepare the data again."
        )
    if verify and sha256_file(file) != sha256:
        raise DataError(
            f"{file} is damaged: its SHA-256 is not the manifest's. Copy it again or prepare the data again."
        )


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
