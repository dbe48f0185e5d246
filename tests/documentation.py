"""Reading Markdown for test_documentation.py: blocks of code, command lines, links, the paper map."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHELL = {"bash", "console", "sh", "shell"}
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- test(?P<slow>: slow)? -->\s*\Z")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)[^)]*\)")
_CODE_SPAN = re.compile(r"`(taipan [a-z][^`]*)`")
_SEPARATORS = {"|", "||", "&", "&&", ";", "(", ")"}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code. ``tier`` is "quick" or "slow" if a mark above it asks for execution, else None."""

    language: str
    code: str
    line: int
    tier: str | None

    @property
    def commands(self) -> str:
        """What a user types: in a console block the lines after the prompt and their continuations, else everything."""
        if self.language != "console":
            return self.code
        typed: list[str] = []
        continued = False
        for line in self.code.splitlines():
            if continued or line.startswith("$ "):
                typed.append(line.removeprefix("> " if continued else "$ "))
                continued = line.endswith("\\")
        return "\n".join(typed) + "\n"


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, in order."""
    for match in _FENCE.finditer(text):
        above = text[: match.start()]
        mark = _MARK.search(above)
        tier = None if mark is None else "slow" if mark["slow"] else "quick"
        yield Block(match["language"], match["code"], above.count("\n") + 1, tier)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("", text)


def code_spans(text: str) -> list[str]:
    """The commands of `taipan` in the running text."""
    return _CODE_SPAN.findall(prose(text))


def command_lines(shell: str) -> Iterator[list[str]]:
    """The words of each command in a piece of shell, without assignments before it."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "%,:@+[]{}…"
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token not in _SEPARATORS:
                words.append(token)
                continue
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def links(text: str) -> list[str]:
    """Targets of the links and images, in Markdown and HTML, that point into the repository, without their anchors."""
    plain = prose(text)
    given = [match["target"] for match in _LINK.finditer(plain)]
    given += re.findall(r'<(?:img|source|a)\b[^>]*\b(?:src|srcset|href)="([^"]+)"', plain)
    targets = (target.partition("#")[0] for target in given)
    return [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]


@dataclass(frozen=True, slots=True)
class MapRow:
    """A row of the paper map: what the paper says, the symbols that do it, the tests that prove it."""

    paper: str
    symbols: tuple[str, ...]
    tests: tuple[str, ...]


def paper_map(path: Path) -> list[MapRow]:
    """Rows of every table of the paper map; its columns are found by their heads: Paper, Code, Test."""
    rows: list[MapRow] = []
    head: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if not head:
            head = cells
        elif not set("".join(cells)) <= set("-: "):
            row = dict(zip(head, cells, strict=True))
            rows.append(MapRow(row["Paper"], _spans(row["Code"]), _spans(row["Test"])))
    return rows


def _spans(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))
