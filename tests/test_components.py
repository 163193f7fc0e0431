"""What ``--components`` selects, by the parts of layers that mix tokens and of those that do not."""

import json
from pathlib import Path

import pytest
from command_line import checked
from test_advice import _WHISPER, _twin
from test_every_architecture import ablate, random_direction
from tiny_models import TINY_MODELS, TinyModel, save_tiny_model

_MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MODELS: dict[str, TinyModel] = {
    **TINY_MODELS,
    "mamba": _twin("Mamba", _MAMBA),
    "whisper": _twin("Whisper", _WHISPER, "ForConditionalGeneration"),
}


def edited(name: str, tmp_path: Path, components: str, *more: str) -> set[str]:
    """Returns the modules that were edited, without their layers."""
    source = save_tiny_model(MODELS[name], tmp_path / "source")
    ablate(source, tmp_path / "out", random_direction(32), "--components", components, *more)
    receipt = json.loads((tmp_path / "out" / "ablation.json").read_text())
    names = {edit["name"] for edit in receipt["tensors"]}
    return {".".join(part for part in each.split(".") if not part.isdecimal())[-40:] for each in names}


@pytest.mark.parametrize(
    ("name", "components", "with_names", "without"),
    [
        ("granite-hybrid", "mamba", "mamba.out_proj", "o_proj"),
        ("granite-hybrid", "attention", "o_proj", "shared_mlp"),
        ("granite-hybrid-moe", "experts", "block_sparse_moe.output_linear", "shared_mlp"),
        ("granite-hybrid-moe", "shared-experts", "shared_mlp.output_linear", "block_sparse_moe"),
        ("lfm2", "convolution", "conv.out_proj", "self_attn"),
        ("qwen3.5", "linear-attention", "linear_attn.out_proj", "self_attn"),
        ("nemotron-h", "mamba", "mixer.out_proj", "mixer.o_proj"),
        ("falcon-h1", "mamba,mlp", "feed_forward.down_proj", "self_attn"),
        ("whisper", "cross-attention", "encoder_attn.out_proj", "self_attn"),
        ("mamba", "attention,mlp", "mixer.out_proj", "embeddings"),
    ],
)
def test_a_part_alone_is_edited(name: str, components: str, with_names: str, without: str, tmp_path: Path) -> None:
    modules = edited(name, tmp_path, components)
    assert any(with_names in module for module in modules)
    assert not any(without in module for module in modules)


@pytest.mark.parametrize("name", ["granite-hybrid", "lfm2", "qwen3.5", "falcon-h1"])
def test_attention_is_all_that_mixes_tokens(name: str, tmp_path: Path) -> None:
    kinds = {"granite-hybrid": "mamba", "lfm2": "conv", "qwen3.5": "linear_attn", "falcon-h1": "mamba"}
    modules = edited(name, tmp_path, "attention")
    assert any(kinds[name] in module for module in modules)
    assert any("self_attn" in module for module in modules)


def test_a_part_that_no_layer_has_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(MODELS["llama"], tmp_path / "source")
    ablate(source, tmp_path / "out", random_direction(32))
    said = checked(
        source, tmp_path / "again", "-d", tmp_path / "directions.safetensors", "--components", "mamba", code=1
    ).stderr
    assert "no mamba writer was found in the selected layers, which have attention, mlp" in " ".join(said.split())
    assert not (tmp_path / "again").exists()


def test_a_name_that_is_none_is_refused_with_those_that_are(tmp_path: Path) -> None:
    source = save_tiny_model(MODELS["llama"], tmp_path / "source")
    said = checked(source, tmp_path / "out", "--components", "mlp,gate", code=2).stderr
    assert "cross-attention" in said
    assert "gate" in said
