"""The only YAML reader here: stricter than the library where that guesses or could run for ever."""

import re
from collections.abc import Callable
from typing import Any, cast

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode

from taipan.errors import ConfigError, brief, shown

_DEPTH = 50
_CHARACTERS = 1 << 20  # the longest recipe of the paper has two thousand
_DIGITS = 400
_TAG = "tag:yaml.org,2002:"


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML document.

    YAML 1.1 without its surprises: `1e-3` is a number; `1:30` (there 90), `010` (there 8) and `2024-01-01` (there a
    date) are text, and so refused where a number belongs. A key that stands twice in a mapping is refused, at any
    depth, as are a value that holds itself, nesting deeper than 50 levels, whole numbers of more than 400 digits, and
    texts of more than 2²⁰ characters.

    Args:
        text: the document.
        what: what it is, for the message.

    Raises:
        ConfigError: it is not YAML, or is refused; the message names the line.
    """
    if len(text) > _CHARACTERS:
        raise ConfigError(f"{what} has {len(text):,} characters, but must have at most {_CHARACTERS:,}.")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {brief(error, 600)}") from error


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self.deep_construct = True  # what an alias means is whole when it is met; a value that holds itself never is

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """A node of the document, unless it lies too deep: the library recurses."""
        self._level += 1
        if self._level > _DEPTH:
            raise _error(f"nested deeper than {_DEPTH} levels", self.peek_event())
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of keys that stand once; those that `<<` brings in are defaults."""
        given: dict[Any, Any] = {}
        defaults: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            value = self.construct_object(value_node)
            if key_node.tag == f"{_TAG}merge":
                defaults = {**_merged(value, value_node), **defaults}
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, str | int | float | None):
                raise _error(f"{shown(key)} cannot be a key", key_node)
            if key in given:
                raise _error(f"the key {shown(key)} stands twice, remove one of the two", key_node)
            given[key] = value
        return {**defaults, **given}


def _merged(values: Any, node: Node) -> dict[Any, Any]:
    """What `<<` brings in, made once; the library copies the nodes, which doubles and doubles."""
    merged: dict[Any, Any] = {}
    for value in cast("list[Any]", values) if isinstance(values, list) else [values]:
        if not isinstance(value, dict):
            raise _error("`<<` must name a mapping or a list of mappings", node)
        merged = {**cast("dict[Any, Any]", value), **merged}
    return merged


def _checked(kind: str, construct: Callable[[Any, ScalarNode], Any]) -> Callable[[Any, ScalarNode], Any]:
    """A constructor of the library that says what it cannot read (`!!int x`) in words."""

    def checked(loader: Any, node: ScalarNode) -> Any:
        if len(node.value) > _DIGITS:
            raise _error(f"{kind} of {len(node.value):,} characters", node)
        try:
            return construct(loader, node)
        except (ValueError, KeyError, IndexError) as error:
            raise _error(f"{shown(node.value)} is no {kind}", node) from error

    return checked


def _error(problem: str, place: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, place.start_mark)


_SCALARS = {
    "null": SafeConstructor.construct_yaml_null,
    "bool": SafeConstructor.construct_yaml_bool,
    "int": SafeConstructor.construct_yaml_int,
    "float": SafeConstructor.construct_yaml_float,
}
# nothing else can be made of a text: no dates, no bytes, no sets
_Loader.yaml_constructors = {
    **{f"{_TAG}{kind}": _checked(kind, construct) for kind, construct in _SCALARS.items()},
    **{f"{_TAG}{kind}": SafeConstructor.yaml_constructors[f"{_TAG}{kind}"] for kind in ("str", "seq", "map")},
    None: SafeConstructor.construct_undefined,
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in resolvers if tag in (f"{_TAG}null", f"{_TAG}bool", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
