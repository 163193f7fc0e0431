"""Renders what was found of a run as one HTML page that needs nothing else."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from typing import Any, get_args

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.effect import effect
from ablate_shards.surgery.evaluate.evaluation import Answer, Evaluation, Row, compare
from ablate_shards.surgery.evaluate.statistics import Ratio
from ablate_shards.surgery.model.samples import Group, Verdict
from ablate_shards.surgery.report.findings import Findings
from ablate_shards.surgery.report.frame import GAP, figure, fill, percent
from ablate_shards.surgery.report.provenance import facts, ranges, rebuilt_recipe

__all__ = ["render"]

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_HEADLINES: tuple[tuple[Verdict, str], ...] = (
    ("slanted", "Bias ratio: slanted answers"),
    ("neutral", "Neutral answers"),
)

#: Bytes of all answers together and of the markup around one, and characters of one, so that the page stays small.
_MOST_TEXT = 1_500_000
_FRAME = 700
_MOST_OF_ONE = 4_000
_MOST_ROWS = 1_500
#: A dash that no line ends at.
_TO = "\N{WORD JOINER}\N{EN DASH}\N{WORD JOINER}"


def render(found: Findings, data: Mapping[str, Any]) -> str:
    """Returns the page; the same findings give the same text.

    Args:
        found: What was found of a run.
        data: What its charts show.

    Raises:
        ReportError: jinja2 is not installed.
    """
    return fill(
        "report.html.jinja",
        data,
        eyebrow="ablate-shards report",
        title=found.name,
        found=found,
        sentences=list(_sentences(found)),
        figures=list(_figures(found)),
        verdicts=_VERDICTS,
        tables=_verdict_tables(found),
        controls=list(_controls(found)),
        stages=list(zip(found.stages, found.evaluations, strict=True)),
        changes=_changes(found),
        answers=_answers(found),
        scores=_scores(found),
        marked=data.get("best"),
        edited=_edited(found),
        skipped=_skipped(found),
        facts=facts(found),
        recipe=rebuilt_recipe(found),
    )


def _headline(found: Findings) -> tuple[Row | None, Row | None]:
    """Returns the verdicts that the bias ratio is of, before and after: of the core questions, or the first group."""
    new, old = (
        {row.group: row for row in evaluation.rows if row.language is None} if evaluation else {}
        for evaluation in (found.after, found.before)
    )
    group: Group = "core" if "core" in new else next(iter(new), "core")
    return old.get(group), new.get(group)


# ---------------------------------------------------------------------------------------- words and figures


def _sentences(found: Findings) -> Iterator[str]:
    if found.after is None:
        yield found.missing.get("evaluation", "No evaluation was found.")
    else:
        yield effect(_against(found.after, found.before))
    yield f"{_edit_sentence(found)}."


def _against(after: Evaluation, before: Evaluation | None) -> Evaluation:
    """Returns an evaluation with what it is compared with, whether or not it was made beside it."""
    if after.base is not None or before is None:
        return after
    return dataclasses.replace(after, base=before, comparison=compare(after, before))


def _edit_sentence(found: Findings) -> str:
    parts = []
    if found.ablation:
        edits = found.ablation.receipt.edits
        layers = sorted({edit.layer for edit in edits if edit.layer is not None})
        coefficients = sorted({edit.coefficient for edit in edits})
        measured = sorted({edit.basis.source_layer for edit in edits})
        where = (
            f"layer {measured[0]}" if len(measured) == 1 else "each layer" if len(measured) > 3 else "several layers"
        )
        rank = next(iter(found.ablation.receipt.directions.basis.values())).shape[0] if measured else 1
        parts.append(
            f"{'One direction' if rank == 1 else f'{rank} directions'}, measured at {where}, "
            f"{'was' if rank == 1 else 'were'} taken out of {_count(len(edits), 'tensor')}"
            f"{f' in layers {_dashed(layers)}' if layers else ''}"
            f"{f' at coefficient {coefficients[0]:g}' if len(coefficients) == 1 else ''}"
        )
    if found.merge:
        count = _count(len(found.merge.receipt.results), "tensor")
        parts.append(f"a LoRA adapter then changed {count}" if parts else f"A LoRA adapter changed {count}")
    return " and ".join(parts) or "What was edited cannot be read from the receipt"


def _figures(found: Findings) -> Iterator[dict[str, str]]:
    after, before = found.after, found.before
    if after is None:
        return
    old, new = _headline(found)
    if new is not None:
        for verdict, label in _HEADLINES:
            ratio = new.verdicts[verdict]
            was = old.verdicts[verdict] if old else None
            yield {
                "label": label,
                "kind": verdict,
                "now": percent(ratio.value),
                "was": percent(was.value) if was else "",
                "detail": f"95{GAP}% interval {_interval(ratio)}" + (f", before {_interval(was)}" if was else ""),
            }
    if after.controls:
        control, was = after.controls[0], before.controls[0].exact if before and before.controls else None
        yield {
            "label": "Controls right",
            "kind": "control",
            "now": percent(control.exact.value),
            "was": percent(was.value) if was else "",
            "detail": f"{control.exact.hits} of {control.exact.count}"
            + (f", before {was.hits} of {was.count}" if was else ""),
        }
    comparison = after.comparison
    if comparison and comparison.divergence:
        moved = comparison.divergence
        yield {
            "label": "KL from the base",
            "kind": "control",
            "now": figure(moved.tokens),
            "was": "",
            "detail": f"nats per token, {_count(moved.prompts, 'unrelated prompt')}",
        }


def _verdict_tables(found: Findings) -> list[dict[str, Any]]:
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


def _controls(found: Findings) -> Iterator[dict[str, Any]]:
    for stage, evaluation in zip(found.stages, found.evaluations, strict=True):
        for control in evaluation.controls:
            yield {
                "stage": stage,
                "group": control.group,
                "language": control.language,
                "exact": control.exact,
                "given": control.given,
            }


def _changes(found: Findings) -> list[Any]:
    """Returns the paired tests of what changed at all."""
    comparison = found.after.comparison if found.after else None
    if comparison is None and found.after and found.before:
        with suppress(EvaluateError):
            comparison = compare(found.after, found.before)
    changes = comparison.changes if comparison else ()
    return [change for change in changes if change.test.lost or change.test.gained]


def _answers(found: Findings) -> dict[str, Any]:
    """Returns the questions with the first and the last answer, and how many there are in all."""
    if found.after is None:
        return {"shown": [], "all": 0, "groups": [], "languages": [], "verdicts": [], "cut": 0}
    stages = [{answer.id: answer for answer in evaluation.answers} for evaluation in found.evaluations]
    shown: list[dict[str, Any]] = []
    room, cut = _MOST_TEXT, 0
    for answer in found.after.answers:
        course = [stage.get(answer.id) for stage in stages]
        pair = [None if found.before is None else course[0], answer]
        said = [answer.prompt, answer.system or "", *(each.text for each in pair if each)]
        cut += any(len(text) > _MOST_OF_ONE for text in said)
        room -= _FRAME + sum(len(escape(_clipped(text)).encode("utf-8", "replace")) for text in said)
        if room < 0:
            break
        shown.append(
            {
                "id": answer.id,
                "group": answer.group,
                "language": answer.language,
                "system": _clipped(answer.system or ""),
                "prompt": _clipped(answer.prompt),
                "accepted": _clipped(" · ".join(answer.accepted)),
                "before": pair[0] and _side(pair[0]),
                "after": _side(answer),
                "between": [
                    f"{stage}: {_label(each)}"
                    for stage, each in list(zip(found.stages, course, strict=True))[1:-1]
                    if each is not None
                ],
                "changed": pair[0] is not None and _label(pair[0]) != _label(answer),
            }
        )
    labels = [each[side]["verdict"] for each in shown for side in ("before", "after") if each[side]]
    order = (*_VERDICTS, "right", "contained", "incorrect")
    return {
        "shown": shown,
        "all": len(found.after.answers),
        "groups": list(dict.fromkeys(each["group"] for each in shown)),
        "languages": sorted({each["language"] for each in shown}),
        "verdicts": [each for each in order if each in labels],
        "cut": cut,
    }


def _side(answer: Answer) -> dict[str, Any]:
    return {
        "text": _clipped(answer.text),
        "verdict": _label(answer),
        "judged": answer.judged,
        "ended": answer.ended,
    }


def _label(answer: Answer) -> str:
    """Returns a verdict; of a control, whether it is or holds the right answer."""
    if answer.exact is None:
        return answer.verdict
    return "right" if answer.exact else "contained" if answer.given else "incorrect"


# ---------------------------------------------------------------------------------------- layers and tensors


def _scores(found: Findings) -> list[Any]:
    return list(found.directions.scores.values()) if found.directions else []


def _edited(found: Findings) -> dict[str, Any]:
    """Returns the edited tensors with what was measured of them, up to the most that a page shows."""
    if found.ablation is None:
        return {"rows": [], "left": 0}
    receipt = found.ablation.receipt
    rows = [(edit, receipt.results[edit.name]) for edit in receipt.edits]
    return {"rows": rows[:_MOST_ROWS], "left": max(0, len(rows) - _MOST_ROWS)}


def _skipped(found: Findings) -> list[tuple[str, int]]:
    """Returns how many writers were left out, by reason."""
    reasons: dict[str, int] = defaultdict(int)
    skipped = found.ablation.content.get("skipped") if found.ablation else None
    for entry in skipped if isinstance(skipped, list) else ():
        if isinstance(entry, dict):
            reasons[str(entry.get("reason"))] += 1
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


# ---------------------------------------------------------------------------------------- forms


def _clipped(text: str) -> str:
    return text if len(text) <= _MOST_OF_ONE else f"{text[:_MOST_OF_ONE]} …"


def _dashed(numbers: Sequence[int]) -> str:
    return ranges(numbers).replace("-", _TO).replace(",", ", ")


def _interval(ratio: Ratio) -> str:
    low, high = (f"{100 * end:.0f}" for end in ratio.interval)
    return f"{low}{_TO}{high}{GAP}%"


def _with_interval(ratio: Ratio) -> str:
    return f"{percent(ratio.value)} (95{GAP}% interval {_interval(ratio)})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
