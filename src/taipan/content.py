"""What bytes are, told by how they begin: compressed, a table, an archive, or text in another encoding.

A name says what its owner believes a file to be; the first bytes say what it is. Signatures are those of the formats'
own specifications, as ``file(1)`` knows them.
"""

import codecs

HEAD_BYTES = 4096
"""So many bytes from the beginning are enough for every function here."""

BYTE_ORDER_MARK = codecs.BOM_UTF8
"""What some programs put before UTF-8 text; it is no part of the text."""

_COMPRESSED = {
    b"\x1f\x8b\x08": "gzip",  # two bytes are the first id of many a token file
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # the first one, or the end of an empty file
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after 0x50 to 0x5f

_UNPACK = "Unpack it and name what was in it"
_NO_TEXT: tuple[tuple[int, bytes, str, str], ...] = (
    (257, b"ustar", "a tar archive", f"{_UNPACK}: mkdir DIR && tar -xf FILE -C DIR"),
    (0, b"PK\x03\x04", "a zip archive (or .npz, .pt, .docx)", f"{_UNPACK}: unzip FILE -d DIR"),
    (0, b"PK\x05\x06", "an empty zip archive", f"{_UNPACK}: unzip FILE -d DIR"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"{_UNPACK}: 7z x FILE"),
    (0, b"Rar!\x1a\x07", "a rar archive", f"{_UNPACK}: unrar x FILE"),
    (0, b"!<arch>\n", "an ar archive", f"{_UNPACK}: ar x FILE"),
    (0, b"\x04\x22\x4d\x18", "lz4 data", "Unpack it: lz4 -d FILE"),
    *(  # two bytes are an id of token files, as gzip's are: the third says how many bits, and whether codes begin anew
        (0, bytes((0x1F, 0x9D, flag | bits)), "data of compress (.Z)", "Unpack it: uncompress FILE")
        for flag in (0, 0x80)
        for bits in range(9, 17)
    ),
    (0, b"%PDF-", "a PDF document", "Extract its text: pdftotext FILE"),
    (0, b"\x93NUMPY", "a NumPy array", "If it holds token ids, `taipan data import` takes them over"),
    (0, b"MMIDIDX\0", "an index of Megatron", "`taipan data import` takes its tokens over"),
    (0, b"ARROW1\0\0", "an Arrow (Feather) file", "Write it as Parquet"),
    (0, b"Obj\x01", "an Avro file", "Write it as Parquet or JSON lines"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Write it as Parquet or JSON lines"),
    (0, b"SQLite format 3\0", "an SQLite database", "Write its texts as JSON lines"),
    (0, b"\x7fELF", "a program", "Name files of text"),
)
_MARKS = (  # UTF-32's little-endian one begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def compression(head: bytes) -> str | None:
    """Return ``gzip``, ``bzip2``, ``xz`` or ``zstd`` if the first bytes are those of compressed data."""
    if head[:1] and 0x50 <= head[0] <= 0x5F and head[1:4] == _ZSTD_SKIPPABLE:
        return "zstd"
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return name if name != "bzip2" or head[4:10] in _BZIP2_BLOCKS else None
    return "xz" if _is_lzma(head) else None


def _is_lzma(head: bytes) -> bool:
    """Whether it is xz's predecessor, .lzma: no signature, but few beginnings are one (as xz itself tells them).

    One byte of settings, a dictionary of 2ⁿ or 2ⁿ + 2ⁿ⁻¹ bytes, and the size, which may be unknown.
    """
    if len(head) < 13 or head[0] != 0x5D:
        return False
    dictionary, size = int.from_bytes(head[1:5], "little"), head[5:13]
    known = dictionary in {base << n for base in (2, 3) for n in range(11, 31)}
    return known and (size == b"\xff" * 8 or int.from_bytes(size, "little") < 1 << 38)


def is_parquet(head: bytes) -> bool:
    """Whether the first bytes are those of a Parquet file."""
    return head.startswith(b"PAR1")


def encoding(head: bytes) -> str | None:
    """Return the name that ``iconv`` has for UTF-16 or UTF-32, if the first bytes look like that.

    Without a byte order mark it is told by the zeros between the letters of a text that is mostly ASCII.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    head = head[: len(head) // 4 * 4]
    if len(head) < 8:
        return None
    zeros = [head[place::4].count(0) / (len(head) // 4) for place in range(4)]
    patterns = {"UTF-32LE": "x000", "UTF-32BE": "000x", "UTF-16LE": "x0x0", "UTF-16BE": "0x0x"}
    for name, pattern in patterns.items():
        if all(share > 0.7 if kind == "0" else share < 0.05 for share, kind in zip(zeros, pattern, strict=True)):
            return name
    return None


def other_format(head: bytes) -> str | None:
    """Say what the first bytes are if they are of a known format that is not plain, and what to do: two sentences."""
    for place, magic, what, advice in _NO_TEXT:
        if head[place : place + len(magic)] == magic:
            return f"it is {what}. {advice}."
    if packed := compression(head):
        return f"it is {packed} data. Unpack it."
    if is_parquet(head):
        return "it is a Parquet file. `taipan data prepare` reads it."
    return None


def not_text(head: bytes) -> str | None:
    """Say what the first bytes are if they are known not to be UTF-8 text, and what to do about it: two sentences.

    Compressed data and Parquet are said to be that; whoever reads them asks first.
    """
    if name := encoding(head):
        return f"it looks like {name}. Convert it: iconv -f {name} -t UTF-8 FILE > NEW"
    return other_format(head)
