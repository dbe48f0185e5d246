"""The documentation as a site: it builds, its links lead somewhere, its reference leaves nothing out."""

import dataclasses
import html
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from taipan import errors
from taipan.config import TaipanConfig
from taipan.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SYMBOL = re.compile(r"`(taipan(?:\.\w+)+(?::[\w.]+)?)`")
FIRST_HOUR = ["selective_attention", "path_of_a_token", "path_of_a_batch", "path_of_a_state"]


def site_builder() -> Any:
    spec = spec_from_file_location("taipan_site", ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = site_builder()


def build(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=config.parent, env=environment)


def configured(place: Path) -> Path:
    """The configuration of the site, for pages in `place`."""
    text = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    text = text.replace('"build/docs"', '"docs"').replace('"build/site"', '"site"')
    text = text.replace('paths = ["src"]', f'paths = ["{ROOT / "src"}"]')
    (place / "zensical.toml").write_text(text, encoding="utf-8")
    return place / "zensical.toml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    builder.write_pages(place / "docs")
    done = build(configured(place))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return place


def test_every_document_is_a_page_of_the_navigation_or_linked(site: Path) -> None:
    pages = {path.relative_to(site / "docs").as_posix() for path in (site / "docs").rglob("*.md")}
    named = set(re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    assert named <= pages
    decisions = {name for name in pages if name.startswith("decisions/0")}
    assert pages - named - decisions == set()
    index = (site / "docs/decisions/README.md").read_text(encoding="utf-8")
    assert all(Path(name).name in index for name in decisions)


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A\n\n[b](b.md)\n", encoding="utf-8")
    config = tmp_path / "zensical.toml"
    config.write_text('[project]\nsite_name = "A"\n', encoding="utf-8")
    assert build(config).returncode != 0
    (docs / "b.md").write_text("# B\n\n[a](index.md)\n", encoding="utf-8")
    assert build(config).returncode == 0


@pytest.mark.parametrize("page", builder.PUBLIC)
def test_the_reference_has_every_public_name(site: Path, page: str) -> None:
    text = (site / "site/reference" / page / "index.html").read_text(encoding="utf-8")
    found = set(re.findall(r'id="([\w.]+)"', text))
    expected = builder.identifiers(builder.PUBLIC[page])
    assert expected
    for name in expected:
        assert name in found, f"{name} is not described in reference/{page}"


def test_the_surface_is_public() -> None:
    import taipan

    described = {name.rpartition(".")[2] for name in builder.identifiers(builder.PUBLIC["taipan"])}
    assert described == set(taipan.__all__)


def rows(page: Path) -> dict[str, list[str]]:
    """The rows of a page's tables by their first cell."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return {cell[0].strip("`"): cell[1:] for cell in cells}


def test_the_reference_has_every_field_of_a_configuration(site: Path) -> None:
    found = rows(site / "docs/reference/configuration.md")
    for field in dataclasses.fields(TaipanConfig):
        kind, default, meaning = found[field.name]
        assert kind.startswith("`"), field.name
        assert (default == "required") == (field.default is dataclasses.MISSING)
        assert meaning, f"TaipanConfig.{field.name} has no meaning: say it in the Attributes of its docstring"
    assert len(found) == len(dataclasses.fields(TaipanConfig))


def test_the_reference_has_every_key_of_a_recipe(site: Path) -> None:
    text = (site / "docs/reference/recipe.md").read_text(encoding="utf-8")
    for name in ("extends", "output"):
        assert f"| `{name}` |" in text
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    import typing

    hints = typing.get_type_hints(Recipe)
    for section in dataclasses.fields(Recipe):
        if section.name == "output":
            continue
        for field in dataclasses.fields(hints[section.name]):
            name = {"start": "from"}.get(field.name, field.name)
            if name == "overrides":
                continue
            (row,) = re.findall(rf"^\| `{name}` \|.*", sections[section.name], re.MULTILINE)
            meaning = re.split(r"(?<!\\)\|", row.strip("| "))[-1].strip()
            assert meaning, f"{section.name}.{name} has no meaning: say it in the Attributes of its docstring"


def test_the_reference_has_the_tree_of_errors(site: Path) -> None:
    text = (site / "docs/reference/errors.md").read_text(encoding="utf-8")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.TaipanError):
            depth = len([base for base in kind.__mro__ if issubclass(base, errors.TaipanError)]) - 1
            assert f"{'    ' * depth}* `{kind.__name__}`" in text
            assert (kind.__doc__ or "").partition("\n")[0] in text


def test_the_reference_has_every_verb_and_option(site: Path) -> None:
    import typer

    from taipan.cli.main import app

    text = (site / "docs/reference/command_line.md").read_text(encoding="utf-8")
    waiting: list[tuple[str, Any]] = [("taipan", typer.main.get_command(app()))]
    for name, command in waiting:
        children = getattr(command, "commands", None)
        if children is None:
            section = text[text.index(f"### `{name}`") :].partition("\n### ")[0]
            for parameter in command.params:
                for option in parameter.opts if parameter.param_type_name == "option" else ():
                    assert option in section, f"{name} {option}"
                assert parameter.help, f"{name} {parameter.name} says nothing of itself"
        waiting += [(f"{name} {child.name}", child) for child in (children or {}).values()]


@pytest.mark.parametrize("page", [*FIRST_HOUR, "first_hour", "glossary", "non_goals"])
def test_the_symbols_of_the_first_hour_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = SYMBOL.findall(text)
    assert found or page not in FIRST_HOUR
    for symbol in found:
        module, _, attributes = symbol.partition(":")
        while True:  # without a colon the last parts may be attributes
            try:
                value: Any = import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                attributes = f"{last}.{attributes}".strip(".")
        for attribute in attributes.split(".") if attributes else ():
            value = getattr(value, attribute)
    for path in re.findall(r"`(src/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["path_of_a_token", "path_of_a_batch", "path_of_a_state"])
def test_a_path_is_under_a_page(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert len(text.split()) < 450


def test_images_are_there(site: Path) -> None:
    found = 0
    for path in (site / "site").rglob("*.html"):
        for target in re.findall(r'(?:src|srcset)="([^":]+\.(?:svg|png))"', path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path}: {target}"
            found += 1
    assert found >= 3


def test_every_column_has_a_name(site: Path) -> None:
    """Whoever hears a table needs it (axe: empty-table-header)."""
    pages = list((site / "site").rglob("*.html"))
    empty = [path.name for path in pages if re.search(r"<th[^>]*>\s*</th>", path.read_text(encoding="utf-8"))]
    assert pages
    assert empty == []


def test_pages_show_no_path_of_this_machine(site: Path) -> None:
    for path in (site / "site").rglob("*.html"):
        assert str(ROOT) not in html.unescape(path.read_text(encoding="utf-8")), path
