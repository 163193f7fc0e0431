"""Checkpoints as they are found: what a loader computes from a folder decides, not only what its shards hold."""

import json
import shlex
import shutil
import warnings

import peft
import pytest
import torch
from command_line import checked
from raw_checkpoints import llama_tensors, snapshot, tensor_bytes, write_directions, write_llama, write_shard
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model

from ablate_shards.data.demo import MODEL

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
    words = ("dequantise", adapted, tmp_path / "out")
    assert "holds an adapter, not a model" in checked(*words, code=1).output
    assert "an adapter: 2 updates" in checked("inspect", adapted).output
    (adapted / "adapter_model.safetensors").rename(adapted / "adapters.safetensors")
    assert "holds an adapter, not a model" in checked(*words, code=1).output


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
    settings = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    adapter = save_tiny_adapter(TINY_MODELS["qwen2"], base, tmp_path / "adapter", **settings)
    once, both = tmp_path / "once", tmp_path / "both"
    checked("merge", base, adapter, once)
    store_head(base)
    assert "stored as lm_head.weight too" in checked("merge", base, adapter, both).output
    after = load_file(both / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(logits(both, "qwen2"), logits(once, "qwen2"))
    checked("verify", base, both, "--adapter", adapter)


def test_a_stored_head_that_is_trained_by_itself_is_a_parameter_of_its_own(tmp_path):
    base = save_tiny_model(TINY_MODELS["qwen2"], tmp_path / "base")
    store_head(base)
    adapter = save_tiny_adapter(TINY_MODELS["qwen2"], base, tmp_path / "adapter", r=4, target_modules=["lm_head"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(TINY_MODELS["qwen2"].load(base), adapter)
        expected = model(input_ids=TOKENS).logits
    said = " ".join(checked("merge", base, adapter, tmp_path / "out").output.split())
    assert "config.json is given tie_word_embeddings false" in said
    torch.testing.assert_close(logits(tmp_path / "out", "qwen2"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(base, "qwen2")).abs().max() > 0.1


# ------------------------------------------------------------------------------------------- sets of files


def as_mistral_names_it(tensors):
    """Renames the tensors of a Llama checkpoint as those of a consolidated one."""
    names = {
        "model.": "",
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.down_proj": "feed_forward.w2",
        "self_attn.": "attention.",
        "mlp.": "feed_forward.",
    }
    renamed = {}
    for name, values in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = values
    return renamed


def write_consolidated(folder, *, sharded):
    """Writes what Mistral publishes beside the weights for transformers."""
    tensors = as_mistral_names_it(llama_tensors())
    if not sharded:
        write_shard(folder / "consolidated.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"consolidated-{number:05d}-of-00002.safetensors"
        write_shard(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_consolidated_weights_and_their_index_are_a_set_of_their_own(tmp_path, sharded, indexed):
    base = write_llama(tmp_path / "base", shards=1)
    if not indexed:
        (base / "model.safetensors.index.json").unlink()
    directions = write_directions(tmp_path / "d.safetensors")
    checked("ablate", base, tmp_path / "alone", "-d", directions, "--source-layer", 1)
    write_consolidated(base, sharded=sharded)
    checked("ablate", base, tmp_path / "out", "-d", directions, "--source-layer", 1)
    kept, alone = snapshot(tmp_path / "out"), snapshot(tmp_path / "alone")
    assert {name for name in kept if name.startswith("consolidated")} == set()
    shard = "model-00001-of-00001.safetensors"
    assert kept.keys() == alone.keys()
    assert kept[shard] == alone[shard]
    checked("verify", base, tmp_path / "out")


NUMBERED = {
    "from 1": ("model-{:05d}-of-00012.safetensors", range(1, 13)),
    "from 0": ("model-{:05d}-of-00012.safetensors", range(12)),
    "without zeros in front": ("model-{}-of-12.safetensors", range(1, 13)),
    "a count of six digits": ("model-{:05d}-of-000012.safetensors", range(1, 13)),
    "after the ending": ("model.safetensors-{:05d}-of-00012.safetensors", range(1, 13)),
}


@pytest.mark.parametrize("missing", [None, 4, 11])
@pytest.mark.parametrize("case", NUMBERED)
def test_numbers_of_shards_tell_that_one_is_missing_where_there_is_no_index(tmp_path, case, missing):
    pattern, numbers = NUMBERED[case]
    tensors = llama_tensors()
    for place, number in enumerate(numbers):
        if place != missing:
            write_shard(tmp_path / pattern.format(number), dict(list(tensors.items())[place::12]))
    said = checked("inspect", tmp_path, code=0 if missing is None else 1).output
    if missing is not None:
        lacks = pattern.format(numbers[missing])
        assert f"{lacks}: missing, although {pattern.format(numbers[0])} is here" in " ".join(said.split())


@pytest.mark.parametrize("sharded", [False, True])
def test_consolidated_weights_alone_are_the_weights(tmp_path, sharded):
    base = tmp_path / "base"
    base.mkdir()
    write_consolidated(base, sharded=sharded)
    directions = write_directions(tmp_path / "d.safetensors")
    checked("ablate", base, tmp_path / "out", "-d", directions, "--source-layer", 1)
    llama = write_llama(tmp_path / "llama", shards=1)
    checked("ablate", llama, tmp_path / "other", "-d", directions, "--source-layer", 1)
    assert tensor_bytes(tmp_path / "out") == as_mistral_names_it(tensor_bytes(tmp_path / "other"))


def test_an_index_of_shards_that_are_not_here_is_what_is_out_of_place(tmp_path):
    base = write_llama(tmp_path / "base", shards=1)
    (base / "model-00001-of-00001.safetensors").rename(base / "model.safetensors")
    said = " ".join(checked("inspect", base, code=1).output.split())
    assert "nothing of what it names is here, but model.safetensors is; remove the index" in said
    (base / "model.safetensors.index.json").unlink()
    checked("inspect", base)


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "model.ema-2.safetensors", "diffusion_pytorch_model.safetensors"]
)
def test_the_same_weights_in_another_dtype_stay_behind(tmp_path, name):
    """Loaders take model.safetensors, unless they are told of a variant."""
    base = write_llama(tmp_path / "base", shards=1)
    (base / "model.safetensors.index.json").unlink()
    (base / "model-00001-of-00001.safetensors").rename(base / "model.safetensors")
    directions = write_directions(tmp_path / "d.safetensors")
    checked("ablate", base, tmp_path / "alone", "-d", directions, "--source-layer", 1)
    shutil.copy(base / "model.safetensors", base / name)
    assert "a variant of the weights, unedited" in " ".join(checked("inspect", base).output.split())
    checked("ablate", base, tmp_path / "out", "-d", directions, "--source-layer", 1)
    assert not (tmp_path / "out" / name).exists()
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "alone")
    checked("verify", base, tmp_path / "out")


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_a_decoder_that_is_described_by_itself_is_known(tmp_path, key):
    base = write_llama(tmp_path / "base", dtype="F32")
    directions = write_directions(tmp_path / "d.safetensors")
    checked("ablate", base, tmp_path / "alone", "-d", directions, "--source-layer", 1)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({"model_type": "my_chat", key: config, "vision_config": {"hidden_size": 8}})
    )
    checked("ablate", base, tmp_path / "out", "-d", directions, "--source-layer", 1)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "alone")


# ------------------------------------------------------------------------------------------- names of wrappers

WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "activation checkpoints": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('.self_attn.', '._fsdp_wrapped_module.self_attn.')}",
    "DataParallel": lambda name: f"module.{name}",
    "DataParallel of a compiled one": lambda name: f"module._orig_mod.{name}",
}


def renamed(file, wrap):
    tensors = load_file(file)
    save_file({wrap(name): values for name, values in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_in_a_base_are_no_part_of_its_own(tmp_path, wrapper):
    base = save_tiny_model(TINY_MODELS["gemma2"], tmp_path / "base")
    directions = write_directions(tmp_path / "d.safetensors", layers=2)
    options = ("-d", directions, "--source-layer", 1, "--components", "attention,mlp,embedding")
    adapter = save_tiny_adapter(TINY_MODELS["gemma2"], base, tmp_path / "adapter", r=2, target_modules=["down_proj"])
    checked("ablate", base, tmp_path / "ablated", *options)
    checked("merge", base, adapter, tmp_path / "merged")
    wrap = WRAPPERS[wrapper]
    renamed(base / "model.safetensors", wrap)
    checked("ablate", base, tmp_path / "ablated as it is", *options)
    checked("verify", base, tmp_path / "ablated as it is")
    checked("merge", base, adapter, tmp_path / "merged as it is")
    for name in ("ablated", "merged"):
        plain = tensor_bytes(tmp_path / name)
        assert {wrap(tensor): raw for tensor, raw in plain.items()} == tensor_bytes(tmp_path / f"{name} as it is")
    assert "names hold those of a wrapper" in checked("inspect", base).output


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    ],
)
def test_names_of_wrappers_in_an_adapter_are_no_part_of_its_own(tmp_path, wrap):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    adapter = save_tiny_adapter(TINY_MODELS["llama"], base, tmp_path / "adapter", r=2, target_modules=["down_proj"])
    checked("merge", base, adapter, tmp_path / "plain")
    renamed(adapter / "adapter_model.safetensors", wrap)
    checked("merge", base, adapter, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "plain")


def test_two_adapters_in_one_file_are_refused(tmp_path):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    adapter = save_tiny_adapter(TINY_MODELS["llama"], base, tmp_path / "adapter", r=2, target_modules=["down_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    more = {name.replace(".weight", ".other.weight"): values.clone() for name, values in tensors.items()}
    save_file(tensors | more, file)
    said = checked("merge", base, adapter, tmp_path / "out", code=1).output
    assert "are of the same module; save one adapter to a folder, with peft" in " ".join(said.split())


# ------------------------------------------------------------------------------------------- multimodal models


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mistral", "model.", "model.text_model."),
        ("mistral", "model.", "text_model.model."),
        ("qwen3", "model.", "text_model."),
        ("gemma2", "model.", "model.text_model."),
        ("opt", "model.", "language_model.model."),
    ],
)
def test_a_decoder_is_found_where_a_multimodal_model_keeps_it(tmp_path, name, old, new):
    base = save_tiny_model(TINY_MODELS[name], tmp_path / "base")
    directions = write_directions(tmp_path / "d.safetensors", layers=2)
    options = ("-d", directions, "--source-layer", 1, "--components", "attention,mlp,embedding")
    adapter = save_tiny_adapter(TINY_MODELS[name], base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    checked("ablate", base, tmp_path / "ablated", *options)
    checked("merge", base, adapter, tmp_path / "merged")

    def moved(tensor):
        return new + tensor.removeprefix(old) if tensor.startswith(old) else tensor

    renamed(base / "model.safetensors", moved)
    config = json.loads((base / "config.json").read_text())
    outer = {"model_type": "of-many", "text_config": config} | (
        {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    )
    (base / "config.json").write_text(json.dumps(outer))
    checked("ablate", base, tmp_path / "ablated elsewhere", *options)
    checked("merge", base, adapter, tmp_path / "merged elsewhere")
    for result in ("ablated", "merged"):
        plain = tensor_bytes(tmp_path / result)
        assert {moved(tensor): raw for tensor, raw in plain.items()} == tensor_bytes(tmp_path / f"{result} elsewhere")


# ------------------------------------------------------------------------------------------- the wrong folder


def test_the_folder_that_is_meant_is_named(tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot_folder = cache / "snapshots" / "0a1b2c"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0a1b2c")
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    (cache / "blobs").mkdir()
    snapshot_folder.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot_folder / file.name).symlink_to(f"../../blobs/{number}")
    said = " ".join(checked("inspect", cache, code=1).output.split())
    assert "no safetensors weights here, but in snapshots/0a1b2c; name that folder" in said
    checked("inspect", snapshot_folder)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"positive": "a", "negative": "b"}\n')
    said = checked("capture", cache, tmp_path / "dump.safetensors", "--pairs", pairs, code=1).output
    assert "found none, but in snapshots/0a1b2c; name that folder" in " ".join(said.split())

    adapter = save_tiny_adapter(
        TINY_MODELS["llama"], base, tmp_path / "run" / "checkpoint-5", r=2, target_modules=["q_proj"]
    )
    said = " ".join(checked("merge", base, tmp_path / "run", tmp_path / "out", code=1).output.split())
    assert "holds no adapter_config.json, but in checkpoint-5; name that folder" in said
    checked("merge", base, adapter, tmp_path / "out")
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-9")
    said = " ".join(checked("merge", base, tmp_path / "run", tmp_path / "other", code=1).output.split())
    assert "but in checkpoint-5, checkpoint-9; name one" in said


def test_commands_that_are_printed_can_be_pasted(tmp_path):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "my base")
    adapter = save_tiny_adapter(TINY_MODELS["llama"], base, tmp_path / "it's mine", r=2, target_modules=["q_proj"])
    said = checked("merge", base, adapter, tmp_path / "my out").output
    command = said.partition("check it with: ")[2]
    checked(*shlex.split(command)[1:])
    directions = write_directions(tmp_path / "d.safetensors", layers=2)
    said = checked("ablate", base, tmp_path / "my other", "-d", directions, "--source-layer", 1).output
    checked(*shlex.split(said.partition("check it with: ")[2])[1:])


@pytest.mark.parametrize(("dtype", "called"), [(torch.float64, "F64"), (torch.float8_e5m2, "F8_E5M2")])
def test_plain_numbers_are_not_called_quantised(tmp_path, dtype, called):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    file = base / "model.safetensors"
    save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file, {"format": "pt"})
    directions = write_directions(tmp_path / "d.safetensors", layers=2)
    said = checked("ablate", base, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1).output
    assert f"found {called}; convert the checkpoint to one of them first" in " ".join(said.split())


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_chat_template_of_a_processor_is_used(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"positive": "good", "negative": "bad"}\n{"positive": "warm", "negative": "cold"}\n')
    checked("capture", folder, tmp_path / "before.safetensors", "--pairs", pairs)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    file = folder / "chat_template.jinja"
    template = file.read_text() if file.is_file() else config.pop("chat_template")
    file.unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    said = checked("capture", folder, tmp_path / "none.safetensors", "--pairs", pairs, code=1).output
    assert "has no chat template" in " ".join(said.split())
    (folder / name).write_text(json.dumps({"chat_template": template}))
    checked("capture", folder, tmp_path / "after.safetensors", "--pairs", pairs)
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[each], after[each]) for each in before)


# ------------------------------------------------------------------------------------------- adapters of MLX


def as_mlx(adapter, folder, **config):
    """Writes an adapter of peft as mlx-lm saves it: its factors are those of ``x @ lora_a @ lora_b``."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    given = {"rank": settings["r"], "scale": settings["lora_alpha"] / settings["r"], "dropout": 0.0}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": given, "num_layers": 16, **config})
    )
    names = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    tensors = {}
    for name, values in load_file(adapter / "adapter_model.safetensors").items():
        end = next((end for end in names if name.endswith(end)), None)
        if end is None:  # the head of the base, which peft saves along
            continue
        tensors[name.removeprefix("base_model.model.").removesuffix(end) + names[end]] = values.T.contiguous()
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def test_an_adapter_of_mlx_gives_what_the_same_of_peft_does(tmp_path):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    modules = ["q_proj", "k_proj", "o_proj", "down_proj", "lm_head"]
    adapter = save_tiny_adapter(
        TINY_MODELS["llama"], base, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=modules
    )
    mlx = as_mlx(adapter, tmp_path / "mlx")
    checked("merge", base, adapter, tmp_path / "by peft")
    checked("merge", base, mlx, tmp_path / "by mlx")
    expected, found = tensor_bytes(tmp_path / "by peft"), tensor_bytes(tmp_path / "by mlx")
    assert found == expected
    assert found != tensor_bytes(base)
    assert "to the bit" in checked("verify", base, tmp_path / "by mlx", "--adapter", mlx).output


@pytest.mark.parametrize(
    "config", [{"fine_tune_type": "dora"}, {"fine_tune_type": "full"}, {"lora_parameters": {"rank": 4}}]
)
def test_other_adapters_of_mlx_are_refused(tmp_path, config):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    adapter = save_tiny_adapter(TINY_MODELS["llama"], base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    mlx = as_mlx(adapter, tmp_path / "mlx", **config)
    assert "fuse it with `mlx_lm.fuse`" in checked("merge", base, mlx, tmp_path / "out", code=1).output
