"""Run the tests of the Hugging Face world with other releases of its libraries, and write down which pass.

    make compatibility                                   # the oldest that are supported, then the newest
    python docs/compatibility.py newest                  # one set
    python docs/compatibility.py newest torch==2.14.1    # with some releases named
    python docs/compatibility.py --write                 # and put the table into docs/huggingface.md

Each set has an environment of its own under build/compatibility. The oldest are the lower bounds of pyproject.toml,
the newest what pip finds; what only the tests need stays as constraints.txt has it. TORCH_INDEX_URL is an index with
the CPU build of PyTorch.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
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
OF_TESTS = ("pytest", "pytest-timeout", "beartype", "hypothesis", "psutil", "polars", "tenacity", "setuptools")
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


def requirements(which: str, named: list[str]) -> list[str]:
    """What is installed besides Taipan: one line for each library and for each tool of the tests."""
    pins = dict(
        (normal(name), version)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
        for name, _, version in [line.partition("==")]
    )
    chosen = {normal(re.split(r"[=<>!~]", entry)[0]): entry for entry in named}
    bounds = lower_bounds()
    return [
        *(chosen.get(name, f"{name}=={bounds[name]}" if which == "oldest" else name) for name in LIBRARIES),
        *(f"{name}=={pins[name]}" for name in OF_TESTS),
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
    subprocess.run([*install, *requirements(which, named), f"{ROOT}[hf,data,evaluate,gguf]"], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "taipan-lm"], check=True)  # tests take src
    return python


def installed(python: Path) -> dict[str, str]:
    """The releases of the libraries in an environment."""
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    found = {normal(each.name): each.version.split("+")[0] for each in distributions(path=[str(packages)])}
    return {name: found[name] for name in LIBRARIES}


def run_tests(python: Path) -> tuple[int, list[str]]:
    """Run each file of tests in a process of its own; how many tests passed, and a line for each that did not."""
    results = ENVIRONMENTS / "results.xml"
    passed, failed = 0, list[str]()
    files = [file for name in TESTS for file in (sorted((ROOT / name).glob("test_*.py")) or [ROOT / name])]
    for file in files:
        results.unlink(missing_ok=True)
        command = [python, "-m", "pytest", file, "-q", "-m", "slow or not slow", f"--junitxml={results}"]
        surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        ended = subprocess.run(
            command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
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
    return passed, failed


def table(found: dict[str, tuple[dict[str, str], int, list[str]]]) -> str:
    """The table as Markdown: a row for each library, then what passed."""
    rows = [f"| library | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    rows += [f"| {name} | {' | '.join(versions[name] for versions, _, _ in found.values())} |" for name in LIBRARIES]
    rows.append(f"| tests passed | {' | '.join(str(passed) for _, passed, _ in found.values())} |")
    rows.append(f"| tests failed | {' | '.join(str(len(failed)) for _, _, failed in found.values())} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """Try the sets that are named, or both."""
    named = [argument for argument in arguments if "=" in argument or "<" in argument]
    sets = [argument for argument in arguments if argument in SETS] or list(SETS)
    if unknown := set(arguments) - {*named, *SETS, "--write"}:
        raise SystemExit(
            f"{', '.join(sorted(unknown))} is none of oldest, newest, --write, or a release like torch==2.14.1."
        )
    found: dict[str, tuple[dict[str, str], int, list[str]]] = {}
    for which in sets:
        print(f"{which}: making {ENVIRONMENTS / which}", flush=True)
        python = environment(which, named)
        versions = installed(python)
        print(f"{which}: {', '.join(f'{name} {version}' for name, version in versions.items())}", flush=True)
        found[which] = versions, *run_tests(python)
    text = table(found)
    print(f"\n{text}")
    for which, (_, _, failed) in found.items():
        print("".join(f"{which}: {line}\n" for line in failed), end="")
    if "--write" in arguments:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")
    return int(any(failed for _, _, failed in found.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
