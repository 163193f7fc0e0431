"""Computes directions from activations, scores them honestly, reads and writes them."""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

from ablate_shards.errors import ActivationsError, CheckpointError, DirectionsError
from ablate_shards.surgery.activations import LABELS, ActivationDump, Label, read_npz, read_pickled_tensors
from ablate_shards.surgery.checkpoint import read_header

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

FOLDS = 5
_NOTHING_LEFT = 1e-6
_ORTHONORMAL = 1e-4
_WEISZFELD_STEPS = 200
_WEISZFELD_TOLERANCE = 1e-9
_NAME = re.compile(r"(?P<kind>direction|reference)\.layers\.(?P<layer>\d{1,5})")
_GGUF_NAME = re.compile(r"direction\.(?P<layer>\d{1,5})")
_REFUSE_NAME = re.compile(r"(?P<kind>refuse|harmless)_(?P<layer>\d{1,5})")


@dataclass(frozen=True, slots=True)
class EstimatorOptions:
    """How directions are computed.

    Attributes:
        estimator: ``mean-difference``; ``geometric-median`` of each class; ``svd`` of the paired differences.
        rank: Directions per layer; above 1 only with ``svd``.
        winsorize: Clip each prompt's activations at this quantile of their magnitudes; None leaves them.

    Raises:
        DirectionsError: The options contradict one another.
    """

    estimator: Estimator = "mean-difference"
    rank: int = 1
    winsorize: float | None = None

    def __post_init__(self) -> None:
        """Refuses what has no meaning."""
        if self.rank > 1 and self.estimator != "svd":
            raise DirectionsError(f"rank {self.rank} needs the svd estimator; {self.estimator} gives one direction")
        if self.winsorize is not None and not 0.5 < self.winsorize <= 1:
            raise DirectionsError(f"winsorize: expected a quantile above 0.5, at most 1, found {self.winsorize}")


@dataclass(frozen=True, slots=True)
class LayerScore:
    """How good a layer's direction is; None where the prompts are too few or unknown.

    Attributes:
        layer: The layer.
        cosine: Between the two class means.
        signal_to_noise: Gap of the class means along held-out directions, over the pooled deviation.
        purity: Norm left after the reference mean is projected out.
        auc: Area under the curve of held-out prompts, along directions that did not see them.
        split_half: Cosine of the directions of two halves of the prompts.
    """

    layer: int
    cosine: float
    signal_to_noise: float | None
    purity: float
    auc: float | None
    split_half: float | None


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
        """Returns the middle layer whose direction separates best and is purest.

        The criterion is signal-to-noise times purity; where the prompts are unknown, one minus the cosine of
        the means, times purity. The first fifth and the last tenth of the layers are left out (if any other
        remain): their directions separate tokens rather than concepts.

        Raises:
            DirectionsError: There are no scores.
        """
        if len(self.basis) == 1:
            return self.layers[0]
        if not self.scores:
            raise DirectionsError(
                "the directions carry no scores, so the best layer is not known; choose with --source-layer N or own"
            )
        known = all(score.signal_to_noise is not None for score in self.scores.values())
        top = max(self.layers) + 1
        middle = [layer for layer in self.scores if 0.2 * top <= layer < 0.9 * top] or list(self.scores)

        def quality(layer: int) -> tuple[float, int]:
            score = self.scores[layer]
            signal = score.signal_to_noise if known and score.signal_to_noise is not None else 1 - score.cosine
            return signal * score.purity, layer

        return max(middle, key=quality)


def compute_directions(
    dump: ActivationDump, options: EstimatorOptions, *, progress: Callable[[int, int], None] | None = None
) -> Directions:
    """Computes one basis per layer and scores it; all statistics are float64.

    Args:
        dump: The activations.
        options: The estimator.
        progress: Called with the layers done and their number.

    Raises:
        ActivationsError: A value is not finite, or the labels do not pair up where they must.
        DirectionsError: Positives equal negatives, or the rank is too high.
    """
    basis, reference, scores = {}, {}, {}
    for number, layer in enumerate(dump.layers):
        basis[layer], reference[layer], scores[layer] = _Layer(dump, layer, options).solve()
        if progress is not None:
            progress(number + 1, len(dump.layers))
    metadata = {key: value for key, value in dump.metadata.items() if key not in ("format", "hidden_size")}
    metadata["estimator"] = json.dumps(asdict(options))
    return Directions(basis, reference, scores, metadata)


class _Layer:
    """The passes over one layer's activations."""

    def __init__(self, dump: ActivationDump, layer: int, options: EstimatorOptions) -> None:
        self._dump, self._layer, self._options = dump, layer, options
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
        #: Prompt p is in fold p mod folds and in half p mod 2, so that pairs stay together.
        self._folds = min(FOLDS, fewest)
        self._groups = 2 * self._folds if self._folds > 1 else 1

    def solve(self) -> tuple[np.ndarray, np.ndarray, LayerScore]:
        sums: dict[Label, np.ndarray] = {}
        sizes: dict[Label, np.ndarray] = {}
        for label in LABELS:
            sums[label], sizes[label] = self._group_sums(label)
        means = {label: sums[label].sum(0) / self._counts[label] for label in sums}
        gap = means["positive"] - means["negative"]
        scale = max(np.linalg.norm(means["positive"]), np.linalg.norm(means["negative"]))
        if not np.linalg.norm(gap) > 1e-12 * scale:
            raise DirectionsError(
                f"{self._where}: positive and negative activations have the same mean, so there is no direction; "
                "check that the dump was captured from different prompts"
            )
        basis = self._basis(range(self._groups), sums, sizes)
        cosine = float(means["positive"] @ means["negative"]) / max(
            float(np.linalg.norm(means["positive"]) * np.linalg.norm(means["negative"])), 1e-300
        )
        unit = _unit(means["negative"])
        purity = math.sqrt(max(0.0, 1 - float(basis[0] @ unit) ** 2))
        signal, auc, half = (None, None, None) if self._folds < 2 else self._held_out(sums, sizes)
        score = LayerScore(self._layer, cosine, signal, purity, auc, half)
        return basis.astype(np.float32), means["negative"].astype(np.float32), score

    def _group_sums(self, label: Label) -> tuple[np.ndarray, np.ndarray]:
        sums = np.zeros((self._groups, self._dump.hidden_size))
        sizes = np.zeros(self._groups)
        for groups, values in self._chunks(label):
            member = (groups == np.arange(self._groups)[:, None]).astype(np.float64)
            sums += member @ values
            sizes += member.sum(1)
        return sums, sizes

    def _chunks(self, label: Label, keep: Iterable[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the groups and the (winsorised) activations of the prompts in the groups to keep."""
        done = 0
        kept = None if keep is None else np.isin(np.arange(self._groups), list(keep))
        for values in self._dump.chunks(self._layer, label):
            groups = np.arange(done, done + len(values)) % self._groups
            done += len(values)
            if kept is not None:
                values, groups = values[kept[groups]], groups[kept[groups]]
            if (quantile := self._options.winsorize) is not None:
                limit = np.quantile(np.abs(values), quantile, axis=1, keepdims=True)
                values = np.clip(values, -limit, limit)
            yield groups, values

    def _basis(
        self, groups: Iterable[int], sums: Mapping[Label, np.ndarray], sizes: Mapping[Label, np.ndarray]
    ) -> np.ndarray:
        """Returns ``[k, d]`` from the prompts of some groups."""
        chosen = list(groups)
        means = {label: sums[label][chosen].sum(0) / sizes[label][chosen].sum() for label in sums}
        gap = means["positive"] - means["negative"]
        if self._options.estimator == "mean-difference":
            return _unit(gap)[None]
        if self._options.estimator == "geometric-median":
            medians = [self._median(label, chosen, means[label]) for label in LABELS]
            return _unit(medians[0] - medians[1])[None]
        return self._singular(chosen, gap)

    def _median(self, label: Label, groups: Sequence[int], start: np.ndarray) -> np.ndarray:
        """Geometric median by Weiszfeld's iteration, from the mean."""
        point = start
        for _ in range(_WEISZFELD_STEPS):
            total, weight = np.zeros_like(point), 0.0
            for _, values in self._chunks(label, groups):
                inverse = 1 / np.maximum(np.linalg.norm(values - point, axis=1), 1e-12)
                total += inverse @ values
                weight += float(inverse.sum())
            moved = total / weight
            if np.linalg.norm(moved - point) <= _WEISZFELD_TOLERANCE * np.linalg.norm(moved):
                return moved
            point = moved
        return point

    def _singular(self, groups: Sequence[int], gap: np.ndarray) -> np.ndarray:
        """Top right singular vectors of the uncentred paired differences, through the smaller Gram matrix."""
        size = self._dump.hidden_size
        rows: list[np.ndarray] = []
        gram: np.ndarray | None = None
        pairs = zip(
            _rows(values for _, values in self._chunks("positive", groups)),
            _rows(values for _, values in self._chunks("negative", groups)),
            strict=True,
        )
        while batch := list(itertools.islice(pairs, size)):
            rows.append(np.array([positive - negative for positive, negative in batch]))
            if len(rows) > 1 or gram is not None:
                part = sum((block.T @ block for block in rows), np.zeros((size, size)))
                gram = part if gram is None else gram + part
                rows = []
        if gram is None:
            vectors = np.linalg.svd(np.concatenate(rows), full_matrices=False)[2]
        else:
            gram = gram + sum((block.T @ block for block in rows), np.zeros((size, size)))
            vectors = np.linalg.eigh(gram)[1].T[::-1]
        basis = vectors[: self._options.rank]
        return basis * np.where(basis @ gap < 0, -1.0, 1.0)[:, None]

    def _held_out(
        self, sums: Mapping[Label, np.ndarray], sizes: Mapping[Label, np.ndarray]
    ) -> tuple[float | None, float, float]:
        """Returns signal-to-noise and AUC of prompts along directions that did not see them, and split-half."""
        everything = range(self._groups)
        vectors, middles = [], []
        for fold in range(self._folds):
            rest = [group for group in everything if group % self._folds != fold]
            vector = self._basis(rest, sums, sizes)[0]
            means = [sums[label][rest].sum(0) / sizes[label][rest].sum() for label in sums]
            vectors.append(vector)
            middles.append(float(vector @ (means[0] + means[1])) / 2)
        directions, offsets = np.array(vectors), np.array(middles)
        along: dict[Label, np.ndarray] = {}
        for label in sums:
            parts = []
            for groups, values in self._chunks(label):
                own = groups % self._folds
                parts.append((values @ directions.T)[np.arange(len(values)), own] - offsets[own])
            along[label] = np.concatenate(parts)
        positive, negative = along["positive"], along["negative"]
        spread = math.sqrt((float(positive.var(ddof=1)) + float(negative.var(ddof=1))) / 2)
        gap = float(positive.mean() - negative.mean())
        halves = [self._basis([g for g in everything if g % 2 == half], sums, sizes)[0] for half in (0, 1)]
        signal = gap / spread if spread > 0 else None
        return signal, _auc(positive, negative), float(halves[0] @ halves[1])


def biproject(basis: np.ndarray, references: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Makes directions orthogonal to reference means, by Gram-Schmidt in two passes, and orthonormal again.

    Args:
        basis: ``[k, d]``.
        references: Vectors ``[d]``; zero and repeated ones do not count.

    Returns:
        ``[k, d]`` float64 with orthonormal rows, and the smallest norm that was left of a direction.

    Raises:
        DirectionsError: Less than 1e-6 is left of a direction.
    """
    axes: list[np.ndarray] = []
    for reference in references:
        axis = _remove(_unit(reference.astype(np.float64)), axes)
        if (norm := float(np.linalg.norm(axis))) > _NOTHING_LEFT:
            axes.append(axis / norm)
    rest = np.array([_remove(row, axes) for row in basis.astype(np.float64)])
    left = float(np.linalg.svd(rest, compute_uv=False)[-1])
    if left < _NOTHING_LEFT:
        raise DirectionsError(f"only {left:.1e} of it is left; use --no-biproject or another --source-layer")
    return _orthonormal(rest), left


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
    if float(np.linalg.svd(carried, compute_uv=False)[-1]) < _NOTHING_LEFT * float(np.abs(gain).max(initial=0)):
        raise DirectionsError("the post-norm gain is zero along a direction, so its output never carries it")
    return _orthonormal(carried)


def score_table(directions: Directions) -> list[dict[str, int | float | None]]:
    """Returns a row per scored layer, ascending."""
    return [asdict(directions.scores[layer]) for layer in sorted(directions.scores)]


def write_directions(directions: Directions, path: Path) -> None:
    """Writes directions as safetensors; the file appears complete or not at all.

    Raises:
        OSError: It cannot be written.
    """
    tensors = {
        f"{kind}.layers.{layer}": np.ascontiguousarray(arrays[layer], np.float32)
        for kind, arrays in (("direction", directions.basis), ("reference", directions.reference))
        for layer in sorted(arrays)
    }
    metadata = {
        **directions.metadata,
        "format": DIRECTIONS_FORMAT,
        "scores": json.dumps(score_table(directions)),
    }
    staged = path.with_name(f".{path.name}.partial")
    try:
        with staged.open("wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read_directions(path: Path) -> Directions:
    """Reads directions: our own file, ``.npz`` with its names, GGUF control vectors, llm-abliteration's ``.pt``.

    Raises:
        DirectionsError: The file is missing, malformed, or holds no usable directions.
    """
    try:
        if path.suffix == ".gguf":
            return _checked(path, *_read_gguf(path))
        if path.suffix == ".npz":
            return _checked(path, *_by_name(read_npz(path), _NAME, ("direction", "reference")))
        if path.suffix in (".pt", ".pth", ".refuse"):
            return _checked(path, *_by_name(read_pickled_tensors(path), _REFUSE_NAME, ("refuse", "harmless")))
        return _read_own(path)
    except (ActivationsError, CheckpointError) as error:
        raise DirectionsError(str(error)) from error


def _read_own(path: Path) -> Directions:
    shard, metadata = read_header(path)
    if metadata.get("format") != DIRECTIONS_FORMAT:
        found = metadata.get("format", "none")
        names = ", ".join(tensor.name for tensor in shard.tensors[:2])
        raise DirectionsError(f"{path}: expected format {DIRECTIONS_FORMAT}, found {found} (holds {names})")
    arrays = {}
    with path.open("rb") as file:
        for tensor in shard.tensors:
            if tensor.dtype != "F32":
                raise DirectionsError(f"{path}: {tensor.name} is {tensor.dtype}, expected F32")
            file.seek(tensor.start)
            raw = file.read(tensor.end - tensor.start)
            arrays[tensor.name] = np.frombuffer(raw, "<f4").reshape(tensor.shape)
    try:
        rows = json.loads(metadata.get("scores", "[]"))
        scores = {row["layer"]: LayerScore(**row) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise DirectionsError(f"{path}: the scores in its metadata cannot be read; compute it again") from error
    kept = {key: value for key, value in metadata.items() if key not in ("format", "scores")}
    basis, reference = _by_name(arrays, _NAME, ("direction", "reference"))
    for layer, array in basis.items():
        if array.ndim != 2:
            raise DirectionsError(f"{path}: direction.layers.{layer} has shape {list(array.shape)}, expected [k, d]")
    return _checked(path, basis, reference, scores, kept)


def _read_gguf(path: Path) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    try:
        import gguf
    except ImportError as error:
        raise DirectionsError(f"{path}: GGUF files need the gguf package: pip install 'ablate-shards[gguf]'") from error
    try:
        tensors = gguf.GGUFReader(path).tensors
        found = {tensor.name: np.array(tensor.data, np.float32) for tensor in tensors}
    except FileNotFoundError as error:
        raise DirectionsError(f"{path}: the file does not exist") from error
    except Exception as error:
        raise DirectionsError(f"{path}: not a GGUF control vector ({error})") from error
    basis = {
        int(match["layer"]): array.reshape(1, -1)
        for name, array in found.items()
        if (match := _GGUF_NAME.fullmatch(name))
    }
    return basis, {}


def _by_name(
    arrays: Mapping[str, np.ndarray], pattern: re.Pattern[str], kinds: tuple[str, str]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    found: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in kinds}
    for name, array in arrays.items():
        if match := pattern.fullmatch(name):
            found[match["kind"]][int(match["layer"])] = array
    return found[kinds[0]], {layer: array.reshape(-1) for layer, array in found[kinds[1]].items()}


def _checked(
    path: Path,
    basis: Mapping[int, np.ndarray],
    reference: Mapping[int, np.ndarray],
    scores: Mapping[int, LayerScore] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Directions:
    """Refuses what is no basis; foreign directions of any length are made unit vectors."""
    if not basis:
        raise DirectionsError(f"{path}: holds no directions; expected tensors direction.layers.N")
    own = metadata is not None
    checked: dict[int, np.ndarray] = {}
    first = np.atleast_2d(basis[min(basis)]).shape
    for layer, array in sorted(basis.items()):
        rows = np.atleast_2d(array).astype(np.float64)
        if rows.shape != first:
            raise DirectionsError(
                f"{path}: layer {layer} has shape {list(rows.shape)}, layer {min(basis)} {list(first)}"
            )
        if not np.isfinite(rows).all() or not np.linalg.norm(rows, axis=1).all():
            raise DirectionsError(f"{path}: the direction of layer {layer} is zero, NaN or infinite; compute it again")
        if own and np.abs(rows @ rows.T - np.eye(len(rows))).max() > _ORTHONORMAL:
            raise DirectionsError(f"{path}: the directions of layer {layer} are not orthonormal; compute them again")
        checked[layer] = (rows if own else _orthonormal(rows)).astype(np.float32)
    for layer, array in reference.items():
        if array.shape != (first[1],) or not np.isfinite(array).all():
            raise DirectionsError(f"{path}: the reference of layer {layer} is not a finite vector of {first[1]}")
    references = {layer: array.astype(np.float32) for layer, array in sorted(reference.items())}
    return Directions(checked, references, scores or {}, metadata or {})


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive lies above a negative, ties counting half (Mann and Whitney, 1947)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    upto = np.searchsorted(ordered, positive, "right")
    return float((below + upto).sum() / (2 * len(positive) * len(negative)))


def _rows(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    return (row for chunk in chunks for row in chunk)


def _remove(vector: np.ndarray, axes: Sequence[np.ndarray]) -> np.ndarray:
    for _ in range(2):
        for axis in axes:
            vector = vector - (vector @ axis) * axis
    return vector


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis of the rows' span; the first row keeps its side."""
    q, r = np.linalg.qr(rows.T)
    return np.ascontiguousarray((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T)


def _unit(vector: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector
