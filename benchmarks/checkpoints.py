"""Checkpoints with the layout of real models and random weights, of any size, and the files that go with them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Layout", "llama", "qwen", "read", "shards", "write", "write_directions"]

INDEX = "model.safetensors.index.json"
FULL_ATTENTION_EVERY = 4
WRITERS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
#: A prime, so that rows and tensors do not repeat it in step.
BLOCK_ELEMENTS = 4_194_301


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint consists of; all tensors are bf16.

    Attributes:
        hidden: Its hidden size.
        layers: Its decoder layers.
        tensors: Shapes by name, in the order of the file.
        config: What config.json says.
        file: The name of a shard, with its number and their count to fill in.
        shard_bytes: The most that one shard holds.
    """

    hidden: int
    layers: int
    tensors: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    file: str
    shard_bytes: int

    def shards(self) -> list[list[str]]:
        """Returns the names of the tensors of each shard."""
        found: list[list[str]] = [[]]
        size = 0
        for name, shape in self.tensors.items():
            if size and size + _bytes(shape) > self.shard_bytes:
                found.append([])
                size = 0
            found[-1].append(name)
            size += _bytes(shape)
        return found

    def writers(self, layer: int) -> list[str]:
        """Returns the tensors of a layer that write to the residual stream."""
        return [name for name in self.tensors if f"layers.{layer}." in name and name.endswith(WRITERS)]


def qwen(*, tiny: bool, experts_bytes: int = 0) -> Layout:
    """Returns the layout of Qwen3.5-0.8B without its vision tower, 1.5 GB in one shard that an index leads to.

    24 layers, every fourth with full attention, hidden 1024, intermediate 3584, vocabulary 248,320.

    Args:
        tiny: A few hundred kilobytes of the same.
        experts_bytes: Of one fused-expert tensor in place of the last layer's down projection.
    """
    hidden, intermediate, layers, vocabulary = (64, 224, 4, 512) if tiny else (1024, 3584, 24, 248_320)
    root = "model.language_model."
    tensors: dict[str, tuple[int, ...]] = {f"{root}embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"{root}layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, intermediate),
        }
        if layer % FULL_ATTENTION_EVERY == FULL_ATTENTION_EVERY - 1:
            tensors |= {
                f"{prefix}self_attn.q_proj.weight": (4 * hidden, hidden),
                f"{prefix}self_attn.k_proj.weight": (hidden // 2, hidden),
                f"{prefix}self_attn.v_proj.weight": (hidden // 2, hidden),
                f"{prefix}self_attn.o_proj.weight": (hidden, 2 * hidden),
            }
        else:
            tensors |= {
                f"{prefix}linear_attn.in_proj_qkv.weight": (6 * hidden, hidden),
                f"{prefix}linear_attn.in_proj_z.weight": (2 * hidden, hidden),
                f"{prefix}linear_attn.out_proj.weight": (hidden, 2 * hidden),
            }
    tensors[f"{root}norm.weight"] = (hidden,)
    if experts_bytes:
        stacked = (experts_bytes // _bytes((hidden, intermediate)), hidden, intermediate)
        tensors[f"{root}layers.{layers - 1}.mlp.experts.down_proj"] = stacked
        del tensors[f"{root}layers.{layers - 1}.mlp.down_proj.weight"]
    kind = "qwen3_5_moe" if experts_bytes else "qwen3_5"
    text = {"model_type": f"{kind}_text", "hidden_size": hidden, "num_hidden_layers": layers}
    config = {"model_type": kind, "text_config": text}
    return Layout(hidden, layers, tensors, config, "model.safetensors-{:05d}-of-{:05d}.safetensors", 1 << 62)


def llama(layers: int, *, tiny: bool) -> Layout:
    """Returns the layout of a Llama in shards of up to 1 GB: 0.26 GB of vocabulary and 71 MB a layer.

    Hidden 2048, intermediate 4096, 32 heads and 8 for keys and values, vocabulary 32,000, untied.

    Args:
        layers: Its decoder layers; 53 make 4 GB.
        tiny: A few hundred kilobytes of the same, with as many layers.
    """
    hidden, vocabulary = (64, 2048) if tiny else (2048, 32_000)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}mlp.down_proj.weight": (hidden, 2 * hidden),
            f"{prefix}mlp.gate_proj.weight": (2 * hidden, hidden),
            f"{prefix}mlp.up_proj.weight": (2 * hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.k_proj.weight": (hidden // 4, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.v_proj.weight": (hidden // 4, hidden),
        }
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    limit = 500_000 if tiny else 1_000_000_000
    return Layout(hidden, layers, tensors, config, "model-{:05d}-of-{:05d}.safetensors", limit)


def write(layout: Layout, folder: Path) -> int:
    """Writes a checkpoint with random weights and returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal(BLOCK_ELEMENTS, np.float32) * 0.02
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    parts = layout.shards()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, 1):
        file = layout.file.format(number, len(parts))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            shape = layout.tensors[name]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + _bytes(shape)]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            for start in range(0, end, len(block)):
                shard.write(block[: min(len(block), end - start)])
        weight_map |= dict.fromkeys(names, file)
        total += end
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(layout.config))
    return total


def write_directions(layout: Layout, path: Path) -> None:
    """Writes a random unit direction and a reference mean for each layer."""
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(layout.layers):
        direction = rng.standard_normal((1, layout.hidden), np.float32)
        tensors[f"direction.layers.{layer}"] = direction / np.linalg.norm(direction)
        tensors[f"reference.layers.{layer}"] = rng.standard_normal(layout.hidden, np.float32)
    save_file(tensors, path, {"format": "ablate-shards.directions/1"})


def shards(folder: Path) -> list[Path]:
    """Returns the shards of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def read(folder: Path, names: list[str], *, entries: int = 2) -> "Iterator[tuple[str, Tensor]]":
    """Yields tensors of a checkpoint; of stacked matrices the first few."""
    weight_map: dict[str, Path] = {}
    for shard in shards(folder):
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard)
    for name in names:
        with safe_open(weight_map[name], "pt") as file:
            stored = file.get_slice(name)
            yield name, stored[:entries] if len(stored.get_shape()) == 3 else stored[:]


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))
