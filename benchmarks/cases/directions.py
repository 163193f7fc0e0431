"""Directions and their scores from an activation dump, against reading the file once.

The dump is random and in the page cache. The function is timed in this process, where starting Python and importing
are not part of it, and the command with both. What either writes is compared with plain float64 arithmetic on the
first and the last layer: bases, means, signal-to-noise and held-out AUC.
"""

import json
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open

from benchmarks.harness import Bench, Contender, Sample, amount, case
from benchmarks.processes import TOOL, reading, writing

__all__: list[str] = []

LABELS = ("positive", "negative")
FOLDS = 5
TOLERANCE = 1e-6
FUNCTION = "compute_directions"


@case("directions", runs=7)
def directions(bench: Bench) -> None:
    """Directions from a dump of 1 GB, in float32 and in bfloat16, against reading it once."""
    out = bench.work / "directions.safetensors"
    for dtype, prompts in (("F32", 5000), ("BF16", 10_000)):
        layers, prompts, hidden = (2, 60, 16) if bench.tiny else (24, prompts, 1024)
        dump = bench.work / f"{dtype}.safetensors"
        size = write_dump(dump, dtype, layers, prompts, hidden)
        bench.race(
            f"{amount(size)} of {dtype}, {layers} layers of [{prompts}, {hidden}] twice",
            [
                function(dump, out, layers),
                writing(
                    "ablate-shards directions",
                    [*TOOL, "directions", dump, out, "--quiet"],
                    out,
                    check=lambda dump=dump, layers=layers: fault(dump, out, layers),  # type: ignore[misc]
                ),
                reading([dump], against=FUNCTION),
            ],
            size=size,
        )
        dump.unlink()


def function(dump: Path, out: Path, layers: int) -> Contender:
    """Returns the computation without starting Python, importing or writing."""
    from ablate_shards.surgery.directions.activations import open_activations
    from ablate_shards.surgery.directions.directions import Directions
    from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
    from ablate_shards.surgery.directions.formats import write_directions

    found: list[Directions] = []

    def run() -> Sample:
        start = time.perf_counter()
        found[:] = [compute_directions(open_activations(dump), EstimatorOptions())]
        return Sample(time.perf_counter() - start)

    def check() -> str | None:
        write_directions(found[0], out)
        said = fault(dump, out, layers)
        out.unlink()
        return said

    return Contender(FUNCTION, run, check=check)


def write_dump(path: Path, dtype: str, layers: int, prompts: int, hidden: int) -> int:
    """Writes a dump in which the labels differ, and returns its bytes."""
    names = [f"{label}.layers.{layer}" for layer in range(layers) for label in LABELS]
    size = prompts * hidden * {"F32": 4, "BF16": 2}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "ablate-shards.activations/1"}}
    for number, name in enumerate(names):
        offsets = [number * size, (number + 1) * size]
        header[name] = {"dtype": dtype, "shape": [prompts, hidden], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(0)
    concept = (rng.standard_normal(hidden) / np.sqrt(hidden)).astype(np.float32)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            values = rng.standard_normal((prompts, hidden), np.float32) + concept * name.startswith("positive")
            file.write((values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values)
    return path.stat().st_size


def fault(dump: Path, out: Path, layers: int) -> str | None:
    """Compares a directions file with plain float64 arithmetic on the first and the last layer."""
    with safe_open(dump, "pt") as given, safe_open(out, "np") as found:
        scores = {row["layer"]: row for row in json.loads(found.metadata()["scores"])}
        for layer in (0, layers - 1):
            values = {label: given.get_tensor(f"{label}.layers.{layer}").double().numpy() for label in LABELS}
            unit, mean, signal, auc = statistics_of(values)
            errors = {
                "direction": np.abs(found.get_tensor(f"direction.layers.{layer}")[0] - unit).max(),
                "reference": np.abs(found.get_tensor(f"reference.layers.{layer}") - mean).max(),
                "signal_to_noise": abs(scores[layer]["signal_to_noise"] - signal),
                "auc": abs(scores[layer]["auc"] - auc),
            }
            for name, error in errors.items():
                if not error <= TOLERANCE:
                    return f"layer {layer}: {name} is off by {error:.1e}"
    return None


def statistics_of(values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Returns the unit mean difference, the reference mean, and the held-out signal-to-noise and AUC, by definition."""
    gap = values["positive"].mean(0) - values["negative"].mean(0)
    along: dict[str, list[float]] = {label: [] for label in LABELS}
    for fold in range(FOLDS):
        rest = {label: np.delete(array, slice(fold, None, FOLDS), axis=0).mean(0) for label, array in values.items()}
        vector = rest["positive"] - rest["negative"]
        vector /= np.linalg.norm(vector)
        middle = (rest["positive"] + rest["negative"]) / 2
        for label, array in values.items():
            along[label] += ((array[fold::FOLDS] - middle) @ vector).tolist()
    positive, negative = np.array(along["positive"]), np.array(along["negative"])
    signal = (positive.mean() - negative.mean()) / np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    auc = float((positive[:, None] > negative).mean())
    return gap / np.linalg.norm(gap), values["negative"].mean(0), float(signal), auc
