"""Checkpoints with the layout of real models and random weights, of any size, and the files that go with them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Layout", "fp8", "llama", "qwen", "read", "scales_of", "shards", "wide", "write", "write_directions"]

INDEX = "model.safetensors.index.json"
FULL_ATTENTION_EVERY = 4
WRITERS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
#: A prime, so that rows and tensors do not repeat it in step.
BLOCK_ELEMENTS = 4_194_301
#: Rows and columns of a scale of FP8 codes.
SCALED = 128
ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint consists of.

    Attributes:
        hidden: Its hidden size.
        layers: Its decoder layers.
        tensors: Shapes by name, in the order of the file.
        config: What config.json says.
        file: The name of a shard, with its number and their count to fill in.
        shard_bytes: The most that one shard holds.
        coded: Whether matrices of layers are FP8 codes with scales in float32; else all tensors are bf16.
    """

    hidden: int
    layers: int
    tensors: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    file: str
    shard_bytes: int
    coded: bool = False

    def dtype(self, name: str) -> str:
        """Returns the safetensors dtype of a tensor."""
        if not self.coded or ".layers." not in name or len(self.tensors[name]) < 2:
            return "BF16"
        return "F32" if name.endswith("_scale_inv") else "F8_E4M3"

    def size(self, name: str) -> int:
        """Returns the bytes of a tensor."""
        return ITEM_BYTES[self.dtype(name)] * int(np.prod(self.tensors[name]))

    def shards(self) -> list[list[str]]:
        """Returns the names of the tensors of each shard."""
        found: list[list[str]] = [[]]
        size = 0
        for name in self.tensors:
            if size and size + self.size(name) > self.shard_bytes:
                found.append([])
                size = 0
            found[-1].append(name)
            size += self.size(name)
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
        stacked = (experts_bytes // (ITEM_BYTES["BF16"] * hidden * intermediate), hidden, intermediate)
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


def wide(*, tiny: bool, width: int = 65_536) -> Layout:
    """Returns the layout of one layer in one shard, nearly all of which is one matrix: of 1.07 GB by default.

    Hidden 8192, no projections but those that write to the residual stream, vocabulary 1,024.

    Args:
        tiny: A few hundred kilobytes of the same.
        width: Columns of the matrix.
    """
    hidden, width = (128, 1024) if tiny else (8192, width)
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (1024, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, width),
        "model.layers.0.self_attn.o_proj.weight": (hidden, hidden // 8),
        "model.norm.weight": (hidden,),
    }
    return replace(
        llama(1, tiny=tiny), hidden=hidden, tensors=tensors, shard_bytes=1 << 62,
        config={"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 1, "vocab_size": 1024},
    )  # fmt: skip


def fp8(layout: Layout) -> Layout:
    """Returns a layout whose matrices of layers are FP8 codes, a scale for each block of 128 x 128."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in layout.tensors.items():
        tensors[name] = shape
        if ".layers." in name and len(shape) > 1:
            *stack, rows, columns = shape
            tensors[scales_of(name)] = (*stack, -(-rows // SCALED), -(-columns // SCALED))
    said = {"quant_method": "fp8", "weight_block_size": [SCALED, SCALED]}
    return replace(layout, tensors=tensors, config={**layout.config, "quantization_config": said}, coded=True)


def scales_of(name: str) -> str:
    """Returns the name of the scales of a tensor of FP8 codes."""
    return f"{name}_scale_inv"


def write(layout: Layout, folder: Path) -> int:
    """Writes a checkpoint with random weights and returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(BLOCK_ELEMENTS, np.float32) * 0.02
    contents = {"BF16": (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()}
    if layout.coded:
        from ablate_shards.kernels.codecs.e4m3 import E4M3

        levels = E4M3.nearest_levels(values * 5000)
        contents["F8_E4M3"] = E4M3.codes_of(levels, np.zeros(levels.shape, np.uint8)).tobytes()
        contents["F32"] = rng.uniform(1e-4, 2e-4, BLOCK_ELEMENTS).astype(np.float32).tobytes()
    parts = layout.shards()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, 1):
        file = layout.file.format(number, len(parts))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            place = [end, end := end + layout.size(name)]
            header[name] = {"dtype": layout.dtype(name), "shape": layout.tensors[name], "data_offsets": place}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            for name in names:
                block = contents[layout.dtype(name)]
                start, stop = header[name]["data_offsets"]
                while start < stop:
                    inside = start % len(block)
                    part = block[inside : inside + stop - start]
                    shard.write(part)
                    start += len(part)
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
