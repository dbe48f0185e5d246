import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from taipan.cli import text
from taipan.errors import DataError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=40), size=st.integers(1, 7), mark=st.sampled_from([b"", b"\xef\xbb\xbf"]))
@example(content="\ufefftext", size=2, mark=b"")
def test_pieces_of_any_size_make_the_text_without_its_byte_order_mark(
    content: str, size: int, mark: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PIECE_BYTES", size)
    path = tmp_path / "text"
    data = mark + content.encode()
    path.write_bytes(data)
    expected = content if mark else content.removeprefix("\ufeff")
    assert "".join(text.text_pieces(str(path))) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert "".join(text.text_pieces("-")) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text").write_bytes("The taipan waits.".encode(encoding))
    with pytest.raises(DataError, match=f"text is not UTF-8.*iconv -f {encoding[:6].upper()}"):
        list(text.text_pieces(str(tmp_path / "text")))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=20), tail=st.sampled_from([b"\xff", b"\xe2\x82", b"\xc3"]), size=st.integers(1, 7))
def test_the_first_wrong_byte_is_named(
    content: str, tail: bytes, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PIECE_BYTES", size)
    path = tmp_path / "text"
    path.write_bytes(content.encode() + tail)
    with pytest.raises(DataError, match=f"0x{tail[0]:02x} at offset {len(content.encode())} "):
        list(text.text_pieces(str(path)))


def test_a_name_that_no_file_has_is_refused() -> None:
    with pytest.raises(DataError, match="is no name of a file"):
        list(text.text_pieces("a\0b"))
