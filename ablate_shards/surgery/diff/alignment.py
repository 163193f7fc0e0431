"""Compares the directions that changes lie along with given ones, and with one another."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ablate_shards.errors import DirectionsError
from ablate_shards.surgery.anatomy.architecture import Anatomy, Writer
from ablate_shards.surgery.anatomy.gains import is_centred, vector_of
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.diff.differences import Alignment, TensorDiff
from ablate_shards.surgery.directions.directions import Directions, apply_gain, biproject

__all__ = ["GivenDirections", "mean_cosine"]


class GivenDirections:
    """Directions that changes are compared with, as they are and as an ablation would use them."""

    def __init__(self, directions: Directions, checkpoint: Checkpoint, anatomy: Anatomy | None) -> None:
        """Takes the directions, and the checkpoint and its anatomy, which say what gain follows a writer."""
        self._directions, self._checkpoint = directions, checkpoint
        self._writers = {writer.name: writer for writer in anatomy.writers} if anatomy else {}
        self._bases: dict[tuple[int, int | None, str | None], np.ndarray | None] = {}

    def align(self, tensor: TensorDiff, bases: Sequence[np.ndarray]) -> Alignment | None:
        """Returns how the directions of a change, ``[k, d]`` each, fit; None where none is as long as those given."""
        fitting = [basis for basis in bases if basis.shape[1] == self._directions.hidden_size]
        found = {
            (source, biprojected): mean_cosine(basis, given)
            for basis in fitting
            for source, biprojected, given in self._candidates(tensor.layer, self._writers.get(tensor.name))
        }
        if not found:
            return None
        (best_layer, biprojected), best = max(found.items(), key=lambda item: (item[1], item[0]))
        own = [cosine for (source, _), cosine in found.items() if source == tensor.layer]
        return Alignment(max(own, default=None), best_layer, best, biprojected)

    def _candidates(self, layer: int | None, writer: Writer | None) -> Iterator[tuple[int, bool, np.ndarray]]:
        """Yields every given direction, its layer and whether it is biprojected, where it can be had in that form."""
        for source in self._directions.layers:
            for target in dict.fromkeys((None, layer)):
                key = (source, target, writer.gain if writer else None)
                if key not in self._bases:
                    self._bases[key] = self._basis(source, target, writer)
                if (basis := self._bases[key]) is not None:
                    yield source, target is not None, basis

    def _basis(self, source: int, target: int | None, writer: Writer | None) -> np.ndarray | None:
        """Returns a layer's directions as an ablation uses them in the target layer, as they are if that is None."""
        basis = self._directions.basis[source].astype(np.float64)
        references = self._directions.reference
        try:
            if target is not None:
                if source not in references or target not in references:
                    return None
                basis, _ = biproject(basis, [references[source], references[target]])
            if writer is not None and writer.gain is not None:
                gain = vector_of(self._checkpoint, writer.gain, writer.gain_offset)
                basis = apply_gain(basis, gain, centred=is_centred(writer.gain))
        except DirectionsError:
            return None
        return basis


def mean_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the mean cosine of the principal angles between two spaces, zero where their lengths differ."""
    if one.shape[1] != other.shape[1]:
        return 0.0
    return min(1.0, float(np.linalg.norm(one @ other.T)) / math.sqrt(min(len(one), len(other))))
