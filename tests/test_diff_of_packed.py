"""``diff`` of packed integers, GPTQ, AWQ, MXFP4, MXFP8 and NVFP4 compares what they stand for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coded_checkpoints import (
    AFFINE,
    BYTES,
    FORMS,
    LLM_INT8,
    direction_of,
    inner_of,
    parts_of,
    quantisation_as,
    save_gpt_oss,
    store,
    value_of,
)
from command_line import checked
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ablate_shards.kernels.codecs.grids import grid_named
from ablate_shards.kernels.codecs.packing import pack, unpack
from ablate_shards.kernels.rounding.directed import round_directed
from ablate_shards.surgery.diff.coded import EqualScales, OneCoded

HIDDEN, LAYERS, MODULES = 256, 2, 4


def write(folder, tensors, form=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    if form is not None:
        config["quantization_config"] = quantisation_as(form)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain(form, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(48, HIDDEN, generator=generator).bfloat16()}
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            values = torch.randn(HIDDEN, inner_of(form), generator=generator) * 0.05
            tensors[f"model.layers.{layer}.{module}.weight"] = values.bfloat16()
    return tensors


def coded(tensors, form):
    found = {}
    for name, values in tensors.items():
        if "proj" not in name:
            found[name] = values
            continue
        for rest, (dtype, part) in store(values.float(), form).items():
            kinds = {"U8": torch.uint8, "I8": torch.int8, "U32": torch.uint32}
            found[f"{name.removesuffix('.weight')}.{rest}"] = part.view(kinds[dtype]) if dtype in kinds else part
            if dtype == "F8_E8M0":
                found[f"{name.removesuffix('.weight')}.{rest}"] = part.view(torch.float8_e8m0fnu)
    return found


def differences(first, second, *more):
    return json.loads(checked("diff", first, second, "--json", *more).stdout)


def kinds(found):
    return {kind: sum(t["kind"] == kind for t in found["tensors"]) for kind in {t["kind"] for t in found["tensors"]}}


@pytest.fixture(scope="module", params=FORMS)
def case(request, tmp_path_factory):
    form, folder = request.param, tmp_path_factory.mktemp("packed")
    tensors = plain(form)
    write(folder / "plain", tensors)
    write(folder / "coded", coded(tensors, form), form)
    rows = direction_of(HIDDEN).astype(np.float32)
    arrays = {f"direction.layers.{layer}": rows for layer in range(LAYERS)}
    save_arrays(arrays, folder / "d.safetensors", metadata={"format": "ablate-shards.directions/1"})
    for source in ("plain", "coded"):
        options = ["-d", folder / "d.safetensors", "--preserve", "none", "--no-biproject", "-q"]
        checked(folder / source, folder / f"{source}-ablated", *options)
    return folder, form, tensors


@pytest.mark.parametrize("turned", [False, True])
def test_a_checkpoint_and_its_own_quantisation_differ_by_rounding(case, turned):
    folder, form, tensors = case
    sides = ("coded", "plain") if turned else ("plain", "coded")
    found = differences(*(folder / side for side in sides))
    assert kinds(found) == {"rounding": MODULES}
    first = found["tensors"][0]
    shown = first["codes" if turned else "new_codes"]
    assert shown.startswith(form.partition(" ")[0])
    assert found["verdict"][0].startswith(f"4 tensors differ by rounding to {shown} (")
    for tensor in found["tensors"]:
        module = tensor["new_name" if not turned else "name"].rpartition(".")[0]
        old, new = tensors[f"{module}.weight"].float(), value_of(parts_of(folder / "coded")[module], form)
        old, new = (new, old) if turned else (old, new)
        assert tensor["shape"] == tensor["new_shape"] == [HIDDEN, inner_of(form)]
        assert tensor["changed"] == int((old != new).sum())
        assert tensor["relative"] == pytest.approx(float((new - old).double().norm() / old.double().norm()), rel=1e-4)
        # Scales are rounded as well, so that the greatest values may lie a little beyond the last code.
        assert tensor["units"] < 0.55
        assert tensor["beyond"] < 0.01 * tensor["elements"]


def test_codes_on_one_grid_are_counted_and_the_edit_is_found(case):
    folder, form, _ = case
    found = differences(folder / "coded", folder / "coded-ablated", "-d", folder / "d.safetensors")
    assert kinds(found) == {"ablation": MODULES}
    receipt = json.loads((folder / "coded-ablated" / "ablation.json").read_text())
    changed = {record["name"]: record["changed"] for record in receipt["tensors"]}
    for tensor in found["tensors"]:
        assert tensor["equal_scales"]
        assert tensor["changed"] == tensor["beyond"] == changed[tensor["name"]]
        assert tensor["units"] == pytest.approx(round(tensor["units"]), abs=1e-3)
        assert tensor["alignment"]["best_cosine"] > 0.98 or "8" not in form
    kind = form.partition(" ")[0]
    start = f"{sum(changed.values())} codes of 4 tensors in {kind} changed ("
    assert any(line.startswith(start) for line in found["verdict"]), found["verdict"]
    assert "4 residual writers" in found["verdict"][0]
    assert "consistent with directional ablation (coefficient" in found["verdict"][0]
    assert "directions differ" not in found["verdict"][0]
    # In four bits and fewer most of the change lies in the rows where the direction is largest.
    for tensor in found["tensors"]:
        assert tensor["ablation"]["coefficient"] == pytest.approx(1, abs=0.05 if "8" in form else 0.4)


def test_codes_that_were_chosen_together_for_another_update_are_no_ablation(case, tmp_path):
    folder, form, _ = case
    if form != "MXFP4":  # one form tells it
        return
    tensors = load_file(folder / "coded" / "model.safetensors")
    grid, along = grid_named("E2M1"), direction_of(HIDDEN)
    across = np.random.default_rng(8).standard_normal((1, inner_of(form)))
    for module in {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}:
        codes = unpack(tensors[f"{module}.weight_packed"].numpy(), 4, inner_of(form))
        scales = (2.0 ** (tensors[f"{module}.weight_scale"].float() - 127)).repeat_interleave(32, 1).numpy()
        values = grid.values_of(grid.levels_of(codes), scales)
        target = (values + 0.05 * along.T @ across).astype(np.float32)
        round_directed(grid, target, codes, scales, along)
        pack(codes, 4, tensors[f"{module}.weight_packed"].numpy())
    found = differences(folder / "coded", write(tmp_path / "other", tensors, form))
    assert kinds(found) == {"low-rank": MODULES}


def test_an_edit_is_told_beneath_the_rounding(case):
    folder, form, _ = case
    found = differences(folder / "plain", folder / "coded-ablated", "-d", folder / "d.safetensors")
    assert "rounding" not in kinds(found)
    if "8" in form:
        assert kinds(found) == {"ablation": MODULES}
        assert all(tensor["alignment"]["best_cosine"] > 0.95 for tensor in found["tensors"])


def test_what_was_dequantised_differs_by_rounding(case, tmp_path):
    folder, form, _ = case
    checked("dequantise", folder / "coded", tmp_path / "out", "-q")
    found = differences(folder / "coded", tmp_path / "out")
    assert {tensor["kind"] for tensor in found["tensors"]} <= {"rounding", "retyped"}
    assert len(found["tensors"]) == MODULES
    assert all(tensor["units"] < (0.5 if "int8" in form else 0.1) for tensor in found["tensors"])


def test_one_code_is_one_step(case, tmp_path):
    folder, form, _ = case
    tensors = load_file(folder / "coded" / "model.safetensors")
    name = next(
        name for name in tensors if name.endswith(("down_proj.weight", "down_proj.weight_packed", "down_proj.qweight"))
    )
    tensors[name].view(torch.uint8)[3, 0] ^= 1
    (tensor,) = differences(folder / "coded", write(tmp_path / "one", tensors, form))["tensors"]
    assert (tensor["kind"], tensor["changed"]) == ("sparse", 1)
    assert tensor["units"] == pytest.approx(1)


def test_other_scales_are_compared_by_value(case, tmp_path):
    folder, form, _ = case
    tensors = load_file(folder / "coded" / "model.safetensors")
    ends = (".scale", ".scales", "weight_scale", ".absmax", ".SCB")
    name = next(name for name in tensors if name.endswith(ends) and "o_proj" in name)
    parts = [name]
    if form in AFFINE:
        parts.append(f"{name.removesuffix('scales')}biases")
    if "quantised as well" in form:  # scales that are codes are not doubled by doubling these
        return
    for part in parts:
        scales = tensors[part]
        tensors[part] = (
            scales.view(torch.uint8).add(8 if form == "NVFP4 (MLX)" else 1).view(scales.dtype)
            if scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
            else (scales.float() * 2).to(scales.dtype)
        )
    found = differences(folder / "coded", write(tmp_path / "other", tensors, form))
    assert kinds(found) == {"scaled": 1, "scales": len(parts)}
    assert next(t for t in found["tensors"] if t["kind"] == "scaled")["relative"] == pytest.approx(
        1, rel=0.2
    )  # the greatest may not be doubled


def test_other_weights_are_not_rounding(case, tmp_path):
    folder, form, _ = case
    found = differences(folder / "plain", write(tmp_path / "other", coded(plain(form, 4), form), form))
    assert kinds(found)["full-rank"] >= MODULES


def test_parts_that_cannot_be_read_are_compared_by_bytes(case, tmp_path):
    folder, *_ = case
    raw = write(tmp_path / "raw", load_file(folder / "coded" / "model.safetensors"))
    found = differences(raw, folder / "coded")
    assert not any(tensor["kind"] in ("full-rank", "rounding") for tensor in found["tensors"])


def test_memory_and_jobs_do_not_change_the_result(case):
    folder, *_ = case
    pair = folder / "plain", folder / "coded-ablated"
    assert differences(*pair, "--memory", "8MB", "--jobs", 1) == differences(*pair, "--jobs", 4)


def test_the_blocks_of_gpt_oss_and_what_transformers_makes_of_them(tmp_path):
    source = save_gpt_oss(tmp_path / "source", hidden=64)
    checked("dequantise", source, tmp_path / "out", "-q")
    found = differences(source, tmp_path / "out")
    assert len(found["tensors"]) == 4
    assert {tensor["kind"] for tensor in found["tensors"]} == {"retyped"}
    assert any("4 tensors retyped from MXFP4 to BF16, values equal" in line for line in found["verdict"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][2, 7, 9] += 1
    write(tmp_path / "one", tensors)
    changed = [tensor for tensor in differences(source, tmp_path / "one")["tensors"] if tensor["kind"] != "retyped"]
    assert [(tensor["new_name"], tensor["changed"]) for tensor in changed] == [(name, 1)]


def test_equal_numbers_beside_equal_bytes_are_other_scales_where_another_method_reads_them(tmp_path):
    first = coded(plain(LLM_INT8), LLM_INT8)
    second = {}
    for name, tensor in first.items():
        if name.endswith(".SCB"):
            second[name.replace(".SCB", ".weight_scale")] = tensor[:, None].clone()
        elif not name.endswith(".weight_format"):
            second[name] = tensor
    found = differences(write(tmp_path / "a", first, LLM_INT8), write(tmp_path / "b", second, BYTES))
    changed = [tensor for tensor in found["tensors"] if "proj.weight" in tensor["name"]]
    assert len(changed) == MODULES
    for tensor in changed:
        assert tensor["relative"] == pytest.approx(126, rel=1e-4)


@pytest.mark.parametrize("grid", ["NF4", "FP4"])
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_of_a_table_are_found_whatever_the_sign_of_its_scales(grid, sign):
    table = torch.from_numpy(np.unique(grid_named(grid).values))
    scale = torch.full((len(table) - 1,), 0.37 * sign)
    stored = SimpleNamespace(grid=grid, of=lambda first, count: scale.numpy())
    lower, upper = table[:-1] * scale, table[1:] * scale
    for old, new in ((lower, upper), (upper, lower)):
        steps = OneCoded(stored, 0, len(scale), new=False).of(0, old, 0.4 * (new - old))
        torch.testing.assert_close(steps, (table[1:] - table[:-1]) * 0.37, rtol=1e-6, atol=0)
        apart = EqualScales(stored, 0, len(scale)).of(0, old, new - old)
        torch.testing.assert_close(apart, (table[1:] - table[:-1]) * 0.37, rtol=1e-6, atol=0)


def test_codes_with_negative_nested_scales_are_as_far_apart_as_others(tmp_path):
    form = "NF4 in blocks of 64, their scales quantised as well"
    tensors = coded(plain(form), form)
    for name, tensor in tensors.items():
        if "quant_state" in name:
            state = json.loads(tensor.numpy().tobytes())
            state["nested_offset"] *= -1
            tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    first = write(tmp_path / "first", tensors, form)
    module = "model.layers.1.mlp.down_proj"
    checked("dequantise", first, tmp_path / "out", "-q")
    for sides in ((first, tmp_path / "out"), (tmp_path / "out", first)):
        found = differences(*sides)["tensors"]
        assert len(found) == MODULES
        assert {tensor["kind"] for tensor in found} <= {"rounding", "retyped"}
        assert all(tensor["units"] < 0.1 for tensor in found)
    tensors[f"{module}.weight"][3, 0] ^= 1 << 4
    (tensor,) = differences(first, write(tmp_path / "one", tensors, form))["tensors"]
    assert (tensor["kind"], tensor["changed"]) == ("sparse", 1)
    assert tensor["units"] == pytest.approx(1)
