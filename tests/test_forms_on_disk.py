"""Checkpoints as they are found: what a loader computes from a folder decides, not only what its shards hold."""

import json
import shutil

import pytest
import torch
from command_line import checked
from raw_checkpoints import write_directions
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model

TOKENS = torch.arange(3, 27)[None]


def logits(folder, name):
    with torch.no_grad():
        return TINY_MODELS[name].load(folder)(input_ids=TOKENS).logits


@pytest.fixture
def adapted(tmp_path):
    """A model with an adapter of its own in its folder."""
    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    save_tiny_adapter(TINY_MODELS["llama"], folder, folder, r=4, target_modules=["down_proj"])
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


# ------------------------------------------------------------------------------------------- tied heads


def store_head(folder, change=0.0, *, said=True):
    """Stores the output head of a tied model too; ``said`` is whether config.json says that it is tied."""
    tensors = load_file(folder / "model.safetensors")
    embedding = next(name for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in tensors)
    tensors["lm_head.weight"] = tensors[embedding] + change
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config | ({"tie_word_embeddings": True} if said else {})))
    return embedding


TIED = [("qwen2", True), ("gemma2", False), ("gpt2", False)]


@pytest.mark.parametrize(("name", "said"), TIED)
def test_a_head_that_is_tied_and_stored_is_edited_as_the_embedding_is(tmp_path, name, said):
    base = save_tiny_model(TINY_MODELS[name], tmp_path / "base")
    directions = write_directions(tmp_path / "d.safetensors", layers=2)
    options = ("-d", directions, "--source-layer", 1, "--components", "attention,mlp,embedding")
    once, both = tmp_path / "once", tmp_path / "both"
    checked("ablate", base, once, *options)
    embedding = store_head(base, said=said)
    assert "stored as lm_head.weight too" in checked("ablate", base, both, *options).output
    after = load_file(both / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after[embedding])
    assert torch.equal(after[embedding], load_file(once / "model.safetensors")[embedding])
    assert torch.equal(logits(both, name), logits(once, name))
    checked("verify", base, both)
    assert "lm_head.weight is stored too" in checked("inspect", base).output


def test_a_head_of_its_own_stays_as_it_is_although_the_configuration_ties_it(tmp_path):
    base = save_tiny_model(TINY_MODELS["qwen2"], tmp_path / "base")
    store_head(base, change=0.5)
    directions = write_directions(tmp_path / "d.safetensors", layers=2)
    options = ("-d", directions, "--source-layer", 1, "--components", "attention,mlp,embedding")
    said = checked("ablate", base, tmp_path / "out", *options).output
    assert "lm_head.weight is stored with other bytes" in " ".join(said.split())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    loaded = TINY_MODELS["qwen2"].load(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, before["lm_head.weight"])


def test_a_merge_into_a_tied_embedding_changes_the_stored_head_too(tmp_path):
    base = save_tiny_model(TINY_MODELS["qwen2"], tmp_path / "base")
    adapter = save_tiny_adapter(TINY_MODELS["qwen2"], base, tmp_path / "adapter", r=4, target_modules=["embed_tokens"])
    once, both = tmp_path / "once", tmp_path / "both"
    checked("merge", base, adapter, once)
    store_head(base)
    assert "stored as lm_head.weight too" in checked("merge", base, adapter, both).output
    after = load_file(both / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(logits(both, "qwen2"), logits(once, "qwen2"))
    checked("verify", base, both, "--adapter", adapter)
