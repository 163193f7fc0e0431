"""The directions that a search may remove: those of each file, of two together, without others."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ablate_shards.errors import DirectionsError, UsageError
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.directions.vectors import NOTHING_LEFT, orthogonal_to, orthonormal

__all__ = ["Contrasts", "named"]


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns files by what they are called by: their names without suffixes.

    Raises:
        UsageError: Two have one name, or one has a name that means something else.
    """
    found: dict[str, Path] = {}
    for path in paths:
        name = path.name.removesuffix(".safetensors").removesuffix(".directions").removeprefix("activations-")
        if name in found:
            raise UsageError(f"{path}: {found[name]} is called {name} as well; rename one of them")
        if name == "none" or "+" in name:
            raise UsageError(f"{path}: {name} cannot be the name of a contrast; rename the file")
        found[name] = path
    return found


class Contrasts:
    """Directions by name, made from what was read.

    Args:
        read: The directions of each file.
        without: The directions that may be taken out of them first.

    Raises:
        DirectionsError: They have not the same layers and hidden size.
    """

    def __init__(self, read: Mapping[str, Directions], without: Mapping[str, Directions]) -> None:
        self._read, self._without = read, without
        first_name, first = next(iter(read.items()))
        for name, other in (*read.items(), *without.items()):
            if (other.layers, other.hidden_size) != (first.layers, first.hidden_size):
                raise DirectionsError(
                    f"{name}: has {len(other.layers)} layers of hidden size {other.hidden_size}, but {first_name} has "
                    f"{len(first.layers)} of {first.hidden_size}; name directions of the same model"
                )
        self._made: dict[tuple[str, int | None, str | None], Directions] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that all of them have."""
        return tuple(next(iter(self._read.values())).layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Each file's, then each two of them."""
        single = tuple(self._read)
        pairs = (f"{one}+{two}" for number, one in enumerate(single) for two in single[number + 1 :])
        return (*single, *pairs)

    @property
    def rank(self) -> int:
        """The most directions per layer that every file has."""
        return min(directions.rank for directions in self._read.values())

    def sources(self) -> dict[str, tuple[int, ...]]:
        """Returns the layers of each file's directions that may serve all: the best by its scores, and the last."""
        return {
            name: tuple(dict.fromkeys((each.best_layer(), max(each.layers))))
            for name, each in self._read.items()
            if each.scores
        }

    def directions(self, name: str, rank: int | None = None, without: str | None = None) -> Directions:
        """Returns directions as a file would hold them: float32, so that an edit by the file is the same.

        Args:
            name: A file's, or two with a plus between them.
            rank: How many of each file's directions per layer, the first ones; all if None.
            without: The directions to take out of them.

        Raises:
            DirectionsError: Nothing is left of a direction.
        """
        key = name, rank, without
        if key not in self._made:
            self._made[key] = self._make(name, rank, without)
        return self._made[key]

    def _make(self, name: str, rank: int | None, without: str | None) -> Directions:
        parts = [self._read[each] for each in name.split("+")]
        if len(parts) == 1 and without is None and rank in (None, parts[0].rank):
            return parts[0]
        basis, reference = {}, {}
        for layer in parts[0].layers:
            rows = np.concatenate([part.basis[layer][:rank].astype(np.float64) for part in parts])
            rows = orthonormal(rows)
            if without is not None:
                rows, left = orthogonal_to(orthonormal(self._without[without].basis[layer].astype(np.float64)), rows)
                if left < NOTHING_LEFT:
                    raise DirectionsError(
                        f"{name}, layer {layer}: nothing is left of the direction without that of {without}; leave one "
                        "of them out"
                    )
            basis[layer] = rows.astype(np.float32)
            means = [part.reference[layer].astype(np.float64) for part in parts if layer in part.reference]
            if len(means) == len(parts):
                reference[layer] = np.mean(means, axis=0).astype(np.float32)
        # The scores are of other directions now.
        made_of = {"contrast": name, **({"without": without} if without else {})}
        return dataclasses.replace(parts[0], basis=basis, reference=reference, scores={}, metadata=made_of)
