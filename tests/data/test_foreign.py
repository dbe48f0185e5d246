"""Tokens of other projects: what they hold comes over exactly, and what is damaged is refused by name."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taipan.data import foreign
from taipan.data.foreign import import_tokens, open_tokens
from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import Tokenizer
from taipan.errors import DataError

BYTES = Tokenizer.bytes()
END = BYTES.eos_id
TEXTS = ["hello", "grüße", "x" * 40, "日本"]


def stream(texts: list[str], *, first: bool) -> list[int]:
    """nanoGPT puts the end token after each document, llm.c before it."""
    return [token for text in texts for token in ([END, *text.encode()] if first else [*text.encode(), END])]


def write_llmc(path: Path, ids: list[int], magic: int = 20240520) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2" if magic == 20240520 else "<u4").tobytes())


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int = 8, modes: bool = False) -> None:
    """Documents of sequences of ids, as Megatron's IndexedDatasetBuilder writes them."""
    dtype = np.dtype({1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}[code])
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]).astype("<i8") * dtype.itemsize
    bounds = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    parts = [head, lengths.tobytes(), pointers[: len(lengths)].tobytes(), bounds.tobytes()]
    prefix.with_suffix(".idx").write_bytes(b"".join(parts) + bytes(len(sequences) if modes else 0))
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))


def texts(dataset: TokenDataset) -> list[str]:
    documents = [dataset.document(i).tolist() for i in range(dataset.n_documents)]
    assert all(document[-1] == END and END not in document[:-1] for document in documents)
    assert dataset.document_bytes.tolist() == [len(BYTES.decode(document).encode()) for document in documents]
    TokenDataset.open(dataset.path, verify=True, tokenizer=BYTES)
    return [BYTES.decode(document) for document in documents]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9), min_size=1),
    form=st.sampled_from(["nanoGPT", "nanoGPT, end before", "llm.c", "llm.c uint32", "Megatron", "Megatron, no end"]),
    data=st.data(),
)
def test_documents_come_over_exactly(
    found: list[str], form: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("foreign")
    path = directory / "tokens.bin"
    if form.startswith("nanoGPT"):
        np.array(stream(found, first="before" in form), "<u2").tofile(path)
    elif form.startswith("llm.c"):
        write_llmc(path, stream(found, first=True), 20240801 if "32" in form else 20240520)
    else:
        ends = [] if "no end" in form else [END]
        cuts = [data.draw(st.integers(0, len(text.encode()))) for text in found]
        parts = [[[*text.encode()][:cut], [*text.encode(), *ends][cut:]] for text, cut in zip(found, cuts, strict=True)]
        code, modes = data.draw(st.sampled_from([4, 5, 8])), data.draw(st.booleans())
        write_megatron(path, parts, code, modes)
        path = data.draw(st.sampled_from([path, path.with_suffix(".idx")]))
    made = import_tokens([path], BYTES, directory / "out", shard_tokens=7)
    assert texts(made) == found
    assert made.manifest.sources == (str(path),)


def test_long_documents_come_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_CHUNK_TOKENS", 4)
    np.array(stream(TEXTS, first=False), "<u2").tofile(tmp_path / "a.bin")
    write_llmc(tmp_path / "b.bin", stream(TEXTS, first=True))
    seen: list[tuple[int, int]] = []
    made = import_tokens(
        [tmp_path / "a.bin", tmp_path / "b.bin"],
        BYTES,
        tmp_path / "out",
        licence="MIT",
        progress=lambda *state: seen.append(state),
    )
    assert texts(made) == TEXTS * 2
    assert made.manifest.licence == "MIT"
    assert seen == sorted(seen)
    assert seen[-1][1] == 2 * (sum(len(text.encode()) for text in TEXTS) + len(TEXTS))


def test_bytes_of_a_tokenizer_that_is_not_of_bytes_are_those_of_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordLevel({"<eos>": 0, "▁hello": 1, "▁grüße": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(backend, "<eos>")
    ids = tokenizer.encode("hello grüße hello")
    np.array([*ids, 0, 1, 0], "<u2").tofile(tmp_path / "a.bin")
    made = import_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out")
    assert made.document_bytes.tolist() == [len("hello grüße hello".encode()), 5]


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    write_megatron(tmp_path / "m", [[[*text.encode(), END]] for text in TEXTS])
    return tmp_path / "m.idx"


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "emptied", "deleted", "swapped"])
def test_a_damaged_megatron_file_is_refused_by_name(megatron: Path, suffix: str, damage: str) -> None:
    file = megatron.with_suffix(suffix)
    data, other = file.read_bytes(), megatron.with_suffix(".bin" if suffix == ".idx" else ".idx").read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"truncated": data[:-1], "longer": data + b"xx", "emptied": b"", "swapped": other}[damage])
    with pytest.raises(DataError, match=rf"m\{suffix}|m\.idx"):
        import_tokens([megatron], BYTES, megatron.parent / "out")
    assert not (megatron.parent / "out").exists()


def test_no_flipped_bit_of_an_index_changes_the_tokens_in_silence(megatron: Path) -> None:
    """Header and tables contradict each other. (Which of two sequences begins a document nothing else can tell.)"""
    data = megatron.read_bytes()
    tokens = open_tokens(megatron, 257).tokens.tolist()
    messages: list[str] = []
    flips = [(place, bit) for place in range(len(data)) for bit in {0, place % 8}]
    for place, bit in flips:
        megatron.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        try:
            found = open_tokens(megatron, 257)
        except DataError as error:
            messages.append(str(error))
            continue
        assert found.tokens.tolist() == tokens
        assert found.bounds is not None
        bounds = found.bounds.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(tokens)), "no token is left out"
        assert bounds == sorted(bounds)
    assert len(messages) > 0.95 * len(flips)
    assert all("m.idx" in message or "m.bin" in message for message in messages)


def test_other_damage_is_refused_by_name(tmp_path: Path) -> None:
    def refused(path: Path, **options: Any) -> str:
        with pytest.raises(DataError) as caught:
            import_tokens([path], BYTES, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    path = tmp_path / "a.bin"
    assert "a.bin does not exist" in refused(path)
    assert "a.idx does not exist" in refused(tmp_path / "a.idx")
    path.write_bytes(b"")
    assert "a.bin has 0 bytes" in refused(path)
    path.write_bytes(b"abc")
    assert "a.bin has 3 bytes" in refused(path)
    write_llmc(path, stream(TEXTS, first=True))
    path.write_bytes(path.read_bytes()[:-2])
    assert "by its llm.c header" in refused(path)
    np.array([97, 300], "<u2").tofile(path)
    message = refused(path)
    assert "a.bin holds the id 300 at 1" in message
    assert "257 ids" in message
    np.array([END, END], "<u2").tofile(path)
    assert "no documents" in refused(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("years")
    np.array([97], "<u2").tofile(path)
    with pytest.raises(DataError, match="holds files but no data set"):
        import_tokens([path], BYTES, tmp_path / "full")


def test_ids_without_a_header_are_taken_for_uint16_only_if_nothing_speaks_against_it(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"Thirty-two bytes of plain text.\n" * 99)
    with pytest.raises(DataError, match=r"a\.bin looks like text.*--dtype uint16"):
        open_tokens(path, 50_257)
    assert len(open_tokens(path, 50_257, "uint16").tokens) == 99 * 16
    ids = np.random.default_rng(0).integers(0, 50_257, 1 << 21)
    ids.astype("<u2").tofile(path)
    assert open_tokens(path, 50_257).tokens.tolist() == ids.tolist()
    with pytest.raises(DataError, match=r"a\.bin has no header .*128,256 ids do not fit uint16.*--dtype"):
        open_tokens(path, 128_256)
    for kind, asked in (("<u4", "uint16 or uint32"), ("<i8", "uint16, uint32 or int64")):
        ids.astype(kind).tofile(path)
        with pytest.raises(DataError, match=rf"a\.bin has no header.* % of the 16-bit numbers are 0.*{asked}"):
            open_tokens(path, 50_257)
    ids.astype("<u4").tofile(path)
    with path.open("r+b") as file:  # a tail that was overwritten does not make it another type
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match="has no header"):
        open_tokens(path, 50_257)


def test_a_foreign_file_in_a_recipe_says_how_to_take_it_over(tmp_path: Path) -> None:
    np.array([97], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin is a file.*`taipan data import`"):
        TokenDataset.open(tmp_path / "train.bin")
