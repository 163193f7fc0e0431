"""What a trial is judged by: named measures of a model in memory, each of one interface."""

import contextlib
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, get_args

from ablate_shards.errors import AblateError, SearchError, UsageError
from ablate_shards.surgery.evaluate.answers import Speaker, batches
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.evaluation import Answer, Lean
from ablate_shards.surgery.evaluate.judge.reading import fold
from ablate_shards.surgery.evaluate.likelihood import Forced, divergence, record, token_log_likelihoods
from ablate_shards.surgery.evaluate.measures import forced_answer, forced_answers, judged, measure_leans
from ablate_shards.surgery.model.samples import CONTESTED, Question, Verdict

__all__ = [
    "OBJECTIVES",
    "Asking",
    "Goal",
    "Measures",
    "Objective",
    "answer",
    "find_objective",
    "lean_of",
    "loss",
    "make_measures",
    "shares",
]

Direction = Literal["minimize", "maximize"]

#: How many of the first tokens of a former answer are looked at: those that what follows depends on.
_OPENING = 8
_SIGNS: Mapping[Verdict, int] = {"slanted": -1, "neutral": 1}


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked.

    Attributes:
        tokens: Most tokens of an answer that is judged.
        forced: Most tokens of the model's own answers that its distributions are compared over.
        references: Most reference answers of each side of a question whose likelihood is measured, all if None.
        beginning: Most tokens of each of them, the first ones; all if None.
        questions: Most questions that a lean or a subject looks at, all if None.
        unrelated: Most questions that a divergence looks at, all if None. A few of them move most, so that
            what ten move by says little of others.
        batch: How many questions at a time.
    """

    tokens: int = 64
    forced: int = 24
    references: int | None = 1
    beginning: int | None = 16
    questions: int | None = 10
    unrelated: int | None = 100
    batch: int = 16

    def thorough(self) -> "Asking":
        """Returns the same, with nothing left out."""
        return dataclasses.replace(self, references=None, beginning=None, questions=None, unrelated=None)


@dataclass(frozen=True, slots=True)
class Goal:
    """What trials are judged by, without what measures it.

    Attributes:
        name: What it is called on the screen and in files.
        direction: Whether less of it is better, or more.
        base: The measure of the unedited model.
    """

    name: str
    direction: Direction
    base: float


class Objective(Protocol):
    """One measure of a model, to be made small or large; see ``Goal``."""

    name: str
    direction: Direction
    base: float

    def measure(self, speaker: Speaker) -> float:
        """Measures a model; infinite or not a number where it gives none."""


def loss(objective: Goal, value: float) -> float:
    """Returns a measure so that less of it is better."""
    return value if objective.direction == "minimize" else -value


#: Makes an objective while the model is not edited, from the model, the questions of the search and how to ask them.
Maker = Callable[[Speaker, Sequence[Question], Asking], Objective]


class LeanObjective:
    """How much likelier a token of the neutral reference answers is than one of the likeliest slanted side, in nats.

    Args:
        speaker: The unedited model.
        questions: The questions; those without reference answers are not looked at.
        asking: How to ask.

    Raises:
        UsageError: None has reference answers.
    """

    name = "lean"
    direction: Direction = "maximize"

    def __init__(self, speaker: Speaker, questions: Sequence[Question], asking: Asking) -> None:
        referenced = [question for question in questions if question.references]
        self._questions = [_shortened(question, asking.references) for question in referenced[: asking.questions]]
        if not self._questions:
            raise UsageError(
                "--objective lean: no question of this part has reference answers; add some, or name objectives that "
                "need none, such as --objective slanted,former,kl"
            )
        self._prompts = [speaker.prompt(question, thinking=False) for question in self._questions]
        self._asking = asking
        self.base = self.measure(speaker)

    def measure(self, speaker: Speaker) -> float:
        """Returns the mean over the questions."""
        asking = self._asking
        return lean_of(
            measure_leans(speaker, self._questions, self._prompts, batch=asking.batch, tokens=asking.beginning)
        )


class DivergenceObjective:
    """KL(unedited ‖ edited) of the next token over the unedited model's own answers to unrelated questions, in nats.

    Args:
        speaker: The unedited model.
        questions: The questions; those that are not unrelated are not looked at.
        asking: How to ask.

    Raises:
        UsageError: None is unrelated.
    """

    name = "kl"
    direction: Direction = "minimize"
    base = 0.0

    def __init__(self, speaker: Speaker, questions: Sequence[Question], asking: Asking) -> None:
        unrelated = [question for question in questions if question.group == "unrelated"][: asking.unrelated]
        if not unrelated:
            raise UsageError("--objective kl: no question of this part is unrelated; add some, or leave it out")
        self._batch = asking.batch
        replies = answer(speaker, unrelated, tokens=asking.forced, batch=asking.batch)
        self._forced = forced_answers(speaker, unrelated, replies, thinking=False)
        # No edit of a search reaches the output head, so that it need not be kept twice.
        self._recording = record(speaker, self._forced, batch=asking.batch, copy_head=False)

    def measure(self, speaker: Speaker) -> float:
        """Returns the mean over the tokens."""
        found = divergence(speaker, self._forced, self._recording, batch=self._batch)
        return math.inf if found is None else found.tokens


class SubjectObjective:
    """How much less likely words are that the unedited model's answers repeat from their questions, in nats a token.

    An edit that makes a model forget whom it was asked about answers of another: "Yes, Spain is a country". The answers
    are given, to contested questions; the first token of each is not looked at, as another answer may begin otherwise.

    Args:
        speaker: The unedited model.
        questions: The questions; controls are not looked at.
        asking: How to ask.

    Attributes:
        words: How many repeated words it looks at; without any there is nothing to measure.
    """

    name = "subject"
    direction: Direction = "minimize"
    base = 0.0

    def __init__(self, speaker: Speaker, questions: Sequence[Question], asking: Asking) -> None:
        contested = [question for question in questions if question.group in CONTESTED]
        self._batch = asking.batch
        self._forced: list[Forced] = []
        self._repeated: list[list[int]] = []
        replies = answer(speaker, contested, tokens=asking.forced, batch=asking.batch)
        for question, reply in zip(contested, replies, strict=True):
            asked = {_word(speaker, token) for text in ("", " ") for token in speaker.encode(text + question.prompt)}
            forced = forced_answer(speaker, question, reply, thinking=False)
            words = [_word(speaker, token) for token in forced.response]
            places = [place for place, word in enumerate(words) if place and word and word in asked]
            if places:
                self._forced.append(forced)
                self._repeated.append(places)
        self._forced, self._repeated = self._forced[: asking.questions], self._repeated[: asking.questions]
        self.words = sum(map(len, self._repeated))
        self._before = self._likelihood(speaker)

    def measure(self, speaker: Speaker) -> float:
        """Returns the mean over these tokens, not a number without any."""
        return self._before - self._likelihood(speaker)

    def _likelihood(self, speaker: Speaker) -> float:
        if not self.words:
            return math.nan
        scores = token_log_likelihoods(speaker, self._forced, batch=self._batch)
        values = [float(each[place]) for each, places in zip(scores, self._repeated, strict=True) for place in places]
        return math.fsum(values) / len(values)


class FormerObjective:
    """How likely the unedited model's neutral answers begin as they did, less how likely its slanted ones do.

    A share of greedy answers does not tell an edit that turns them by a hair from one that does by far. This does, and
    needs no reference answers: it is the mean over questions of the probability of the first tokens of what the
    unedited model said, taken negative where that was slanted.

    Args:
        speaker: The unedited model.
        questions: The questions; controls, and those that are answered neither slanted nor neutral, are not looked at.
        asking: How to ask.

    Raises:
        UsageError: No answer is slanted.
    """

    name = "former"
    direction: Direction = "maximize"

    def __init__(self, speaker: Speaker, questions: Sequence[Question], asking: Asking) -> None:
        contested = [question for question in questions if question.group in CONTESTED]
        replies = answer(speaker, contested, tokens=asking.tokens, batch=asking.batch)
        self._batch = asking.batch
        self._forced: list[Forced] = []
        self._signs: list[int] = []
        for question, reply in zip(contested, replies, strict=True):
            if (sign := _SIGNS.get(judged(question, reply).verdict)) is not None:
                forced = forced_answer(speaker, question, reply, thinking=False)
                self._forced.append(dataclasses.replace(forced, response=forced.response[:_OPENING]))
                self._signs.append(sign)
        if -1 not in self._signs:
            raise UsageError("--objective former: no answer to a question of this part is slanted; leave it out")
        self.base = self.measure(speaker)

    def measure(self, speaker: Speaker) -> float:
        """Returns the mean over the questions, between -1 and 1."""
        scores = token_log_likelihoods(speaker, self._forced, batch=self._batch)
        likely = [math.exp(float(each.sum())) for each in scores]
        return math.fsum(map(math.prod, zip(self._signs, likely, strict=True))) / len(likely)


def subject_of(speaker: Speaker, questions: Sequence[Question], asking: Asking) -> SubjectObjective:
    """Makes the objective ``subject`` of an unedited model.

    Raises:
        UsageError: No answer repeats a word of its question.
    """
    made = SubjectObjective(speaker, questions, asking)
    if not made.words:
        raise UsageError(
            "--objective subject: no answer to a contested question of this part repeats a word of its question; "
            "leave it out"
        )
    return made


class VerdictObjective:
    """The share of greedy answers to the contested questions that the rules give one verdict.

    Args:
        verdict: The verdict.
        speaker: The unedited model.
        questions: The questions; controls are not looked at.
        asking: How to ask.

    Raises:
        UsageError: All are controls.
    """

    def __init__(self, verdict: Verdict, speaker: Speaker, questions: Sequence[Question], asking: Asking) -> None:
        self._questions = [question for question in questions if question.group in CONTESTED]
        if not self._questions:
            raise UsageError(f"--objective {verdict}: no question of this part is contested; add some, or leave it out")
        self.name: str = verdict
        self._verdict, self._asking = verdict, asking
        self.direction: Direction = "maximize" if verdict == "neutral" else "minimize"
        self.base = self.measure(speaker)

    def measure(self, speaker: Speaker) -> float:
        """Returns the share."""
        asking = self._asking
        replies = answer(speaker, self._questions, tokens=asking.tokens, batch=asking.batch)
        verdicts = [judged(*pair).verdict for pair in zip(self._questions, replies, strict=True)]
        return verdicts.count(self._verdict) / len(verdicts)


class _OwnObjective:
    """An objective of the user's own, whose errors are said to be its own.

    Args:
        given: What ``--objective`` calls it.
        make: What makes it.
        speaker: The unedited model.
        questions: The questions.
        asking: How to ask.

    Raises:
        SearchError: It raises something, or is not what an objective is.
    """

    def __init__(
        self, given: str, make: Maker, speaker: Speaker, questions: Sequence[Question], asking: Asking
    ) -> None:
        self._given = given
        with self._said():
            self._objective = make(speaker, questions, asking)
            self.name, self.direction = self._objective.name, self._objective.direction
            self.base = float(self._objective.base)
        if self.direction not in get_args(Direction):
            raise SearchError(
                f"--objective {given}: expected the direction minimize or maximize, found {self.direction}"
            )

    def measure(self, speaker: Speaker) -> float:
        """Returns what it measures."""
        with self._said():
            return float(self._objective.measure(speaker))

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except AblateError:
            raise
        except Exception as error:
            raise SearchError(
                f"--objective {self._given}: {type(error).__name__}: {error}; correct it (--debug adds where it is) "
                "and go on with the same command"
            ) from error


_VERDICTS: tuple[Verdict, ...] = ("slanted", "neutral", "deflecting", "wrong", "broken")
OBJECTIVES: Mapping[str, Maker] = {
    "lean": LeanObjective,
    "kl": DivergenceObjective,
    "subject": subject_of,
    "former": FormerObjective,
    **{verdict: partial(VerdictObjective, verdict) for verdict in _VERDICTS},
}


@dataclass(frozen=True, slots=True)
class Measures:
    """What is measured of an edit.

    Attributes:
        objectives: What edits are judged by, the effect first.
        guards: What is measured besides because it has a limit, and is no objective.
    """

    objectives: tuple[Objective, ...]
    guards: tuple[Objective, ...] = ()

    @property
    def every(self) -> tuple[Objective, ...]:
        """All of them."""
        return (*self.objectives, *self.guards)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The objectives, as data."""
        return tuple(Goal(each.name, each.direction, each.base) for each in self.objectives)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all of them."""
        return tuple(each.name for each in self.every)


def make_measures(names: Sequence[str], speaker: Speaker, questions: Sequence[Question], asking: Asking) -> Measures:
    """Makes the measures of an unedited model: what is named, and the subject, where there is one to measure.

    Raises:
        UsageError: There is no objective of a name, or no question that it looks at.
    """
    objectives = tuple(find_objective(name)(speaker, questions, asking) for name in names)
    if any(each.name == SubjectObjective.name for each in objectives):
        return Measures(objectives)
    subject = SubjectObjective(speaker, questions, asking)
    return Measures(objectives, (subject,) if subject.words else ())


def find_objective(name: str) -> Maker:
    """Returns what makes an objective, by its name.

    Args:
        name: One of ``OBJECTIVES``, or ``module:name`` of one's own, found as Python finds modules from the folder
            that one is in; it is called with a speaker, questions and an ``Asking`` as those are.

    Raises:
        UsageError: There is none of that name.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(
            f"--objective {name}: expected one of {', '.join(OBJECTIVES)}, or module:name of your own in Python"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Maker = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UsageError(f"--objective {name}: cannot be imported ({error})") from error
    finally:
        sys.path.pop(0)
    return partial(_OwnObjective, name, found)


def _word(speaker: Speaker, token: int) -> str:
    """Returns a token's text if it is a word or the like, in simplified characters and lower case, else nothing."""
    text = fold(speaker.tokenizer.decode([token])).strip().casefold()
    return text if len(text) > 1 and text.isalnum() else ""


def _shortened(question: Question, references: int | None) -> Question:
    """Returns a question with no more reference answers of each side."""
    return dataclasses.replace(
        question, references={side: texts[:references] for side, texts in question.references.items()}
    )


def answer(speaker: Speaker, questions: Sequence[Question], *, tokens: int, batch: int) -> list[Reply]:
    """Returns a model's greedy answers."""
    prompts = [speaker.prompt(question, thinking=False) for question in questions]
    replies: list[Reply | None] = [None] * len(questions)
    for rows in batches(prompts, batch):
        for row, reply in zip(rows, speaker.replies([prompts[row] for row in rows], tokens=tokens), strict=True):
            replies[row] = reply
    return [reply for reply in replies if reply is not None]


def lean_of(leans: Sequence[Lean]) -> float:
    """Returns the mean over questions of the lean towards the side whose answers are likeliest; NaN without any."""
    values = [min(lean.towards(side) for side in lean.slanted) for lean in leans]
    return math.fsum(values) / len(values) if values else math.nan


def shares(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    """Returns how many answers of how many are slanted, broken, and (of controls) right."""
    contested = [one for one in answers if one.exact is None]
    controls = [one for one in answers if one.exact is not None]
    return {
        "slanted": (sum(one.verdict == "slanted" for one in contested), len(contested)),
        "neutral": (sum(one.verdict == "neutral" for one in contested), len(contested)),
        "broken": (sum(one.verdict == "broken" for one in contested), len(contested)),
        "right": (sum(one.given is True for one in controls), len(controls)),
    }
