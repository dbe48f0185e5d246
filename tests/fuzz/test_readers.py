"""Every reader of data, on files that are nearly right (see `tests.fuzz.harness`)."""

from pathlib import Path

import pytest

from tests.fuzz.harness import Subject, bytes_changed, encoding_changed, fuzz


def _text(directory: Path) -> list[Path]:
    file = directory / "a.txt"
    file.write_text("The taipan waits; été, 日本語, 🐍.\n" * 9, encoding="utf-8")
    return [file]


SUBJECTS = [
    Subject(
        "text",
        _text,
        lambda work: ["data", "prepare", work / "a.txt", "--workers", 1, "--out", work / "out"],
        [bytes_changed, encoding_changed],
    ),
]


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_reader_takes_a_file_or_says_what_is_wrong(subject: Subject, tmp_path: Path) -> None:
    fuzz(subject, range(20), tmp_path)
