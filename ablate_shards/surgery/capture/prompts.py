"""Turns pairs into the tokens that capture reads, and into batches of like length."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ablate_shards.errors import CaptureError
from ablate_shards.surgery.directions.activations import LABELS
from ablate_shards.surgery.model.loading import most_tokens, read_tokenizer, render_chat, tokenize
from ablate_shards.surgery.model.samples import Pair, Turn

if TYPE_CHECKING:
    import torch

__all__ = ["EncodedTurn", "Position", "PromptBatch", "encode_pairs", "encode_turn", "make_batches"]

Position = Literal["last", "mean"]


class EncodedTurn(NamedTuple):
    """The tokens of one prompt up to the last that is read, and the index of the first that is read."""

    tokens: tuple[int, ...]
    start: int


def encode_pairs(
    model: Path, config: Any, pairs: Sequence[Pair], position: Position, *, plain: bool
) -> list[EncodedTurn]:
    """Returns the prompts of all positives, then of all negatives.

    Args:
        model: The checkpoint folder.
        config: Its configuration.
        pairs: The pairs.
        position: Where the activations are read.
        plain: Whether the prompts are fed as they are, without the chat template.

    Raises:
        CaptureError: The tokenizer or a pair cannot be used.
    """
    tokenizer = read_tokenizer(model, CaptureError, template=not plain, instead=", or use the raw prompts with --plain")
    most = most_tokens(config)
    prompts = []
    for label in LABELS:
        for pair in pairs:
            if (pair.positive.response is None) != (pair.negative.response is None):
                raise CaptureError(
                    f"pair {pair.id}: one side has a response and the other has none, so they would be read at "
                    "different places; give both or neither"
                )
            turn: Turn = getattr(pair, label)
            where = f"pair {pair.id}, {label}"
            if position == "mean" and turn.response is None:
                raise CaptureError(f"{where}: has no response to take the mean over; add one, or use --position last")
            prompt = encode_turn(tokenizer, turn, where, position, plain=plain)
            if most is not None and len(prompt.tokens) > most:
                raise CaptureError(
                    f"{where}: has {len(prompt.tokens)} tokens, but the model reads at most {most}; shorten it"
                )
            prompts.append(prompt)
    return prompts


def encode_turn(tokenizer: Any, turn: Turn, where: str, position: Position, *, plain: bool) -> EncodedTurn:
    """Returns the tokens of one side of a pair."""
    response = (turn.response or "").strip()
    if plain:
        if turn.system is not None:
            raise CaptureError(f"{where}: has a system message, which --plain has no place for; remove one of the two")
        text = (turn.prompt + (turn.response or "")).rstrip() if response else turn.prompt
    else:
        messages = dataclasses.replace(turn, response=response or None).messages()
        # What follows a response in the template, such as its end marker, is cut off.
        ending = "continue_final_message" if response else "add_generation_prompt"
        text = render_chat(tokenizer, messages, where, CaptureError, **{ending: True})
    tokens = tokenize(tokenizer, text, special=plain)
    if not tokens:
        raise CaptureError(f"{where}: has no tokens; expected a prompt")
    if position == "last":
        return EncodedTurn(tokens, len(tokens) - 1)
    if not text.endswith(response):
        raise CaptureError(f"{where}: the chat template rewrites the response, so its tokens cannot be found")
    before = tokenize(tokenizer, text[: len(text) - len(response)], special=plain)
    same = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), len(before))
    return EncodedTurn(tokens, min(same, len(tokens) - 1))


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Some prompts, padded on the right: what follows a token never reaches it, and its position is its index.

    Attributes:
        rows: Which prompts.
        spans: First position that counts and the one after the last, per prompt.
        ids: Tokens, ``[prompts, tokens]``.
        mask: Ones where there is a token.
    """

    rows: list[int]
    spans: list[tuple[int, int]]
    ids: "torch.Tensor"
    mask: "torch.Tensor"


def make_batches(prompts: Sequence[EncodedTurn], size: int, pad: int) -> list[PromptBatch]:
    """Returns the prompts in batches of at most ``size``, filled up with the token ``pad``."""
    import torch

    # Of one length, as far as possible; the longest first, so that what does not fit fails at once.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].tokens))
    batches = []
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        width = len(prompts[rows[0]].tokens)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            count = len(prompts[row].tokens)
            ids[line, :count] = torch.tensor(prompts[row].tokens)
            mask[line, :count] = 1
        batches.append(PromptBatch(rows, [(prompts[row].start, len(prompts[row].tokens)) for row in rows], ids, mask))
    return batches
