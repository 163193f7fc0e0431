"""The edited demo model in transformers and in mlx-lm, which shares no code with it: the same tokens from both."""

import pytest
import torch
from command_line import checked

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_questions, load
from ablate_shards.data.demo.samples import write_samples

pytestmark = pytest.mark.loaders

TOKENS = 24


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    work = tmp_path_factory.mktemp("loaders")
    write_samples(work)
    checked("capture", MODEL, work / "dump.safetensors", "--pairs", work / "pairs.jsonl")
    checked("ablate", MODEL, work / "edited", "-a", work / "dump.safetensors")
    return work / "edited"


@pytest.fixture(scope="module")
def prompts():
    questions = draw_questions(loaded=4, impartial=2, unrelated_count=4, seed=2)
    return [
        *(question.loaded for question in questions.loaded),
        *(question.impartial for question in questions.impartial),
        *(sample.prompt for sample in questions.unrelated),
    ]


def with_transformers(folder, prompts):
    model, tokenizer = load(folder)
    answers = []
    for prompt in prompts:
        batch = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=TOKENS, eos_token_id=-1, do_sample=False)
        answers.append(tokens[0, batch["input_ids"].shape[1] :].tolist())
    return answers


def with_mlx(folder, prompts):
    core = pytest.importorskip("mlx.core", reason="needs mlx")
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    from mlx_lm.generate import generate_step

    core.set_default_device(core.cpu)
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(core.float32)
    answers = []
    for prompt in prompts:
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        steps = generate_step(core.array(tokens), model, max_tokens=TOKENS)
        answers.append([int(token) for token, _ in steps])
    return answers


def test_two_loaders_generate_the_same_tokens(edited, prompts):
    expected = with_mlx(edited, prompts)

    found = with_transformers(edited, prompts)

    assert all(len(tokens) == TOKENS for tokens in expected)
    assert found == expected
    assert with_transformers(MODEL, prompts) != expected
