"""From the plain values of YAML and JSON to typed ones; errors name the key, the value and what was expected.

A type is what an annotation says: None, bool, int, float, str, a `Literal`, a tuple, a dict by name, or a union.
"""

import math
import types
from typing import Any, Literal, Union, cast, get_args, get_origin

from taipan.errors import ConfigError, shown, suggestion

_LARGEST = 2**63 - 1  # what a tensor can hold


def check_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse a key that nobody would read.

    Raises:
        ConfigError: naming the key and, if one is close, the key that was probably meant.
    """
    for key in given:
        if key not in known:
            name = f"{where}.{key}" if where else key
            raise ConfigError(
                f"Unknown recipe key {shown(name)}{suggestion(key, known)}. Known here: {', '.join(known)}."
            )


def check_mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` as a dictionary with text keys.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {shown(value)}, but must be a section of `key: value` lines.")
    for key in cast(dict[Any, Any], value):
        if not isinstance(key, str):
            raise ConfigError(f"{where} has the key {shown(key)}, but keys must be names.")
    return cast(dict[str, Any], value)


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`.

    Whole numbers are taken for floats; nothing else is converted: no text becomes a number, true and false are none. A
    number must be finite, a whole number must fit into 64 bits.

    Raises:
        ConfigError: the value is of another type; the message names `where`, the value and the type.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kind = next((arg for arg in args if _is_like(value, arg)), None)
        if kind is None:
            raise _refused(value, where, describe(hint))
        return convert(value, kind, where)
    if not _is_like(value, hint):
        raise _refused(value, where, describe(hint))
    if origin is Literal:
        if value not in args:
            raise _refused(value, where, describe(hint) + suggestion(value, [str(choice) for choice in args]))
    elif origin is tuple:
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) != len(value):
            raise _refused(value, where, describe(hint))
        items = enumerate(zip(value, hints, strict=True))
        return tuple(convert(item, item_hint, f"{where}[{place}]") for place, (item, item_hint) in items)
    elif origin is dict:
        check_mapping(value, where)
        return {key: convert(item, args[1], f"{where}[{shown(key)}]") for key, item in value.items()}
    elif hint is int:
        if abs(value) > _LARGEST:
            raise _refused(value, where, f"{describe(hint)} that fits into 64 bits")
        return int(value)
    elif hint is float:
        number = _as_float(value)
        if not math.isfinite(number):
            raise _refused(value, where, "a finite number")
        return number
    return value


def describe(hint: Any) -> str:
    """A type in the words of a person who writes YAML."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each item {describe(args[0])}"
        return f"a list of {len(args)} values, {' and '.join(describe(arg) for arg in args)}"
    if origin is dict:
        return f"a section of `name: {describe(args[1])}` lines"
    return _NAMES[hint]


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def _is_like(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind of a type: what is in it is another question."""
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _refused(value: Any, where: str, expected: str) -> ConfigError:
    return ConfigError(f"{where} is {shown(value)}, but must be {expected}.")
