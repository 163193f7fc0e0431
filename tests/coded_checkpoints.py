"""Writes small checkpoints whose residual writers are FP8 codes with scales, byte by byte."""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

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
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
TORCH |= {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}


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


def write_basis(folder: Path, hidden: int, count: int = 1) -> torch.Tensor:
    """Writes ``d.safetensors`` with random directions of layer 0, and returns them as an edit removes them."""
    basis = direction_of(hidden, count)
    arrays = {"direction.layers.0": basis.astype(np.float32), "reference.layers.0": np.zeros(hidden, np.float32)}
    save_arrays(arrays, folder / "d.safetensors", metadata={"format": "ablate-shards.directions/1"})
    return torch.from_numpy(np.linalg.qr(basis.astype(np.float32).astype(np.float64).T)[0].T.copy())


def options(folder: Path, *more: object) -> list[object]:
    """The options of an edit by what :func:`write_basis` wrote, in two layers."""
    chosen = ["-d", folder / "d.safetensors", "--layers", "0-1", "--source-layer", 0, "--no-biproject"]
    return [*chosen, "--preserve", "columns", *more]


def left(weight: torch.Tensor, basis: torch.Tensor) -> float:
    """The component of a weight along a basis, relative to its norm."""
    return float((basis @ weight.double()).norm() / weight.double().norm())


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUPS = {
    "int4 in groups of 32": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    "int4 per channel": {"num_bits": 4, "type": "int", "strategy": "channel", "group_size": None, "symmetric": True},
    "int4 in groups of 64, with zero points": {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 64,
        "symmetric": False,
    },
    "int8 in groups of 32": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    "int3 per channel, with zero points": {"num_bits": 3, "type": "int", "strategy": "channel", "symmetric": False},
}
#: Bits, size of groups, and what else the configuration says.
TRANSPOSED = {
    "GPTQ int4 in groups of 32, with zero points": (4, 32, {"quant_method": "gptq", "sym": False}),
    "GPTQ int4 in groups of 64, with zero points (order of activations)": (
        4,
        64,
        {"quant_method": "gptq", "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "GPTQ int3 per channel, with zero points": (3, -1, {"quant_method": "gptq", "checkpoint_format": "gptq"}),
    "AWQ int4 in groups of 64, with zero points": (4, 64, {"quant_method": "awq", "version": "gemm"}),
}
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
FLOATS = {
    "MXFP8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
    "MXFP4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "NVFP4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
#: Bits and size of groups of what MLX adds offsets to, and the modes of MLX that have none.
AFFINE = {"MLX int4 in groups of 64": (4, 64), "MLX int3 in groups of 32": (3, 32), "MLX int8 in groups of 64": (8, 64)}
MODES = {"MXFP4 (MLX)": (4, 32), "MXFP8 (MLX)": (8, 32), "NVFP4 (MLX)": (4, 16)}
LINES = {
    "NF4 in blocks of 64": ("nf4", False),
    "NF4 in blocks of 64, their scales quantised as well": ("nf4", True),
    "FP4 of bitsandbytes in blocks of 64": ("fp4", False),
}
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(
            0.0,
            -0.0052083334885537624,
            -0.6666666865348816,
            -1.0,
            -0.3333333432674408,
            -0.5,
            -0.1666666716337204,
            -0.25,
        ),
    ),
}
LLM_INT8 = "LLM.int8 per channel"
#: What follows the module's name in that of the codes.
CODES = ("weight", "weight_packed", "qweight")
#: How a writer is stored, by a name; its own names are those that `inspect` shows, with the spelling in brackets.
BYTES = "int8 per channel (bytes)"
UNEVEN_BYTES = "int8 per channel, with zero points (bytes)"
FORMS = (*GROUPS, *TRANSPOSED, BYTES, UNEVEN_BYTES, "MXFP8", "MXFP4", "NVFP4", "NVFP4 (ModelOpt)", "MXFP4 (DeepSeek)")
FORMS = (*FORMS, *AFFINE, *MODES, *LINES, LLM_INT8)


def inner_of(form: str) -> int:
    """Inputs of a writer: what no word or byte ends with, where the form takes that."""
    return 203 if "per channel" in form and "GPTQ" not in form else 192


def quantisation_as(form: str) -> dict:
    """The ``quantization_config`` of a form."""
    if form == "NVFP4 (ModelOpt)":
        return {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    if form == "MXFP4 (DeepSeek)":
        return {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if form in AFFINE or form in MODES:
        bits, size = (AFFINE | MODES)[form]
        return {"group_size": size, "bits": bits, "mode": form.partition(" ")[0].lower() if form in MODES else "affine"}
    if form in LINES:
        kind, nested = LINES[form]
        more = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, **more}
    if form == LLM_INT8:
        return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
    if form in (BYTES, UNEVEN_BYTES):
        weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": form == BYTES}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    if form in TRANSPOSED:
        bits, size, more = TRANSPOSED[form]
        return {"bits": bits, "group_size": size, **more}
    weights = (GROUPS | FLOATS)[form]
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes ``[rows, cols]`` into words of 32 bits by arithmetic on Python's integers."""
    rows, cols = codes.shape
    words = -(-cols * bits // 32)
    raw = b"".join(sum(int(c) << bits * i for i, c in enumerate(row)).to_bytes(4 * words, "little") for row in codes)
    return torch.frombuffer(bytearray(raw), dtype=torch.int32).reshape(rows, words)


def unpacked(words: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """The reverse of :func:`packed`."""
    wide = [int.from_bytes(row.numpy().tobytes(), "little") for row in words.contiguous()]
    return torch.tensor([[row >> bits * i & (1 << bits) - 1 for i in range(cols)] for row in wide])


def outputs_packed(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes ``[n, outputs]`` of four bits into words as AWQ does, eight outputs in the order of its kernel."""
    words = [
        [
            sum(int(row[first + place]) << 4 * k for k, place in enumerate(AWQ_OUTPUTS))
            for first in range(0, len(row), 8)
        ]
        for row in codes.tolist()
    ]
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def outputs_unpacked(words: torch.Tensor) -> torch.Tensor:
    """The reverse of :func:`outputs_packed`."""
    wide = words.view(torch.uint32).to(torch.int64)
    codes = torch.empty(len(wide), wide.shape[1], 8, dtype=torch.int64)
    for k, place in enumerate(AWQ_OUTPUTS):
        codes[..., place] = wide >> 4 * k & 15
    return codes.flatten(1)


def groups_of(form: str, cols: int) -> torch.Tensor:
    """The group of each input of a form of :data:`TRANSPOSED`."""
    size = cols if TRANSPOSED[form][1] == -1 else TRANSPOSED[form][1]
    groups = torch.arange(cols) // size
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(1))
    return groups[order] if "desc_act" in TRANSPOSED[form][2] else groups


def store_transposed(values: torch.Tensor, form: str) -> dict[str, tuple[str, torch.Tensor]]:
    """The parts of a writer ``[out, in]`` as GPTQ and AWQ store it."""
    bits, _, said = TRANSPOSED[form]
    groups, most = groups_of(form, values.shape[1]), (1 << bits) - 1
    count = int(groups.max()) + 1
    low = torch.stack([values[:, groups == group].amin(1) for group in range(count)]).clamp(max=0)
    high = torch.stack([values[:, groups == group].amax(1) for group in range(count)]).clamp(min=0)
    scales = ((high - low) / most).half()
    zeros = torch.round(-low / scales.float()).clamp(1, most)
    codes = (torch.round(values / scales.float()[groups].T) + zeros[groups].T).clamp(0, most).to(torch.int64)
    if said["quant_method"] == "awq":
        return {
            "qweight": ("I32", outputs_packed(codes.T)),
            "qzeros": ("I32", outputs_packed(zeros.to(torch.int64))),
            "scales": ("F16", scales),
        }
    less = 0 if said.get("checkpoint_format") == "gptq_v2" else 1
    return {
        "qweight": ("I32", packed(codes, bits).T.contiguous()),
        "qzeros": ("I32", packed(zeros - less, bits)),
        "scales": ("F16", scales),
        "g_idx": ("I32", groups.to(torch.int32)),
    }


def transposed_value(parts: dict[str, torch.Tensor], form: str) -> torch.Tensor:
    """What the parts of :func:`store_transposed` stand for."""
    bits, _, said = TRANSPOSED[form]
    scales = parts["scales"].float()
    rows = scales.shape[1]
    if said["quant_method"] == "awq":
        codes, zeros = outputs_unpacked(parts["qweight"]).T, outputs_unpacked(parts["qzeros"])
    else:
        words = parts["qweight"].T.contiguous()
        less = 0 if said.get("checkpoint_format") == "gptq_v2" else 1
        codes = unpacked(words, bits, words.shape[1] * 32 // bits)
        zeros = unpacked(parts["qzeros"], bits, rows) + less
    groups = groups_of(form, codes.shape[1])
    return (codes - zeros[groups].T) * scales[groups].T


def store_affine(values: torch.Tensor, form: str) -> dict[str, tuple[str, torch.Tensor]]:
    """The parts of a writer ``[out, in]`` as MLX stores it, with scales of either sign."""
    (bits, size), rows = AFFINE[form], len(values)
    grouped = values.reshape(rows, -1, size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    kind, dtype = ("F32", torch.float32) if bits == 8 else ("BF16", torch.bfloat16)
    scales = ((high - low) / ((1 << bits) - 1) * torch.where(low.abs() > high.abs(), 1, -1)).to(dtype)
    offsets = torch.where(low.abs() > high.abs(), low, high).to(dtype)
    codes = torch.round((grouped - offsets.float()[..., None]) / scales.float()[..., None]).clamp(0, (1 << bits) - 1)
    words = packed(codes.reshape(rows, -1).to(torch.int64), bits)
    return {"weight": ("U32", words), "scales": (kind, scales), "biases": (kind, offsets)}


def store_line(values: torch.Tensor, form: str) -> dict[str, tuple[str, torch.Tensor]]:
    """The parts of a writer ``[out, in]`` as bitsandbytes stores it: all codes in one line, the first in high bits."""
    kind, nested = LINES[form]
    table = torch.tensor(TABLES[kind])
    blocks = values.reshape(-1, 64)
    largest = blocks.abs().amax(-1)
    said = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(values.shape)}
    parts = {"weight.absmax": ("F32", largest), "weight.quant_map": ("F32", table)}
    if nested:
        offset, steps = largest.mean(), torch.linspace(-1, 1, 256)
        rest = torch.nn.functional.pad(largest - offset, (0, -len(largest) % 256)).reshape(-1, 256)
        second = rest.abs().amax(-1)
        codes = (rest / second[:, None]).flatten()[: len(largest), None].sub(steps).abs().argmin(-1).to(torch.uint8)
        largest = steps[codes.long()] * second.repeat_interleave(256)[: len(largest)] + offset
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
        parts |= {"weight.absmax": ("U8", codes), "weight.nested_absmax": ("F32", second)}
        parts["weight.nested_quant_map"] = ("F32", steps)
    codes = (blocks / largest[:, None])[..., None].sub(table).abs().argmin(-1).to(torch.uint8).flatten()
    state = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    both = (codes[::2] << 4 | codes[1::2])[:, None]
    return {"weight": ("U8", both), **parts, f"weight.quant_state.bitsandbytes__{kind}": ("U8", state)}


def line_value(parts: dict[str, torch.Tensor], form: str) -> torch.Tensor:
    """What the parts of :func:`store_line` stand for."""
    kind, nested = LINES[form]
    said = json.loads(parts[f"weight.quant_state.bitsandbytes__{kind}"].numpy().tobytes())
    largest = parts["weight.absmax"]
    if nested:
        wide = parts["weight.nested_absmax"].repeat_interleave(256)[: len(largest)]
        largest = parts["weight.nested_quant_map"][largest.long()] * wide + torch.tensor(said["nested_offset"])
    codes = torch.stack([parts["weight"].flatten() >> 4, parts["weight"].flatten() & 15], -1)
    return (parts["weight.quant_map"][codes.flatten().long()].reshape(-1, 64) * largest[:, None]).reshape(said["shape"])


def store(values: torch.Tensor, form: str) -> dict[str, tuple[str, torch.Tensor]]:
    """The parts of a writer ``[out, in]``, by what follows the module's name: dtype and tensor."""
    if form in TRANSPOSED:
        return store_transposed(values, form)
    if form in AFFINE:
        return store_affine(values, form)
    if form in LINES:
        return store_line(values, form)
    if form in MODES:
        parts = store(values, "NVFP4 (one scale)" if form.startswith("NVFP4") else form.partition(" ")[0])
        codes = (parts.get("weight") or parts["weight_packed"])[1].view(torch.uint8)
        return {
            "weight": ("U32", codes.view(torch.int32)),
            "scales": ("U8", parts["weight_scale"][1].view(torch.uint8)),
        }
    if form == LLM_INT8:
        largest = values.abs().amax(-1)
        codes = torch.round(values * (127 / largest)[:, None]).to(torch.int8)
        layout = torch.zeros((), dtype=torch.uint8)
        return {"weight": ("I8", codes), "SCB": ("F32", largest), "weight_format": ("U8", layout)}
    if form == UNEVEN_BYTES:
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        scales = (high - low) / 255
        zeros = (-128 - torch.round(low / scales)).clamp(-128, 127)
        codes = (torch.round(values / scales) + zeros).clamp(-128, 127).to(torch.int8)
        return {
            "weight": ("I8", codes),
            "weight_scale": ("F32", scales),
            "weight_zero_point": ("I8", zeros.to(torch.int8)),
        }
    if form == BYTES:
        scales = (values.abs().amax(-1, keepdim=True) / 127.5).bfloat16()
        codes = torch.round(values / scales.float()).clamp(-128, 127).to(torch.int8)
        return {"weight": ("I8", codes), "weight_scale": ("BF16", scales)}
    rows, cols = values.shape
    if form in GROUPS:
        how = GROUPS[form]
        bits, half = how["num_bits"], 1 << (how["num_bits"] - 1)
        size = how.get("group_size") or cols
        grouped = torch.nn.functional.pad(values, (0, -cols % size)).reshape(rows, -1, size)
        if how["symmetric"]:
            scales, zeros = grouped.abs().amax(-1) / (half - 0.5), None
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scales = (high - low) / (2 * half - 1)
            zeros = (-half - torch.round(low / scales)).clamp(-half, half - 1)
        scales = scales.bfloat16()
        around = 0 if zeros is None else zeros[..., None]
        codes = (torch.round(grouped / scales.float()[..., None]) + around).clamp(-half, half - 1) + half
        parts = {
            "weight_packed": ("I32", packed(codes.reshape(rows, -1)[:, :cols], bits)),
            "weight_scale": ("BF16", scales),
            "weight_shape": ("I64", torch.tensor([rows, cols])),
        }
        if zeros is not None:
            parts["weight_zero_point"] = ("I32", packed((zeros + half).T, bits).T.contiguous())
        return parts
    size = 16 if form.startswith("NVFP4") else 32
    grouped = values.reshape(rows, -1, size)
    largest = grouped.abs().amax(-1)
    if form == "MXFP8":
        power = torch.ceil(torch.log2(largest / 448))
        codes = (grouped / 2.0 ** power[..., None]).to(torch.float8_e4m3fn).reshape(rows, cols)
        return {"weight": ("F8_E4M3", codes), "weight_scale": ("U8", (power + 127).to(torch.uint8))}
    if size == 32:
        power = torch.ceil(torch.log2(largest / 6))
        stored, wide = (power + 127).to(torch.uint8), 2.0**power
        deepseek = form == "MXFP4 (DeepSeek)"
        parts = {"scale" if deepseek else "weight_scale": ("F8_E8M0" if deepseek else "U8", stored)}
    else:
        # MLX has no number that all scales are multiplied by.
        second = torch.tensor(1.0) if "one scale" in form else largest.max() / (6 * 448)
        stored = (largest / 6 / second).to(torch.float8_e4m3fn)
        if form == "NVFP4":
            parts = {"weight_scale": ("F8_E4M3", stored), "weight_global_scale": ("F32", (1 / second).reshape(1))}
            wide = stored.float() / (1 / second)
        else:
            parts = {"weight_scale": ("F8_E4M3", stored), "weight_scale_2": ("F32", second)}
            wide = stored.float() * second
    levels = (((grouped / wide[..., None]).abs()[..., None] - FP4).abs()).argmin(-1)
    codes = (levels + 8 * (grouped < 0)).to(torch.uint8).reshape(rows, cols)
    both = codes[:, ::2] | codes[:, 1::2] << 4
    name = "weight" if "(" in form else "weight_packed"
    return {name: ("I8" if form == "MXFP4 (DeepSeek)" else "U8", both), **parts}


def value_of(parts: dict[str, torch.Tensor], form: str) -> torch.Tensor:
    """What the parts of a writer stand for, float32, computed by the format's definition."""
    if form in TRANSPOSED:
        return transposed_value(parts, form)
    if form in AFFINE:
        (bits, size), words = AFFINE[form], parts["weight"]
        codes = unpacked(words, bits, words.shape[1] * 32 // bits).float()
        scales, offsets = (parts[rest].float().repeat_interleave(size, 1) for rest in ("scales", "biases"))
        return codes * scales + offsets
    if form in LINES:
        return line_value(parts, form)
    if form in MODES:
        raw, scales = parts["weight"].view(torch.uint8), parts["scales"]
        if form.startswith("MXFP8"):
            return value_of({"weight": raw.view(torch.float8_e4m3fn), "weight_scale": scales}, "MXFP8")
        if form.startswith("MXFP4"):
            return value_of({"weight_packed": raw, "weight_scale": scales}, "MXFP4")
        one = {"weight_scale": scales.view(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(1.0)}
        return value_of({"weight": raw, **one}, "NVFP4 (ModelOpt)")
    if form == LLM_INT8:
        return parts["weight"].float() * parts["SCB"][:, None] * 7.874015718698502e-3
    if form == UNEVEN_BYTES:
        return (parts["weight"].float() - parts["weight_zero_point"].float()) * parts["weight_scale"].float()
    if form == BYTES:
        return parts["weight"].float() * parts["weight_scale"].float()
    if form in GROUPS:
        how = GROUPS[form]
        bits, half = how["num_bits"], 1 << (how["num_bits"] - 1)
        rows, cols = parts["weight_shape"].tolist()
        scales, size = parts["weight_scale"].float(), how.get("group_size") or cols
        zeros = torch.zeros_like(scales)
        if "weight_zero_point" in parts:
            zeros = unpacked(parts["weight_zero_point"].T, bits, rows).T - half
        levels = unpacked(parts["weight_packed"], bits, cols) - half
        spreaded = [each.repeat_interleave(size, 1)[:, :cols] for each in (zeros, scales)]
        return (levels - spreaded[0]) * spreaded[1]
    if form == "MXFP8":
        return parts["weight"].float() * (2.0 ** (parts["weight_scale"].float() - 127)).repeat_interleave(32, 1)
    codes = parts["weight" if "(" in form else "weight_packed"].view(torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    numbers = FP4[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    if form.startswith("MXFP4"):
        stored = parts["scale" if "(" in form else "weight_scale"]
        return numbers * (2.0 ** (stored.view(torch.uint8).float() - 127)).repeat_interleave(32, -1)
    scales = parts["weight_scale"].float()
    scales = scales / parts["weight_global_scale"] if form == "NVFP4" else scales * parts["weight_scale_2"]
    return numbers * scales.repeat_interleave(16, -1)


def write_coded(
    folder: Path, form: str, *, hidden: int = 256, inner: int = 192, layers: int = 2, config: dict | None = None
) -> Path:
    """Writes a checkpoint in two shards whose residual writers are stored in a form; scales lie in the second."""
    generator = torch.Generator().manual_seed(3)
    first: dict = {}
    second: dict = {}
    for name, size in {"model.embed_tokens.weight": (48, hidden), "model.norm.weight": (hidden,)}.items():
        first[name] = ("BF16", size, raw_of(torch.randn(size, generator=generator).bfloat16()))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            first[f"{prefix}{norm}.weight"] = ("BF16", (hidden,), raw_of(torch.ones(hidden).bfloat16()))
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            parts = store(torch.randn((hidden, inner), generator=generator) * 0.05, form)
            for rest, (dtype, tensor) in parts.items():
                codes = rest in CODES
                (first if codes else second)[f"{prefix}{module}.{rest}"] = (dtype, tuple(tensor.shape), raw_of(tensor))
    folder.mkdir(parents=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, tensors in zip(names, (first, second), strict=True):
        write_tensors(folder / name, tensors)
    index = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    whole = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers}
    whole["quantization_config"] = quantisation_as(form)
    (folder / "config.json").write_text(json.dumps(whole if config is None else config))
    return folder


def parts_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of the writers of :func:`write_coded`, as stored, by module and what follows its name."""
    checkpoint = open_checkpoint(folder)
    kinds = TORCH | {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "U32": torch.int32, "I64": torch.int64}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, info in checkpoint.tensors.items():
        if (place := re.match(r"(.*(?:o_proj|down_proj))\.(.+)", name)) is not None:
            module, rest = place.groups()
            raw = bytearray(read_range(checkpoint, info))
            found.setdefault(module, {})[rest] = torch.frombuffer(raw, dtype=kinds[info.dtype]).reshape(info.shape)
    return found


def save_gpt_oss(folder, hidden=512, experts=4):
    """Saves a tiny gpt-oss by transformers, whose experts are then put into blocks of MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": hidden, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64}
    config = GptOssConfig(
        **sizes, **heads, num_local_experts=experts, num_experts_per_tok=2, pad_token_id=0, rope_scaling=None
    )
    GptOssForCausalLM(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {}
    for name, weight in load_file(file).items():
        if name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            parts = [store(torch.randn_like(each.T) * 0.05, "MXFP4") for each in weight.float()]
            codes, scales = (
                torch.stack([each[part][1] for each in parts]) for part in ("weight_packed", "weight_scale")
            )
            tensors[f"{name}_blocks"] = codes.reshape(*scales.shape, 16)
            tensors[f"{name}_scales"] = scales
        else:
            tensors[name] = weight.bfloat16()
            if name.endswith("down_proj_bias"):
                tensors[name] = torch.randn_like(weight).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
