"""The grids by their names, as plans and receipts have them."""

from ablate_shards.kernels.codecs.e2m1 import E2M1
from ablate_shards.kernels.codecs.e4m3 import E4M3
from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.codecs.integers import SIGNED, integers

__all__ = ["grid_named"]


def grid_named(name: str) -> Grid:
    """Return a grid: ``E4M3``, ``E2M1``, ``signed8``, or ``int2`` to ``int8``."""
    known = {grid.name: grid for grid in (E4M3, E2M1, SIGNED)}
    return known[name] if name in known else integers(int(name.removeprefix("int")))
