"""Live checks of shapes that check each way of calling a function once.

jaxtyping checks every call anew, which took half of the time of the tests of models. What it finds depends on nothing
but the types of arguments and result, the shapes and dtypes of tensors, and words that one of a few must be: where all
that is as it was in a call that passed, the call passes, and is not checked again.
"""

import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Callable, Collection
from typing import Any

import jaxtyping
from jaxtyping import install_import_hook
from torch import Tensor

_every_call: Callable[..., Any] = jaxtyping.jaxtyped
_LONGEST_WORD = 40  # of those that an annotation lists
_PASSED: dict[int, tuple[types.CodeType, dict[Any, set[Any]]]] = {}  # by where the code lies: equal is not the same


def check_shapes(modules: list[str]) -> None:
    """Check the annotations of these modules at calls, where jaxtyping is not switched off; none is imported yet."""
    jaxtyping.jaxtyped = jaxtyped  # pyright: ignore # its hook puts it before every function and class
    install_import_hook(modules, "beartype.beartype")


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Jaxtyping's decorator of functions, of what is made of them, and of dataclasses, whose construction is a call."""

    def decorate(of: Any) -> Any:
        if isinstance(of, property):
            return property(*(None if part is None else decorate(part) for part in (of.fget, of.fset, of.fdel)))
        if isinstance(of, (classmethod, staticmethod)):
            return type(of)(decorate(of.__func__))
        if isinstance(of, types.FunctionType):
            return checked_once(of, _every_call(typechecker=typechecker))
        if inspect.isclass(of) and dataclasses.is_dataclass(of) and not hasattr(of.__init__, "passed"):
            of.__init__ = decorate(of.__init__)
        return of

    return decorate


def checked_once(function: Callable[..., Any], checking: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function, checked where a call differs from all that passed."""
    # the results by the arguments; what is defined inside a function is the same whenever it is
    _, passed = _PASSED.setdefault(id(function.__code__), (function.__code__, {}))
    checked = returning = None  # made when they are needed: many are never
    held = threading.local()

    @functools.wraps(function)
    def call(*positional: Any, **options: Any) -> Any:
        nonlocal checked, returning
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*positional, **options)
        arguments = (kind(positional), kind(options))
        results = passed.get(arguments)
        if results is None:
            checked = checked or checking(function)
            result = checked(*positional, **options)
            passed[arguments] = {kind(result)}
            return result
        result = function(*positional, **options)
        if (found := kind(result)) not in results:
            returning = returning or checking(functools.wraps(function)(lambda *_, **__: held.__dict__.pop("result")))
            held.result = result
            returning(*positional, **options)
            results.add(found)
        return result

    call.passed = passed  # pyright: ignore
    return call


def kind(value: Any) -> Any:
    """All of a value that a check of it can depend on."""
    of = type(value)
    return _kind_of(of)(of, value)


@functools.cache
def _kind_of(of: type) -> Callable[[type, Any], Any]:
    if issubclass(of, Tensor):
        return lambda of, tensor: (of, tensor.dtype, tensor.shape)
    if of is bool or of is str:
        return lambda of, word: of if of is str and len(word) > _LONGEST_WORD else (of, word)
    if issubclass(of, (tuple, list)):
        return lambda of, sequence: (of, *map(kind, sequence))
    if issubclass(of, dict):
        return lambda of, mapping: (of, *((kind(key), kind(item)) for key, item in mapping.items()))
    if issubclass(of, Collection) and of not in (str, bytes):
        return lambda *_: object()  # which nothing equals: what it holds may be looked at, but not by us
    return lambda of, _: of
