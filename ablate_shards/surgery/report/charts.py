"""Says what the charts of a report show, as plain numbers that a page and a plotting library can draw."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ablate_shards.surgery.report.findings import Findings
from ablate_shards.surgery.report.measures import sided
from ablate_shards.surgery.report.search_record import Record, Trial
from ablate_shards.surgery.report.searches import setting_lines

__all__ = ["chart_data"]

_T = TypeVar("_T")


def chart_data(found: Findings) -> dict[str, Any]:
    """Returns what the charts are drawn from, in JSON types; a chart without data has no key."""
    data: dict[str, Any] = {}
    if found.directions is not None:
        layers = list(found.directions.layers)
        if found.directions.scores:
            data["quality"] = [
                {
                    "layer": score.layer,
                    "signal": _short(score.signal_to_noise),
                    "auc": _short(score.auc),
                    "purity": _short(score.purity),
                    "cosine": _short(score.cosine, 6),
                }
                for score in found.directions.scores.values()
            ]
        first = np.stack([found.directions.basis[layer][0] for layer in layers]).astype(np.float64)
        if len(layers) > 1:
            data["cosines"] = {"layers": layers, "values": [[round(x, 3) for x in row] for row in first @ first.T]}
        data["best"] = _used_layer(found)
    if found.projections:
        data["projection"] = [
            {
                "layer": each.layer,
                "share": _short(each.share, 3),
                "positive": [[_short(x), _short(y)] for x, y in each.positive],
                "negative": [[_short(x), _short(y)] for x, y in each.negative],
            }
            for each in found.projections
        ]
    if cells := list(_cells(found)):
        data["edits"] = cells
    if found.merge:
        changes: dict[tuple[int | None, str], list[float]] = defaultdict(list)
        for name, result in found.merge.receipt.results.items():
            if result.change is not None:
                changes[_layer(name), _role(name)].append(result.change)
        data["updates"] = [
            {"layer": layer, "name": name, "change": _short(max(values))}
            for (layer, name), values in sorted(changes.items(), key=lambda item: (item[0][0] or 0, item[0][1]))
            if layer is not None
        ]
    if found.evaluations:
        data["verdicts"] = [
            {
                "group": row.group,
                "stage": stage,
                "order": order,
                **{verdict: [ratio.hits, ratio.count] for verdict, ratio in row.verdicts.items()},
                "interval": [_short(end) for end in row.verdicts["slanted"].interval],
                "whose": sided(row),
            }
            for order, (stage, evaluation) in enumerate(zip(found.stages, found.evaluations, strict=True))
            for row in evaluation.rows
            if row.language is None
        ]
    if found.training:
        data["losses"] = {
            "steps": [[_short(epoch), _short(loss)] for epoch, loss in _thinned(found.training.losses)],
            "held_out": [
                {"epoch": epoch, "kind": kind, "loss": _short(loss)}
                for epoch, losses in found.training.epochs
                for kind, loss in losses.items()
            ],
        }
    if found.searches:
        data["searches"] = [
            {
                "name": search.name,
                "front": _front(search.record),
                "depth": list(_depth(search.record)),
            }
            for search in found.searches
        ]
    if importance := list(_importance(found)):
        data["importance"] = importance
    return data


def _front(record: Record) -> dict[str, Any]:
    """Returns the trials by effect and cost: by the first objective, and by the divergence or else the second one."""
    up, *others = record.objectives
    across = next((each for each in others if each.name == "kl"), others[0] if others else None)

    def point(trial: Trial) -> dict[str, Any]:
        x = trial.number if across is None else _short(trial.values.get(across.name))
        y = _short(trial.values.get(up.name))
        return {
            "number": trial.number,
            "x": x,
            "y": y,
            "complete": trial.complete and x is not None and y is not None,
            "front": trial.number in record.front,
            "chosen": trial.number == record.chosen,
            "plain": trial.number == record.plain,
            "values": ", ".join(f"{name} {value:.4g}" for name, value in trial.values.items()).replace(" -", " −")
            or "no number",
            "setting": setting_lines(record, trial),
        }

    marked = [trial for trial in record.trials if trial.number in {*record.front, record.chosen, record.plain}]
    rest = [trial for trial in record.trials if trial not in marked]
    trials = [point(trial) for trial in (*_thinned(rest), *marked)]
    is_divergence = across is not None and across.name == "kl"
    positive = [trial["x"] for trial in trials if trial["complete"] and trial["x"] > 0]
    return {
        "up": {"name": up.name, "direction": up.direction, "base": _short(up.base)},
        "across": {"name": across.name, "direction": across.direction} if across else None,
        "budget": record.options.budget.kl if is_divergence else None,
        # Divergences are apart by powers of ten; those that are next to none stand together, as 0 has no place there.
        "least": max(min(positive), max(positive) / 1e4) if is_divergence and positive else None,
        "trials": trials,
    }


def _importance(found: Findings) -> Iterator[dict[str, Any]]:
    """Yields how much of an objective's variation each parameter explains, of each search and objective."""
    for number, search in enumerate(found.searches):
        for place, (objective, shares) in enumerate(search.record.importance.items()):
            if shares:
                bars = [{"parameter": name, "share": _short(share)} for name, share in shares.items()]
                yield {"search": number, "place": place, "name": search.name, "objective": objective, "bars": bars}


def _depth(record: Record) -> Iterator[dict[str, Any]]:
    """Yields the coefficient of each layer and part, of the chosen edit and, if it is another, of the plain one."""
    chosen, plain = record.trial(record.chosen), record.trial(record.plain)
    for part, row in chosen.coefficients.items() if chosen else ():
        beside = plain.coefficients.get(part) if plain and plain is not chosen else None
        for place, layer in enumerate(record.layers):
            yield {
                "part": part,
                "layer": layer,
                "chosen": row[place],
                "plain": beside[place] if beside else None,
            }


def _used_layer(found: Findings) -> int | None:
    """Returns the layer whose direction was used, None where there are several."""
    if found.ablation:
        used = {edit.basis.source_layer for edit in found.ablation.receipt.edits}
        layer = used.pop() if len(used) == 1 else None
        return layer if isinstance(layer, int) else None
    return None


def _cells(found: Findings) -> Iterator[dict[str, Any]]:
    """Yields a cell per layer and component: the largest share of a weight along the direction, before and after."""
    if found.ablation is None:
        return
    cells: dict[tuple[int, str], list[Any]] = defaultdict(list)
    results = found.ablation.receipt.results
    for edit in found.ablation.receipt.edits:
        if edit.kind == "weight" and edit.layer is not None:
            cells[edit.layer, f"{edit.component}{' (mtp)' if edit.mtp else ''}"].append((edit, results[edit.name]))
    for (layer, component), members in sorted(cells.items()):
        drifts = [result.norm_drift for _, result in members if result.norm_drift is not None]
        yield {
            "layer": layer,
            "component": component,
            "names": ", ".join(sorted({_role(edit.name) for edit, _ in members})),
            "count": len(members),
            "before": _short(max(result.before for _, result in members)),
            "after": _short(max(result.after for _, result in members)),
            "drift": _short(max(drifts)) if drifts else None,
        }


def _role(name: str) -> str:
    """Returns what a weight is in its layer: its name without what leads to the layer, and without numbers."""
    inner = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+(?=\.|$)", "", inner).removesuffix(".weight")


def _layer(name: str) -> int | None:
    match = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return int(match[1]) if match else None


def _short(value: float | None, digits: int = 4) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def _thinned(rows: Sequence[_T], most: int = 2_000) -> Iterable[_T]:
    step = max(1, math.ceil(len(rows) / most))
    return rows[::step]
