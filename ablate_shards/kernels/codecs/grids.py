"""The grids by their names, as plans and receipts have them."""

from ablate_shards.kernels.codecs.e2m1 import E2M1
from ablate_shards.kernels.codecs.e4m3 import E4M3
from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.codecs.integers import integers

__all__ = ["grid_named"]


def grid_named(name: str) -> Grid:
    """Return a grid: ``E4M3``, ``E2M1``, or ``int2`` to ``int8``."""
    if name in ("E4M3", "E2M1"):
        return {"E4M3": E4M3, "E2M1": E2M1}[name]
    return integers(int(name.removeprefix("int")))
