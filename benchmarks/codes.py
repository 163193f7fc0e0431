"""What nearest and directed rounding leave of a direction in quantised weights: ``python -m benchmarks.codes``.

Gaussian weights are quantised by the largest of each block, and a random direction is removed with the column norms
left to themselves. The scales stay. Everything is measured on the codes.
"""

import time

import click
import numpy as np

from ablate_shards.kernels.codecs.grids import grid_named
from ablate_shards.kernels.codecs.scales import Spread
from ablate_shards.kernels.rounding.directed import round_directed

__all__ = ["measure"]

#: Codes, block, and whether scales are powers of two.
FORMATS = {
    "FP8": ("E4M3", (128, 128), False),
    "MXFP8": ("E4M3", (1, 32), True),
    "MXFP4": ("E2M1", (1, 32), True),
    "NVFP4": ("E2M1", (1, 16), False),
    "int4, groups of 32": ("int4", (1, 32), False),
    "int4, groups of 128": ("int4", (1, 128), False),
    "int8, groups of 128": ("int8", (1, 128), False),
}
SIZES = ((1024, 1), (2048, 1), (4096, 1), (7168, 1), (4096, 3))
COLUMNS = 512


@click.command()
def show() -> None:
    """Print the tables of docs/quantised.md."""
    heads = "nearest leaves | directed leaves | error, nearest | error, directed | codes/s"
    click.echo(f"| format | hidden size | directions | {heads} |")
    for name in FORMATS:
        for rows, count in SIZES if name == "FP8" else SIZES[2:]:
            nearest, directed, nearest_error, error, speed = measure(rows, COLUMNS, count, name)
            click.echo(
                f"| {name} | {rows} | {count} | {nearest:.0%} | {directed:.0e} | {nearest_error:.1%} | {error:.1%} "
                f"| {speed / 1e6:.0f} M |"
            )


def measure(rows: int, cols: int, count: int, name: str = "FP8") -> tuple[float, float, float, float, float]:
    """Return what either way of rounding leaves of the component, the error of either, and codes a second."""
    kind, block, powers = FORMATS[name]
    grid = grid_named(kind)
    rng = np.random.default_rng(rows)
    basis = np.linalg.qr(rng.standard_normal((rows, count)))[0].T.copy()
    weights = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
    blocks = np.abs(weights).reshape(rows // block[0], block[0], cols // block[1], block[1]).max(axis=(1, 3))
    scales = blocks / np.nanmax(grid.values)
    scales = (2.0 ** np.ceil(np.log2(scales)) if powers else scales).astype(np.float32)
    spread = Spread(grid, block, scales)
    wide, _ = spread.part(slice(0, rows), slice(0, cols))
    codes = grid.codes_of(grid.nearest_levels(weights / wide), np.zeros_like(weights, np.uint8))
    source = spread.decode_rows(codes, 0)
    before = float(np.linalg.norm(basis @ source))
    target = (source - basis.T @ (basis @ source)).astype(np.float32)
    start = time.perf_counter()
    rounded = round_directed(grid, target, codes, wide, basis)
    seconds = time.perf_counter() - start
    left = float(np.linalg.norm(basis @ spread.decode_rows(codes, 0)))
    total = rounded.total.sum()
    return (
        float(np.sqrt(rounded.nearest.sum())) / before,
        left / before,
        float(np.sqrt(rounded.nearest_error.sum() / total)),
        float(np.sqrt(rounded.error.sum() / total)),
        codes.size / seconds,
    )


if __name__ == "__main__":
    show()
