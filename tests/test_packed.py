"""Checkpoints in packed integers, GPTQ, AWQ, MXFP4, MXFP8 and NVFP4 are edited in place, whatever their names."""

import json
import re

import pytest
import torch
from coded_checkpoints import (
    CODES,
    FORMS,
    GROUPS,
    inner_of,
    left,
    options,
    parts_of,
    quantisation_as,
    raw_of,
    save_gpt_oss,
    store,
    unpacked,
    value_of,
    write_basis,
    write_coded,
    write_tensors,
)
from command_line import checked
from raw_checkpoints import snapshot
from safetensors.torch import load_file, save_file
from tiny_models import capture_stream

from ablate_shards.kernels import reference
from ablate_shards.surgery.edit import coded
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.machine.staging import Staging

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
DOWN = "model.layers.1.mlp.down_proj"


def records(folder):
    receipt = json.loads((folder / "ablation.json").read_text())
    return {record["name"].rpartition(".")[0]: record for record in receipt["tensors"]}


@pytest.fixture(params=FORMS)
def case(request, tmp_path):
    form = request.param
    source = write_coded(tmp_path / "source", form, hidden=1024, inner=inner_of(form))
    return tmp_path, source, form, write_basis(tmp_path, 1024)


def test_only_codes_change_and_the_direction_is_gone(case):
    folder, source, form, basis = case
    before = snapshot(source)

    checked(source, folder / "out", *options(folder))

    assert snapshot(source) == before
    out = snapshot(folder / "out")
    assert {name for name in before if out[name] != before[name]} == {FIRST}
    header = 8 + int.from_bytes(before[FIRST][:8], "little")
    assert before[FIRST][:header] == out[FIRST][:header]
    old, new = parts_of(source), parts_of(folder / "out")
    for module, parts in old.items():
        changed = {rest for rest in parts if raw_of(parts[rest]) != raw_of(new[module][rest])}
        assert changed == {rest for rest in parts if rest in CODES}
        weight, written = value_of(parts, form), value_of(new[module], form)
        record = records(folder / "out")[module]
        ideal, _ = reference.ablate(weight, basis, preserve="columns")
        assert left(written, basis) < 2e-3 * left(weight, basis)
        assert record["nearest"] > (0.01 if "8" in form else 0.5) * left(weight, basis)
        assert record["before"] == pytest.approx(left(weight, basis), rel=1e-4)
        assert record["after"] == pytest.approx(left(written, basis), abs=1e-6)
        assert record["error"] == pytest.approx(float((written.double() - ideal).norm() / ideal.norm()), rel=1e-3)
        assert record["changed"] == int((weight != written).sum())
        assert record["stored_as"] == form.partition(" (")[0]
        named = {record["scales"]["name"], *(part["name"] for part in record["scales"].get("parts", ()))}
        assert named == {f"{module}.{rest}" for rest in parts if rest not in CODES}
    assert "4 edited tensors recomputed, 4 to the bit" in checked("verify", source, folder / "out").output


@pytest.mark.parametrize("form", FORMS)
def test_at_the_width_of_a_real_model_a_thousandth_is_left_where_the_nearest_codes_keep_it(tmp_path, form):
    source = write_coded(tmp_path / "source", form, hidden=4096, inner=64, layers=1)
    basis = write_basis(tmp_path, 4096)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 0))
    old, new = parts_of(source), parts_of(tmp_path / "out")
    for module, record in records(tmp_path / "out").items():
        weight, written = value_of(old[module], form), value_of(new[module], form)
        assert left(written, basis) < 1e-3 * left(weight, basis)
        assert record["nearest"] > (0.05 if "8" in form else 0.7) * left(weight, basis)


@pytest.mark.parametrize("preserve", ["rows", "none"])
@pytest.mark.parametrize("coefficient", [0, 0.5, 2])
@pytest.mark.parametrize(
    "form",
    [
        "int4 in groups of 64, with zero points",
        "GPTQ int4 in groups of 64, with zero points (order of activations)",
        "NVFP4",
    ],
)
def test_other_norms_and_coefficients_come_as_near(tmp_path, preserve, coefficient, form):
    source = write_coded(tmp_path / "source", form, hidden=1024, layers=1)
    basis = write_basis(tmp_path, 1024)
    more = ["--preserve", preserve, "--coefficient", coefficient, "--layers", 0]
    checked(source, tmp_path / "out", *options(tmp_path, *more))
    old, new = parts_of(source), parts_of(tmp_path / "out")
    for module, parts in old.items():
        weight, written = value_of(parts, form), value_of(new[module], form)
        ideal, _ = reference.ablate(weight, basis, preserve=preserve, coefficient=coefficient)
        off = (basis @ (written.double() - ideal)).norm() / weight.double().norm()
        assert off < 2e-3 * left(weight, basis)
        if coefficient == 0:
            assert all(raw_of(parts[rest]) == raw_of(new[module][rest]) for rest in parts)


def test_jobs_memory_and_the_size_of_blocks_change_no_byte(case, monkeypatch):
    folder, source, *_ = case
    checked(source, folder / "out", *options(folder))
    expected = snapshot(folder / "out")
    checked(source, folder / "other", *options(folder, "--memory", "8MB", "--jobs", 3))
    assert snapshot(folder / "other") == expected
    monkeypatch.setattr(coded, "_STRIPE", 1)
    monkeypatch.setattr(coded, "_TILE", 1024 * 7)
    monkeypatch.setattr("ablate_shards.surgery.edit.ablation_editor._CODES_AT_ONCE", 1)
    monkeypatch.setattr("ablate_shards.surgery.dequantise.decoding.AT_ONCE", 1)
    checked(source, folder / "striped", *options(folder))
    assert snapshot(folder / "striped") == expected


@pytest.mark.parametrize("form", ["int4 in groups of 64, with zero points", "MXFP4"])
def test_without_a_compiler_numpy_does_it(tmp_path, form, monkeypatch):
    source = write_coded(tmp_path / "source", form, hidden=512)
    basis = write_basis(tmp_path, 512)
    monkeypatch.setattr("ablate_shards.kernels.native.native._library", lambda: None)
    checked(source, tmp_path / "out", *options(tmp_path))
    for module, parts in parts_of(source).items():
        written = value_of(parts_of(tmp_path / "out")[module], form)
        assert left(written, basis) < 5e-3 * left(value_of(parts, form), basis)
    assert "4 to the bit" in checked("verify", source, tmp_path / "out").output


def test_an_interrupted_run_goes_on(case, monkeypatch):
    folder, source, *_ = case
    checked(source, folder / "whole", *options(folder))
    record = Staging.record

    def stop(self, shard, content):
        record(self, shard, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", stop)
    checked(source, folder / "out", *options(folder), code=1)
    monkeypatch.undo()
    checked(source, folder / "out", *options(folder, "--resume"))
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_verify_finds_a_single_code_and_every_part_that_differs(case):
    folder, source, *_ = case
    checked(source, folder / "out", *options(folder))
    record = records(folder / "out")[DOWN]
    for place in (record, record["scales"], *record["scales"].get("parts", ())):
        file = folder / "out" / place.get("shard", record["shard"])
        raw = bytearray(file.read_bytes())
        raw[place["bytes"][0]] ^= 1
        whole = file.read_bytes()
        file.write_bytes(raw)
        found = checked("verify", source, folder / "out", code=1).output
        if place is record:
            assert re.search(r"down_proj.q?weight\w*: 1 of \d+ (bytes of )?codes are not those that the edit", found)
        else:
            assert f"{place['name']}: differs from the source" in found
        file.write_bytes(whole)
    checked("verify", source, folder / "out")


def test_inspect_and_dry_run_say_how_codes_are_stored(case):
    folder, source, form, _ = case
    name = form.partition(" (")[0]
    assert f"4 writers in {name}: codes are edited" in " ".join(checked("inspect", source).output.split())
    plan = checked(source, folder / "out", *options(folder, "--dry-run")).output
    kind = re.sub(r" (?:in groups|in blocks|per channel).*", "", name)
    assert f"4 tensors in {kind}: codes would be edited" in plan


def test_a_nested_configuration_is_read(tmp_path):
    form = "int4 in groups of 32"
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2}
    config["text_config"] = {"quantization_config": quantisation_as(form)}
    source = write_coded(tmp_path / "source", form, config=config)
    assert "4 writers in int4 in groups of 32" in checked("inspect", source).output


def test_what_modelopt_says_beside_the_configuration_is_read(tmp_path):
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2}
    source = write_coded(tmp_path / "source", "NVFP4 (ModelOpt)", config=config)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    assert "4 writers in NVFP4" in checked("inspect", source).output


def test_of_two_groups_the_one_that_fits_is_taken(tmp_path):
    form = "int4 in groups of 32"
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2}
    quantisation = quantisation_as(form)
    quantisation["config_groups"]["group_1"] = {"weights": GROUPS["int8 in groups of 32"]}
    source = write_coded(tmp_path / "source", form, config={**config, "quantization_config": quantisation})
    assert "4 writers in int4 in groups of 32" in checked("inspect", source).output


def without(source, rest):
    """Takes a part of one writer out of the second shard."""
    raw = (source / SECOND).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name not in ("__metadata__", f"{DOWN}.{rest}")
    }
    write_tensors(source / SECOND, tensors)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"][f"{DOWN}.{rest}"]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("form", "rest", "message"),
    [
        (
            "int4 in groups of 32",
            "weight_scale",
            "expected the scales of packed integers in .*weight_scale, found none",
        ),
        ("int4 in groups of 32", "weight_shape", "expected .*weight_shape beside packed integers, found none"),
        (
            "int4 in groups of 64, with zero points",
            "weight_zero_point",
            "are not symmetric, but its zero points are none",
        ),
        ("NVFP4", "weight_global_scale", "expected one of .*weight_scale_2 and .*weight_global_scale .*, found none"),
        ("NVFP4 (ModelOpt)", "weight_scale_2", "expected one of .*weight_scale_2 and .*, found none"),
        ("MXFP4", "weight_scale", "expected the scales of FP4 codes in .*weight_scale, found none"),
        (
            "AWQ int4 in groups of 64, with zero points",
            "scales",
            "expected the scales of .* AWQ in .*scales, found none",
        ),
        ("GPTQ int3 per channel, with zero points", "qzeros", "expected .*qzeros beside .* GPTQ or AWQ, found none"),
    ],
)
def test_a_part_that_is_missing_is_named(tmp_path, form, rest, message):
    source = write_coded(tmp_path / "source", form)
    write_basis(tmp_path, 256)
    without(source, rest)
    output = " ".join(checked(source, tmp_path / "out", *options(tmp_path), code=1).output.split())
    assert re.search(rf"{DOWN}\.q?weight", output)
    assert re.search(message, output), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("int4 in groups of 32", {"quant_method": "gptq"}, "expected compressed-tensors as quant_method of packed int"),
        ("int4 in groups of 32", {"config_groups": {}}, "expected one group of config_groups to say what .*none that"),
        (
            "int4 in groups of 32",
            {"config_groups": {"a": {"weights": GROUPS["int4 in groups of 32"] | {"group_size": 64}}}},
            "none that fits",
        ),
        (
            "int4 in groups of 32",
            {"config_groups": {"a": {"weights": GROUPS["int4 in groups of 32"] | {"symmetric": False}}}},
            "its integers are not symmetric, but its zero points are none",
        ),
        ("MXFP4", {"transform_config": {"config_groups": {}}}, "rotated"),
        (
            "int8 per channel (bytes)",
            {"config_groups": {}},
            "expected one group of config_groups to have integers of 8",
        ),
        ("MXFP4", {"quant_method": "awq"}, "expected compressed-tensors as quant_method of FP4 codes, found 'awq'"),
        (
            "NVFP4",
            {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}},
            "expected config_groups to have floats of 4 bits in groups of 16",
        ),
        (
            "GPTQ int3 per channel, with zero points",
            {"checkpoint_format": "marlin"},
            "expected gptq or gptq_v2 as checkpoint_format of .*, found 'marlin'",
        ),
        (
            "GPTQ int3 per channel, with zero points",
            {"bits": 4},
            r"expected \[1, 256\] as .*scales, found|expected .* as .*qzeros, found",
        ),
        (
            "AWQ int4 in groups of 64, with zero points",
            {"version": "gemv"},
            "expected gemm as version of .*, found 'gemv'",
        ),
        ("AWQ int4 in groups of 64, with zero points", {"group_size": 32}, r"expected \[6, 256\] as .*scales, found"),
        ("AWQ int4 in groups of 64, with zero points", {"bits": 3}, "expected bits of .* group_size, found 3 and 64"),
        ("NVFP4 (ModelOpt)", {"quant_method": "fp8"}, "expected modelopt, quark as quant_method of FP4 codes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_with_a_way_out(tmp_path, form, change, message):
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2}
    config["quantization_config"] = {**quantisation_as(form), **change}
    source = write_coded(tmp_path / "source", form, config=config)
    write_basis(tmp_path, 256)
    output = " ".join(checked(source, tmp_path / "out", *options(tmp_path), code=1).output.split())
    assert re.search(r"_proj\.q?weight", output)
    assert "dequantise the checkpoint" in output
    assert re.search(message, output), output
    assert not (tmp_path / "out").exists()


def put(source, name, raw):
    """Overwrites the first bytes of a tensor."""
    for file in (source / FIRST, source / SECOND):
        whole = bytearray(file.read_bytes())
        size = int.from_bytes(whole[:8], "little")
        entry = json.loads(whole[8 : 8 + size]).get(name)
        if entry:
            start = 8 + size + entry["data_offsets"][0]
            whole[start : start + len(raw)] = raw
            file.write_bytes(whole)


@pytest.mark.parametrize(
    ("form", "rest", "raw", "message"),
    [
        ("int4 per channel", "weight_shape", (1024).to_bytes(8, "little"), r"weight_shape says \[1024, 203\]"),
        ("int4 in groups of 32", "weight_scale", b"\xff\x7f", "weight_scale hold NaN, infinite or negative"),
        ("MXFP4", "weight_scale", b"\xff", "weight_scale hold NaN, infinite or negative"),
        ("NVFP4", "weight_global_scale", bytes(4), "weight_global_scale hold NaN, infinite or negative"),
        ("NVFP4 (ModelOpt)", "weight_scale", b"\x7f", "hold NaN, infinite or negative"),
        ("MXFP8", "weight", b"\xff", "holds NaN codes"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(tmp_path, form, rest, raw, message):
    source = write_coded(tmp_path / "source", form, inner=inner_of(form))
    write_basis(tmp_path, 256)
    put(source, f"{DOWN}.{rest}", raw)
    output = " ".join(checked(source, tmp_path / "out", *options(tmp_path), code=1).output.split())
    assert f"{DOWN}.weight" in output
    assert re.search(message, output), output
    assert not (tmp_path / "out").exists()


def put_groups(source, groups):
    """Says of the first MLP in which group each of its columns is."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight_g_idx"
    write_tensors(source / "more.safetensors", {name: ("I32", tuple(groups.shape), raw_of(groups.to(torch.int32)))})
    index["weight_map"][name] = "more.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def test_columns_whose_groups_are_in_another_order_have_the_scales_of_theirs(tmp_path):
    form = "int4 in groups of 32"
    source = write_coded(tmp_path / "source", form, layers=1, hidden=1024)
    basis = write_basis(tmp_path, 1024)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(2))
    put_groups(source, order // 32)
    checked(source, tmp_path / "out", *options(tmp_path, "--layers", 0))
    module = "model.layers.0.mlp.down_proj"
    scales = parts_of(source)[module]["weight_scale"].float()[:, order // 32]
    weight, written = (
        (unpacked(parts_of(folder)[module]["weight_packed"], 4, 192) - 8) * scales
        for folder in (source, tmp_path / "out")
    )
    assert left(written, basis) < 1e-3 * left(weight, basis)
    assert records(tmp_path / "out")[module]["before"] == pytest.approx(left(weight, basis), rel=1e-4)

    put_groups(source, torch.full((192,), -1))
    checked(source, tmp_path / "plain", *options(tmp_path, "--layers", 0))
    weight = value_of(parts_of(source)[module], form)
    assert records(tmp_path / "plain")[module]["before"] == pytest.approx(left(weight, basis), rel=1e-4)


def test_zero_points_beside_bytes_that_are_said_to_be_symmetric_are_refused_by_name(tmp_path):
    source = write_coded(tmp_path / "source", "int8 per channel (bytes)", layers=1)
    write_basis(tmp_path, 256)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight_zero_point"
    write_tensors(source / "more.safetensors", {name: ("I8", (256, 1), bytes(256))})
    index["weight_map"][name] = "more.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for words in (
        (source, tmp_path / "out", *options(tmp_path, "--layers", 0)),
        ("dequantise", source, tmp_path / "out"),
    ):
        output = " ".join(checked(*words, code=1).output.split())
        assert "down_proj.weight: " in output
        assert "dequantise the checkpoint" in output
        assert "integers of 8 bits that are not symmetric, found none" in output


@pytest.mark.parametrize("groups", [torch.arange(192), torch.zeros(7), torch.arange(192) - 200])
def test_groups_that_cannot_be_are_refused_by_name(tmp_path, groups):
    source = write_coded(tmp_path / "source", "int4 in groups of 32", layers=1)
    write_basis(tmp_path, 256)
    put_groups(source, groups)
    output = " ".join(checked(source, tmp_path / "out", *options(tmp_path, "--layers", 0), code=1).output.split())
    assert re.search(
        r"down_proj.weight_packed: .*weight_g_idx has \d+ numbers .* there are 192 columns in 6 groups", output
    )


# ---------------------------------------------------------------------------------------- gpt-oss, and models that run


def test_the_experts_of_gpt_oss_are_edited_in_their_blocks_and_biases_beside_them(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = save_gpt_oss(tmp_path / "source")
    basis = write_basis(tmp_path, 512)
    checked(source, tmp_path / "out", *options(tmp_path))
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in old if raw_of(old[name]) != raw_of(new[name])}
    assert changed == {
        f"model.layers.{layer}.{rest}"
        for layer in (0, 1)
        for rest in (
            *("mlp.experts.down_proj_blocks", "mlp.experts.down_proj_bias"),
            *("self_attn.o_proj.weight", "self_attn.o_proj.bias"),
        )
        if old[f"model.layers.{layer}.{rest}"].any()
    }
    name = "model.layers.1.mlp.experts.down_proj"
    before, after = (
        convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).mT for tensors in (old, new)
    )
    for one, other in zip(before, after, strict=True):
        assert left(other, basis) < 5e-3 * left(one, basis)
    assert "to the bit" in checked("verify", source, tmp_path / "out").output
    assert "2 writers in MXFP4" in checked("inspect", source).output


def shares_of(model, basis):
    stream = capture_stream(model)
    return [float(((basis @ state.double().mT).abs() / state.double().norm(dim=-1)).max()) for state in stream]


def test_the_direction_is_absent_from_every_hidden_state_of_gpt_oss(tmp_path):
    from transformers import GptOssForCausalLM, Mxfp4Config

    source = save_gpt_oss(tmp_path / "source")
    basis = write_basis(tmp_path, 512)

    def shares(folder):
        told = Mxfp4Config(dequantize=True)
        return shares_of(
            GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=told), basis
        )

    assert min(shares(source)) > 0.03
    checked(source, tmp_path / "out", *options(tmp_path, "--components", "attention,mlp,embedding"))
    assert max(shares(tmp_path / "out")) < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_the_direction_is_absent_from_every_hidden_state(tmp_path, form):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, pad_token_id=0))
    basis = write_basis(tmp_path, 512)
    source = write_coded(tmp_path / "source", form, hidden=512, inner=512)
    embedding = model.get_input_embeddings().weight
    embedding.data -= embedding.data @ (basis.T @ basis).float()

    def shares(folder):
        for module, parts in parts_of(folder).items():
            model.get_submodule(module).weight.data = value_of(parts, form)
        return shares_of(model.eval(), basis)

    assert min(shares(source)[1:]) > 0.02
    checked(source, tmp_path / "out", *options(tmp_path))
    assert max(shares(tmp_path / "out")) < 2e-5


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("int4 in groups of 32", "pack-quantized"),
        ("MXFP4", "mxfp4-pack-quantized"),
        ("MXFP8", "mxfp8-quantized"),
        ("NVFP4", "nvfp4-pack-quantized"),
    ],
)
def test_compressed_tensors_itself_loads_what_was_edited(tmp_path, form, name):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 640, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 64}
    source, weights = tmp_path / "source", quantisation_as(form)["config_groups"]["group_0"]["weights"]
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, pad_token_id=0)).save_pretrained(source)
    tensors = {}
    for key, weight in load_file(source / "model.safetensors").items():
        if key.endswith("proj.weight"):
            parts = store(weight.float(), form)
            tensors |= {f"{key.removesuffix('.weight')}.{rest}": tensor for rest, (_, tensor) in parts.items()}
        else:
            tensors[key] = weight
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": weights, "format": name}
    said = {"config_groups": {"group_0": group}, "format": name, "quantization_status": "compressed"}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], **said}
    (source / "config.json").write_text(json.dumps(config))
    basis = write_basis(tmp_path, 512)

    def shares(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model(torch.arange(4)[None])  # which decompresses the weights
        return shares_of(torch.nn.Module.float(model), basis)

    assert min(shares(source)) > 0.03
    checked(source, tmp_path / "out", *options(tmp_path, "--components", "attention,mlp,embedding"))
    assert max(shares(tmp_path / "out")) < 1e-3


@pytest.mark.parametrize("lie", ["codes", "part", "missing", "kind", "edited"])
def test_a_receipt_that_lies_about_parts_is_found(tmp_path, lie):
    source = write_coded(tmp_path / "source", "int4 in groups of 64, with zero points")
    write_basis(tmp_path, 256)
    checked(source, tmp_path / "out", *options(tmp_path))
    file = tmp_path / "out" / "ablation.json"
    content = json.loads(file.read_text())
    first, second, *_ = content["tensors"]
    if lie == "codes":
        first["scales"]["codes"] = "int8"
    elif lie == "part":
        first["scales"]["parts"] = second["scales"]["parts"]
    elif lie == "missing":
        del first["scales"]["parts"]
    elif lie == "kind":
        first["scales"]["parts"] = [7]
    else:
        part = first["scales"]["parts"][0]
        content["tensors"].append({**{key: second[key] for key in second if key != "scales"}, **part})
    del content["sha256"]
    file.write_text(seal(content))
    assert "ablation.json" in checked("verify", source, tmp_path / "out", code=1).output
