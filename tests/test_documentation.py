"""What the documents say is so: marked code runs, commands and options exist, links and the paper map resolve.

A fenced block right below `<!-- test -->` is executed; below `<!-- test: slow -->` in the slow tier only. The blocks of
one document run in order in one temporary directory.
"""

import ast
import os
import re
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from taipan.cli.main import app
from tests.documentation import SHELL, Block, blocks, code_spans, command_lines, links, paper_map
from tests.warm import warm_programs

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAPER_MAP = ROOT / "docs/paper_map.md"

BASH = ["bash", "-euo", "pipefail"]
PYTHON = ["env", "python-code"]  # env looks along the path

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def marked(document: Path) -> list[Block]:
    return [block for block in blocks(document.read_text(encoding="utf-8")) if block.tier]


def executions() -> list[Any]:
    """One run of the quick blocks of each document, one of all its blocks if some are slow."""
    runs: list[Any] = []
    for document in DOCUMENTS:
        tiers = {block.tier for block in marked(document)}
        name = str(document.relative_to(ROOT))
        if "quick" in tiers:
            runs.append(pytest.param(document, {"quick"}, id=name, marks=pytest.mark.timeout(600)))
        if "slow" in tiers:
            slow = (pytest.mark.slow, pytest.mark.timeout(3600))
            runs.append(pytest.param(document, {"quick", "slow"}, id=f"{name}-slow", marks=slow))
    return runs


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    with warm_programs() as directory:
        yield directory


@pytest.fixture
def environment(programs: Path) -> dict[str, str]:
    """Where `taipan` starts at once."""
    path = [str(programs), sysconfig.get_path("scripts"), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(path)}


@pytest.mark.parametrize(("document", "tiers"), executions())
def test_marked_blocks_run(document: Path, tiers: set[str], tmp_path: Path, environment: dict[str, str]) -> None:
    for entry in ("README.md", "docs", "recipes", "examples", "src", "benchmarks"):
        if (ROOT / entry).exists():
            (tmp_path / entry).symlink_to(ROOT / entry)
    for block in marked(document):
        if block.tier not in tiers:
            continue
        assert block.language in {*SHELL, "python"}, f"{document}:{block.line}: cannot run {block.language!r}"
        interpreter = PYTHON if block.language == "python" else BASH
        code, output = run(interpreter, block.commands, tmp_path, environment)
        assert code == 0, f"{document}:{block.line} failed:\n{block.commands}\n{output[-5000:]}"


@pytest.mark.parametrize(
    ("interpreter", "text", "code", "output"),
    [
        (PYTHON, "import os\nprint(os.environ['A'], os.getcwd())", 0, "b {directory}\n"),
        (PYTHON, "raise SystemExit('why')", 1, "why\n"),
        (PYTHON, "1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        (BASH, "taipan presets --nonesuch", 2, "No such option: --nonesuch"),
        (BASH, "taipan presets | grep -c taipan-tiny; echo $A", 0, "1\nb\n"),
        (BASH, "taipan presets > missing/file", 1, "missing/file: No such file or directory\n"),
        (PYTHON, "import os\nos.kill(os.getpid(), 9)", 1, "it was killed\n"),
    ],
)
def test_what_blocks_run_in_says_how_it_ended(
    interpreter: list[str], text: str, code: int, output: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    found = run(interpreter, text, tmp_path, environment | {"A": "b"})
    assert found[0] == code, found
    assert output.format(directory=tmp_path) in found[1]


def run(interpreter: list[str], code: str, directory: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of code given to an interpreter, whose children end with it, at a timeout too."""
    with subprocess.Popen(
        interpreter,
        cwd=directory,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(code)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


@every_document
def test_marked_blocks_call_no_make(document: Path) -> None:
    """`make` belongs to the clone and would run these tests again; `make check` itself runs `make test`."""
    for block in marked(document):
        if block.language in SHELL:
            assert all(words[0] != "make" for words in command_lines(block.commands)), f"{document}:{block.line}"


def problem_with(words: list[str]) -> str | None:
    """Why this command line of ours cannot work, as far as its verb and option names tell; None if it can."""
    command: Any = typer.main.get_command(app())
    known = {"--help", "-h"}
    while words and hasattr(command, "commands"):
        known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        verb, *words = words
        if verb.startswith("-"):
            return None if verb in known else f"no option {verb}"
        if verb not in command.commands:
            return f"no verb {verb!r}"
        command = command.commands[verb]
    known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        name = word.partition("=")[0]
        if re.match(r"--?[a-zA-Z]", name) and name not in known:
            return f"no option {name}"
    return None


def test_a_wrong_command_is_noticed() -> None:
    assert problem_with(["--help"]) is None
    assert problem_with(["presets", "--help"]) is None
    assert problem_with(["nonesuch"]) == "no verb 'nonesuch'"
    assert problem_with(["presets", "--nonesuch=3"]) == "no option --nonesuch"


def test_what_a_user_types_is_told_from_what_is_printed() -> None:
    text = (
        "<!-- test -->\n\n```console\n$ A=1 taipan data \\\n> prepare x  # why\nprepared 3 | files\n$ ls | wc -l\n```\n"
    )
    (block,) = blocks(text)
    assert (block.tier, block.line) == ("quick", 3)
    assert list(command_lines(block.commands)) == [["taipan", "data", "prepare", "x"], ["ls"], ["wc", "-l"]]


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@every_document
def test_commands_and_options_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    pieces = [(block.line, block.commands) for block in blocks(text) if block.language in SHELL]
    pieces += [(0, span) for span in code_spans(text)]
    for line, shell in pieces:
        for words in command_lines(shell):
            if words[:3] == ["python", "-m", "taipan"]:
                words = words[2:]
            if Path(words[0]).name == "taipan":
                problem = problem_with(words[1:])
                assert problem is None, f"{document}:{line}: {' '.join(words)}: {problem}"
            if words[0] == "make":
                targets = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
                assert targets <= make_targets(), f"{document}:{line}: {' '.join(words)}"


@every_document
def test_python_blocks_compile(document: Path) -> None:
    for block in blocks(document.read_text(encoding="utf-8")):
        if block.language == "python":
            compile(block.code, f"{document}:{block.line}", "exec")


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document}: {target}"


@cache
def defined_tests(path: Path) -> set[str]:
    """Names of the test functions of a file, those in classes as `Class::test`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


@pytest.mark.parametrize("row", paper_map(PAPER_MAP), ids=lambda row: row.paper)
def test_the_paper_map_resolves(row: Any) -> None:
    assert row.symbols
    assert row.tests
    for symbol in row.symbols:
        module, _, attributes = symbol.partition(":")
        value: Any = import_module(module)
        for attribute in attributes.split(".") if attributes else ():
            value = getattr(value, attribute)
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in defined_tests(ROOT / file), f"{test} is not defined"


def test_the_paper_map_has_every_equation() -> None:
    numbers = {int(number) for row in paper_map(PAPER_MAP) for number in re.findall(r"Eq\. (\d)", row.paper)}
    assert numbers >= set(range(1, 8))


def test_the_first_python_of_the_readme_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    """Anywhere, with nothing trained: it loads the model that comes with the package."""
    texts = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    code = next(block.code for block in texts if block.language == "python")
    assert 'taipan.load("taipan-small")' in code
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    found, output = run(PYTHON, code, tmp_path, environment)
    assert found == 0, output
    assert output.strip()
