"""Which process holds something, and whether that very process is still alive (numbers are reused)."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PS_SECONDS = 10.0


@dataclass(frozen=True)
class Holder:
    """One process of one machine.

    Attributes:
        host: name of the machine.
        pid: number of the process, in its namespace.
        boot: start of the machine and namespace of the number; None where the system does not say.
        began: when the process started, in the words of its system; None where it does not say.
        since: when it took hold, ISO 8601 in UTC.
    """

    host: str
    pid: int
    boot: str | None
    began: str | None
    since: str

    @classmethod
    def this_process(cls) -> "Holder":
        """This process."""
        pid = os.getpid()
        return cls(
            host=platform.node(),
            pid=pid,
            boot=_boot(),
            began=_began(pid),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def from_dict(cls, values: Any) -> "Holder | None":
        """What `to_dict` gave; None for anything else."""
        try:
            facts = {field.name: values[field.name] for field in fields(cls)}
        except (TypeError, KeyError):
            return None
        words = all(isinstance(facts[name], str) for name in ("host", "since"))
        words = words and all(isinstance(facts[name], str | None) for name in ("boot", "began"))
        sound = words and type(facts["pid"]) is int and 0 < facts["pid"] < 1 << 31
        return cls(**facts) if sound else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def lives(self) -> bool | None:
        """Whether the process is alive; None if that cannot be known from here (another machine or container)."""
        if self.host != platform.node():
            return None
        boot = _boot()
        if self.boot != boot and self.boot is not None and boot is not None:
            machine, _, _ = self.boot.partition(" ")
            return None if machine == boot.partition(" ")[0] else False  # another container, or before a reboot
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's
        now = _began(self.pid)
        return self.began is None or now is None or now == self.began

    def __str__(self) -> str:
        own = (self.host, self.pid, self.boot) == (platform.node(), os.getpid(), _boot())
        return f"{'this ' if own else ''}process {self.pid} on {self.host}, since {self.since}"


def _boot() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(pid: int) -> str | None:
    try:
        # after the command in brackets, which may hold anything: field 22 of proc(5), in ticks since the boot
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        done = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=_PS_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
