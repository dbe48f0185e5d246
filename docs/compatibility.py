"""Run the tests of the Hugging Face world with other releases of its libraries, and write down which pass.

    make compatibility                                   # the oldest that are supported, then the newest
    python docs/compatibility.py newest                  # one set
    python docs/compatibility.py newest torch==2.14.1    # with some releases named
    python docs/compatibility.py --write                 # and put the table into docs/huggingface.md

Each set has an environment of its own under build/compatibility. The oldest are the lower bounds of pyproject.toml,
the newest what pip finds; what only the tests need stays as constraints.txt has it. TORCH_INDEX_URL is an index with
the CPU build of PyTorch. Printed are the releases that differ from the pins, the tests that pass and fail in each file,
and what the libraries say they will change (their deprecation warnings).
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("huggingface.md")
ENVIRONMENTS = ROOT / "build" / "compatibility"
BEGIN, END = "<!-- releases -->\n", "<!-- end of releases -->\n"
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "trl",
    "lm-eval",
    "torchao",
    "bitsandbytes",
    "gguf",
)
OF_TESTS = (
    "pytest",
    "pytest-timeout",
    "beartype",
    "hypothesis",
    "psutil",
    "polars",
    "tenacity",
    "setuptools",
    "openai",
)
TESTS = ("tests/hf", "tests/conversion", "tests/evaluation/test_harness.py")
SETS = ("oldest", "newest")


def normal(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds() -> dict[str, str]:
    """The oldest supported release of each library, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    bounds = {normal(match[1]): match[2] for entry in named if (match := re.match(r"([\w.-]+)>=([\w.]+)", entry))}
    return {name: bounds[name] for name in LIBRARIES}


def pins() -> dict[str, str]:
    """The release of each package that the project is tested with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.partition("==") for line in lines if not line.startswith("#")]
    return {normal(name): version for name, _, version in parts}


def requirements(which: str, named: list[str]) -> list[str]:
    """What is installed besides Taipan: one line for each library and for each tool of the tests."""
    chosen = {normal(re.split(r"[=<>!~]", entry)[0]): entry for entry in named}
    bounds = lower_bounds()
    return [
        *(chosen.get(name, f"{name}=={bounds[name]}" if which == "oldest" else name) for name in LIBRARIES),
        *(f"{name}=={pins()[name]}" for name in OF_TESTS),
    ]


def environment(which: str, named: list[str]) -> Path:
    """Make the environment of a set anew; its Python."""
    directory = ENVIRONMENTS / which
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    index = os.environ.get("TORCH_INDEX_URL")
    more = ["--extra-index-url", index] if index else []
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *more]
    subprocess.run([*install, *requirements(which, named), f"{ROOT}[hf,data,evaluate,gguf,serve]"], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "taipan-lm"], check=True)  # tests take src
    return python


def installed(python: Path) -> dict[str, str]:
    """The releases of the libraries in an environment."""
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    found = {normal(each.name): each.version.split("+")[0] for each in distributions(path=[str(packages)])}
    return {name: found[name] for name in LIBRARIES}


def run_tests(python: Path) -> tuple[int, list[str], set[str]]:
    """Run each file of tests in a process of its own.

    Returns:
        How many tests passed, a line for each that did not, and the deprecation warnings.
    """
    results = ENVIRONMENTS / "results.xml"
    passed, failed, warned = 0, list[str](), set[str]()
    files = [file for name in TESTS for file in (sorted((ROOT / name).glob("test_*.py")) or [ROOT / name])]
    for file in files:
        results.unlink(missing_ok=True)
        command = [python, "-m", "pytest", file, "-q", "-m", "slow or not slow", f"--junitxml={results}"]
        surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        ended = subprocess.run(
            command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        warned |= set(re.findall(r"\w*(?:Deprecation|Future)Warning: .*", ended.stdout))
        name, here, before = str(file.relative_to(ROOT)), 0, len(failed)
        if results.exists():
            for case in ElementTree.parse(results).iter("testcase"):
                problem = next((child for child in case if child.tag in {"failure", "error"}), None)
                if problem is None:
                    here += 1
                else:
                    said = (problem.get("message") or "").split("\n")[0]
                    failed.append(f"{name}::{case.get('name')}: {said}")
        if ended.returncode and len(failed) == before:
            failed.append(f"{name}: {ended.stdout[-300:]}")
        passed += here
        print(f"  {name}: {here} passed, {len(failed) - before} failed", flush=True)
    return passed, failed, warned


@dataclass(frozen=True)
class Found:
    """What a set of releases gave: see `run_tests`."""

    versions: dict[str, str]
    passed: int
    failed: list[str]
    warned: set[str]


def table(found: dict[str, Found]) -> str:
    """The table as Markdown: a row for each library, then what passed."""
    rows = [f"| library | pinned | {' | '.join(found)} |", f"|---|---|{'---|' * len(found)}"]
    rows += [
        f"| {name} | {pins()[name]} | {' | '.join(each.versions[name] for each in found.values())} |"
        for name in LIBRARIES
    ]
    rows.append(f"| tests passed | | {' | '.join(str(each.passed) for each in found.values())} |")
    rows.append(f"| tests failed | | {' | '.join(str(len(each.failed)) for each in found.values())} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """Try the sets that are named, or both."""
    named = [argument for argument in arguments if "=" in argument or "<" in argument]
    sets = [argument for argument in arguments if argument in SETS] or list(SETS)
    if unknown := set(arguments) - {*named, *SETS, "--write"}:
        raise SystemExit(
            f"{', '.join(sorted(unknown))} is none of oldest, newest, --write, or a release like torch==2.14.1."
        )
    found: dict[str, Found] = {}
    for which in sets:
        print(f"{which}: making {ENVIRONMENTS / which}", flush=True)
        python = environment(which, named)
        versions = installed(python)
        changed = [
            f"{name} {pins()[name]} -> {version}" for name, version in versions.items() if pins()[name] != version
        ]
        print(f"{which}: other than the pins: {', '.join(changed) or 'none'}", flush=True)
        found[which] = Found(versions, *run_tests(python))
    text = table(found)
    print(f"\n{text}")
    for which, each in found.items():
        print("".join(f"{which}: {line}\n" for line in [*each.failed, *sorted(each.warned)]), end="")
    if "--write" in arguments:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")
    return int(any(each.failed for each in found.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
