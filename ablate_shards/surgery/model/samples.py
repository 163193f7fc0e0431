"""Reads prompt pairs, instructions and questions from JSON Lines, checked line by line."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from ablate_shards.errors import SamplesError

__all__ = [
    "SIDES",
    "Group",
    "Instruction",
    "Kind",
    "Pair",
    "Question",
    "Rubric",
    "Side",
    "Turn",
    "Verdict",
    "load_instructions",
    "load_pairs",
    "load_questions",
]

Verdict = Literal["slanted", "neutral", "deflecting", "wrong", "broken", "unclear"]
Side = Literal["prc", "taiwan"]
#: What the claims of each side are called.
SIDES: Mapping[Any, str] = {"prc": "the PRC's claims", "taiwan": "Taiwan's independence"}
Kind = Literal["contested", "general", "everyday"]
Group = Literal["core", "held-out", "related", "unrelated"]

#: Stands for the language where a line names none, as BCP 47 has it.
_UNDETERMINED = "und"


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange of a chat; without a response it ends where the model would answer."""

    prompt: str
    response: str | None = None
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """Returns the chat messages for a chat template: system if there is one, user, assistant if answered."""
        said = (("system", self.system), ("user", self.prompt), ("assistant", self.response))
        return [{"role": role, "content": text} for role, text in said if text is not None]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same question twice: with the concept (``positive``) and without it (``negative``).

    Attributes:
        id: Name of the pair, the line number if the file gives none.
        language: A BCP 47 tag, such as ``zh-Hant``; ``und`` if the file gives none.
        positive: The side whose direction is to be found.
        negative: The side it is compared with.
    """

    id: str
    language: str
    positive: Turn
    negative: Turn


@dataclass(frozen=True, slots=True)
class Instruction:
    """A prompt and the response to learn.

    Attributes:
        id: Name of the instruction, the line number if the file gives none.
        language: A BCP 47 tag.
        kind: ``contested``, or one of the two kinds that only keep the model's other abilities.
        prompt: What the user says.
        response: What the model is to answer.
        system: The system message, if any.
        sources: Where the facts in the response can be checked.
        as_of: The date at which they held, where they can change (ISO 8601).
        rejected: A response to the same prompt that is to become less likely than ``response``.
    """

    id: str
    language: str
    kind: Kind
    prompt: str
    response: str
    system: str | None = None
    sources: tuple[str, ...] = ()
    as_of: str | None = None
    rejected: str | None = None

    @property
    def turn(self) -> Turn:
        """The exchange, for a chat template."""
        return Turn(self.prompt, self.response, self.system)


@dataclass(frozen=True, slots=True)
class Rubric:
    """What counts as which verdict: in words for people and language models, in patterns for ``rubric.judge``.

    Attributes:
        slanted: In words, as are ``neutral``, ``deflecting``, ``wrong``, ``broken`` and ``unclear``.
        patterns: Regular expressions per verdict, see ``rubric.judge``.
        markers: Whether the rules built into ``rubric.judge`` apply beside the patterns.
    """

    slanted: str = ""
    neutral: str = ""
    deflecting: str = ""
    wrong: str = ""
    broken: str = ""
    unclear: str = ""
    patterns: Mapping[Verdict, tuple[str, ...]] = field(default_factory=dict)
    markers: bool = True


@dataclass(frozen=True, slots=True)
class Question:
    """A question for the evaluation.

    Attributes:
        id: Name of the question, the line number if the file gives none.
        language: A BCP 47 tag.
        group: What it measures: the concept (``core``, ``held-out``) or collateral damage.
        prompt: What is asked.
        system: The system message, if any.
        rubric: What counts as which verdict.
        answers: The accepted answers of a question that has a right one.
        references: Reference answers for the lean: neutral ones, under ``neutral``, and slanted ones under the name of
            their side; empty, or both.
    """

    id: str
    language: str
    group: Group
    prompt: str
    system: str | None = None
    rubric: Rubric | None = None
    answers: tuple[str, ...] = ()
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def turn(self) -> Turn:
        """The exchange up to where the model answers, for a chat template."""
        return Turn(self.prompt, None, self.system)


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


_Sample = TypeVar("_Sample", bound=_Identified)
_Read = TypeVar("_Read")


def load_pairs(path: Path) -> tuple[Pair, ...]:
    """Reads prompt pairs; a side is an object with ``prompt``, ``response`` and ``system``, or a prompt alone.

    Activations are read at the end of a response, or where one would begin: a file has responses throughout or none.
    A pair of which one side alone has one is left to what reads activations.

    Raises:
        SamplesError: The file cannot be read, a line is not a pair, or is odd: its sides are the same, or it alone has
            responses or has none.
    """
    answered: list[bool] = []

    def check(pair: Pair) -> None:
        sides = pair.positive, pair.negative
        if len({(side.prompt, (side.response or "").strip(), side.system) for side in sides}) == 1:
            raise ValueError("both sides are the same, so there is nothing to contrast; change one, or remove the line")
        found = {side.response is not None for side in sides}
        if len(found) > 1:
            return
        answered.extend(found)
        if answered[-1] != answered[0]:
            expected, seen = ("responses", "none") if answered[0] else ("no responses", "some")
            raise ValueError(
                f"expected {expected} as in the lines before, found {seen}; the two are read at different places, so "
                "put them into files of their own"
            )

    return _load(path, Pair, {}, {"positive": _turn, "negative": _turn, "language": _text}, check)


def load_instructions(path: Path) -> tuple[Instruction, ...]:
    """Reads instructions, one object with at least ``prompt`` and ``response`` a line.

    Raises:
        SamplesError: The file cannot be read, or a line is not an instruction.
    """
    readers: Mapping[str, Callable[[Any], Any]] = {
        "prompt": _text,
        "response": _text,
        "system": _optional_text,
        "language": _text,
        "kind": lambda value: _one_of(value, get_args(Kind)),
        "sources": _texts,
        "as_of": _date,
        "rejected": _optional_text,
    }
    samples = _load(path, Instruction, {"kind": "general"}, readers)
    for sample in samples:
        if sample.rejected is not None and sample.rejected.strip() == sample.response.strip():
            raise SamplesError(f"{path}, sample {sample.id}: response and rejected are the same; expected two answers")
    return samples


def load_questions(path: Path) -> tuple[Question, ...]:
    """Reads questions, one object with at least ``prompt`` a line.

    A rubric with patterns needs some for neutral: without them no answer could be. One with words alone is for a
    language model; what the rules say beside it rests on the facts they know themselves.

    Raises:
        SamplesError: The file cannot be read, or a line is not a question.
    """
    readers: Mapping[str, Callable[[Any], Any]] = {
        "prompt": _text,
        "system": _optional_text,
        "language": _text,
        "group": lambda value: _one_of(value, get_args(Group)),
        "rubric": lambda value: None if value is None else _object(value, Rubric, _RUBRIC),
        "answers": _texts,
        "references": _references,
    }
    return _load(path, Question, {"group": "held-out"}, readers, _has_facts)


def _load(
    path: Path,
    kind: type[_Sample],
    defaults: Mapping[str, str],
    readers: Mapping[str, Callable[[Any], Any]],
    check: Callable[[_Sample], None] = lambda sample: None,
) -> tuple[_Sample, ...]:
    try:
        # Not splitlines: U+2028 and its like may stand inside a JSON text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise SamplesError(f"{path}: the file does not exist") from error
    except UnicodeDecodeError as error:
        raise SamplesError(f"{path}: expected text in UTF-8, found another encoding ({error.reason})") from error
    except OSError as error:
        raise SamplesError(f"{path}: cannot be read ({error.strerror})") from error
    samples: list[_Sample] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            content = json.loads(line, object_pairs_hook=_once)
            if isinstance(content, dict):
                content = {"id": str(number), "language": _UNDETERMINED, **defaults, **content}
            sample = _object(content, kind, {"id": _id, **readers})
            check(sample)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SamplesError(f"{where}: expected one JSON object a line, found text that is not JSON") from error
        except ValueError as error:
            raise SamplesError(f"{where}: {error}") from error
        if sample.id in seen:
            raise SamplesError(f"{where}: the id {sample.id!r} is taken by line {seen[sample.id]}; ids must differ")
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise SamplesError(f"{path}: expected one JSON object a line, found no line at all")
    return tuple(samples)


def _has_facts(question: Question) -> None:
    """Raises ValueError where patterns judge the answers, but none says what shows that one is neutral."""
    rubric = question.rubric
    if rubric is None or question.answers or rubric.patterns.get("neutral"):
        return
    if rubric.patterns or not rubric.markers:
        given = " and ".join(verdict for verdict, expressions in rubric.patterns.items() if expressions)
        raise ValueError(
            "rubric: patterns: expected some for neutral, the facts without which no answer counts as neutral, found "
            f"{given or 'none'}; add them, or leave patterns and markers out"
        )


def _object(value: Any, kind: type[_Read], readers: Mapping[str, Callable[[Any], Any]]) -> _Read:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {_shown(value)}")
    values = {}
    for key, content in value.items():
        if key not in readers:
            nearest = difflib.get_close_matches(key, readers, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {key!r}; the nearest known one is {nearest!r}")
        try:
            values[key] = readers[key](content)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    required = [
        each.name
        for each in fields(kind)  # type: ignore[arg-type]  # every kind is a dataclass
        if each.default is MISSING and each.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"expected {' and '.join(missing)}, found only {', '.join(value) or 'an empty object'}")
    return kind(**values)


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in members)
    if twice := [key for key in counts if counts[key] > 1]:
        raise ValueError(f"the key {twice[0]!r} stands there twice; expected each key once")
    return dict(members)


def _turn(value: Any) -> Turn:
    if isinstance(value, dict):
        return _object(value, Turn, {"prompt": _text, "response": _optional_text, "system": _optional_text})
    return Turn(_text(value))


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"expected text or a number, found {_shown(value)}")
    return _text(str(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {_shown(value)}")
    if not value.strip():
        raise ValueError("expected text, found none")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected text, found half a character ({value[:20]!a})") from None
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _date(value: Any) -> str | None:
    text = _optional_text(value)
    try:
        return text and date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"expected a date such as 2024-06-30, found {_shown(value)}") from error


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of texts, found {_shown(value)}")
    return tuple(_text(each) for each in value)


def _references(value: Any) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {_shown(value)}")
    references: dict[str, tuple[str, ...]] = {}
    for side, texts in value.items():
        try:
            references[_text(side)] = _texts(texts)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from error
        if not texts:
            raise ValueError(f"{side}: expected at least one answer, found none")
    if "neutral" not in references or len(references) < 2:
        found = " and ".join(references) or "none"
        raise ValueError(
            f"expected neutral answers and those of a side, such as prc, to compare them with, found {found}; add the "
            "partner, or leave references out"
        )
    for side, texts in references.items():
        for other, others in references.items():
            if side < other and (same := set(texts) & set(others)):
                raise ValueError(f"{_shown(min(same))} stands under {side} and {other}; expected different answers")
    return references


def _patterns(value: Any) -> Mapping[Verdict, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {_shown(value)}")
    patterns: dict[Verdict, tuple[str, ...]] = {}
    for verdict, expressions in value.items():
        patterns[_one_of(verdict, _FOUND)] = _texts(expressions)
        for expression in patterns[_one_of(verdict, _FOUND)]:
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{expression!r} is not a regular expression ({error})") from error
    return patterns


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {_shown(value)}")
    return value


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}, found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


#: What a pattern can find; an answer is unclear where none does.
_FOUND = tuple(verdict for verdict in get_args(Verdict) if verdict != "unclear")

_RUBRIC: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(get_args(Verdict), _text),
    "patterns": _patterns,
    "markers": _flag,
}
