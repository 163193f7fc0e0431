"""Measures what capturing costs with weights loaded and with weights streamed a layer at a time.

    python benchmarks/capture.py
    python benchmarks/capture.py --shape 12 1024 4096 --pairs 8

The model is a Llama with random bfloat16 weights, of 1.5 GB in the default shape, and has the demo's tokenizer. Each
capture is a process of its own: its peak memory is what it took beyond a capture from a tiny model, and so is its
time, which is compared with reading the shards once. Two captures that differ in a byte get no figures. Linux only.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ablate_shards.data import demo

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
#: A process's own peak: what its parent sees of it begins with the parent's.
CHILD = """
import re, sys
from ablate_shards.cli import cli
cli(sys.argv[1:], standalone_mode=False)
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def build(folder: Path, layers: int, hidden: int, inner: int) -> int:
    """Saves a model with random weights and returns their bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    for name in TOKENIZER:
        shutil.copy(demo.MODEL / name, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_pairs(path: Path, count: int) -> None:
    """Writes pairs of about 60 tokens a side."""
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(WORDS[(number + step) % len(WORDS)] for step in range(12))
            file.write(json.dumps({"positive": f"{text} yes", "negative": f"{text} no"}) + "\n")


def forget(folder: Path) -> None:
    """Drops the shards from the page cache, where the system allows it."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Returns the seconds that reading every shard takes."""
    forget(folder)
    start = time.perf_counter()
    buffer = bytearray(8 << 20)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def run(model: Path, dump: Path, pairs: Path, offload: str) -> tuple[float, int]:
    """Captures in a process of its own; returns its seconds and its peak resident bytes."""
    forget(model)
    arguments = ["capture", str(model), str(dump), "--pairs", str(pairs)]
    arguments += ["--offload", offload, "--device", "cpu", "--overwrite", "--quiet"]
    start = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return time.perf_counter() - start, int(told.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints peak memory and time of both ways; returns 1 when they give different bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark-capture"))
    parser.add_argument("--shape", type=int, nargs=3, default=(24, 1536, 6144), metavar=("LAYERS", "D", "INNER"))
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args(arguments)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    try:
        model, tiny, pairs = given.work / "model", given.work / "tiny", given.work / "pairs.jsonl"
        size = build(model, *given.shape)
        build(tiny, 2, 64, 128)
        write_pairs(pairs, given.pairs)
        dumps = {offload: given.work / f"{offload}.safetensors" for offload in ("never", "always")}
        found: dict[str, list[tuple[float, int]]] = {"never": [], "always": []}
        reads, floors = [], []
        for _ in range(given.runs):
            reads.append(read_once(model))
            floors.append(run(tiny, given.work / "tiny.safetensors", pairs, "always"))
            for offload, dump in dumps.items():
                found[offload].append(run(model, dump, pairs, offload))
        if dumps["never"].read_bytes() != dumps["always"].read_bytes():
            print("WRONG: loaded and streamed weights give different activations")
            return 1
        reading = statistics.median(reads)
        start, floor = statistics.median(s for s, _ in floors), statistics.median(m for _, m in floors)
        print(f"weights {size / 1e6:.0f} MB, a layer {size / given.shape[0] / 1e6:.0f} MB, {given.pairs} pairs")
        print(f"reading the shards once {reading:.2f} s, start-up {start:.1f} s and {floor / 1e6:.0f} MB")
        print("weights    peak beyond start-up    seconds beyond start-up    against reading")
        for offload, name in (("never", "loaded"), ("always", "streamed")):
            seconds = statistics.median(s for s, _ in found[offload]) - start
            peak = statistics.median(m for _, m in found[offload]) - floor
            print(f"{name:10} {peak / 1e6:8.0f} MB ({peak / size:4.0%}) {seconds:22.1f} {seconds / reading:18.1f} x")
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
