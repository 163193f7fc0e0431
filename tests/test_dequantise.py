"""Codes become the bfloat16 nearest to what they stand for, and all that loaders look at follows."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from coded_checkpoints import (
    FORMS,
    TRANSPOSED,
    decoded,
    inner_of,
    options,
    parts_of,
    quantisation_as,
    quantise,
    raw_of,
    read_tensors,
    save_gpt_oss,
    store,
    value_of,
    write_basis,
    write_coded,
    write_fp8,
    write_tensors,
)
from command_line import checked, run
from raw_checkpoints import hidden as hidden_files
from raw_checkpoints import snapshot, write_llama
from safetensors.torch import load_file, save_file
from tiny_models import capture_stream

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint, read_range
from ablate_shards.surgery.dequantise import decoding, values
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.machine.staging import Staging

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.0.self_attn.o_proj"


def said(result):
    return " ".join(result.output.split())


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, change):
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def raw_tensors(folder):
    """Dtype, shape and bytes of every tensor, by name."""
    checkpoint = open_checkpoint(folder)
    return {
        name: (tensor.dtype, tensor.shape, read_range(checkpoint, tensor))
        for name, tensor in checkpoint.tensors.items()
    }


def stored(weight):
    return "BF16", tuple(weight.shape), raw_of(weight.bfloat16())


@pytest.fixture(params=FORMS)
def case(request, tmp_path):
    form = request.param
    source = write_coded(tmp_path / "source", form, hidden=64, inner=inner_of(form))
    expected = {f"{module}.weight": stored(value_of(parts, form)) for module, parts in parts_of(source).items()}
    return tmp_path, source, expected


def test_every_weight_is_the_nearest_bfloat16_and_all_else_is_the_sources(case):
    folder, source, expected = case
    before = snapshot(source)

    output = said(checked("dequantise", source, folder / "out"))

    assert snapshot(source) == before
    parts = {f"{module}.{rest}" for module, rests in parts_of(source).items() for rest in rests}
    rest = {name: tensor for name, tensor in raw_tensors(source).items() if name not in parts}
    assert raw_tensors(folder / "out") == rest | expected
    # The scales were alone in their shard, which is gone.
    assert sorted(snapshot(folder / "out")) == ["config.json", "dequantisation.json", FIRST, INDEX]
    assert config_of(folder / "out") == {k: v for k, v in config_of(source).items() if k != "quantization_config"}
    assert load_file(folder / "out" / FIRST).keys() == rest.keys() | expected.keys()
    assert "4 weights in" in output
    assert "quantization_config went" in output
    verified = said(checked("verify", source, folder / "out"))
    assert "is what its receipt says" in verified
    assert "4 weights decoded from its codes" in verified
    assert "10 tensors (10 BF16)" in checked("inspect", folder / "out").output


def test_jobs_and_the_size_of_pieces_change_no_byte_and_an_interrupted_run_goes_on(case, monkeypatch):
    folder, source, _ = case
    checked("dequantise", source, folder / "whole")
    expected = snapshot(folder / "whole")
    for module in (decoding, values):
        monkeypatch.setattr(module, "AT_ONCE", 1)
    monkeypatch.setattr("ablate_shards.surgery.checkpoint.amended._COMPUTED_CHUNK", 1001)
    checked("dequantise", source, folder / "pieces", "--jobs", 3, "--memory", "8MB")
    assert snapshot(folder / "pieces") == expected
    record = Staging.record

    def stop(self, shard, content):
        record(self, shard, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", stop)
    checked("dequantise", source, folder / "out", code=1)
    monkeypatch.undo()
    assert not (folder / "out").exists()
    checked("dequantise", source, folder / "out", "--resume")
    assert snapshot(folder / "out") == expected
    assert hidden_files(folder) == []


@pytest.mark.parametrize(
    ("layout", "kind", "shape", "experts"),
    [
        ("block", "F32", "", 0),
        ("block", "BF16", "", 0),
        ("block", "F8_E8M0", "", 0),
        ("channel", "BF16", "", 0),
        ("channel", "F32", "flat", 0),
        ("tensor", "F32", "flat", 0),
        ("block", "F32", "", 3),
    ],
)
def test_fp8_of_every_layout(tmp_path, layout, kind, shape, experts):
    source = write_fp8(tmp_path / "source", layout=layout, kind=kind, shape=shape, experts=experts)
    checked("dequantise", source, tmp_path / "out")
    tensors, found = read_tensors(source), raw_tensors(tmp_path / "out")
    expected = {}
    for name, codes in tensors.items():
        if codes.dtype == torch.float8_e4m3fn:
            scales = tensors.get(f"{name}_scale_inv")
            scales = tensors[f"{name.removesuffix('.weight')}_scale_inv"] if scales is None else scales
            expected[name] = stored(decoded(codes, scales, layout))
    assert len(expected) == 4
    assert {name: found[name] for name in expected} == expected
    # Scales of activations say nothing any more.
    assert not [name for name in found if "scale" in name]
    assert "is what its receipt says" in said(checked("verify", source, tmp_path / "out"))


def test_the_index_says_what_there_is(tmp_path):
    source = write_coded(tmp_path / "source", "NVFP4", hidden=64)
    index = json.loads((source / INDEX).read_text())
    index["metadata"] = {"total_size": sum(len(raw) for _, _, raw in raw_tensors(source).values()), "by": "x"}
    index["metadata"]["total_parameters"] = 7
    (source / INDEX).write_text(json.dumps(index))
    checked("dequantise", source, tmp_path / "out")
    found, tensors = json.loads((tmp_path / "out" / INDEX).read_text()), raw_tensors(tmp_path / "out")
    assert found["weight_map"] == dict.fromkeys(tensors, FIRST)
    assert found["metadata"] == {
        "total_size": sum(len(raw) for _, _, raw in tensors.values()),
        "total_parameters": sum(int(np.prod(shape)) for _, shape, _ in tensors.values()),
        "by": "x",
    }


def test_without_an_index_a_shard_that_is_left_empty_stays(tmp_path):
    source = write_coded(tmp_path / "source", "MXFP4", hidden=64)
    (source / INDEX).unlink()
    checked("dequantise", source, tmp_path / "out")
    assert load_file(tmp_path / "out" / SECOND) == {}
    assert len(open_checkpoint(tmp_path / "out").shards) == 2


@pytest.mark.parametrize("where", ["text_config", "hf_quant_config.json"])
def test_wherever_the_quantisation_is_stated_it_goes(tmp_path, where):
    form = "NVFP4 (ModelOpt)" if "json" in where else "int4 in groups of 32"
    source = write_coded(tmp_path / "source", form, hidden=64)
    config = config_of(source)
    stated = config.pop("quantization_config")
    if "json" in where:
        (source / where).write_text(json.dumps({"producer": {}, "quantization": {"quant_algo": "NVFP4"}}))
    else:
        config["text_config"] = {"quantization_config": stated, "model_type": "llama"}
        config["quantization_config"] = stated
    (source / "config.json").write_text(json.dumps(config))
    checked("dequantise", source, tmp_path / "out")
    assert "quantization_config" not in json.dumps(config_of(tmp_path / "out"))
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert "is what its receipt says" in said(checked("verify", source, tmp_path / "out"))


@pytest.mark.parametrize("which", ["writers", "all"])
def test_how_the_cache_is_quantised_goes_with_the_last_codes(tmp_path, which):
    source = write_fp8(tmp_path / "source")
    write_basis(tmp_path, 256)
    names = ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    index = json.loads((source / INDEX).read_text())
    write_tensors(source / "more.safetensors", {name: ("F32", (), bytes(4)) for name in names})
    index["weight_map"] |= dict.fromkeys(names, "more.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    change_config(source, lambda config: config.update(expert_dtype="fp8"))
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 1, "--dequantise", which))
    found, config = raw_tensors(tmp_path / "out"), config_of(tmp_path / "out")
    kept = which == "writers"
    assert [name in found for name in names] == [kept, kept]
    assert [key in config for key in ("quantization_config", "expert_dtype")] == [kept, kept]
    assert (tmp_path / "out" / "more.safetensors").exists() == kept


# ---------------------------------------------------------------------------------------- what is verified


@pytest.mark.parametrize("what", ["weight", "other", "config", "index"])
def test_verify_finds_a_single_byte_that_differs(tmp_path, what):
    source, out = write_coded(tmp_path / "source", "int4 in groups of 32", hidden=64), tmp_path / "out"
    checked("dequantise", source, out)
    if what in ("weight", "other"):
        name = f"{O_PROJ}.weight" if what == "weight" else "model.norm.weight"
        raw = bytearray((out / FIRST).read_bytes())
        raw[open_checkpoint(out).tensors[name].start + 10] ^= 1
        (out / FIRST).write_bytes(raw)
    else:
        name = "config.json" if what == "config" else INDEX
        (out / name).write_bytes((source / name).read_bytes())
    found = said(checked("verify", source, out, code=1))
    how = "is not what the source's codes stand for" if what == "weight" else "differs from the source"
    assert f"{name}: {how}" in found


def test_verify_finds_a_file_that_says_how_weights_were_quantised(tmp_path):
    source, out = write_coded(tmp_path / "source", "NVFP4 (ModelOpt)", hidden=64), tmp_path / "out"
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    checked("dequantise", source, out)
    assert "is what its receipt says" in said(checked("verify", source, out))
    shutil.copy(source / "hf_quant_config.json", out)
    assert "hf_quant_config.json: belongs to the quantised source" in said(checked("verify", source, out, code=1))


@pytest.mark.parametrize("lie", ["fewer", "another", "shape", "parts", "form"])
def test_a_receipt_that_lies_is_found(tmp_path, lie):
    source, out = write_coded(tmp_path / "source", "NVFP4", hidden=64), tmp_path / "out"
    checked("dequantise", source, out)
    content = json.loads((out / "dequantisation.json").read_text())
    first, second, *_ = content["dequantised"]
    if lie == "fewer":
        content["dequantised"].pop()
    elif lie == "another":
        first["parts"][0] = "model.norm.weight"
    elif lie == "shape":
        first["shape"] = [1, 2]
    elif lie == "parts":
        first["parts"] = second["parts"]
    else:
        first["stored_as"] = "FP8 per tensor"
    del content["sha256"]
    (out / "dequantisation.json").write_text(seal(content))
    assert re.search("does not fit the source|differ", said(checked("verify", source, out, code=1)))


# ---------------------------------------------------------------------------------------- with an edit


@pytest.mark.parametrize("which", ["writers", "all"])
@pytest.mark.parametrize("form", ["int4 in groups of 64, with zero points", "MXFP8", "NVFP4 (ModelOpt)"])
def test_the_edit_is_of_what_the_codes_stand_for(tmp_path, which, form):
    source = write_coded(tmp_path / "source", form, hidden=256)
    basis = write_basis(tmp_path, 256)
    checked("dequantise", source, tmp_path / "plain")
    checked(tmp_path / "plain", tmp_path / "expected", *options(tmp_path))

    output = said(checked(source, tmp_path / "out", *options(tmp_path, "--dequantise", which)))

    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "expected")
    assert snapshot(tmp_path / "out")["config.json"] == snapshot(tmp_path / "expected")["config.json"]
    assert "4 weights in" in output
    plan = json.loads(
        run(source, tmp_path / "no", *options(tmp_path, "--dequantise", which, "--dry-run", "--json")).stdout
    )
    assert plan["dequantised"] == json.loads((tmp_path / "out" / "ablation.json").read_text())["dequantised"]
    for record in json.loads((tmp_path / "out" / "ablation.json").read_text())["tensors"]:
        assert record["dtype"] == "BF16"
        assert record["after"] < 0.01 * record["before"]
    found = load_file(tmp_path / "out" / FIRST)[f"{O_PROJ}.weight"].double()
    assert (basis @ found).norm() < 1e-3 * found.norm()
    verified = said(checked("verify", source, tmp_path / "out"))
    assert "4 weights decoded from its codes, 4 edited tensors recomputed, 4 to the bit" in verified
    raw = bytearray((tmp_path / "out" / FIRST).read_bytes())
    raw[open_checkpoint(tmp_path / "out").tensors[f"{O_PROJ}.weight"].start + 1] ^= 8
    (tmp_path / "out" / FIRST).write_bytes(raw)
    assert f"{O_PROJ}.weight: " in said(checked("verify", source, tmp_path / "out", code=1))


LISTS = {
    "FP8": ("modules_to_not_convert",),
    "int4 in groups of 32": ("ignore",),
    "NVFP4 (ModelOpt)": ("exclude_modules",),
}


@pytest.mark.parametrize("form", LISTS)
def test_of_the_writers_alone_the_configuration_names_what_is_not_quantised(tmp_path, form):
    source = write_fp8(tmp_path / "source") if form == "FP8" else write_coded(tmp_path / "source", form, hidden=256)
    if form == "NVFP4 (ModelOpt)":
        quantised = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
        (source / "hf_quant_config.json").write_text(json.dumps({"quantization": quantised}))
    write_basis(tmp_path, 256)
    before = raw_tensors(source)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 1, "--dequantise", "writers"))

    modules = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    config = config_of(tmp_path / "out")["quantization_config"]
    stated = {**config_of(source)["quantization_config"]}
    assert config == {**stated, next(iter(LISTS[form])) if form != "NVFP4 (ModelOpt)" else "ignore": modules}
    if form == "NVFP4 (ModelOpt)":
        beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
        assert beside == {"quantization": {**quantised, "exclude_modules": ["lm_head", *modules]}}
    after = raw_tensors(tmp_path / "out")
    kept = {name for name in before if not name.startswith(tuple(f"{module}." for module in modules))}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() - kept == {f"{module}.weight" for module in modules}
    assert "2 to the bit" in said(checked("verify", source, tmp_path / "out"))
    # What it gives is a checkpoint whose other writers can still be edited as codes.
    assert "2 writers in" in checked("inspect", tmp_path / "out").output


@pytest.mark.parametrize(
    ("form", "more"),
    [
        (
            "GPTQ int4 in groups of 32, with zero points",
            {"dynamic": {"-:^lm_head$": {}, r"-:^model\.layers\.0\.self_attn\.o_proj$": {}}},
        ),
        ("AWQ int4 in groups of 64, with zero points", {"modules_to_not_convert": ["lm_head", O_PROJ]}),
    ],
)
def test_what_gptq_and_awq_are_told_is_what_their_loaders_read(tmp_path, form, more):
    key = next(iter(more))
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2}
    config["quantization_config"] = quantisation_as(form) | {
        key: {"-:^lm_head$": {}} if key == "dynamic" else ["lm_head"]
    }
    source = write_coded(tmp_path / "source", form, config=config)
    write_basis(tmp_path, 256)
    which = ("--layers", 0, "--components", "attention", "--dequantise", "writers")
    checked(source, tmp_path / "out", *options(tmp_path, *which))
    assert config_of(tmp_path / "out")["quantization_config"] == {**config["quantization_config"], **more}
    assert "1 to the bit" in said(checked("verify", source, tmp_path / "out"))


GPTQ, GPTQ_V2, AWQ = (form for form in TRANSPOSED if form.startswith(("GPTQ int4", "AWQ")))


CODED = [f"model.layers.{layer}.{module}" for layer in (0, 1) for module in ("self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("form", "stated"),
    [
        (GPTQ, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "sym": False}),
        (GPTQ_V2, {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}),
        (AWQ, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
        (
            GPTQ,
            {
                "quant_method": "auto-round",
                "bits": 8,
                "group_size": 128,
                "extra_config": {module: {"bits": 4, "group_size": 32} for module in CODED},
            },
        ),
        ("MXFP8", {"quant_method": "mxfp8"}),
        ("FP8", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    ],
)
def test_the_same_codes_under_another_method_get_the_same_bytes(tmp_path, form, stated):
    if form == "FP8":
        usual = write_fp8(tmp_path / "usual", layout="channel", ending="weight_scale")
    else:
        usual = write_coded(tmp_path / "usual", form)
    other = tmp_path / "other"
    shutil.copytree(usual, other)
    config = config_of(other)
    kept = {key: value for key, value in config["quantization_config"].items() if key in ("bits", "group_size")}
    config["quantization_config"] = {**kept, **stated}
    (other / "config.json").write_text(json.dumps(config))
    write_basis(tmp_path, config["hidden_size"])
    for name, more in (("coded", ()), ("part", ("--dequantise", "writers")), ("all", ("--dequantise", "all"))):
        for source in (usual, other):
            checked(source, tmp_path / f"{source.name}-{name}", *options(tmp_path, *more))
            checked("verify", source, tmp_path / f"{source.name}-{name}")
        ours, theirs = (snapshot(tmp_path / f"{each}-{name}") for each in ("usual", "other"))
        assert ours.keys() == theirs.keys()
        shards = [file for file in ours if file.endswith(".safetensors")]
        assert shards
        assert [file for file in shards if ours[file] != theirs[file]] == []
    assert "quantization_config" not in config_of(tmp_path / "other-all")


def test_auto_round_is_told_which_modules_are_quantised_no_longer(tmp_path):
    source = write_coded(tmp_path / "source", GPTQ)
    config = config_of(source)
    config["quantization_config"] |= {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 16}}}
    (source / "config.json").write_text(json.dumps(config))
    write_basis(tmp_path, 256)
    which = ("--layers", 0, "--components", "attention", "--dequantise", "writers")
    checked(source, tmp_path / "out", *options(tmp_path, *which))
    stated = config_of(tmp_path / "out")["quantization_config"]
    assert stated["extra_config"] == {"lm_head": {"bits": 16}, O_PROJ: {"bits": 16}}
    changed = dict(config["quantization_config"], packing_format="auto_round:fp8_static")
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
    output = said(checked(source, tmp_path / "refused", *options(tmp_path), code=1))
    assert "expected auto_round:auto_gptq or auto_round:gptqmodel" in output
    assert "as packing_format of integers of GPTQ or AWQ, found 'auto_round:fp8_static'" in output


def test_lists_that_are_there_are_added_to(tmp_path):
    said_before = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"]}
    source = write_fp8(tmp_path / "source", quantisation=said_before)
    write_basis(tmp_path, 256)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 0, "--dequantise", "writers"))
    stated = config_of(tmp_path / "out")["quantization_config"]
    assert stated["ignored_layers"] == ["lm_head", O_PROJ, "model.layers.0.mlp.down_proj"]
    assert "modules_to_not_convert" not in stated


def write_experts(folder, hidden=256, inner=64, layers=2, experts=2):
    """A mixture of experts in int4, one module an expert, with a shared expert and all projections quantised."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    tensors["model.embed_tokens.weight"] = ("BF16", (8, hidden), bytes(16 * hidden))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.mlp.gate.weight"] = ("BF16", (experts, hidden), bytes(2 * experts * hidden))
        modules = {f"{prefix}.self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "o")}
        for place in (*(f"experts.{number}" for number in range(experts)), "shared_experts"):
            modules |= {f"{prefix}.mlp.{place}.{part}_proj": (inner, hidden) for part in ("gate", "up")}
            modules[f"{prefix}.mlp.{place}.down_proj"] = (hidden, inner)
        for module, size in modules.items():
            parts = store(torch.randn(size, generator=generator) * 0.05, "int4 in groups of 32")
            tensors |= {f"{module}.{rest}": (kind, tuple(t.shape), raw_of(t)) for rest, (kind, t) in parts.items()}
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors)
    config = {"model_type": "deepseek_v3", "hidden_size": hidden, "num_hidden_layers": layers}
    config["quantization_config"] = quantisation_as("int4 in groups of 32")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_experts_of_a_layer_go_together(tmp_path):
    source = write_experts(tmp_path / "source")
    write_basis(tmp_path, 256)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 1, "--dequantise", "writers"))
    plain = {
        name.removesuffix(".weight") for name, (dtype, *_) in raw_tensors(tmp_path / "out").items() if dtype == "BF16"
    }
    plain = {name for name in plain if name.endswith("_proj")}
    experts = {f"experts.{number}.{part}_proj" for number in (0, 1) for part in ("gate", "up", "down")}
    assert plain == {f"model.layers.1.mlp.{rest}" for rest in {*experts, "shared_experts.down_proj"}} | {
        "model.layers.1.self_attn.o_proj"
    }
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.shared_experts.down_proj"} < {*ignored}
    (pattern,) = (name.removeprefix("re:") for name in ignored if name.startswith("re:"))
    matched = {name for name in plain if re.match(pattern, name)}
    assert matched == {f"model.layers.1.mlp.{rest}" for rest in experts}
    assert not re.match(pattern, "model.layers.11.mlp.experts.0.up_proj")
    assert "to the bit" in said(checked("verify", source, tmp_path / "out"))


def test_transformers_passes_over_the_modules_that_are_named(tmp_path):
    from transformers.quantizers.quantizers_utils import should_convert_module

    source = write_fp8(tmp_path / "source", experts=2, model_type="qwen3_moe")
    write_basis(tmp_path, 256)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 1, "--dequantise", "writers"))
    named = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert named == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts"]
    for module in (*named, "model.layers.1.mlp.experts.0.up_proj"):
        assert not should_convert_module(module, named)
    for module in ("model.layers.11.mlp.experts", "model.layers.0.mlp.experts", "model.layers.1.self_attn.q_proj"):
        assert should_convert_module(module, named)


# ---------------------------------------------------------------------------------------- models that run


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


def load(kind, folder, **settings):
    model, info = kind.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **settings)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_gpt_oss_is_what_transformers_makes_of_its_blocks(tmp_path):
    from transformers import GptOssForCausalLM, Mxfp4Config
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = save_gpt_oss(tmp_path / "source", hidden=128)
    checked("dequantise", source, tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    for part in ("down_proj", "gate_up_proj"):
        name = f"model.layers.1.mlp.experts.{part}"
        expected = convert_moe_packed_tensors(old[f"{name}_blocks"], old[f"{name}_scales"])
        assert torch.equal(new[name], expected)
    wanted = GptOssForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    model = load(GptOssForCausalLM, tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), logits(wanted))
    assert "is what its receipt says" in said(checked("verify", source, tmp_path / "out"))


def test_the_experts_of_gpt_oss_are_edited_in_bfloat16_layer_by_layer(tmp_path):
    from transformers import GptOssForCausalLM, Mxfp4Config

    source = save_gpt_oss(tmp_path / "source", hidden=128)
    write_basis(tmp_path, 128)
    for which, layers in (("writers", 1), ("all", "0-1")):
        out = tmp_path / which
        result = checked(source, out, *options(tmp_path, "--layers", layers, "--dequantise", which))
        assert ("vLLM takes all layers or none" in said(result)) == (which == "writers")
        assert "to the bit" in said(checked("verify", source, out))
        tensors = load_file(out / "model.safetensors")
        name = "model.layers.1.mlp.experts"
        assert tensors[f"{name}.down_proj"].shape == (4, 192, 128)
        assert f"{name}.gate_up_proj" in tensors
        assert (f"{name.replace('1', '0')}.down_proj_blocks" in tensors) == (which == "writers")
        told = {"quantization_config": Mxfp4Config(dequantize=True)} if which == "writers" else {}
        model = GptOssForCausalLM.from_pretrained(out, dtype=torch.bfloat16, **told)
        assert torch.equal(model.state_dict()[f"{name}.down_proj"], tensors[f"{name}.down_proj"])


def save_qwen_fp8(folder):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "max_position_embeddings": 64}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, pad_token_id=0)).save_pretrained(folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight.bfloat16()
        if name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight.float(), "block", "BF16")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said_so = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    change_config(folder, lambda config: config.update(quantization_config=said_so))
    return folder


def test_a_model_in_fp8_gives_the_logits_that_transformers_dequantises_it_to(tmp_path):
    from transformers import FineGrainedFP8Config, Qwen3ForCausalLM

    source = save_qwen_fp8(tmp_path / "source")
    told = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    checked("dequantise", source, tmp_path / "out")
    wanted = load(Qwen3ForCausalLM, source, **told)
    assert torch.equal(logits(load(Qwen3ForCausalLM, tmp_path / "out")), logits(wanted))
    basis = write_basis(tmp_path, 256)

    def shares(folder, **settings):
        stream = capture_stream(load(Qwen3ForCausalLM, folder, **settings).float())
        return [float(((basis @ state.double().mT).abs() / state.double().norm(dim=-1)).max()) for state in stream]

    assert min(shares(source, **told)) > 0.03
    more = ["--components", "attention,mlp,embedding"]
    for which, settings in (("writers", told), ("all", {})):
        checked(source, tmp_path / which, *options(tmp_path, "--dequantise", which, *more))
        assert max(shares(tmp_path / which, **settings)) < 1e-2
    assert "model.layers.0.self_attn.q_proj.weight_scale_inv" in load_file(tmp_path / "writers" / "model.safetensors")


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("int4 in groups of 32", "pack-quantized"),
        ("MXFP4", "mxfp4-pack-quantized"),
        ("NVFP4", "nvfp4-pack-quantized"),
    ],
)
def test_compressed_tensors_itself_runs_what_is_partly_or_wholly_dequantised(tmp_path, form, name):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    source = save_qwen_fp8(tmp_path / "source")
    tensors = {}
    for key, weight in load_file(source / "model.safetensors").items():
        if key.endswith("proj.weight"):
            parts = store(torch.randn(weight.shape) * 0.05, form)
            tensors |= {f"{key.removesuffix('.weight')}.{rest}": tensor for rest, (_, tensor) in parts.items()}
        elif not key.endswith("scale_inv"):
            tensors[key] = weight
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": quantisation_as(form)["config_groups"]["group_0"]["weights"]}
    stated = {"config_groups": {"group_0": {**group, "format": name}}, "format": name, "ignore": ["lm_head"]}
    stated |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    change_config(source, lambda config: config.update(quantization_config=stated))
    write_basis(tmp_path, 256)
    models = {}
    checked("dequantise", source, tmp_path / "all")
    more = ["--coefficient", 0, "--preserve", "none", "--dequantise", "writers"]
    checked(source, tmp_path / "writers", *options(tmp_path, *more))
    for folder in (source, tmp_path / "all", tmp_path / "writers"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        models[folder.name] = logits(model)
    assert torch.equal(models["all"], models["source"])
    assert torch.equal(models["writers"], models["source"])


# ---------------------------------------------------------------------------------------- what is refused


def refuse(folder, *arguments, code=1):
    output = said(checked(*arguments, code=code))
    assert not (folder / "out").exists()
    assert hidden_files(folder) == []
    return output


def test_what_is_not_quantised_is_refused(tmp_path):
    source = write_llama(tmp_path / "source")
    output = refuse(tmp_path, "dequantise", source, tmp_path / "out")
    assert "holds no quantised weights (its tensors are BF16), so there is nothing to dequantise; use it" in output


def test_writers_without_codes_are_refused(tmp_path):
    source = write_fp8(tmp_path / "source")
    write_basis(tmp_path, 256)
    more = ["--components", "embedding", "--dequantise", "writers"]
    output = refuse(tmp_path, source, tmp_path / "out", *options(tmp_path, *more), code=2)
    assert "none of the weights that would be edited" in output


@pytest.mark.parametrize("method", ["hqq", "torchao", None])
def test_other_formats_are_refused_by_name(tmp_path, method):
    source = write_fp8(tmp_path / "source", quantisation={"quant_method": method})
    output = refuse(tmp_path, "dequantise", source, tmp_path / "out")
    assert f"as quant_method, found {method!r}, which is not decoded here; dequantise it with the library" in output


def test_a_weight_of_another_format_beside_others_is_refused(tmp_path):
    source = write_fp8(tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    write_tensors(source / "more.safetensors", {"model.layers.0.mlp.up_proj.SCB": ("I32", (2, 4), bytes(32))})
    index["weight_map"]["model.layers.0.mlp.up_proj.SCB"] = "more.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    output = refuse(tmp_path, "dequantise", source, tmp_path / "out")
    assert "up_proj.SCB: I32 of [2, 4] is part of a format that is not decoded here" in output


@pytest.mark.parametrize("where", ["codes", "scales", "large"])
def test_what_stands_for_no_number_is_refused(tmp_path, where):
    source = write_fp8(tmp_path / "source", kind="F32")
    name = f"{O_PROJ}.weight" if where == "codes" else f"{O_PROJ}.weight_scale_inv"
    old = raw_tensors(source)[name][2]
    new = (
        b"\x7f" + old[1:] if where == "codes" else np.float32(3e38 if where == "large" else np.nan).tobytes() + old[4:]
    )
    for shard in (FIRST, SECOND):
        (source / shard).write_bytes((source / shard).read_bytes().replace(old, new))
    output = refuse(tmp_path, "dequantise", source, tmp_path / "out")
    what = {"codes": "holds NaN codes", "scales": "hold NaN, infinite", "large": "too large for bfloat16"}[where]
    assert f"{O_PROJ}.weight: " in output
    assert what in output


def test_one_file_without_its_configuration_is_refused(tmp_path):
    source = save_gpt_oss(tmp_path / "source", hidden=64)
    output = refuse(tmp_path, "dequantise", source / "model.safetensors", tmp_path / "out")
    assert "name a folder that holds the weights and their configuration" in output


def test_what_modelopt_says_has_to_be_an_object(tmp_path):
    source = write_coded(tmp_path / "source", "NVFP4 (ModelOpt)", hidden=256)
    write_basis(tmp_path, 256)
    (source / "hf_quant_config.json").write_text('{"quantization": 7}')
    more = ["--layers", 0, "--dequantise", "writers"]
    output = refuse(tmp_path, source, tmp_path / "out", *options(tmp_path, *more))
    assert "hf_quant_config.json: expected an object as quantization; restore the file" in output


def test_scales_that_are_missing_are_named(tmp_path):
    source = write_fp8(tmp_path / "source", ending="activation_scale")
    output = refuse(tmp_path, "dequantise", source, tmp_path / "out")
    assert re.search(r"_proj.weight: expected the scales of FP8 codes in one of .* found none", output)


def test_a_plan_is_printed_and_nothing_written(case):
    folder, source, _ = case
    output = refuse(folder, "dequantise", source, folder / "out", "--dry-run", code=0)
    assert "4 weights in" in output
    assert "would be written in bfloat16" in output
    plan = json.loads(run("dequantise", source, folder / "out", "--dry-run", "--json").stdout)
    assert len(plan["tensors"]) == 4
    assert plan["unset"] == ["quantization_config"]


def test_an_edit_that_was_interrupted_goes_on_and_untouched_shards_can_be_linked(tmp_path, monkeypatch):
    source = write_coded(tmp_path / "source", "MXFP4", hidden=64)
    write_basis(tmp_path, 64)
    index = json.loads((source / INDEX).read_text())
    write_tensors(source / "more.safetensors", {"model.extra.weight": ("BF16", (4, 4), bytes(32))})
    index["weight_map"]["model.extra.weight"] = "more.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    chosen = options(tmp_path, "--dequantise", "writers")
    checked(source, tmp_path / "whole", *chosen, "--link")
    assert (tmp_path / "whole" / "more.safetensors").samefile(source / "more.safetensors")
    record = Staging.record

    def stop(self, shard, content):
        record(self, shard, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", stop)
    checked(source, tmp_path / "out", *chosen, code=1)
    monkeypatch.undo()
    other = checked(source, tmp_path / "out", *options(tmp_path), "--resume", code=1)
    assert "resume" in said(other)
    checked(source, tmp_path / "out", *chosen, "--resume")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_there_is_nothing_to_report_of_it(tmp_path):
    source = write_coded(tmp_path / "source", "MXFP4", hidden=64)
    checked("dequantise", source, tmp_path / "out")
    assert "nothing to report" in said(checked("report", tmp_path / "out", code=1))
    # What an earlier run made may be replaced, and only that.
    checked("dequantise", source, tmp_path / "out", code=1)
    checked("dequantise", source, tmp_path / "out", "--overwrite")
