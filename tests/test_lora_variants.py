"""The variants of LoRA that peft makes: merged, the logits are those of peft's own loading, or why not is said."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from command_line import checked
from raw_checkpoints import decode, snapshot, tensor_bytes
from safetensors.torch import load_file, save_file
from test_amendments import assert_computes, assert_the_rest_stays, checked_merge, logits_of
from tiny_models import TINY_MODELS, VOCAB, save_tiny_model, train_at_random

IDS = torch.arange(24)[None] % VOCAB
LINEAR = ["q_proj", "o_proj", "down_proj"]
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


@pytest.fixture(autouse=True)
def one_thread():
    """The last bits of a decomposition of peft's, and so of what is left of a base, depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(tiny, folder, settings, *, rows=None, load=None, dtype=None):
    """Saves a base and an adapter of it, every trained value moved."""
    if not (folder / "base").exists():
        save_tiny_model(tiny, folder / "base")
    if dtype is not None:
        file = folder / "base" / "model.safetensors"
        save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (load or tiny.load)(folder / "base")
        model = model if dtype is None else model.to(dtype)
        if rows is not None:
            torch.manual_seed(0)
            model.resize_token_embeddings(rows)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
        train_at_random(model, 0.1, added=True)
        model.save_pretrained(folder / "adapter")


def loaded(tiny, folder, *, rows=None, load=None):
    """Returns the logits that peft computes with the saved adapter on the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (load or tiny.load)(folder / "base")
        if rows is not None:
            torch.manual_seed(0)
            model.resize_token_embeddings(rows)
        model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    return logits_of(model, IDS)


def change_config(adapter, **keys):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


BOTH = ["q_proj", "embed_tokens", "lm_head"]
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}
VARIANTS = {
    "DoRA on Conv1D": ("gpt2", {**CONV1D, "use_dora": True}),
    "DoRA on the embedding": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}),
    "DoRA on a tied embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "DoRA on both, tied": ("qwen2", {"target_modules": BOTH, "use_dora": True}),
    "DoRA kept tied": ("qwen2", {"target_modules": BOTH[:2], "use_dora": True, "ensure_weight_tying": True}),
    "PiSSA": ("llama", {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "PiSSA with patterns": ("llama", {"target_modules": LINEAR, "init_lora_weights": "pissa", **PATTERNS}),
    "PiSSA with DoRA": ("llama", {"target_modules": LINEAR, "init_lora_weights": "pissa", "use_dora": True}),
    "PiSSA on Conv1D": ("gpt2", {**CONV1D, "init_lora_weights": "pissa"}),
    "PiSSA on Conv1D with DoRA": ("gpt2", {**CONV1D, "init_lora_weights": "pissa", "use_dora": True}),
    "PiSSA beside an embedding": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "init_lora_weights": "pissa"}),
    "PiSSA on the head": ("llama", {"target_modules": [*LINEAR, "lm_head"], "init_lora_weights": "pissa"}),
    "PiSSA on a tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}),
    "PiSSA on both, tied": ("qwen2", {"target_modules": BOTH, "init_lora_weights": "pissa"}),
    "OLoRA": ("llama", {"target_modules": LINEAR, "init_lora_weights": "OLoRA"}),
    "OLoRA on square Conv1D": ("gpt2", {**CONV1D, "target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}),
    "OLoRA on a tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "olora"}),
    "MiCA": ("llama", {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "VeLoRA": ("llama", {"target_modules": LINEAR, "velora_config": peft.tuners.lora.config.VeloraConfig()}),
    "MonteCLoRA": (
        "llama",
        {"target_modules": LINEAR, "monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    ),
    "QALoRA on plain weights": ("llama", {"target_modules": LINEAR, "use_qalora": True, "qalora_group_size": 8}),
    "all but some": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "some layers": ("llama", {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "every bias": ("llama", {"target_modules": LINEAR, "bias": "all"}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_is_what_peft_loads(tmp_path, case):
    name, settings = VARIANTS[case]
    tiny = TINY_MODELS[name]
    trained(tiny, tmp_path, settings)
    expected = loaded(tiny, tmp_path)
    assert (expected - logits_of(tiny.load(tmp_path / "base"), IDS)).abs().max() > 0.1 * expected.abs().max()
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=IDS)
    assert_the_rest_stays(tmp_path)
    checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "again", "--jobs", "1", "--memory", "8MB")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
@pytest.mark.parametrize("rows", [VOCAB + 3, VOCAB - 4])
def test_a_variant_with_a_vocabulary_of_another_size(tmp_path, settings, rows):
    tiny = TINY_MODELS["llama"]
    trained(tiny, tmp_path, {"target_modules": BOTH, **settings}, rows=rows)
    expected = loaded(tiny, tmp_path, rows=rows)
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=IDS)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_is_left_of_a_base_in_bfloat16_is_rounded_to_it(tmp_path, start):
    """As peft rounds it, before the training begins: the update is of what was left, not of the exact difference."""
    tiny = TINY_MODELS["llama"]
    trained(tiny, tmp_path, {"target_modules": LINEAR, "init_lora_weights": start}, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny.load(tmp_path / "base").bfloat16(), tmp_path / "adapter")
    checked_merge(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    module = model.get_base_model().get_submodule(name)
    left = module.base_layer.weight.detach().double()
    up, down = (getattr(module, which)["default"].weight.detach().double() for which in ("lora_B", "lora_A"))
    wanted = (left + 6 / 4 * up @ down).bfloat16()
    found = decode(tensor_bytes(tmp_path / "out")[f"{name}.weight"], "BF16", wanted.shape)
    # Where the float32 of peft meets a tie, what is left may be rounded the other way.
    assert np.mean(found != wanted.double().numpy()) < 0.01
    record = next(
        each for each in json.loads((tmp_path / "out" / "merge.json").read_text())["tensors"] if name in each["name"]
    )
    before = decode(tensor_bytes(tmp_path / "base")[f"{name}.weight"], "BF16", wanted.shape)
    assert record["taken"] == start
    assert record["change"] == pytest.approx(np.linalg.norm(found - before) / np.linalg.norm(before), rel=1e-2)


def test_a_converted_adapter_is_a_plain_one(tmp_path):
    tiny = TINY_MODELS["llama"]
    trained(tiny, tmp_path, {"target_modules": LINEAR, "init_lora_weights": "pissa"})
    expected = loaded(tiny, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tiny.load(tmp_path / "base"),
            peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights="pissa"),
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = "pissa"
        peft.set_peft_model_state_dict(model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=IDS)


# ------------------------------------------------------------------------------------ refusals

REFUSED = {
    "random start": ({"init_lora_weights": "pissa_niter_4"}, "by a random method; save the adapter again where"),
    "start of data": ({"init_lora_weights": "corda"}, "by means that only the training had; save the adapter again"),
    "start of gradients": ({"init_lora_weights": "lora_ga"}, "with path_initial_model_for_weight_conversion"),
    "codes": ({"init_lora_weights": "loftq"}, "merge into that, with init_lora_weights true"),
    "no start": ({"init_lora_weights": "PiSSA"}, "by means that only the training had"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "no weights hold it; load it with peft beside the base"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "or merge it into a checkpoint that stores every copy"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "chooses among adapters for every token"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal factors are not merged here; merge it with peft itself"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA is not merged here; merge it with peft itself"),
    "Megatron": ({"megatron_config": {"a": 1}}, "are not those of a checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_variant_that_is_not_merged_says_why_and_what_to_do(tmp_path, case):
    keys, said = REFUSED[case]
    trained(TINY_MODELS["llama"], tmp_path, {"target_modules": ["q_proj"]})
    change_config(tmp_path / "adapter", **keys)
    shown = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert said in shown
    assert "another model" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_what_no_scale_applies_to_takes_none(tmp_path, settings):
    trained(TINY_MODELS["llama"], tmp_path, {"target_modules": ["q_proj"], **settings})
    words = ("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--scale", "0.5")
    assert "leave --scale out" in " ".join(checked(*words, code=1).output.split())


def test_groups_of_inputs_are_refused(tmp_path):
    trained(TINY_MODELS["llama"], tmp_path, {"target_modules": ["q_proj"], "use_qalora": True, "qalora_group_size": 8})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    pooled = {name: values[:, :4] if "lora_A" in name else values for name, values in load_file(file).items()}
    save_file({name: values.contiguous() for name, values in pooled.items()}, file)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert "as QALoRA trains on GPTQ codes, which not even peft merges; load it with peft beside the base" in said


def test_what_is_left_of_a_tied_embedding_must_be_there(tmp_path):
    trained(TINY_MODELS["qwen2"], tmp_path, {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(file).items() if "base_layer" not in name}, file)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert "pissa took a part out of the token embedding" in said
    assert "save it again with save_embedding_layers=True" in said


def test_a_column_without_a_direction_is_refused(tmp_path):
    """What DoRA cannot rescale is named, before anything keeps its name."""
    trained(TINY_MODELS["gpt2"], tmp_path, {**CONV1D, "use_dora": True})
    file = tmp_path / "base" / "model.safetensors"
    tensors, adapter = load_file(file), tmp_path / "adapter" / "adapter_model.safetensors"
    tensors["transformer.h.0.attn.c_proj.weight"][:, 5] = 0
    save_file(tensors, file, {"format": "pt"})
    factors = load_file(adapter)
    factors["base_model.model.transformer.h.0.attn.c_proj.lora_B.weight"][5] = 0
    save_file(factors, adapter)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert "transformer.h.0.attn.c_proj.weight: column 5 is zero with the adapter added" in said
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ heads


def question_answering(folder):
    """Loads a base with the head that names the span of an answer."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    stem = architecture.partition("For")[0].removesuffix("LMHeadModel")
    return getattr(transformers, f"{stem}ForQuestionAnswering").from_pretrained(folder)


def spans(model):
    with torch.no_grad():
        output = model.double().eval()(input_ids=IDS)
    return torch.stack([output.start_logits, output.end_logits])


def roberta(folder):
    """Saves an encoder without a head for answers."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder / "base")


SPANS = {"gpt2": CONV1D, "opt": {}, "mistral": {}, "gpt-neox": {"target_modules": ["query_key_value"]}, "roberta": {}}


@pytest.mark.parametrize("task", ["QUESTION_ANS", None])
@pytest.mark.parametrize("name", SPANS)
def test_a_head_that_names_the_span_of_an_answer(tmp_path, name, task):
    """Without a task, the configuration names the class that was trained."""
    if name == "roberta":
        roberta(tmp_path)
    settings = {"target_modules": ["query" if name == "roberta" else "q_proj"], "modules_to_save": ["qa_outputs"]}
    tiny = TINY_MODELS.get(name)
    trained(tiny, tmp_path, settings | SPANS[name] | {"task_type": task}, load=question_answering)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = question_answering(tmp_path / "base")
        expected = spans(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    checked_merge(tmp_path)
    assert_the_rest_stays(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = question_answering(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__]
    assert (spans(merged) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_class_that_loads_nothing_of_the_base_is_refused(tmp_path):
    trained(
        TINY_MODELS["llama"],
        tmp_path,
        {"target_modules": ["q_proj"], "task_type": "QUESTION_ANS"},
        load=question_answering,
    )
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert (
        "LlamaForQuestionAnswering calls model.layers.0.self_attn.q_proj transformer.layers.0.self_attn.q_proj" in said
    )
    assert "train the adapter on a base that LlamaForQuestionAnswering has saved" in said
    # The way out works.
    question_answering(tmp_path / "base").save_pretrained(tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "plain")
    (tmp_path / "saved").rename(tmp_path / "base")
    trained(
        TINY_MODELS["llama"],
        tmp_path,
        {"target_modules": ["q_proj"], "task_type": "QUESTION_ANS"},
        load=question_answering,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = question_answering(tmp_path / "base")
        expected = spans(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    checked_merge(tmp_path)
    assert (spans(question_answering(tmp_path / "out")) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_weight_of_another_layer_is_no_head(tmp_path):
    trained(TINY_MODELS["llama"], tmp_path, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    lost = "base_model.model.model.layers.7.mlp.gate.weight"
    save_file(load_file(file) | {lost: torch.zeros(3, 32)}, file)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert f"{lost} matches no weight of" in said


# ------------------------------------------------------------------------------------ encoders, alone and with decoders

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
ENCODERS = {
    # What saved the base, what was trained, and the class of that.
    "Bert": ("Bert", "Model", "ForSequenceClassification", {**SIZES, "max_position_embeddings": 64}, "query"),
    "Roberta": ("Roberta", "Model", "ForSequenceClassification", {**SIZES, "max_position_embeddings": 64}, "query"),
    "XLM": ("XLMRoberta", "Model", "ForTokenClassification", {**SIZES, "max_position_embeddings": 64}, "value"),
    "DistilBert": (
        "DistilBert", "Model", "ForSequenceClassification", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
        "q_lin",
    ),
    "T5": ("T5", "ForConditionalGeneration", "ForConditionalGeneration", T5, "wo"),
    "Bart": ("Bart", "ForConditionalGeneration", "ForConditionalGeneration", BART, "fc2"),
}  # fmt: skip


def encoder(name, folder):
    """Saves a base without the prefix of a classifier, and returns what loads it as what is trained."""
    import transformers

    stem, saved, trained_as, sizes, _ = ENCODERS[name]
    config = getattr(transformers, f"{stem}Config")(vocab_size=VOCAB, **sizes)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(transformers, f"{stem}{saved}")(config).save_pretrained(folder / "base")
    return getattr(transformers, f"{stem}{trained_as}").from_pretrained


def logits_of_encoder(model):
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.double().eval()(input_ids=IDS, **more).logits


@pytest.mark.parametrize("name", ENCODERS)
def test_a_base_may_lack_the_prefix_of_its_classifier(tmp_path, name):
    load = encoder(name, tmp_path)
    task = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}.get(ENCODERS[name][2])
    settings = {"target_modules": [ENCODERS[name][4]], "task_type": task or "SEQ_2_SEQ_LM"}
    trained(None, tmp_path, settings, load=load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits_of_encoder(peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter"))
        checked_merge(tmp_path)
        found = logits_of_encoder(load(tmp_path / "out"))
        before = logits_of_encoder(load(tmp_path / "base"))
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


SHARED = {
    "T5, embedding": ("T5", {"modules_to_save": ["shared"]}),
    "Bart, embedding": ("Bart", {"modules_to_save": ["shared"]}),
    "Bart, head": ("Bart", {"target_modules": ["fc2", "lm_head"]}),
    "T5, head": ("T5", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_several_weights_are_tied_to_is_not_changed_apart(tmp_path, case):
    name, settings = SHARED[case]
    load = encoder(name, tmp_path)
    trained(None, tmp_path, {"target_modules": [ENCODERS[name][4]], **settings}, load=load)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert "other weights of" in said
    assert "are tied; peft trained it apart from them" in said
    assert "load it with peft beside the base instead" in said


def test_a_shared_embedding_that_was_saved_and_not_trained_changes_nothing(tmp_path):
    load = encoder("T5", tmp_path)
    trained(None, tmp_path, {"target_modules": ["wo"], "modules_to_save": ["shared"]}, load=load)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    base = load_file(tmp_path / "base" / "model.safetensors")
    save_file(load_file(weights) | {"base_model.model.shared.weight": base["shared.weight"].clone()}, weights)
    checked_merge(tmp_path)
    receipt = assert_the_rest_stays(tmp_path)
    assert "amendments" not in receipt
    assert all(".wo." in record["name"] for record in receipt["tensors"])


# ------------------------------------------------------------------------------------ other methods of peft


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_of_tokens_alone(tmp_path, name):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 7])
        model = peft.get_peft_model(tiny.load(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5)
        model.save_pretrained(tmp_path / "adapter")
        expected = logits_of(peft.PeftModel.from_pretrained(tiny.load(base), tmp_path / "adapter"), IDS)
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=IDS)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "XLORA"])
def test_what_not_even_peft_merges_is_to_be_loaded_beside_the_base(tmp_path, kind):
    trained(TINY_MODELS["llama"], tmp_path, {"target_modules": ["q_proj"]})
    change_config(tmp_path / "adapter", peft_type=kind)
    said = " ".join(checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", code=1).output.split())
    assert f"found {kind}; load it with peft beside the base instead" in said


def test_a_layout_that_only_the_configuration_claims_is_not_taken(tmp_path):
    """A square weight: peft sets fan_in_fan_out back where the module is linear."""
    trained(TINY_MODELS["llama"], tmp_path, {"target_modules": ["q_proj"]})
    change_config(tmp_path / "adapter", fan_in_fan_out=True)
    expected = loaded(TINY_MODELS["llama"], tmp_path)
    checked_merge(tmp_path)
    assert_computes(tmp_path, expected, ids=IDS)
