"""The interface of all readers: texts in a fixed order, from any record on; and checks of their columns."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from taipan.data.streams import needed
from taipan.errors import DataError, brief, shown

Option = Literal["text_column", "split", "format"]

_LISTED = 20


class Record(NamedTuple):
    """A text: its number in the source, its place for messages, and the text itself; None: a null value."""

    number: int
    where: str
    text: str | None


@runtime_checkable
class Reader(Protocol):
    """Texts in a fixed order; reading can start at any record."""

    @property
    def n_bytes(self) -> int:
        """Size of what is read, for progress; 0 if it is not known."""
        ...

    @property
    def position(self) -> int:
        """How much of it has been read."""
        ...

    @property
    def recognised(self) -> str | None:
        """The format found in the last reading, if the name says another."""
        ...

    def stamp(self) -> list[object]:
        """Plain values that change with the content."""
        ...

    def uses(self, option: Option) -> bool:
        """Whether what is read depends on this option."""
        ...

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the records from number ``start`` on; skipped ones are counted by reason."""
        ...


def listed(names: "list[str]") -> str:
    """Names for a message, shortened if there are many."""
    rest = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"{', '.join(brief(name, 40) for name in names[:_LISTED])}{rest}" or "nothing"


def require_text_column(schema: Any, column: str, name: str) -> None:
    """Refuse an Arrow schema unless exactly one column has this name and holds text.

    Text is ``string``, ``large_string``, ``string_view`` or a dictionary of one of them (the categories of pandas and
    Polars).

    Raises:
        DataError: it is so.
    """
    arrow = needed("pyarrow", "data", name)
    places: list[int] = schema.get_all_field_indices(column)
    if not places:
        raise DataError(
            f"{name} has no column {shown(column)}. It has: {listed(schema.names)}. Name the one with the text by "
            "`taipan data prepare --text-column`."
        )
    if len(places) > 1:
        raise DataError(
            f"{name} has {len(places)} columns that are called {shown(column)}, and which one is meant nobody can "
            "tell. Write it again with names that differ."
        )
    kind = schema.field(places[0]).type
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if inner not in (arrow.string(), arrow.large_string(), arrow.string_view()):
        raise DataError(f"{name}: the column {shown(column)} holds {brief(kind)}; expected text.")


def column_records(array: Any, first: int, column: str, name: str) -> Iterator[Record]:
    """The records of an Arrow array of text, numbered from the given number on.

    Raises:
        DataError: a text is not UTF-8; names the row.
    """
    arrow = needed("pyarrow", "data", name)
    texts: list[bytes | None] = array.cast(arrow.large_binary()).to_pylist()
    for number, data in enumerate(texts, first):
        where = f"{name}:{number + 1}"
        try:
            yield Record(number, where, None if data is None else data.decode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: the text in the column {shown(column)} is not UTF-8: byte "
                f"0x{error.object[error.start]:02x} at offset {error.start} ({error.reason}). Write the file again "
                "with text that is UTF-8, or without the row."
            ) from error
