"""Directions computed from activations, and their scores, all statistics in float64."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np

from ablate_shards.errors import ActivationsError, DirectionsError, UsageError
from ablate_shards.kernels.measure.grouped import add_group_sums, group_dots, pairs_in_order
from ablate_shards.surgery.directions.activations import (
    LABELS,
    ActivationDump,
    Kept,
    Label,
)
from ablate_shards.surgery.directions.directions import Directions, LayerScore, score_by_means
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.directions.vectors import LARGEST, NOTHING_LEFT, orthonormal, project_out, unit
from ablate_shards.surgery.directions.without import Without

__all__ = ["Estimator", "EstimatorOptions", "compute_directions"]

Estimator = Literal["mean-difference", "geometric-median", "svd"]

_FOLDS = 5

_WORKERS = 4

#: What of a layer's activations of one label is read once and kept for the next pass; each worker keeps both labels.
_KEPT_BYTES = 32 << 20

_SAME_MEAN = 1e-12

_NO_SPREAD = 1e-12

_WEISZFELD_STEPS = 200

_WEISZFELD_TOLERANCE = 1e-7

_WEISZFELD_SMOOTHING = 1e-4

_NO_DISTANCE = 1e-100

#: Eigenvectors that the search for one of nearly the same matrix starts from, and when it ends.
_START = 8

_EIGEN_STEPS = 50

_EIGEN_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class EstimatorOptions:
    """How directions are computed.

    Attributes:
        estimator: ``mean-difference``; ``geometric-median`` of each class; ``svd`` of the paired differences.
        rank: Directions per layer; above 1 only with ``svd``.
        winsorize: Clip each prompt's activations at this quantile of their magnitudes; None leaves them.

    Raises:
        UsageError: The options contradict one another.
    """

    estimator: Estimator = "mean-difference"
    rank: int = 1
    winsorize: float | None = None

    def __post_init__(self) -> None:
        """Refuses what has no meaning."""
        if self.estimator not in get_args(Estimator):
            raise UsageError(f"estimator: expected {', '.join(get_args(Estimator))}, found {self.estimator!r}")
        if self.rank < 1:
            raise UsageError(f"rank: expected at least 1, found {self.rank}")
        if self.rank > 1 and self.estimator != "svd":
            raise UsageError(f"rank {self.rank} needs the svd estimator; {self.estimator} gives one direction")
        if self.winsorize is not None and not 0.5 < self.winsorize <= 1:
            raise UsageError(f"winsorize: expected a quantile above 0.5, at most 1, found {self.winsorize}")


def compute_directions(
    dump: ActivationDump,
    options: EstimatorOptions,
    *,
    without: Without | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Directions:
    """Computes one basis per layer and scores it; all statistics are float64.

    Args:
        dump: The activations.
        options: The estimator.
        without: Other directions to take out of every direction, those that the scores are computed from included.
        progress: Called with the layers done and their number.

    Returns:
        The directions; the reference means are those of the activations as winsorised.

    Raises:
        ActivationsError: A value is not finite, or the labels do not pair up where they must.
        DirectionsError: Positives equal negatives, the rank is too high, or nothing is left without other directions.
    """
    if dump.means_only:
        if options != EstimatorOptions():
            raise ActivationsError(
                f"{dump.path}: holds class means, of which only mean-difference can be taken; capture an activation "
                "dump for another estimator or to winsorize"
            )
        measured = read_directions(dump.path)
        return measured if without is None else _taken_out(measured, without, dump)
    basis, reference, scores = {}, {}, {}
    # The svd estimator spends its time in LAPACK, which has threads of its own, and needs a Gram matrix in each.
    workers = 1 if options.estimator == "svd" else min(_WORKERS, os.cpu_count() or 1)
    local = threading.local()

    def solve(layer: int) -> tuple[np.ndarray, np.ndarray, LayerScore]:
        if not hasattr(local, "kept"):
            local.kept = {label: Kept(_KEPT_BYTES) for label in LABELS}
        return _Layer(dump, layer, options, local.kept, without).solve()

    with ThreadPoolExecutor(workers) as pool:
        solved = pool.map(solve, dump.layers)
        for done, layer in enumerate(dump.layers, 1):
            basis[layer], reference[layer], scores[layer] = next(solved)
            if progress is not None:
                progress(done, len(dump.layers))
    metadata = {key: value for key, value in dump.metadata.items() if key not in ("format", "hidden_size")}
    metadata["estimator"] = json.dumps(asdict(options))
    if without is not None:
        metadata["without"] = without.as_metadata()
    return Directions(basis, reference, scores, metadata)


def _taken_out(directions: Directions, without: Without, dump: ActivationDump) -> Directions:
    """Takes other directions out of those that were measured elsewhere, of which only the purity can be scored."""
    basis, scores = {}, {}
    for layer in directions.layers:
        found, left = without.take_out(layer, directions.basis[layer], f"{dump.path}: layer {layer}")
        basis[layer] = found.astype(np.float32)
        if layer in directions.scores:
            purity = float(np.linalg.norm(project_out(found[0], unit(directions.reference[layer].astype(float))[None])))
            scores[layer] = replace(directions.scores[layer], purity=purity, left=left)
    return Directions(basis, directions.reference, scores, {**directions.metadata, "without": without.as_metadata()})


class _Layer:
    """The passes over one layer's activations.

    Prompt p is in group p mod the number of groups, whatever its label, so that pairs stay together; folds and
    halves are sets of groups. Every estimator works on several subsets of the prompts at once, in the same passes:
    all of them; all but each fold; each half.
    """

    def __init__(
        self,
        dump: ActivationDump,
        layer: int,
        options: EstimatorOptions,
        kept: Mapping[Label, Kept],
        without: Without | None = None,
    ) -> None:
        self._dump, self._layer, self._options, self._kept, self._without = dump, layer, options, kept, without
        self._where = f"{dump.path}: layer {layer}"
        self._counts = dict(zip(LABELS, dump.counts(layer), strict=True))
        fewest = min(self._counts.values())
        if options.estimator == "svd":
            if len(set(self._counts.values())) > 1:
                raise ActivationsError(
                    f"{self._where}: svd needs pairs, found {self._counts['positive']} positive and "
                    f"{self._counts['negative']} negative prompts; capture one of each per pair"
                )
            if options.rank > min(fewest, dump.hidden_size):
                raise DirectionsError(
                    f"{self._where}: rank {options.rank} is more than {fewest} pairs of size "
                    f"{dump.hidden_size} can give; lower --rank"
                )
        #: How a prompt's activations are clipped, chunk by chunk, once known.
        self._limits: dict[Label, list[np.ndarray]] = {label: [] for label in LABELS}
        self._folds = min(_FOLDS, fewest) if fewest > 1 else 0
        group = np.arange(math.lcm(self._folds, 2) if self._folds else 1)
        subsets = [group >= 0]
        if self._folds:
            subsets += [group % self._folds != fold for fold in range(self._folds)]
            subsets += [group % 2 == half for half in (0, 1)]
        #: ``[subsets, groups]``: which groups belong to a subset.
        self._subsets = np.array(subsets)

    def solve(self) -> tuple[np.ndarray, np.ndarray, LayerScore]:
        """Returns the basis ``[k, d]`` and the reference mean ``[d]``, both float32, and the score."""
        positive, negative = (self._means(label) for label in LABELS)
        gaps = positive - negative
        scale = max(np.linalg.norm(positive[0]), np.linalg.norm(negative[0]))
        if not np.linalg.norm(gaps[0]) > _SAME_MEAN * scale:
            raise DirectionsError(
                f"{self._where}: positive and negative activations have the same mean, so there is no direction; "
                "check that the dump was captured from different prompts"
            )
        if self._options.estimator == "mean-difference":
            bases = unit(gaps)[:, None]
        elif self._options.estimator == "geometric-median":
            bases = unit(self._medians("positive", positive) - self._medians("negative", negative))[:, None]
        else:
            bases = self._singular(gaps)
        left = None
        if self._without is not None:
            bases, left = self._taken_out(bases, gaps, self._without)
        measured = self._held_out(bases[:, 0], (positive + negative) / 2) if self._folds else (None, None, None)
        score = score_by_means(self._layer, positive[0], negative[0], gaps[0], bases[0, 0])
        signal, auc, split_half = measured
        score = replace(score, signal_to_noise=signal, auc=auc, split_half=split_half, left=left)
        return bases[0].astype(np.float32), negative[0].astype(np.float32), score

    def _taken_out(self, bases: np.ndarray, gaps: np.ndarray, without: Without) -> tuple[np.ndarray, float]:
        """Takes other directions out of the bases ``[subsets, k, d]``; also returns what is left of the first.

        What is held out is thus scored along what is left. The vectors stay on the side of the positives.
        """
        first, left = without.take_out(self._layer, bases[0], self._where)
        axes = without.axes[self._layer]
        rest = project_out(bases, axes)
        rest = unit(
            project_out(unit(np.where(np.linalg.norm(rest, axis=2, keepdims=True) > NOTHING_LEFT, rest, 0)), axes)
        )
        rest[0] = first
        signs = np.where(np.vecdot(rest, gaps[:, None]) < 0, -1.0, 1.0)
        return rest * signs[:, :, None], left

    def _chunks(self, label: Label) -> Iterator[np.ndarray]:
        """Yields the (winsorised) activations, ``[prompts, d]`` float64; the next overwrites them."""
        groups, limits = self._subsets.shape[1], self._limits[label]
        done = 0
        chunks = self._dump.chunks(self._layer, label, multiple=groups, kept=self._kept[label])
        for number, values in enumerate(chunks):
            if self._options.winsorize is not None:
                if number == len(limits):
                    self._check(label, values, done)
                    limits.append(np.quantile(np.abs(values), self._options.winsorize, axis=1, keepdims=True))
                np.clip(values, -limits[number], limits[number], out=values)
            done += len(values)
            yield values

    def _rounds(self, label: Label) -> Iterator[np.ndarray]:
        """Yields the same as ``[rounds, groups, d]``, the last perhaps of fewer groups."""
        groups = self._subsets.shape[1]
        for values in self._chunks(label):
            whole = len(values) // groups * groups
            if whole:
                yield values[:whole].reshape(-1, groups, values.shape[1])
            if whole < len(values):
                yield values[None, whole:]

    def _blocks(self, label: Label) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the same as stored where nothing is winsorised, each array with the number of its first prompt."""
        stored = self._dump.stored(self._layer, label, kept=self._kept[label])
        done = 0
        for values in stored if self._options.winsorize is None else self._chunks(label):
            yield done, values
            done += len(values)

    def _means(self, label: Label) -> np.ndarray:
        """Returns the mean of each subset, ``[subsets, d]``."""
        groups, count = self._subsets.shape[1], self._counts[label]
        sums = np.zeros((groups, self._dump.hidden_size))
        with np.errstate(invalid="ignore", over="ignore"):
            for first, block in self._blocks(label):
                add_group_sums(block, first, sums)
            # A value that is not finite makes a sum that is not, so sums are all that need a look.
            if not np.abs(sums).max() <= LARGEST:
                done = 0
                for values in self._chunks(label):
                    self._check(label, values, done)
                    done += len(values)
        sizes = (count + groups - 1 - np.arange(groups)) // groups
        means: np.ndarray = (self._subsets @ sums) / (self._subsets @ sizes)[:, None]
        return means

    def _check(self, label: Label, values: np.ndarray, done: int) -> None:
        """Refuses prompts with values that are not finite, or whose sums would not be as float32."""
        largest = np.abs(values).max(axis=1)
        if not (usable := largest <= LARGEST / self._counts[label]).all():
            prompt = int(np.argmin(usable))
            raise ActivationsError(
                f"{self._dump.origin(self._layer, label, done + prompt)}: holds {largest[prompt]:.3g}, expected finite "
                "values within the range of float32; capture it again without that prompt"
            )

    def _held_out(self, vectors: np.ndarray, middles: np.ndarray) -> tuple[float | None, float, float]:
        """Returns signal-to-noise and AUC of prompts along directions that did not see them, and split-half.

        Args:
            vectors: ``[subsets, d]``, the direction of each.
            middles: ``[subsets, d]``, halfway between the class means of each.
        """
        unseen = 1 + np.arange(self._subsets.shape[1]) % self._folds
        offsets = np.vecdot(vectors, middles)[unseen]
        directions = vectors[unseen]
        positive, negative = (self._along(label, directions, offsets) for label in LABELS)
        spread = math.sqrt((float(positive.var(ddof=1)) + float(negative.var(ddof=1))) / 2)
        gap = float(positive.mean() - negative.mean())
        signal = gap / spread if spread > _NO_SPREAD * abs(gap) else None
        return signal, _auc(positive, negative), float(vectors[-2] @ vectors[-1])

    def _along(self, label: Label, directions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Returns how far each prompt lies along its group's direction ``[groups, d]``, from the group's offset."""
        blocks = self._blocks(label)
        return np.concatenate([group_dots(block, first, directions, offsets) for first, block in blocks])

    def _medians(self, label: Label, means: np.ndarray) -> np.ndarray:
        """Returns the geometric median of each subset, ``[subsets, d]``, from their means.

        Weiszfeld's iteration (1937), with distances kept from vanishing as in Pillutla, Kakade and Harchaoui,
        "Robust Aggregation for Federated Learning" (2022).
        """
        points = means
        start = [np.where(member, distance, np.nan) for _, member, distance in self._distances(label, points)]
        scale = np.maximum(np.nanmedian(np.concatenate(start), axis=0), _NO_DISTANCE)
        for _ in range(_WEISZFELD_STEPS):
            total, weight = np.zeros_like(points), np.zeros(len(points))
            for rows, member, distance in self._distances(label, points):
                inverse = member / np.maximum(distance, _WEISZFELD_SMOOTHING * scale)
                total += inverse.T @ rows
                weight += inverse.sum(0)
            moved = points[0] + total / weight[:, None]
            step = np.linalg.norm(moved - points, axis=1)
            points = moved
            if (step <= _WEISZFELD_TOLERANCE * scale).all():
                break
        return points

    def _distances(self, label: Label, points: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields prompts relative to the first point, their subsets, and their distances to each subset's point.

        Shapes ``[prompts, d]``, ``[prompts, subsets]`` bool and ``[prompts, subsets]``.
        """
        # Seen from a point amid the prompts, the expanded square loses no digits that matter.
        near = points - points[0]
        squares = np.vecdot(near, near)
        for block in self._rounds(label):
            rows = block.reshape(-1, block.shape[2]) - points[0]
            member = np.tile(self._subsets.T[: block.shape[1]], (block.shape[0], 1))
            squared = np.vecdot(rows, rows)[:, None] - 2 * (rows @ near.T) + squares
            yield rows, member, np.sqrt(np.maximum(squared, 0))

    def _singular(self, gaps: np.ndarray) -> np.ndarray:
        """Returns the top right singular vectors of each subset's uncentred paired differences.

        They come from the smaller Gram matrix, in float64: of pairs where these are few, else ``[d, d]``. That of a
        subset is part of the one of all pairs, or what is left when the other pairs are taken away. Only the first
        vector of a subset is used, for the scores.

        Args:
            gaps: ``[subsets, d]``, the difference of the means, on whose side the vectors are put.

        Returns:
            ``[subsets, k, d]``, of which all but the first subset have only their first vector.
        """
        size, pairs = self._dump.hidden_size, self._counts["positive"]
        few = np.concatenate(list(self._differences(self._subsets[0]))) if pairs <= size else None
        whole = self._gram(self._subsets[0]) if few is None else few @ few.T
        values, vectors = np.linalg.eigh(whole)
        rank = self._options.rank
        if values[-rank] <= NOTHING_LEFT**2 * values[-1]:
            raise DirectionsError(
                f"{self._where}: the paired differences span fewer than {rank} dimensions; lower --rank"
            )
        bases = np.zeros((len(gaps), rank, size))
        for number, (subset, gap) in enumerate(zip(self._subsets, gaps, strict=True)):
            member = np.resize(subset, pairs) if few is not None else slice(None)
            if not number:
                found = vectors.T[::-1][:rank]
            elif few is not None:
                found = _leading(whole[member][:, member], vectors[member, -_START:])[None]
            else:
                found = _leading(whole - self._gram(~subset), vectors[:, -_START:])[None]
            found = orthonormal(found if few is None else found @ few[member])
            bases[number, : len(found)] = found * np.where(found @ gap < 0, -1.0, 1.0)[:, None]
        return bases

    def _gram(self, subset: np.ndarray) -> np.ndarray:
        """Returns the Gram matrix ``[d, d]`` of the paired differences of the prompts in some groups."""
        total = np.zeros((self._dump.hidden_size,) * 2)
        for rows in self._differences(subset):
            total += rows.T @ rows
        return total

    def _differences(self, subset: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the paired differences of the prompts in some groups, ``[pairs, d]``."""
        for positive, negative in zip(self._rounds("positive"), self._rounds("negative"), strict=True):
            yield (positive - negative)[:, subset[: positive.shape[1]]].reshape(-1, positive.shape[2])


def _leading(gram: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns the unit eigenvector of the largest eigenvalue, by subspace iteration from vectors near it.

    A residual that is small beside the distance to the next eigenvalue bounds the error (Parlett, "The symmetric
    eigenvalue problem", 1980, section 11.7). Where that takes too many steps, all eigenvectors are computed.

    Args:
        gram: ``[n, n]``, symmetric, no eigenvalue negative.
        start: ``[n, m]``.
    """
    block = start
    for _ in range(_EIGEN_STEPS if min(start.shape) > 1 else 0):
        block = np.linalg.qr(block)[0]
        image = gram @ block
        values, turn = np.linalg.eigh(block.T @ image)
        vector: np.ndarray = block @ turn[:, -1]
        residual = np.linalg.norm(image @ turn[:, -1] - values[-1] * vector)
        if residual <= _EIGEN_TOLERANCE * (values[-1] - values[-2]):
            return vector
        block = image
    largest: np.ndarray = np.linalg.eigh(gram)[1][:, -1]
    return largest


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive lies above a negative, ties counting half (Mann and Whitney, 1947)."""
    return pairs_in_order(negative, positive) / (2 * len(positive) * len(negative))
