"""What writes to the stream of an architecture, found by intervention on a tiny random twin."""

from ablate_shards.surgery.derive.checkpoint import derive_checkpoint, leaks_of, recipe_lines
from ablate_shards.surgery.derive.derive import Derivation

__all__ = ["Derivation", "derive_checkpoint", "leaks_of", "recipe_lines"]
