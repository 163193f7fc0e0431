"""Writes small checkpoints whose residual writers are FP8 codes with scales, byte by byte."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint, read_range

BLOCK = (128, 128)
SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu}


def spread_scales(scales: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> torch.Tensor:
    """The scale of each element, float32, by repetition: of blocks, of rows, or of the whole matrix."""
    rows, cols = shape[-2:]
    if block is None:
        return scales.float().reshape(*shape[:-2], -1, 1).expand(shape)
    wide = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :rows, :cols]


def quantise(
    values: torch.Tensor, layout: str, kind: str = "F32", block: tuple[int, int] = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight ``[..., out, in]``, by the largest value of each block."""
    *batch, rows, cols = values.shape
    if layout == "block":
        down, across = -(-rows // block[0]), -(-cols // block[1])
        padded = torch.nn.functional.pad(values, (0, across * block[1] - cols, 0, down * block[0] - rows))
        largest = padded.abs().reshape(*batch, down, block[0], across, block[1]).amax((-3, -1))
    else:
        largest = values.abs().amax((-1,) if layout == "channel" else (-2, -1), keepdim=layout == "channel")
    exact = (largest / 448).clamp(min=1e-12)
    if SCALES[kind] == torch.float8_e8m0fnu:
        exact = 2.0 ** torch.ceil(torch.log2(exact))
    scales = exact.to(SCALES[kind])
    wide = spread_scales(scales, tuple(values.shape), block if layout == "block" else None)
    return (values / wide).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def decoded(codes: torch.Tensor, scales: torch.Tensor, layout: str, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    return codes.float() * spread_scales(scales, tuple(codes.shape), block if layout == "block" else None)


def raw_of(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else tensor.reshape(1).view(torch.uint8).numpy().tobytes()
    )


def write_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_fp8(
    folder: Path,
    *,
    hidden: int = 256,
    inner: int = 200,
    layers: int = 2,
    layout: str = "block",
    kind: str = "F32",
    ending: str = "weight_scale_inv",
    shape: str = "",
    experts: int = 0,
    model_type: str = "llama",
    quantisation: dict | None = None,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint in two shards, in which the scales lie in another shard than the codes.

    Args:
        layout: ``block``, ``channel`` or ``tensor``.
        kind: The dtype of the scales.
        ending: What follows the module's name in that of the scales.
        shape: ``flat`` for scales per row ``[out]``, and per tensor ``[]``.
        experts: Stack ``down_proj`` for so many experts, as Mixtral-like models of transformers are saved.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.05

    codes, scales = {}, {}
    for name, size in {"model.embed_tokens.weight": (48, hidden), "model.norm.weight": (hidden,)}.items():
        codes[name] = ("BF16", size, raw_of(normal(*size).bfloat16()))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            codes[f"{prefix}{norm}.weight"] = ("BF16", (hidden,), raw_of(torch.ones(hidden).bfloat16()))
        for part in ("q", "k", "v"):
            codes[f"{prefix}self_attn.{part}_proj.weight"] = (
                "BF16",
                (hidden, hidden),
                raw_of(normal(hidden, hidden).bfloat16()),
            )
        down = (experts, hidden, inner) if experts else (hidden, inner)
        mlp = f"{prefix}mlp.experts.down_proj" if experts else f"{prefix}mlp.down_proj"
        for module, size in ((f"{prefix}self_attn.o_proj", (hidden, hidden)), (mlp, down)):
            stored, scale = quantise(normal(*size), layout, kind)
            if shape == "flat":
                scale = scale.reshape(-1 if layout == "channel" else ())
            stacked = len(size) > 2
            name = module if stacked else f"{module}.weight"
            codes[name] = ("F8_E4M3", tuple(stored.shape), raw_of(stored))
            scale_name = f"{module}_{ending.removeprefix('weight_')}" if stacked else f"{module}.{ending}"
            scales[scale_name] = (kind, tuple(scale.shape), raw_of(scale))
            if not stacked:
                scales[f"{module}.input_scale"] = ("F32", (), raw_of(torch.ones(())))
    folder.mkdir(parents=True)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    write_tensors(folder / first, codes)
    write_tensors(folder / second, scales)
    index = dict.fromkeys(codes, first) | dict.fromkeys(scales, second)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    said = {"quant_method": "fp8", "weight_block_size": list(BLOCK) if layout == "block" else None}
    config = {"model_type": model_type, "hidden_size": hidden, "num_hidden_layers": layers}
    config["quantization_config"] = said if quantisation is None else quantisation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TORCH = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.float8_e8m0fnu, "F8_E8M0": torch.float8_e8m0fnu}
TORCH |= {"F32": torch.float32, "BF16": torch.bfloat16}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {
        name: torch.frombuffer(bytearray(read_range(checkpoint, info)), dtype=TORCH[info.dtype]).reshape(info.shape)
        for name, info in checkpoint.tensors.items()
        if math.prod(info.shape)
    }


def direction_of(hidden: int, count: int = 1, seed: int = 5) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, hidden))
    return np.linalg.qr(rows.T)[0].T.copy()
