"""Writes small checkpoints byte by byte, without transformers and without torch."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint

HIDDEN = 32
NAMES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(NAMES[dtype]).tobytes()


def decode(raw: bytes, dtype: str, shape) -> np.ndarray:
    if dtype == "BF16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, NAMES[dtype])
    return values.astype(np.float64).reshape(shape)


def write_shard(path: Path, tensors: dict[str, np.ndarray], dtype="BF16", metadata=None, pad=8) -> None:
    header = {"__metadata__": metadata or {"format": "pt", "note": "kept"}}
    body = b""
    for name, values in tensors.items():
        raw = encode(values, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def llama_tensors(layers=3, hidden=HIDDEN, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inner = hidden * 2 + 8

    def weight(*shape):
        return rng.standard_normal(shape) * 0.1

    tensors = {"model.embed_tokens.weight": weight(48, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": np.ones(hidden),
            f"{prefix}post_attention_layernorm.weight": np.ones(hidden),
            f"{prefix}self_attn.q_proj.weight": weight(hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": weight(hidden // 2, hidden),
            f"{prefix}self_attn.v_proj.weight": weight(hidden // 2, hidden),
            f"{prefix}self_attn.o_proj.weight": weight(hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": weight(inner, hidden),
            f"{prefix}mlp.up_proj.weight": weight(inner, hidden),
            f"{prefix}mlp.down_proj.weight": weight(hidden, inner),
        }
    return tensors | {"model.norm.weight": np.ones(hidden), "lm_head.weight": weight(48, hidden)}


def write_llama(folder: Path, *, layers=3, hidden=HIDDEN, dtype="BF16", shards=2, seed=0) -> Path:
    """Writes a Llama checkpoint with an index, a few sidecars and a file of other weights."""
    folder.mkdir(parents=True)
    tensors = llama_tensors(layers, hidden, seed)
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        write_shard(folder / name, {key: tensors[key] for key in part}, dtype, pad=8 if number % 2 else 1)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept\n")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    return folder


def write_adapter(
    folder: Path,
    *,
    layers: Sequence[int],
    modules: Sequence[str] = ("self_attn.o_proj", "mlp.down_proj"),
    hidden: int = HIDDEN,
    rank: int = 4,
    seed: int = 3,
    **config: object,
) -> Path:
    """Writes a LoRA adapter for modules of :func:`write_llama` that write as many values as the stream has."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        for module in modules:
            name = f"base_model.model.model.layers.{layer}.{module}"
            inner = 2 * hidden + 8 if module == "mlp.down_proj" else hidden
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, inner)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((hidden, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_directions(path: Path, *, layers=3, hidden=HIDDEN, rank=1, seed=1) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        basis, _ = np.linalg.qr(rng.standard_normal((hidden, rank)))
        tensors[f"direction.layers.{layer}"] = np.ascontiguousarray(basis.T).astype(np.float32)
        tensors[f"reference.layers.{layer}"] = rng.standard_normal(hidden).astype(np.float32)
    save_file(tensors, path, {"format": "ablate-shards.directions/1"})
    return path


def write_dump(path: Path, *, layers=3, hidden=HIDDEN, prompts=12, seed=2) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        shift = rng.standard_normal(hidden)
        for label, sign in (("positive", 1), ("negative", -1)):
            values = rng.standard_normal((prompts, hidden)) + sign * shift
            tensors[f"{label}.layers.{layer}"] = values.astype(np.float32)
    save_file(tensors, path, {"format": "ablate-shards.activations/1"})
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[str]:
    """Returns the names in a folder that start with a dot, as those of unfinished files do."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """Returns what a checkpoint stores of every tensor."""
    checkpoint = open_checkpoint(folder)
    content = {shard.name: shard.path.read_bytes() for shard in checkpoint.shards}
    return {name: content[tensor.shard][tensor.start : tensor.end] for name, tensor in checkpoint.tensors.items()}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Changes one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)
