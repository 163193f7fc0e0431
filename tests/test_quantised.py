"""FP8 checkpoints are edited in place: the codes of the writers change, everything else stays, and the edit holds."""

import json
import re
import threading

import pytest
import torch
from coded_checkpoints import (
    decoded,
    left,
    options,
    quantise,
    raw_of,
    read_tensors,
    write_basis,
    write_fp8,
)
from command_line import checked, run
from raw_checkpoints import hidden as hidden_files
from raw_checkpoints import snapshot
from safetensors.torch import load_file, save_file
from tiny_models import capture_stream

from ablate_shards.kernels import reference
from ablate_shards.kernels.codecs.scales import Spread
from ablate_shards.kernels.native.native import NativeArrays
from ablate_shards.surgery.edit import coded
from ablate_shards.surgery.edit.ablation_editor import AblationEditor
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.machine.staging import Staging

O_PROJ, DOWN = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"
SECOND = "model-00002-of-00002.safetensors"


def weights(folder, layout="block", ending="weight_scale_inv"):
    """The writers as float32, by the names of their codes."""
    tensors = read_tensors(folder)
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            stem = name.removesuffix(".weight")
            scales = tensors[f"{stem}.{ending}" if stem != name else f"{name}_{ending.removeprefix('weight_')}"]
            found[name] = decoded(tensor, scales, layout)
    return found


def records(folder):
    receipt = json.loads((folder / "ablation.json").read_text())
    return {record["name"]: record for record in receipt["tensors"]}


@pytest.fixture
def case(tmp_path):
    source = write_fp8(tmp_path / "source")
    return tmp_path, source, write_basis(tmp_path, 256)


@pytest.mark.parametrize(
    ("layout", "kind", "ending", "shape"),
    [
        ("block", "F32", "weight_scale_inv", ""),
        ("block", "BF16", "weight_scale_inv", ""),
        ("block", "F8_E8M0", "scale", ""),
        ("block", "U8", "weight_scale", ""),
        ("channel", "F32", "weight_scale", ""),
        ("channel", "BF16", "weight_scale", "flat"),
        ("tensor", "F32", "weight_scale", "flat"),
    ],
)
def test_only_codes_change_and_the_direction_is_gone(tmp_path, layout, kind, ending, shape):
    source = write_fp8(tmp_path / "source", hidden=1024, layout=layout, kind=kind, ending=ending, shape=shape)
    basis = write_basis(tmp_path, 1024)
    before = snapshot(source)

    checked(source, tmp_path / "out", *options(tmp_path))

    assert snapshot(source) == before
    out = snapshot(tmp_path / "out")
    assert {name for name in before if out[name] != before[name]} == {"model-00001-of-00002.safetensors"}
    old, new = read_tensors(source), read_tensors(tmp_path / "out")
    changed = {name for name in old if raw_of(old[name]) != raw_of(new[name])}
    assert changed == {name for name, tensor in old.items() if tensor.dtype == torch.float8_e4m3fn}
    assert not any(new[name].isnan().any() for name in changed)
    shard = "model-00001-of-00002.safetensors"
    header = 8 + int.from_bytes((source / shard).read_bytes()[:8], "little")
    assert (source / shard).read_bytes()[:header] == (tmp_path / "out" / shard).read_bytes()[:header]
    for name, weight in weights(source, layout, ending).items():
        written = weights(tmp_path / "out", layout, ending)[name]
        ideal, _ = reference.ablate(weight, basis, preserve="columns")
        nearest = nearest_to(ideal, name, source, layout, ending)
        record = records(tmp_path / "out")[name]
        assert left(written, basis) < 1e-3 * left(weight, basis)
        assert left(nearest, basis) > 0.1 * left(weight, basis)
        assert record["before"] == pytest.approx(left(weight, basis), rel=1e-4)
        assert record["after"] == pytest.approx(left(written, basis), abs=1e-7)
        assert record["nearest"] == pytest.approx(left(nearest, basis), rel=1e-3)
        assert record["ideal"] < 1e-7
        error = float((written.double() - ideal).norm() / ideal.norm())
        assert record["error"] == pytest.approx(error, rel=1e-3)
        assert record["changed"] == int((old[name].view(torch.uint8) != new[name].view(torch.uint8)).sum())
        worst = (basis @ written.double()).norm(dim=0).max() / written.double().norm() * written.shape[1] ** 0.5
        assert record["worst_column"] == pytest.approx(float(worst), abs=1e-7)
        assert record["error"] < 2 * record["nearest_error"]
    verified = checked("verify", source, tmp_path / "out")
    assert "4 edited tensors recomputed, 4 to the bit" in verified.output


def nearest_to(ideal, name, source, layout, ending):
    """The ideal weight with the nearest codes, the scales kept."""
    tensors = read_tensors(source)
    scales = tensors[f"{name.removesuffix('.weight')}.{ending}"]
    wide = decoded(torch.ones(ideal.shape), scales, layout)
    codes = (ideal.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return decoded(codes, scales, layout)


@pytest.mark.parametrize("preserve", ["rows", "columns", "none"])
@pytest.mark.parametrize("coefficient", [0, 0.5, 1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_every_norm_and_coefficient_comes_as_near_as_it_can(tmp_path, preserve, coefficient, count):
    source = write_fp8(tmp_path / "source", hidden=512, layers=1, inner=130)
    basis = write_basis(tmp_path, 512, count)
    more = ["--preserve", preserve, "--coefficient", coefficient, "--layers", 0]

    checked(source, tmp_path / "out", *options(tmp_path), *more)

    for name, weight in weights(source).items():
        written = weights(tmp_path / "out")[name]
        ideal, _ = reference.ablate(weight, basis, preserve=preserve, coefficient=coefficient)
        off = (basis @ (written.double() - ideal)).norm() / weight.double().norm()
        assert off < 1e-3 * left(weight, basis)
        if coefficient == 0:
            assert torch.equal(written, weight)


def test_stacked_experts_are_edited_each_by_its_own_scales(tmp_path):
    source = write_fp8(tmp_path / "source", hidden=512, experts=3, model_type="qwen3_moe")
    basis = write_basis(tmp_path, 512)

    checked(source, tmp_path / "out", *options(tmp_path))

    name = "model.layers.1.mlp.experts.down_proj"
    before, after = weights(source)[name], weights(tmp_path / "out")[name]
    assert before.shape == (3, 512, 200)
    for one, other in zip(before, after, strict=True):
        assert left(other, basis) < 1e-3 * left(one, basis)
    assert "to the bit" in checked("verify", source, tmp_path / "out").output


def in_stripes(monkeypatch, tile=256 * 7):
    """Makes stripes, and all that is decoded at once, as small as they can be."""
    monkeypatch.setattr(coded, "_STRIPE", 1)
    monkeypatch.setattr(coded, "_TILE", tile)
    monkeypatch.setattr("ablate_shards.surgery.edit.ablation_editor._CODES_AT_ONCE", 1)
    monkeypatch.setattr("ablate_shards.surgery.dequantise.decoding.AT_ONCE", 1)


def test_jobs_memory_and_the_size_of_blocks_change_no_byte(case, monkeypatch):
    folder, source, _ = case
    checked(source, folder / "out", *options(folder))
    expected = snapshot(folder / "out")
    for number, more in enumerate((["--jobs", 1], ["--jobs", 3], ["--memory", "8MB", "--jobs", 2])):
        checked(source, folder / f"out-{number}", *options(folder, *more))
        assert snapshot(folder / f"out-{number}") == expected
    in_stripes(monkeypatch)
    checked(source, folder / "striped", *options(folder))
    assert snapshot(folder / "striped") == expected


@pytest.mark.parametrize("form", ["native", "torch"])
@pytest.mark.parametrize("preserve", ["rows", "columns", "none"])
@pytest.mark.parametrize(("coefficient", "count"), [(1, 1), (2, 3)])
def test_stripes_change_no_byte_whatever_is_kept(tmp_path, monkeypatch, preserve, coefficient, count, form):
    source = write_fp8(tmp_path / "source")
    basis = write_basis(tmp_path, 256, count)
    # What float32 cannot carry: columns along the direction, rows that it moves far, a row and a column of zeros.
    tensors = read_tensors(source)
    codes = tensors[DOWN].clone()
    codes[:, :3] = (basis[0][:, None] * 300).float().to(codes.dtype)
    codes[7], codes[:, 9] = 0, 0
    codes[11] = (torch.linspace(-1, 1, codes.shape[1]) * 400).to(codes.dtype)
    shard = source / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(raw_of(tensors[DOWN]), raw_of(codes)))
    if form == "torch":
        monkeypatch.setattr("ablate_shards.kernels.native.native._library", lambda: None)
    words = ["--preserve", preserve, "--coefficient", coefficient, "--jobs", 1]
    checked(source, tmp_path / "out", *options(tmp_path), *words)
    in_stripes(monkeypatch)
    checked(source, tmp_path / "striped", *options(tmp_path), *words)
    assert snapshot(tmp_path / "striped") == snapshot(tmp_path / "out")


@pytest.mark.parametrize(("preserve", "most"), [("rows", 4), ("columns", 3), ("none", 3)])
def test_a_wide_matrix_is_decoded_no_more_often_than_a_narrow_one(case, monkeypatch, preserve, most):
    folder, source, _ = case
    decoded_codes = []
    decode_rows = Spread.decode_rows

    def counted(self, codes, *place):
        decoded_codes.append(codes.size)
        return decode_rows(self, codes, *place)

    monkeypatch.setattr(Spread, "decode_rows", counted)
    in_stripes(monkeypatch, tile=256 * 8)
    checked(source, folder / "out", *options(folder), "--preserve", preserve, "--jobs", 1)
    # For the sums, for the edit and, where row norms are kept, its other stripes, and once more as it was written.
    every = sum(tensor.numel() for tensor in read_tensors(source).values() if tensor.dtype == torch.float8_e4m3fn)
    assert most - 1 < sum(decoded_codes) / every <= most if preserve == "rows" else sum(decoded_codes) == most * every


def test_without_a_compiler_torch_and_numpy_do_it(case, monkeypatch):
    folder, source, basis = case
    monkeypatch.setattr("ablate_shards.kernels.native.native._library", lambda: None)
    checked(source, folder / "out", *options(folder))
    for name, weight in weights(source).items():
        assert left(weights(folder / "out")[name], basis) < 1e-3 * left(weight, basis)
    assert json.loads((folder / "out" / "ablation.json").read_text())["device"]["form"] == "torch"
    assert "4 to the bit" in checked("verify", source, folder / "out").output


def test_on_a_device_codes_are_edited_on_the_cpu():
    editor = AblationEditor("cpu", 1 << 28, 1, threading.Event(), {})
    assert editor._workspace_on_cpu() is editor._workspace()
    editor._device, editor._form = "cuda:0", "triton"
    kept = editor._workspace_on_cpu()
    assert isinstance(kept.arrays, NativeArrays)
    assert editor._workspace_on_cpu() is kept


def test_an_interrupted_run_goes_on(case, monkeypatch):
    folder, source, _ = case
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
    assert hidden_files(folder) == []


def test_zeros_of_both_signs_and_other_codes_keep_their_bytes(case):
    folder, source, _ = case
    shard = source / "model-00001-of-00002.safetensors"
    tensors = read_tensors(source)
    codes = tensors[O_PROJ].view(torch.uint8)
    codes[:, 3], codes[:, 4], codes[0, 5] = 0x80, 0, 0x7E
    raw = shard.read_bytes()
    old = raw_of(read_tensors(source)[O_PROJ])
    shard.write_bytes(raw.replace(old, raw_of(codes)))
    checked(source, folder / "out", *options(folder))
    found = read_tensors(folder / "out")[O_PROJ].view(torch.uint8)
    assert (found[:, 3] == 0x80).all()
    assert (found[:, 4] == 0).all()


@pytest.mark.parametrize("where", ["codes", "scales"])
def test_verify_finds_a_single_code_or_scale_that_differs(case, where):
    folder, source, _ = case
    checked(source, folder / "out", *options(folder))
    receipt = records(folder / "out")[DOWN]
    start, _ = receipt["bytes"] if where == "codes" else receipt["scales"]["bytes"]
    file = folder / "out" / (receipt["shard"] if where == "codes" else receipt["scales"]["shard"])
    raw = bytearray(file.read_bytes())
    raw[start] ^= 1
    file.write_bytes(raw)
    found = checked("verify", source, folder / "out", code=1).output
    if where == "codes":
        assert "model.layers.1.mlp.down_proj.weight: 1 of 51200 codes are not those that the edit gives" in found
    else:
        assert f"{receipt['scales']['name']}: differs from the source" in found


@pytest.mark.parametrize("lie", ["block", "other", "none", "edited", "measure"])
def test_a_receipt_that_lies_about_scales_is_found(case, lie):
    folder, source, _ = case
    checked(source, folder / "out", *options(folder))
    file = folder / "out" / "ablation.json"
    content = json.loads(file.read_text())
    first, second, *_ = content["tensors"]
    if lie == "block":
        first["scales"]["block"] = [100, 128]
    elif lie == "other":
        first["scales"] = second["scales"]
    elif lie == "none":
        del first["scales"]
    elif lie == "edited":
        scales = {**first["scales"], "kind": "weight", "axis": -2}
        content["tensors"].append({**{key: second[key] for key in second if key != "scales"}, **scales})
    else:
        first["nearest"] = 0.5
    del content["sha256"]
    file.write_text(seal(content))
    output = checked("verify", source, folder / "out", code=1).output
    assert "records nearest 0.5" in output if lie == "measure" else "ablation.json" in output


def test_inspect_and_dry_run_say_how_codes_are_stored(case):
    folder, source, _ = case
    assert "4 writers in FP8 in blocks of 128 x 128" in checked("inspect", source).output
    writers = json.loads(checked("inspect", source, "--json").output)["writers"]
    found = next(writer for writer in writers if writer["name"] == O_PROJ)
    assert found["stored_as"] == "FP8 in blocks of 128 x 128"
    assert found["scales"] == "model.layers.0.self_attn.o_proj.weight_scale_inv"
    plan = checked(source, folder / "out", *options(folder, "--dry-run")).output
    assert "4 tensors in FP8: codes would be edited" in plan
    edits = json.loads(run(source, folder / "out", *options(folder, "--dry-run", "--json")).stdout)["edits"]
    assert edits[0]["scales"]["block"] == [128, 128]
    result = checked(source, folder / "out", *options(folder)).output
    assert "by nearest" in result


def replace_in(file, old, new):
    raw = file.read_bytes()
    assert raw.count(old) >= 1
    file.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantisation": {"quant_method": "magic"}}, "expected fp8, .* as quant_method of FP8 codes, found 'magic'"),
        ({"quantisation": {}}, "as quant_method of FP8 codes, found None"),
        (
            {"quantisation": {"quant_method": "fp8", "weight_block_size": [64, 128]}},
            r"are \[2, 2\], which is neither one per row .* blocks of 64 x 128 would be \[4, 2\]",
        ),
        ({"quantisation": {"quant_method": "fp8"}}, "weight_block_size is not stated; restore"),
        (
            {"quantisation": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
            "expected one size of blocks, two positive integers, found",
        ),
        (
            {"quantisation": {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}},
            "rotated",
        ),
        ({"ending": "activation_scale"}, "expected the scales of FP8 codes in one of .*weight_scale_inv.* found none"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_with_a_way_out(tmp_path, change, message):
    source = write_fp8(tmp_path / "source", **change)
    write_basis(tmp_path, 256)
    output = " ".join(checked(source, tmp_path / "out", *options(tmp_path), code=1).output.split())
    assert "_proj.weight: " in output
    assert "dequantise the checkpoint" in output or "restore" in output
    assert re.search(message, output), output
    assert not (tmp_path / "out").exists()


def test_a_config_inside_that_of_the_text_is_read(tmp_path):
    source = write_fp8(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (source / "config.json").write_text(json.dumps(config))
    assert "4 writers in FP8" in checked("inspect", source).output


def test_compressed_tensors_state_the_size_of_their_blocks_in_groups(tmp_path):
    groups = {"group_0": {"weights": {"block_structure": [128, 128], "strategy": "block"}}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups}
    source = write_fp8(tmp_path / "source", quantisation=said, ending="weight_scale")
    assert "4 writers in FP8 in blocks of 128 x 128" in checked("inspect", source).output


@pytest.mark.parametrize("where", ["codes", "scales"])
def test_nan_is_refused_by_name(case, where):
    folder, source, _ = case
    shard = source / ("model-00001-of-00002.safetensors" if where == "codes" else SECOND)
    tensors = read_tensors(source)
    name = DOWN if where == "codes" else "model.layers.1.mlp.down_proj.weight_scale_inv"
    old = raw_of(tensors[name])
    new = bytearray(old)
    new[:4] = b"\xff" * 4  # four NaN codes, and a scale that is NaN
    replace_in(shard, old, bytes(new))
    output = checked(source, folder / "out", *options(folder), code=1).output
    assert f"{DOWN}: " in output
    assert ("holds NaN codes" if where == "codes" else "hold NaN, infinite or negative values") in output
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("kind", "layout"), [("Qwen3", "block"), ("Mistral", "tensor")])
def test_the_direction_is_absent_from_every_hidden_state_of_a_loaded_model(tmp_path, kind, layout):
    import transformers
    from transformers import FineGrainedFP8Config

    torch.manual_seed(0)
    described, loaded = (getattr(transformers, f"{kind}{what}") for what in ("Config", "ForCausalLM"))
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 640, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 64}
    loaded(described(**sizes, **heads, pad_token_id=0)).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {}
    for name, weight in load_file(file).items():
        tensors[name] = weight.float()
        if name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight.float(), layout, "BF16")
            if layout == "tensor":
                tensors[f"{name.removesuffix('weight')}activation_scale"] = torch.ones((), dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if layout == "block" else "static",
        "weight_block_size": [128, 128] if layout == "block" else None,
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    basis = write_basis(tmp_path, 512)

    def shares(folder):
        told = FineGrainedFP8Config(dequantize=True)
        model = loaded.from_pretrained(folder, dtype=torch.float32, quantization_config=told).eval()
        stream = capture_stream(model)
        return [float(((basis @ state.double().mT).abs() / state.double().norm(dim=-1)).max()) for state in stream]

    assert min(shares(tmp_path / "source")) > 0.05
    more = ["--components", "attention,mlp,embedding"]
    checked(tmp_path / "source", tmp_path / "out", *options(tmp_path, *more))
    assert max(shares(tmp_path / "out")) < 1e-5


def test_a_search_on_codes_is_refused_before_it_starts(case):
    from ablate_shards.errors import SearchError
    from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
    from ablate_shards.surgery.directions.formats import read_directions
    from ablate_shards.surgery.edit.operation import RunOptions
    from ablate_shards.surgery.plan.plan import make_plan
    from ablate_shards.surgery.plan.recipe import AblateOptions
    from ablate_shards.surgery.search.applied import EditableModel

    folder, source, _ = case
    checkpoint = open_checkpoint(source)
    chosen = AblateOptions(source_layer=0, layers=frozenset({0, 1}), biproject=False)
    plan = make_plan(checkpoint, read_directions(folder / "d.safetensors"), chosen)
    refusal = pytest.raises(SearchError, match=r"holds codes \(F8_E4M3\).*dequantised")
    with EditableModel(checkpoint, torch.nn.Module(), RunOptions()) as model, refusal:
        model.apply(plan)
