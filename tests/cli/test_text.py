import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taipan.cli import text
from taipan.errors import DataError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=40), size=st.integers(1, 7))
def test_pieces_of_any_size_make_the_text(
    content: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PIECE_BYTES", size)
    path = tmp_path / "text"
    path.write_bytes(content.encode())
    assert "".join(text.text_pieces(str(path))) == content
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert "".join(text.text_pieces("-")) == content


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
