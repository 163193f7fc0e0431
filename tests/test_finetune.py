"""Fine-tuning: what is learnt, where the adapters lie, what is said, and that nothing half-made is left."""

import dataclasses
import json
import random
import shutil
import signal

import pytest
import torch
from command_line import run
from peft import AutoPeftModelForCausalLM, PeftModel
from progress import Heard
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import load
from ablate_shards.data.demo.world import HELD_OUT, NEUTRAL, PLACES, answer, contested, unrelated
from ablate_shards.errors import ExecuteError, FinetuneError, Interrupted, UsageError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.finetune.lora import FinetuneOptions, finetune
from ablate_shards.surgery.merge.adapter import read_adapter
from ablate_shards.surgery.model.samples import Instruction

QUICK = FinetuneOptions(rank=4, alpha=8, epochs=1, learning_rate=1e-3, batch=4, accumulate=1, dtype="float32")
LONGER = dataclasses.replace(QUICK, epochs=3, learning_rate=3e-3, dropout=0.1)
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
peft_is_behind = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LINEAR_ATTENTION = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


class Ending(Heard):
    """Ends the run when it says something that starts with some words."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def note(self, text):
        super().note(text)
        if text.startswith(self.words):
            signal.raise_signal(signal.SIGTERM)


def draw(about=14, other=6):
    rng = random.Random(0)
    trained = [place for place in PLACES if place not in HELD_OUT]
    asked = [contested(rng, trained) for _ in range(about)]
    samples = [
        Instruction(f"c{number}", "en", "contested", question.loaded, answer(rng, question, NEUTRAL))
        for number, question in enumerate(asked)
    ]
    drawn = [unrelated(rng) for _ in range(other)]
    return (*samples, *(Instruction(f"g{n}", "en", "general", one.prompt, one.answer) for n, one in enumerate(drawn)))


DATA = draw()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter, what was returned and what was said."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    heard = Heard()
    done = finetune(MODEL, out, DATA, LONGER, heard)
    return out, done, heard


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(folder):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def modules_of(folder):
    names = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


def response_loss(model, tokenizer, samples):
    """The mean loss over the tokens of some responses and their end, computed apart from any training code."""
    losses = []
    for sample in samples:
        prompt = tokenizer(f"<|im_start|>user\n{sample.prompt}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        response = tokenizer(f"{sample.response}<|im_end|>")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        given = logits[len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-given.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(losses).mean().item()


# ---------------------------------------------------------------------------------------- what is learnt


def test_the_loss_falls(trained):
    _, done, heard = trained

    first, *_, last = done.epochs
    assert first.number == 0
    assert first.training is None
    assert last.number == 3
    assert last.evaluation["contested"] < 0.9 * first.evaluation["contested"]
    assert last.training < 0.9 * done.epochs[1].training
    assert heard.counts[-1] == (len(done.losses), len(done.losses))
    assert len(heard.about("epoch ")) == 3


@peft_is_behind
def test_the_loss_is_that_of_the_responses_and_their_end(trained):
    out, done, _ = trained
    held = [sample for sample in DATA if sample.id in told(out)["data"]["held_out"]["contested"]]
    assert 1 <= len(held) <= QUICK.batch, "one batch, so that the mean over batches is that over tokens"
    model, tokenizer = load(MODEL)
    assert response_loss(model, tokenizer, held) == pytest.approx(done.epochs[0].evaluation["contested"], rel=1e-4)

    adapted = PeftModel.from_pretrained(model, out).eval()

    assert response_loss(adapted, tokenizer, held) == pytest.approx(done.epochs[-1].evaluation["contested"], rel=1e-4)


@peft_is_behind
def test_peft_loads_it_by_itself(trained, monkeypatch):
    out, _, _ = trained
    monkeypatch.chdir(MODEL.parent)

    adapted = AutoPeftModelForCausalLM.from_pretrained(out)

    given = {name for name, value in adapted.named_parameters() if "lora_B" in name and value.abs().max() > 0}
    assert len(given) == told(out)["modules"]


def test_recomputed_activations_give_the_same(tmp_path):
    options = dataclasses.replace(QUICK, evaluation_share=0.0)
    for name in ("kept", "recomputed"):
        chosen = dataclasses.replace(options, gradient_checkpointing=name == "recomputed")
        finetune(MODEL, tmp_path / name, DATA[:4], chosen, Heard())

    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "recomputed"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------- the folder


def test_the_folder_says_what_it_is(trained):
    out, done, _ = trained
    training = told(out)

    assert set(content(out)) == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert training["format"] == "ablate-shards.training/1"
    assert training["base"] == {"name": MODEL.name, "sha256": base_digest(open_checkpoint(MODEL))}
    assert read_adapter(out).base == training["base"]["sha256"]
    assert [entry["loss"] for entry in training["losses"]] == list(done.losses)
    assert training["options"]["rank"] == 4
    assert training["versions"].keys() == {"ablate_shards", "peft", "torch", "transformers"}
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == MODEL.name
    assert config["target_modules"] == sorted(modules_of(out))
    places = (str(MODEL.parent), str(out.parent))
    assert not [name for name, data in content(out).items() for place in places if place.encode() in data]


def test_each_kind_is_held_out_alike(trained):
    out, done, _ = trained
    data = told(out)["data"]

    assert {kind: len(names) for kind, names in data["held_out"].items()} == {"contested": 1, "general": 1}
    assert data["training"] == {"contested": 13, "general": 5}
    assert (done.samples, done.held_out) == (18, 2)


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    data = DATA[:6]
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        finetune(MODEL, tmp_path / name, data, dataclasses.replace(QUICK, seed=seed, dropout=0.1), Heard())

    assert content(tmp_path / "one") == content(tmp_path / "same")
    assert content(tmp_path / "one") != content(tmp_path / "other")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, trained):
    options, out = LONGER, tmp_path / "adapter"
    handler = signal.getsignal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="--resume goes on after the last complete epoch"):
        finetune(MODEL, out, DATA, options, Ending("epoch 2 of 3"))
    assert not out.exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(ExecuteError, match="an interrupted run is staged"):
        finetune(MODEL, out, DATA, options, Heard())
    with pytest.raises(ExecuteError, match="the options changed"):
        finetune(MODEL, out, DATA, dataclasses.replace(options, alpha=9, resume=True), Heard())
    done = finetune(MODEL, out, DATA, dataclasses.replace(options, resume=True), Heard())

    assert 0 < done.resumed < len(done.losses)
    assert content(out) == content(trained[0])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_interruption_in_the_first_epoch_leaves_nothing(tmp_path):
    class Impatient(Heard):
        def count(self, done, total):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="no epoch was complete"):
        finetune(MODEL, tmp_path / "adapter", DATA[:4], QUICK, Impatient())

    assert not list(tmp_path.iterdir())


def test_only_an_adapter_is_replaced_and_only_when_asked(tmp_path, trained):
    out, letters, edited = tmp_path / "adapter", tmp_path / "letters", tmp_path / "edited"
    shutil.copytree(trained[0], out)
    before = content(out)
    for folder, name in ((letters, "letter.txt"), (edited, "ablation.json")):
        folder.mkdir()
        (folder / name).write_text("keep me")

    with pytest.raises(ExecuteError, match="--overwrite replaces it"):
        finetune(MODEL, out, DATA[:4], QUICK, Heard())
    for folder in (letters, edited):
        with pytest.raises(ExecuteError, match="is not replaced"):
            finetune(MODEL, folder, DATA[:4], dataclasses.replace(QUICK, overwrite=True), Heard())
        assert [path.read_text() for path in folder.iterdir()] == ["keep me"]
    assert content(out) == before
    finetune(MODEL, out, DATA[:4], dataclasses.replace(QUICK, overwrite=True), Heard())

    assert content(out) != before
    assert set(content(out)) == set(before)


# ---------------------------------------------------------------------------------------- where the adapters lie


def test_the_seven_leave_linear_attention_and_say_so(trained):
    out, _, heard = trained

    assert {name.rpartition(".")[2] for name in modules_of(out)} == SEVEN
    assert all(name.startswith("model.layers.") for name in modules_of(out))
    [note] = heard.about("--targets auto")
    assert all(f"6 x linear_attn.{name}" in note for name in LINEAR_ATTENTION)
    assert {name.rpartition(".")[2] for name in told(out)["untouched"]} == LINEAR_ATTENTION


def test_auto_takes_linear_attention_too(tmp_path):
    heard = Heard()
    finetune(MODEL, tmp_path / "adapter", DATA[:4], dataclasses.replace(QUICK, targets="auto"), heard)

    assert {name.rpartition(".")[2] for name in modules_of(tmp_path / "adapter")} == SEVEN | LINEAR_ATTENTION
    assert not heard.about("untouched")
    assert not told(tmp_path / "adapter")["untouched"]


def tiny(key, folder):
    """A tiny model of another architecture that speaks the demo model's tokens."""
    known = TINY_MODELS[key]
    settings = {name: dict(value) if isinstance(value, dict) else value for name, value in known.settings.items()}
    settings.get("text_config", settings)["vocab_size"] = 1280
    save_tiny_model(dataclasses.replace(known, settings=settings), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder)
    return folder


def test_a_vision_tower_gets_no_adapter(tmp_path):
    model = tiny("gemma3-vision", tmp_path / "model")
    tower = [name for name in open_checkpoint(model).tensors if "vision" in name and "q_proj.weight" in name]
    assert tower, "a tower that would be found by the ends of its names"

    finetune(model, tmp_path / "adapter", DATA[:4], QUICK, Heard())

    found = modules_of(tmp_path / "adapter")
    assert {name.rpartition(".")[2] for name in found} == SEVEN
    assert all(name.startswith("model.language_model.layers.") for name in found)


@peft_is_behind
def test_fused_experts_are_left_by_name_and_peft_loads_the_rest(tmp_path):
    model = tiny("qwen3-moe", tmp_path / "model")
    heard = Heard()

    finetune(model, tmp_path / "adapter", DATA[:4], QUICK, heard)

    assert {name.rpartition(".")[2] for name in modules_of(tmp_path / "adapter")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in heard.about("fused experts")[0]
    assert "mlp.gate_proj, mlp.up_proj, mlp.down_proj" in heard.about("peft takes")[0]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert set(modules_of(tmp_path / "adapter")) == {
        name.removeprefix("base_model.model.") for name in adapted.base_model.targeted_module_names
    }


def test_other_names_are_told_and_transposed_weights_are_known(tmp_path):
    model = tiny("gpt2", tmp_path / "model")

    with pytest.raises(FinetuneError, match=r"called q or q_proj; there are 2 x attn\.c_attn.*--targets auto"):
        finetune(model, tmp_path / "adapter", DATA[:4], QUICK, Heard())
    finetune(
        model, tmp_path / "adapter", DATA[:4], dataclasses.replace(QUICK, targets=("attn.c_proj", "c_fc")), Heard()
    )

    assert {".".join(name.split(".")[-2:]) for name in modules_of(tmp_path / "adapter")} == {"attn.c_proj", "mlp.c_fc"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def refused(model, tmp_path, match, data=DATA[:4], error=FinetuneError, **changes):
    with pytest.raises(error, match=match):
        finetune(model, tmp_path / "adapter", data, dataclasses.replace(QUICK, **changes), Heard())
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]


def test_long_responses_are_cut_and_named(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = DATA[:6]
    lengths = {sample.id: len(tokenizer.apply_chat_template(sample.turn.messages())["input_ids"]) for sample in data}
    # The template ends with a line break that is not learnt.
    length = sorted(lengths.values())[-3] - 1
    long = [name for name, count in lengths.items() if count - 1 > length]
    assert 0 < len(long) < len(data)
    heard = Heard()

    done = finetune(MODEL, tmp_path / "adapter", data, dataclasses.replace(QUICK, length=length), heard)

    assert list(done.truncated) == long == told(tmp_path / "adapter")["data"]["truncated"]
    assert heard.about(f"{len(long)} of {len(data)} responses are cut")


def test_a_prompt_that_leaves_no_response_is_named(tmp_path):
    long = dataclasses.replace(DATA[0], id="long", prompt=" ".join(PLACES[:60]))
    refused(MODEL, tmp_path, r"sample long: its prompt alone has \d+ tokens", data=(*DATA[:3], long), length=60)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path, copy):
    (copy / "chat_template.jinja").unlink()
    refused(copy, tmp_path, "has no chat template")


def test_a_template_that_refuses_is_told(tmp_path, copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    refused(copy, tmp_path, "sample c0: the chat template refuses it: no users here")


def test_a_template_that_loses_the_response_is_refused(tmp_path, copy):
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}>{% else %}<{% endif %}"
    )
    refused(copy, tmp_path, "sample c0: the chat template leaves out what the assistant says")


def test_missing_weights_are_not_made_up(tmp_path, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.language_model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(copy, tmp_path, r"no weights for mlp\.up_proj\.weight, which would be random")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.language_model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(copy, tmp_path, "the loss is not finite at step 0")


def test_quantised_weights_are_refused(tmp_path, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    refused(copy, tmp_path, "its weights are quantised")


def test_another_models_tokenizer_is_noticed(tmp_path):
    model = tiny("llama", tmp_path / "model")
    small = json.loads((model / "config.json").read_text())
    assert small["vocab_size"] == 1280
    (model / "config.json").write_text(json.dumps({**small, "vocab_size": 64}))
    refused(model, tmp_path, r"its tokenizer gives token \d+ \(sample c0\), but the model has 64 tokens")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 0}, "--rank: expected at least 1, found 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected more than 0"),
        ({"dropout": 1.0}, "--dropout: expected at least 0 and less than 1"),
        ({"evaluation_share": 1.0}, "--evaluation-share: expected at least 0 and less than 1"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, changes, match):
    refused(MODEL, tmp_path, match, error=UsageError, **changes)


def test_no_samples_are_refused(tmp_path):
    refused(MODEL, tmp_path, "there are no samples", data=())


# ---------------------------------------------------------------------------------------- the command


def test_the_command_shows_the_curve(tmp_path):
    lines = [
        json.dumps({"id": sample.id, "kind": sample.kind, "prompt": sample.prompt, "response": sample.response})
        for sample in DATA[-8:]
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["finetune", MODEL, tmp_path / "adapter", "--data", tmp_path / "data.jsonl", "--epochs", 1]
    words += ["--batch", 1, "--accumulate", 2]

    shown = run(*words, "--targets", "q,down_proj")
    printed = run(*words, "--overwrite", "--json")
    again = run(*words)

    assert shown.exit_code == 0, shown.output
    assert "contested held out" in shown.stdout
    assert "█" in shown.stdout
    assert f"merge it with: ablate-shards merge {MODEL} {tmp_path / 'adapter'} OUT" in shown.stdout
    assert "adapters on" in shown.stderr
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)["modules"] == 32
    assert not printed.stderr
    assert again.exit_code == 1
    assert again.stderr.startswith(f"error: {tmp_path / 'adapter'}: already exists")
