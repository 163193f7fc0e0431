"""Renders what was found of a run as one HTML page that needs nothing else."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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
from ablate_shards.surgery.report.search_record import Given, Search
from ablate_shards.surgery.report.searches import asked, candidate_rows, chosen_by, space_rows, told

__all__ = ["render"]

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
#: What is said of an answer to a control.
_OUTCOMES = ("right", "contained", "incorrect")
#: Bytes of all answers together and of the markup around one, and characters of one, so that the page stays small.
_MOST_TEXT = 1_500_000
_FRAME = 900
_MOST_OF_ONE = 4_000
_MOST_ROWS = 1_500
#: Questions of which a search shows the answers of its candidates, and bytes of these.
_MOST_ASKED = 20
_MOST_SEARCHED = 300_000


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
        eyebrow=f"ablate-shards {'search' if found.searched_only else 'report'}",
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
        searches=[_searched(number, search) for number, search in enumerate(found.searches)],
        commands="\n".join(
            shlex.join(["ablate-shards", "ablate", search.record.model, "OUT", "--recipe", search.record.recipe])
            for search in found.searches
        ),
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
    if not found.searched_only:
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
        room -= _FRAME + _size(texts)
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


# ---------------------------------------------------------------------------------------- searches


def _searched(number: int, search: Search) -> dict[str, Any]:
    """Returns what the page says of a search."""
    shown: list[dict[str, Any]] = []
    room = _MOST_SEARCHED
    for question, sides in asked(search.record):
        room -= _FRAME + _size([question.prompt, *(answer.text for _, answer in sides)])
        if room < 0 or len(shown) == _MOST_ASKED:
            break
        shown.append(
            {
                "id": question.id,
                "language": question.language,
                "prompt": _clipped(question.prompt),
                "sides": [(name, _given(answer)) for name, answer in sides],
            }
        )
    return {
        "number": number,
        "name": search.name,
        "record": search.record,
        "told": told(search),
        "chosen_by": chosen_by(search.record),
        "candidates": candidate_rows(search.record),
        "asked": shown,
        "importance": [
            (place, objective) for place, (objective, shares) in enumerate(search.record.importance.items()) if shares
        ],
        "space": space_rows(search.record),
    }


def _given(answer: Given) -> dict[str, Any]:
    right = {None: answer.verdict, True: "right", False: "broken" if answer.verdict == "broken" else "incorrect"}
    unknown = dict.fromkeys(("whose", "because", "judged", "cut", "detached"), "")
    return {**unknown, "text": _clipped(answer.text), "verdict": right[answer.given]}


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


def _size(texts: Iterable[str]) -> int:
    """Returns how many bytes texts take on the page."""
    return sum(len(escape(_clipped(text)).encode("utf-8", "replace")) for text in texts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
