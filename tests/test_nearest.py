"""Rounding to the nearest codes is there to be compared with: it says what it undoes, and is not kept by chance."""

import json

import pytest
import torch
from coded_checkpoints import (
    BLOCK,
    decoded,
    parts_of,
    read_tensors,
    spread_scales,
    value_of,
    write_basis,
    write_coded,
    write_fp8,
)
from coded_checkpoints import options as directed_options
from command_line import checked
from raw_checkpoints import hidden as hidden_files
from raw_checkpoints import snapshot, write_llama

from ablate_shards.kernels import reference
from ablate_shards.surgery.edit.receipt import seal

HIDDEN = 512
FORMS = ("FP8", "int4 in groups of 64, with zero points", "NVFP4")


def options(folder, *more):
    return directed_options(folder, "--rounding", "nearest", *more)


@pytest.fixture
def basis(tmp_path):
    return write_basis(tmp_path, HIDDEN)


@pytest.fixture(params=FORMS)
def case(request, tmp_path, basis):
    form, source = request.param, tmp_path / "source"
    if form == "FP8":
        write_fp8(source, hidden=HIDDEN, inner=130, layers=1)
    else:
        write_coded(source, form, hidden=HIDDEN, inner=128, layers=1)
    return tmp_path, source, form, basis


def weights(folder, form):
    """The writers as float32, by their modules."""
    if form != "FP8":
        return {module: value_of(parts, form) for module, parts in parts_of(folder).items()}
    tensors = read_tensors(folder)
    return {
        name.removesuffix(".weight"): decoded(codes, tensors[f"{name}_scale_inv"], "block")
        for name, codes in tensors.items()
        if codes.dtype == torch.float8_e4m3fn
    }


def records(folder):
    receipt = json.loads((folder / "ablation.json").read_text())
    return {record["name"].rpartition(".")[0]: record for record in receipt["tensors"]}


def said(result):
    return " ".join(result.output.split())


def test_without_force_it_is_refused_and_nothing_is_kept(case):
    folder, source, *_ = case
    before = snapshot(source)
    output = said(checked(source, folder / "out", *options(folder, "--layers", 0), code=1))
    assert "_proj.weight" in output
    assert "the nearest codes undo" in output
    assert "and more than 1% is not kept; leave --rounding nearest out, or add --force" in output
    assert not (folder / "out").exists()
    assert hidden_files(folder) == []
    assert snapshot(source) == before


@pytest.mark.parametrize("coefficient", [1, 2])
def test_with_force_each_code_is_the_nearest_and_the_receipt_says_what_that_undoes(case, coefficient):
    folder, source, form, basis = case
    more = ["--layers", 0, "--force", "--coefficient", coefficient]
    output = said(checked(source, folder / "out", *options(folder, *more)))
    assert "the nearest codes undo" in output
    old, new, kept = weights(source, form), weights(folder / "out", form), records(folder / "out")
    assert len(kept) == 2
    for module, weight in old.items():
        record, written = kept[module], new[module]
        ideal, _ = reference.ablate(weight, basis, preserve="columns", coefficient=coefficient)
        undone = (basis @ (written.double() - ideal)).norm() / (basis @ (weight.double() - ideal)).norm()
        assert record["rounding"] == "nearest"
        assert record["undone"] == pytest.approx(float(undone), rel=1e-3)
        assert record["undone"] > 0.02
        assert record["error"] == record["nearest_error"]
        assert record["after"] == pytest.approx(record["nearest"], rel=1e-2)
        off = (written.double() - ideal).abs()
        assert record["error"] == pytest.approx(float(off.norm() / ideal.norm()), rel=1e-3)
        assert (off <= (weight.double() - ideal).abs() + 1e-6).all()
        if form == "FP8":
            tensors = read_tensors(source)
            scales = spread_scales(tensors[f"{module}.weight_scale_inv"], tuple(weight.shape), BLOCK).double()
            every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
            every = every[~every.isnan()].sort().values
            places = torch.searchsorted(every, ideal / scales).clamp(1, len(every) - 1)
            nearest = torch.minimum(*((every[places - step] * scales - ideal).abs() for step in (0, 1)))
            assert (off <= nearest + 1e-4 * scales).all()
    assert "2 to the bit" in said(checked("verify", source, folder / "out"))


def test_more_jobs_change_no_byte(case):
    folder, source, *_ = case
    checked(source, folder / "one", *options(folder, "--layers", 0, "--force", "--jobs", 1))
    checked(source, folder / "many", *options(folder, "--layers", 0, "--force", "--jobs", 3, "--memory", "8MB"))
    assert snapshot(folder / "one") == snapshot(folder / "many")


def test_what_undoes_nothing_is_kept(case):
    folder, source, form, _ = case
    checked(source, folder / "out", *options(folder, "--layers", 0, "--coefficient", 0))
    assert all(record["undone"] == 0 for record in records(folder / "out").values())
    assert all(torch.equal(weights(folder / "out", form)[name], old) for name, old in weights(source, form).items())


@pytest.mark.parametrize("lie", ["rounding", "undone"])
def test_a_receipt_that_hides_it_is_found(case, lie):
    folder, source, *_ = case
    checked(source, folder / "out", *options(folder, "--layers", 0, "--force"))
    content = json.loads((folder / "out" / "ablation.json").read_text())
    if lie == "rounding":
        del content["tensors"][0]["rounding"]
    else:
        content["tensors"][0]["undone"] = 0.001
    del content["sha256"]
    (folder / "out" / "ablation.json").write_text(seal(content))
    output = said(checked("verify", source, folder / "out", code=1))
    assert ("are not those that the edit gives" if lie == "rounding" else "records undone 0.001") in output


@pytest.mark.parametrize("quantised", [True, False])
def test_where_there_are_no_codes_it_is_refused(tmp_path, basis, quantised):
    source = tmp_path / "source"
    more = ["--dequantise", "all"] if quantised else []
    if quantised:
        write_fp8(source, hidden=HIDDEN)
    else:
        write_llama(source, hidden=HIDDEN)
    output = said(checked(source, tmp_path / "out", *options(tmp_path, *more), code=2))
    assert "--rounding is about codes, and none of the weights that would be edited" in output


def test_the_plan_says_so(case):
    folder, source, *_ = case
    assert "nearest ones" in said(checked(source, folder / "out", *options(folder, "--layers", 0, "--dry-run")))
