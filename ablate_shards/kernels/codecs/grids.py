"""The grids by their names, as plans and receipts have them."""

from ablate_shards.kernels.codecs.e2m1 import E2M1
from ablate_shards.kernels.codecs.e4m3 import E4M3
from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.codecs.integers import SIGNED, affine, integers
from ablate_shards.kernels.codecs.nf4 import FP4, NF4

__all__ = ["grid_named"]


def grid_named(name: str) -> Grid:
    """Return a grid: ``E4M3``, ``E2M1``, ``NF4``, ``FP4``, ``signed8``, ``int2`` to ``int8``, ``uint2`` to 8."""
    known = {grid.name: grid for grid in (E4M3, E2M1, NF4, FP4, SIGNED)}
    if name in known:
        return known[name]
    make = affine if name.startswith("u") else integers
    return make(int(name.removeprefix("u").removeprefix("int")))
