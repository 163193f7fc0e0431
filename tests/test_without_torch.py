"""On a CPU the main job never imports torch, and looks for a device without it where that can be told."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from coded_checkpoints import write_coded
from raw_checkpoints import HIDDEN, llama_tensors, snapshot, write_directions, write_llama, write_shard

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.edit.ablation_editor import AblationEditor
from ablate_shards.surgery.machine import devices
from ablate_shards.surgery.machine.devices import find_device

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from ablate_shards.cli import main; main(sys.argv[1:])"


def run_without_torch(*arguments, code=0):
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_ablate_resume_and_verify(tmp_path, dtype):
    source = tmp_path / "source"
    source.mkdir()
    biased = {"model.layers.1.self_attn.o_proj.bias": np.linspace(-1, 1, 32)}
    write_shard(source / "model.safetensors", llama_tensors() | biased, dtype)
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    directions = write_directions(tmp_path / "d.safetensors")
    options = ("-d", directions, "--source-layer", 1, "--device", "cpu")
    out = tmp_path / "out"

    assert "native on cpu" in run_without_torch(source, out, *options)
    assert {edit["kind"] for edit in json.loads((out / "ablation.json").read_text())["tensors"]} == {"weight", "bias"}
    run_without_torch(source, tmp_path / "again", *options, "--resume", "--jobs", 1)
    assert snapshot(tmp_path / "again") == snapshot(out) != snapshot(source)
    run_without_torch("verify", source, out, "--device", "cpu")

    shard = out / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[open_checkpoint(out).tensors["model.layers.0.mlp.down_proj.weight"].end - 1] ^= 0x20
    shard.write_bytes(content)
    assert "element [31, 71]" in run_without_torch("verify", source, out, "--device", "cpu", code=1)


def test_ranks(tmp_path):
    source = write_llama(tmp_path / "source", shards=2)
    options = ("-d", write_directions(tmp_path / "d.safetensors"), "--source-layer", 1, "--device", "cpu")
    run_without_torch(source, tmp_path / "whole", *options)
    for rank in (0, 1):
        run_without_torch(source, tmp_path / "out", *options, "--worker-rank", rank, "--world-size", 2)
    run_without_torch("finish", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_merge_and_verify(tmp_path):
    source, adapter, out = (tmp_path / name for name in ("source", "adapter", "out"))
    for folder in (source, adapter):
        folder.mkdir()
    write_shard(source / "model.safetensors", llama_tensors(), "BF16")
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rng, shapes = np.random.default_rng(0), {"A": (4, HIDDEN), "B": (HIDDEN, 4)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_{letter}.weight": rng.standard_normal(shape) for letter, shape in shapes.items()}
    write_shard(adapter / "adapter_model.safetensors", factors, "F32")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    assert "numpy on cpu" in run_without_torch("merge", source, adapter, out, "--device", "cpu")
    assert (out / "model.safetensors").read_bytes() != (source / "model.safetensors").read_bytes()
    run_without_torch("verify", source, out, "--adapter", adapter, "--device", "cpu")


def test_dequantise_and_verify(tmp_path):
    source = write_coded(tmp_path / "source", "int4 in groups of 64, with zero points", hidden=64)
    directions = write_directions(tmp_path / "d.safetensors", layers=2, hidden=64)
    run_without_torch("dequantise", source, tmp_path / "plain")
    run_without_torch("verify", source, tmp_path / "plain", "--device", "cpu")
    options = ("-d", directions, "--source-layer", 1, "--device", "cpu", "--dequantise", "all")
    run_without_torch(source, tmp_path / "out", *options)
    run_without_torch("verify", source, tmp_path / "out", "--device", "cpu")


def test_what_needs_torch_says_so_or_imports_it(tmp_path):
    # So that the tests above would notice an import: without torch this device cannot be looked for.
    write_shard(tmp_path / "model.safetensors", llama_tensors())
    directions = write_directions(tmp_path / "d.safetensors")
    found = run_without_torch(
        tmp_path / "model.safetensors", tmp_path / "out", "-d", directions, "--device", "cuda", code=1
    )
    assert "torch" in found


def test_auto_looks_for_signs_of_a_device_first(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "resolve_device", lambda name: asked.append(name) or "cuda:0")
    monkeypatch.setattr(devices, "_may_have_accelerator", lambda: False)
    assert find_device("auto") == "cpu"
    assert not asked
    assert find_device("cuda:0") == "cuda:0"
    monkeypatch.setattr(devices, "_may_have_accelerator", lambda: True)
    assert find_device("auto") == "cuda:0"
    assert find_device("cpu") == "cpu"
    assert asked == ["cuda:0", "auto"]


def test_signs_of_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(devices, "_ACCELERATORS", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(devices, "_RENDER_NODES", tmp_path / "dri")
    assert not devices._may_have_accelerator()
    (tmp_path / "nvidiactl").touch()
    assert devices._may_have_accelerator()
    (tmp_path / "nvidiactl").unlink()
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "card0").touch()
    assert not devices._may_have_accelerator()
    (tmp_path / "dri" / "renderD128").touch()
    assert devices._may_have_accelerator()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not devices._may_have_accelerator()


def test_identity_names_what_did_the_arithmetic():
    ours = AblationEditor("cpu", 1 << 28, 1, threading.Event(), {}).identity()
    assert ours == {"device": "cpu", "form": "native"}
