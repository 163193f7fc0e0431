"""Reading adapters: what is plain LoRA is read, everything else is refused by name."""

import json

import numpy as np
import pytest
import torch
from raw_checkpoints import write_llama
from safetensors.torch import save_file

from ablate_shards.errors import AdapterError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.merge.adapter import read_adapter

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = {f"{MODULE}.lora_A.weight": torch.ones(4, 8), f"{MODULE}.lora_B.weight": torch.ones(6, 4)}


def write(folder, tensors=PLAIN, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_plain_adapter_is_read(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"))
    (update,) = adapter.updates
    assert (update.module, update.kind, update.depth, update.bias) == (
        "model.layers.0.self_attn.q_proj",
        "linear",
        0,
        None,
    )
    assert adapter.shape(update.down) == (4, 8)
    assert np.array_equal(adapter.read(update.up), PLAIN[f"{MODULE}.lora_B.weight"])
    assert adapter.read(update.up, 5, 3).shape == (3,)
    half = {name: values.bfloat16() for name, values in PLAIN.items()}
    narrow = read_adapter(write(tmp_path / "b", half)).read(update.up)
    assert narrow.dtype == np.float32
    assert np.array_equal(narrow, half[update.up].float())
    assert adapter.scaling(update.module) == (4, 2.0)
    assert adapter.base is None


def test_ranks_and_alphas_follow_the_first_pattern_that_matches(tmp_path):
    patterns = {
        "rank_pattern": {"q_proj": 16, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {r"^model\.layers\.1\..*": 3},
    }
    adapter = read_adapter(write(tmp_path / "a", use_rslora=True, **patterns))
    assert adapter.scaling("model.layers.1.self_attn.q_proj") == (16, 3 / 4)
    assert adapter.scaling("model.layers.1.self_attn.k_proj") == (4, 3 / 2)
    assert adapter.scaling("model.layers.2.self_attn.my_q_proj") == (4, 8 / 2)
    broken = read_adapter(write(tmp_path / "b", rank_pattern={"(": 2}))
    with pytest.raises(AdapterError, match="not a regular expression"):
        broken.scaling("q_proj")


def test_the_digest_covers_configuration_and_weights(tmp_path):
    first = read_adapter(write(tmp_path / "a")).sha256
    assert read_adapter(write(tmp_path / "b")).sha256 == first
    assert read_adapter(write(tmp_path / "b", lora_alpha=9)).sha256 != first
    moved = {name: value * 2 for name, value in PLAIN.items()}
    assert read_adapter(write(tmp_path / "b", moved)).sha256 != first


@pytest.mark.parametrize("kind", ["LOKR", "LOHA", "IA3", "PROMPT_TUNING", "ADALORA", None])
def test_other_methods_are_refused_by_name(tmp_path, kind):
    with pytest.raises(AdapterError, match=f"found {kind}"):
        read_adapter(write(tmp_path / "a", peft_type=kind))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("use_dora", True, "because use_dora is set, lora_magnitude_vector"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("layer_replication", [[0, 2], [1, 3]], "layers are used several times"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("kasa_config", {"rank": 1}, "KaSA"),
        ("trainable_token_indices", [-1], "trainable_token_indices"),
        ("trainable_token_indices", {"embed_tokens": "3"}, "trainable_token_indices"),
        ("something_new", {"on": 1}, "something_new is set to"),
        ("init_lora_weights", "pissa_niter_4", "what it starts with, found by a random method"),
        ("init_lora_weights", "loftq", "puts codes in the base's place"),
        ("init_lora_weights", ["olora"], "init_lora_weights: expected"),
        ("r", 0, "expected a positive integer, found 0"),
        ("r", True, "expected a positive integer, found true"),
        ("lora_alpha", "16", 'expected a finite number, found "16"'),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern: q_proj: expected a positive integer, found -1"),
        ("alpha_pattern", [1], "alpha_pattern: expected finite numbers by pattern"),
        ("alpha_pattern", {"v": 1, "q": 10**400}, "alpha_pattern: q: expected a finite number, found 1000"),
        ("bias", "some", "expected one of none, all, lora_only"),
        ("target_parameters", "down_proj", "expected a list of names"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, key, value, said):
    with pytest.raises(AdapterError, match=said):
        read_adapter(write(tmp_path / "a", **{key: value}))


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_settings_that_are_not_set_are_ignored(tmp_path, value):
    assert read_adapter(write(tmp_path / "a", something_new=value, use_dora=False)).updates


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{MODULE}.lora_magnitude_vector", "lora_magnitude_vector cannot be merged"),
        (f"{MODULE}.lora_diag", "lora_diag cannot be merged"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "a row for each token"),
        (f"{MODULE}.lora_A.bias", "bias of A"),
        ("base_model.model.lm_head.lora_A.weight", "found no lora_B"),
        ("base_model.model.model.embed_tokens.lora_embedding_B", "found no lora_A"),
    ],
)
def test_tensors_that_are_not_plain_lora_are_refused_by_name(tmp_path, name, said):
    with pytest.raises(AdapterError, match=said):
        read_adapter(write(tmp_path / "a", PLAIN | {name: torch.ones(4, 4)}))


def test_tensors_that_cannot_be_used_are_refused(tmp_path):
    down = f"{MODULE}.lora_A.weight"
    for value, said in (
        (torch.ones(4, 8, dtype=torch.int64), "expected BF16, F16, F32 or F64, found I64; save the adapter in one"),
        (torch.ones(32), "expected 2 dimensions"),
        (torch.ones(0, 8), "expected 2 dimensions"),
    ):
        with pytest.raises(AdapterError, match=said):
            read_adapter(write(tmp_path / "a", PLAIN | {down: value}))
    with pytest.raises(AdapterError, match="holds no LoRA tensors"):
        read_adapter(write(tmp_path / "a", {}))


def test_a_folder_that_is_no_adapter_is_explained(tmp_path):
    with pytest.raises(AdapterError, match="expected a folder"):
        read_adapter(tmp_path / "none")
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors$"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(AdapterError, match="in one file of safetensors"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match="expected a JSON object, found list"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="not a valid safetensors file"):
        read_adapter(folder)


def test_the_digest_of_a_base_sees_values_and_not_files(tmp_path):
    whole = write_llama(tmp_path / "whole", shards=1)
    apart = write_llama(tmp_path / "apart", shards=3)
    other = write_llama(tmp_path / "other", shards=1, seed=1)
    assert base_digest(open_checkpoint(whole)) == base_digest(open_checkpoint(apart))
    assert base_digest(open_checkpoint(whole)) != base_digest(open_checkpoint(other))
    path = whole / "model-00001-of-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert base_digest(open_checkpoint(whole)) != base_digest(open_checkpoint(apart))
