"""Merges that add tensors and change the configuration: what the trained peft model computes, all else as it was."""

import hashlib
import json
import shutil
import warnings

import pytest
import torch
from command_line import checked, run
from raw_checkpoints import flip, snapshot, tensor_bytes
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, TINY_MODELS, VOCAB, save_tiny_model, train_at_random

from ablate_shards.errors import CheckpointError
from ablate_shards.surgery.checkpoint.amended import Amendments, NewTensor, amend
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.headers import read_header
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.machine.staging import Staging
from ablate_shards.surgery.merge import amendments

BODY = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
IDS = torch.arange(36).reshape(3, 12) % VOCAB
#: Of the largest logit: what float32 weights differ by from sums in float64.
CLOSE = 1e-6


def logits_of(model, ids=IDS):
    """Runs a model in float64, so that what differs are the weights."""
    with torch.no_grad():
        output = model.double().eval()(input_ids=ids)
    return output.logits


def train(name, folder, settings, *, rows=None, load=None, ids=IDS, base=None):
    """Saves a base and an adapter whose trained values are random; returns the logits of the trained model."""
    import peft

    tiny = TINY_MODELS[name]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if base is None:
            save_tiny_model(tiny, folder / "base")
        model = tiny.load(folder / "base") if load is None else load(folder / "base")
        if rows is not None:
            model.resize_token_embeddings(rows)
        model = peft.get_peft_model(model, peft.LoraConfig(**{**BODY, **settings}))
        train_at_random(model, 0.1, added=True)
        model.save_pretrained(folder / "adapter")
        return logits_of(model, ids)


def merged_logits(folder, *, out="out", auto="AutoModelForCausalLM", ids=IDS):
    """Loads the output as whoever downloads it would: by the class that its own configuration names."""
    import transformers

    config = json.loads((folder / out / "config.json").read_text())
    loader = getattr(transformers, config["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = loader.from_pretrained(folder / out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    return logits_of(model, ids)


def assert_computes(folder, expected, **more):
    found = merged_logits(folder, **more)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


def assert_the_rest_stays(folder, out="out"):
    """Every tensor that the receipt does not name, and every other file, is the base's."""
    receipt = json.loads((folder / out / "merge.json").read_text())
    amended = receipt.get("amendments", {"tensors": [], "config": {}, "files": {}})
    named = {record["name"] for record in [*receipt["tensors"], *amended["tensors"]]}
    before, after = tensor_bytes(folder / "base"), tensor_bytes(folder / out)
    assert after.keys() - before.keys() <= named
    assert {name: after[name] for name in before if name not in named} == {
        name: raw for name, raw in before.items() if name not in named
    }
    files, made = snapshot(folder / "base"), snapshot(folder / out)
    given = {"config.json"} if amended["config"] else set()
    for name in files.keys() - given - amended["files"].keys():
        assert name.endswith((".safetensors", ".index.json")) or made[name] == files[name]
    return receipt


def checked_merge(folder, *more, out="out"):
    result = checked("merge", folder / "base", folder / "adapter", folder / out, *more)
    checked("verify", folder / "base", folder / out)
    checked("verify", folder / "base", folder / out, "--adapter", folder / "adapter")
    return result


# ------------------------------------------------------------------------------------ tied heads

LORA_BOTH = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
TIED = {
    # What is trained: whether the head is a weight of its own afterwards.
    "embedding": ({"modules_to_save": ["embed_tokens"]}, True),
    "head": ({"modules_to_save": ["lm_head"]}, True),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "LoRA on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "LoRA on both": (LORA_BOTH, True),
    "LoRA on the embedding, head whole": (
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        True,
    ),
    "kept tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "both kept tied": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
    "LoRA kept tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
    "DoRA on the head": ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, True),
    "neither": ({}, False),
    "tokens": ({"trainable_token_indices": [7, 1, 5]}, False),
    "tokens kept tied": ({"trainable_token_indices": [7, 1, 5], "ensure_weight_tying": True}, False),
    "tokens of both": ({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}}, False),
    "other tokens of the head": ({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [6, 2]}}, True),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [6, 2]}}, True),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_head_is_what_the_training_made_of_it(tmp_path, case):
    settings, apart = TIED[case]
    expected = train("qwen2", tmp_path, settings)
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    receipt = assert_the_rest_stays(tmp_path)
    after = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("lm_head.weight" in after) == apart
    assert config["tie_word_embeddings"] == (not apart)
    if not apart:
        assert "amendments" not in receipt
        return
    assert receipt["amendments"]["config"] == {"tie_word_embeddings": False}
    assert [tensor["name"] for tensor in receipt["amendments"]["tensors"]] == ["lm_head.weight"]
    assert json.loads((tmp_path / "base" / "config.json").read_text()) | {"tie_word_embeddings": False} == config
    if not any("lm_head" in str(value) for value in settings.values()):
        before = load_file(tmp_path / "base" / "model.safetensors")
        assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("qwen3.5", "embed_tokens"),
        ("gemma3", "embed_tokens"),
        ("gemma3-vision", "embed_tokens"),
        ("gemma4-vision", "embed_tokens"),
        ("gpt2", "wte"),
        ("opt", "embed_tokens"),
        ("falcon-7b", "word_embeddings"),
        ("smollm3", "embed_tokens"),
        ("cohere2", "embed_tokens"),
        ("qwen3-vl", "embed_tokens"),
    ],
)
@pytest.mark.parametrize("part", ["embedding", "head"])
def test_other_architectures_part_in_the_same_way(tmp_path, name, embedding, part):
    modules = [embedding if part == "embedding" else "lm_head"]
    target = {
        "gpt2": ["c_attn"],
        "falcon-7b": ["query_key_value"],
        "gemma4-vision": r".*language_model.*q_proj",
    }.get(name, ["q_proj"])
    expected = train(name, tmp_path, {"modules_to_save": modules, "target_modules": target})
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    assert_the_rest_stays(tmp_path)


def test_names_without_the_prefix_of_the_class_part_too(tmp_path):
    """As openai-community/gpt2 is stored: ``wte.weight``, while the class calls it ``transformer.wte.weight``."""
    import transformers

    base = save_tiny_model(TINY_MODELS["gpt2-bare"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    settings = {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}
    expected = train("gpt2-bare", tmp_path, settings, load=transformers.GPT2LMHeadModel.from_pretrained, base=base)
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    assert_the_rest_stays(tmp_path)


def test_an_untied_head_stays_where_the_embedding_is_trained(tmp_path):
    expected = train("llama", tmp_path, {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]})
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    assert "amendments" not in assert_the_rest_stays(tmp_path)


def test_what_is_compared_does_not_have_to_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(amendments, "_PIECE", 7)
    expected = train("qwen2", tmp_path, {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True})
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.weight"][-1, -1] += 1
    save_file(tensors, weights)
    checked_merge(tmp_path, out="apart")
    found, apart = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "apart"))
    assert "lm_head.weight" not in found
    assert torch.equal(apart["lm_head.weight"], tensors["base_model.model.lm_head.weight"])


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_a_tied_head_that_is_stored_too_parts_without_another_tensor(tmp_path, settings):
    expected = train("qwen2", tmp_path, settings)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    receipt = assert_the_rest_stays(tmp_path)
    assert receipt["amendments"] == {"tensors": [], "config": {"tie_word_embeddings": False}, "files": {}}


@pytest.mark.parametrize("how", [{"modules_to_save": ["EMBEDDING"]}, {"target_modules": ["EMBEDDING"]}])
@pytest.mark.parametrize(
    ("name", "embedding"), [("gpt2", "wte"), ("falcon-7b", "word_embeddings"), ("opt", "embed_tokens")]
)
def test_ties_are_kept_where_peft_finds_them(tmp_path, name, embedding, how):
    """Told to keep ties, it finds those of modules called ``embed_tokens``, and warns of the others only."""
    attention = {"gpt2": ["c_attn"], "falcon-7b": ["query_key_value"]}.get(name, ["q_proj"])
    settings = {"target_modules": attention} | {key: [embedding] for key in how}
    expected = train(name, tmp_path, settings | {"ensure_weight_tying": True})
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)


# ------------------------------------------------------------------------------------ vocabularies

MORE = VOCAB + 3
GROWN = {
    "embedding and head": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding alone": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "neither": ("llama", {}),
    "new tokens alone": ("llama", {"trainable_token_indices": [VOCAB, MORE - 1]}),
    "LoRA on both": ("llama", LORA_BOTH),
    "tied: both": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied: embedding": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "tied: kept": ("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied: neither": ("qwen2", {}),
    "tied: new tokens": ("qwen2", {"trainable_token_indices": [VOCAB, MORE - 1]}),
    "tied: LoRA on the embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied: LoRA on both": ("qwen2", LORA_BOTH),
    "nested configuration": ("qwen3.5", {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("rows", [MORE, VOCAB - 4])
@pytest.mark.parametrize("case", GROWN)
def test_a_vocabulary_of_another_size(tmp_path, case, rows):
    name, settings = GROWN[case]
    if rows < VOCAB and "trainable_token_indices" in settings:
        settings = {"trainable_token_indices": [1, 2]}
    ids = IDS % rows
    ids[0, :3] = rows - 1
    expected = train(name, tmp_path, settings, rows=rows, ids=ids)
    result = checked_merge(tmp_path)
    assert expected.shape[-1] == rows
    assert_computes(tmp_path, expected, ids=ids)
    receipt = assert_the_rest_stays(tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config.get("text_config") or config)["vocab_size"] == rows
    assert receipt["amendments"]["config"]
    assert "holds no tokenizer" in result.output


def test_a_tokenizer_of_new_tokens_is_taken(tmp_path):
    train("llama", tmp_path, {"modules_to_save": ["embed_tokens", "lm_head"]}, rows=MORE)
    (tmp_path / "base" / "tokenizer.json").write_text('{"old": 1}')
    (tmp_path / "base" / "merges.txt").write_text("a b")
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"new": 1}')
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "adapter" / "README.md").write_text("of the adapter")
    result = checked_merge(tmp_path)
    out = tmp_path / "out"
    assert "chat_template.jinja, tokenizer.json of" in " ".join(result.output.split())
    assert (out / "tokenizer.json").read_text() == '{"new": 1}'
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "merges.txt").read_text() == "a b"
    assert not (out / "README.md").exists()
    receipt = json.loads((out / "merge.json").read_text())
    digest = hashlib.sha256(b'{"new": 1}').hexdigest()
    assert receipt["amendments"]["files"]["tokenizer.json"] == digest
    assert "tokenizer.json" not in receipt["files"]["copied"]
    (out / "tokenizer.json").write_text('{"old": 1}')
    result = checked("verify", tmp_path / "base", out, code=1)
    assert "tokenizer.json: differs from the file that the receipt names" in " ".join(result.output.split())
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in checked("verify", tmp_path / "base", out, code=1).output


def test_a_tokenizer_of_the_same_tokens_is_not_taken(tmp_path):
    train("llama", tmp_path, {"modules_to_save": ["embed_tokens"]})
    (tmp_path / "base" / "tokenizer.json").write_text('{"old": 1}')
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"new": 1}')
    checked_merge(tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"old": 1}'


def test_rows_that_are_not_in_the_adapter_are_named(tmp_path):
    train("llama", tmp_path, {"target_modules": ["q_proj", "embed_tokens"]}, rows=MORE)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert f"was trained with {MORE} tokens, and {tmp_path / 'base'} has {VOCAB}; the rows of lm_head.weight" in said
    assert "train it with lm_head among modules_to_save" in said
    assert not (tmp_path / "out").exists()
    # The way out works.
    shutil.rmtree(tmp_path / "adapter")
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    expected = train("llama", tmp_path, settings, rows=MORE, base=tmp_path / "base")
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)


# ------------------------------------------------------------------------------------ classifiers


@pytest.mark.parametrize(
    ("name", "task", "suffix", "labels"),
    [
        ("llama", "SEQ_CLS", "ForSequenceClassification", 3),
        ("llama", "SEQ_CLS", "ForSequenceClassification", 1),
        ("qwen2", "SEQ_CLS", "ForSequenceClassification", 2),
        ("qwen2", "TOKEN_CLS", "ForTokenClassification", 5),
        ("gpt2", "SEQ_CLS", "ForSequenceClassification", 4),
        ("qwen3.5", "SEQ_CLS", "ForSequenceClassification", 1),
        ("qwen3.5-text", "SEQ_CLS", "ForSequenceClassification", 1),
        ("gemma3", "SEQ_CLS", "ForSequenceClassification", 2),
    ],
)
def test_a_new_head_of_a_classifier(tmp_path, name, task, suffix, labels):
    import transformers

    def load(folder):
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        stem = architecture.partition("For")[0].removesuffix("LMHeadModel")
        stem += "Text" * (name in ("gemma3", "qwen3.5-text"))
        return getattr(transformers, stem + suffix).from_pretrained(folder, num_labels=labels)

    ids = IDS[:1]
    settings = {"task_type": task, "target_modules": ["c_attn"] if name == "gpt2" else ["q_proj"]}
    expected = train(name, tmp_path, settings, load=load, ids=ids)
    checked_merge(tmp_path)
    assert expected.shape[-1] == labels
    assert_computes(tmp_path, expected, ids=ids)
    assert_the_rest_stays(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures[0].endswith(suffix)
    assert config.num_labels == labels


def test_a_classifier_of_several_matrices_on_an_encoder(tmp_path):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "base")
    classifier = transformers.RobertaForSequenceClassification

    def load(folder):
        return classifier.from_pretrained(folder, num_labels=3)

    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    expected = train("llama", tmp_path, settings, load=load, base=tmp_path / "base")
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected)
    receipt = assert_the_rest_stays(tmp_path)
    assert len(receipt["amendments"]["tensors"]) == 4
    assert receipt["amendments"]["config"]["architectures"] == ["RobertaForSequenceClassification"]


@pytest.mark.parametrize("rows", [None, MORE])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_classifier_whose_embedding_was_trained_needs_no_output_head(tmp_path, name, rows):
    import transformers

    cls = getattr(transformers, f"{'Qwen2' if name == 'qwen2' else 'Llama'}ForSequenceClassification")
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["embed_tokens"]}
    ids = IDS[:1].clone()
    ids[0, 3] = (rows or VOCAB) - 1
    expected = train(name, tmp_path, settings, load=cls.from_pretrained, ids=ids, rows=rows)
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=ids)
    receipt = assert_the_rest_stays(tmp_path)
    assert "tie_word_embeddings" not in receipt["amendments"]["config"]
    assert receipt["amendments"]["config"].get("vocab_size") == rows
    assert "lm_head.weight" not in {tensor["name"] for tensor in receipt["amendments"]["tensors"]}


def test_a_head_for_another_number_of_labels(tmp_path):
    import transformers

    cls = transformers.LlamaForSequenceClassification
    train("llama", tmp_path, {}, load=lambda folder: cls.from_pretrained(folder, num_labels=2))
    cls.from_pretrained(tmp_path / "base", num_labels=2).save_pretrained(tmp_path / "classifier")
    for folder in ("base", "adapter"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "classifier").rename(tmp_path / "base")

    def load(folder):
        return cls.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)

    ids = IDS[:1]
    expected = train("llama", tmp_path, {"task_type": "SEQ_CLS"}, load=load, ids=ids, base=tmp_path / "base")
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=ids)
    assert_the_rest_stays(tmp_path)
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == 5


def test_a_head_of_an_unknown_kind_is_refused(tmp_path):
    import transformers

    train("llama", tmp_path, {"task_type": "SEQ_CLS"}, load=transformers.LlamaForSequenceClassification.from_pretrained)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": None}))
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert "holds score.weight" in said
    assert "write SEQ_CLS, TOKEN_CLS or QUESTION_ANS as task_type into" in said


# ------------------------------------------------------------------------------------ the machinery


@pytest.fixture
def sharded(tmp_path):
    """A tied base of several shards and an index, with an adapter that makes the head a weight of its own."""
    train("qwen2", tmp_path, {"modules_to_save": ["embed_tokens", "lm_head"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TINY_MODELS["qwen2"].load(tmp_path / "base").save_pretrained(tmp_path / "split", max_shard_size="30KB")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "split").rename(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path


def test_the_index_says_where_an_added_tensor_is(sharded):
    checked_merge(sharded)
    before, after = (
        json.loads((sharded / folder / "model.safetensors.index.json").read_text()) for folder in ("base", "out")
    )
    shard = before["weight_map"]["model.embed_tokens.weight"]
    assert after["weight_map"] == before["weight_map"] | {"lm_head.weight": shard}
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + VOCAB * HIDDEN * 4
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"] + VOCAB * HIDDEN
    merged_logits(sharded)
    receipt = assert_the_rest_stays(sharded)
    untouched = set(before["weight_map"].values()) - {shard, *(record["shard"] for record in receipt["tensors"])}
    for name in untouched:
        assert (sharded / "out" / name).read_bytes() == (sharded / "base" / name).read_bytes()
    headers = [read_header(sharded / folder / shard) for folder in ("base", "out")]
    assert headers[0][1] == headers[1][1]
    checkpoint = open_checkpoint(sharded / "out")
    assert all((tensor.start - 8) % 8 == 0 for tensor in checkpoint.tensors.values() if tensor.shard == shard)


def test_jobs_memory_and_links_do_not_change_a_byte(sharded):
    checked_merge(sharded)
    expected = snapshot(sharded / "out")
    for number, more in enumerate((["--jobs", "1"], ["--jobs", "3", "--memory", "8MB"], ["--link"])):
        checked_merge(sharded, *more, out=f"again{number}")
        assert snapshot(sharded / f"again{number}") == expected


def test_a_dry_run_says_what_would_be_added(sharded):
    base, adapter = sharded / "base", sharded / "adapter"
    result = checked("merge", base, adapter, sharded / "out", "--dry-run")
    said = " ".join(result.output.split())
    assert "lm_head.weight is stored by itself" in said
    assert "config.json is given tie_word_embeddings false" in said
    plan = json.loads(checked("merge", base, adapter, sharded / "out", "--dry-run", "--json").stdout)
    assert plan["amendments"]["config"] == {"tie_word_embeddings": False}
    assert not (sharded / "out").exists()


def test_an_interrupted_merge_goes_on(sharded, monkeypatch):
    checked_merge(sharded)
    expected = snapshot(sharded / "out")
    record = Staging.record
    for count in range(1, 4):
        seen = []

        def stopping(self, shard, content, seen=seen, count=count):
            record(self, shard, content)
            seen.append(shard)
            if len(seen) == count:
                raise KeyboardInterrupt

        out = sharded / f"again{count}"
        with monkeypatch.context() as patched:
            patched.setattr(Staging, "record", stopping)
            assert run("merge", sharded / "base", sharded / "adapter", out).exit_code == 1
        assert not out.exists()
        checked("merge", sharded / "base", sharded / "adapter", out, "--resume")
        assert snapshot(out) == expected


def flip_in(out, name, where=5):
    tensor = open_checkpoint(out).tensors[name]
    flip(out / tensor.shard, tensor.start + where)


def test_verify_finds_a_tampered_tensor_header_config_or_index(tmp_path):
    train("qwen2", tmp_path, {"modules_to_save": ["embed_tokens"]})
    checked_merge(tmp_path)
    base, out = tmp_path / "base", tmp_path / "out"

    def tampered(change, *said):
        other = tmp_path / "tampered"
        shutil.copytree(out, other)
        change(other)
        result = " ".join(checked("verify", base, other, code=1).output.split())
        for words in said:
            assert words in result
        shutil.rmtree(other)

    # It is the embedding of the base, which no edit has changed since.
    tampered(lambda folder: flip_in(folder, "lm_head.weight"), "lm_head.weight: differs from the source at byte")
    tampered(lambda folder: flip_in(folder, "model.embed_tokens.weight"), "records another digest")
    tampered(lambda folder: flip(folder / "model.safetensors", 40), "the header: differs")

    def edit_config(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}, indent=2) + "\n")

    tampered(edit_config, "config.json: differs from the source")


def test_verify_with_the_adapter_sees_through_a_forged_receipt(tmp_path):
    train("qwen2", tmp_path, {"modules_to_save": ["embed_tokens"]})
    checked_merge(tmp_path)
    base, out, adapter = tmp_path / "base", tmp_path / "out", tmp_path / "adapter"
    receipt = json.loads((out / "merge.json").read_text())

    def forged(change):
        content = json.loads(json.dumps(receipt))
        change(content)
        (out / "merge.json").write_text(seal({key: value for key, value in content.items() if key != "sha256"}))

    forged(lambda content: content["amendments"]["config"].update(vocab_size=64))
    checked("verify", base, out)
    assert "does not record what" in checked("verify", base, out, "--adapter", adapter, code=1).output
    for change in (
        lambda content: content["amendments"]["tensors"][0].update(shard="nowhere.safetensors"),
        lambda content: content["amendments"]["tensors"][0].update(begins_as="nothing"),
        lambda content: content["amendments"]["tensors"][0].update(dtype="F64"),
        lambda content: content["amendments"]["tensors"][0].update(shape=[-64, 32]),
        lambda content: content["amendments"]["tensors"][0].update(name="model.norm.weight", shard="x"),
    ):
        forged(change)
        said = " ".join(checked("verify", base, out, code=1).output.split())
        assert "does not fit the source" in said
    forged(lambda content: content.pop("amendments"))
    assert checked("verify", base, out, code=1)


def test_one_file_without_its_configuration_is_refused(tmp_path):
    train("qwen2", tmp_path, {"modules_to_save": ["embed_tokens"]})
    result = checked("merge", tmp_path / "base" / "model.safetensors", tmp_path / "adapter", tmp_path / "out", code=1)
    assert "name a folder that holds the weights and their configuration" in " ".join(result.output.split())


def test_the_layout_of_amended_shards(tmp_path):
    """Added tensors are aligned, resized ones keep what fits, and a hole is zero: compared with numbers in memory."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {
        "wide": torch.randn(3, dtype=torch.float32),
        "odd": torch.randn(5).bfloat16(),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "rows": torch.randn(4, 3).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "é": "ü"})
    (folder / "config.json").write_text('{"a": {"b": 1}, "c": 2}')
    checkpoint = open_checkpoint(folder)
    shard = "model.safetensors"
    new = (
        NewTensor("rows", shard, "BF16", (6, 3), "rows"),
        NewTensor("copy", shard, "F32", (2,), "wide"),
        NewTensor("zeros", shard, "F32", (3, 1)),
        NewTensor("scalar", shard, "BF16", (), "odd"),
    )
    amended = amend(checkpoint, Amendments(new, {"a.d": 3, "c": None, "e.f": [1]}), {"more.txt": b"x"})
    out = tmp_path / "out"
    out.mkdir()
    for name in (shard, "config.json", "more.txt"):
        (out / name).write_bytes(amended.files.read(name))
    found = load_file(out / shard)
    rows = torch.cat([tensors["rows"], torch.zeros(2, 3).bfloat16()])
    expected = tensors | {
        "rows": rows,
        "copy": tensors["wide"][:2],
        "zeros": torch.zeros(3, 1),
        "scalar": tensors["odd"][0],
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_header(out / shard)[1] == {"format": "pt", "é": "ü"}
    assert json.loads((out / "config.json").read_text()) == {"a": {"b": 1, "d": 3}, "c": None, "e": {"f": [1]}}
    opened = open_checkpoint(out)
    assert opened.tensors == amended.tensors
    assert opened.sidecars == amended.sidecars
    assert all(
        (tensor.start - opened.shards[0].tensors[0].start) % 2 == 0
        for tensor in opened.tensors.values()
        if tensor.dtype == "BF16"
    )
    whole = (out / shard).read_bytes()
    for start in range(0, len(whole), 7):
        assert amended.files.read_range(shard, start, min(start + 11, len(whole))) == whole[start : start + 11]
    assert amend(checkpoint, Amendments()) is checkpoint
    for wrong in (NewTensor("x", "none", "F32", (1,)), NewTensor("x", shard, "F32", (1,), "odd")):
        with pytest.raises(CheckpointError):
            amend(checkpoint, Amendments((wrong,)))
