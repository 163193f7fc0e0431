"""Quantised checkpoints elsewhere: scales are read by ranges, from any shard; the bytes are those from a folder."""

import pytest
from coded_checkpoints import write_coded, write_fp8
from command_line import checked
from raw_checkpoints import snapshot, write_directions


@pytest.mark.parametrize("form", ["FP8", "int4 in groups of 64, with zero points", "NVFP4 (ModelOpt)"])
def test_from_the_hub_into_a_folder_and_from_the_hub_to_the_hub(hub, tmp_path, monkeypatch, form):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    source = write_fp8(tmp_path / "local") if form == "FP8" else write_coded(tmp_path / "local", form)
    write_directions(tmp_path / "d.safetensors", layers=2, hidden=256)
    options = ["-d", tmp_path / "d.safetensors", "--source-layer", 1]
    checked(source, tmp_path / "expected", *options)
    hub.add("org/model", source)

    checked("org/model", tmp_path / "out", *options)

    found, expected = snapshot(tmp_path / "out"), snapshot(tmp_path / "expected")
    assert found.pop("ablation.json") != expected.pop("ablation.json")  # it says where the source is
    assert found == expected
    assert "4 to the bit" in checked("verify", "org/model", tmp_path / "out").output

    checked("org/model", "hub:me/edited", *options)
    assert "4 to the bit" in checked("verify", "org/model", "hub:me/edited").output


@pytest.mark.parametrize("form", ["FP8", "int4 in groups of 64, with zero points", "NVFP4 (ModelOpt)"])
@pytest.mark.parametrize("with_edit", [False, True])
def test_dequantised_between_folders_and_the_hub_the_bytes_are_the_same(hub, tmp_path, monkeypatch, form, with_edit):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    source = write_fp8(tmp_path / "local") if form == "FP8" else write_coded(tmp_path / "local", form)
    write_directions(tmp_path / "d.safetensors", layers=2, hidden=256)
    edit = ["-d", tmp_path / "d.safetensors", "--source-layer", 1, "--layers", 1, "--dequantise", "writers"]
    name = "ablate" if with_edit else "dequantise"
    options = edit if with_edit else []
    checked(name, source, tmp_path / "expected", *options)
    hub.add("org/model", source)

    checked(name, "org/model", tmp_path / "out", *options)
    checked(name, "org/model", "hub:me/edited", *options)
    checked("push", tmp_path / "expected", "me/pushed", "--base-model", "org/model")

    found, expected = snapshot(tmp_path / "out"), snapshot(tmp_path / "expected")
    receipt = "ablation.json" if with_edit else "dequantisation.json"
    assert found.pop(receipt) != expected.pop(receipt)  # it says where the source is
    assert found == expected
    for out in (tmp_path / "out", "hub:me/edited"):
        assert "decoded from its codes" in " ".join(checked("verify", "org/model", out).output.split())
    assert "decoded from its codes" in " ".join(checked("verify", source, "hub:me/pushed").output.split())
