"""The pins, the metadata and the environment say the same thing, and what is built from them is whole."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import taipan
from taipan.errors import how_to_install
from taipan.model.hub import REMOTE_CODE
from tests.archives import unpack

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


def test_pins_are_for_the_oldest_python_that_is_promised(requirements: dict[str, list[Requirement]]) -> None:
    """Debian's is 3.11.2: there a pin that wants 3.11.5 lets pip try every version of everything, then give up."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    wanted = {name: distribution(name).metadata["Requires-Python"] or "" for name in requirements}
    assert {name: python for name, python in wanted.items() if oldest not in SpecifierSet(python)} == {}


def test_the_version_is_said_once() -> None:
    assert taipan.__version__ == PROJECT["version"] == version("taipan-lm")


# ---------------------------------------------------------------------- advice on installing

ADVICE = re.compile(r"pip install (?P<options>(?:-\S+ )*)(?P<what>\S*\[[^\]`]*\]'?)")
TEXTS = [
    path
    for entry in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "docs",
        "recipes",
        "src",
    )
    for path in ([ROOT / entry] if (ROOT / entry).is_file() else sorted((ROOT / entry).rglob("*")))
    if path.is_file() and path.suffix not in (".pyc", ".svg", ".safetensors") and ".egg-info" not in str(path)
]


def test_what_is_on_no_package_index_is_asked_of_none() -> None:
    """Until it is published `pip install taipan-lm` fails, or one day installs what a stranger put there."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\binstall[^\n`]*taipan[-_]lm|taipan[-_]lm\[", text):
            raise AssertionError(f"{path}: {match.group()}")


def test_an_extra_is_installed_as_the_one_function_says() -> None:
    """In the documents by the same command, in the sources by calling it."""
    extras = set(PROJECT["optional-dependencies"])
    found = 0
    for path in TEXTS:
        for match in ADVICE.finditer(path.read_text(encoding="utf-8")):
            written = path.name == REMOTE_CODE  # beside a shipped model, by calling it
            if path.is_relative_to(ROOT / "src") and not written:
                assert path == Path(inspect.getfile(how_to_install)), f"{path}: {match.group()}: call how_to_install"
                continue
            found += 1
            extra = match["what"].removeprefix("'.[").removesuffix("]'")
            assert extra in extras, f"{path}: {match.group()}"
            editable = match.group().replace("--upgrade ", "").replace("-e ", "")
            assert editable in how_to_install(extra), f"{path}: {match.group()}"
    assert found >= 4
    assert how_to_install("hf") == "pip install '.[hf]' in your clone of Taipan"
    assert "--no-build-isolation" in how_to_install("gpu")


# ---------------------------------------------------------------------- the source archive and the wheel


def files_below(directory: Path) -> set[str]:
    """Every file of a directory that belongs to the project, by its path within it."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix() for path in paths}
    return {name for name in names if not re.search(r"(^|/)(__pycache__|node_modules|[^/]+\.egg-info)/", name)}


def in_python(code: str, *arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the unpacked source archive in `source`, and the wheel that was built from it."""
    place = tmp_path_factory.mktemp("built")
    clone = place / "clone"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "node_modules")
    clone.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, clone)
    for name in ("src", "tests", "docs", "recipes", "benchmarks", ".ci"):
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    installed = clone / "tests/pages/node_modules/axe-core/axe.js"  # as `make pages` leaves it
    installed.parent.mkdir(parents=True)
    installed.touch()
    in_python(BUILD, "build_sdist", place, cwd=clone)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as stream:
        unpack(stream, place)
    (place / archive.name.removesuffix(".tar.gz")).rename(place / "source")
    in_python(BUILD, "build_wheel", place, cwd=place / "source")
    return place


def test_the_source_archive_holds_the_clone(built: Path) -> None:
    missing = {
        f"{name}/{file}"
        for name in ("src", "tests", "docs", "recipes", "benchmarks", ".ci")
        for file in files_below(ROOT / name) - files_below(built / "source" / name)
    }
    missing |= {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".git")} - {
        path.name for path in (built / "source").iterdir()
    }
    assert missing == set()
    assert not list((built / "source").rglob("node_modules"))


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    """The kernels' sources, the templates and the marker of types too, whatever their suffix."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix("taipan/") for name in archive.namelist() if name.startswith("taipan/")}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        raw, unknown = parse_email(archive.read(metadata))
    assert inside == files_below(ROOT / "src" / "taipan")
    assert {"native/kernels/ssd.cpp", "report/templates/style.css", "py.typed"} <= inside
    assert unknown == {}
    assert raw.get("version") == PROJECT["version"]


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """An environment with the wheel; what it needs is found where these tests find it."""
    place = built / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(place), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--disable-pip-version-check", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    assert packages.is_relative_to(place)
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return place


def test_what_was_installed_runs_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    code = "import taipan; print(taipan.__file__); taipan.TaipanLM"
    for command in ([installed / "bin" / "python", "-c", code], [installed / "bin" / "taipan", "doctor"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        if "-c" in command:
            assert Path(done.stdout.strip()).is_relative_to(installed)
        else:
            assert f"taipan-lm {taipan.__version__}" in " ".join(done.stdout.split())
