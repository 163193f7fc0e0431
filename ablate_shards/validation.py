"""Checks what a file holds against types; what does not fit is named by its place, with what was expected and found."""

import dataclasses
import difflib
import functools
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

__all__ = ["Finite", "Text", "checked", "shown", "unknown"]

_T = TypeVar("_T")

#: Neither NaN nor infinite nor, as an integer, too long for a float.
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max, description="a finite number")]
#: Not blank, and without halves of characters, which JSON can spell and no file takes.
Text = Annotated[str, msgspec.Meta(pattern=r"\A(?=[\s\S]*\S)[^\ud800-\udfff]*\Z", description="text")]

_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}
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
    if closed:
        _refuse_unknown(content, kind, place, closed)
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_sentence(str(error), content, kind, place)) from error


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


def _sentence(said: str, content: Any, kind: Any, place: str) -> str:
    """Says what does not fit; of msgspec's message it takes the path, such as ``$.tensors[2][...]``."""
    match = re.fullmatch(r".* - at `(?P<key>key` in `)?\$(?P<path>.*)`", said, re.DOTALL)
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", match["path"] if match else ""):
        step: Any = int(index) if index.isdigit() else name or _unfit(content.items(), 1, _parts(kind)[1])
        content, kind, place = content[step], _inner(kind, step), _joined(place, step)
    if match and match["key"]:
        kind = _parts(kind)[0]
        content = _unfit(content.items(), 0, kind)
    if _fields(_holder(kind)) and isinstance(content, dict):
        fault = f"expected {_missing(content, kind)}, found only {', '.join(content) or 'an empty object'}"
    else:
        fault = f"expected {_expected(kind)}, found {shown(content)}"
    return _joined(place, fault)


def _unfit(members: Iterable[tuple[str, Any]], which: Literal[0, 1], kind: Any) -> str:
    """Returns the key of the first member whose key or value does not fit, which msgspec does not name."""
    for member in members:
        try:
            msgspec.convert(member[which], kind)
        except msgspec.ValidationError:
            return member[0]
    raise LookupError("all members fit")


def _missing(content: Mapping[str, Any], kind: Any) -> str:
    required = [
        field.name
        for field in dataclasses.fields(_holder(kind))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return " and ".join(name for name in required if name not in content)


def _refuse_unknown(content: Any, kind: Any, place: str, closed: Collection[type]) -> None:
    holder = _holder(kind)
    steps: Iterable[Any] = ()
    if (known := _fields(holder)) and isinstance(content, dict):
        steps = [key for key in content if key in known]
        if holder in closed and (odd := [key for key in content if key not in known]):
            raise ValueError(_joined(place, unknown(odd[0], known)))
    elif get_origin(holder) in (list, tuple) and isinstance(content, list):
        steps = range(len(content))
    for step in steps:
        _refuse_unknown(content[step], _inner(holder, step), _joined(place, step), closed)


def _holder(kind: Any) -> Any:
    """Returns the type without notes; of a union, the member that has parts, if one has."""
    if get_origin(kind) is Annotated:
        return _holder(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        members = [_holder(member) for member in get_args(kind)]
        return next((one for one in members if dataclasses.is_dataclass(one) or get_origin(one)), members[0])
    return kind


@functools.cache
def _fields(kind: Any) -> Mapping[Any, Any]:
    """Returns the types of a dataclass's fields; other types have none."""
    return get_type_hints(kind, include_extras=True) if dataclasses.is_dataclass(kind) else {}


def _parts(kind: Any) -> list[Any]:
    return [part for part in get_args(_holder(kind)) if part is not ...]


def _inner(kind: Any, step: str | int) -> Any:
    """Returns the type of what lies in a dataclass, a mapping or a list."""
    if fields := _fields(_holder(kind)):
        return fields[step]
    return _parts(kind)[1] if isinstance(step, str) else _parts(kind)[min(step, len(_parts(kind)) - 1)]


def _joined(place: str, more: str | int) -> str:
    if isinstance(more, int):
        return f"{place}[{more}]"
    return f"{place}: {more}" if place else more


def _expected(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((note.description for note in reversed(parts[1:]) if note.description), None) or _expected(parts[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_expected, parts))
    if origin is tuple and ... not in parts:
        return f"a list of {len(parts)}"
    return "a list" if origin in (list, tuple) else _WORDS.get(kind, "an object")
