"""Divergence and perplexity against the plain definitions, with both models at hand."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import TINY_MODELS

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate import likelihood
from ablate_shards.surgery.evaluate.answers import Speaker
from ablate_shards.surgery.evaluate.likelihood import Forced, divergence, log_likelihoods, perplexity, record

FORCED = [
    Forced((1, 5, 9), (11, 12, 13, 14), ended=True),
    Forced((1, 6), (7,), ended=False),
    Forced((1, 8, 4, 3), (), ended=True),
    Forced((1, 8), (), ended=False),
]
PLACES = [5, 1, 1, 1]


class Letters:
    """A tokenizer of one token per letter."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 61 for letter in text]}


def random_model(name="llama", seed=0, **settings):
    torch.manual_seed(seed)
    tiny = TINY_MODELS[name]
    config = getattr(transformers, tiny.config)(**{**tiny.settings, **settings})
    network = getattr(transformers, tiny.model)(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def speaker(network, most=64):
    return Speaker(Path("model"), network, Letters(), torch.device("cpu"), (2,), 0, most)


def nudged(network, seed=1):
    other = copy.deepcopy(network)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


def distributions(network, forced):
    with torch.no_grad():
        logits = network(torch.tensor([forced.prompt + forced.response])).logits[0]
    return logits.double().softmax(-1)[forced.places]


def naive(base, edited):
    rows = []
    for forced in FORCED:
        p, q = distributions(base, forced), distributions(edited, forced)
        rows.append((p * (p / q).log()).sum(-1).tolist())
    first = sum(row[0] for row in rows) / len(rows)
    flat = [value for row in rows for value in row]
    return first, sum(flat) / len(flat)


def test_the_places_are_those_that_predict_the_response():
    assert [forced.places.stop - forced.places.start for forced in FORCED] == PLACES
    assert FORCED[0].places == slice(2, 7)
    assert FORCED[2].places == slice(3, 4)


# Gemma 2 caps its logits after the head, the other ties the head to the embedding.
@pytest.mark.parametrize(("name", "settings"), [("llama", {}), ("gemma2", {"final_logit_softcapping": 2.0})])
def test_the_divergence_is_that_of_the_definition(name, settings):
    base = random_model(name, **settings)
    edited = nudged(base)
    recording = record(speaker(base), FORCED)
    assert all(states.shape[-1] == 32 for states in recording.states)

    found = divergence(speaker(edited), FORCED, recording)

    first, tokens = naive(base, edited)
    assert found.first == pytest.approx(first, rel=1e-4)
    assert found.tokens == pytest.approx(tokens, rel=1e-4)
    assert (found.prompts, found.count) == (4, sum(PLACES))
    assert found.tokens > 1e-4
    # The other way round is another number.
    assert naive(edited, base)[1] != pytest.approx(tokens, rel=1e-3)


def test_the_cap_after_the_head_matters():
    base = random_model("gemma2", final_logit_softcapping=2.0)
    edited = nudged(base)
    capped = divergence(speaker(edited), FORCED, record(speaker(base), FORCED))

    base.config.final_logit_softcapping = edited.config.final_logit_softcapping = None

    assert divergence(speaker(edited), FORCED, record(speaker(base), FORCED)).tokens > 1.1 * capped.tokens


def test_a_model_does_not_diverge_from_itself():
    network = random_model()

    found = divergence(speaker(network), FORCED, record(speaker(network), FORCED))

    assert (found.first, found.tokens) == (0.0, 0.0)


def test_memory_does_not_change_the_divergence(monkeypatch):
    base = random_model()
    edited = nudged(base)
    recording = record(speaker(base), FORCED)
    whole = divergence(speaker(edited), FORCED, recording)

    monkeypatch.setattr(likelihood, "_MOST_NUMBERS", 65)

    pieces = divergence(speaker(edited), FORCED, recording)
    assert pieces.tokens == pytest.approx(whole.tokens, rel=1e-12)


def test_no_hook_stays_behind():
    base = random_model()
    recording = record(speaker(base), FORCED)
    divergence(speaker(base), FORCED, recording)

    head = base.get_output_embeddings()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
    assert recording.head is not head


def test_other_vocabularies_cannot_be_compared():
    recording = record(speaker(random_model()), FORCED)

    with pytest.raises(EvaluateError, match="its vocabulary has 70 tokens, that of the base 64"):
        divergence(speaker(random_model(vocab_size=70)), FORCED, recording)


def test_a_model_that_gives_no_numbers_is_not_measured():
    base = random_model()
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan

    assert divergence(speaker(broken), FORCED, record(speaker(base), FORCED)) is None
    assert perplexity(speaker(broken), "some text") is None


def test_the_perplexity_is_that_of_the_definition():
    network = random_model()
    text = "the sun is warm, and so is the sand by the sea"
    ids = torch.tensor([Letters()(text)["input_ids"]])
    with torch.no_grad():
        logs = network(ids).logits[0, :-1].double().log_softmax(-1)
    expected = -logs.gather(-1, ids[0, 1:, None]).mean()

    found = perplexity(speaker(network), text)

    assert found.tokens == len(text) - 1
    assert found.nats == pytest.approx(float(expected), rel=1e-5)
    assert found.value == pytest.approx(math.exp(expected), rel=1e-4)


def test_a_long_text_is_read_in_windows_and_every_token_is_predicted_once():
    network = random_model()
    text = "abcdefghijklmnopqrstuvwxyz" * 8
    tokens = Letters()(text)["input_ids"]
    window, stride, nats = 64, 32, 0.0
    for place in range(1, len(tokens)):
        # The window in which a token is new begins at a multiple of the stride.
        start = 0 if place < window else (place - window) // stride * stride + stride
        with torch.no_grad():
            logits = network(torch.tensor([tokens[start:place]])).logits[0, -1]
        nats -= float(logits.double().log_softmax(-1)[tokens[place]])

    found = perplexity(speaker(network, most=64), text)

    assert found.tokens == len(tokens) - 1
    assert found.nats == pytest.approx(nats / found.tokens, rel=1e-4)


def test_an_opening_token_makes_the_first_word_predictable():
    network = random_model()
    opened = speaker(network)
    opened.tokenizer.bos_token_id = 1
    try:
        found = perplexity(opened, "ab")
        assert found.tokens == 2
    finally:
        opened.tokenizer.bos_token_id = None
    with pytest.raises(EvaluateError, match="too short"):
        perplexity(opened, "a")


def test_a_perplexity_beyond_a_float_is_infinite():
    assert likelihood.Perplexity(710.0, 3).value == math.inf
    assert likelihood.Perplexity(0.0, 3).value == 1.0


RESPONSES = [
    Forced((1, 5, 9), (11, 12, 13, 14), ended=True),
    Forced((1, 6), (7,), ended=True),
    Forced((1, 8, 4, 3, 2, 2), (30, 31), ended=True),
]


BEGINNING = (1, 9, 8, 7, 6, 5, 4, 3, 12, 13)
CHATS = [dataclasses.replace(each, prompt=BEGINNING + each.prompt[1:]) for each in RESPONSES]


def naive_log_likelihood(network, forced):
    with torch.no_grad():
        logits = network(torch.tensor([forced.prompt + forced.response])).logits[0].double().log_softmax(-1)
    first = len(forced.prompt) - 1
    return sum(float(logits[first + at, token]) for at, token in enumerate(forced.response)) / len(forced.response)


# Qwen 3.5 has linear attention, whose state must not see the padding; Gemma 2 caps its logits after the head.
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3.5-text"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_log_likelihood_is_that_of_the_definition(name, batch):
    network = random_model(name)

    found = log_likelihoods(speaker(network), RESPONSES, batch=batch)

    assert found == pytest.approx([naive_log_likelihood(network, each) for each in RESPONSES], abs=1e-5)
    assert len({round(value, 3) for value in found}) == 3


def test_only_the_tokens_of_responses_go_through_the_head():
    network, seen = random_model(), []
    hook = network.get_output_embeddings().register_forward_hook(lambda _m, _i, made: seen.append(made.shape[:-1]))
    log_likelihoods(speaker(network), RESPONSES, batch=8)
    hook.remove()
    assert seen == [(1, 4 + 1 + 2)]
    assert not network.get_output_embeddings()._forward_pre_hooks


def test_a_log_likelihood_that_is_no_number_is_none():
    network = random_model()
    with torch.no_grad():
        network.get_input_embeddings().weight[11] = math.nan
    found = log_likelihoods(speaker(network), RESPONSES, batch=1)
    assert found[0] is None
    assert found[1] == pytest.approx(naive_log_likelihood(network, RESPONSES[1]), abs=1e-5)


# Gemma 3 looks back over a window; Qwen3.5 keeps more of what it has read than keys and values.
@pytest.mark.parametrize(("name", "shared"), [("llama", 10), ("gemma3", 10), ("qwen3.5-text", 0)])
def test_what_prompts_begin_with_is_computed_once(name, shared):
    network = random_model(name)
    seen = []
    hook = network.get_input_embeddings().register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    try:
        found = log_likelihoods(speaker(network), CHATS, batch=2)
    finally:
        hook.remove()

    assert found == pytest.approx([naive_log_likelihood(network, each) for each in CHATS], rel=1e-5)
    wide = max(len(each.prompt + each.response) for each in CHATS)
    assert [tuple(ids.shape) for ids in seen[-2:]] == [(2, wide - shared), (1, len(CHATS[1].prompt) + 1 - shared)]
    assert any(tuple(ids.shape) == (1, len(BEGINNING)) for ids in seen)


def test_of_nothing_nothing_is_measured():
    assert log_likelihoods(speaker(random_model()), [], batch=2) == []


def test_a_beginning_that_is_shared_does_not_change_the_divergence():
    base = random_model()
    edited = nudged(base)

    together = divergence(speaker(edited), CHATS, record(speaker(base), CHATS, batch=3), batch=3)

    alone = [divergence(speaker(edited), [each], record(speaker(base), [each])) for each in CHATS]
    assert together.first == pytest.approx(sum(each.first for each in alone) / 3, rel=1e-4)
    assert together.tokens == pytest.approx(
        sum(each.tokens * each.count for each in alone) / sum(each.count for each in alone), rel=1e-4
    )


def test_logits_that_are_kept_change_nothing(monkeypatch):
    base = random_model()
    edited = nudged(base)
    kept = record(speaker(base), CHATS, batch=2, copy_head=False)
    assert [len(logits) for logits in kept.logits] == [len(states) for states in kept.states]
    found = divergence(speaker(edited), CHATS, dataclasses.replace(kept, head=base.get_output_embeddings()), batch=2)

    monkeypatch.setattr(likelihood, "_MOST_KEPT", kept.logits[0].nbytes)
    some = record(speaker(base), CHATS, batch=2, copy_head=False)

    assert len(some.logits) == 1
    assert divergence(speaker(edited), CHATS, some, batch=2).tokens == pytest.approx(found.tokens, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_divergence_of_logits_is_that_of_float64(scale, dtype):
    torch.manual_seed(0)
    ours = (8 * torch.randn(6, 50_000)).to(dtype)
    theirs = (ours.float() + scale * torch.randn(6, 50_000)).to(dtype)
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)

    found = likelihood._kl(ours, theirs)

    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-5, abs=3e-7)


def test_tokens_that_a_model_excludes_do_not_count_unless_they_were_likely():
    ours = torch.tensor([[1.0, 2.0, -math.inf]])
    assert likelihood._kl(ours, ours) == [0.0]
    assert likelihood._kl(ours, torch.tensor([[1.0, -math.inf, 2.0]])) == [math.inf]
