"""Build the documentation as a site: the documents as they are, and a reference written from the code.

    python docs/site.py

The pages go to `build/docs`; zensical makes `build/site` of them and refuses links that lead nowhere. Links to files
that are not documents (sources, tests, recipes) become plain text: on a site they would lead nowhere.
"""

import argparse
import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import typer

import taipan
from taipan import errors
from taipan.cli.main import PANELS, app
from taipan.config import TaipanConfig
from taipan.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Documents outside docs/, by the name of their page.
OTHERS = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"} | {
    "benchmarks.md": "benchmarks/README.md"
}
# The public packages, by the page that describes them.
PUBLIC = {
    "taipan": ["taipan"],
    "sessions": ["taipan.sessions"],
    "generation": ["taipan.generation"],
    "evaluation": ["taipan.evaluation"],
    "model": ["taipan.model", "taipan.state", "taipan.accounting"],
    "data": ["taipan.data.tokenizer", "taipan.data.shards", "taipan.data.mixture"],
    "hf": ["taipan.hf"],
    "ops": [f"taipan.ops.{path.parent.name}" for path in sorted((ROOT / "src/taipan/ops").glob("*/__init__.py"))],
}
_LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<target>[^)\s]+)\)")
_IMAGE = re.compile(r"(?P<name>srcset|src)=\"(?P<target>[^\":]+)\"")
_FENCE = re.compile(r"(^```.*?^```\s*$)", re.DOTALL | re.MULTILINE)


def write_pages(out: Path) -> None:
    """Write every page below `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    for name, source in documents().items():
        page = out / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(for_the_site((ROOT / source).read_text(encoding="utf-8"), source, name), encoding="utf-8")
    for path in (*DOCS.rglob("*.svg"), *DOCS.rglob("*.png"), *(DOCS / "assets").iterdir()):
        target = out / path.relative_to(DOCS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, text in reference().items():
        page = out / "reference" / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")


def documents() -> dict[str, str]:
    """Every document by the name of its page."""
    own = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
    return {path.removeprefix("docs/"): path for path in own} | OTHERS


def for_the_site(text: str, source: str, page: str) -> str:
    """A document with its links as they are between pages."""
    pages = {source: name for name, source in documents().items()}

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if path.startswith("docs/") and path.endswith((".svg", ".png")):
            name = path.removeprefix("docs/")
        elif path in pages:
            name = pages[path]
        else:
            return match["text"] if "/" in match["text"] else f"{match['text']} (`{path}`)"
        relative = os.path.relpath(name, os.path.dirname(page) or ".")
        return f"{match[0][: match.start('target') - match.start()]}{relative}{hash_}{anchor})"

    def image(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), match["target"]))
        return f'{match["name"]}="{os.path.relpath(path.removeprefix("docs/"), os.path.dirname(page) or ".")}"'

    parts = _FENCE.split(text)
    parts[::2] = [_IMAGE.sub(image, _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts)


# ---------------------------------------------------------------------- the reference


def reference() -> dict[str, str]:
    """The pages written from the code, by name."""
    pages = {
        "recipe": recipe_page(),
        "configuration": configuration_page(),
        "errors": errors_page(),
        "command_line": command_line_page(),
    }
    return pages | {name: python_page(name, modules) for name, modules in PUBLIC.items()}


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or the classes and functions it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def identifiers(modules: list[str]) -> list[str]:
    """The full name of everything that modules offer, where it is defined."""
    found: dict[str, None] = {}
    for name in modules:
        module = import_module(name)
        for public in public_names(module):
            value = getattr(module, public)
            home = getattr(value, "__module__", None)
            named = getattr(value, "__qualname__", None) == public and str(home).startswith("taipan")
            found[f"{home if named else name}.{public}"] = None
    return list(found)


def python_page(name: str, modules: list[str]) -> str:
    """The public names of some modules, each with its docstring."""
    title = "`taipan`" if name == "taipan" else ", ".join(f"`{module}`" for module in modules)
    title = "`taipan.ops`" if name == "ops" else title
    summaries = [inspect.getdoc(import_module(module)) or "" for module in modules[: 1 if name == "ops" else None]]
    summary = (
        "The operations of the model; each is a contract."
        if name == "ops"
        else "\n\n".join(summary.partition("\n\n")[0] for summary in summaries)
    )
    return f"# {title}\n\n{summary}\n\n" + "\n\n".join(f"::: {own}" for own in identifiers(modules)) + "\n"


def attributes(kind: type) -> dict[str, str]:
    """What the `Attributes:` of a docstring say of each field; fields may share a line: "a, b: …"."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^Attributes:\n((?:^ .*\n?|^\n)*)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for match in re.finditer(r"^    ([\w, ]+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE):
        for name in match[1].split(", "):
            found[name] = " ".join(match[2].split())
    return found


def field_rows(kind: Any, names: dict[str, str] | None = None) -> Iterator[str]:
    """A table row for each field of a dataclass: name, type, default, meaning."""
    hints = get_type_hints(kind)
    described = attributes(kind)
    for field in dataclasses.fields(kind):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{_plain(field.default)}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = ""
        name = (names or {}).get(field.name, field.name)
        yield f"| `{name}` | {_type(hints[field.name])} | {default} | {_cell(described.get(field.name, ''))} |"


def recipe_page() -> str:
    """Every key of a recipe."""
    parts = [
        "# Recipe keys\n\nA recipe is a YAML file ([training](../training.md)). Every key can be given on the command "
        "line too: `-o section.key=value`. An unknown key is refused.\n\n"
        "| key | meaning |\n|---|---|\n| `extends` | another recipe, of which this one says only what differs |\n"
        "| `output` | directory of the run |"
    ]
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name == "output":
            continue
        kind = hints[field.name]
        summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        rows = list(field_rows(kind, {"start": "from"} if field.name == "model" else None))
        if field.name == "model":
            rows = [row for row in rows if not row.startswith("| `overrides`")]
            rows.append("| any field of the [configuration](configuration.md) | | | over the preset |")
        head = "| key | type | default | meaning |\n|---|---|---|---|\n"
        parts.append(f"## `{field.name}`\n\n{summary}\n\n{head}" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def configuration_page() -> str:
    """Every field of `TaipanConfig`."""
    rows = "\n".join(field_rows(TaipanConfig))
    return (
        "# Configuration of a model\n\nThe fields of `TaipanConfig`: of `config.json`, of `model` in a "
        "[recipe](recipe.md), and of `TaipanConfig.preset(name, field=value)`. Defaults are those of the setting "
        f"`gumbel`; presets have the setting `recommended`.\n\n"
        f"| field | type | default | meaning |\n|---|---|---|---|\n{rows}\n"
    )


def errors_page() -> str:
    """The errors as a tree."""

    def tree(kind: type, depth: int) -> Iterator[str]:
        others = [base.__name__ for base in kind.__bases__ if not issubclass(base, errors.TaipanError)]
        also = f" (also a `{others[0]}`)" if others and others[0] != "Exception" else ""
        yield f"{'    ' * depth}* `{kind.__name__}`{also}: {inspect.getdoc(kind)}"
        for child in sorted(kind.__subclasses__(), key=lambda own: own.__name__):
            if child.__module__ == errors.__name__:
                yield from tree(child, depth + 1)

    return (
        "# Errors\n\nWhat can be foreseen raises one of these, with a message that says what was given, what was "
        "expected and what to do. `except taipan.errors.TaipanError` catches all of them; the command line prints the "
        "message and exits with 2.\n\n" + "\n".join(tree(errors.TaipanError, 0)) + "\n"
    )


def command_line_page() -> str:
    """Every verb with its options."""
    root: Any = typer.main.get_command(app())
    parts = ["# Command line\n\n`taipan VERB --help` shows the same."]
    for panel, verbs in PANELS.items():
        parts.append(f"## {panel}")
        for verb in verbs:
            parts += list(_command("taipan", root.commands[verb]))
    return "\n\n".join(parts) + "\n"


def _command(before: str, command: Any) -> Iterator[str]:
    name = f"{before} {command.name}"
    children = getattr(command, "commands", None)
    if children is not None:
        for child in children.values():
            yield from _command(name, child)
        return
    rows = []
    for parameter in command.params:
        is_argument = parameter.param_type_name == "argument"
        label = parameter.name.upper() if is_argument else ", ".join(parameter.opts)
        default = parameter.default
        shown = "" if default in (None, False) or callable(default) or parameter.required else f"`{default}`"
        rows.append(f"| `{label}` | {'required' if parameter.required else shown} | {_cell(parameter.help or '')} |")
    text = inspect.cleandoc(command.help or "")
    text = re.sub(r"^taipan .*|^torchrun .*", lambda match: f"```bash\n{match[0]}\n```", text, flags=re.MULTILINE)
    yield f"### `{name}`\n\n{text}"
    if rows:
        yield "| option | default | meaning |\n|---|---|---|\n" + "\n".join(rows)


def _type(hint: Any) -> str:
    text = str(hint) if not inspect.isclass(hint) or hasattr(hint, "__args__") else hint.__name__
    text = text.replace("typing.", "").replace("taipan.config.", "").replace("NoneType", "None").replace(" | ", " or ")
    text = re.sub(r"Literal\[(.*?)\]", lambda match: " or ".join(match[1].replace("'", "").split(", ")), text)
    return _cell(f"`{text}`")


def _plain(value: Any) -> str:
    text = list(value) if isinstance(value, tuple) else value
    return {"None": "null", "True": "true", "False": "false"}.get(str(text), str(text))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the pages and build the site; the exit code is zensical's."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--config", type=Path, default=ROOT / "zensical.toml", help="configuration of the site")
    options.add_argument("--pages", type=Path, default=ROOT / "build" / "docs", help="where the pages go")
    given = options.parse_args()
    write_pages(given.pages)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(given.config)]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    assert taipan.__version__
    sys.exit(main())
