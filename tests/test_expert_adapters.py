"""Adapters of experts: however an adapter and a checkpoint hold them, the logits are those that peft computes."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from command_line import checked
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model

TOKENS = torch.arange(3, 27)[None]


def logits(tiny, folder, adapter=None):
    """Returns what transformers computes, with an adapter as peft applies it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.load(folder)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        return model(input_ids=TOKENS).logits


def changed(name, **settings):
    """Returns a tiny model with other settings."""
    tiny = TINY_MODELS[name]
    return dataclasses.replace(tiny, settings=tiny.settings | settings)


def rewritten(adapter, tensors=None, **config):
    """Changes an adapter's configuration, None to leave a key out, and its tensors."""
    settings = json.loads((adapter / "adapter_config.json").read_text()) | config
    kept = {key: value for key, value in settings.items() if value is not None}
    (adapter / "adapter_config.json").write_text(json.dumps(kept))
    if tensors is not None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    return adapter


def the_other_way_round(adapter, experts):
    """Returns the tensors of an adapter of stacked experts with input and output exchanged."""
    found = load_file(adapter / "adapter_model.safetensors")
    swapped = {}
    for name in found:
        if "lora_A" not in name or ".experts." not in name:
            continue
        up = name.replace("lora_A", "lora_B")
        down, rows = found[name], found[up]
        downs, ups = down.reshape(experts, -1, down.shape[1]), rows.reshape(len(rows), -1, experts)
        swapped[name] = ups.permute(2, 1, 0).reshape(-1, len(rows))
        swapped[up] = downs.permute(2, 1, 0).reshape(down.shape[1], -1)
    return swapped


# ------------------------------------------------------------------------------------------- layouts of peft

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
#: Which of a stack's axes is the input, by the version of peft: model, square parameter, versions and whether the
#: adapter is the other way round than one of today's.
LAYOUTS = [
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.21.2", False),
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.19.1", False),
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.19.0", True),
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.18.2.dev0@abcdef", True),
    ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, "0.20.0", False),
    ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, "0.18.1", True),
    ("qwen3-moe-fused", {"moe_intermediate_size": 32}, DOWN, "0.17.0", True),
    ("gpt-oss", {"intermediate_size": 32}, DOWN, "0.18.0", False),
]


@pytest.mark.parametrize(("name", "settings", "target", "version", "exchanged"), LAYOUTS)
def test_the_version_of_peft_tells_the_layout_of_square_experts(tmp_path, name, settings, target, version, exchanged):
    tiny = changed(name, **settings)
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(
        tiny, base, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=[target]
    )
    expected = logits(tiny, base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if exchanged:
        tensors |= the_other_way_round(adapter, 4)
    rewritten(adapter, tensors, peft_version=version)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    checked("verify", base, tmp_path / "out", "--adapter", adapter)


@pytest.mark.parametrize(
    ("name", "settings", "target", "version"),
    [
        ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, None),
        ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, "0.19.1.dev0"),
        ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "of my own"),
        ("gpt-oss", {"intermediate_size": 32}, DOWN, "0.21.2"),
    ],
)
def test_a_layout_that_cannot_be_told_is_refused(tmp_path, name, settings, target, version):
    tiny = changed(name, **settings)
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=2, target_modules=[], target_parameters=[target])
    rewritten(adapter, peft_version=version)
    said = " ".join(checked("merge", base, adapter, tmp_path / "out", code=1).output.split())
    assert f"versions of peft ({version or 'not given'}) and transformers" in said
    assert "merge it with peft itself, in those versions" in said


@pytest.mark.parametrize("exchanged", [False, True])
def test_parameters_of_the_same_module_tell_the_layout_where_the_version_does_not(tmp_path, exchanged):
    tiny = changed("qwen3-moe-fused", moe_intermediate_size=16)
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(
        tiny, base, tmp_path / "adapter", r=2, target_modules=[], target_parameters=[GATE_UP, DOWN]
    )
    expected = logits(tiny, base, adapter)
    rewritten(adapter, the_other_way_round(adapter, 4) if exchanged else None, peft_version=None)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- today's own names

LINEAR = ["q_proj", "gate_proj", "up_proj", "down_proj"]
MIXTRAL = ["q_proj", "w1", "w2", "w3"]
TODAY = [
    ("qwen3-moe", LINEAR),
    ("qwen3-moe", "all-linear"),
    ("qwen3-moe-fused", LINEAR),
    ("mixtral", MIXTRAL),
    ("mixtral", "all-linear"),
    ("mixtral-fused", MIXTRAL),
    ("olmoe", LINEAR),
    ("deepseek-v3", LINEAR),
    ("glm4-moe", LINEAR),
    ("qwen3.5-moe", LINEAR),
]


@pytest.mark.parametrize(("name", "modules"), TODAY)
def test_what_peft_makes_of_the_usual_targets(tmp_path, name, modules):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=2, lora_alpha=6, target_modules=modules)
    if name != "qwen3.5-moe":
        parameters = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
        assert {"gate_up_proj", "down_proj"} <= set(parameters)
    expected = logits(tiny, base, adapter)
    assert (expected - logits(tiny, base)).abs().max() > 0.1
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-3)
