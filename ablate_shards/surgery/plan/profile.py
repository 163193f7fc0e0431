"""A coefficient over depth: highest at one layer, less with every layer away from it."""

from dataclasses import dataclass

from ablate_shards.surgery.anatomy.parts import Part
from ablate_shards.validation import Finite

__all__ = ["Profile"]


@dataclass(frozen=True, slots=True)
class Profile:
    """The coefficient of some parts of each layer: ``floor + (peak - floor) max(0, 1 - |layer - place| / reach)``.

    Attributes:
        components: The parts it holds for; ``attention`` and ``mlp`` stand for all that belongs to them.
        peak: The coefficient at ``place``.
        place: The layer, which may lie between two.
        reach: How many layers away from ``place`` the coefficient is down to ``floor``; more than 0.
        floor: The coefficient from there on.
    """

    components: tuple[Part, ...]
    peak: Finite
    place: Finite
    reach: Finite
    floor: Finite = 0.0

    def coefficient(self, layer: int) -> float:
        """Returns the coefficient of a layer."""
        near = max(0.0, 1.0 - abs(layer - self.place) / self.reach)
        return self.floor + (self.peak - self.floor) * near
