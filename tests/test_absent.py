"""Layers that have no attention or no MLP are edited in one run; layers whose tensors are missing are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import checked
from safetensors.torch import load_file, save_file
from test_every_architecture import ablate, random_direction, read_anatomy, shares
from tiny_models import TINY_MODELS, TinyModel, capture_stream, save_tiny_model

LLAMA = TINY_MODELS["llama"]
FOUR_LAYERS = TinyModel(LLAMA.family, LLAMA.model, LLAMA.config, {**LLAMA.settings, "num_hidden_layers": 4})
OVERRIDE = '[[ablate.override]]\nlayers = "1"\ncomponents = "attention"\ncoefficient = 0\n'
FILE = "model.safetensors"


def pruned_llama(folder: Path, said: dict[str, object], *gone: str) -> Path:
    """Saves a Llama of four layers with its model_type and more as given, and without some tensors."""
    save_tiny_model(FOUR_LAYERS, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    without(folder, *gone)
    return folder


def without(folder: Path, *gone: str) -> None:
    tensors = load_file(folder / FILE)
    kept = {name: value for name, value in tensors.items() if not any(re.search(each, name) for each in gone)}
    assert len(kept) < len(tensors) or not gone
    save_file(kept, folder / FILE, metadata={"format": "pt"})


def stream_of(folder: Path, like: Path, twin: Path) -> list[torch.Tensor]:
    """Runs a pruned checkpoint as a Llama whose missing tensors are zero, so that their modules write nothing."""
    shutil.copytree(like, twin)
    whole = load_file(like / FILE)
    held = load_file(folder / FILE)
    zeros = {name: torch.zeros_like(value) for name, value in whole.items()}
    save_file(zeros | held, twin / FILE, metadata={"format": "pt"})
    return capture_stream(FOUR_LAYERS.load(twin))


def blocks(*kinds: str) -> list[dict[str, dict[str, bool]]]:
    return [{"attention": {"no_op": "a" not in kind}, "ffn": {"no_op": "m" not in kind}} for kind in kinds]


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "nemotron-nas", "block_configs": blocks("am", "m", "a", "am")},
        {"model_type": "deci", "block_configs": blocks("am", "m", "a", "am")},
        {"drop_attn_list": [1], "drop_mlp_list": [2]},
        {"hybrid_override_pattern": "M-*E", "block_configs": blocks("am", "m", "a", "am")},
    ],
)
def test_a_pruned_model_is_edited_in_one_run(said: dict[str, object], tmp_path: Path) -> None:
    whole = save_tiny_model(FOUR_LAYERS, tmp_path / "whole")
    gone = (r"layers\.1\.self_attn|layers\.1\.input_layernorm", r"layers\.2\.mlp|layers\.2\.post_attention_layernorm")
    source = pruned_llama(tmp_path / "source", said, *gone)
    direction = random_direction(32)
    assert min(shares(stream_of(source, whole, tmp_path / "before"), direction)) > 0.1

    ablate(source, tmp_path / "out", direction)

    assert max(shares(stream_of(tmp_path / "out", whole, tmp_path / "after"), direction)) < 1e-5
    receipt = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [(part["layer"], part["component"]) for part in receipt["absent"]] == [(1, "attention"), (2, "mlp")]
    assert all(part["reason"].startswith("config.json: ") for part in receipt["absent"])
    shown = checked("inspect", source)
    assert "no attention in layer 1 (config.json: " in shown.stdout
    assert "no mlp in layer 2 (config.json: " in shown.stdout
    told = json.loads(checked("inspect", source, "--json").stdout)
    assert told["absent"] == receipt["absent"]
    checked("verify", source, tmp_path / "out")


def test_a_model_of_one_sublayer_a_layer_says_what_its_layers_lack(tmp_path: Path) -> None:
    source = save_tiny_model(TINY_MODELS["nemotron-h"], tmp_path / "source")
    anatomy = read_anatomy(source)
    found = {(part.layer, part.component) for part in anatomy.absent}
    assert found == {(0, "mlp"), (1, "attention"), (2, "mlp"), (3, "attention")}
    assert not anatomy.missing


@pytest.mark.parametrize("name", ["nemotron-h", "lfm2", "granite-hybrid", "jamba"])
def test_a_missing_writer_of_a_hybrid_is_refused(name: str, tmp_path: Path) -> None:
    """The layer's other tensors, or the configuration, tell that each of its layers has one."""
    source = save_tiny_model(TINY_MODELS[name], tmp_path / "source")
    writers = [writer for writer in read_anatomy(source).writers if writer.layer is not None]
    for layer in range(len(read_anatomy(source).layers)):
        for component in ("attention", "mlp"):
            gone = [item.name for item in writers if (item.layer, item.component) == (layer, component)]
            if not gone:
                continue
            folder = tmp_path / f"{layer}-{component}"
            shutil.copytree(source, folder)
            without(folder, *(f"^{re.escape(each)}$" for each in gone))
            refused = checked(folder, tmp_path / "out", *options(tmp_path), f"0-{layer}", code=1)
            assert f"layer {layer}: no {component} writer was found among " in refused.stderr
            assert not (tmp_path / "out").exists()


def options(folder: Path) -> list[object]:
    from safetensors.numpy import save_file as save_arrays

    vector = random_direction(32).float().numpy()[None]
    file = folder / "directions.safetensors"
    save_arrays({"direction.layers.0": vector}, file, metadata={"format": "ablate-shards.directions/1"})
    return ["-d", file, "--source-layer", 0, "--no-biproject", "--layers"]


@pytest.mark.parametrize(
    ("said", "gone", "why"),
    [
        (
            {},
            r"layers\.1\.self_attn\.o_proj",
            "it holds self_attn.k_proj.bias, which is never without self_attn.o_proj",
        ),
        (
            {},
            r"layers\.1\.mlp\.down_proj\.weight",
            "it holds mlp.down_proj.bias, which is never without mlp.down_proj.w",
        ),
        ({"block_configs": blocks("am", "am", "am", "am")}, r"layers\.1\.self_attn", "attention has no_op = false"),
        (
            {"block_configs": blocks("am", "m", "am", "am")},
            r"layers\.1\.self_attn\.o_proj",
            "it holds self_attn.k_proj",
        ),
        ({"drop_attn_list": [2, 3]}, r"layers\.1\.self_attn", "drop_attn_list does not name the layer"),
    ],
)
def test_what_is_missing_is_refused_even_with_coefficient_0(
    said: dict[str, object], gone: str, why: str, tmp_path: Path
) -> None:
    source = pruned_llama(tmp_path / "source", said, gone)
    (tmp_path / "recipe.toml").write_text(OVERRIDE)
    for more in ((), ("--recipe", tmp_path / "recipe.toml")):
        refused = checked(source, tmp_path / "out", *options(tmp_path), "0-3", *more, code=1)
        assert "writer was found among " in refused.stderr
        assert "it is missing: " in refused.stderr
        assert why in refused.stderr
    assert f"writer is missing: {'config.json: ' if 'has no_op' in why else ''}" in checked("inspect", source).stdout


def test_where_nothing_tells_the_printed_override_is_the_way_out(tmp_path: Path) -> None:
    source = pruned_llama(tmp_path / "source", {}, r"layers\.1\.self_attn")
    refused = checked(source, tmp_path / "out", *options(tmp_path), "0-3", code=1)
    assert "layer 1: no attention writer was found among " in refused.stderr
    assert 'layers = "1", components = "attention", coefficient = 0' in refused.stderr
    (tmp_path / "recipe.toml").write_text(OVERRIDE)

    checked(source, tmp_path / "out", *options(tmp_path), "0-3", "--recipe", tmp_path / "recipe.toml")

    receipt = json.loads((tmp_path / "out" / "ablation.json").read_text())
    reason = "an override sets its coefficient to 0, and no writer was found"
    assert receipt["absent"] == [{"layer": 1, "component": "attention", "reason": reason}]


def test_an_index_that_names_a_missing_writer_is_refused(tmp_path: Path) -> None:
    said = {"block_configs": blocks("am", "m", "am", "am")}
    source = pruned_llama(tmp_path / "source", said, r"layers\.1\.self_attn")
    names = [*load_file(source / FILE), "model.layers.1.self_attn.o_proj.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, FILE)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused = checked(source, tmp_path / "out", *options(tmp_path), "0-3", code=1)
    assert "model.layers.1.self_attn.o_proj.weight" in refused.stderr
    assert "restore the index that came with the shards" in refused.stderr
