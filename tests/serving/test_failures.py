"""What a client is told of an error."""

from pathlib import Path

import pytest

from taipan.errors import StateError
from taipan.serving.failures import told_of

DAMAGED = "{}/a.session/session.json was changed or is damaged: restore it (see '{}/a.session'), or {}/b.session."
TOLD = "a.session/session.json was changed or is damaged: restore it (see 'a.session'), or b.session."


@pytest.mark.parametrize("directory", ["/srv/taipan/sessions", "sessions", "session", "n", "../my sessions (old)"])
def test_no_error_names_the_directory_and_what_is_in_it_keeps_its_name(directory: str) -> None:
    assert told_of(StateError(DAMAGED.replace("{}", directory)), Path(directory)) == TOLD


def test_without_sessions_an_error_is_told_as_it_is() -> None:
    assert told_of(StateError("n/a is no text."), None) == "n/a is no text."


def test_of_the_system_only_the_reason_is_told() -> None:
    told = told_of(PermissionError(13, "Permission denied", "/srv/taipan/x"), Path("/srv/taipan"))
    assert told == "The server's files cannot be read or written (Permission denied)."
