"""The manifest of a data set, and whether its files match it."""

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taipan.errors import DataError, shown
from taipan.io import parse_json_object, read_text, sha256_file

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
    """The manifest of a data set; ``n_bytes`` counts the UTF-8 bytes of the texts, ends not included."""

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
            "`taipan data import` of the tokens of NumPy files, nanoGPT, llm.c or Megatron."
        )
    if not file.is_file():
        raise DataError(
            f"{directory} is not a prepared data set: there is no {MANIFEST_FILE}. Make one with `taipan data prepare`."
        )
    fields = parse_json_object(read_text(file), str(file))
    if fields.get("format") != FORMAT:
        raise DataError(
            f"{file} is not the manifest of a data set: format {shown(fields.get('format'))}, expected {shown(FORMAT)}."
        )
    if fields.get("version") != VERSION:
        raise DataError(
            f"{file} is of version {shown(fields.get('version'))}, this program reads version {VERSION}. "
            "Prepare the data again."
        )
    if fields.pop(_SELF_CHECK, None) != _checksum(fields):
        raise DataError(f"{file} was changed after it was written: its checksum does not fit. Prepare the data again.")
    del fields["format"], fields["version"]
    return _checked(fields, file)


def _checked(fields: dict[str, Any], file: Path) -> Manifest:
    """The manifest with these fields, each checked for its type: a checksum does not tell who wrote a file."""

    def require(ok: bool, what: str, value: object) -> None:
        if not ok:
            raise DataError(f"{file} is damaged: {what} is {shown(value)}. Prepare the data again.")

    def count(value: object, what: str, least: int) -> None:
        require(type(value) is int and least <= value < 1 << 63, what, value)

    names = {field.name for field in dataclasses.fields(Manifest)}
    require(fields.keys() == names, "what it does not or should not hold", sorted(names ^ fields.keys()))
    require(fields["dtype"] in ("uint16", "uint32"), "dtype", fields["dtype"])
    for name in ("n_bytes", "eos_id"):
        count(fields[name], name, 0)
    for name in ("vocab_size", "n_documents", "n_tokens", "shard_tokens"):
        count(fields[name], name, 1)
    require(fields["eos_id"] < fields["vocab_size"], "eos_id", fields["eos_id"])
    for name in ("tokenizer_fingerprint", "tokenizer_sha256", "documents_sha256", "licence"):
        require(isinstance(fields[name], str), name, fields[name])
    sources = fields["sources"]
    require(isinstance(sources, list) and all(isinstance(source, str) for source in sources), "sources", sources)
    shards = fields["shards"]
    require(isinstance(shards, list) and len(shards) > 0, "shards", shards)
    for number, shard in enumerate(shards):
        what = f"shard {number}"
        require(isinstance(shard, dict) and shard.keys() == {"file", "n_tokens", "sha256"}, what, shard)
        require(shard["file"] == shard_name(number) and isinstance(shard["sha256"], str), what, shard)
        count(shard["n_tokens"], f"n_tokens of {what}", 1)
        full = shard["n_tokens"] == fields["shard_tokens"]
        last = number == len(shards) - 1 and shard["n_tokens"] <= fields["shard_tokens"]
        require(full or last, f"n_tokens of {what}", shard["n_tokens"])
    total = sum(shard["n_tokens"] for shard in shards)
    require(total == fields["n_tokens"], f"n_tokens, of which the shards hold {total:,},", fields["n_tokens"])
    fields["shards"] = tuple(Shard(**shard) for shard in shards)
    fields["sources"] = tuple(sources)
    return Manifest(**fields)


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"tokens-{number:05d}.bin"


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
