"""Directions of several kinds of pairs side by side: which separates best, and how far they agree."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ablate_shards.errors import ActivationsError, DirectionsError, UsageError
from ablate_shards.surgery.directions.activations import ActivationDump
from ablate_shards.surgery.directions.directions import Directions, LayerScore, score_row
from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
from ablate_shards.surgery.directions.without import read_without

__all__ = ["Candidate", "DirectionsAgreement", "DirectionsComparison", "compare_directions"]

#: Areas under the curve that differ by no more are a tie, and the rounding of their difference.
_TIE = 0.01 + 1e-9


@dataclass(frozen=True)
class Candidate:
    """The directions of one dump.

    Attributes:
        name: The dump's file name without its suffix, or its path where two have the same.
        path: The dump.
        labels: What its metadata call the positive and the negative prompts, if anything.
        directions: One basis per layer.
        best: The scores at its best layer; None where the best layer is not known.
    """

    name: str
    path: Path
    labels: tuple[str | None, str | None]
    directions: Directions
    best: LayerScore | None


@dataclass(frozen=True, slots=True)
class DirectionsAgreement:
    """How far the directions of two dumps agree: their cosine; of several per layer, the largest principal cosine.

    Attributes:
        first: Name of the one dump.
        second: Name of the other.
        median: Over the layers.
        layer: The best layer of the first.
        at_layer: At that layer.
    """

    first: str
    second: str
    median: float
    layer: int | None
    at_layer: float | None


@dataclass(frozen=True)
class DirectionsComparison:
    """Several kinds of pairs, compared.

    Attributes:
        candidates: In the order given.
        agreements: Of each two.
        taken: The candidate that separates best.
        reason: Why, in words.
    """

    candidates: tuple[Candidate, ...]
    agreements: tuple[DirectionsAgreement, ...]
    taken: Candidate
    reason: str

    @property
    def directions(self) -> Directions:
        """The directions of the candidate that separates best; their metadata say what it was compared with."""
        taken, summary = self.taken.directions, self.as_dict()
        return replace(
            taken,
            metadata={
                **taken.metadata,
                "dump": self.taken.name,
                "compared": json.dumps(summary["dumps"]),
                "agreement": json.dumps(summary["agreement"]),
            },
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns what was compared, as JSON types."""
        return {
            "dump": self.taken.name,
            "reason": self.reason,
            "dumps": [
                {
                    "dump": candidate.name,
                    "positive_label": candidate.labels[0],
                    "negative_label": candidate.labels[1],
                    "sha256": candidate.directions.sha256(),
                    "best": None if candidate.best is None else score_row(candidate.best),
                }
                for candidate in self.candidates
            ],
            "agreement": [
                {
                    "dumps": [agreement.first, agreement.second],
                    "median": agreement.median,
                    "layer": agreement.layer,
                    "at_layer": agreement.at_layer,
                }
                for agreement in self.agreements
            ],
        }


def compare_directions(
    dumps: Sequence[ActivationDump],
    options: EstimatorOptions,
    *,
    without: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> DirectionsComparison:
    """Computes the directions of several dumps of one model with the same options, and compares them.

    Args:
        dumps: At least two.
        options: The estimator.
        without: Files of other directions to take out of all of them.
        progress: Called with the layers done and their number, over all dumps.

    Raises:
        UsageError: A dump is given twice.
        ActivationsError: The dumps do not come from one model, or one cannot be used.
        DirectionsError: Directions cannot be computed, or none of them can be scored on held-out prompts.
    """
    names = _names([dump.path for dump in dumps])
    _refuse_other_model(dumps)
    # Files of directions that do not fit are refused before a dump is read.
    others = [read_without(without, dump) for dump in dumps]
    total = sum(len(dump.layers) for dump in dumps)
    candidates: list[Candidate] = []
    for name, dump, other in zip(names, dumps, others, strict=True):
        before = len(candidates) * len(dump.layers)
        counted = None if progress is None else partial(_counted, progress, before, total)
        found = compute_directions(dump, options, without=other, progress=counted)
        labels = dump.metadata.get("positive_label"), dump.metadata.get("negative_label")
        best = found.scores.get(found.best_layer()) if found.scores else None
        candidates.append(Candidate(name, dump.path, labels, found, best))
    taken, reason = _best(candidates)
    pairs = [(first, second) for place, first in enumerate(candidates) for second in candidates[place + 1 :]]
    return DirectionsComparison(tuple(candidates), tuple(_agreement(*pair) for pair in pairs), taken, reason)


def _counted(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the names to call dumps by."""
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise UsageError(f"{path}: is given twice; name each dump once")
    short = [path.stem if path.suffix else path.name for path in resolved]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _refuse_other_model(dumps: Sequence[ActivationDump]) -> None:
    first = dumps[0]
    for dump in dumps[1:]:
        differ = f"{dump.path} and {first.path} do not come from one model:"
        way_out = "compare dumps that were captured from the same model"
        if dump.hidden_size != first.hidden_size:
            raise ActivationsError(f"{differ} hidden size {dump.hidden_size} and {first.hidden_size}; {way_out}")
        if dump.layers != first.layers:
            layer = min(set(dump.layers) ^ set(first.layers))
            holder = dump if layer in dump.layers else first
            raise ActivationsError(f"{differ} only {holder.path} has layer {layer}; {way_out}")
    named = [(dump, dump.metadata["model"]) for dump in dumps if "model" in dump.metadata]
    for dump, model in named[1:]:
        if model != named[0][1]:
            raise ActivationsError(
                f"{dump.path} and {named[0][0].path} do not come from one model: their metadata say {model!r} and "
                f"{named[0][1]!r}; compare dumps that were captured from the same model"
            )


def _best(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """Returns the one that separates best, and why; ``docs/directions.md`` has the rule and its reason."""
    scored = [
        (candidate, best, best.auc, (best.split_half or 0.0, best.signal_to_noise or 0.0))
        for candidate in candidates
        if (best := candidate.best) is not None and best.auc is not None
    ]
    if not scored:
        raise DirectionsError(
            f"{candidates[0].path} and the others cannot be compared, as nothing was held out of any; give dumps of at "
            "least two prompts of each label"
        )
    highest = max(auc for _, _, auc, _ in scored)
    near = [entry for entry in scored if highest - entry[2] <= _TIE]
    # The first of equal ones.
    taken, best, auc, order = max(near, key=lambda entry: entry[3])
    if len(near) == 1:
        return taken, f"it has the highest held-out AUC, {auc:.3f} at layer {best.layer}"
    reason = f"{len(near)} of the dumps have a held-out AUC within 0.01 of the highest, {highest:.3f}, and of those it"
    if [split_half for *_, (split_half, _) in near].count(order[0]) == 1:
        return taken, f"{reason} has the highest split-half cosine, {order[0]:.3f} at layer {best.layer}"
    if [other for *_, other in near].count(order) == 1:
        return taken, f"{reason} has the highest signal-to-noise, {order[1]:.3f} at layer {best.layer}"
    return taken, f"{reason} comes first, their other scores being equal"


def _agreement(first: Candidate, second: Candidate) -> DirectionsAgreement:
    layers = [layer for layer in first.directions.layers if layer in second.directions.basis]
    cosines = {
        layer: _cosine(first.directions.basis[layer].astype(float), second.directions.basis[layer].astype(float))
        for layer in layers
    }
    best = first.best.layer if first.best is not None else None
    return DirectionsAgreement(
        first.name,
        second.name,
        float(np.median(list(cosines.values()))),
        best,
        None if best is None else cosines.get(best),
    )


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the cosine of two directions, with its sign; of spans ``[k, d]``, the largest principal cosine."""
    products = first @ second.T
    return float(products[0, 0] if products.size == 1 else np.linalg.svd(products, compute_uv=False)[0])
