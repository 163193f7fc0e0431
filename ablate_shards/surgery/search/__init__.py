"""Finds the edit of a model: trials in memory, a choice among the best, and its effect on questions kept apart."""

from ablate_shards.surgery.search.space import Space

__all__ = ["Space"]
