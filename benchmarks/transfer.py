"""Measures ablations and merges from the Hub to the Hub, beside those to a folder: memory, disk, bytes fetched, time.

    python benchmarks/transfer.py [--work DIR] [--shard-gib 2] [--matrix-gib 1]

The Hub is the small server of the tests, on localhost, with the real client; uploads go through LFS in parts of
64 MiB. The checkpoint is one shard in the layout of Llama (hidden 4096) with random weights: a down projection of the
size asked for, matrices of 32 MiB, and what is not edited. The result is shown only if the repository has the same
digest as the folder. The adapter has rank 16. On localhost the time is that of the machine, not of a network.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

HIDDEN, LAYERS, RANK = 4096, 4, 16
SHARD = "model-00001-of-00001.safetensors"
PART = 64 << 20
CALL = """
import sys
from ablate_shards.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_checkpoint(folder: Path, shard_gib: float, matrix_gib: float) -> int:
    """Writes the checkpoint and a directions file; returns the shard's bytes."""
    folder.mkdir(parents=True)
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{writer}.weight": (HIDDEN, HIDDEN)
        for layer in range(LAYERS)
        for writer in ("self_attn.o_proj", "mlp.down_proj")
    }
    tensors["model.layers.0.mlp.down_proj.weight"] = (HIDDEN, int(matrix_gib * 2**30) // (2 * HIDDEN))
    edited = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    tensors["model.embed_tokens.weight"] = (max(1, (int(shard_gib * 2**30) - edited) // (2 * HIDDEN)), HIDDEN)
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
    with (folder / SHARD).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, position, len(block)):
            file.write(block[: min(len(block), position - start)])
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    directions = {}
    for layer in range(LAYERS):
        direction = rng.standard_normal((1, HIDDEN), np.float32)
        directions[f"direction.layers.{layer}"] = direction / np.linalg.norm(direction)
        directions[f"reference.layers.{layer}"] = rng.standard_normal(HIDDEN, np.float32)
    save_file(directions, folder.parent / "directions.safetensors", {"format": "ablate-shards.directions/1"})
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    factors = {}
    for tensor, (outer, inner) in tensors.items():
        if tensor.startswith("model.layers."):
            name = f"base_model.model.{tensor.removesuffix('.weight')}"
            factors[f"{name}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) * 0.02
            factors[f"{name}.lora_B.weight"] = rng.standard_normal((outer, RANK), np.float32) * 0.02
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return (folder / SHARD).stat().st_size


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Runs our command in a folder; returns its seconds and its peak memory in MiB."""
    start = time.perf_counter()
    # Told by the process itself: what its parent sees of it begins with the parent's own peak.
    command = [sys.executable, "-c", CALL, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return time.perf_counter() - start, int(done.stdout.split()[-2]) / 1024


def on_disk(folder: Path) -> int:
    """Returns the bytes of disk that the files below a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Prints a line for each command and each kind of OUT."""
    from hub.hub_server import Server  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/transfer"))
    parser.add_argument("--shard-gib", type=float, default=2.0)
    parser.add_argument("--matrix-gib", type=float, default=1.0)
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    size = write_checkpoint(work / "source", options.shard_gib, options.matrix_gib)
    edit = ["-d", str(work / "directions.safetensors"), "--source-layer", "1", "--quiet"]
    print(f"a shard of {size / 1e9:.2f} GB, {os.cpu_count()} cores")
    with Server() as server:
        server.hub.add("org/model", work / "source")
        shutil.rmtree(work / "source")
        server.hub.multipart_above, server.hub.part_size = 0, PART
        here = work / "here"
        here.mkdir()
        environment = {
            "HF_ENDPOINT": server.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_writer",
            "HF_HOME": str(here),
            "HOME": str(here),
            "TMPDIR": str(here),
        }
        disk = []

        def watch(line: str) -> None:
            if line.startswith(("GET /blob", "PUT ")):
                disk.append(on_disk(here))

        server.hub.watch = watch
        for name, arguments, more in (
            ("ablate", ["org/model"], edit),
            ("merge", ["org/model", str(work / "adapter")], ["--quiet"]),
        ):
            seen = []
            for where, out in (("to a folder", "out"), ("to the Hub", f"hub:me/{name}")):
                server.hub.seen.clear()
                disk.clear()
                seconds, memory = run([name, *arguments, out, *more], here, environment)
                disk.append(on_disk(here))
                seen.append(digest(server, here, out))
                shutil.rmtree(here / "out", ignore_errors=True)
                if seen[0] != seen[-1]:
                    raise SystemExit(f"{name} {where}: WRONG, the repository does not have the folder's bytes")
                times = server.hub.sent("GET /blob/") / size
                print(
                    f"{name:6} from the Hub {where:11} {seconds:6.1f} s  peak memory {memory:4.0f} MiB  "
                    f"peak disk {max(disk) / 2**20:7.2f} MiB  fetched {times:.2f} times"
                )
    shutil.rmtree(work)


def digest(server: Any, folder: Path, out: str) -> str:
    """Returns the SHA-256 of the shard in a folder or a repository."""
    if out.startswith("hub:"):
        return str(server.hub.repos[out.removeprefix("hub:")].files()[SHARD].sha256)
    with (folder / out / SHARD).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
