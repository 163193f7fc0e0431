"""``diff`` against reading both checkpoints once.

B is a copy, an ablation, and A with the last bits of every value scrambled, so that every tensor changes at full
rank. The files are in the page cache, and every change must be found and named for what it is.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import Layout, qwen, shards, write, write_directions
from benchmarks.harness import Bench, Contender, amount, case
from benchmarks.processes import TOOL, reading, run

__all__: list[str] = []

OURS = "ablate-shards diff"


@case("diff", runs=3, long=True)
def diff(bench: Bench) -> None:
    """Diff of 1.5 GB with a copy, an ablation and a checkpoint whose every tensor changed, against reading both."""
    layout = qwen(tiny=bench.tiny)
    source, other, directions = bench.work / "a", bench.work / "b", bench.work / "directions.safetensors"
    size = write(layout, source)
    write_directions(layout, directions)

    def ablate() -> None:
        edit: list[str | Path] = ["-d", directions, "--source-layer", str(layout.layers // 2), "--quiet"]
        run([*TOOL, "ablate", source, other, *edit])

    def copy() -> None:
        shutil.copytree(source, other)

    def change() -> None:
        scramble(source, other)

    for name, kind, make in (
        ("a copy", None, copy),
        ("an ablation", "ablation", ablate),
        ("every tensor changed", "full-rank", change),
    ):
        make()
        bench.race(
            f"{amount(size)} and {name}",
            [
                Contender(
                    OURS,
                    lambda: run([*TOOL, "diff", source, other, "--quiet"]),
                    check=lambda kind=kind: fault(layout, source, other, kind),  # type: ignore[misc]
                ),
                reading([*shards(source), *shards(other)], against=OURS),
            ],
            size=2 * size,
        )
        shutil.rmtree(other)


def scramble(source: Path, out: Path) -> None:
    """Copies a checkpoint and changes the three last bits of its bf16 values."""
    shutil.copytree(source, out)
    rng = np.random.default_rng(1)
    for shard in shards(out):
        with shard.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        values = np.memmap(shard, np.uint16, "r+", start)
        for part in np.array_split(values, -(-len(values) // 2**22)):
            part ^= rng.integers(0, 8, len(part), np.uint16)
        values.flush()


def fault(layout: Layout, source: Path, other: Path, kind: str | None) -> str | None:
    """Says whether ``diff`` fails to find what was changed, and what kind of change it was."""
    done = subprocess.run([*TOOL, "diff", source, other, "--json"], capture_output=True, text=True, check=True)
    found = {tensor["name"]: tensor["kind"] for tensor in json.loads(done.stdout)["tensors"]}
    expected = {
        None: [],
        "ablation": [name for layer in range(layout.layers) for name in layout.writers(layer)],
        "full-rank": list(layout.tensors),
    }[kind]
    if found.keys() != set(expected):
        return f"{len(found)} tensors are said to differ, and {len(expected)} do"
    kinds = {found[name] for name in expected if len(layout.tensors[name]) > 1}
    return None if kinds <= {kind} else f"expected the kind {kind}, found {', '.join(sorted(kinds))}"
