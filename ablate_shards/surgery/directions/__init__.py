"""Activations in, one scored basis per layer out."""

from ablate_shards.surgery.directions.activations import ActivationDump, open_activations
from ablate_shards.surgery.directions.directions import Directions, biproject
from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
from ablate_shards.surgery.directions.formats import read_directions, write_directions

__all__ = [
    "ActivationDump",
    "Directions",
    "EstimatorOptions",
    "biproject",
    "compute_directions",
    "open_activations",
    "read_directions",
    "write_directions",
]
