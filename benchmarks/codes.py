"""What rounding leaves of a direction in quantised weights, or of an adapter: ``python -m benchmarks.codes``.

Gaussian weights are quantised by the largest of each block, and a random direction is removed with the column norms
left to themselves. The scales stay. Everything is measured on the codes.
"""

import time

import click
import numpy as np

from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.codecs.grids import grid_named
from ablate_shards.kernels.codecs.plain import decoded, round_to_bfloat16
from ablate_shards.kernels.codecs.scales import Spread
from ablate_shards.kernels.rounding.directed import round_directed

__all__ = ["measure", "measure_update"]

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
#: Norms of an update, over that of the weight.
UPDATES, RANK = (0.003, 0.01, 0.03, 0.1), 16
SIZES = ((1024, 1), (2048, 1), (4096, 1), (7168, 1), (4096, 3))
COLUMNS = 512


@click.command()
@click.option("--updates", is_flag=True, help="Print the table of docs/merge.md instead.")
def show(*, updates: bool) -> None:
    """Print the tables of docs/quantised.md."""
    if updates:
        click.echo(f"| stored in | {' | '.join(f'size {size:.1%}' for size in UPDATES)} |")
        for name in ("bfloat16", "FP8", "int8, groups of 128", "MXFP4", "NVFP4", "int4, groups of 32"):
            found = [measure_update(2048, COLUMNS, size, name) for size in UPDATES]
            click.echo(f"| {name} | {' | '.join(f'{kept:.0%}, {error:.0%}' for kept, error in found)} |")
        return
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
    rng = np.random.default_rng(rows)
    basis = np.linalg.qr(rng.standard_normal((rows, count)))[0].T.copy()
    grid, spread, wide, codes = quantised((rng.standard_normal((rows, cols)) * 0.02).astype(np.float32), name)
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


def measure_update(rows: int, cols: int, size: float, name: str) -> tuple[float, float]:
    """Return how much of an adapter's update the nearest codes, or bfloat16, keep, and what else they add, over it."""
    rng = np.random.default_rng(rows)
    weights = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
    grid, spread, wide, codes = quantised(weights, "FP8" if name == "bfloat16" else name)
    source = spread.decode_rows(codes, 0)
    if name == "bfloat16":
        source = as_bfloat16(source)
    update = rng.standard_normal((rows, RANK)) @ rng.standard_normal((RANK, cols))
    update *= size * np.linalg.norm(source) / np.linalg.norm(update)
    target = (source + update).astype(np.float32)
    if name == "bfloat16":
        rounded = as_bfloat16(target)
    else:
        rounded = spread.decode_rows(grid.codes_of(grid.nearest_levels(target / wide), codes), 0)
    moved = (rounded - source).astype(np.float64)
    kept = float((moved * update).sum() / (update * update).sum())
    return kept, float(np.linalg.norm(moved - kept * update) / np.linalg.norm(update))


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return values rounded to bfloat16, float32."""
    return decoded(round_to_bfloat16(values), np.float32)


def quantised(weights: np.ndarray, name: str) -> tuple[Grid, Spread, np.ndarray, np.ndarray]:
    """Return the grid, the scales, the scale of each element, and the codes of a quantised matrix."""
    kind, block, powers = FORMATS[name]
    grid = grid_named(kind)
    rows, cols = weights.shape
    blocks = np.abs(weights).reshape(rows // block[0], block[0], cols // block[1], block[1]).max(axis=(1, 3))
    scales = blocks / np.nanmax(grid.values)
    scales = (2.0 ** np.ceil(np.log2(scales)) if powers else scales).astype(np.float32)
    spread = Spread(grid, block, scales)
    wide, _ = spread.part(slice(0, rows), slice(0, cols))
    return grid, spread, wide, grid.codes_of(grid.nearest_levels(weights / wide), np.zeros_like(weights, np.uint8))


if __name__ == "__main__":
    show()
