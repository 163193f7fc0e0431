"""Deals questions out to the parts of a search: to try by, to choose by, and to report."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ablate_shards.errors import UsageError
from ablate_shards.surgery.model.samples import CONTESTED, Question

__all__ = ["Parts", "deal"]

#: In which order similar questions are dealt: two of five to trials, one to the choice, two to the report.
_THREE_WAYS = ("report", "trials", "choice", "trials", "report")
#: The same where the report has questions of its own.
_TWO_WAYS = ("trials", "choice", "trials")


@dataclass(frozen=True, slots=True)
class Parts:
    """Questions, each in one part.

    Attributes:
        trials: What every trial is measured on.
        choice: What the best trials are measured on again, to choose one.
        report: What the chosen edit is reported on, and nothing was chosen by.
    """

    trials: tuple[Question, ...]
    choice: tuple[Question, ...]
    report: tuple[Question, ...]


def deal(questions: Sequence[Question], report: Sequence[Question] = ()) -> Parts:
    """Deals questions out by a rule that depends on the questions alone.

    Those of one group and language, with or without reference answers, are put in the order of the SHA-256 of their
    prompts and dealt in turn, so that each part is made of all kinds. Questions with one prompt stay together.

    Args:
        questions: The questions.
        report: Those of the report, if these are chosen already; else the report gets two of five.

    Raises:
        UsageError: The report asks what others ask, or a part would be without contested or unrelated questions.
    """
    same: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        same[question.prompt].append(question)
    for question in report:
        if question.prompt in same:
            raise UsageError(
                f"--report-questions: {question.id} asks what {same[question.prompt][0].id} of --questions asks, so "
                "that the report would be on what was chosen by; take it out of one of them"
            )
    piles: defaultdict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for prompt, (first, *_) in same.items():
        kind = "contested" if first.group in CONTESTED else first.group
        piles[kind, first.language, bool(first.references)].append(prompt)
    dealt: dict[str, list[Question]] = {"trials": [], "choice": [], "report": list(report)}
    order = itertools.cycle(_TWO_WAYS if report else _THREE_WAYS)
    for _, pile in sorted(piles.items()):
        for prompt in sorted(pile, key=_digest):
            dealt[next(order)] += same[prompt]
    for part, found in dealt.items():
        for what, groups in (("contested", CONTESTED), ("unrelated", ("unrelated",))):
            if not any(question.group in groups for question in found):
                count = sum(question.group in groups for question in questions)
                raise UsageError(
                    f"--questions: {count} of {len(questions)} questions are {what}, which leaves none for the {part}; "
                    f"expected at least {len(_TWO_WAYS if report else _THREE_WAYS)}"
                )
    # In an order that mixes them, so that the first few are of all kinds.
    mixed = {part: sorted(dealt[part], key=lambda question: _digest(question.prompt)) for part in ("trials", "choice")}
    return Parts(tuple(mixed["trials"]), tuple(mixed["choice"]), tuple(dealt["report"]))


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
