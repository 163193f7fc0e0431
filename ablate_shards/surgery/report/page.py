"""Renders what was found of a run as one HTML page that needs nothing else."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, get_args

from ablate_shards.surgery.evaluate.evaluation import Answer
from ablate_shards.surgery.model.samples import SIDES, Verdict
from ablate_shards.surgery.plan.recipe import layer_ranges
from ablate_shards.surgery.report.findings import Findings
from ablate_shards.surgery.report.frame import fill
from ablate_shards.surgery.report.measures import (
    TO,
    changes,
    controls,
    figures,
    is_broken,
    lean_rows,
    manner_rows,
    sentence,
    task_rows,
    verdict_rows,
    whose,
)
from ablate_shards.surgery.report.provenance import facts, rebuilt_recipe

__all__ = ["render"]

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
#: What is said of an answer to a control.
_OUTCOMES = ("right", "contained", "incorrect")
#: Bytes of all answers together and of the markup around one, and characters of one, so that the page stays small.
_MOST_TEXT = 1_500_000
_FRAME = 900
_MOST_OF_ONE = 4_000
_MOST_ROWS = 1_500


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
        broken=is_broken(found),
        figures=list(figures(found)),
        verdicts=_VERDICTS,
        tables=verdict_rows(found),
        whose=whose(found),
        manners=manner_rows(found),
        leans=lean_rows(found),
        tasks=task_rows(found),
        controls=list(controls(found)),
        stages=list(zip(found.stages, found.evaluations, strict=True)),
        changes=changes(found),
        answers=_answers(found),
        scores=_scores(found),
        marked=data.get("best"),
        edited=_edited(found),
        skipped=_skipped(found),
        facts=facts(found),
        recipe=rebuilt_recipe(found),
    )


# ---------------------------------------------------------------------------------------- words and figures


def _sentences(found: Findings) -> Iterator[str]:
    yield sentence(found)
    yield f"{_edit_sentence(found)}."


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
            f"{f' in layers {layer_ranges(layers, to=TO)}' if layers else ''}"
            f"{f' at coefficient {coefficients[0]:g}' if len(coefficients) == 1 else ''}"
        )
    if found.merge:
        count = _count(len(found.merge.receipt.results), "tensor")
        parts.append(f"a LoRA adapter then changed {count}" if parts else f"A LoRA adapter changed {count}")
    return " and ".join(parts) or "What was edited cannot be read from the receipt"


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
        texts = [*said, *(each.because for each in pair if each)]
        cut += any(len(text) > _MOST_OF_ONE for text in said)
        room -= _FRAME + sum(len(escape(_clipped(text)).encode("utf-8", "replace")) for text in texts)
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
    labels = {each[side]["verdict"] for each in shown for side in ("before", "after") if each[side]}
    # A verdict that no answer has can be asked for too: that none is broken is worth knowing.
    if labels & {*_VERDICTS}:
        labels |= {*_VERDICTS}
    return {
        "shown": shown,
        "all": len(found.after.answers),
        "groups": list(dict.fromkeys(each["group"] for each in shown)),
        "languages": sorted({each["language"] for each in shown}),
        "verdicts": [each for each in (*_VERDICTS, *_OUTCOMES) if each in labels],
        "cut": cut,
    }


def _side(answer: Answer) -> dict[str, Any]:
    return {
        "text": _clipped(answer.text),
        "verdict": _label(answer),
        "whose": SIDES.get(answer.side, "") if answer.exact is None else "",
        "because": _clipped(answer.because) if answer.exact is None or answer.verdict == "broken" else "",
        "judged": answer.judged,
        "cut": "" if answer.ended else "lost in thought" if answer.lost_in_thought else "cut off",
        "detached": answer.detached and answer.exact is None,
    }


def _label(answer: Answer) -> str:
    """Returns a verdict; of a control, whether it is or holds the right answer, or is none."""
    if answer.exact is None:
        return answer.verdict
    if answer.exact:
        return "right"
    return "broken" if answer.verdict == "broken" else "contained" if answer.given else "incorrect"


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


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
