"""``inspect --derive``: what it finds by intervention is complete on the checkpoint, or it says what is left."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import checked
from safetensors.torch import load_file, save_file
from test_advice import _MPT, _NEO, _RWKV, _T5, _TWO_STACKS, _twin, ablate, stream_of
from test_every_architecture import random_direction, read_anatomy, shares
from tiny_models import _BASE, TINY_MODELS, TinyModel, save_tiny_model
from tiny_registry import SMALL
from transformers import CONFIG_MAPPING

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.architecture import dissect
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.derive import derive_checkpoint, leaks_of
from ablate_shards.surgery.derive.derive import derive
from ablate_shards.surgery.derive.twin import build_twin, find_unreached

UNLISTED = {
    "gpt-j": _twin("GPTJ", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt-neo": _twin("GPTNeo", _NEO),
    "mpt": _twin("Mpt", _MPT),
    "exaone4": _twin("Exaone4", {**_BASE, "layer_types": ["full_attention", "full_attention"]}),
    "t5": _twin("T5", _T5, "ForConditionalGeneration"),
    "bloom": TINY_MODELS["bloom"],
    "gemma4-experts": TINY_MODELS["gemma4-experts"],
    "jetmoe": _twin("JetMoe", {**_BASE, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
KNOWN = ["gpt2", "mixtral", "mixtral-fused", "qwen3-next", "gpt-oss", "gemma2", "gemma4", "olmo2", "nemotron-h"]
KNOWN += ["bloom", "gemma4-experts", "lfm2", "opt", "llama-bare", "llava", "falcon-h1", "granite-hybrid-moe"]
LEFT = {
    "bart": (_twin("Bart", _TWO_STACKS, "ForConditionalGeneration"), r"multiplies what a mean was subtracted from"),
    "bert": (_twin("Bert", {**_BASE, "is_decoder": True}, "LMHeadModel"), r"multiplies what a mean was subtracted"),
    "xglm": (
        _twin("XGLM", {"vocab_size": 64, "d_model": 32, "num_layers": 2, "ffn_dim": 48, "attention_heads": 4}),
        r"before the first layer, \d+\.\d% of a state is in coordinates that no tensor writes",
    ),
    "doge": (_twin("Doge", _BASE), r"after layer 0 \d+\.\d+%, after layer 1 \d+\.\d+%"),
    "rwkv": (_twin("Rwkv", _RWKV), r"multiplies what a mean was subtracted from"),
}


@pytest.mark.parametrize("name", UNLISTED)
def test_what_is_saved_is_complete_on_the_checkpoint(name: str, tmp_path: Path) -> None:
    tiny = UNLISTED[name]
    source = save_tiny_model(tiny, tmp_path / "source")
    recipe = tmp_path / "recipe.toml"
    checked("inspect", source, "--derive", "--save", recipe)
    direction = random_direction(32)
    before = shares(stream_of(tiny.load(source), recipe), direction)
    assert max(before) > 0.1

    said = ablate(source, tmp_path / "out", direction, len(before) - 1, recipe)

    assert max(shares(stream_of(tiny.load(tmp_path / "out"), recipe), direction)) < 1e-5
    assert "could write to the stream" not in said
    checked("verify", source, tmp_path / "out")


@pytest.mark.parametrize("name", KNOWN)
def test_it_finds_what_the_table_says(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(TINY_MODELS[name], tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    found = derive_checkpoint(checkpoint)
    assert found.complete
    derived = dissect(checkpoint.tensors, checkpoint.config, found.targets).writers

    def described(writers: Any) -> set[tuple[Any, ...]]:
        return {(one.name, one.layer, one.component, one.axis, one.gain, one.gain_offset) for one in writers}

    assert described(derived) == described(writer for writer in read_anatomy(folder).writers if not writer.mtp)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_described_is_said_by_layer(name: str, tmp_path: Path) -> None:
    tiny, why = LEFT[name]
    folder = save_tiny_model(tiny, tmp_path / "model")
    said = checked("inspect", folder, "--derive", "--save", tmp_path / "recipe.toml", code=1).stderr
    assert re.search(why, " ".join(said.split()))
    assert not (tmp_path / "recipe.toml").exists()


PARTS = {
    "granite-hybrid-moe": ["embedding", "attention", "mamba", "experts", "shared-experts"],
    "falcon-h1": ["embedding", "attention", "mamba", "mlp"],
    "lfm2-moe": ["embedding", "attention", "convolution", "experts", "mlp"],
    "qwen3.5-text": ["embedding", "attention", "linear-attention", "mlp"],
    "qwen3-next": ["embedding", "attention", "linear-attention", "experts", "shared-experts"],
    "deepseek-v3": ["embedding", "attention", "experts", "mlp", "shared-experts"],
    "deepseek-v3-fused": ["embedding", "attention", "experts", "mlp", "shared-experts"],
    "gemma4-experts": ["embedding", "attention", "experts", "mlp"],
}


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_layers_are_told(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(TINY_MODELS[name], tmp_path / "model")
    lines = checked("inspect", folder, "--derive").stdout
    assert sorted(set(re.findall(r'component = "(.+)"', lines))) == sorted(PARTS[name])


def test_attention_to_an_encoder_is_told(tmp_path: Path) -> None:
    lines = checked("inspect", save_tiny_model(UNLISTED["t5"], tmp_path / "model"), "--derive").stdout
    assert 'EncDecAttention\\.o\\.weight\'\ncomponent = "cross-attention"' in lines


def test_a_part_that_a_target_names_is_selected_by_it(tmp_path: Path) -> None:
    source = save_tiny_model(TINY_MODELS["falcon-h1"], tmp_path / "source")
    recipe = tmp_path / "recipe.toml"
    checked("inspect", source, "--derive", "--save", recipe)
    lines = recipe.read_text()
    assert 'component = "mamba"' in lines
    recipe.write_text(lines.replace('component = "mlp"', 'component = "experts"'))
    ablate(source, tmp_path / "out", random_direction(32), 2, recipe, "--components", "mamba,experts")
    names = {edit["name"] for edit in json.loads((tmp_path / "out" / "ablation.json").read_text())["tensors"]}
    assert {re.sub(r".*\.\d+\.", "", name) for name in names} == {
        "mamba.out_proj.weight",
        "feed_forward.down_proj.weight",
    }


def test_the_error_for_an_unknown_architecture_names_the_command(tmp_path: Path) -> None:
    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    _of_no_type(folder)
    assert "inspect SOURCE --derive" in checked("inspect", folder, code=1).stderr


def test_as_json(tmp_path: Path) -> None:
    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    found = json.loads(checked("inspect", folder, "--derive", "--json").stdout)
    assert found["complete"] is True
    assert found["leaks"] == []
    assert [target["component"] for target in found["targets"]] == ["embedding", "attention", "mlp"]


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _of_no_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "brand_new", "auto_map": {}}))


def _called_otherwise(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("o_proj", "something"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def _of_other_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


def _of_fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def _of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def _with_a_branch_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.adapter.up_proj.weight"] = torch.zeros(32, 8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _that_needs_a_package(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "fast_vlm"}))


def _that_contradicts_itself(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "none_such"}))


def _with_nothing_known(folder: Path) -> None:
    save_file({"a.b": torch.zeros(2, 2)}, folder / "model.safetensors")


def test_attention_to_images_in_a_list_of_its_own_is_followed() -> None:
    found = derive(build_twin(CONFIG_MAPPING["idefics"]()))
    assert found.complete
    assert any("gated_cross_attn_layers" in target.pattern for target in found.targets)


def test_a_writer_that_no_text_reaches_is_named() -> None:
    twin = build_twin(CONFIG_MAPPING["ernie4_5_vl_moe"](), original=False, **SMALL["ernie4_5_vl_moe"])
    found = derive(twin)
    assert not found.complete
    (said,) = [leak for leak in leaks_of(found) if leak.startswith("no text reaches")]
    assert "mlp.vision_moe.experts.down_proj" in said
    assert "text_moe" not in said


def test_experts_that_no_token_is_routed_to_are_named() -> None:
    twin = build_twin(CONFIG_MAPPING["qwen3_moe"](), original=False)
    # With the same choice for all tokens, and the experts that are never chosen in tensors of their own.
    assert not find_unreached(twin)
    for layer in twin.network.model.layers:
        layer.mlp.experts.register_parameter("idle", torch.nn.Parameter(torch.ones(2, twin.hidden, 24)))
    assert find_unreached(twin) == ["model.layers.#.mlp.experts.idle"]


def test_a_stream_that_cannot_be_followed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fourfold(layer: Any, state: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return state.repeat(1, 1, 1, 1)

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2Block.forward", fourfold)
    with pytest.raises(ArchitectureError, match="no list of layers was found whose layers all take and return"):
        build_twin(CONFIG_MAPPING["gpt2"]())


def test_a_twin_that_is_too_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ablate_shards.surgery.derive.twin._MOST_PARAMETERS", 1000)
    with pytest.raises(ArchitectureError, match=r"a tiny twin of 'gpt2' would have \d+ parameters, more than 1000"):
        build_twin(CONFIG_MAPPING["gpt2"]())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_without_config, r"there is no config\.json, from which a tiny twin could be built"),
        (_of_no_type, r"does not know model_type 'brand_new'"),
        (_called_otherwise, r"no tensor of the checkpoint is called .*self_attn"),
        (_of_other_size, r"expected the hidden size 64"),
        (_of_fewer_layers, r"config\.json counts 1 layers, but the last that the checkpoint holds .* is layer 1"),
        (_of_more_layers, r"config\.json counts 3 layers, but the last that the checkpoint holds .* is layer 1"),
        (_with_a_branch_more, r"model\.layers\.1\.adapter\.up_proj\.weight: by its shape it could write"),
        (_that_needs_a_package, r"a tiny twin of 'fast_vlm' cannot be built: .* requires the timm library"),
        (_that_contradicts_itself, r"a tiny twin of 'llama' cannot be built: .*none_such"),
        (_with_nothing_known, r"none of the checkpoint's tensors, such as a\.b,"),
    ],
)
def test_what_is_wrong_is_named(spoil: Any, why: str, tmp_path: Path) -> None:
    folder = save_tiny_model(TinyModel("", "LlamaForCausalLM", "LlamaConfig", _BASE), tmp_path / "model")
    spoil(folder)
    assert re.search(why, " ".join(checked("inspect", folder, "--derive", code=1).stderr.split()))


def test_saving_needs_derive_and_a_new_name(tmp_path: Path) -> None:
    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    recipe = tmp_path / "recipe.toml"
    assert "give both" in checked("inspect", folder, "--save", recipe, code=2).stderr
    recipe.write_text("")
    assert "exists already" in checked("inspect", folder, "--derive", "--save", recipe, code=2).stderr
