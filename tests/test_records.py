"""A record of many fields is built by their names: one that is built by position takes a wrong field without a word."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/taipan"
MOST = 3
"""Arguments of a record that may go by position."""


def records(trees: dict[Path, ast.Module]) -> set[str]:
    """Names of all dataclasses and named tuples."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                decorated = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
                if decorated or any(ast.unparse(base).endswith("NamedTuple") for base in node.bases):
                    found.add(node.name)
    return found


def by_position(tree: ast.Module, names: set[str]) -> list[tuple[int, str]]:
    """Line and name of every record that is built of more than so many values by position, or of what is starred."""
    found: list[tuple[int, str]] = []
    for cls in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        own = cls.name if isinstance(cls, ast.ClassDef) and cls.name in names else None
        for node in ast.walk(cls):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name == "cls":
                name = own
            if name in names and len(node.args) > MOST:
                found.append((node.lineno, str(name)))
    return sorted(set(found))


def test_no_record_is_built_by_position() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    names = records(trees)
    assert {"GateOutput", "Arrangement", "AttentionState", "Mixed"} <= names
    found: list[str] = []
    for path, tree in trees.items():
        # a private record is built in its own module; elsewhere its name is another class's
        known = {name for name in names if not name.startswith("_")} | records({path: tree})
        found += [f"{path.name}:{line}: {name}" for line, name in by_position(tree, known)]
    assert found == []


@pytest.mark.parametrize("call", ["Wide(1, 2, 3, 4)", "Wide(*a, b, c, d)", "x.Wide(1, 2, 3, 4, e=5)"])
def test_one_that_is_is_found(call: str) -> None:
    record = "@dataclass(frozen=True)\nclass Wide:\n    def make(cls):\n        return cls(1, 2, 3, 4)\n"
    code = f"{record}Wide(1, 2, c=3)\n{call}"
    tree = ast.parse(code)
    assert by_position(tree, records({Path(): tree})) == [(4, "Wide"), (6, "Wide")]
