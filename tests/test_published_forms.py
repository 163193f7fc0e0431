"""The same edit of a model as transformers saves it and as its makers publish it gives the same bytes."""

import copy
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import checked
from raw_checkpoints import write_directions
from safetensors.torch import load_file, save_file
from test_registry import PROVEN
from tiny_registry import FORMS, GIVEN, SMALL
from transformers import CONFIG_MAPPING

from ablate_shards.surgery.derive.twin import State, Twin, build_twin

Renamings = tuple[tuple[str, str], ...]

_CONSOLIDATED: Renamings = (
    (r"^(?:model\.language_model|model)\.embed_tokens", "tok_embeddings"),
    (r"^(?:model\.language_model|model)\.norm", "norm"),
    (r"^(?:model\.language_model|model)\.layers", "layers"),
    (r"^lm_head", "output"),
    (r"\.input_layernorm", ".attention_norm"),
    (r"\.post_attention_layernorm", ".ffn_norm"),
    (r"\.self_attn\.([qkvo])_proj", r".attention.w\1"),
    (r"\.self_attn\.kv_a_proj_with_mqa", ".attention.wkv_a_with_mqa"),
    (r"\.self_attn\.kv_b_proj", ".attention.wkv_b"),
    (r"\.self_attn\.q_([ab])_proj", r".attention.wq_\1"),
    (r"\.self_attn\.(q_a|kv_a)_layernorm", r".attention.\1_norm"),
    (r"^model\.vision_tower", "vision_encoder"),
    (r"^model\.multi_modal_projector\.norm", "pre_mm_projector_norm"),
    (r"^model\.multi_modal_projector\.patch_merger", "patch_merger"),
    (r"^model\.multi_modal_projector\.linear_1", "vision_language_adapter.w_in"),
    (r"^model\.multi_modal_projector\.linear_2", "vision_language_adapter.w_out"),
    (r"\.attention\.([qkvo])_proj", r".attention.w\1"),
)
_DENSE: Renamings = (
    (r"\.(?:mlp|feed_forward)\.gate_proj", ".feed_forward.w1"),
    (r"\.(?:mlp|feed_forward)\.down_proj", ".feed_forward.w2"),
    (r"\.(?:mlp|feed_forward)\.up_proj", ".feed_forward.w3"),
)
_EXPERTS: Renamings = (
    (r"\.mlp\.((?:experts\.\d+|shared_experts)\.)gate_proj", r".\1w1"),
    (r"\.mlp\.((?:experts\.\d+|shared_experts)\.)down_proj", r".\1w2"),
    (r"\.mlp\.((?:experts\.\d+|shared_experts)\.)up_proj", r".\1w3"),
    (r"\.mlp\.gate", ".gate"),
)
#: What turns the names that transformers saves into those that are published, as its conversion scripts and tables
#: have it, where transformers itself does not write them.
PUBLISHED: dict[str, Renamings] = {
    "llama": (*_CONSOLIDATED, *_DENSE),
    "mistral": (*_CONSOLIDATED, *_DENSE),
    "ministral3": (*_CONSOLIDATED, *_DENSE),
    "mistral3": (*_CONSOLIDATED, *_DENSE),
    "mixtral": (*_CONSOLIDATED, (r"\.block_sparse_moe\.", ".feed_forward.")),
    "mistral4": (*_CONSOLIDATED, *_EXPERTS, *_DENSE),
    "mamba2": ((r"^backbone\.embeddings", "model.backbone.embedding"), (r"^backbone", "model.backbone")),
    "cosmos3_edge": (
        (r"^model\.language_model\.", ""),
        (r"\.self_attn\.([qkv])_proj", r".self_attn.to_\1"),
        (r"\.self_attn\.o_proj", ".self_attn.to_out"),
        (r"\.mlp\.fc1", ".mlp.up_proj"),
        (r"\.mlp\.fc2", ".mlp.down_proj"),
    ),
    "cosmos3_omni": (
        (r"^model\.language_model\.", ""),
        (r"\.self_attn\.([qkv])_proj", r".self_attn.to_\1"),
        (r"\.self_attn\.o_proj", ".self_attn.to_out"),
    ),
    "kimi_k25": ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head")),
    "qianfan_ocr": ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head")),
}


def renamed(name: str, renamings: Renamings) -> str:
    for old, new in renamings:
        name = re.sub(old, new, name)
    return name


def twin_of(kind: str, *, original: bool) -> Twin:
    return build_twin(CONFIG_MAPPING[kind](**GIVEN.get(kind, {})), original=original, **SMALL.get(kind, {}))


def write(folder: Path, state: State, config: Mapping[str, Any] | None, file: str = "model.safetensors") -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def edited(source: Path, layers: int, hidden: int, *options: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint after the writers of all layers were edited."""
    directions = write_directions(source.parent / "d.safetensors", layers=layers, hidden=hidden)
    out = source.with_name(f"{source.name} edited")
    checked(source, out, "-d", directions, "--source-layer", 1, "--components", "attention,mlp,embedding", *options)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def apart(state: State) -> dict[str, torch.Tensor]:
    """Returns the tensors with one for each expert."""
    parts = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
            parts[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            pieces = matrix.chunk(2) if leaf == "gate_up_proj" else (matrix,)
            for part, piece in zip(leaf.replace("_up_proj", "_proj up_proj").split(), pieces, strict=True):
                parts[f"{stem}.{number}.{part}.weight"] = piece
    return parts


@pytest.mark.parametrize(
    ("kind", "told_by"),
    [(kind, "config.json") for kind in PUBLISHED]
    + [(kind, "names") for kind, how in PUBLISHED.items() if how[: len(_CONSOLIDATED)] == _CONSOLIDATED],
)
def test_an_edit_under_the_published_names_gives_the_same_bytes(kind: str, told_by: str, tmp_path: Path) -> None:
    renamings = PUBLISHED[kind]
    twin = twin_of(kind, original=kind == "mixtral")
    config = json.loads(twin.network.config.to_json_string(use_diff=False))
    published = {renamed(name, renamings): tensor for name, tensor in apart(twin.state).items()}
    assert published.keys() != twin.state.keys()
    plain = edited(write(tmp_path / "plain", twin.state, config), twin.layers, twin.hidden)
    consolidated = "tok_embeddings.weight" in published
    file = "consolidated.safetensors" if consolidated else "model.safetensors"
    source = write(tmp_path / "published", published, config if told_by == "config.json" else None, file)
    if consolidated:
        (source / "params.json").write_text(json.dumps({"dim": twin.hidden, "n_layers": twin.layers}))
    after = edited(source, twin.layers, twin.hidden)
    changed = [name for name in plain if not torch.equal(plain[name], twin.state[name])]
    assert len(changed) > (1 if kind == "mamba2" else 2) * twin.layers
    expected = {renamed(name, renamings): tensor for name, tensor in apart(plain).items()}
    assert expected.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


def test_molmo_has_its_vocabulary_in_two_parts(tmp_path: Path) -> None:
    twin = twin_of("molmo2", original=False)
    published = dict(twin_of("molmo2", original=True).state)
    config = json.loads(twin.network.config.to_json_string(use_diff=False))
    vocabulary = twin.state["model.language_model.embed_tokens.weight"]
    published["model.transformer.wte.embedding"] = vocabulary[:100]
    published["model.transformer.wte.new_embedding"] = vocabulary[100:]
    # The length of a row is that over all tokens, so rows that are cut are not kept as whole ones are.
    columns = (twin.layers, twin.hidden, "--preserve", "columns")
    plain = edited(write(tmp_path / "plain", twin.state, config), *columns)
    after = edited(write(tmp_path / "published", published, config), *columns)
    parts = [after[f"model.transformer.wte.{part}"] for part in ("embedding", "new_embedding")]
    assert torch.equal(torch.cat(parts), plain["model.language_model.embed_tokens.weight"])
    for layer in range(twin.layers):
        for own, other in (("self_attn.o_proj", "self_attn.attn_out"), ("mlp.down_proj", "mlp.ff_out")):
            matrix = plain[f"model.language_model.layers.{layer}.{own}.weight"]
            assert torch.equal(after[f"model.transformer.blocks.{layer}.{other}.weight"], matrix)
            assert not torch.equal(twin.state[f"model.language_model.layers.{layer}.{own}.weight"], matrix)


def loaded(twin: Twin, state: State) -> dict[str, torch.Tensor]:
    """Returns the tensors as transformers holds them once it has read them."""
    network = type(twin.network).from_pretrained(
        None, config=copy.deepcopy(twin.network.config), state_dict=dict(state), dtype=torch.float32
    )
    return dict(network.state_dict())


#: Types that transformers reads in both of its forms.
BOTH = [kind for kind in PROVEN if kind not in FORMS or kind == "ernie4_5_vl_moe"]


@pytest.mark.parametrize("kind", BOTH)
def test_an_edit_in_both_forms_of_transformers_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = [twin_of(kind, original=original) for original in (True, False)]
        if both[0].state.keys() == both[1].state.keys():
            return
        results = []
        for number, twin in enumerate(both):
            config = json.loads(twin.network.config.to_json_string(use_diff=False))
            source = write(tmp_path / str(number), twin.state, config)
            results.append(loaded(twin, edited(source, twin.layers, twin.hidden)))
        one, other = results
        assert one.keys() == other.keys()
        assert [name for name, tensor in one.items() if not torch.equal(other[name], tensor)] == []


def quantised(state: State, scale: str, activation: str) -> State:
    """Returns a model with its linear layers in FP8 per tensor."""
    result = {}
    for name, tensor in state.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
            continue
        step = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        module = name.removesuffix("weight")
        result[name] = (tensor / step).to(torch.float8_e4m3fn)
        result |= {f"{module}{scale}": step, f"{module}{activation}": torch.ones(())}
    return result


def test_codes_of_consolidated_files_are_edited_and_dequantised_as_those_that_transformers_loads(
    tmp_path: Path,
) -> None:
    twin = twin_of("mistral", original=False)
    config = json.loads(twin.network.config.to_json_string(use_diff=False))
    loads = quantised(twin.state, "weight_scale_inv", "activation_scale")
    method = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    one = write(tmp_path / "one", loads, {**config, "quantization_config": method})
    published = quantised(twin.state, "qscale_weight", "qscale_act")
    named = {renamed(name, PUBLISHED["mistral"]): tensor for name, tensor in published.items()}
    other = write(tmp_path / "other", named, None, "consolidated.safetensors")
    params = {"dim": twin.hidden, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    (other / "params.json").write_text(json.dumps(params))
    directions = write_directions(tmp_path / "d.safetensors", layers=twin.layers, hidden=twin.hidden)
    for source in (one, other):
        out, plain = (tmp_path / f"{source.name}-{what}" for what in ("out", "plain"))
        checked(source, out, "-d", directions, "--source-layer", 1)
        checked("verify", source, out)
        checked("dequantise", source, plain)
        checked("verify", source, plain)
    for what in ("out", "plain"):
        expected = load_file(tmp_path / f"one-{what}" / "model.safetensors")
        found = load_file(tmp_path / f"other-{what}" / "consolidated.safetensors")
        assert len(expected) == len(found)
        for name, tensor in expected.items():
            spelt = name.replace("weight_scale_inv", "qscale_weight").replace("activation_scale", "qscale_act")
            same = found[renamed(spelt, PUBLISHED["mistral"])]
            assert same.dtype == tensor.dtype
            assert torch.equal(same.float(), tensor.float())
    assert found["layers.0.attention.wo.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "other-plain" / "params.json").read_text()) == {"dim": twin.hidden}
    said = checked(other, tmp_path / "part", "-d", directions, "--dequantise", "writers", code=1).stderr
    assert "its params.json cannot say that a part of its weights is quantised no longer" in " ".join(said.split())
    assert not (tmp_path / "part").exists()


def test_codes_of_consolidated_files_without_scales_are_refused(tmp_path: Path) -> None:
    twin = twin_of("mistral", original=False)
    published = quantised(twin.state, "qscale_weight", "qscale_act")
    named = {renamed(name, PUBLISHED["mistral"]): tensor for name, tensor in published.items()}
    del named["layers.0.attention.wo.qscale_weight"]
    source = write(tmp_path / "source", named, None, "consolidated.safetensors")
    directions = write_directions(tmp_path / "d.safetensors", layers=twin.layers, hidden=twin.hidden)
    said = " ".join(checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1).stderr.split())
    assert "layers.0.attention.wo.weight: expected the scales of FP8 codes in one of" in said
    assert "found none" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("told", [True, False])
def test_an_adapter_of_published_names_is_refused(told: bool, tmp_path: Path) -> None:
    twin = twin_of("mistral", original=False)
    published = {renamed(name, PUBLISHED["mistral"]): tensor for name, tensor in twin.state.items()}
    config = json.loads(twin.network.config.to_json_string(use_diff=False)) if told else None
    source = write(tmp_path / "source", published, config, "consolidated.safetensors")
    directions = write_directions(tmp_path / "d.safetensors", layers=twin.layers, hidden=twin.hidden)
    options = ("-d", directions, "--source-layer", 1)
    said = checked(source, tmp_path / "adapter", *options, "--adapter", code=1).stderr
    assert "attention.wo.weight is called as its makers publish it" in " ".join(said.split())
    checked(source, tmp_path / "out", *options)
    checked("verify", source, tmp_path / "out")
