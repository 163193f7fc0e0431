"""Answers of a batch that is kept full are those that transformers' ``generate`` gives to each prompt alone."""

import pytest
import torch
from tiny_models import TINY_MODELS, save_tiny_model

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.model import generation
from ablate_shards.surgery.model.generation import greedy_answers
from ablate_shards.surgery.model.loading import generating_class, load_model, read_config

ENDS = (2, *range(40, 50))
PROMPTS = [
    torch.randint(3, 40, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (12, 9, 9, 7, 5, 5, 3, 2)
]


def load(name, folder):
    folder = save_tiny_model(TINY_MODELS[name], folder / "model")
    config = read_config(folder, EvaluateError)
    network, _ = load_model(folder, generating_class(config), EvaluateError, config=config, dtype=torch.float32)
    return network.eval()


def answers(network, *, at_once, most=12, **how):
    limits = [most + number for number in range(len(PROMPTS))]
    with torch.inference_mode():
        return greedy_answers(network, PROMPTS, limits, at_once=at_once, ends=ENDS, pad=0, **how)


def alone(network, *, most=12):
    """Returns what ``generate`` answers to each prompt alone."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        network.generation_config = generation.greedy(ENDS, 0)
        with torch.inference_mode():
            made = network.generate(torch.tensor([prompt]), max_new_tokens=most + number)
        found.append(made[0, len(prompt) :].tolist())
    return found


#: Keys and values, a window of them, states of linear attention and of convolutions, latent keys, positions learnt,
#: positions of three axes; and two that ``generate`` answers.
FULL = ("llama", "gemma3", "gemma4", "qwen3.5", "lfm2", "granite-hybrid", "deepseek-v3", "gpt2", "qwen2-vl", "gpt-oss")
WHOLE = ("phi3", "falcon-h1")


@pytest.mark.parametrize("name", [*FULL, *WHOLE])
def test_answers_are_those_to_each_prompt_alone(tmp_path, name, monkeypatch):
    network = load(name, tmp_path)
    expected = alone(network)
    assert len(set(map(len, expected))) > 2
    given, real = [], generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *each, **how: given.append(1) or real(*each, **how))

    for at_once in (1, 3, 8):
        assert answers(network, at_once=at_once) == expected

    assert bool(given) == (name in WHOLE)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_windows_shorter_than_the_texts_are_those_of_each_row(tmp_path, name):
    network = load(name, tmp_path)
    without = alone(network)
    for config in {id(each): each for each in (network.config, network.config.get_text_config(decoder=True))}.values():
        config.sliding_window = 6
    for part in network.modules():
        if getattr(part, "sliding_window", None):
            part.sliding_window = 6
    expected = alone(network)

    assert expected != without
    for at_once in (2, 3, 8):
        assert answers(network, at_once=at_once) == expected


def test_rows_leave_with_their_end_and_the_next_prompts_come_in(tmp_path, monkeypatch):
    network = load("llama", tmp_path)
    sizes, real = [], type(network).forward

    def forward(self, input_ids, **how):
        sizes.append(tuple(input_ids.shape))
        return real(self, input_ids=input_ids, **how)

    forward.__signature__ = generation.inspect.signature(real)
    monkeypatch.setattr(type(network), "forward", forward)
    ended = []

    found = answers(network, at_once=4, ended=lambda: ended.append(1))

    rows = [rows for rows, width in sizes if width == 1]
    assert len(ended) == len(PROMPTS)
    assert max(rows) <= 4
    assert min(rows) < 4
    # The first token of each answer comes from reading the prompt.
    assert sum(rows) == sum(map(len, found)) - len(PROMPTS)
    assert sum(rows for rows, width in sizes if width > 1) == len(PROMPTS)


def test_what_no_row_needs_is_let_go(tmp_path, monkeypatch):
    network = load("llama", tmp_path)
    widths, real = [], generation._Rows.kept

    def kept(self, places):
        left = real(self, places)
        if left is not None:
            widths.append((left.mask.shape[1], left.cache.layers[0].keys.shape[-2], int(left.mask.sum(1).max())))
        return left

    monkeypatch.setattr(generation._Rows, "kept", kept)
    answers(network, at_once=2)

    assert all(mask == keys for mask, keys, _ in widths)
    assert max(mask for mask, _, _ in widths) <= max(map(len, PROMPTS)) + 12 + len(PROMPTS)
    assert widths[-1][0] == widths[-1][2]


def test_the_checkpoints_own_penalties_do_not_count(tmp_path):
    for name in ("llama", "phi3"):
        network = load(name, tmp_path / name)
        expected = answers(network, at_once=8)
        network.generation_config.repetition_penalty = 9.0

        assert answers(network, at_once=8) == expected
        assert network.generation_config.repetition_penalty == 9.0
