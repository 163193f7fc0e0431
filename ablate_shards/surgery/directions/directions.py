"""Computes directions from activations, scores them honestly, reads and writes them."""

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ablate_shards.errors import ActivationsError, CheckpointError, DirectionsError, UsageError
from ablate_shards.kernels.measure.grouped import add_group_sums, group_dots, pairs_in_order
from ablate_shards.surgery.checkpoint.checkpoint import read_header
from ablate_shards.surgery.directions.activations import (
    LABELS,
    MEASUREMENT_SUFFIXES,
    ActivationDump,
    Kept,
    Label,
    read_npz,
    read_pickled_tensors,
)

__all__ = [
    "DIRECTIONS_FORMAT",
    "Directions",
    "Estimator",
    "EstimatorOptions",
    "LayerScore",
    "apply_gain",
    "biproject",
    "compute_directions",
    "read_directions",
    "score_table",
    "write_directions",
]

DIRECTIONS_FORMAT = "ablate-shards.directions/1"

Estimator = Literal["mean-difference", "geometric-median", "svd"]

_FOLDS = 5
_WORKERS = 4
#: What of a layer's activations of one label is read once and kept for the next pass; each worker keeps both labels.
_KEPT_BYTES = 32 << 20
#: Where in the stack the best layer is looked for, as a share of the last layer's index.
_MIDDLE = (0.4, 0.9)
_NOTHING_LEFT = 1e-6
_SAME_MEAN = 1e-12
_NO_SPREAD = 1e-12
_ORTHONORMAL = 1e-4
_LARGEST = float(np.finfo(np.float32).max)
_TINY = float(np.finfo(np.float64).tiny)
_WEISZFELD_STEPS = 200
_WEISZFELD_TOLERANCE = 1e-7
_WEISZFELD_SMOOTHING = 1e-4
_NO_DISTANCE = 1e-100
#: Eigenvectors that the search for one of nearly the same matrix starts from, and when it ends.
_START = 8
_EIGEN_STEPS = 50
_EIGEN_TOLERANCE = 1e-12
_NAME = re.compile(r"(?P<kind>direction|reference)\.layers\.(?P<layer>0|[1-9]\d{0,4})")
_GGUF_NAME = re.compile(r"direction\.(?P<layer>0|[1-9]\d{0,4})")
_MEASURED_NAME = re.compile(r"(?P<kind>refuse|harmful|harmless)_(?P<index>0|[1-9]\d{0,4})")


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


@dataclass(frozen=True, slots=True)
class LayerScore:
    """How good a layer's (first) direction is; None where the prompts are too few or unknown.

    Attributes:
        layer: The layer.
        cosine: Between the two class means.
        contrast: Norm of the difference of the class means, relative to the larger of their norms.
        purity: Norm left of the unit direction after the reference mean is projected out.
        signal_to_noise: Gap of the class means along held-out directions, over the pooled deviation.
        auc: Area under the curve of held-out prompts, along directions that did not see them.
        split_half: Cosine of the directions of two halves of the prompts.
    """

    layer: int
    cosine: float
    contrast: float
    purity: float
    signal_to_noise: float | None = None
    auc: float | None = None
    split_half: float | None = None


@dataclass(frozen=True)
class Directions:
    """Directions by layer, before biprojection.

    Attributes:
        basis: ``[k, d]`` float32 with orthonormal rows, by layer.
        reference: ``[d]`` float32, the mean of the negatives, by layer; may be missing in foreign files.
        scores: By layer; may be missing in foreign files.
        metadata: What the file says of itself.
    """

    basis: Mapping[int, np.ndarray]
    reference: Mapping[int, np.ndarray]
    scores: Mapping[int, LayerScore] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, ascending."""
        return tuple(sorted(self.basis))

    @property
    def hidden_size(self) -> int:
        """Length of a direction."""
        return int(self.basis[self.layers[0]].shape[1])

    @property
    def rank(self) -> int:
        """Directions per layer."""
        return int(self.basis[self.layers[0]].shape[0])

    def sha256(self) -> str:
        """Returns the digest of the directions and reference means, whatever file they came from."""
        digest = hashlib.sha256()
        for kind, arrays in (("direction", self.basis), ("reference", self.reference)):
            for layer in sorted(arrays):
                digest.update(f"{kind}.layers.{layer} {list(arrays[layer].shape)}\n".encode())
                digest.update(np.ascontiguousarray(arrays[layer], "<f4").tobytes())
        return digest.hexdigest()

    def best_layer(self) -> int:
        """Returns the layer past the middle whose direction separates best and is purest.

        That is the highest signal-to-noise times purity. Where a signal-to-noise is unknown, it is llm-abliteration's
        estimate from the class means for all: contrast times one minus cosine, times purity. Only layers between
        0.4 and 0.9 of the last are looked at, if there are any. ``docs/directions.md`` says why.

        Raises:
            DirectionsError: There are no scores.
        """
        if len(self.basis) == 1:
            return self.layers[0]
        if not self.scores:
            raise DirectionsError(
                "the directions carry no scores, so the best layer is not known; choose with --source-layer N or own"
            )
        last = max(self.layers)
        middle = [layer for layer in self.scores if _MIDDLE[0] * last <= layer <= _MIDDLE[1] * last]
        candidates = [self.scores[layer] for layer in middle or self.scores]
        measured = all(score.signal_to_noise is not None for score in candidates)

        def quality(score: LayerScore) -> tuple[float, int]:
            signal = score.signal_to_noise if measured else None
            if signal is None:
                signal = score.contrast * (1 - score.cosine)
            return signal * score.purity, score.layer

        return max(candidates, key=quality).layer


def compute_directions(
    dump: ActivationDump, options: EstimatorOptions, *, progress: Callable[[int, int], None] | None = None
) -> Directions:
    """Computes one basis per layer and scores it; all statistics are float64.

    Args:
        dump: The activations.
        options: The estimator.
        progress: Called with the layers done and their number.

    Returns:
        The directions; the reference means are those of the activations as winsorised.

    Raises:
        ActivationsError: A value is not finite, or the labels do not pair up where they must.
        DirectionsError: Positives equal negatives, or the rank is too high.
    """
    if dump.means_only:
        if options != EstimatorOptions():
            raise ActivationsError(
                f"{dump.path}: holds class means, of which only mean-difference can be taken; capture an activation "
                "dump for another estimator or to winsorize"
            )
        return read_directions(dump.path)
    basis, reference, scores = {}, {}, {}
    # The svd estimator spends its time in LAPACK, which has threads of its own, and needs a Gram matrix in each.
    workers = 1 if options.estimator == "svd" else min(_WORKERS, os.cpu_count() or 1)
    local = threading.local()

    def solve(layer: int) -> tuple[np.ndarray, np.ndarray, LayerScore]:
        if not hasattr(local, "kept"):
            local.kept = {label: Kept(_KEPT_BYTES) for label in LABELS}
        return _Layer(dump, layer, options, local.kept).solve()

    with ThreadPoolExecutor(workers) as pool:
        solved = pool.map(solve, dump.layers)
        for done, layer in enumerate(dump.layers, 1):
            basis[layer], reference[layer], scores[layer] = next(solved)
            if progress is not None:
                progress(done, len(dump.layers))
    metadata = {key: value for key, value in dump.metadata.items() if key not in ("format", "hidden_size")}
    metadata["estimator"] = json.dumps(asdict(options))
    return Directions(basis, reference, scores, metadata)


class _Layer:
    """The passes over one layer's activations.

    Prompt p is in group p mod the number of groups, whatever its label, so that pairs stay together; folds and
    halves are sets of groups. Every estimator works on several subsets of the prompts at once, in the same passes:
    all of them; all but each fold; each half.
    """

    def __init__(self, dump: ActivationDump, layer: int, options: EstimatorOptions, kept: Mapping[Label, Kept]) -> None:
        self._dump, self._layer, self._options, self._kept = dump, layer, options, kept
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
            bases = _unit(gaps)[:, None]
        elif self._options.estimator == "geometric-median":
            bases = _unit(self._medians("positive", positive) - self._medians("negative", negative))[:, None]
        else:
            bases = self._singular(gaps)
        measured = self._held_out(bases[:, 0], (positive + negative) / 2) if self._folds else (None, None, None)
        score = _score(self._layer, positive[0], negative[0], gaps[0], bases[0, 0])
        score = LayerScore(score.layer, score.cosine, score.contrast, score.purity, *measured)
        return bases[0].astype(np.float32), negative[0].astype(np.float32), score

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
            if not np.abs(sums).max() <= _LARGEST:
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
        if not (usable := largest <= _LARGEST / self._counts[label]).all():
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
        if values[-rank] <= _NOTHING_LEFT**2 * values[-1]:
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
            found = _orthonormal(found if few is None else found @ few[member])
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


def biproject(basis: np.ndarray, references: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Makes directions orthogonal to reference means, by Gram-Schmidt in two passes, and orthonormal again.

    Args:
        basis: ``[k, d]``, orthonormal rows.
        references: Vectors ``[d]``; zero and repeated ones do not count.

    Returns:
        ``[k, d]`` float64 with orthonormal rows, and the smallest norm that was left of a direction.

    Raises:
        DirectionsError: Less than 1e-6 is left of a direction.
    """
    axes = np.empty((0, basis.shape[1]))
    for reference in references:
        rest = _project_out(_unit(reference.astype(np.float64)), axes)
        if np.linalg.norm(rest) > _NOTHING_LEFT:
            axes = np.vstack([axes, _unit(_project_out(_unit(rest), axes))])
    rest = _project_out(basis.astype(np.float64), axes)
    left = _smallest(rest)
    if left < _NOTHING_LEFT:
        raise DirectionsError(f"only {left:.1e} of it is left; use --no-biproject or another --source-layer")
    return _orthonormal(_project_out(_orthonormal(rest), axes)), left


def apply_gain(basis: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Carries directions backwards through a norm's gain: ``R diag(g)``, orthonormal again.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        gain: ``[d]`` float64, what the norm multiplies by.

    Returns:
        ``[k, d]`` float64, orthonormal rows.

    Raises:
        DirectionsError: The gain is zero along a direction.
    """
    carried = basis * gain
    if _smallest(carried) <= _NOTHING_LEFT * float(np.abs(gain).max(initial=0)):
        raise DirectionsError(
            "the post-norm gain is zero along a direction, so its output never carries it; leave it out with --layers"
        )
    return _orthonormal(carried)


def score_table(directions: Directions) -> list[dict[str, int | float | None]]:
    """Returns a row per scored layer, ascending."""
    return [asdict(directions.scores[layer]) for layer in sorted(directions.scores)]


def write_directions(directions: Directions, path: Path) -> None:
    """Writes directions as safetensors; the file appears complete or not at all, the same bytes every time.

    Raises:
        OSError: It cannot be written.
    """
    tensors = {
        f"{kind}.layers.{layer}": np.ascontiguousarray(arrays[layer], "<f4")
        for kind, arrays in (("direction", directions.basis), ("reference", directions.reference))
        for layer in sorted(arrays)
    }
    scores = json.dumps(score_table(directions))
    # By hand, since the library writes metadata in an order that changes from call to call.
    header: dict[str, object] = {"__metadata__": {**directions.metadata, "format": DIRECTIONS_FORMAT, "scores": scores}}
    end = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    staged = path.with_name(f".{path.name}.partial")
    try:
        with staged.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(array.data for array in tensors.values())
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read_directions(path: Path) -> Directions:
    """Reads directions: our own file, ``.npz`` with its names, GGUF control vectors, llm-abliteration's ``.pt``.

    Foreign directions of any length are made orthonormal. ``docs/directions.md`` says how layers are counted.

    Raises:
        DirectionsError: The file is missing, malformed, or holds no usable directions.
    """
    try:
        if path.suffix in MEASUREMENT_SUFFIXES:
            return _read_measurements(path)
        if path.suffix == ".gguf":
            return _checked(path, _orthonormal_each(path, _read_gguf(path)), {})
        if path.suffix == ".npz":
            basis, reference = _by_name(path, read_npz(path))
            return _checked(path, _orthonormal_each(path, basis), reference)
        return _read_own(path)
    except (ActivationsError, CheckpointError) as error:
        raise DirectionsError(str(error)) from error


def _read_own(path: Path) -> Directions:
    shard, metadata = read_header(path)
    if (found := metadata.get("format", "not given")) != DIRECTIONS_FORMAT:
        names = ", ".join(tensor.name for tensor in shard.tensors[:2]) or "no tensors"
        raise DirectionsError(
            f"{path}: its format is {found} (holds {names}), expected {DIRECTIONS_FORMAT}; "
            "make it with `ablate-shards directions`, or update ablate-shards"
        )
    arrays = {}
    with path.open("rb") as file:
        for tensor in shard.tensors:
            if tensor.dtype != "F32":
                raise DirectionsError(f"{path}: {tensor.name} is {tensor.dtype}, expected F32; compute it again")
            file.seek(tensor.start)
            arrays[tensor.name] = np.frombuffer(file.read(tensor.end - tensor.start), "<f4").reshape(tensor.shape)
    basis, reference = _by_name(path, arrays)
    kept = {key: value for key, value in metadata.items() if key not in ("format", "scores")}
    return _checked(path, basis, reference, _read_scores(path, metadata.get("scores", "[]"), basis), kept)


def _read_scores(path: Path, text: str, layers: Mapping[int, Any]) -> dict[int, LayerScore]:
    try:
        scores = [LayerScore(**row) for row in json.loads(text)]
    except (ValueError, TypeError, RecursionError) as error:
        raise DirectionsError(f"{path}: the scores in its metadata cannot be read; compute it again") from error
    numbers = [item for item in fields(LayerScore) if item.name != "layer"]
    for score in scores:
        values = [(getattr(score, item.name), item.default is MISSING) for item in numbers]
        if (
            type(score.layer) is not int
            or score.layer not in layers
            or not all(_is_number(value) or (value is None and not needed) for value, needed in values)
        ):
            raise DirectionsError(f"{path}: its scores do not fit its layers or are no numbers; compute it again")
    return {score.layer: score for score in scores}


def _is_number(value: object) -> bool:
    # A bound rather than a look for infinities, since an integer may be too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _read_measurements(path: Path) -> Directions:
    """Reads llm-abliteration's measurements, whose index N counts hidden_states: after decoder layer N - 1."""
    found: dict[str, dict[int, np.ndarray]] = {"refuse": {}, "harmful": {}, "harmless": {}}
    for name, values in read_pickled_tensors(path).items():
        if (match := _MEASURED_NAME.fullmatch(name)) and int(match["index"]):
            if values.dtype != np.float64 or values.ndim != 1:
                raise DirectionsError(
                    f"{path}: {name} is {values.dtype} {list(values.shape)}, expected floating-point [hidden size]"
                )
            found[match["kind"]][int(match["index"]) - 1] = values
    refuse, harmful, harmless = found.values()
    basis = _orthonormal_each(path, refuse)
    directions = _checked(path, basis, harmless)
    scores = {
        layer: _score(layer, harmful[layer], harmless[layer], gap, basis[layer][0])
        for layer, gap in refuse.items()
        if layer in harmful and layer in harmless
    }
    return Directions(directions.basis, directions.reference, scores)


def _read_gguf(path: Path) -> dict[int, np.ndarray]:
    """Reads a control vector: llama.cpp and repeng add ``direction.N`` to the output of decoder layer N."""
    try:
        import gguf
    except ImportError as error:
        raise DirectionsError(f"{path}: GGUF files need the gguf package: pip install 'ablate-shards[gguf]'") from error
    try:
        tensors = gguf.GGUFReader(path).tensors
    except FileNotFoundError as error:
        raise DirectionsError(f"{path}: the file does not exist") from error
    except Exception as error:
        raise DirectionsError(f"{path}: not a GGUF control vector ({error}); fetch it again") from error
    basis = {}
    for tensor in tensors:
        if match := _GGUF_NAME.fullmatch(tensor.name):
            if tensor.data.dtype.kind != "f":
                kind = tensor.tensor_type.name
                raise DirectionsError(f"{path}: {tensor.name} is {kind}, expected F32 or F16; export it unquantised")
            basis[int(match["layer"])] = np.array(tensor.data, np.float64)
    return basis


def _by_name(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    found: dict[str, dict[int, np.ndarray]] = {"direction": {}, "reference": {}}
    for name, array in arrays.items():
        if (match := _NAME.fullmatch(name)) is None:
            raise DirectionsError(
                f"{path}: holds {name}, expected direction.layers.N and reference.layers.N only; remove it"
            )
        found[match["kind"]][int(match["layer"])] = array
    return found["direction"], found["reference"]


def _orthonormal_each(path: Path, basis: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    found = {}
    for layer, array in basis.items():
        rows = np.atleast_2d(array).astype(np.float64)
        if rows.ndim == 2 and np.isfinite(rows).all():
            rows = _unit(rows)
            if len(rows) > rows.shape[1] or _smallest(rows) < _NOTHING_LEFT:
                raise DirectionsError(
                    f"{path}: the {len(rows)} rows of layer {layer} span fewer dimensions; compute them again"
                )
            rows = _orthonormal(rows)
        found[layer] = rows
    return found


def _checked(
    path: Path,
    basis: Mapping[int, np.ndarray],
    reference: Mapping[int, np.ndarray],
    scores: Mapping[int, LayerScore] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Directions:
    """Refuses what is no basis."""
    if not basis:
        raise DirectionsError(f"{path}: holds no directions of decoder layers; expected direction.layers.N")
    first = min(basis)
    shape = basis[first].shape
    for layer, rows in sorted(basis.items()):
        if rows.ndim != 2 or not rows.size:
            raise DirectionsError(
                f"{path}: the direction of layer {layer} has shape {list(rows.shape)}, expected [k, d]"
            )
        if rows.shape != shape:
            raise DirectionsError(
                f"{path}: the direction of layer {layer} has shape {list(rows.shape)}, that of layer {first} "
                f"{list(shape)}; compute all layers from one model"
            )
        if not np.isfinite(rows).all():
            raise DirectionsError(
                f"{path}: the direction of layer {layer} holds NaN or infinite values; compute it again"
            )
        exact = rows.astype(np.float64)
        if not (error := np.abs(exact @ exact.T - np.eye(len(rows))).max()) <= _ORTHONORMAL:
            raise DirectionsError(
                f"{path}: the rows of layer {layer} are {error:.1e} from orthonormal; compute them again"
            )
    for layer, array in reference.items():
        if array.shape != shape[1:] or not np.abs(array).max() <= _LARGEST:
            raise DirectionsError(f"{path}: the reference of layer {layer} is not a finite vector of {shape[1]}")
    return Directions(
        {layer: basis[layer].astype(np.float32) for layer in sorted(basis)},
        {layer: reference[layer].astype(np.float32) for layer in sorted(reference)},
        scores or {},
        metadata or {},
    )


def _score(
    layer: int, positive: np.ndarray, negative: np.ndarray, gap: np.ndarray, direction: np.ndarray
) -> LayerScore:
    """Scores a unit direction by the class means alone; ``gap`` is their difference, or what is taken for it."""
    norms = float(np.linalg.norm(positive)), float(np.linalg.norm(negative))
    return LayerScore(
        layer=layer,
        cosine=float(_unit(positive) @ _unit(negative)),
        contrast=float(np.linalg.norm(gap)) / max(*norms, _TINY),
        purity=float(np.linalg.norm(_project_out(direction, _unit(negative)[None]))),
    )


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


def _project_out(vectors: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Removes orthonormal axes ``[m, d]`` from vectors ``[..., d]``."""
    rest: np.ndarray = vectors - (vectors @ axes.T) @ axes
    return rest


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis of the rows' span; the first row keeps its direction."""
    q, r = np.linalg.qr(rows.T)
    return np.ascontiguousarray((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T)


def _smallest(rows: np.ndarray) -> float:
    """Returns the smallest singular value."""
    return float(np.linalg.svd(rows, compute_uv=False)[-1])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors ``[..., d]`` to norm 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
