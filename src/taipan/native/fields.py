"""What a field of a kernel's arguments is: an address of a tensor's elements, a number, or a structure of its own.

`Structure.of` checks what goes into one: every field, none else, and of a tensor device and dtype.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from taipan.errors import InputError, shown

Index = ctypes.c_ssize_t
Value = Tensor | int | float | Sequence[int] | ctypes.Structure | None
"""What a field is given: a tensor stands for the address of its first element, None for null."""


class Address(ctypes.c_void_p):
    """Where the elements of a tensor are; `or_null`: or nowhere.

    Attributes:
        name: of the elements, as the library has it; `real` is `float` or `double`, as it was compiled.
        dtypes: of tensors; None stands for that of the library.
    """

    name: ClassVar[str] = "any"
    dtypes: ClassVar[tuple[torch.dtype | None, ...]] = (None,)
    or_null: ClassVar[bool] = False


class Reals(Address):
    """In the library's own type."""

    name = "real"


class RealsOrNull(Reals):
    """The same, or none."""

    or_null = True


class Elements(Address):
    """In the library's own type or in bfloat16, as another field says."""

    dtypes = (None, torch.bfloat16)


class ElementsOrNull(Elements):
    """The same, or none."""

    or_null = True


class Narrow(Elements):
    """bfloat16."""

    dtypes = (torch.bfloat16,)


class Weights(Address):
    """A matrix of any format, or none."""

    dtypes, or_null = (None, torch.bfloat16, torch.int8, torch.uint8), True


class Scales(Address):
    """fp32 or bfloat16, as the matrix is, or none."""

    dtypes, or_null = (torch.float32, torch.bfloat16), True


class Bytes(Address):
    """Anything; given as a number."""

    dtypes = ()


class Int8(Address):
    """int8."""

    name, dtypes = "int8", (torch.int8,)


class Uint8(Address):
    """uint8."""

    name, dtypes = "uint8", (torch.uint8,)


class Float(Address):
    """fp32, whatever the library's type."""

    name, dtypes = "float", (torch.float32,)


class Int32(Address):
    """int32."""

    name, dtypes = "int32", (torch.int32,)


class Int32OrNull(Int32):
    """The same, or none."""

    or_null = True


class Int64(Address):
    """int64."""

    name, dtypes = "int64", (torch.int64,)


class Int64OrNull(Int64):
    """The same, or none."""

    or_null = True


class Double(Address):
    """fp64, whatever the library's type."""

    name, dtypes = "double", (torch.float64,)


class DoubleOrNull(Double):
    """The same, or none."""

    or_null = True


class FlagsOrNull(Address):
    """bool, a byte each, or none."""

    name, dtypes, or_null = "uint8", (torch.bool,), True


class Structure(ctypes.Structure):
    """A structure of interface.h, with its name and fields."""

    @classmethod
    def of(cls, real: torch.dtype = torch.float32, **values: Value) -> Self:
        """Make one.

        Args:
            real: fp32 or fp64, as the library is compiled.
            values: of every field, by name.

        Raises:
            TypeError: a field is missing, unknown, or of another type than it is declared.
            InputError: a tensor is not on the CPU.
        """
        steps = _steps(cls, real)
        if len(steps) == len(values):
            try:
                return cls(*[values[name] if step is None else step(values[name]) for name, step in steps])
            except (KeyError, TypeError):
                pass  # said below what is wrong
        return cls._one_by_one(real, values)

    @classmethod
    def _one_by_one(cls, real: torch.dtype, values: dict[str, Value]) -> Self:
        made = cls()
        for name, kind in fields_of(cls):
            try:
                value = values.pop(name)
            except KeyError:
                raise TypeError(f"{cls.__name__} needs {name}") from None
            try:
                setattr(made, name, value if kind in _PLAIN else _converted(kind, value, real))
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.{name}: {error}") from None
        if values:
            raise TypeError(f"{cls.__name__} has no {', '.join(values)}")
        return made


class Arguments(Structure):
    """Those of one function.

    Attributes:
        function: its name.
    """

    function: ClassVar[str]


def fields_of(structure: type[ctypes.Structure]) -> Sequence[tuple[str, Any]]:
    """Name and type of every field, in order."""
    return cast(Sequence[tuple[str, Any]], structure._fields_)


_PLAIN = (Index, ctypes.c_double)  # ctypes takes nothing but a number for these


@cache
def _steps(structure: type[ctypes.Structure], real: torch.dtype) -> tuple[tuple[str, Callable[[Any], Any] | None], ...]:
    """Every field with what its value goes through; a step of training makes a hundred structures and more."""
    return tuple(
        (
            name,
            None
            if kind in _PLAIN
            else _step(kind, real)
            if issubclass(kind, Address)
            else partial(_converted, kind, real=real),
        )
        for name, kind in fields_of(structure)
    )


def _step(kind: type[Address], real: torch.dtype) -> Callable[[Any], int | None]:
    """As `_address`, which it leaves whatever is no tensor of the right dtype to."""
    known = {real if dtype is None else dtype for dtype in kind.dtypes}

    def address(value: Any) -> int | None:
        if isinstance(value, Tensor) and value.is_cpu and value.dtype in known:
            return value.data_ptr()
        return _address(kind, value, real)

    return address


def _converted(kind: Any, value: Value, real: torch.dtype) -> Any:
    if issubclass(kind, Address):
        return _address(kind, value, real)
    if issubclass(kind, ctypes.Array):
        length = ctypes.sizeof(kind) // ctypes.sizeof(Index)
        if not isinstance(value, tuple) or len(value) != length:
            raise TypeError(f"{shown(value)} is not {length} whole numbers")
        return kind(*value)
    return value


def _address(kind: type[Address], value: Value, real: torch.dtype) -> int | None:
    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise InputError(f"a tensor is on {value.device}, others are on the CPU: give all on one device")
        if value.dtype not in [real if dtype is None else dtype for dtype in kind.dtypes]:
            raise TypeError(f"the kernel does not read a tensor of {value.dtype} there")
        return value.data_ptr()
    if value is None and kind.or_null:
        return None
    if isinstance(value, int) and not kind.dtypes:
        return value
    raise TypeError(f"{type(value).__name__} instead of {'a number' if not kind.dtypes else 'a tensor'}")


def array_of(kind: type[Structure], items: Sequence[Structure]) -> Any:
    """Structures one after the other."""
    return (kind * len(items))(*items)
