"""Holds what an evaluation found: every answer with its verdicts, what they add up to, and how two compare."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ablate_shards import __version__
from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.likelihood import Divergence, Perplexity
from ablate_shards.surgery.evaluate.statistics import Agreement, Paired, Ratio, agreement, paired, ratio
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.model.samples import Group, Question, Verdict

__all__ = [
    "FORMAT",
    "Answer",
    "Change",
    "Comparison",
    "Control",
    "Evaluation",
    "Judge",
    "Model",
    "Row",
    "Text",
    "compare",
    "evaluation_text",
    "questions_digest",
    "read_evaluation",
    "write_evaluation",
]

FORMAT = "ablate-shards.evaluation/1"

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, what a model answered, and how that was judged.

    Attributes:
        id: The question's name, as are ``language``, ``group``, ``prompt`` and ``system``.
        text: The answer that was judged, without thoughts.
        raw: All that the model said, thoughts included; None where that is ``text``.
        ended: Whether the answer came to its own end, and was not cut off.
        verdict: By the rules of the rubric.
        accepted: The right answers of a control, empty for other questions.
        exact: Whether it is one of them, but for case, spaces and final punctuation; None for other questions.
        given: Whether it holds one of them as whole words; None for other questions.
        judged: The verdict of the language model, None where it gave none or was not asked.
        said: What the language model said, None where it was not asked.
    """

    id: str
    language: str
    group: Group
    prompt: str
    system: str | None
    text: str
    raw: str | None
    ended: bool
    verdict: Verdict
    accepted: tuple[str, ...] = ()
    exact: bool | None = None
    given: bool | None = None
    judged: Verdict | None = None
    said: str | None = None

    @property
    def reply(self) -> Reply:
        """What the model said, as it said it."""
        return Reply(self.text if self.raw is None else self.raw, self.ended)


@dataclass(frozen=True, slots=True)
class Model:
    """Who answered.

    Attributes:
        name: The folder's name, or what the user called it.
        sha256: Digest of the files that bear on its answers, None where they are not here.
        endpoint: The name by which an endpoint served it, None where it ran here.
    """

    name: str
    sha256: str | None
    endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """How well a model predicts a text.

    Attributes:
        name: The file's name.
        sha256: Its digest.
        perplexity: What was measured, None where the model gave no numbers.
    """

    name: str
    sha256: str
    perplexity: Perplexity | None


@dataclass(frozen=True, slots=True)
class Row:
    """The verdicts on one group of questions that have no single right answer.

    Attributes:
        group: The group.
        language: The language, None for all together.
        verdicts: The share of each verdict.
    """

    group: Group
    language: str | None
    verdicts: Mapping[Verdict, Ratio]


@dataclass(frozen=True, slots=True)
class Control:
    """How many of one group of controls were answered right.

    Attributes:
        group: The group.
        language: The language, None for all together.
        exact: The share of answers that are an accepted one.
        given: The share of answers that hold an accepted one.
    """

    group: Group
    language: str | None
    exact: Ratio
    given: Ratio


@dataclass(frozen=True, slots=True)
class Judge:
    """What a language model made of the answers.

    Attributes:
        rows: Its verdicts, where it gave one.
        unparsable: Answers on which it gave none.
        agreement: With the rules, where it gave one; None if it never did.
    """

    rows: tuple[Row, ...]
    unparsable: int
    agreement: Agreement | None


@dataclass(frozen=True, slots=True)
class Change:
    """How one outcome changed between base and model, on the same questions.

    Attributes:
        group: The group of questions.
        outcome: A verdict, ``exact`` or ``given``.
        test: The paired test.
    """

    group: Group
    outcome: str
    test: Paired


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a model differs from its base.

    Attributes:
        changes: What changed, by group and outcome.
        divergence: KL(base ‖ model) of the next token, None where it was not measured.
        notes: Why something was not measured, or makes the comparison less than even; a line each.
    """

    changes: tuple[Change, ...]
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        model: Who answered.
        options: How it was asked, as far as it bears on the answers.
        versions: Of what computed.
        questions: Digest of the questions, with their rubrics.
        answers: Every answer, in the order of the questions.
        text: The perplexity, None where it was not measured.
        judge: Name of the language model that judged, None where none did.
        base: The same of the model that it is compared with.
        comparison: How the two differ.
    """

    model: Model
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    questions: str
    answers: tuple[Answer, ...]
    text: Text | None = None
    judge: str | None = None
    base: "Evaluation | None" = None
    comparison: Comparison | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The verdicts by the rules: of each group, then of its languages."""
        return _rows(self._contested, lambda answer: answer.verdict)

    @property
    def controls(self) -> tuple[Control, ...]:
        """The accuracy on the controls: of each group, then of its languages."""
        return tuple(
            Control(
                group,
                language,
                ratio(answer.exact is True for answer in answers),
                ratio(answer.given is True for answer in answers),
            )
            for group, language, answers in _parts([each for each in self.answers if each.exact is not None])
        )

    @property
    def judgement(self) -> Judge | None:
        """What the language model made of the answers, None where none was asked."""
        if self.judge is None:
            return None
        told = [(answer.verdict, answer.judged) for answer in self._contested if answer.judged is not None]
        return Judge(
            rows=_rows([answer for answer in self._contested if answer.judged], lambda answer: answer.judged),
            unparsable=len(self._contested) - len(told),
            agreement=agreement(*zip(*told, strict=True)) if told else None,
        )

    @property
    def _contested(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.exact is None]


def compare(evaluation: Evaluation, base: Evaluation, divergence: Divergence | None = None) -> Comparison:
    """Compares the answers of two models to the same questions, each outcome by the exact McNemar test.

    Args:
        evaluation: The model, after.
        base: The model, before.
        divergence: What was measured of their distributions.

    Raises:
        EvaluateError: The base was not asked one of the questions.
    """
    before = {answer.id: answer for answer in base.answers}
    pairs: list[tuple[Answer, Answer]] = []
    for answer in evaluation.answers:
        asked = before.get(answer.id)
        if asked is None or (asked.prompt, asked.system) != (answer.prompt, answer.system):
            raise EvaluateError(
                f"question {answer.id}: {base.model.name} was not asked it in these words; evaluate it with the same "
                "questions"
            )
        pairs.append((asked, answer))
    changes = []
    for group in _GROUPS:
        of_group = [(old, new) for old, new in pairs if new.group == group]
        contested = [(old, new) for old, new in of_group if new.exact is None]
        controls = [(old, new) for old, new in of_group if new.exact is not None]
        if contested:
            changes += [_verdict_change(group, verdict, contested) for verdict in _VERDICTS]
        if controls:
            changes.append(_change(group, "exact", [(old.exact is True, new.exact is True) for old, new in controls]))
            changes.append(_change(group, "given", [(old.given is True, new.given is True) for old, new in controls]))
    return Comparison(tuple(changes), divergence, tuple(_unevenness(evaluation, base)))


def questions_digest(questions: Iterable[Question]) -> str:
    """Returns the digest of questions with all that they carry."""
    content = [dataclasses.asdict(question) for question in questions]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def evaluation_text(evaluation: Evaluation) -> str:
    """Returns an evaluation as JSON; what adds up stands before the answers, which it is computed from."""
    content = {"format": FORMAT, "tool": f"ablate-shards {__version__}", **_content(evaluation)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes an evaluation; the file appears complete or not at all."""
    write_whole(path, [evaluation_text(evaluation).encode()])


def read_evaluation(path: Path) -> Evaluation:
    """Reads an evaluation; what adds up is computed anew from its answers.

    Raises:
        EvaluateError: The file cannot be read, is no evaluation, or is of a newer version.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise EvaluateError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise EvaluateError(f"{path}: expected {FORMAT}, found a file that is not JSON") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise EvaluateError(f"{path}: expected {FORMAT}, found {found!r}; evaluate the model with this version")
    try:
        return _read(content)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise EvaluateError(
            f"{path}: not a complete evaluation ({error}); it was changed after it was written"
        ) from error


# ---------------------------------------------------------------------------------------- what adds up


def _parts(answers: Sequence[Answer]) -> Iterable[tuple[Group, str | None, list[Answer]]]:
    """Yields each group that has answers, then each of its languages if there are several."""
    for group in _GROUPS:
        of_group = [answer for answer in answers if answer.group == group]
        if of_group:
            yield group, None, of_group
        languages = sorted({answer.language for answer in of_group})
        for language in languages if len(languages) > 1 else ():
            yield group, language, [answer for answer in of_group if answer.language == language]


def _rows(answers: Sequence[Answer], of: Callable[[Answer], Verdict | None]) -> tuple[Row, ...]:
    return tuple(
        Row(group, language, {verdict: ratio(of(answer) == verdict for answer in part) for verdict in _VERDICTS})
        for group, language, part in _parts(answers)
    )


def _verdict_change(group: Group, verdict: Verdict, pairs: Iterable[tuple[Answer, Answer]]) -> Change:
    return _change(group, verdict, [(old.verdict == verdict, new.verdict == verdict) for old, new in pairs])


def _change(group: Group, outcome: str, pairs: Sequence[tuple[bool, bool]]) -> Change:
    return Change(group, outcome, paired([old for old, _ in pairs], [new for _, new in pairs]))


def _unevenness(evaluation: Evaluation, base: Evaluation) -> Iterable[str]:
    for what in ("length", "thinking", "dtype", "device"):
        ours, theirs = evaluation.options.get(what), base.options.get(what)
        if ours != theirs:
            yield f"{what}: {base.model.name} was asked with {theirs}, {evaluation.model.name} with {ours}"


# ---------------------------------------------------------------------------------------- the file


def _content(evaluation: Evaluation) -> dict[str, Any]:
    content: dict[str, Any] = {
        "model": dataclasses.asdict(evaluation.model),
        "options": dict(evaluation.options),
        "versions": dict(evaluation.versions),
        "questions": {"sha256": evaluation.questions, "count": len(evaluation.answers)},
        "results": _written_rows(evaluation.rows),
        "controls": _nested(
            (control.group, control.language, {"exact": _written(control.exact), "given": _written(control.given)})
            for control in evaluation.controls
        ),
        "perplexity": None if evaluation.text is None else _written_text(evaluation.text),
        "judge": None,
    }
    if (judgement := evaluation.judgement) is not None:
        found = judgement.agreement
        content["judge"] = {
            "model": evaluation.judge,
            "agreement": None if found is None else {**_written(found.raw), "kappa": found.kappa},
            "unparsable": judgement.unparsable,
            "results": _written_rows(judgement.rows),
        }
    if evaluation.comparison is not None:
        moved = evaluation.comparison.divergence
        content["comparison"] = {
            "divergence": moved
            and {
                "first": {"mean": moved.first, "count": moved.prompts},
                "tokens": {"mean": moved.tokens, "count": moved.count},
            },
            "changes": [
                {"group": change.group, "outcome": change.outcome, **dataclasses.asdict(change.test)}
                for change in evaluation.comparison.changes
            ],
            "notes": list(evaluation.comparison.notes),
        }
    if evaluation.base is not None:
        content["base"] = _content(evaluation.base)
    content["answers"] = [dataclasses.asdict(answer) for answer in evaluation.answers]
    return content


def _written(found: Ratio) -> dict[str, Any]:
    return {"ratio": found.value, "interval": list(found.interval), "hits": found.hits, "count": found.count}


def _written_rows(rows: Iterable[Row]) -> dict[str, Any]:
    return _nested(
        (row.group, row.language, {verdict: _written(found) for verdict, found in row.verdicts.items()}) for row in rows
    )


def _nested(parts: Iterable[tuple[Group, str | None, dict[str, Any]]]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group, language, found in parts:
        if language is None:
            groups[group] = found
        else:
            groups[group].setdefault("languages", {})[language] = found
    return groups


def _written_text(text: Text) -> dict[str, Any]:
    found = text.perplexity
    return {
        "value": found.value if found is not None and math.isfinite(found.value) else None,
        "nats": found and found.nats,
        "tokens": found and found.tokens,
        "name": text.name,
        "sha256": text.sha256,
    }


def _read(content: Mapping[str, Any]) -> Evaluation:
    text, judge, inner = content["perplexity"], content["judge"], content.get("base")
    base = None if inner is None else _read(inner)
    evaluation = Evaluation(
        model=Model(**content["model"]),
        options=dict(content["options"]),
        versions=dict(content["versions"]),
        questions=str(content["questions"]["sha256"]),
        answers=tuple(_read_answer(record) for record in content["answers"]),
        text=None if text is None else _read_text(text),
        judge=None if judge is None else str(judge["model"]),
        base=base,
    )
    if base is None:
        return evaluation
    moved = content["comparison"]["divergence"]
    divergence = None
    if moved is not None:
        first, tokens = moved["first"], moved["tokens"]
        divergence = Divergence(float(first["mean"]), float(tokens["mean"]), int(first["count"]), int(tokens["count"]))
    comparison = dataclasses.replace(
        compare(evaluation, base, divergence), notes=tuple(map(str, content["comparison"]["notes"]))
    )
    return dataclasses.replace(evaluation, comparison=comparison)


def _read_text(text: Mapping[str, Any]) -> Text:
    nats = text["nats"]
    found = None if nats is None else Perplexity(float(nats), int(text["tokens"]))
    return Text(str(text["name"]), str(text["sha256"]), found)


def _read_answer(record: Mapping[str, Any]) -> Answer:
    answer = Answer(**{**record, "accepted": tuple(record["accepted"])})
    for name in ("id", "language", "prompt", "text"):
        if not isinstance(getattr(answer, name), str):
            raise TypeError(f"an answer's {name} is no text")
    for name in ("system", "raw", "said"):
        if not isinstance(getattr(answer, name), str | None):
            raise TypeError(f"an answer's {name} is no text")
    if answer.group not in _GROUPS or answer.verdict not in _VERDICTS or answer.judged not in (None, *_VERDICTS):
        raise ValueError(f"{answer.id}: unknown group or verdict")
    return answer
