"""The file of an evaluation: every answer with its verdict, and what they add up to, as JSON."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ablate_shards import __version__
from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.effect import effect
from ablate_shards.surgery.evaluate.evaluation import (
    Answer,
    Evaluation,
    Lean,
    Model,
    PredictedText,
    VerdictRow,
    compare,
)
from ablate_shards.surgery.evaluate.likelihood import Divergence
from ablate_shards.surgery.evaluate.statistics import Mean, Ratio
from ablate_shards.surgery.evaluate.tasks import TaskScore
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.model.samples import Group
from ablate_shards.validation import checked

__all__ = ["EVALUATION_FORMAT", "evaluation_text", "read_evaluation", "write_evaluation"]

EVALUATION_FORMAT = "ablate-shards.evaluation/2"

_MANNERS = ("broken", "cut", "lost_in_thought", "distinct", "detached")


def evaluation_text(evaluation: Evaluation) -> str:
    """Returns an evaluation as JSON: first the summary, then the answers that it is computed from."""
    head = {"format": EVALUATION_FORMAT, "tool": f"ablate-shards {__version__}", "effect": effect(evaluation)}
    content = {**head, **_content(evaluation)}
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
        raise EvaluateError(f"{path}: expected {EVALUATION_FORMAT}, found a file that is not JSON") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != EVALUATION_FORMAT:
        raise EvaluateError(
            f"{path}: expected {EVALUATION_FORMAT}, found {found!r}; evaluate the model with this version"
        )
    try:
        return _read(content)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise EvaluateError(
            f"{path}: not a complete evaluation ({error}); it was changed after it was written"
        ) from error


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
        "manner": _nested(
            (
                manner.group,
                manner.language,
                {name: _written(getattr(manner, name)) for name in _MANNERS},
            )
            for manner in evaluation.manners
        ),
        "lean": [{"group": row.group or "all", "side": row.side, **_written_mean(row.mean)} for row in evaluation.lean],
        "perplexity": None if evaluation.text is None else _written_text(evaluation.text),
        "tasks": [dataclasses.asdict(score) for score in evaluation.tasks],
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
            "leans": [
                {
                    "group": change.group or "all",
                    "side": change.side,
                    **_written_mean(change.test.change),
                    "p": change.test.p,
                }
                for change in evaluation.comparison.leans
            ],
            "tasks": [dataclasses.asdict(change) for change in evaluation.comparison.tasks],
            "notes": list(evaluation.comparison.notes),
        }
    if evaluation.base is not None:
        content["base"] = _content(evaluation.base)
    content["leans"] = [dataclasses.asdict(lean) for lean in evaluation.leans]
    content["answers"] = [dataclasses.asdict(answer) for answer in evaluation.answers]
    return content


def _written(found: Ratio) -> dict[str, Any]:
    return {"ratio": found.value, "interval": list(found.interval), "hits": found.hits, "count": found.count}


def _written_mean(found: Mean) -> dict[str, Any]:
    return {"mean": found.value, "interval": list(found.interval), "count": found.count}


def _written_rows(rows: Iterable[VerdictRow]) -> dict[str, Any]:
    return _nested(
        (
            row.group,
            row.language,
            {verdict: _written(found) for verdict, found in row.verdicts.items()}
            | {"sides": {side: _written(found) for side, found in row.sides.items()}},
        )
        for row in rows
    )


def _nested(parts: Iterable[tuple[Group, str | None, dict[str, Any]]]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group, language, found in parts:
        if language is None:
            groups[group] = found
        else:
            groups[group].setdefault("languages", {})[language] = found
    return groups


def _written_text(text: PredictedText) -> dict[str, Any]:
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
        model=checked(content["model"], Model, "model", closed=(Model,)),
        options=dict(content["options"]),
        versions=dict(content["versions"]),
        questions=checked(content["questions"]["sha256"], str, "questions: sha256"),
        answers=checked(content["answers"], tuple[Answer, ...], "answers", closed=(Answer,)),
        leans=checked(content["leans"], tuple[Lean, ...], "leans"),
        text=None if text is None else _read_text(text),
        tasks=checked(content["tasks"], tuple[TaskScore, ...], "tasks", closed=(TaskScore,)),
        judge=None if judge is None else checked(judge["model"], str, "judge: model"),
        base=base,
    )
    if base is None:
        return evaluation
    moved = content["comparison"]["divergence"]
    notes = checked(content["comparison"]["notes"], tuple[str, ...], "comparison: notes")
    comparison = compare(evaluation, base, None if moved is None else _read_divergence(moved))
    return dataclasses.replace(evaluation, comparison=dataclasses.replace(comparison, notes=notes))


def _read_text(record: Mapping[str, Any]) -> PredictedText:
    perplexity = None if record["nats"] is None else record
    return checked({**record, "perplexity": perplexity}, PredictedText, "perplexity")


def _read_divergence(record: Mapping[str, Any]) -> Divergence:
    first, tokens = record["first"], record["tokens"]
    means = {"first": first["mean"], "tokens": tokens["mean"]}
    return checked({**means, "prompts": first["count"], "count": tokens["count"]}, Divergence, "comparison: divergence")
