"""Other directions, such as a topic's or a style's, that directions are made orthogonal to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablate_shards.errors import DirectionsError
from ablate_shards.surgery.directions.activations import ActivationDump
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.directions.vectors import NOTHING_LEFT, orthogonal_to, span

__all__ = ["Without", "read_without"]


@dataclass(frozen=True)
class Without:
    """What is taken out of the directions of a dump.

    Attributes:
        axes: ``[m, d]`` float64 with orthonormal rows, what the rows of all files span, by layer.
        files: Name and digest of each file of directions.
    """

    axes: Mapping[int, np.ndarray]
    files: tuple[tuple[str, str], ...]

    def take_out(self, layer: int, basis: np.ndarray, where: str) -> tuple[np.ndarray, float]:
        """Makes a layer's directions orthogonal to the axes and orthonormal again.

        Args:
            layer: The layer.
            basis: ``[k, d]``, orthonormal rows.
            where: The dump and the layer, for an error.

        Returns:
            ``[k, d]`` float64, and the smallest norm that was left of a direction.

        Raises:
            DirectionsError: Less than 1e-6 is left of a direction.
        """
        found, left = orthogonal_to(self.axes[layer], basis)
        if left < NOTHING_LEFT:
            names = " and ".join(name for name, _ in self.files)
            raise DirectionsError(
                f"{where}: only {left:.1e} of the direction is left without that of {names}, as the two are the same; "
                "leave --without out, or name other directions"
            )
        return found, left

    def as_metadata(self) -> str:
        """Returns names and digests as the metadata of a directions file keep them."""
        return json.dumps([{"file": name, "sha256": digest} for name, digest in self.files])


def read_without(files: Sequence[Path], dump: ActivationDump) -> Without | None:
    """Reads the directions to take out of those of a dump; None where there are no files.

    Raises:
        DirectionsError: A file cannot be read, lacks a layer of the dump, or has another hidden size.
    """
    if not files:
        return None
    others = [read_directions(path) for path in files]
    for path, other in zip(files, others, strict=True):
        if other.hidden_size != dump.hidden_size:
            raise DirectionsError(
                f"{path}: its directions, such as that of layer {other.layers[0]}, have hidden size "
                f"{other.hidden_size}, but the activations of {dump.path} have {dump.hidden_size}; name directions of "
                "the same model"
            )
        if missing := [layer for layer in dump.layers if layer not in other.basis]:
            raise DirectionsError(
                f"{path}: holds no direction of layer {missing[0]}, which {dump.path} has; name directions of every "
                "layer of the dump"
            )
    return Without(
        {
            layer: span([row for other in others for row in other.basis[layer]], dump.hidden_size)
            for layer in dump.layers
        },
        tuple((path.name, other.sha256()) for path, other in zip(files, others, strict=True)),
    )
