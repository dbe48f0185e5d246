"""From the plain values of a YAML file to typed ones; errors name the key, the value and what was expected."""

import types
from typing import Any, Literal, Union, cast, get_args, get_origin

from taipan.errors import ConfigError, suggestion


def check_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse a key that nobody would read.

    Raises:
        ConfigError: naming the key and, if one is close, the key that was probably meant.
    """
    for key in given:
        if key not in known:
            name = f"{where}.{key}" if where else key
            raise ConfigError(f"Unknown recipe key {name!r}{suggestion(key, known)}. Known here: {', '.join(known)}.")


def check_mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` as a dictionary with text keys.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}, but must be a section of `key: value` lines.")
    for key in cast(dict[Any, Any], value):
        if not isinstance(key, str):
            raise ConfigError(f"{where} has the key {key!r}, but keys must be names.")
    return cast(dict[str, Any], value)


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: None, bool, int, float, str, a Literal, a tuple, a dict by name, or a union of these.

    Whole numbers are taken for floats; nothing else is converted (in particular no text becomes a number).

    Raises:
        ConfigError: the value is of another type; the message names `where`, the value and the type.
    """
    result = _convert(value, hint)
    if result is _NO:
        hint_text = describe(hint)
        close = (
            suggestion(str(value), [str(choice) for choice in get_args(hint)]) if get_origin(hint) is Literal else ""
        )
        raise ConfigError(f"{where} is {value!r}, but must be {hint_text}{close}.")
    return result


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


_NO = object()
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def _convert(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else _NO
    if origin in (Union, types.UnionType):
        results = (_convert(value, arg) for arg in args)
        return next((result for result in results if result is not _NO), _NO)
    if origin is tuple:
        return _convert_tuple(value, args)
    if origin is dict:
        return _convert_dict(value, args[1])
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:
        return _NO
    return value if isinstance(value, hint) else _NO


def _convert_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _NO
    values = list(cast(list[Any], value))
    hints = [args[0]] * len(values) if args[-1] is Ellipsis else list(args)
    if len(hints) != len(values):
        return _NO
    items = [_convert(item, hint) for item, hint in zip(values, hints, strict=True)]
    return _NO if any(item is _NO for item in items) else tuple(items)


def _convert_dict(value: Any, hint: Any) -> Any:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast(dict[Any, Any], value)):
        return _NO
    items = {key: _convert(item, hint) for key, item in cast(dict[str, Any], value).items()}
    return _NO if any(item is _NO for item in items.values()) else items
