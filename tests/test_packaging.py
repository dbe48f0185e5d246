"""The pins, the metadata and the environment say the same thing."""

import re
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import taipan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def needed(name: str, extras: tuple[str, ...], found: dict[str, list[Requirement]]) -> dict[str, list[Requirement]]:
    """Every distribution that `name[extras]` needs in this environment, with the requirements that ask for it."""
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        key = canonicalize_name(requirement.name)
        new = key not in found
        found.setdefault(key, []).append(requirement)
        if new or requirement.extras:
            needed(key, tuple(requirement.extras), found)
    return found


@pytest.fixture(scope="module")
def requirements() -> dict[str, list[Requirement]]:
    found = needed("taipan-lm", ("dev",), {})
    return {name: requests for name, requests in found.items() if name != "taipan-lm"}


def test_pins_are_exact_and_name_no_build_of_a_version() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_everything_needed_is_pinned_and_nothing_else(requirements: dict[str, list[Requirement]]) -> None:
    # setuptools builds the package (and is what torch asks for from Python 3.12 on)
    assert {canonicalize_name(name) for name in pins()} == requirements.keys() | {"setuptools"}


def test_pins_are_what_is_installed_and_what_is_asked_for(requirements: dict[str, list[Requirement]]) -> None:
    for name, pin in pins().items():
        assert version(name).partition("+")[0] == pin
        for requirement in requirements.get(canonicalize_name(name), []):
            assert requirement.specifier.contains(pin), f"{requirement} does not admit the pin {pin}"


def test_the_version_is_said_once() -> None:
    assert taipan.__version__ == PROJECT["version"] == version("taipan-lm")
