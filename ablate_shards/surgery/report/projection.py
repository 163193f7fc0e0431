"""Projects activations into the plane in which a direction shows: along it, and where the rest spreads most."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ablate_shards.errors import ActivationsError
from ablate_shards.surgery.directions.activations import LABELS, ActivationDump, Label

__all__ = ["LayerProjection", "project_into_plane"]

#: Points of all layers together; what a page can carry and draw at once.
_MOST_POINTS = 20_000
_MOST_PROMPTS = 300


@dataclass(frozen=True, slots=True)
class LayerProjection:
    """One layer's prompts in the plane.

    Attributes:
        layer: The layer.
        positive: ``[prompts, 2]`` float64: along the direction, and along the first principal component of what is
            left without it; the origin is the mean of all prompts.
        negative: The same of the other class.
        share: The share of the variance outside the direction that the second axis explains, in [0, 1].
    """

    layer: int
    positive: np.ndarray
    negative: np.ndarray
    share: float


def project_into_plane(dump: ActivationDump, basis: Mapping[int, np.ndarray]) -> tuple[LayerProjection, ...]:
    """Projects the activations of every layer that has a direction.

    Of many prompts an evenly spaced selection is taken, the same one in every layer.

    Args:
        dump: The activations.
        basis: ``[k, d]`` with orthonormal rows, by layer; the first row is the axis.

    Raises:
        ActivationsError: The sizes do not fit, or a value is not finite.
    """
    layers = [layer for layer in dump.layers if layer in basis]
    if not layers or dump.means_only:
        return ()
    if basis[layers[0]].shape[1] != dump.hidden_size:
        raise ActivationsError(
            f"{dump.path}: its hidden size is {dump.hidden_size}, that of the directions {basis[layers[0]].shape[1]}"
        )
    most = max(8, min(_MOST_PROMPTS, _MOST_POINTS // (2 * len(layers))))
    return tuple(_project_layer(dump, layer, basis[layer].astype(np.float64), most) for layer in layers)


def _project_layer(dump: ActivationDump, layer: int, basis: np.ndarray, most: int) -> LayerProjection:
    drawn = [_draw(dump, layer, label, most) for label in LABELS]
    rows = np.concatenate(drawn)
    if not np.isfinite(rows).all():
        raise ActivationsError(f"{dump.path}: layer {layer} holds values that are not finite; capture it again")
    rows -= rows.mean(axis=0)
    rest = rows - (rows @ basis.T) @ basis
    # By the smaller of the two Gram matrices, since prompts are few and dimensions many.
    values, vectors = np.linalg.eigh(rest @ rest.T)
    second = vectors[:, -1] * np.sqrt(max(values[-1], 0.0))
    # The sign of a component is free; fixed, the same dump gives the same picture.
    second *= np.sign(second[np.abs(second).argmax()]) or 1.0
    plane = np.stack([rows @ basis[0], second], axis=1)
    whole = float(np.trace(rest @ rest.T))
    first = len(drawn[0])
    return LayerProjection(layer, plane[:first], plane[first:], float(values[-1]) / whole if whole > 0 else 0.0)


def _draw(dump: ActivationDump, layer: int, label: Label, most: int) -> np.ndarray:
    """Returns at most ``most`` prompts, evenly spaced, ``[prompts, d]`` float64."""
    count = dump.counts(layer)[LABELS.index(label)]
    wanted = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    kept, start = [], 0
    for chunk in dump.chunks(layer, label):
        inside = wanted[(wanted >= start) & (wanted < start + len(chunk))] - start
        kept.append(chunk[inside].copy())
        start += len(chunk)
    return np.concatenate(kept)
