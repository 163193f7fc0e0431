"""Turns instructions into the tokens that are trained on: the prompt as given, the response and its end learnt."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ablate_shards.errors import FinetuneError
from ablate_shards.surgery.model.loading import end_tokens, most_tokens, render_chat, tokenize
from ablate_shards.surgery.model.samples import Instruction, Question

__all__ = ["IGNORED", "EncodedSample", "draw", "encode_instructions", "prompt_of", "split"]

_Item = TypeVar("_Item")

#: The label of a token that is not learnt.
IGNORED = -100


class EncodedSample(NamedTuple):
    """The tokens of one sample, the first that is learnt, and whether its response was cut."""

    tokens: list[int]
    start: int
    cut: bool

    def features(self, *, token_types: bool) -> dict[str, list[int]]:
        """Returns what the model is given; the prompt is no label."""
        count = len(self.tokens)
        given = {
            "input_ids": self.tokens,
            "attention_mask": [1] * count,
            "labels": [IGNORED] * self.start + self.tokens[self.start :],
        }
        return given | {"token_type_ids": [0] * count} if token_types else given


def prompt_of(tokenizer: Any, question: Question) -> list[int]:
    """Returns the tokens of a prompt up to where the model answers.

    Raises:
        FinetuneError: The chat template refuses it.
    """
    where = f"prompt {question.id}"
    text = render_chat(tokenizer, question.turn.messages(), where, FinetuneError, add_generation_prompt=True)
    return list(tokenize(tokenizer, text))


def encode_instructions(
    model: Path, config: Any, tokenizer: Any, data: Sequence[Instruction], *, length: int, vocabulary: int
) -> list[EncodedSample]:
    """Returns the tokens of each sample.

    Args:
        model: The checkpoint folder.
        config: Its configuration.
        tokenizer: Its tokenizer.
        data: The samples, at least one.
        length: Most tokens of a sample; fewer where the model reads no more.
        vocabulary: How many tokens the model has.

    Raises:
        FinetuneError: There are no samples, the chat template cannot word one, its prompt alone is too long, or the
            model does not have its tokens.
    """
    if not data:
        raise FinetuneError("there are no samples to train on; expected at least one")
    length = min(length, most_tokens(config) or length)
    ends = frozenset(end_tokens(_stated_ends(model, config), tokenizer.eos_token_id))
    samples = [_encode(tokenizer, ends, sample, length) for sample in data]
    for sample, encoded in zip(data, samples, strict=True):
        if encoded.start >= len(encoded.tokens):
            raise FinetuneError(
                f"sample {sample.id}: its prompt alone has {encoded.start} tokens, which leaves none of {length} for "
                "the response; shorten it, or raise --length"
            )
        if max(encoded.tokens) >= vocabulary:
            raise FinetuneError(
                f"{model}: its tokenizer gives token {max(encoded.tokens)} (sample {sample.id}), but the model has "
                f"{vocabulary} tokens; put the tokenizer there that belongs to the model"
            )
    return samples


def _stated_ends(model: Path, config: Any) -> Any:
    """Returns the tokens at which generation stops, as the model's files state them."""
    path = model / "generation_config.json"
    try:
        stated = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise FinetuneError(f"{path}: not a JSON object; restore the file") from error
    return getattr(config.get_text_config(decoder=True), "eos_token_id", None) if stated is None else stated


def _encode(tokenizer: Any, ends: frozenset[int], sample: Instruction, length: int) -> EncodedSample:
    messages, where = sample.turn.messages(), f"sample {sample.id}"
    before = render_chat(tokenizer, messages[:-1], where, FinetuneError, add_generation_prompt=True)
    whole = render_chat(tokenizer, messages, where, FinetuneError)
    if not whole.startswith(before):
        # Some templates open the answer with what they do not keep of it later, such as a mark for reasoning.
        at = whole.rfind(sample.response.strip())
        if at < 0:
            raise FinetuneError(f"{where}: the chat template rewrites the response, so its tokens cannot be found")
        before = whole[:at]
    prompt, tokens = tokenize(tokenizer, before), tokenize(tokenizer, whole)
    if tokens[: len(prompt)] != prompt:
        # A token reaches over the border; when it generates, the model sees the prompt's own tokens.
        tokens = prompt + tokenize(tokenizer, whole[len(before) :])
    last = max((at for at in range(len(prompt), len(tokens)) if tokens[at] in ends), default=None)
    learnt = [*tokens, tokenizer.eos_token_id] if last is None else [*tokens[: last + 1]]
    return EncodedSample(learnt[:length], len(prompt), len(learnt) > length)


def split(data: Sequence[Instruction], share: float, seed: int) -> tuple[list[int], dict[str, list[int]]]:
    """Returns the samples to train on and, by kind, those held out: the same share of the prompts of each kind.

    Responses to one prompt stay together, and never all prompts of a kind are held out.
    """
    kinds: dict[str, dict[tuple[str | None, str], list[int]]] = defaultdict(dict)
    for number, sample in enumerate(data):
        kinds[sample.kind].setdefault((sample.system, sample.prompt), []).append(number)
    drawn = {kind: draw(list(prompts.values()), share, f"{seed} {kind}") for kind, prompts in sorted(kinds.items())}
    held = {kind: sorted(number for numbers in out for number in numbers) for kind, out in drawn.items() if out}
    out = {number for numbers in held.values() for number in numbers}
    return [number for number in range(len(data)) if number not in out], held


def draw(items: Sequence[_Item], share: float, seed: str) -> list[_Item]:
    """Returns a share of the items, at least one and never all; none of a single one, or for a share of 0."""
    count = min(max(round(share * len(items)), 1), len(items) - 1) if share else 0
    return random.Random(seed).sample(list(items), max(count, 0))
