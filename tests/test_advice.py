"""The lines printed for an architecture outside the table: what they describe is gone, or they say what may be left."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import checked
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from test_every_architecture import random_direction, shares
from tiny_models import _BASE, TINY_MODELS, TinyModel, save_tiny_model

from ablate_shards.surgery.anatomy.architecture import dissect
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint

_TWO_STACKS: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
_WHISPER = {**_TWO_STACKS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"pad_token_id": 0, "decoder_start_token_id": 0}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MPT = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
_NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
_NEO |= {"attention_types": [[["global", "local"], 1]]}
_DBRX: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
}
_RWKV = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
_RWKV |= {"attention_hidden_size": 32, "intermediate_size": 48}


def _twin(stem: str, settings: dict[str, Any], head: str = "ForCausalLM", config: str = "") -> TinyModel:
    return TinyModel("", stem + head, f"{config or stem}Config", settings)


_GENERATION = "ForConditionalGeneration"
GONE = {
    "whisper": _twin("Whisper", _WHISPER, _GENERATION),
    "pegasus": _twin("Pegasus", _TWO_STACKS, _GENERATION),
    "t5": _twin("T5", _T5, _GENERATION),
    "switch": _twin("SwitchTransformers", {**_T5, "num_experts": 2}, _GENERATION),
    "gpt2-cross": _twin("GPT2", {**_GPT, "add_cross_attention": True}, "LMHeadModel"),
    "gpt-j": _twin("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt-neo": _twin("GPTNeo", _NEO),
    "mpt": _twin("Mpt", _MPT),
    "biogpt": _twin("BioGpt", _BASE),
    "nemotron": _twin("Nemotron", _BASE),
    "phimoe": _twin("Phimoe", {**_BASE, **_MOE}),
    "granite-moe": _twin("GraniteMoe", {**_BASE, **_MOE}),
    "recurrent-gemma": _twin(
        "RecurrentGemma", {**_BASE, "block_types": ["recurrent", "attention"], "lru_width": 32, "head_dim": 8}
    ),
    "lfm2": TINY_MODELS["lfm2"],
    "nemotron-h": TINY_MODELS["nemotron-h"],
    "gpt-oss": TINY_MODELS["gpt-oss"],
    "opt": TINY_MODELS["opt"],
    "qwen3.5": TINY_MODELS["qwen3.5"],
    "gpt2": TINY_MODELS["gpt2"],
}
#: What is left, and which words say why.
LEFT = {
    "bart": (_twin("Bart", _TWO_STACKS, _GENERATION), r"there is no norm after the last layer"),
    "mbart": (_twin("MBart", _TWO_STACKS, _GENERATION), r"decoder\.layernorm_embedding\.weight may normalise the emb"),
    "m2m": (_twin("M2M100", _TWO_STACKS, _GENERATION), r"no table of positions is stored"),
    "bloom": (
        _twin("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        r"word_embeddings_layernorm\.weight may normalise",
    ),
    "bert": (
        _twin("Bert", {**_BASE, "is_decoder": True}, "LMHeadModel"),
        r"there is no norm after the last layer",
    ),
    "exaone4": (_twin("Exaone4", _BASE), r"may pass through \S*post_attention_layernorm\.weight, \S*post_feedforward"),
    "gemma2": (TINY_MODELS["gemma2"], r"may pass through \S*post_attention_layernorm\.weight, \S*post_feedforward"),
    "doge": (_twin("Doge", _BASE), r"post_attention_residual may scale the stream"),
    "dbrx": (_twin("Dbrx", _DBRX), r"could not be placed, .*ffn\.experts\.mlp\.w2"),
    "jetmoe": (
        _twin("JetMoe", {**_BASE, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
        r"could not be placed, .*mlp\.bias, .*self_attention\.experts\.bias",
    ),
    "rwkv": (_twin("Rwkv", _RWKV), r"could not be placed, .*feed_forward\.value\.weight"),
}


def advice_for(folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """Returns what is said of a checkpoint of no known type, and a recipe of the lines that are printed."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["model_type"] = "brand_new"
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps(config))
    (unknown / "model.safetensors").symlink_to(folder / "model.safetensors")
    said, _, lines = checked("inspect", unknown, code=1).stderr.partition("\n\n")
    (tmp_path / "recipe.toml").write_text(lines)
    return said, tmp_path / "recipe.toml"


def ablate(source: Path, out: Path, direction: torch.Tensor, layers: int, recipe: Path, *more: str) -> str:
    file = source.parent / "directions.safetensors"
    vector = direction.float().numpy()[None]
    arrays = {"direction.layers.0": vector, "reference.layers.0": np.zeros_like(vector[0])}
    save_arrays(arrays, file, metadata={"format": "ablate-shards.directions/1"})
    components = ",".join(dict.fromkeys(re.findall(r'component = "([\w-]+)"', recipe.read_text())))
    options = ["-d", file, "--layers", f"0-{layers - 1}", "--source-layer", 0, "--no-biproject", "--recipe", recipe]
    return checked(source, out, *options, "--preserve", "columns", "--components", components, *more).stderr


def stream_of(model: torch.nn.Module, recipe: Path) -> list[torch.Tensor]:
    """Returns the stream before the first and after every layer of the list that the recipe's lines are of."""
    pattern = next(line for line in recipe.read_text().splitlines() if "<layer>" in line)
    home = pattern.split("'")[1].split(r"\.(?P<layer>")[0].replace("\\", "")
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)]
    renamed = home.replace("backbone", "model")
    layers = next(part for name, part in lists if name in (home, renamed) or name.endswith((f".{home}",)))
    stream: list[torch.Tensor] = []

    def keep(state: Any) -> None:
        state = state[0] if isinstance(state, tuple | list) else state
        stream.append(state.detach().reshape(-1, state.shape[-1]).clone())

    layers[0].register_forward_pre_hook(lambda _, args, more: keep(args or more["hidden_states"]), with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: keep(output))
    with torch.no_grad():
        model(**inputs_of(model))
    return stream


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tokens = torch.arange(3, 35)[None]
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        return {"input_features": torch.randn(1, 8, 32, generator=generator), "decoder_input_ids": tokens}
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens.flip(1), "decoder_input_ids": tokens}
    if getattr(model.config, "add_cross_attention", False):
        return {"input_ids": tokens, "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator)}
    return {"input_ids": tokens}


def edited(tiny: TinyModel, tmp_path: Path, drop: str = "") -> tuple[float, str, str]:
    """Returns what is left of the direction after the printed lines, what was said of them, and what the run said."""
    source = save_tiny_model(tiny, tmp_path / "source")
    said, recipe = advice_for(source, tmp_path)
    direction = random_direction(32)
    before = shares(stream_of(tiny.load(source), recipe), direction)
    assert len(before) > 2
    assert max(before) > 0.1
    if drop:
        lines = recipe.read_text().split("\n\n")
        kept = [line for line in lines if drop not in line]
        assert len(kept) < len(lines)
        recipe.write_text("\n\n".join(kept))
    stderr = ablate(source, tmp_path / "out", direction, len(before) - 1, recipe)
    return max(shares(stream_of(tiny.load(tmp_path / "out"), recipe), direction)), said, stderr


@pytest.mark.parametrize("name", GONE)
def test_the_printed_lines_are_complete(name: str, tmp_path: Path) -> None:
    left, said, _ = edited(GONE[name], tmp_path)
    assert left < 1e-5
    assert "could not be placed" not in said


@pytest.mark.parametrize("name", LEFT)
def test_what_the_printed_lines_leave_is_said(name: str, tmp_path: Path) -> None:
    tiny, why = LEFT[name]
    left, said, _ = edited(tiny, tmp_path)
    assert left > 1e-3
    assert re.search(why, said)


@pytest.mark.parametrize(
    ("name", "drop", "named"),
    [
        ("whisper", "encoder_attn", r"model.decoder.layers.*.encoder_attn.out_proj.weight"),
        ("whisper", "fc2", r"model.decoder.layers.*.fc2.weight"),
        ("t5", "EncDecAttention", r"decoder.block.*.layer.*.EncDecAttention.o.weight"),
        ("gpt-neo", "c_proj", r"transformer.h.*.mlp.c_proj.weight"),
        ("gpt2", "attn", r"transformer.h.*.attn.c_proj.weight"),
        ("granite-moe", "block_sparse_moe", r"model.layers.*.block_sparse_moe.output_linear.weight"),
    ],
)
def test_a_run_names_what_its_targets_leave_out(name: str, drop: str, named: str, tmp_path: Path) -> None:
    left, _, stderr = edited(GONE[name], tmp_path, drop)
    assert left > 1e-3
    assert f"not edited: {named}, which by shape could write to the stream" in stderr
    receipt = json.loads((tmp_path / "out" / "ablation.json").read_text())
    reasons = {re.sub(r"\.\d+(?=\.)", ".*", item["name"]): item["reason"] for item in receipt["skipped"]}
    assert reasons[named] == "no target describes it, and by its shape it could write to the stream"


@pytest.mark.parametrize(
    ("inner", "shape"),
    [
        ("adapter.up.weight", (32, 8)),
        ("mlp.adapter.0.up_proj.weight", (32, 8)),
        ("side.mix.weight", (32, 32)),
        ("conv_mix.weight", (32, 16, 3)),
        ("memory.values", (128, 32, 4)),
        ("extra.bias", (32,)),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_branch_within_a_layer_is_named(inner: str, shape: tuple[int, ...], known: bool, tmp_path: Path) -> None:
    source = save_tiny_model(TINY_MODELS["mistral"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.{inner}"] = torch.randn(shape, generator=torch.Generator().manual_seed(layer))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    kind = re.sub(r"\.\d+\.", ".*.", f"model.layers.0.{inner}")
    if known:
        shown = checked("inspect", source).output
        named = re.sub(r"\.weight$", "", re.sub(r"\.\d+\.", ".*.", inner))
        assert f"{named} (Mistral has none of this name" in shown
        assert "could write to the stream" in shown
    else:
        said, recipe = advice_for(source, tmp_path)
        assert (
            f"could not be placed, as by shape they could write to the stream and the name does not tell: {kind};"
            in said
        )
        assert f"not edited: {kind}, which by shape" in ablate(
            source, tmp_path / "out", random_direction(32), 2, recipe
        )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_nothing_of_a_listed_architecture_is_named_in_vain(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny_model(TINY_MODELS[name], tmp_path / "model"))
    anatomy = dissect(checkpoint.tensors, checkpoint.config)
    assert not anatomy.unplaced
    assert not anatomy.missing
