"""Checkpoints of MLX and bitsandbytes: what their configurations say, and what does not fit."""

import json
import re

import pytest
import torch
from coded_checkpoints import (
    left,
    options,
    parts_of,
    quantisation_as,
    raw_of,
    store,
    value_of,
    write_basis,
    write_coded,
    write_tensors,
)
from command_line import checked
from raw_checkpoints import snapshot

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint, read_range

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj"
SIZES = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2}
INT4, INT3 = "MLX int4 in groups of 64", "MLX int3 in groups of 32"
NF4, NESTED = "NF4 in blocks of 64", "NF4 in blocks of 64, their scales quantised as well"
LLM_INT8 = "LLM.int8 per channel"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def put(folder, name, dtype, tensor):
    """Takes a tensor out of its shard, and puts another into one of its own unless it is None."""
    index = json.loads((folder / INDEX).read_text())
    if (old := index["weight_map"].pop(name, None)) is not None:
        raw = (folder / old).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        kept = {
            key: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
            for key, entry in header.items()
            if key not in ("__metadata__", name)
        }
        write_tensors(folder / old, kept)
    if tensor is not None:
        index["weight_map"][name] = f"more-{len(list(folder.iterdir()))}.safetensors"
        write_tensors(folder / index["weight_map"][name], {name: (dtype, tuple(tensor.shape), raw_of(tensor))})
    (folder / INDEX).write_text(json.dumps(index))


def said(*words, code=0):
    return " ".join(checked(*words, code=code).output.split())


def test_mlx_states_each_module_that_is_stored_in_another_way(tmp_path):
    config = {**SIZES, "quantization": {**quantisation_as(INT4), DOWN: {"group_size": 32, "bits": 3}, "lm_head": False}}
    source = write_coded(tmp_path / "source", INT4, config=config)
    basis = write_basis(tmp_path, 256)
    parts = store(torch.randn((256, 192), generator=torch.Generator().manual_seed(9)) * 0.05, INT3)
    for rest, (dtype, tensor) in parts.items():
        put(source, f"{DOWN}.{rest}", dtype, tensor)
    shown = said("inspect", source)
    assert f"3 writers in {INT4}: codes are edited" in shown
    assert f"1 writer in {INT3}: codes are edited" in shown
    checked(source, tmp_path / "out", *options(tmp_path))
    old, new = parts_of(source), parts_of(tmp_path / "out")
    for module in old:
        form = INT3 if module == DOWN else INT4
        assert left(value_of(new[module], form), basis) < 5e-3 * left(value_of(old[module], form), basis)
    assert "4 edited tensors recomputed, 4 to the bit" in said("verify", source, tmp_path / "out")
    checked("dequantise", source, tmp_path / "plain")
    assert config_of(tmp_path / "plain") == SIZES


@pytest.mark.parametrize("keys", [("quantization",), ("quantization", "quantization_config")])
def test_mlx_is_told_which_modules_are_quantised_no_longer(tmp_path, keys):
    source = write_coded(tmp_path / "source", INT4, config={**SIZES, **dict.fromkeys(keys, quantisation_as(INT4))})
    write_basis(tmp_path, 256)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 1, "--dequantise", "writers"))
    modules = dict.fromkeys((DOWN, "model.layers.1.self_attn.o_proj"), False)
    assert config_of(tmp_path / "out") == {**SIZES, **{key: {**quantisation_as(INT4), **modules} for key in keys}}
    assert "2 to the bit" in said("verify", source, tmp_path / "out")
    assert "2 writers in MLX" in said("inspect", tmp_path / "out")


@pytest.mark.parametrize("before", [None, ["lm_head", "x"]])
def test_bitsandbytes_is_told_which_modules_are_quantised_no_longer(tmp_path, before):
    config = {**SIZES, "quantization_config": {**quantisation_as(NF4), "llm_int8_skip_modules": before}}
    source = write_coded(tmp_path / "source", NF4, config=config)
    write_basis(tmp_path, 256)
    which = ("--layers", 1, "--components", "mlp", "--dequantise", "writers")
    checked(source, tmp_path / "out", *options(tmp_path, *which))
    found = config_of(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert found == [*(before or ["lm_head"]), DOWN]
    assert "3 writers in NF4" in said("inspect", tmp_path / "out")


def state_of(**change):
    content = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [256, 192], **change}
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
NAN, INFINITE = (torch.full((256, 3), value).bfloat16() for value in (torch.nan, torch.inf))


@pytest.mark.parametrize(
    ("form", "rest", "dtype", "tensor", "message"),
    [
        (INT4, "scales", None, None, "expected .*down_proj.scales beside codes of MLX, found none"),
        (INT4, "biases", None, None, "expected .*down_proj.biases beside .*, found none"),
        (INT4, "biases", "BF16", NAN[:, :2], r"expected \[256, 3\] as .*biases, found \[256, 2\]"),
        (INT4, "biases", "F32", torch.zeros(256, 3), "expected BF16 as .*biases, found F32"),
        (INT4, "scales", "BF16", NAN[:, :2], r"4 bits in groups of 64, but 24 words .* \[256, 2\]"),
        (INT4, "scales", "BF16", NAN, "scales hold NaN or infinite"),
        (INT4, "biases", "BF16", INFINITE, "biases hold NaN or infinite"),
        ("MXFP4 (MLX)", "biases", "BF16", NAN, "E2M1 without offsets, but .*biases is there"),
        ("MXFP4 (MLX)", "scales", "U8", torch.full((256, 6), 255).to(torch.uint8), "scales hold NaN, infinite"),
        ("MXFP8 (MLX)", "weight", "U32", torch.full((256, 48), -1).to(torch.int32), "holds NaN codes"),
        (NF4, "weight.absmax", None, None, "expected .*weight.absmax beside codes of bitsandbytes, found none"),
        (NF4, "weight.quant_map", None, None, "expected .*weight.quant_map beside codes of bitsandbytes, found none"),
        (NF4, STATE, None, None, "expected .*__nf4 or .*__fp4 beside codes of bitsandbytes, found none"),
        (NF4, "weight.absmax", "F32", torch.zeros(99), "expected a scale for every 32, 64, .* 49152 codes .* found 99"),
        (NF4, "weight.absmax", "F32", torch.full((768,), torch.nan), "absmax hold NaN or infinite"),
        (NF4, "weight.quant_map", "F32", torch.zeros(16), "quant_map holds other values than those of NF4"),
        (NF4, STATE, "U8", state_of(shape=[256, 99]), r"says \[256, 99\], but its codes are \[256, 192\]"),
        (NF4, STATE, "U8", state_of(blocksize=128), "says NF4 in blocks of 128, .* its parts are NF4 in blocks of 64"),
        (NF4, STATE, "U8", state_of(nested_offset=1.0), "with an offset of scales, but its parts are NF4"),
        (NF4, STATE, "U8", torch.zeros(9).to(torch.uint8), "not a state of bitsandbytes"),
        (NESTED, "weight.nested_absmax", None, None, "expected .*nested_absmax beside codes of bitsandbytes"),
        (NESTED, "weight.nested_quant_map", "F32", torch.zeros(8), r"expected \[256\] as .*quant_map, found \[8\]"),
        (NESTED, STATE, "U8", state_of(), "without an offset of scales, but its parts are NF4"),
        (LLM_INT8, "SCB", None, None, "expected .*SCB beside codes of LLM.int8, found none"),
        (LLM_INT8, "SCB", "F32", torch.zeros(7), r"expected \[256\] or \[256, 1\] as .*SCB, found \[7\]"),
        (LLM_INT8, "SCB", "F32", -torch.ones(256), "SCB hold NaN, infinite or negative"),
        (LLM_INT8, "weight_format", "U8", torch.ones(1).to(torch.uint8), "weight_format says that its bytes do not"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, form, rest, dtype, tensor, message):
    source = write_coded(tmp_path / "source", form)
    write_basis(tmp_path, 256)
    put(source, f"{DOWN}.{rest}", dtype, tensor)
    before = snapshot(source)
    for words in ((source, tmp_path / "out", *options(tmp_path)), ("dequantise", source, tmp_path / "out")):
        output = said(*words, code=1)
        assert f"{DOWN}.weight" in output
        assert re.search(message, output), output
        assert re.search("dequantise (?:it|the checkpoint) with|fetch .* again", output)
        assert not (tmp_path / "out").exists()
    assert snapshot(source) == before


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (INT4, {"bits": 7}, "expected 2, 3, 4, 5, 6, 8 as bits, .* found 7, 64 and 'affine'"),
        (INT4, {"bits": 8}, "8 bits in groups of 64, but 24 words a row"),
        (INT4, {"mode": "mxfp4"}, "found 4, 64 and 'mxfp4'"),
        (INT4, {DOWN: False}, f"says that {DOWN} is not quantised, but it holds codes"),
        (INT4, {"quant_method": "fp8"}, "config.json has quant_method 'fp8' to say how"),
        (NF4, {"bnb_4bit_quant_type": "fp4"}, "config.json says 'fp4', but its state is .*__nf4"),
        (NF4, {"load_in_4bit": False}, "expected load_in_4bit in the quantization_config"),
        (NF4, {"quant_method": "fp8"}, "expected bitsandbytes as quant_method of codes of bitsandbytes, found 'fp8'"),
        (LLM_INT8, {"load_in_8bit": False}, "expected load_in_8bit in the quantization_config"),
        (LLM_INT8, {"quant_method": None}, "expected bitsandbytes as quant_method of codes of LLM.int8, found None"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused_by_name(tmp_path, form, change, message):
    config = {**SIZES, "quantization_config": {**quantisation_as(form), **change}}
    source = write_coded(tmp_path / "source", form, config=config)
    write_basis(tmp_path, 256)
    output = said(source, tmp_path / "out", *options(tmp_path), code=1)
    assert re.search(r"_proj\.weight", output)
    assert "dequantise the checkpoint" in output
    assert re.search(message, output), output
    assert not (tmp_path / "out").exists()


def test_rows_that_end_within_a_block_are_refused_by_name(tmp_path):
    source = write_coded(tmp_path / "source", NF4, inner=96)
    write_basis(tmp_path, 256)
    output = said(source, tmp_path / "out", *options(tmp_path), code=1)
    assert "its rows, 256 of 24576 codes, end within a block of 64" in output


@pytest.mark.parametrize("form", [NF4, NESTED])
@pytest.mark.parametrize("vocabulary", [1024, 1100])
def test_embeddings_in_four_bits_are_refused_and_the_way_out_works(tmp_path, form, vocabulary):
    source = write_coded(tmp_path / "source", form)
    values = torch.randn((vocabulary, 256), generator=torch.Generator().manual_seed(9)) * 0.05
    parts = store(values, form)
    for rest, (dtype, tensor) in parts.items():
        put(source, f"model.embed_tokens.{rest}", dtype, tensor)
    basis = write_basis(tmp_path, 256)
    chosen = options(tmp_path, "--components", "embedding,attention,mlp")
    output = said(source, tmp_path / "out", *chosen, code=1)
    assert "model.embed_tokens.weight: four bits of bitsandbytes are edited as [..., hidden, inputs] only" in output
    assert "add --dequantise all to edit it in bfloat16" in output
    assert not (tmp_path / "out").exists()
    assert "5 of 10 tensors" in said(source, tmp_path / "out", *chosen, "--dequantise", "all")
    checkpoint = open_checkpoint(tmp_path / "out")
    info = checkpoint.tensors["model.embed_tokens.weight"]
    assert (info.dtype, info.shape) == ("BF16", (vocabulary, 256))
    edited = torch.frombuffer(bytearray(read_range(checkpoint, info)), dtype=torch.bfloat16).reshape(info.shape)
    before = value_of({rest: tensor for rest, (_, tensor) in parts.items()}, form)
    assert left(edited.T, basis) < 5e-3 * left(before.T, basis)
    assert (edited.double() - before).norm() < 0.2 * before.norm()
    assert "5 to the bit" in said("verify", source, tmp_path / "out")
    assert config_of(tmp_path / "out") == SIZES
