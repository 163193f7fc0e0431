"""Times ``diff`` against reading both checkpoints once, as ratios of alternating runs.

    python benchmarks/diff.py [--work DIR] [--runs 3]

The checkpoint has the layout and the size of Qwen3.5-0.8B with random weights. B is, in turn: a copy, an ablation
of 46 writers, and A with the last bits of every value scrambled, so that every tensor changes at full rank. All
files are read from a warm page cache.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from command import run, write_checkpoint

SHARD = "model.safetensors-00001-of-00001.safetensors"
CHUNK = 1 << 20
READ = f"""
import sys
buffer = bytearray({CHUNK})
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""


def scramble(source: Path, out: Path) -> None:
    """Copies a checkpoint and changes the three last bits of every bf16 value."""
    shutil.copytree(source, out)
    rng = np.random.default_rng(1)
    with (source / SHARD).open("rb") as old, (out / SHARD).open("r+b") as new:
        length = 8 + int.from_bytes(old.read(8), "little")
        old.seek(length)
        new.seek(length)
        while block := old.read(CHUNK):
            new.write(np.frombuffer(block, np.uint16) ^ rng.integers(0, 8, len(block) // 2, np.uint16))


def main() -> None:
    """Prints medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    source = options.work / "source"
    size = write_checkpoint(source, 0)
    tool = [sys.executable, "-m", "ablate_shards"]
    outs = {name: options.work / name for name in ("copy", "ablation", "every tensor")}
    shutil.copytree(source, outs["copy"])
    directions = str(options.work / "directions.safetensors")
    edit = ["-d", directions, "--source-layer", "12", "--layers", "1-23", "--quiet"]
    subprocess.run([*tool, "ablate", str(source), str(outs["ablation"]), *edit], check=True)
    scramble(source, outs["every tensor"])
    rows: dict[str, list[tuple[float, float]]] = {}
    verdicts = {}
    for _ in range(options.runs):
        for name, out in outs.items():
            read = [sys.executable, "-c", READ, str(source / SHARD), str(out / SHARD)]
            rows.setdefault(f"{name}: read both", []).append(run(read))
            rows.setdefault(f"{name}: diff", []).append(run([*tool, "diff", str(source), str(out), "--quiet"]))
    for name, out in outs.items():
        result = subprocess.run([*tool, "diff", str(source), str(out), "--json"], check=True, capture_output=True)
        verdicts[name] = json.loads(result.stdout)["verdict"][0]
    start = time.perf_counter()
    subprocess.run([*tool, "diff", "--help"], check=True, capture_output=True)
    begin = time.perf_counter() - start
    shutil.rmtree(options.work)
    print(f"{size / 1e9:.2f} GB each, medians of {options.runs}; starting the command alone takes {begin:.2f} s")
    for name, measured in rows.items():
        seconds = [value for value, _ in measured]
        peak = max(memory for _, memory in measured)
        span = f"({min(seconds):.2f}-{max(seconds):.2f})"
        print(f"{name:24} {statistics.median(seconds):6.2f} s {span}  peak {peak:.0f} MiB")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")


if __name__ == "__main__":
    main()
