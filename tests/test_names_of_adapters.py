"""Adapters that peft makes of every architecture: merged here, the logits are those that peft computes."""

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from command_line import checked
from safetensors.torch import load_file, save_file
from test_expert_adapters import TOKENS, logits
from test_registry import twins
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


#: Types that were published under other names than those that transformers gives the modules.
PUBLISHED = ("aria_text", "axk2", "bailing_hybrid", "hy_v3", "hy_v4", "kimi_linear", "laguna", "lfm3", "glm5_next")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_modules_are_found_under_the_names_that_an_architecture_was_published_with(tmp_path, kind):
    twin = next(twins(kind))
    assert twin.original
    config, state = twin.network.config, twin.state

    def load(tensors):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = {name: tensor.clone() for name, tensor in tensors.items()}
            how = {"dtype": torch.float32, "attn_implementation": "eager"}
            return (
                type(twin.network).from_pretrained(None, config=copy.deepcopy(config), state_dict=given, **how).eval()
            )

    def run(model):
        with torch.no_grad():
            return model(input_ids=TOKENS).logits

    base = tmp_path / "base"
    base.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, base / "model.safetensors")
    written = {**config.to_dict(), "architectures": [type(twin.network).__name__]}
    (base / "config.json").write_text(json.dumps(written, default=str))
    model = load(state)
    stacks = [path for path, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in path]
    parameters = sorted({re.sub(r"^.*\.\d+\.", "", path) for path in stacks})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", target_parameters=parameters or None)
        trained = peft.get_peft_model(model, settings).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        trained.save_pretrained(tmp_path / "adapter")
    expected = run(trained)
    assert (expected - run(load(state))).abs().max() > 0.1 * expected.abs().max()
    checked("merge", base, tmp_path / "adapter", tmp_path / "out")
    found = run(load(load_file(tmp_path / "out" / "model.safetensors")))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
