import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.cli import presets
from taipan.cli.main import PANELS, app, main
from taipan.errors import DataError
from tests.cli.conftest import Cli

VERBS = [
    ("quickstart",),
    ("data", "prepare"),
    ("train",),
    ("evaluate",),
    ("generate",),
    ("inspect",),
    ("calibrate",),
    ("convert", "from-mamba2"),
    ("convert", "to-mamba2"),
    ("convert", "to-gguf"),
    ("reproduce", "associative-recall"),
    ("presets",),
    ("doctor",),
    ("bench",),
    ("plan",),
    ("runs",),
    ("session", "read"),
    ("session", "ask"),
    ("serve",),
    ("chat",),
]
START = "import sys; from taipan.cli.main import main; main(sys.argv[1:])"


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})


def test_help_answers_at_once() -> None:
    times: list[float] = []
    for _ in range(3):
        before = os.times()
        finished = start("--help")
        after = os.times()
        # the time of its own, so that a busy machine does not matter
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
        assert finished.returncode == 0
        assert "quickstart" in finished.stdout
    assert min(times) < 0.5, times


def test_a_verb_is_built_without_the_others(tmp_path: Path) -> None:
    """Counted in modules, not in time: what a start costs is what it imports."""
    code = f"""
import sys
from taipan.cli.main import main
try:
    main(["generate", {str(tmp_path / "nowhere")!r}, "x"])
except SystemExit:
    pass
verbs = {{name.rpartition(".")[2] for name in sys.modules if name.startswith("taipan.cli.")}}
print(*sorted(verbs))
print(*sorted(name for name in sys.modules if name.count(".") == 1 and name.startswith("taipan.")))
print(sum(name.startswith("taipan") for name in sys.modules))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    verbs, rooms, count = finished.stdout.splitlines()[-3:]
    assert verbs.split() == ["console", "generate", "main", "text"]
    unneeded = {"taipan.evaluation", "taipan.sessions", "taipan.serving", "taipan.training", "taipan.hf", "taipan.chat"}
    assert not unneeded & set(rooms.split())
    assert int(count) <= 125


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["taipan", "--help"]
from taipan.cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "numpy", "matplotlib", "jinja2", "transformers", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_has_an_example_of_it(cli: Cli, verb: tuple[str, ...]) -> None:
    finished = cli(*verb, "--help")
    assert finished.code == 0
    example = finished.out[finished.out.index("Example") :]
    assert f"taipan {' '.join(verb)}" in example


def test_no_arguments_show_the_help(cli: Cli) -> None:
    finished = cli()
    assert "quickstart" in finished.out + finished.err


def test_version(cli: Cli) -> None:
    from taipan import __version__

    assert cli("--version").out == f"taipan {__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["presets", "--contxt", "3"], ["generate"]])
def test_wrong_usage_exits_with_2(cli: Cli, arguments: list[str]) -> None:
    finished = cli(*arguments)
    assert finished.code == 2
    assert finished.err


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(kinds: tuple[str, ...]) -> str:
        raise error

    monkeypatch.setattr(presets, "_layers", fail)


def test_a_foreseen_error_is_one_message(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, DataError("what was given, expected, to do"))
    finished = cli("presets")
    assert finished.code == 2
    assert finished.err == "Error: what was given, expected, to do\n"


def test_an_unexpected_error_says_how_to_see_more(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("oh"))
    finished = cli("presets")
    assert finished.code == 1
    assert "RuntimeError: oh" in finished.err
    assert "TAIPAN_DEBUG=1" in finished.err
    monkeypatch.setenv("TAIPAN_DEBUG", "1")
    with pytest.raises(RuntimeError, match="oh"):
        main(["presets"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/root/x"), ("/root/x", "Permission denied", "permissions")),
        (OSError(28, "No space left on device", "/mnt/x"), ("/mnt/x", "No space left", "Free some space")),
    ],
)
def test_an_error_of_the_system_is_explained(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: OSError, words: tuple[str, ...]
) -> None:
    failing(monkeypatch, error)
    finished = cli("presets")
    assert finished.code == 2
    assert all(word in finished.err for word in words)


def test_ctrl_c_is_quiet(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    finished = cli("presets")
    assert finished.code == 130
    assert finished.err.strip() == "Interrupted."


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    command = f'"{sys.executable}" -c "{START}" presets 2>"{errors}" | true'
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert errors.read_text() == ""


def test_every_verb_is_tested_here() -> None:
    groups = {name for group in app().registered_groups if (name := group.name)}
    commands = {name for command in app().registered_commands if (name := command.name)}
    assert {verb[0] for verb in VERBS} == groups | commands


def panels(text: str) -> dict[str, list[str]]:
    """The first words of the lines in each panel of a help text, by the panel's title."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if head := re.match(r"╭─ (\w+) ─", line):
            found[title := head[1]] = []
        elif entry := re.match(r"│ (\S+)", line):
            found[title].append(entry[1])
    return found


def test_the_help_has_panels(cli: Cli) -> None:
    found = panels(cli("--help").out)
    assert list(found) == ["Options", "Start", "Data", "Train", "Use", "Measure"]
    assert found["Start"] == ["quickstart", "doctor"]
    assert [verb for title, verbs in found.items() if title != "Options" for verb in verbs] == [
        verb for verbs in PANELS.values() for verb in verbs
    ]


@pytest.mark.parametrize("verb", [(), ("data",), *VERBS], ids=" ".join)
def test_flags_show_no_type(cli: Cli, verb: tuple[str, ...]) -> None:
    out = cli(*verb, "--help").out
    assert "--help" in out
    assert "bool" not in out
    assert "--no-" not in out


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "MODEL", "x", "--save-state"),
        ("evaluate", "MODEL", "TEXT", "--json"),
        ("inspect", "MODEL", "TEXT", "-o"),
        ("bench", "prefill", "--model", "MODEL", "--json"),
    ],
)
def test_a_place_that_takes_nothing_is_named_before_the_work(
    words: tuple[str, ...], refused: Callable[..., str], text_file: Path, tmp_path: Path
) -> None:
    """The model is not there either: what is wrong with the place is said first, not after hours."""
    named = {"MODEL": tmp_path / "nothing", "TEXT": text_file}
    out = text_file / "below-a-file"
    assert f"cannot write {out}" in refused(*(named.get(word, word) for word in words), out)
    new = tmp_path / "new" / "out"
    assert "cannot write" not in refused(*(named.get(word, word) for word in words), new)
    assert not new.exists()
