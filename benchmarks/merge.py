"""Times a merge against ``cp -r`` of the same checkpoint and against the eager form, as ratios of alternating runs.

    python benchmarks/merge.py [--work DIR] [--runs 5] [--rank 16] [--layers 24]

The checkpoint has the layout of Qwen3.5-0.8B (hidden 1024, intermediate 3584, vocabulary 248,320, one shard reached
through an index) with random weights; the adapter has the seven usual targets. The eager form loads every tensor,
adds ``s·B·A`` in float32 and saves them all. A result that is not the correctly rounded ``W + s·B·A`` in 99.9 % of
its elements is reported as wrong, and no time is shown for it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 3584, 248_320
FULL_ATTENTION_EVERY = 4
ROOT = "model.language_model."
SHARD = "model.safetensors-00001-of-00001.safetensors"
ALPHA = 32

EAGER = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
source, adapter, out = map(Path, sys.argv[1:])
shard = next(source.glob("*.safetensors"))
config = json.loads((adapter / "adapter_config.json").read_text())
weights, updates = load_file(shard), load_file(adapter / "adapter_model.safetensors")
for name, down in updates.items():
    if name.endswith(".lora_A.weight"):
        module = name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
        key = f"model.language_model.{module}.weight"
        delta = config["lora_alpha"] / config["r"] * (updates[name.replace("lora_A", "lora_B")] @ down)
        weights[key] = (weights[key].float() + delta).to(weights[key].dtype)
out.mkdir()
save_file(weights, out / shard.name, {"format": "pt"})
"""


def targets(layer: int) -> dict[str, tuple[int, int]]:
    """Returns the matrices of a layer that the adapter changes, name to ``[out, in]``."""
    shapes = {
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    if layer % FULL_ATTENTION_EVERY == FULL_ATTENTION_EVERY - 1:
        shapes |= {
            "self_attn.q_proj": (4096, HIDDEN),
            "self_attn.k_proj": (512, HIDDEN),
            "self_attn.v_proj": (512, HIDDEN),
            "self_attn.o_proj": (HIDDEN, 2048),
        }
    return shapes


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of the checkpoint, names and shapes, all bf16."""
    yield f"{ROOT}embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"{ROOT}layers.{layer}."
        for name, shape in targets(layer).items():
            yield f"{prefix}{name}.weight", shape
        if layer % FULL_ATTENTION_EVERY != FULL_ATTENTION_EVERY - 1:
            yield f"{prefix}linear_attn.in_proj_qkv.weight", (6144, HIDDEN)
            yield f"{prefix}linear_attn.in_proj_z.weight", (2048, HIDDEN)
            yield f"{prefix}linear_attn.out_proj.weight", (HIDDEN, 2048)
        yield f"{prefix}input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
    yield f"{ROOT}norm.weight", (HIDDEN,)


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes the checkpoint; returns the shard's bytes."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors(layers):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(0)
    sample = (rng.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32) >> 16
    block = sample.astype(np.uint16).tobytes()
    with (folder / SHARD).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, position, len(block)):
            file.write(block[: min(len(block), position - start)])
    names = [name for name in header if name != "__metadata__"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))
    text = {"model_type": "qwen3_5_text", "hidden_size": HIDDEN, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    return position


def write_adapter(folder: Path, layers: int, rank: int) -> None:
    """Writes an adapter as peft would."""
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(1)
    factors = {}
    for layer in range(layers):
        for name, (outer, inner) in targets(layer).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, inner), np.float32) / 32
            factors[f"{prefix}.lora_B.weight"] = rng.standard_normal((outer, rank), np.float32) / 256
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def accuracy(source: Path, adapter: Path, out: Path, layers: int) -> float:
    """Returns the share of changed elements that are not correctly rounded, over the layers at both ends."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    from ablate_shards.kernels import reference

    factors = load_file(adapter / "adapter_model.safetensors")
    scale = ALPHA / json.loads((adapter / "adapter_config.json").read_text())["r"]
    wrong = total = 0
    with safe_open(source / SHARD, "pt") as given, safe_open(out / SHARD, "pt") as found:
        for layer in {0, layers - 1}:
            for name in targets(layer):
                key = f"{ROOT}layers.{layer}.{name}.weight"
                down, up = (factors[f"base_model.model.model.layers.{layer}.{name}.lora_{x}.weight"] for x in "AB")
                exact = reference.merge(given.get_tensor(key), up, down, scale)
                wrong += int((reference.round_to(exact, torch.bfloat16) != found.get_tensor(key)).sum())
                total += exact.numel()
        for key in given.keys():  # noqa: SIM118 - not a mapping
            if f"layers.{layers // 2}.input_layernorm" in key:
                wrong += 0 if torch.equal(given.get_tensor(key), found.get_tensor(key)) else total
    return wrong / total


def run(command: list[str], *, sync: bool = False) -> tuple[float, float]:
    """Runs a command; returns its seconds and its peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if sync:
        os.sync()
    seconds = time.perf_counter() - start
    if status:
        message = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"{' '.join(command)} failed: {message}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Prints medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark-merge"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    source, adapter, out = (options.work / name for name in ("source", "adapter", "out"))
    size = write_checkpoint(source, options.layers)
    write_adapter(adapter, options.layers, options.rank)
    ours = [sys.executable, "-m", "ablate_shards", "merge", str(source), str(adapter), str(out), "--quiet"]
    commands = {
        "ablate-shards merge": (ours, False),
        "eager float32": ([sys.executable, "-c", EAGER, str(source), str(adapter), str(out)], False),
        "cp -r": (["cp", "-r", str(source), str(out)], False),
        "cp -r, then sync": (["cp", "-r", str(source), str(out)], True),
    }
    wrong: dict[str, float] = {}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(options.runs + 1):
        for name, (command, sync) in commands.items():
            figures = run(command, sync=sync)
            if number:
                measured[name].append(figures)
            elif not name.startswith("cp"):
                # The first run warms the page cache and is checked instead of timed.
                # In a process of its own, since children would inherit the memory of this one.
                with ProcessPoolExecutor(1, get_context("spawn")) as checker:
                    wrong[name] = checker.submit(accuracy, source, adapter, out, options.layers).result()
            shutil.rmtree(out)
    shutil.rmtree(options.work)
    median = statistics.median(seconds for seconds, _ in measured["ablate-shards merge"])
    print(f"{size / 1e9:.2f} GB, rank {options.rank}, {os.cpu_count()} cores, medians of {options.runs}")
    for name, figures_of in measured.items():
        if (share := wrong.get(name, 0.0)) > 1e-3:
            print(f"{name:20} wrong: {share:.2%} of the elements are not correctly rounded")
            continue
        seconds = [value for value, _ in figures_of]
        this = statistics.median(seconds)
        peak = max(memory for _, memory in figures_of)
        print(
            f"{name:20} {this:6.2f} s ({min(seconds):.2f}-{max(seconds):.2f})  "
            f"ours/this {median / this:5.2f}  peak {peak:.0f} MiB"
        )
    if wrong["ablate-shards merge"] > 1e-3:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
