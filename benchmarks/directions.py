"""Times directions and their scores from an activation dump against reading the file once.

    python benchmarks/directions.py
    python benchmarks/directions.py --dtype bf16 --estimator geometric-median

The dump is random: 24 layers, 5000 prompts of each label, 1024 values. Both sides read from a warm page cache and
take turns. A result that disagrees with plain float64 arithmetic gets no time.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ablate_shards.surgery.activations import ACTIVATIONS_FORMAT, LABELS, open_activations
from ablate_shards.surgery.directions import Directions, EstimatorOptions, compute_directions

DTYPES = {"f32": ("F32", 4), "bf16": ("BF16", 2), "f16": ("F16", 2)}
TOLERANCE = 1e-6


def write_dump(path: Path, dtype: str, layers: int, prompts: int, hidden: int) -> int:
    """Writes a dump and returns its bytes."""
    stored, item = DTYPES[dtype]
    names = [f"{label}.layers.{layer}" for layer in range(layers) for label in LABELS]
    size = prompts * hidden * item
    header: dict[str, object] = {"__metadata__": {"format": ACTIVATIONS_FORMAT}}
    for number, name in enumerate(names):
        header[name] = {
            "dtype": stored,
            "shape": [prompts, hidden],
            "data_offsets": [number * size, (number + 1) * size],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(0)
    concept = (rng.standard_normal(hidden) / np.sqrt(hidden)).astype(np.float32)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            values = rng.standard_normal((prompts, hidden), np.float32) + concept * name.startswith("positive")
            if dtype == "bf16":
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            else:
                file.write(values.astype(np.float16 if dtype == "f16" else np.float32).tobytes())
    return path.stat().st_size


def is_right(found: Directions, path: Path, dtype: str) -> bool:
    """Whether a mean difference and its scores are those of plain float64 arithmetic, on the first and last layer."""
    dump = open_activations(path)
    for layer in {dump.layers[0], dump.layers[-1]}:
        values = {label: np.concatenate([chunk.copy() for chunk in dump.chunks(layer, label)]) for label in LABELS}
        gap = values["positive"].mean(0) - values["negative"].mean(0)
        along: dict[str, list[float]] = {label: [] for label in LABELS}
        for fold in range(5):
            rest = {label: np.delete(array, slice(fold, None, 5), axis=0).mean(0) for label, array in values.items()}
            vector = rest["positive"] - rest["negative"]
            vector /= np.linalg.norm(vector)
            middle = (rest["positive"] + rest["negative"]) / 2
            for label, array in values.items():
                along[label] += ((array[fold::5] - middle) @ vector).tolist()
        positive, negative = np.array(along["positive"]), np.array(along["negative"])
        signal = (positive.mean() - negative.mean()) / np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
        auc = float((positive[:, None] > negative).mean())
        score = found.scores[layer]
        if score.signal_to_noise is None or score.auc is None:
            return False
        errors = (
            np.abs(found.basis[layer][0] - gap / np.linalg.norm(gap)).max(),
            np.abs(found.reference[layer] - values["negative"].mean(0)).max(),
            abs(score.signal_to_noise - signal),
            abs(score.auc - auc),
        )
        if not max(errors) <= TOLERANCE:
            return False
    return True


def read_once(path: Path, block: bytearray) -> None:
    """Reads a file from its beginning to its end."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Runs something; returns its seconds and its processor seconds, children included."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints medians and their ratios; returns 1 when the result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark-directions"))
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--shape", type=int, nargs=3, default=(24, 5000, 1024), metavar=("LAYERS", "PROMPTS", "D"))
    parser.add_argument(
        "--estimator", choices=["mean-difference", "geometric-median", "svd"], default="mean-difference"
    )
    parser.add_argument("--winsorize", type=float, default=None)
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args(arguments)
    options = EstimatorOptions(given.estimator, winsorize=given.winsorize)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    try:
        path = given.work / "dump.safetensors"
        size = write_dump(path, given.dtype, *given.shape)
        if not is_right(compute_directions(open_activations(path), EstimatorOptions()), path, given.dtype):
            print("wrong result, no times")
            return 1
        block = bytearray(8 << 20)
        contenders: dict[str, Callable[[], object]] = {
            "reading once": lambda: read_once(path, block),
            options.estimator: lambda: compute_directions(open_activations(path), options),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(given.runs):
            for name, work in contenders.items():
                times[name].append(timed(work))
    finally:
        shutil.rmtree(given.work)
    print(f"{size / 1e9:.2f} GB of {given.dtype}, {os.cpu_count()} cores, medians of {given.runs}")
    reading = [statistics.median(column) for column in zip(*times["reading once"], strict=True)]
    for name, measured in times.items():
        seconds, busy = (statistics.median(column) for column in zip(*measured, strict=True))
        low, high = min(measured)[0], max(measured)[0]
        print(
            f"{name:17} {seconds:6.3f} s ({low:.3f}-{high:.3f})  {seconds / reading[0]:5.2f} x reading   "
            f"processor {busy:6.3f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
