"""Chat templates of the Hugging Face ecosystem, rendered as transformers does, and encoded so that text stays text."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from taipan.chat.format import ChatFormat, PlainFormat, Said, Turn
from taipan.data.tokenizer import Tokenizer
from taipan.errors import DataError, InputError, brief
from taipan.io import parse_json_object, read_text
from taipan.shipped import model_directory

FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_QUESTION, _ANSWER = "A question.", "An answer, 5f3a9c."
_PRIVATE = range(0xE000, 0xF900)  # characters that Unicode gives no meaning


def find_template(directory: Path) -> tuple[str, dict[str, str]] | None:
    """The template of a model's directory and the special tokens it may name; None if there is none.

    It is `chat_template.jinja`, or the `chat_template` of tokenizer_config.json (of several the one called `default`).

    Raises:
        DataError: a file cannot be read, or holds no template where one should be.
    """
    config: dict[str, Any] = {}
    if (directory / _CONFIG).is_file():
        config = parse_json_object(read_text(directory / _CONFIG), str(directory / _CONFIG))
    names = {key: name for key, value in config.items() if key.endswith("_token") and (name := _token(value))}
    if (directory / FILE).is_file():
        return read_text(directory / FILE), names
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [cast("dict[str, Any]", entry) for entry in cast("list[Any]", template) if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
        if template is None:
            raise DataError(f"{directory / _CONFIG} has several chat templates, but none is called default.")
    if template is None:
        return None
    if not isinstance(template, str):
        raise DataError(f"{directory / _CONFIG}: chat_template must be a text, or several with their names.")
    return template, names


def _token(value: object) -> str | None:
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


class TemplateFormat:
    """Turns by a chat template.

    The template's own special tokens become those tokens. A name of one within what somebody said does not: it is
    text, so that nobody can end their turn and speak in another's name.

    Args:
        source: of the Jinja template; it runs in a sandbox.
        names: special tokens that it may name, such as `bos_token`.
        tokenizer: the model's.

    Raises:
        DataError: it is no Jinja template.
    """

    name = "chat template"
    stop_strings: tuple[str, ...] = ()

    def __init__(self, source: str, names: Mapping[str, str], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {"eos_token": tokenizer.eos_token, **names}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"The model's chat template cannot be read: {brief(error)}.") from error

    def opening(self, turns: Sequence[Said]) -> list[int]:
        """See `ChatFormat.opening`."""
        guard, guarded = self._guarded(turns)
        return self._encode(self.render(guarded), guard)

    def following(self, turns: Sequence[Said], last: Sequence[int]) -> list[int]:
        """See `ChatFormat.following`."""
        guard, guarded = self._guarded(turns)
        ids = self._encode(self._after_answer(guarded), guard)
        end = self._end(ids)
        return ids[end + 1 :] if end is not None and last and last[-1] == ids[end] else ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See `ChatFormat.end_ids`: the special token that the template puts behind an answer."""
        return self._ends

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ids = self._tokenizer.encode_template(self._after_answer([]))
        end = self._end(ids)
        return () if end is None else (ids[end],)

    def _end(self, ids: list[int]) -> int | None:
        """The place of the special token that ends an answer in what stands behind one: nothing visible is before."""
        place = next((place for place, index in enumerate(ids) if self._tokenizer.is_special(index)), None)
        return None if place is None or self._tokenizer.decode(ids[:place]).strip() else place

    def render(self, turns: Sequence[Said], *, answering: bool = True) -> str:
        """What the template makes of turns, and with `answering` of the beginning of the next one.

        Raises:
            InputError: the template refuses them.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answering, **self._names
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InputError(f"The model's chat template refuses these turns: {brief(error)}.") from error

    def _after_answer(self, turns: Sequence[Said]) -> str:
        """What stands between an answer and the next one, if these turns do."""
        before = [Turn("user", _QUESTION), Turn("assistant", _ANSWER)]
        whole = self.render([*before, *turns], answering=bool(turns))
        head, answer, rest = whole.partition(_ANSWER)
        if not answer or not head:
            raise InputError("The model's chat template does not put turns one after the other: ask without a session.")
        return rest

    def _guarded(self, turns: Sequence[Said]) -> tuple[str, list[Turn]]:
        """The turns with a character of no meaning within every name of a special token; and that character."""
        said = "".join(turn.content for turn in turns)
        guard = next(chr(code) for code in _PRIVATE if chr(code) not in said)
        guarded: list[Turn] = []
        for turn in turns:
            text = turn.content
            for name in self._tokenizer.special_tokens:
                text = text.replace(name, name[:1] + guard + name[1:])
            guarded.append(Turn(turn.role, text))
        return guard, guarded

    def _encode(self, text: str, guard: str) -> list[int]:
        return [index for piece in text.split(guard) for index in self._tokenizer.encode_template(piece)]


class _Generation(Extension):
    """`{% generation %}`, which marks answers for training: here only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of its content, as Jinja calls it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's, without names that reach into Python."""

    def __init__(*given: Any, **attributes: Any) -> None:
        values = dict(*given[1:], **attributes)
        for name in values:
            _check_name(name)
        Namespace.__init__(given[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute, as Jinja calls it."""
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateRuntimeError(f"a name that begins with an underscore is not allowed: {name}")


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateRuntimeError(str(message))


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders templates in: sandboxed, nothing given to it can be changed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML
    known: dict[str, Any] = environment.globals
    known.update(raise_exception=_refuse, strftime_now=_now, namespace=_Namespace)
    return environment


def load_format(directory: str | Path, tokenizer: Tokenizer) -> ChatFormat:
    """The chat template in a model's directory, or plain turns where there is none.

    Args:
        directory: of the model.
        tokenizer: the model's.

    Raises:
        DataError: the template or the configuration that holds it cannot be read.
    """
    found = find_template(model_directory(directory))
    return PlainFormat(tokenizer) if found is None else TemplateFormat(*found, tokenizer)
