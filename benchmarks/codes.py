"""What rounding leaves of a direction in quantised weights, or of an adapter: ``python -m benchmarks.codes``.

Gaussian weights are quantised by the largest of each block, and a random direction is removed with the column norms
left to themselves. The scales stay. Everything is measured on the codes.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.codecs.grids import grid_named
from ablate_shards.kernels.codecs.plain import decoded, round_to_bfloat16
from ablate_shards.kernels.codecs.scales import Spread
from ablate_shards.kernels.rounding.directed import round_directed
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.dequantise.decoding import Kept
from ablate_shards.surgery.dequantise.found import find_quantised
from ablate_shards.surgery.dequantise.values import Values

__all__ = ["measure", "measure_decoding", "measure_update"]

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
#: A matrix that is decoded, and bytes of bfloat16 that are made at a time, as in the command.
DECODED, PIECE = (4096, 4096), 8 << 20
#: What is stored, each part by what follows ``experts.down_proj``: dtype, shape; and what the configuration says.
_GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_PACKED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": _GROUP}}}
STORED: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], Any]] = {
    "FP8, blocks of 128 x 128": (
        {"": ("F8_E4M3", (8, 4096, 4096)), "_scale_inv": ("F32", (8, 32, 32))},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "int4, groups of 32": (
        {
            ".weight_packed": ("I32", (4096, 512)),
            ".weight_scale": ("BF16", (4096, 128)),
            ".weight_shape": ("I64", (2,)),
        },
        _PACKED,
    ),
    "MXFP4, blocks of gpt-oss": (
        {"_blocks": ("U8", (8, 4096, 128, 16)), "_scales": ("U8", (8, 4096, 128))},
        {"quant_method": "mxfp4"},
    ),
    "MLX int4, groups of 64": (
        {".weight": ("U32", (8, 4096, 512)), ".scales": ("BF16", (8, 4096, 64)), ".biases": ("BF16", (8, 4096, 64))},
        {"bits": 4, "group_size": 64},
    ),
}


@click.command()
@click.option("--updates", is_flag=True, help="Print the table of docs/merge.md instead.")
@click.option("--decoding", is_flag=True, help="Print how fast a core decodes instead.")
def show(*, updates: bool, decoding: bool) -> None:
    """Print the tables of docs/quantised.md."""
    if decoding:
        for name in STORED:
            click.echo(f"{name}: {measure_decoding(name) / 1e6:.0f} M weights a second of processor time")
        return
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


def measure_decoding(name: str, runs: int = 5) -> float:
    """Return the weights that a core turns into bfloat16 in a second, from what is stored on; the best of some runs."""
    parts, said = STORED[name]
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), parts, said)
        checkpoint = open_checkpoint(Path(folder))
        (weight,) = find_quantised(checkpoint)
        count = math.prod(weight.shape)
        buffer, taken = memoryview(bytearray(PIECE)), []
        for _ in range(runs):
            fill = Values(checkpoint, weight, Kept())
            start = time.process_time()
            for offset in range(0, 2 * count, PIECE):
                fill(buffer[: 2 * count - offset], offset)
            taken.append(time.process_time() - start)
    return count / min(taken)


def _write(folder: Path, parts: dict[str, tuple[str, tuple[int, ...]]], said: Any) -> None:
    """Write a checkpoint of one weight, with random codes and scales near one."""
    rng, header, body = np.random.default_rng(0), {}, b""
    for rest, (dtype, shape) in parts.items():
        size = {"F32": 4, "BF16": 2, "I32": 4, "U32": 4, "I64": 8}.get(dtype, 1) * math.prod(shape)
        if rest == ".weight_shape":
            raw = np.array(DECODED, "<i8").tobytes()
        elif dtype in ("F32", "BF16"):
            ones = np.full(math.prod(shape), 0.01, np.float32)
            raw = (ones if dtype == "F32" else round_to_bfloat16(ones)).tobytes()
        elif "scale" in rest:
            raw = rng.integers(110, 130, size, np.uint8).tobytes()
        else:
            # Below the codes of E4M3 that are no number.
            raw = (rng.integers(0, 256, size, np.uint8) & (0xF7 if dtype == "F8_E4M3" else 0xFF)).tobytes()
        place = [len(body), len(body) + len(raw)]
        header[f"model.layers.0.mlp.experts.down_proj{rest}"] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        body += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))


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
