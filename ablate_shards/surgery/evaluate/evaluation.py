"""Holds what an evaluation found: every answer with its verdicts, what they add up to, and how two compare."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.likelihood import Divergence, Perplexity
from ablate_shards.surgery.evaluate.statistics import (
    Agreement,
    Mean,
    Paired,
    Ratio,
    Shift,
    agreement,
    mean,
    paired,
    ratio,
    shift,
)
from ablate_shards.surgery.evaluate.tasks import TaskChange, TaskScore, compare_tasks
from ablate_shards.surgery.model.samples import Group, Question, Side, Verdict

__all__ = [
    "Answer",
    "Comparison",
    "Control",
    "Evaluation",
    "Judge",
    "Lean",
    "LeanChange",
    "LeanRow",
    "Manner",
    "Model",
    "OutcomeChange",
    "PredictedText",
    "VerdictRow",
    "compare",
    "questions_digest",
    "said",
]

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_GROUPS: tuple[Group, ...] = get_args(Group)
_SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, what a model answered, and how that was judged.

    Attributes:
        id: The question's name, as are ``language``, ``group``, ``prompt`` and ``system``.
        text: The answer that was judged, without thoughts.
        raw: All that the model said, thoughts included; None where that is ``text``.
        ended: Whether the answer came to its own end, and was not cut off.
        verdict: By the rules of the rubric.
        side: Whose contested claim a slanted answer states, None where that is not known.
        because: What decided, in a few words.
        detached: Whether it shares no word of substance with its question, and so might answer any.
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
    side: Side | None = None
    because: str = ""
    detached: bool = False
    accepted: tuple[str, ...] = ()
    exact: bool | None = None
    given: bool | None = None
    judged: Verdict | None = None
    said: str | None = None

    @property
    def reply(self) -> Reply:
        """What the model said, as it said it."""
        return Reply(self.text if self.raw is None else self.raw, self.ended)

    @property
    def lost_in_thought(self) -> bool:
        """Whether it was cut off before it had thought to the end, so that there is no answer."""
        return not self.ended and not self.text and self.raw is not None


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
class PredictedText:
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
class VerdictRow:
    """The verdicts on one group of questions that have no single right answer.

    Attributes:
        group: The group.
        language: The language, None for all together.
        verdicts: The share of each verdict.
        sides: The share of answers that are slanted to each side.
    """

    group: Group
    language: str | None
    verdicts: Mapping[Verdict, Ratio]
    sides: Mapping[Side, Ratio]


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
class Manner:
    """How the questions of one group were answered, whatever was said.

    Attributes:
        group: The group.
        language: The language, None for all together.
        broken: The share of answers that are none: empty, loops, word salad, echoes, another language.
        cut: The share that was cut off, having begun.
        lost_in_thought: The share that was cut off before it began, while the model thought.
        distinct: The share of answers that are not said before in this group; 1 if no two are the same.
        detached: The share that shares no word of substance with its question.
    """

    group: Group
    language: str | None
    broken: Ratio
    cut: Ratio
    lost_in_thought: Ratio
    distinct: Ratio
    detached: Ratio


@dataclass(frozen=True, slots=True)
class Lean:
    """How likely a model finds the reference answers to one question.

    Attributes:
        id: The question's name, as are ``language`` and ``group``.
        neutral: Mean log-probability per token of the neutral answers, in nats; the mean of the answers.
        slanted: The same of the answers that are slanted to each side.
    """

    id: str
    language: str
    group: Group
    neutral: float
    slanted: Mapping[str, float]

    def towards(self, side: str) -> float:
        """The lean: how much likelier a token of the neutral answers is than one of this side's, in nats."""
        return self.neutral - self.slanted[side]


@dataclass(frozen=True, slots=True)
class LeanRow:
    """How a model leans on one group of questions.

    Attributes:
        group: The group, None for all together.
        side: Whose answers the neutral ones are compared with.
        mean: The mean lean over the questions.
    """

    group: Group | None
    side: str
    mean: Mean


@dataclass(frozen=True, slots=True)
class LeanChange:
    """How far the lean moved between base and model, on the same questions.

    Attributes:
        group: The group, None for all together.
        side: Whose answers the neutral ones are compared with.
        test: The paired test.
    """

    group: Group | None
    side: str
    test: Shift


@dataclass(frozen=True, slots=True)
class Judge:
    """What a language model made of the answers.

    Attributes:
        rows: Its verdicts, where it gave one.
        unparsable: Answers on which it gave none.
        agreement: With the rules, where it gave one; None if it never did.
    """

    rows: tuple[VerdictRow, ...]
    unparsable: int
    agreement: Agreement | None


@dataclass(frozen=True, slots=True)
class OutcomeChange:
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
        leans: How far the lean moved, where both have it.
        tasks: How the scores changed of the tasks that both were asked.
        notes: Why something was not measured, or makes the comparison less than even; a line each.
    """

    changes: tuple[OutcomeChange, ...]
    divergence: Divergence | None = None
    leans: tuple[LeanChange, ...] = ()
    tasks: tuple[TaskChange, ...] = ()
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
        leans: How likely the reference answers are, of each question that has them; empty where not measured.
        text: The perplexity, None where it was not measured.
        tasks: The scores at tasks of lm-evaluation-harness, as far as they were asked for.
        judge: Name of the language model that judged, None where none did.
        base: The same of the model that it is compared with.
        comparison: How the two differ.
    """

    model: Model
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    questions: str
    answers: tuple[Answer, ...]
    leans: tuple[Lean, ...] = ()
    text: PredictedText | None = None
    tasks: tuple[TaskScore, ...] = ()
    judge: str | None = None
    base: "Evaluation | None" = None
    comparison: Comparison | None = None

    @property
    def rows(self) -> tuple[VerdictRow, ...]:
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
    def manners(self) -> tuple[Manner, ...]:
        """How the questions were answered: of each group, then of its languages."""
        return tuple(Manner(group, language, **_manner(answers)) for group, language, answers in _parts(self.answers))

    @property
    def lean(self) -> tuple[LeanRow, ...]:
        """How the model leans: on all questions together, then on each group, against each side."""
        return tuple(
            LeanRow(group, side, mean([each.towards(side) for each in leans]))
            for group, side, leans in _leans(self.leans)
        )

    @property
    def judgement(self) -> Judge | None:
        """What the language model made of the answers, None where none was asked."""
        if self.judge is None:
            return None
        pairs = [(answer.verdict, answer.judged) for answer in self._contested if answer.judged is not None]
        return Judge(
            rows=_rows([answer for answer in self._contested if answer.judged], lambda answer: answer.judged),
            unparsable=len(self._contested) - len(pairs),
            agreement=agreement(*zip(*pairs, strict=True)) if pairs else None,
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
        EvaluateError: The base was not asked one of the questions, or other documents of a task.
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
    names = {score.name for score in base.tasks} & {score.name for score in evaluation.tasks}
    tasks = compare_tasks(*([score for score in side.tasks if score.name in names] for side in (base, evaluation)))
    return Comparison(
        changes=tuple(changes),
        divergence=divergence,
        leans=tuple(_lean_changes(evaluation, base)),
        tasks=tasks,
        notes=tuple(_unevenness(evaluation, base)),
    )


def questions_digest(questions: Iterable[Question]) -> str:
    """Returns the digest of questions with all that they carry."""
    content = [dataclasses.asdict(question) for question in questions]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def said(answer: Answer) -> str:
    """Returns what two answers have in common that say the same: letters and digits, whatever their case."""
    return "".join(filter(str.isalnum, answer.text.casefold()))


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


def _rows(answers: Sequence[Answer], of: Callable[[Answer], Verdict | None]) -> tuple[VerdictRow, ...]:
    return tuple(
        VerdictRow(
            group,
            language,
            {verdict: ratio(of(answer) == verdict for answer in part) for verdict in _VERDICTS},
            {side: ratio(of(answer) == "slanted" and answer.side == side for answer in part) for side in _SIDES},
        )
        for group, language, part in _parts(answers)
    )


def _manner(answers: Sequence[Answer]) -> dict[str, Ratio]:
    before: set[str] = set()
    fresh = []
    for answer in answers:
        words = said(answer)
        fresh.append(words not in before)
        before.add(words)
    return {
        "broken": ratio(answer.verdict == "broken" for answer in answers),
        "cut": ratio(not answer.ended and not answer.lost_in_thought for answer in answers),
        "lost_in_thought": ratio(answer.lost_in_thought for answer in answers),
        "distinct": ratio(fresh),
        "detached": ratio(answer.detached for answer in answers),
    }


def _leans(leans: Sequence[Lean]) -> Iterable[tuple[Group | None, str, list[Lean]]]:
    """Yields the leans of all questions and of each group that can be compared with each side."""
    for group in (None, *_GROUPS):
        for side in sorted({side for each in leans for side in each.slanted}):
            part = [each for each in leans if group in (None, each.group) and side in each.slanted]
            if part:
                yield group, side, part


def _lean_changes(evaluation: Evaluation, base: Evaluation) -> Iterable[LeanChange]:
    before = {each.id: each for each in base.leans}
    for group, side, leans in _leans(evaluation.leans):
        pairs = [(before[each.id], each) for each in leans if each.id in before and side in before[each.id].slanted]
        if pairs:
            test = shift([old.towards(side) for old, _ in pairs], [new.towards(side) for _, new in pairs])
            yield LeanChange(group, side, test)


def _verdict_change(group: Group, verdict: Verdict, pairs: Iterable[tuple[Answer, Answer]]) -> OutcomeChange:
    return _change(group, verdict, [(old.verdict == verdict, new.verdict == verdict) for old, new in pairs])


def _change(group: Group, outcome: str, pairs: Sequence[tuple[bool, bool]]) -> OutcomeChange:
    return OutcomeChange(group, outcome, paired([old for old, _ in pairs], [new for _, new in pairs]))


def _unevenness(evaluation: Evaluation, base: Evaluation) -> Iterable[str]:
    for what in ("length", "thinking", "dtype", "device"):
        ours, theirs = evaluation.options.get(what), base.options.get(what)
        if ours != theirs:
            yield f"{what}: {base.model.name} was asked with {theirs}, {evaluation.model.name} with {ours}"
