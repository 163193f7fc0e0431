"""Adapters that peft makes of every architecture: merged here, the logits are those that peft computes."""

import copy
import functools
import json
import re
import warnings

import peft
import pytest
import torch
from command_line import checked
from raw_checkpoints import write_directions
from safetensors.torch import load_file, save_file
from test_expert_adapters import TOKENS, logits
from test_registry import twins
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model, train_at_random

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


def load_twin(twin, tensors):
    """Returns a twin with other weights, which has the names of a checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        how = {"config": copy.deepcopy(twin.network.config), "dtype": torch.float32, "attn_implementation": "eager"}
        return type(twin.network).from_pretrained(None, state_dict=given, **how).eval()


def save_twin(twin, folder):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in twin.state.items()}, folder / "model.safetensors")
    written = {**twin.network.config.to_dict(), "architectures": [type(twin.network).__name__]}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    return folder


def run(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


#: Types that were published under other names than those that transformers gives the modules.
PUBLISHED = ("aria_text", "axk2", "bailing_hybrid", "hy_v3", "hy_v4", "kimi_linear", "laguna", "lfm3", "glm5_next")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_modules_are_found_under_the_names_that_an_architecture_was_published_with(tmp_path, kind):
    twin = next(twins(kind))
    assert twin.original
    state, base = twin.state, save_twin(twin, tmp_path / "base")
    load = functools.partial(load_twin, twin)
    model = load(state)
    stacks = [path for path, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in path]
    parameters = sorted({re.sub(r"^.*\.\d+\.", "", path) for path in stacks})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", target_parameters=parameters or None)
        trained = peft.get_peft_model(model, settings).eval()
        train_at_random(trained, 0.05)
        trained.save_pretrained(tmp_path / "adapter")
    expected = run(trained)
    assert (expected - run(load(state))).abs().max() > 0.1 * expected.abs().max()
    checked("merge", base, tmp_path / "adapter", tmp_path / "out")
    found = run(load(load_file(tmp_path / "out" / "model.safetensors")))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


#: Types whose modules or roots go by other names in the model than those of most, in both forms on disk.
MADE = (
    "aria_text", "bailing_hybrid", "deepseek_v4", "fuyu", "gemma4", "granitemoe", "hy_v3", "kimi_linear", "llama4",
    "minimax_m3_vl", "nemotron_h_omni", "phi4_multimodal", "step3p7",
)  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_an_adapter_of_an_edit_has_the_names_of_the_model(tmp_path, kind):
    for number, twin in enumerate(twins(kind)):
        folder = tmp_path / str(number)
        folder.mkdir()
        base = save_twin(twin, folder / "base")
        directions = write_directions(folder / "directions.safetensors", layers=twin.layers, hidden=twin.hidden)
        words = ["-d", directions, "--no-biproject", "--preserve", "none", "--quiet"]
        checked("ablate", base, folder / "edited", *words)
        checked("ablate", base, folder / "adapter", *words, "--adapter")
        left_out = json.loads((folder / "adapter" / "adapter.json").read_text())["left_out"]
        edited = load_file(folder / "edited" / "model.safetensors")
        expected = run(load_twin(twin, edited | {skip["name"]: twin.state[skip["name"]] for skip in left_out}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(load_twin(twin, twin.state), folder / "adapter").eval()
        said = [str(each.message) for each in caught]
        assert not [text for text in said if "missing adapter keys" in text or "target_" in text]
        assert (run(load_twin(twin, twin.state)) - expected).abs().max() > 0.1 * expected.abs().max()
        assert (run(model) - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("laguna", "peft loads only a part"),
        ("unlimited_ocr", "peft loads only a part"),
        ("ernie4_5_vl_moe", "have other shapes"),
        ("mamba", "carry nothing"),
    ],
)
def test_an_adapter_that_would_take_no_effect_is_refused(tmp_path, kind, said):
    twin = next(twins(kind))
    base = save_twin(twin, tmp_path / "base")
    directions = write_directions(tmp_path / "directions.safetensors", layers=twin.layers, hidden=twin.hidden)
    words = ["ablate", base, tmp_path / "adapter", "-d", directions, "--no-biproject", "--adapter"]
    shown = " ".join(checked(*words, code=1).output.split())
    assert said in shown
    assert "write a checkpoint instead" in shown
