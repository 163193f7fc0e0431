"""Adapters that peft makes of every architecture: merged here, the logits are those that peft computes."""

import re

import peft
import pytest
import torch
from command_line import checked
from test_expert_adapters import TOKENS, logits
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model

#: Without a head there are no logits, and llama4 returns a tuple from its experts, which peft does not take.
LEFT_OUT = {"llama-bare", "gpt2-bare", "llama4"}
#: peft refuses what is computed beside the modules of these.
MAMBA = {"nemotron-h", "nemotron-h-latent", "nemotron-h-fused", "falcon-h1"}
#: This reads the weights of a module past peft, which then merges something else than it computes.
JAMBA = "jamba"


def modules_of(model, name):
    """Returns the names of every linear module that peft takes."""
    if name in MAMBA:
        return r".*\.(?:[qkvo]_proj|up_proj|down_proj|gate_proj|in_proj)"
    return r".*\.(?!dt_proj)\w+_proj" if name == JAMBA else "all-linear"


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in LEFT_OUT])
def test_every_module_that_peft_trains_is_found(tmp_path, name):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    model = tiny.load(base)
    stacks = [path for path, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in path]
    settings = {"target_modules": modules_of(model, name)}
    if stacks:
        settings["target_parameters"] = sorted({re.sub(r"^.*\.\d+\.", "", path) for path in stacks})
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=2, lora_alpha=6, **settings)
    expected = logits(tiny, base, adapter)
    assert (expected - logits(tiny, base)).abs().max() > 0.1

    checked("merge", base, adapter, tmp_path / "out")

    found = logits(tiny, tmp_path / "out")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_of_a_module_that_is_read_past_peft_the_merge_is_that_of_peft(tmp_path):
    tiny = TINY_MODELS[JAMBA]
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=2, lora_alpha=6, target_modules=["dt_proj"])
    merged = peft.PeftModel.from_pretrained(tiny.load(base), adapter).merge_and_unload()
    with torch.no_grad():
        expected = merged(input_ids=TOKENS).logits
    assert (expected - logits(tiny, base)).abs().max() > 0.1
    checked("merge", base, adapter, tmp_path / "out")
    assert (logits(tiny, tmp_path / "out") - expected).abs().max() <= 1e-4 * expected.abs().max()
