"""Reads the record of a search."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ablate_shards.errors import ReportError
from ablate_shards.surgery.evaluate.evaluation import Evaluation
from ablate_shards.surgery.model.samples import Verdict
from ablate_shards.surgery.search.files import FORMAT
from ablate_shards.validation import Finite, checked

__all__ = ["Candidate", "Given", "Record", "Reported", "Search", "Trial", "read_record"]

Reported = Literal["chosen", "plain"]
_Count = Annotated[int, Meta(ge=0, description="a count")]


@dataclass(frozen=True, slots=True)
class Given:
    """An answer to a question of the choice.

    Attributes:
        id: The question's name, as are ``prompt`` and ``language``.
        text: The answer.
        verdict: By the rules of the rubric.
        given: Whether the answer to a control holds a right one; None for other questions.
    """

    id: str
    prompt: str
    text: str
    verdict: Verdict
    language: str = "und"
    given: bool | None = None


@dataclass(frozen=True, slots=True)
class Shares:
    """How many answers of how many are what the name says."""

    slanted: tuple[_Count, _Count]
    neutral: tuple[_Count, _Count]
    broken: tuple[_Count, _Count]
    right: tuple[_Count, _Count]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was measured on the questions of the choice.

    Attributes:
        trial: The trial's number, None for the unedited model.
        values: Each measure: those of the objectives, and ``subject`` where it was measured.
        shares: What the answers add up to.
        answers: The answers.
    """

    trial: int | None
    values: Mapping[str, float]
    shares: Shares
    answers: tuple[Given, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured of a setting.

    Attributes:
        number: Which trial.
        setting: Each parameter's value.
        values: Each objective's measure, as far as there is one.
        complete: Whether every objective was measured and is a number.
        coefficients: The coefficient of each layer, by part.
    """

    number: int
    setting: Mapping[str, Any]
    values: Mapping[str, float]
    complete: bool
    coefficients: Mapping[str, tuple[Finite, ...]]


@dataclass(frozen=True, slots=True)
class Objective:
    """What trials were judged by: its name, which way is better, and the unedited model's measure."""

    name: str
    direction: Literal["minimize", "maximize"]
    base: float


@dataclass(frozen=True, slots=True)
class Questions:
    """The names of the questions that trials, choice and report were measured on."""

    trials: tuple[str, ...]
    choice: tuple[str, ...]
    report: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the chosen edit was allowed to cost; see ``search.choice.Budget``. Earlier searches had no ``subject``."""

    kl: Finite
    controls: Finite
    broken: Finite
    subject: Finite | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How was searched; ``limit`` is the divergence above which a trial was not measured further.

    Earlier searches did not say by which rule they chose; see ``search.choice.Rule``.
    """

    seed: int
    limit: Finite
    budget: Budget
    choose: Literal["effect", "cost"] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """All that a search left of its trials and its choice, as ``search.files.record_of`` writes it.

    Attributes:
        tool: What searched.
        model: The name of the model's folder.
        questions: What was asked.
        options: How was searched.
        space: The values of each parameter, or the two numbers between which it was searched.
        objectives: What trials were judged by, the effect first.
        layers: The layers that coefficients are of.
        trials: Every finished trial.
        front: The numbers of those that no other beats.
        importance: How much of each objective's variation each parameter explains.
        base: The unedited model on the questions of the choice.
        candidates: The trials that the choice looked at.
        chosen: The number of the one that was chosen.
        beats_plain: Whether it is better than the plain edit in slant or divergence, and worse in neither; None where
            it is the plain edit.
        recipe: The name of the recipe that makes the chosen edit.
        reports: The names of the evaluations on the questions of the report, by what was evaluated.
        plain: The number of the plain edit. A search tries it first.
    """

    tool: str
    model: str
    questions: Questions
    options: Options
    space: Mapping[str, tuple[Any, ...]]
    objectives: tuple[Objective, ...]
    layers: tuple[int, ...]
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    importance: Mapping[str, Mapping[str, Finite]]
    base: Candidate
    candidates: tuple[Candidate, ...]
    chosen: int
    beats_plain: bool | None
    recipe: str
    reports: Mapping[Reported, str]
    plain: int | None = 0

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of what was measured of the candidates, the objectives first."""
        return tuple(dict.fromkeys([*(objective.name for objective in self.objectives), *self.base.values]))

    def trial(self, number: int | None) -> Trial | None:
        """Returns a trial by its number."""
        return next((trial for trial in self.trials if trial.number == number), None)


@dataclass(frozen=True, slots=True)
class Search:
    """A search that was found.

    Attributes:
        name: The name of its record's file.
        sha256: Digest of that file.
        record: What it says.
        reports: The evaluations on the questions of the report, as far as they were found.
    """

    name: str
    sha256: str
    record: Record
    reports: Mapping[Reported, Evaluation] = field(default_factory=dict)


def read_record(path: Path) -> Search:
    """Reads the record of a search, without the evaluations that it names.

    Raises:
        ReportError: The file cannot be read, is no record of a search, or is of a newer version.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: expected {FORMAT}, found a file that is not JSON") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ReportError(f"{path}: expected {FORMAT}, found {found!r}; use the version that wrote it")
    try:
        record = checked(content, Record)
        if misfit := next(_misfits(record), None):
            raise ValueError(misfit)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path}: not a complete record of a search ({error}); it was changed after it was written"
        ) from error
    return Search(path.name, hashlib.sha256(raw).hexdigest(), record)


def _misfits(record: Record) -> Iterator[str]:
    """Yields a sentence on each part that does not fit the others."""
    names, of_candidates = tuple(objective.name for objective in record.objectives), record.measured
    trials = {trial.number: trial for trial in record.trials}
    yield from (
        f"{what}: expected at least one, found none" for what in ("objectives", "front") if not getattr(record, what)
    )
    for number in (*record.front, *(candidate.trial for candidate in record.candidates)):
        if number not in trials:
            yield f"trials: expected trial {number}, found none of that number"
    if record.chosen not in [candidate.trial for candidate in record.candidates]:
        yield f"candidates: expected trial {record.chosen}, which was chosen, found none of that number"
    whole = [(f"trial {number}", trial.values, names) for number, trial in trials.items() if trial.complete]
    whole += [(f"front: trial {number}", trials[number].values, names) for number in record.front if number in trials]
    whole += [("base", record.base.values, names)]
    whole += [(f"candidate {candidate.trial}", candidate.values, of_candidates) for candidate in record.candidates]
    for place, values, expected in whole:
        if missing := [name for name in expected if name not in values]:
            yield f"{place}: expected {' and '.join(missing)}, found only {', '.join(values) or 'nothing'}"
    for number, trial in trials.items():
        for part, row in trial.coefficients.items():
            if len(row) != len(record.layers):
                yield f"trial {number}: {part}: expected {len(record.layers)} coefficients, found {len(row)}"
