"""A model is asked through its own template, greedily, many questions at a time, and refused where it cannot be."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import ask, draw_questions, load
from ablate_shards.errors import EvaluateError, UsageError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.evaluate.answers import Prompt, batches, model_digest, speaking
from ablate_shards.surgery.model.loading import open_folder
from ablate_shards.surgery.model.samples import Question

PROMPTS = [sample.prompt for sample in draw_questions(unrelated_count=9).unrelated]


@pytest.fixture(scope="module")
def speaker():
    with speaking(MODEL, dtype="auto", device="cpu") as opened:
        yield opened


@pytest.fixture
def copy(tmp_path):
    """A copy of the model; the weights are a link."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".safetensors":
            os.link(file, folder / file.name)
        else:
            shutil.copy(file, folder)
    return folder


def question(prompt, **fields):
    return Question("q", "en", "unrelated", prompt, **fields)


def replies(speaker, prompts, *, tokens=32):
    return speaker.replies([speaker.prompt(question(prompt), thinking=False) for prompt in prompts], tokens=tokens)


def test_answers_are_those_of_the_model_whatever_else_is_asked(speaker):
    expected = ask(*load(MODEL), PROMPTS)

    together = replies(speaker, PROMPTS)

    assert len({len(prompt) for prompt in PROMPTS}) > 1
    assert [reply.text for reply in together] == expected
    assert [replies(speaker, [prompt])[0] for prompt in PROMPTS] == together
    assert all(reply.ended for reply in together)


def test_a_short_answer_is_cut_off(speaker):
    (reply,) = replies(speaker, PROMPTS[:1], tokens=3)

    assert not reply.ended
    assert replies(speaker, PROMPTS[:1])[0].text.startswith(reply.text)


def test_an_answer_ends_where_the_model_reads_no_more(speaker):
    words = "honey " * 400
    (reply,) = replies(speaker, [words], tokens=10_000)

    assert len(speaker.prompt(question(words), thinking=False).tokens) + len(speaker.encode(reply.text)) <= 512
    with pytest.raises(EvaluateError, match=r"question q: has .* but the model reads at most 512"):
        replies(speaker, ["honey " * 520])


def test_the_checkpoint_cannot_ask_for_chance(copy, speaker):
    configuration = json.loads((copy / "generation_config.json").read_text())
    wild = {"do_sample": True, "temperature": 9.0, "top_k": 500, "repetition_penalty": 5.0, "max_length": 2}
    (copy / "generation_config.json").write_text(json.dumps({**configuration, **wild}))

    with speaking(copy, dtype="float32", device="cpu") as other:
        assert replies(other, PROMPTS) == replies(speaker, PROMPTS)


def test_the_template_hears_about_thinking_and_may_open_the_thoughts(copy):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template + "{% if enable_thinking %}{{ '<think>\n' }}{% endif %}")

    with speaking(copy, dtype="auto", device="cpu") as other:
        thinking = other.prompt(question(PROMPTS[0]), thinking=True)
        plain = other.prompt(question(PROMPTS[0]), thinking=False)
        (reply,) = other.replies([thinking], tokens=4)

    assert thinking.thinks
    assert not plain.thinks
    assert thinking.tokens[: len(plain.tokens)] == plain.tokens
    assert len(thinking.tokens) > len(plain.tokens)
    assert reply.text.startswith("<think>")


def test_a_template_that_refuses_is_named_with_the_question(copy):
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (copy / "chat_template.jinja").write_text(refusal + (MODEL / "chat_template.jinja").read_text())

    with speaking(copy, dtype="auto", device="cpu") as other:
        other.prompt(question("Who?"), thinking=False)
        with pytest.raises(EvaluateError, match="question q: the chat template refuses it: no system message"):
            other.prompt(question("Who?", system="Be brief."), thinking=False)


def remove_template(folder):
    (folder / "chat_template.jinja").unlink()


def remove_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def tear_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": ')


def remove_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.layers.3.mlp.down_proj.weight"]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 257
    (folder / "config.json").write_text(json.dumps(config))


def own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "their_own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('code from the checkpoint ran')")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (remove_template, "has no chat template; put"),
        (remove_tokenizer, "its tokenizer knows no words"),
        (tear_tokenizer, "its tokenizer cannot be loaded"),
        (remove_weight, r"the checkpoint holds no weight for \S*layers.3.mlp.down_proj.weight"),
        (widen, "transformers cannot load the model"),
        (own_code, "cannot"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused_in_one_sentence(copy, break_it, said):
    break_it(copy)

    with pytest.raises(EvaluateError, match=said) as refused, speaking(copy, dtype="auto", device="cpu"):
        pass

    assert str(refused.value).startswith(str(copy))
    assert "\n" not in str(refused.value)


def test_a_device_that_is_not_there_is_wrong_usage():
    with pytest.raises(UsageError, match="cuda:99"), speaking(MODEL, dtype="auto", device="cuda:99"):
        pass


def test_memory_that_does_not_suffice_is_one_sentence(speaker):
    with pytest.raises(EvaluateError, match="use a smaller --batch"), speaker.computing():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB")
    with pytest.raises(EvaluateError, match="the model fails to compute: expected scalar type"), speaker.computing():
        raise RuntimeError("expected scalar type")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(EvaluateError, match=r"expected a checkpoint folder with a config\.json"):
        open_folder(tmp_path, EvaluateError)


def test_the_digest_sees_what_bears_on_an_answer(copy):
    before = model_digest(open_checkpoint(copy))
    (copy / "README.md").write_text("A model.")
    (copy / "ablation.json").write_text("{}")
    assert model_digest(open_checkpoint(copy)) == before == model_digest(open_checkpoint(MODEL))

    seen = {before}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        seen.add(model_digest(open_checkpoint(copy)))
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").write_bytes(raw)
    seen.add(model_digest(open_checkpoint(copy)))
    assert len(seen) == 5


def test_parts_hold_every_prompt_once_and_like_lengths_together():
    prompts = [Prompt((7,) * length, thinks=False) for length in (5, 1, 9, 5, 2, 8, 7)]

    assert batches(prompts, 3) == [[2, 5], [6, 0], [3, 4, 1]]
    assert batches(prompts, 99) == [[2, 5, 6, 0, 3, 4, 1]]
