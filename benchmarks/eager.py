"""The usual forms of an ablation and of a merge: whole tensors in float32, loaded and saved by the library.

    python -P benchmarks/eager.py ablate SOURCE DIRECTIONS LAYER OUT
    python -P benchmarks/eager.py merge SOURCE ADAPTER OUT

Nothing is streamed, nothing but shards is written, and no special value is guarded against.
"""

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["ablated"]

WRITER = re.compile(r".*layers\.(\d+)\..*(?:o_proj|out_proj|down_proj)(?:\.weight)?")


def ablated(weight: Tensor, basis: Tensor, *, preserve: str = "rows", coefficient: float = 1.0) -> Tensor:
    """Returns a weight ``[..., d, n]`` without the directions ``[k, d]``, its norms computed before and after."""
    matrix, directions = weight.float(), basis.float()
    along = -1 if preserve == "rows" else -2
    norms = matrix.norm(dim=along, keepdim=True)
    unit = matrix / norms if preserve == "rows" else matrix
    moved = unit - coefficient * (directions.mT @ (directions @ unit))
    if preserve != "none":
        moved = norms * moved / moved.norm(dim=along, keepdim=True)
    return moved.to(weight.dtype)


def ablate(source: Path, directions: Path, layer: int, out: Path) -> None:
    """Removes one layer's direction from every writer, biprojected, and keeps the norms of rows."""
    given = load_file(directions)
    out.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        weights = load_file(shard)
        for name, weight in weights.items():
            if found := WRITER.fullmatch(name):
                means = [given[f"reference.layers.{number}"] for number in {layer, int(found[1])}]
                span = torch.linalg.qr(torch.stack(means).mT).Q
                direction = given[f"direction.layers.{layer}"][0]
                direction = direction - span @ (span.mT @ direction)
                weights[name] = ablated(weight, (direction / direction.norm())[None])
        save_file(weights, out / shard.name, {"format": "pt"})


def merge(source: Path, adapter: Path, out: Path) -> None:
    """Adds ``s·B·A`` to every target of an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    updates = load_file(adapter / "adapter_model.safetensors")
    out.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        weights = load_file(shard)
        for name, down in updates.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
                key = f"model.language_model.{module}.weight"
                delta = config["lora_alpha"] / config["r"] * (updates[name.replace("lora_A", "lora_B")] @ down)
                weights[key] = (weights[key].float() + delta).to(weights[key].dtype)
        save_file(weights, out / shard.name, {"format": "pt"})


if __name__ == "__main__":
    if sys.argv[1] == "ablate":
        ablate(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        merge(*map(Path, sys.argv[2:]))
