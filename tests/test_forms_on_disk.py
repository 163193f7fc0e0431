"""Checkpoints as they are found: what a loader computes from a folder decides, not only what its shards hold."""

import shutil
import warnings

import peft
import pytest
import torch
from command_line import checked
from tiny_models import TINY_MODELS, save_tiny_model

TOKENS = torch.arange(3, 27)[None]


def logits(folder, name):
    with torch.no_grad():
        return TINY_MODELS[name].load(folder)(input_ids=TOKENS).logits


def save_adapter(name, folder, adapter, **settings):
    """Saves an adapter of random values, as peft does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(TINY_MODELS[name].load(folder), peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(adapter)
    return adapter


@pytest.fixture
def adapted(tmp_path):
    """A model with an adapter of its own in its folder."""
    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    save_adapter("llama", folder, folder, r=4, target_modules=["down_proj"])
    (folder / "README.md").unlink()
    return folder


def test_an_adapter_beside_the_weights_is_neither_overlooked_nor_added_twice(tmp_path, adapted):
    with_adapter = logits(adapted, "llama")
    files, out = ("adapter_config.json", "adapter_model.safetensors"), tmp_path / "out"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"positive": "a", "negative": "b"}\n')
    for command in (
        ("inspect", adapted),
        ("ablate", adapted, out, "-d", "d.safetensors"),
        ("merge", adapted, adapted, out),
        ("capture", adapted, tmp_path / "dump.safetensors", "--pairs", pairs),
        ("evaluate", adapted, "-o", tmp_path / "evaluation.json", "--device", "cpu"),
        ("diff", adapted, adapted),
    ):
        said = checked(*command, code=1).output
        assert "transformers adds its adapter" in said, command
        assert "ablate-shards merge MODEL ADAPTER OUT" in said
        assert not out.exists()

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in files:
        shutil.move(adapted / name, adapter / name)
    alone = logits(adapted, "llama")
    assert (with_adapter - alone).abs().max() > 1e-2
    checked("merge", adapted, adapter, out)
    torch.testing.assert_close(logits(out, "llama"), with_adapter, rtol=1e-4, atol=1e-4)
    assert not (out / "adapter_config.json").exists()


def test_a_folder_of_an_adapter_is_not_a_checkpoint(tmp_path, adapted):
    for name in ("model.safetensors", "config.json"):
        (adapted / name).unlink()
    assert "holds an adapter, not a model" in checked("inspect", adapted, code=1).output
    (adapted / "adapter_model.safetensors").rename(adapted / "adapters.safetensors")
    assert "holds an adapter, not a model" in checked("inspect", adapted, code=1).output
