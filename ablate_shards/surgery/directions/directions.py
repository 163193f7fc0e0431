"""Directions by layer and their scores: the best layer, biprojection, and the gain of a norm."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated

import numpy as np
from msgspec import Meta

from ablate_shards.errors import DirectionsError
from ablate_shards.surgery.directions.vectors import (
    LARGEST,
    NOTHING_LEFT,
    orthogonal_to,
    orthonormal,
    project_out,
    smallest_singular_value,
    span,
    unit,
)

__all__ = ["Directions", "LayerScore", "apply_gain", "biproject", "score_row", "score_table"]

#: Where in the stack the best layer is looked for, as a share of the last layer's index.
_MIDDLE = (0.4, 0.9)

_Score = Annotated[float, Meta(ge=-LARGEST, le=LARGEST, description="a finite number")]


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
        left: Norm left of the unit direction when other directions were taken out of it (the least of several rows);
            None where none were. All that is said of the direction is then said of what is left.
    """

    layer: int
    cosine: _Score
    contrast: _Score
    purity: _Score
    signal_to_noise: _Score | None = None
    auc: _Score | None = None
    split_half: _Score | None = None
    left: _Score | None = None


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
    found, left = orthogonal_to(span(references, basis.shape[1]), basis)
    if left < NOTHING_LEFT:
        raise DirectionsError(f"only {left:.1e} of it is left; use --no-biproject or another --source-layer")
    return found, left


def apply_gain(basis: np.ndarray, gain: np.ndarray, *, centred: bool = False) -> np.ndarray:
    """Carries directions backwards through a norm's gain: ``R diag(g)``, orthonormal again.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        gain: ``[d]`` float64, what the norm multiplies by.
        centred: Whether it subtracts the mean first, as LayerNorm does; then each row loses its own mean.

    Returns:
        ``[k, d]`` float64, orthonormal rows.

    Raises:
        DirectionsError: The gain is zero along a direction.
    """
    carried = basis * gain
    if centred:
        carried -= carried.mean(axis=1, keepdims=True)
    if smallest_singular_value(carried) <= NOTHING_LEFT * float(np.abs(gain).max(initial=0)):
        raise DirectionsError(
            "the post-norm gain is zero along a direction, so its output never carries it; leave it out with --layers"
        )
    return orthonormal(carried)


def score_table(directions: Directions) -> list[dict[str, int | float | None]]:
    """Returns a row per scored layer, ascending; ``left`` is in it only where directions were taken out."""
    return [score_row(directions.scores[layer]) for layer in sorted(directions.scores)]


def score_row(score: LayerScore) -> dict[str, int | float | None]:
    """Returns a layer's scores by name."""
    return {name: value for name, value in asdict(score).items() if name != "left" or value is not None}


_TINY = float(np.finfo(np.float64).tiny)


def score_by_means(
    layer: int, positive: np.ndarray, negative: np.ndarray, gap: np.ndarray, direction: np.ndarray
) -> LayerScore:
    """Scores a unit direction by the class means alone; ``gap`` is their difference, or what is taken for it."""
    norms = float(np.linalg.norm(positive)), float(np.linalg.norm(negative))
    return LayerScore(
        layer=layer,
        cosine=float(unit(positive) @ unit(negative)),
        contrast=float(np.linalg.norm(gap)) / max(*norms, _TINY),
        purity=float(np.linalg.norm(project_out(direction, unit(negative)[None]))),
    )
