"""Adapters as they are found: spelled, stored and wrapped in other ways, they merge alike or say what they are."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from command_line import checked
from raw_checkpoints import tensor_bytes
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model

ROOT = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter of it whose numbers bfloat16 holds, and what merging gives."""
    folder = tmp_path_factory.mktemp("made")
    tiny = TINY_MODELS["llama"]
    base = save_tiny_model(tiny, folder / "base")
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    adapter = save_tiny_adapter(tiny, base, folder / "adapter", **settings)
    tensors = load_file(adapter / WEIGHTS)
    kept = {name: values if "base_layer" in name else values.bfloat16().float() for name, values in tensors.items()}
    save_file(kept, adapter / WEIGHTS)
    checked("merge", base, adapter, folder / "merged")
    assert tensor_bytes(folder / "merged") != tensor_bytes(base)
    return folder


def found(made, tmp_path, change=lambda tensors: tensors, **config):
    """Returns a changed copy of the adapter."""
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "adapter", adapter)
    tensors = {name: values.contiguous() for name, values in change(load_file(adapter / WEIGHTS)).items()}
    save_file(tensors, adapter / WEIGHTS)
    settings = json.loads((adapter / "adapter_config.json").read_text()) | config
    (adapter / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v != "left out"}))
    return adapter


def renamed(rename):
    return lambda tensors: {rename(name): values for name, values in tensors.items()}


def under(prefix):
    return renamed(lambda name: name.replace(ROOT, f"{ROOT}{prefix}", 1))


def cast(dtype):
    """In which the copy of the base that peft saves along stays what it is, as far as the dtype holds it."""
    return lambda tensors: {name: values.to(dtype) for name, values in tensors.items()}


SPELLED = {
    "without peft's prefix": renamed(lambda name: name.removeprefix(ROOT)),
    "with it twice": under(ROOT),
    "with the adapter's name": renamed(
        lambda name: name.replace("lora_A.weight", "lora_A.mine.weight").replace("lora_B.weight", "lora_B.mine.weight")
    ),
    "as loralib": renamed(lambda name: name.removesuffix(".weight") if ".lora_" in name else name),
    "as Tinker": renamed(lambda name: name.replace(".self_attn.", ".attn.")),
    "in float64": cast(torch.float64),
    "in bfloat16": cast(torch.bfloat16),
    **{
        f"under {prefix}": under(prefix)
        for prefix in ("pretrained_model.", "actor.", "policy.", "student.", "llm.", "language_model.", "model.")
    },
    **{f"wrapped in {prefix}": under(prefix) for prefix in ("module.module.", "_forward_module.module.", "_orig_mod.")},
}


@pytest.mark.parametrize("case", SPELLED)
def test_the_same_adapter_in_another_spelling_merges_alike(made, tmp_path, case):
    adapter = found(made, tmp_path, SPELLED[case])
    checked("merge", made / "base", adapter, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(made / "merged")
    checked("verify", made / "base", tmp_path / "out", "--adapter", adapter)


CONFIGS = {
    "an older peft": dict.fromkeys(("peft_version", "use_rslora", "rank_pattern", "alpha_pattern", "bias"), "left out"),
    "the oldest peft": {"enable_lora": None, "merge_weights": True},
    "a newer peft, nothing set": {"new_key": None, "another": False, "third": [], "fourth": {}},
    "another base by name": {"base_model_name_or_path": "org/other", "revision": "0123abc"},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_configuration_says_besides_changes_nothing(made, tmp_path, case):
    adapter = found(made, tmp_path, **CONFIGS[case])
    checked("merge", made / "base", adapter, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(made / "merged")


def test_metadata_changes_nothing(made, tmp_path):
    adapter = found(made, tmp_path)
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"format": "pt", "é": "x" * 999, "": ""})
    checked("merge", made / "base", adapter, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(made / "merged")


# ------------------------------------------------------------------------------------ what is no adapter of peft

DOWN = f"{ROOT}model.layers.0.mlp.down_proj"


def without(name):
    return lambda tensors: {each: values for each, values in tensors.items() if each != name}


def empty(tensors):
    return tensors | {f"{DOWN}.lora_A.weight": torch.zeros(0, 72), f"{DOWN}.lora_B.weight": torch.zeros(32, 0)}


def as_kohya(name):
    return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def as_a_model(tensors):
    return {f"{ROOT}model.norm.weight": torch.ones(32), f"{ROOT}model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}


REFUSED = {
    "a whole model": (
        as_a_model,
        {"modules_to_save": None},
        "if a trainer saved the model in the place of its adapter",
    ),
    "one factor": (without(f"{DOWN}.lora_B.weight"), {}, "expected both lora_A and lora_B, found no lora_B"),
    "in pieces": (empty, {}, "save it again with all of them gathered, as stage3_gather_16bit_weights_on_model_save"),
    "names of kohya": (renamed(as_kohya), {}, "rename the tensors, lora_down to lora_A and lora_up to lora_B"),
    "integers": (lambda tensors: tensors | {f"{DOWN}.lora_A.weight": torch.ones(4, 72).int()}, {}, "found I32; save"),
    "newer than this": (dict, {"new_key": {"a": 1}}, "new_key is set to {'a': 1}, which this version does not know"),
    "another method": (dict, {"peft_type": "IA3"}, "expected a LORA adapter, found IA3; merge it with peft itself"),
    "a value head": (
        lambda tensors: tensors | {f"{ROOT}v_head.summary.weight": torch.ones(1, 32)},
        {"modules_to_save": ["norm", "v_head"]},
        "v_head.summary.weight is of a value head, which scores answers while a model is trained",
    ),
    "no rank": (dict, {"r": 0}, "r: expected a positive integer, found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_an_adapter_is_said(made, tmp_path, case):
    change, config, expected = REFUSED[case]
    adapter = found(made, tmp_path, change, **config)
    said = " ".join(checked("merge", made / "base", adapter, tmp_path / "out", code=1).output.split())
    assert expected in said
    assert not (tmp_path / "out").exists()


SAID = {
    "fewer targets": ({"target_modules": ["q_proj", "embed_tokens"]}, "does not target (2, such as"),
    "an expression": ({"target_modules": r"(.*\.)?(q_proj|embed_tokens)"}, "does not target (2, such as"),
    "excluded": ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "does not target (1, such as"),
    "one layer": ({"layers_to_transform": [1]}, "does not target (2, such as"),
    "not saved": ({"modules_to_save": ["norm", "lm_head"]}, "modules_to_save names lm_head, of which"),
    "as it is": ({}, None),
    "all of them": ({"target_modules": "all-linear"}, None),
    "all by an expression": ({"target_modules": r".*(q_proj|down_proj|embed_tokens)"}, None),
    "all by their layers": ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, None),
}


@pytest.mark.parametrize("case", SAID)
def test_where_a_configuration_and_its_weights_differ_it_is_said(made, tmp_path, case):
    config, expected = SAID[case]
    adapter = found(made, tmp_path, **config)
    said = " ".join(checked("merge", made / "base", adapter, tmp_path / "out").output.split())
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(made / "merged")
    assert expected in said if expected else "target" not in said and "modules_to_save" not in said


def shard(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00002.safetensors")


def pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shard, "but adapter_model-00001-of-00002.safetensors; save it again with a current peft, in one file"),
        (pickle, "but adapter_model.bin; save it again with a current peft, in one file of safetensors"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "name the folder that peft saved it in"),
    ],
)
def test_weights_of_another_form_are_named(made, tmp_path, change, expected):
    adapter = found(made, tmp_path)
    change(adapter)
    said = " ".join(checked("merge", made / "base", adapter, tmp_path / "out", code=1).output.split())
    assert expected in said


def test_what_is_no_folder_says_what_to_name(made, tmp_path):
    def said(adapter):
        return " ".join(checked("merge", made / "base", adapter, tmp_path / "out", code=1).output.split())

    assert "found a file; name the folder that it is in" in said(made / "adapter" / WEIGHTS)
    assert "fetch it with `hf download org/adapter --local-dir FOLDER`" in said("org/adapter")
    assert said(tmp_path / "nowhere").endswith("found none")


# ------------------------------------------------------------------------------------ bases

BASES = ("pretrained_model.", "actor.", "policy.", "student.", "llm.", "module.", "model.")


@pytest.mark.parametrize("prefix", BASES)
def test_a_base_that_a_trainer_wrapped_is_merged_under_its_names(made, tmp_path, prefix):
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    tensors = load_file(base / "model.safetensors")
    save_file({f"{prefix}{name}": values for name, values in tensors.items()}, base / "model.safetensors")
    checked("merge", base, made / "adapter", tmp_path / "out")
    expected = {f"{prefix}{name}": raw for name, raw in tensor_bytes(made / "merged").items()}
    assert tensor_bytes(tmp_path / "out") == expected


def test_a_model_that_was_saved_with_its_adapter_inside_is_refused(made, tmp_path):
    import peft

    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(TINY_MODELS["llama"].load(base), made / "adapter")
    tensors = {name: values.contiguous() for name, values in model.get_base_model().state_dict().items()}
    save_file(tensors, base / "model.safetensors")
    for words in (("inspect", base), ("merge", base, made / "adapter", tmp_path / "out"), ("diff", base, base)):
        said = " ".join(checked(*words, code=1).output.split())
        assert "model.safetensors is of a model saved with it inside; load it as it was saved" in said
        assert "merge_and_unload()" in said


def test_a_head_in_a_shard_of_its_own_is_merged(made, tmp_path):
    base, tiny = tmp_path / "base", TINY_MODELS["llama"]
    shutil.copytree(made / "base", base)
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=4, target_modules=["lm_head", "q_proj"])
    checked("merge", base, adapter, tmp_path / "whole")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards = [{name for name in tensors if name != "lm_head.weight"}, {"lm_head.weight"}]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checked("merge", base, adapter, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "whole")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_tinker_calls_otherwise_is_the_head(tmp_path, tied):
    tiny = dataclasses.replace(
        TINY_MODELS["llama"], settings=TINY_MODELS["llama"].settings | {"tie_word_embeddings": tied}
    )
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=4, target_modules=["lm_head"])
    checked("merge", base, adapter, tmp_path / "expected")
    tensors = load_file(adapter / WEIGHTS)
    renamed_tensors = {name.replace("lm_head.", "model.unembed_tokens."): values for name, values in tensors.items()}
    assert renamed_tensors.keys() != tensors.keys()
    save_file(renamed_tensors, adapter / WEIGHTS)
    checked("merge", base, adapter, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "expected")


def test_inspect_shows_what_an_adapter_would_change(made, tmp_path):
    adapter = found(made, tmp_path, trainable_token_indices=None, rank_pattern={}, base_model_name_or_path="org/model")
    said = " ".join(checked("inspect", adapter).output.split())
    for expected in (
        "0 mlp.down_proj, self_attn.q_proj linear 4 2",
        "embed_tokens embedding 4 2",
        "norm",
        "of org/model",
    ):
        assert expected in said
    assert "replaced as a whole: model.layers.0.input_layernorm.weight, model.layers.0" in said
    shown = json.loads(checked("inspect", adapter, "--json").output)
    assert "model.norm.weight" in shown["replaced"]
    assert {(each["rank"], each["scale"]) for each in shown["modules"]} == {(4, 2.0)}
    assert len(shown["modules"]) == 5
    said = " ".join(checked("inspect", adapter / WEIGHTS, code=1).output.split())
    assert "holds the weights of an adapter, not a model; name its folder" in said
    (adapter / "model.safetensors").write_bytes((made / "base" / "model.safetensors").read_bytes())
    assert "transformers adds its adapter" in checked("inspect", adapter, code=1).output
