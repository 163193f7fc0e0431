"""Says what the evaluations of a run measured, as figures and as the rows of tables."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.effect import Limits, effect, faults
from ablate_shards.surgery.evaluate.evaluation import Evaluation, VerdictRow, compare
from ablate_shards.surgery.evaluate.statistics import Mean, Ratio, ratio
from ablate_shards.surgery.model.samples import SIDES, Group
from ablate_shards.surgery.report.findings import Findings
from ablate_shards.surgery.report.frame import GAP, chance, figure, percent

__all__ = [
    "TO",
    "Course",
    "changes",
    "controls",
    "figures",
    "is_broken",
    "lean_rows",
    "manner_rows",
    "sentence",
    "sided",
    "task_rows",
    "verdict_rows",
    "whose",
]

#: A dash that no line ends at.
TO = "\N{WORD JOINER}\N{EN DASH}\N{WORD JOINER}"
#: What is measured of the manner of answers: its name, and what the page calls it.
_MANNERS = (("broken", "Broken"), ("cut", "Cut off"), ("lost_in_thought", "Lost in thought"))
_ALWAYS = (("distinct", "Distinct"), ("detached", "Detached"))


@dataclass(frozen=True, slots=True)
class Course:
    """One measure from stage to stage.

    Attributes:
        name: What was measured.
        count: Of how many questions or documents.
        values: As a person reads it, of each stage; a dash where it was not measured.
        change: Last less first, empty where there are no two to compare.
        interval: Of the change.
        p: How often chance would make such a change.
    """

    name: str
    count: int
    values: tuple[str, ...]
    change: str = ""
    interval: str = ""
    p: str = ""


# ---------------------------------------------------------------------------------------- in short


def sentence(found: Findings) -> str:
    """Returns in a sentence what was found, or why nothing was."""
    whole = _compared(found)
    return found.missing.get("evaluation", "No evaluation was found.") if whole is None else effect(whole)


def is_broken(found: Findings) -> bool:
    """Returns whether the edit broke the model."""
    whole = _compared(found)
    return whole is not None and bool(faults(whole, Limits()))


def figures(found: Findings) -> Iterator[dict[str, str]]:
    """Yields the figures at the head of the page.

    Where an answer is broken, their share stands beside that of the slanted ones, which alone would look like success.
    """
    after, before = found.after, found.before
    if after is None:
        return
    old, new = _headline(found)
    if new is not None:
        now, was = new.verdicts["slanted"], old.verdicts["slanted"] if old else None
        sides = sided(new)
        yield _share("Bias ratio: slanted answers", "slanted", now, was, _interval_of(now, was), sides)
    broken, was_broken = _broken(after), _broken(before) if before else None
    if broken and (broken.hits or (was_broken and was_broken.hits)):
        yield _share("Broken answers", "broken", broken, was_broken, _hits_of(broken, was_broken))
    if new is not None:
        now, was = new.verdicts["neutral"], old.verdicts["neutral"] if old else None
        yield _share("Neutral answers", "neutral", now, was, _interval_of(now, was))
    if after.controls:
        exact, was = after.controls[0].exact, before.controls[0].exact if before and before.controls else None
        yield _share("Controls right", "control", exact, was, _hits_of(exact, was))
    comparison = after.comparison
    if comparison and comparison.divergence:
        moved = comparison.divergence
        yield {
            "label": "KL from the base",
            "kind": "control",
            "now": figure(moved.tokens),
            "was": "",
            "detail": f"nats per token, {moved.prompts:,} unrelated prompt{'' if moved.prompts == 1 else 's'}",
            "more": "",
        }


def sided(row: VerdictRow) -> str:
    """Returns to which sides the slanted answers of a group are slanted, empty where no side is known."""
    return ", ".join(
        f"{percent(row.sides[side].value, 0)} to {name}" for side, name in SIDES.items() if row.sides[side].hits
    )


def _share(label: str, kind: str, now: Ratio, was: Ratio | None, detail: str, more: str = "") -> dict[str, str]:
    return {
        "label": label,
        "kind": kind,
        "now": percent(now.value),
        "was": percent(was.value) if was else "",
        "detail": detail,
        "more": more,
    }


def _interval_of(now: Ratio, was: Ratio | None) -> str:
    return f"95{GAP}% interval {_ends(now)}" + (f", before {_ends(was)}" if was else "")


def _hits_of(now: Ratio, was: Ratio | None) -> str:
    return f"{now.hits} of {now.count}" + (f", before {was.hits} of {was.count}" if was else "")


def _ends(found: Ratio) -> str:
    low, high = (f"{100 * end:.0f}" for end in found.interval)
    return f"{low}{TO}{high}{GAP}%"


def _broken(evaluation: Evaluation) -> Ratio | None:
    """Returns the share of broken answers to all questions."""
    return ratio(answer.verdict == "broken" for answer in evaluation.answers) if evaluation.answers else None


def _headline(found: Findings) -> tuple[VerdictRow | None, VerdictRow | None]:
    """Returns the verdicts that the bias ratio is of, before and after: of the core questions, or the first group."""
    new, old = (
        {row.group: row for row in evaluation.rows if row.language is None} if evaluation else {}
        for evaluation in (found.after, found.before)
    )
    group: Group = "core" if "core" in new else next(iter(new), "core")
    return old.get(group), new.get(group)


def _compared(found: Findings) -> Evaluation | None:
    """Returns the last evaluation with what it is compared with, whether or not it was made beside it."""
    after, before = found.after, found.before
    if after is None or after.base is not None or before is None:
        return after
    with suppress(EvaluateError):
        return dataclasses.replace(after, base=before, comparison=compare(after, before))
    return after


# ---------------------------------------------------------------------------------------- tables


def verdict_rows(found: Findings) -> list[dict[str, Any]]:
    """Returns a row per group, language and evaluation."""
    rows = []
    by_stage = [{(row.group, row.language): row for row in evaluation.rows} for evaluation in found.evaluations]
    for group, language in by_stage[-1] if by_stage else ():
        for stage, every in zip(found.stages, by_stage, strict=True):
            if (row := every.get((group, language))) is not None:
                rows.append(
                    {
                        "group": group,
                        "language": language,
                        "stage": stage,
                        "count": row.verdicts["slanted"].count,
                        "verdicts": row.verdicts,
                    }
                )
    return rows


def whose(found: Findings) -> list[tuple[str, str]]:
    """Returns each group whose slanted answers state the claims of a known side, with the shares of each stage."""
    groups: list[tuple[str, str]] = []
    by_stage = [{row.group: row for row in each.rows if row.language is None} for each in found.evaluations]
    for group in by_stage[-1] if by_stage else ():
        rows = [(stage, every[group]) for stage, every in zip(found.stages, by_stage, strict=True) if group in every]
        if any(sided(row) for _, row in rows):
            shares = (
                f"{stage} {percent(row.verdicts['slanted'].value, 0)}{f': {sided(row)}' if sided(row) else ''}"
                for stage, row in rows
            )
            groups.append((group, "; ".join(shares)))
    return groups


def manner_rows(found: Findings) -> dict[str, Any]:
    """Returns how the questions were answered, a row per group and evaluation, empty where all is as it should be."""
    by_stage = [{each.group: each for each in stage.manners if each.language is None} for stage in found.evaluations]
    groups = [group for group in get_args(Group) if by_stage and group in by_stage[-1]]
    every = [
        (group, stage, each[group])
        for group in groups
        for stage, each in zip(found.stages, by_stage, strict=True)
        if group in each
    ]
    shown = [(name, title) for name, title in _MANNERS if any(getattr(manner, name).hits for *_, manner in every)]
    if not shown and all(manner.distinct.value == 1 and not manner.detached.hits for *_, manner in every):
        return {"columns": [], "rows": []}
    shown = [entry for entry in _MANNERS if entry in shown or entry[0] != "lost_in_thought"] + list(_ALWAYS)
    return {
        "columns": [title for _, title in shown],
        "rows": [
            {"group": group, "stage": stage, "cells": [getattr(manner, name) for name, _ in shown]}
            for group, stage, manner in every
        ],
    }


def controls(found: Findings) -> Iterator[dict[str, Any]]:
    """Yields the share of right answers, of each evaluation, group and language."""
    for stage, evaluation in zip(found.stages, found.evaluations, strict=True):
        for control in evaluation.controls:
            yield {
                "stage": stage,
                "group": control.group,
                "language": control.language,
                "exact": control.exact,
                "given": control.given,
            }


def changes(found: Findings) -> list[Any]:
    """Returns the paired tests of what changed at all."""
    whole = _compared(found)
    every = whole.comparison.changes if whole and whole.comparison else ()
    return [change for change in every if change.test.lost or change.test.gained]


def lean_rows(found: Findings) -> list[Course]:
    """Returns how the models lean, on all questions and, where there are several groups, on each."""
    stages = [{(row.group, row.side): row.mean for row in each.lean} for each in found.evaluations]
    whole = _compared(found)
    tests = {
        (each.group, each.side): each.test for each in (whole.comparison.leans if whole and whole.comparison else ())
    }
    rows = []
    for group, side in stages[-1] if stages else ():
        groups = {each for each, other in stages[-1] if other == side and each is not None}
        if group is not None and len(groups) < 2:
            continue
        test = tests.get((group, side))
        rows.append(
            Course(
                name=f"{SIDES.get(side, side)}{f', {group}' if group else ''}",
                count=stages[-1][group, side].count,
                values=tuple(_signed(each[group, side].value) if (group, side) in each else "–" for each in stages),
                **_moved(test.change, test.p) if test else {},
            )
        )
    return rows


def task_rows(found: Findings) -> list[Course]:
    """Returns the scores at tasks."""
    stages = [{(score.name, score.metric): score for score in each.tasks} for each in found.evaluations]
    whole = _compared(found)
    tests = {(each.name, each.metric): each for each in (whole.comparison.tasks if whole and whole.comparison else ())}
    rows = []
    for (name, metric), score in (stages[-1] if stages else {}).items():
        test = tests.get((name, metric))
        rows.append(
            Course(
                name=f"{name}, {metric}{'' if score.higher_is_better else ' (lower is better)'}",
                count=score.count,
                values=tuple(f"{each[name, metric].value:.3f}" if (name, metric) in each else "–" for each in stages),
                **_moved(Mean(test.difference, test.count, test.interval), test.p, 3) if test else {},
            )
        )
    return rows


def _moved(change: Mean, p: float, digits: int = 2) -> Mapping[str, str]:
    low, high = (_signed(end, digits) for end in change.interval)
    return {"change": _signed(change.value, digits), "interval": f"{low} to {high}", "p": chance(p)}


def _signed(value: float, digits: int = 2) -> str:
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown if shown.strip("+−0.") else shown[1:]
