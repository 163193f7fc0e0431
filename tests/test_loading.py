"""What is read of a model's folder before it runs, and how much memory there is for it."""

import json
import re
import shutil

import accelerate.utils
import pytest
import torch

from ablate_shards.data.demo import MODEL
from ablate_shards.errors import AblateError, CaptureError, FinetuneError
from ablate_shards.surgery.capture.prompts import encode_turn
from ablate_shards.surgery.evaluate.answers import speaking
from ablate_shards.surgery.finetune.responses import encode_instructions
from ablate_shards.surgery.model import loading
from ablate_shards.surgery.model.loading import end_tokens, free_memory, quiet, read_config, read_tokenizer, render_chat
from ablate_shards.surgery.model.samples import Instruction, Question, Turn

ASKED = Instruction("one", "en", "general", "Where is honey sold?", "In the market.")
#: A template whose answer opens with thoughts, closed at once where the model is told not to think.
REASONING = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>user\n{{ message['content'] }}"
    "<|im_end|>\n{% else %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ message['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
)


#: A template of a multimodal model: content is a list of parts, and a text is passed over without a word.
PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: One that drops what the user says, whatever form it has.
DEAF = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n<|im_end|>\n{% endfor %}"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def encoded(model):
    with quiet():
        config, tokenizer = read_config(model, FinetuneError), read_tokenizer(model, FinetuneError)
        (sample,) = encode_instructions(model, config, tokenizer, [ASKED], length=512, vocabulary=10**6)
    return tokenizer, sample


def test_a_tokenizer_without_its_files_is_refused(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with quiet(), pytest.raises(FinetuneError, match="its tokenizer knows no words; put"):
        read_tokenizer(copy, FinetuneError)


def test_the_response_alone_is_learnt_where_a_template_opens_thoughts(copy):
    (copy / "chat_template.jinja").write_text(REASONING)

    tokenizer, sample = encoded(copy)

    assert tokenizer.decode(sample.tokens[sample.start :]) == "In the market.<|im_end|>"
    assert tokenizer.decode(sample.tokens[: sample.start]).endswith("<think>\n\n</think>\n\n")


def test_ends_are_those_of_the_configuration_where_generation_has_none(copy):
    tokenizer, before = encoded(copy)
    (end,) = tokenizer.encode("<|im_end|>")
    assert before.tokens[-1] == end
    # Another token is the tokenizer's, and only the configuration says that a turn ends the answer too.
    other = 0 if end else 1
    (copy / "generation_config.json").unlink()
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer.convert_ids_to_tokens(other)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((copy / "config.json").read_text())

    config["text_config"]["eos_token_id"] = [other, end]
    (copy / "config.json").write_text(json.dumps(config))
    assert encoded(copy)[1].tokens == before.tokens

    config["text_config"]["eos_token_id"] = other
    (copy / "config.json").write_text(json.dumps(config))
    assert encoded(copy)[1].tokens[-1] == other


def test_every_end_is_listed_once():
    assert end_tokens([3, 4], None, 3, [5, None]) == (3, 4, 5)


def test_memory_is_found_where_an_accelerator_shares_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "_CGROUP", tmp_path)
    for listed in ({"mps": 64 << 30}, {0: 64 << 30}, {"cpu": 64 << 30, 0: 1 << 30}):
        monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda listed=listed: dict(listed))
        assert free_memory(torch.device("cpu")) == 64 << 30

    (tmp_path / "memory.max").write_text(str(8 << 30))
    (tmp_path / "memory.current").write_text(str(3 << 30))
    (tmp_path / "memory.stat").write_text(f"anon 5\nfile {1 << 30}\n")
    assert free_memory(torch.device("cpu")) == 6 << 30


def prompt_of(station, model):
    """Returns a prompt's text as a station that runs the model words it."""
    with quiet():
        if station == "finetune":
            tokenizer, sample = encoded(model)
            return tokenizer.decode(sample.tokens)
        if station == "capture":
            tokenizer = read_tokenizer(model, CaptureError)
            return tokenizer.decode(encode_turn(tokenizer, Turn(ASKED.prompt), "pair 1", "last", plain=False).tokens)
        with speaking(model, dtype="auto", device="cpu") as speaker:
            question = Question("one", "en", "core", ASKED.prompt)
            return speaker.tokenizer.decode(speaker.prompt(question, thinking=False).tokens)


@pytest.mark.parametrize("station", ["capture", "evaluate", "finetune"])
def test_a_template_that_wants_parts_is_given_parts(copy, station):
    plain = prompt_of(station, copy)
    (copy / "chat_template.jinja").write_text(PARTS)

    assert ASKED.prompt in plain
    assert ASKED.prompt in prompt_of(station, copy)


@pytest.mark.parametrize("station", ["capture", "evaluate", "finetune"])
def test_a_template_that_drops_the_prompt_is_refused(copy, station):
    (copy / "chat_template.jinja").write_text(DEAF)
    with pytest.raises(AblateError) as refused:
        prompt_of(station, copy)
    assert re.search(r'the chat template leaves out what the user says \("Where is honey sold\?"\)', str(refused.value))
    assert str(refused.value).endswith("repair the model's chat_template.jinja")


@pytest.mark.parametrize("prompt", ["?", "😀", "user", "assistant", "Honey", "im"])
def test_a_prompt_that_may_stand_elsewhere_by_chance_is_missed_too(copy, prompt):
    told = Turn(prompt, None, "Honey, be brief.").messages()
    (copy / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}?😀<|im_end|>\n{% endfor %}"
    )
    with quiet():
        tokenizer = read_tokenizer(copy, CaptureError)
        with pytest.raises(CaptureError, match=r"pair 1: the chat template leaves out what the user says"):
            render_chat(tokenizer, told, "pair 1", CaptureError)
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
        assert render_chat(tokenizer, told, "pair 1", CaptureError) == f"Honey, be brief.|{prompt}|"


def test_a_template_that_writes_capitals_drops_nothing(copy):
    template = "{% for message in messages %}{{ message['content'] | upper }}|{% endfor %}"
    (copy / "chat_template.jinja").write_text(template)
    assert render_chat(read_tokenizer(copy, CaptureError), [{"role": "user", "content": "warm"}], "x", CaptureError)


def test_a_system_message_that_a_template_drops_is_missed(copy):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(
        "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + template
    )
    with quiet():
        tokenizer = read_tokenizer(copy, CaptureError)
        told = Turn("Where is honey sold?", None, "Be brief.").messages()
        with pytest.raises(CaptureError, match=r"pair 1: the chat template leaves out what the system says"):
            render_chat(tokenizer, told, "pair 1", CaptureError, add_generation_prompt=True)


def test_spaces_and_thoughts_that_a_template_leaves_out_are_not_missed(copy):
    template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] | trim }}|{% endfor %}"
    (copy / "chat_template.jinja").write_text(template)
    with quiet():
        tokenizer = read_tokenizer(copy, CaptureError)
        told = Turn("  Where is\nhoney sold? ", "<think>Hm.</think>\n\nIn the market.").messages()
        assert render_chat(tokenizer, told, "pair 1", CaptureError) == "Where is\nhoney sold?|In the market.|"
