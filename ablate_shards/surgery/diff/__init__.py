"""What lies between any two checkpoints, in numbers and in words."""

from ablate_shards.surgery.diff.differences import Diff
from ablate_shards.surgery.diff.survey import DiffOptions, diff

__all__ = ["Diff", "DiffOptions", "diff"]
