"""Choice of an implementation of an op by its name."""

from collections.abc import Mapping
from typing import TypeVar

from taipan.errors import ConfigError

F = TypeVar("F")


def select(op: str, implementations: Mapping[str, F], name: str) -> F:
    """Return the implementation called ``name``; raise `ConfigError` listing the names there are if there is none."""
    try:
        return implementations[name]
    except KeyError:
        known = ", ".join(repr(known) for known in sorted(implementations))
        raise ConfigError(f"{op}: unknown implementation {name!r}; expected one of {known}") from None
