"""What nearest and directed rounding leave of a direction in FP8 codes: ``python -m benchmarks.codes``.

Gaussian weights are quantised in blocks of 128 x 128, and a random direction is removed with the column norms left to
themselves. The scales stay. Everything is measured on the codes.
"""

import time

import click
import numpy as np

from ablate_shards.kernels.codecs.fp8 import codes_of, decode_rows, nearest_levels, spread
from ablate_shards.kernels.rounding.directed import round_directed

__all__ = ["measure"]

BLOCK = (128, 128)
SIZES = ((1024, 1), (2048, 1), (4096, 1), (7168, 1), (4096, 3))
COLUMNS = 512


@click.command()
def show() -> None:
    """Print the table of docs/quantised.md."""
    click.echo(
        "| hidden size | directions | nearest leaves | directed leaves | error, nearest | error, directed | codes/s |"
    )
    for rows, count in SIZES:
        nearest, directed, nearest_error, error, speed = measure(rows, COLUMNS, count)
        click.echo(
            f"| {rows} | {count} | {nearest:.0%} | {directed:.0e} | {nearest_error:.1%} | {error:.1%} "
            f"| {speed / 1e6:.0f} M |"
        )


def measure(rows: int, cols: int, count: int) -> tuple[float, float, float, float, float]:
    """Return what either way of rounding leaves of the component, the error of either, and codes a second."""
    rng = np.random.default_rng(rows)
    basis = np.linalg.qr(rng.standard_normal((rows, count)))[0].T.copy()
    weights = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
    blocks = np.abs(weights).reshape(rows // BLOCK[0], BLOCK[0], cols // BLOCK[1], BLOCK[1]).max(axis=(1, 3))
    grid = (blocks / 448).astype(np.float32)
    scales = spread(grid, BLOCK, slice(0, rows), slice(0, cols))
    codes = codes_of(nearest_levels(weights / scales), np.zeros_like(weights, np.uint8))
    source = decode_rows(codes, grid, BLOCK, 0)
    before = float(np.linalg.norm(basis @ source))
    target = (source - basis.T @ (basis @ source)).astype(np.float32)
    start = time.perf_counter()
    rounded = round_directed(target, codes, scales, basis)
    seconds = time.perf_counter() - start
    left = float(np.linalg.norm(basis @ decode_rows(codes, grid, BLOCK, 0)))
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
