"""Checks what a file holds against types; what does not fit is named by its place, with what was expected and found."""

import dataclasses
import difflib
import functools
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

__all__ = ["Finite", "Text", "checked", "shown", "unknown"]

_T = TypeVar("_T")

#: Neither NaN nor infinite nor, as an integer, too long for a float.
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max, description="a finite number")]
#: Not blank, and without halves of characters, which JSON can spell and no file takes.
Text = Annotated[str, msgspec.Meta(pattern=r"\A(?=[\s\S]*\S)[^\ud800-\udfff]*\Z", description="text")]

_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number"}
_SHOWN = 40


def checked(content: Any, kind: type[_T], place: str = "", *, closed: Collection[type] = ()) -> _T:
    """Returns parsed JSON or TOML as a value of a type, such as a dataclass, checked throughout.

    Integers become floats and lists become tuples where the type says so; nothing else is converted. A type can be
    narrowed by ``msgspec.Meta``, whose description is what errors say was expected.

    Args:
        content: What was parsed.
        kind: The type.
        place: What of the file it is, for errors.
        closed: The dataclasses that take no other keys than their fields; elsewhere unknown keys are passed over.

    Raises:
        ValueError: Something does not fit, such as ``lora: rank: expected a positive integer, found 0``.
    """
    try:
        value = msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        # Its own message shows neither the value nor the keys of mappings.
        raise ValueError(next(_faults(content, kind, place, closed), _misfit(content, kind, place))) from error
    if closed and (fault := next(_faults(content, kind, place, closed), None)):
        raise ValueError(fault)
    return value


def unknown(key: str, known: Iterable[str], what: str = "key") -> str:
    """Returns what to say of a key that is not known."""
    nearest = difflib.get_close_matches(key, [*known], n=1, cutoff=0.0)[0]
    return f"unknown {what} {key!r}; the nearest known one is {nearest!r}"


def shown(value: Any) -> str:
    """Returns a value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    plain = text.encode(errors="backslashreplace").decode()
    return text if text == plain else f"half a character ({plain})"


def _faults(content: Any, kind: Any, place: str, closed: Collection[type]) -> Iterator[str]:
    """Yields a sentence on each part of the content that does not fit."""
    holder = _holder(kind)
    origin, kinds = get_origin(holder), [part for part in get_args(holder) if part is not ...]
    parts: Iterable[tuple[str | int, Any, Any]] = ()
    if (fields := _fields(holder)) and isinstance(content, dict):
        if holder in closed and (odd := [key for key in content if key not in fields]):
            yield _joined(place, unknown(odd[0], fields))
        if missing := [name for name in _required(holder) if name not in content]:
            found = ", ".join(content) or "an empty object"
            yield _joined(place, f"expected {' and '.join(missing)}, found only {found}")
        parts = [(name, content[name], fields[name]) for name in fields if name in content]
    elif origin in (dict, Mapping) and isinstance(content, dict):
        for key in content:
            yield from _faults(key, kinds[0], place, closed)
        parts = [(key, value, kinds[1]) for key, value in content.items()]
    elif origin in (list, tuple) and isinstance(content, list) and (len(kinds) < 2 or len(kinds) == len(content)):
        parts = [(index, value, kinds[index % len(kinds)]) for index, value in enumerate(content)]
    elif not _fits(content, kind):
        yield _misfit(content, kind, place)
    for step, value, inner in parts:
        if closed or not _fits(value, inner):
            yield from _faults(value, inner, _joined(place, step), closed)


def _fits(content: Any, kind: Any) -> bool:
    try:
        msgspec.convert(content, kind)
    except msgspec.ValidationError:
        return False
    return True


def _misfit(content: Any, kind: Any, place: str) -> str:
    return _joined(place, f"expected {_expected(kind)}, found {shown(content)}")


def _joined(place: str, more: str | int) -> str:
    if isinstance(more, int):
        return f"{place}[{more}]"
    return f"{place}: {more}" if place else more


def _holder(kind: Any) -> Any:
    """Returns the type without notes; of a union, the member that has parts, if one has."""
    if get_origin(kind) is Annotated:
        return _holder(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        members = [_holder(member) for member in get_args(kind)]
        return next((each for each in members if _fields(each) or get_origin(each)), members[0])
    return kind


@functools.cache
def _fields(kind: Any) -> Mapping[str, Any]:
    """Returns the types of a dataclass's fields; other types have none."""
    return get_type_hints(kind, include_extras=True) if dataclasses.is_dataclass(kind) else {}


@functools.cache
def _required(kind: Any) -> tuple[str, ...]:
    missing = dataclasses.MISSING
    return tuple(field.name for field in dataclasses.fields(kind) if field.default is field.default_factory is missing)


def _expected(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((note.description for note in reversed(parts[1:]) if note.description), None) or _expected(parts[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(_expected(part) for part in parts if part is not type(None))
    if origin in (list, tuple):
        return f"a list of {len(parts)}" if len(parts) > 1 and ... not in parts else "a list"
    return _WORDS.get(kind, "an object")
