"""The floors of docs/architecture.md are the ones import-linter enforces."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def drawn_floors() -> list[set[str]]:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = re.search(r"## Floors\n.*?```\n(.*?)```", text, flags=re.DOTALL)
    assert block, "docs/architecture.md has no drawing under '## Floors'"
    # the first column; two spaces set a remark apart
    return [set(line.split("  ")[0].strip().split(" | ")) for line in block[1].splitlines()]


def enforced_floors() -> list[set[str]]:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in configuration["tool"]["importlinter"]["contracts"] if c["id"] == "floors")
    return [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]


def test_the_drawing_shows_what_is_enforced() -> None:
    assert drawn_floors() == enforced_floors()


def test_every_module_stands_on_a_floor() -> None:
    modules = {path.stem for path in (ROOT / "src/taipan").iterdir() if path.suffix == ".py" or path.is_dir()}
    trained = "models"  # weights, no code
    assert modules - {"__init__", "__pycache__", trained} <= set().union(*enforced_floors())
