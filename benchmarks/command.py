"""Times the whole command against ``cp -r`` of the same checkpoint, as ratios of alternating runs.

    python benchmarks/command.py [--work DIR] [--runs 5] [--experts-gib 0]

The checkpoint has the layout of Qwen3.5-0.8B (24 layers, hidden 1024, intermediate 3584, vocabulary 248,320,
one shard reached through an index) with random weights; ``--experts-gib 2`` adds one fused-expert tensor of
that size. Both sides read from a warm page cache; ours also syncs, and is shown beside ``cp -r`` with and
without a final sync.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 3584, 24, 248_320
FULL_ATTENTION_EVERY = 4


def shapes(experts_gib: float) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of the checkpoint, names and shapes, all bf16."""
    root = "model.language_model."
    tensors: dict[str, tuple[int, ...]] = {f"{root}embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"{root}layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
        if layer % FULL_ATTENTION_EVERY == FULL_ATTENTION_EVERY - 1:
            tensors |= {
                f"{prefix}self_attn.q_proj.weight": (4096, HIDDEN),
                f"{prefix}self_attn.k_proj.weight": (512, HIDDEN),
                f"{prefix}self_attn.v_proj.weight": (512, HIDDEN),
                f"{prefix}self_attn.o_proj.weight": (HIDDEN, 2048),
            }
        else:
            tensors |= {
                f"{prefix}linear_attn.in_proj_qkv.weight": (6144, HIDDEN),
                f"{prefix}linear_attn.in_proj_z.weight": (2048, HIDDEN),
                f"{prefix}linear_attn.out_proj.weight": (HIDDEN, 2048),
            }
    tensors[f"{root}norm.weight"] = (HIDDEN,)
    if experts_gib:
        experts = int(experts_gib * 2**30 / (HIDDEN * INTERMEDIATE * 2))
        tensors[f"{root}layers.{LAYERS - 1}.mlp.experts.down_proj"] = (experts, HIDDEN, INTERMEDIATE)
        del tensors[f"{root}layers.{LAYERS - 1}.mlp.down_proj.weight"]
    return tensors


def write_checkpoint(folder: Path, experts_gib: float) -> int:
    """Writes the checkpoint and a directions file; returns the shard's bytes."""
    folder.mkdir(parents=True)
    name = "model.safetensors-00001-of-00001.safetensors"
    tensors = shapes(experts_gib)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(0)
    sample = (rng.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32) >> 16
    block = sample.astype(np.uint16).tobytes()
    with (folder / name).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, position, len(block)):
            file.write(block[: min(len(block), position - start)])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    text = {"model_type": "qwen3_5_text", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    if experts_gib:
        text["model_type"] = "qwen3_5_moe_text"
    kind = str(text["model_type"]).removesuffix("_text")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text}))
    directions = {}
    for layer in range(LAYERS):
        direction = rng.standard_normal((1, HIDDEN), np.float32)
        directions[f"direction.layers.{layer}"] = direction / np.linalg.norm(direction)
        directions[f"reference.layers.{layer}"] = rng.standard_normal(HIDDEN, np.float32)
    save_file(directions, folder.parent / "directions.safetensors", {"format": "ablate-shards.directions/1"})
    return position


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
    parser.add_argument("--work", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--experts-gib", type=float, default=0.0)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    source, out, copied = options.work / "source", options.work / "out", options.work / "copied"
    size = write_checkpoint(source, options.experts_gib)
    directions = str(options.work / "directions.safetensors")
    tool = [sys.executable, "-m", "ablate_shards"]
    edit = [*tool, "ablate", str(source), str(out), "-d", directions, "--source-layer", "12", "--quiet"]
    copy = ["cp", "-r", str(source), str(copied)]
    run(edit)
    run([*tool, "verify", str(source), str(out), "--quiet"])
    shutil.rmtree(out)
    rows: dict[str, list[tuple[float, float]]] = {"ablate-shards": [], "cp -r": [], "cp -r, then sync": []}
    for _ in range(options.runs):
        rows["ablate-shards"].append(run(edit))
        shutil.rmtree(out)
        for name, sync in (("cp -r", False), ("cp -r, then sync", True)):
            rows[name].append(run(copy, sync=sync))
            shutil.rmtree(copied)
    shutil.rmtree(options.work)
    ours = statistics.median(seconds for seconds, _ in rows["ablate-shards"])
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, medians of {options.runs}")
    for name, measured in rows.items():
        seconds = [value for value, _ in measured]
        median = statistics.median(seconds)
        peak = max(memory for _, memory in measured)
        print(
            f"{name:18} {median:6.2f} s ({min(seconds):.2f}-{max(seconds):.2f})  "
            f"ours/this {ours / median:5.2f}  peak {peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
