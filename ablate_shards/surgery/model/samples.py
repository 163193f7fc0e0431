"""Reads prompt pairs, instructions and questions from JSON Lines, checked line by line."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from msgspec import Meta

from ablate_shards.errors import SamplesError
from ablate_shards.validation import Text, checked, shown

__all__ = [
    "CONTESTED",
    "SIDES",
    "Findable",
    "Group",
    "Instruction",
    "InstructionKind",
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

#: What a pattern can find; an answer is unclear where none does.
Findable = Literal["slanted", "neutral", "deflecting", "wrong", "broken"]
Verdict = Literal[Findable, "unclear"]
Side = Literal["prc", "taiwan"]
#: What the claims of each side are called.
SIDES: Mapping[Any, str] = {"prc": "the PRC's claims", "taiwan": "Taiwan's independence"}
InstructionKind = Literal["contested", "general", "everyday"]
Group = Literal["core", "held-out", "related", "unrelated"]
#: The groups of questions about which people differ; the others are controls.
CONTESTED: tuple[Group, ...] = ("core", "held-out")

#: Stands for the language where a line names none, as BCP 47 has it.
_UNDETERMINED = "und"

_Id = Annotated[Text, Meta(description="text or a number")]
_Texts = Annotated[tuple[Text, ...], Meta(description="a list of texts")]


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange of a chat; without a response it ends where the model would answer."""

    prompt: Text
    response: Text | None = None
    system: Text | None = None

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

    id: _Id
    language: Text
    positive: Annotated[Turn, Meta(description="text, or an object with prompt")]
    negative: Annotated[Turn, Meta(description="text, or an object with prompt")]


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

    id: _Id
    language: Text
    kind: InstructionKind
    prompt: Text
    response: Text
    system: Text | None = None
    sources: _Texts = ()
    as_of: Text | None = None
    rejected: Text | None = None

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

    slanted: Text = ""
    neutral: Text = ""
    deflecting: Text = ""
    wrong: Text = ""
    broken: Text = ""
    unclear: Text = ""
    patterns: Mapping[Findable, _Texts] = field(default_factory=dict)
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

    id: _Id
    language: Text
    group: Group
    prompt: Text
    system: Text | None = None
    rubric: Rubric | None = None
    answers: _Texts = ()
    references: Mapping[Text, _Texts] = field(default_factory=dict)

    @property
    def turn(self) -> Turn:
        """The exchange up to where the model answers, for a chat template."""
        return Turn(self.prompt, None, self.system)


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


_Sample = TypeVar("_Sample", bound=_Identified)


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

    return _load(path, Pair, {}, check)


def load_instructions(path: Path) -> tuple[Instruction, ...]:
    """Reads instructions, one object with at least ``prompt`` and ``response`` a line.

    Raises:
        SamplesError: The file cannot be read, or a line is not an instruction.
    """
    return _load(path, Instruction, {"kind": "general"}, _check_instruction)


def load_questions(path: Path) -> tuple[Question, ...]:
    """Reads questions, one object with at least ``prompt`` a line.

    A rubric with patterns needs some for neutral: without them no answer could be. One with words alone is for a
    language model; what the rules say beside it rests on the facts they know themselves.

    Raises:
        SamplesError: The file cannot be read, or a line is not a question.
    """
    return _load(path, Question, {"group": "held-out"}, _check_question)


def _load(
    path: Path, kind: type[_Sample], defaults: Mapping[str, str], check: Callable[[_Sample], None]
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
                content = _spelt_out({"id": number, "language": _UNDETERMINED, **defaults, **content})
            sample = checked(content, kind, closed=(Pair, Turn, Instruction, Question, Rubric))
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


def _spelt_out(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line with its number as text, and a side that is a prompt alone as an object."""

    def spelt_out(key: str, value: Any) -> Any:
        if key == "id" and type(value) is int:
            return str(value)
        return {"prompt": value} if key in ("positive", "negative") and isinstance(value, str) else value

    return {key: spelt_out(key, value) for key, value in content.items()}


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in members)
    if twice := [key for key in counts if counts[key] > 1]:
        raise ValueError(f"the key {twice[0]!r} stands there twice; expected each key once")
    return dict(members)


def _check_instruction(sample: Instruction) -> None:
    try:
        date.fromisoformat(sample.as_of or "2024-06-30")
    except ValueError as error:
        raise ValueError(f"as_of: expected a date such as 2024-06-30, found {shown(sample.as_of)}") from error
    if sample.rejected is not None and sample.rejected.strip() == sample.response.strip():
        raise ValueError("response and rejected are the same; expected two answers")


def _check_question(question: Question) -> None:
    if question.rubric is not None:
        _check_patterns(question.rubric, control=bool(question.answers))
    if question.references:
        _check_references(question.references)


def _check_patterns(rubric: Rubric, *, control: bool) -> None:
    """Raises ValueError where patterns judge the answers, but none says what shows that one is neutral."""
    for verdict, expressions in rubric.patterns.items():
        for expression in expressions:
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"rubric: patterns: {verdict}: {expression!r} is not a regular expression ({error})"
                ) from error
    if not control and not rubric.patterns.get("neutral") and (rubric.patterns or not rubric.markers):
        given = " and ".join(verdict for verdict, expressions in rubric.patterns.items() if expressions)
        raise ValueError(
            "rubric: patterns: expected some for neutral, the facts without which no answer counts as neutral, found "
            f"{given or 'none'}; add them, or leave patterns and markers out"
        )


def _check_references(references: Mapping[str, tuple[str, ...]]) -> None:
    if "neutral" not in references or len(references) < 2:
        raise ValueError(
            "references: expected neutral answers and those of a side, such as prc, to compare them with, found "
            f"{' and '.join(references)}; add the partner, or leave references out"
        )
    for side, texts in references.items():
        if not texts:
            raise ValueError(f"references: {side}: expected at least one answer, found none")
        for other, others in references.items():
            if side < other and (same := set(texts) & set(others)):
                raise ValueError(
                    f"references: {shown(min(same))} stands under {side} and {other}; expected different answers"
                )
