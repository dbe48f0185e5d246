"""`run.json`: what a run was started from, by which code, where, and how each of its sessions ended.

A session is one process (or one torchrun) from start to end; a resumed run has several.
"""

import json
import platform
import secrets
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from taipan.errors import DataError
from taipan.hardware import describe
from taipan.io import atomic_write, parse_json_object
from taipan.locks import Holder

FILE = "run.json"
_FORMAT = "taipan-run-1"
_GIT_SECONDS = 10.0

Status = Literal["running", "finished", "interrupted", "failed"]


class RunRecord:
    """The record of one run, written at the start and the end of each session.

    A copy of a run that goes on is another run: it gets an id of its own, so that no tracker mixes the two. Where a run
    is, is known by its directory's path and inode; a directory that was moved keeps its id, but across file systems,
    where moving is copying.

    Args:
        run: the run directory, which must exist.
        resumed: continue with the record that is there, if one is.

    Attributes:
        copied_from: where the run is or was that this one is a copy of; None if it is none.
    """

    def __init__(self, run: Path, *, resumed: bool) -> None:
        self._path = run / FILE
        self._begun = False
        self.copied_from: str | None = None
        new = {"format": _FORMAT, "id": secrets.token_hex(8), "created": _now(), "sessions": []}
        self._values: dict[str, Any] = (read_run_record(run) if resumed else None) or new
        place = _place(run)
        if not _is_in_place(self._values, place):
            self.copied_from = f"{self._values['place']['path']} on {self._values['place']['host']}"
            self._values |= {"id": secrets.token_hex(8), "copy_of": self._values["id"]}
        self._values["place"] = place

    @property
    def id(self) -> str:
        """A unique name of the run."""
        return str(self._values["id"])

    def begin(self, *, step: int, model: dict[str, Any], data: dict[str, Any], settings: dict[str, Any]) -> None:
        """A session starts.

        Args:
            step: steps already taken.
            model: facts about the model.
            data: facts about the data, the fingerprint among them.
            settings: of this session: dtype, implementations, processes.
        """
        session = {
            "started": _now(),
            "step": step,
            **Holder.this_process().to_dict(),
            "command": shlex.join(sys.argv),
            "environment": environment(),
            "commit": commits(),
            **settings,
        }
        self._values |= {"status": "running", "message": "", "model": model, "data": data}
        self._values["sessions"].append(session)
        self._write()
        self._begun = True

    def end(self, status: Status, *, step: int, message: str) -> None:
        """The session ends, and how."""
        self._values |= {"status": status, "message": message}
        self._values["sessions"][-1] |= {"ended": _now(), "last_step": step}
        self._write()

    @property
    def begun(self) -> bool:
        """Whether a session of this object is on record."""
        return self._begun

    @property
    def values(self) -> dict[str, Any]:
        """All fields."""
        return self._values

    def _write(self) -> None:
        atomic_write(self._path, (json.dumps(self._values, indent=2) + "\n").encode())


def _place(run: Path) -> dict[str, Any]:
    return {"host": platform.node(), "path": str(run.resolve()), "inode": run.stat().st_ino}


def _is_in_place(values: dict[str, Any], place: dict[str, Any]) -> bool:
    """Whether a record lies where it was written, or where its whole directory was moved to."""
    before = values.get("place")
    if not isinstance(before, dict) or not place.keys() <= before.keys():  # a new run, or from before places were noted
        return True
    stayed = before["path"] == place["path"]
    if before["inode"] != place["inode"]:
        return stayed and before["host"] == place["host"]
    other = read_run_record(Path(before["path"]))
    return stayed or other is None or other["id"] != values["id"]


def read_run_record(run: Path) -> dict[str, Any] | None:
    """The record of a run directory; None if there is none that can be read."""
    try:
        values = parse_json_object((run / FILE).read_bytes(), str(run / FILE))
    except (OSError, DataError):
        return None
    return values if values.get("format") == _FORMAT else None


def environment() -> dict[str, Any]:
    """Versions and machine, as far as a result can depend on them."""
    hardware = describe()
    return {
        "taipan": version("taipan-lm"),
        "python": platform.python_version(),
        "torch": hardware.torch_version,
        "threads": hardware.torch_threads,
        "system": hardware.system,
        "architecture": hardware.architecture,
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "memory_bytes": hardware.memory_bytes,
        "simd": list(hardware.simd),
        "cuda": hardware.cuda,
    }


def commits() -> dict[str, dict[str, Any]]:
    """The git commits of taipan's own source (when it runs from a clone) and of the directory a run is started in."""
    found: dict[str, dict[str, Any]] = {}
    for name, directory in (("taipan", Path(__file__).parent), ("project", Path.cwd())):
        if name == "taipan" and _git(directory, "ls-files", "--error-unmatch", Path(__file__).name) is None:
            continue  # installed, perhaps in an environment that lies inside another project's clone
        commit = _git(directory, "rev-parse", "HEAD")
        if commit is not None:
            changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
            found[name] = {"commit": commit, "changed": bool(changed)}
    return found


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of git; None without git or outside a clone."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
