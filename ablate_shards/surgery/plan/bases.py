"""The bases that a plan removes, as the edited tensors see them."""

from collections.abc import Iterable, Mapping

import numpy as np

from ablate_shards.errors import DirectionsError
from ablate_shards.surgery.anatomy.gains import is_centred, vector_of
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.directions.directions import Directions, apply_gain, biproject
from ablate_shards.surgery.directions.vectors import NOTHING_LEFT, orthonormal
from ablate_shards.surgery.plan.edits import BasisKey, TensorEdit, neighbours

__all__ = ["resolve_bases"]


def resolve_bases(
    edits: Iterable[TensorEdit], checkpoint: Checkpoint, directions: Directions
) -> Mapping[BasisKey, np.ndarray]:
    """Computes the basis of every edit.

    Returns:
        For each key the basis to remove, ``[k, d]`` float64 with orthonormal rows: biprojected, then
        carried through the post-norm gain.

    Raises:
        DirectionsError: Nothing is left of a direction, or a reference mean is missing.
    """
    bases: dict[BasisKey, np.ndarray] = {}
    for key in dict.fromkeys(edit.basis for edit in edits):
        basis = _measured(directions, key.source_layer)
        if key.references:
            missing = [layer for layer in key.references if layer not in directions.reference]
            if missing:
                raise DirectionsError(
                    f"the directions hold no reference mean of layer {missing[0]}; biprojection needs one "
                    "for both layers, so add it or use --no-biproject"
                )
            try:
                basis, _ = biproject(basis, [directions.reference[layer] for layer in key.references])
            except DirectionsError as error:
                where = " and ".join(str(layer) for layer in key.references)
                raise DirectionsError(
                    f"direction of layer {key.source_layer}, made orthogonal to the reference means of "
                    f"layers {where}: {error}"
                ) from error
        if key.gain is not None:
            gain = vector_of(checkpoint, key.gain, key.gain_offset)
            basis = apply_gain(basis, gain, centred=is_centred(key.gain))
        bases[key] = basis
    return bases


def _measured(directions: Directions, layer: float) -> np.ndarray:
    """Returns the directions of a layer, ``[k, d]`` float64; between two layers, a mean of theirs weighted by nearness.

    Raises:
        DirectionsError: Between two layers there are several directions, or two that cancel out.
    """
    # Stored as float32, the rows are orthonormal to seven digits only.
    bases = [orthonormal(directions.basis[each].astype(np.float64)) for each in neighbours(layer)]
    if len(bases) == 1:
        return bases[0]
    if directions.rank > 1:
        raise DirectionsError(
            f"source layer {layer:g}: lies between two layers, which needs one direction per layer, but there are "
            f"{directions.rank}; name a layer"
        )
    share = layer % 1
    mean = (1 - share) * bases[0] + share * bases[1]
    if np.linalg.norm(mean) < NOTHING_LEFT:
        raise DirectionsError(f"source layer {layer:g}: the directions of its two layers cancel out; name a layer")
    return orthonormal(mean)
