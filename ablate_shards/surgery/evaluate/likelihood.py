"""Measures what greedy answers hide: how far the distributions of the next token moved, and how text is predicted."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.answers import Speaker

if TYPE_CHECKING:
    import torch

__all__ = [
    "Divergence",
    "Forced",
    "Perplexity",
    "Recording",
    "divergence",
    "log_likelihoods",
    "perplexity",
    "record",
    "token_log_likelihoods",
]

#: Tokens of a window of text, and how many of them are scored; the others are what comes before.
_WINDOW = 512
_STRIDE = 256
#: Numbers of float64 held at a time for distributions over the vocabulary: 64 MiB each.
_MOST_NUMBERS = 1 << 23


@dataclass(frozen=True, slots=True)
class Forced:
    """A prompt and a given response, whose tokens a model is to predict.

    Attributes:
        prompt: Tokens of the chat up to where the model answers.
        response: Tokens of the response, possibly none.
        ended: Whether the response is complete, so that its end is a prediction to compare too.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    ended: bool

    @property
    def places(self) -> slice:
        """The positions that predict a token of the response, or its end; the first always is one."""
        first = len(self.prompt) - 1
        return slice(first, first + max(1, len(self.response) + self.ended))


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model computes over some responses, small enough to be kept when the model is gone.

    The distributions themselves would be a vocabulary of numbers per token; the states from which the output head
    makes them are some hundred times fewer.

    Attributes:
        head: The output head: a copy on the CPU, or the model's own where no edit reaches it.
        states: What it was given at each place of each response, ``[places, d]`` on the CPU.
    """

    head: Any
    states: Sequence["torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(base ‖ edited) of the distributions of the next token, in nats.

    Attributes:
        first: Mean over the prompts, at the first token of the response.
        tokens: Mean over all tokens of all responses, their ends included.
        prompts: How many prompts.
        count: How many tokens.
    """

    first: float
    tokens: float
    prompts: int
    count: int


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nats: Mean negative log-likelihood of a token.
        tokens: How many tokens were predicted.
    """

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity, infinite where it is beyond a float."""
        return math.exp(self.nats) if self.nats < 709 else math.inf


def record(speaker: Speaker, forced: Sequence[Forced], *, batch: int = 1, copy_head: bool = True) -> Recording:
    """Runs a model over responses and keeps what its output head is given.

    Args:
        speaker: The model.
        forced: The responses.
        batch: How many are computed at a time.
        copy_head: Keep a copy of the output head, for when the model is gone or its head edited.

    Raises:
        EvaluateError: The model has no output head, or fails.
    """
    import copy

    head = _head(speaker)
    states = [each.cpu() for rows in _cut(forced, batch) for each in _states(speaker, head, rows)]
    return Recording(copy.deepcopy(head).cpu() if copy_head else head, states)


def divergence(speaker: Speaker, forced: Sequence[Forced], base: Recording, *, batch: int = 1) -> Divergence | None:
    """Compares a model's distributions with those of the recorded one, over the same responses.

    The recorded states go through the recorded head in the place of the model's own, so that whatever the model does
    to the logits after its head is done to both. Log-softmax and sums in float64.

    Args:
        speaker: The model to compare.
        forced: What was recorded, at least one.
        base: The recording.
        batch: How many are computed at a time, as for the recording.

    Returns:
        The divergence, or None where a distribution is not one (not a number).

    Raises:
        EvaluateError: The vocabularies differ, or the model fails.
    """
    import torch

    own = _head(speaker)
    if len(own.weight) != len(base.head.weight):
        raise EvaluateError(
            f"{speaker.folder}: its vocabulary has {len(own.weight)} tokens, that of the base "
            f"{len(base.head.weight)}, so their distributions cannot be compared; use --no-divergence"
        )
    head = base.head.to(speaker.device)
    first, total, count = 0.0, 0.0, 0
    recorded = iter(base.states)
    for rows in _cut(forced, batch):
        states = _states(speaker, own, rows)
        before = [next(recorded).to(speaker.device) for _ in rows]
        # Both in products of one shape, so that they are rounded alike.
        found = _through(speaker, own, own, torch.cat(states))
        expected = _through(speaker, own, head, torch.cat(before))
        values = iter(_kl(expected, found))
        for each in states:
            moved = list(itertools.islice(values, len(each)))
            first += moved[0]
            total += math.fsum(moved)
            count += len(moved)
    if not math.isfinite(total):
        return None
    return Divergence(first / len(forced), total / count, len(forced), count)


def perplexity(speaker: Speaker, text: str) -> Perplexity | None:
    """Measures how well a model predicts a plain text, without any chat template.

    The text is read in windows of 512 tokens that overlap by half, each token predicted from at least 256 before it
    where there are as many; sums in float64. The first token, or the one after the model's own opening token, is not
    predicted from nothing.

    Args:
        speaker: The model.
        text: Plain text.

    Returns:
        The perplexity, or None where the model gives no numbers.

    Raises:
        EvaluateError: The text has no two tokens, or the model fails.
    """
    import torch

    opening = speaker.tokenizer.bos_token_id
    tokens = (() if opening is None else (opening,)) + speaker.encode(text)
    if len(tokens) < 2:
        raise EvaluateError("the text for the perplexity is too short; expected some sentences")
    window = _WINDOW if speaker.most is None else max(2, min(_WINDOW, speaker.most))
    nats, done, start = 0.0, 1, 0
    while done < len(tokens):
        piece = tokens[start : start + window]
        fresh = slice(done - start - 1, len(piece) - 1)
        targets = torch.tensor(piece[fresh.start + 1 :])
        logits = _logits_of(speaker, Forced(piece, (), ended=False), fresh)
        for rows, wanted in _split(logits, targets):
            nats -= float(_logarithms(rows).cpu().gather(-1, wanted[:, None]).sum())
        done = start + len(piece)
        start = max(0, done - (window - min(_STRIDE, window // 2)))
    return Perplexity(nats / (len(tokens) - 1), len(tokens) - 1) if math.isfinite(nats) else None


def log_likelihoods(speaker: Speaker, forced: Sequence[Forced], *, batch: int) -> list[float | None]:
    """Returns how likely a model finds each response, whether or not it would have given it.

    Padded on the right: what follows a token never reaches it. Only what predicts a token of a response goes through
    the output head.

    Args:
        speaker: The model.
        forced: Prompts and responses, none of these empty; ``ended`` is not looked at.
        batch: How many are computed at a time.

    Returns:
        For each the mean log-probability of its tokens, in nats, summed in float64; None where it is not a number.

    Raises:
        EvaluateError: The model has no output head, its memory does not suffice, or it fails.
    """
    means = (float(scores.mean()) for scores in token_log_likelihoods(speaker, forced, batch=batch))
    return [mean if math.isfinite(mean) else None for mean in means]


def token_log_likelihoods(speaker: Speaker, forced: Sequence[Forced], *, batch: int) -> "list[torch.Tensor]":
    """Returns the log-probability of each token of each response, in nats, float64 on the CPU; see ``log_likelihoods``.

    Raises:
        EvaluateError: The model has no output head, its memory does not suffice, or it fails.
    """
    import torch

    found: dict[int, torch.Tensor] = {}
    # Of one length, as far as possible.
    order = sorted(range(len(forced)), key=lambda row: -len(forced[row].prompt + forced[row].response))
    for at in range(0, len(order), batch):
        rows = [forced[row] for row in order[at : at + batch]]
        ids, mask = _padded(speaker, rows)
        predicts = torch.zeros_like(ids, dtype=torch.bool)
        for line, each in enumerate(rows):
            predicts[line, len(each.prompt) - 1 : len(each.prompt) + len(each.response) - 1] = True
        logits = _logits(speaker, ids, mask, predicts)[0]
        wanted = torch.cat([torch.tensor(each.response) for each in rows])
        scores = torch.cat(
            [
                (part.gather(-1, targets[:, None])[:, 0] - part.logsumexp(-1)).cpu().double()
                for part, targets in (
                    (part.float(), targets.to(part.device)) for part, targets in _split(logits, wanted)
                )
            ]
        )
        parts = torch.split(scores, [len(each.response) for each in rows])
        found.update(zip(order[at : at + batch], parts, strict=True))
    return [found[row] for row in range(len(forced))]


def _head(speaker: Speaker) -> Any:
    head = speaker.network.get_output_embeddings()
    if head is None:
        raise EvaluateError(f"{speaker.folder}: transformers finds no output head in the model; use --no-divergence")
    return head


def _states(speaker: Speaker, head: Any, forced: Sequence[Forced]) -> "list[torch.Tensor]":
    """Returns what the output head is given at the places of each response, ``[places, d]``; padded on the right."""
    import torch

    ids, mask = _padded(speaker, forced)
    one = torch.zeros_like(mask, dtype=torch.bool)
    one[0, 0] = True
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        _logits(speaker, ids, mask, one)
    finally:
        hook.remove()
    return [seen[0][row, each.places] for row, each in enumerate(forced)]


def _padded(speaker: Speaker, forced: Sequence[Forced]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Returns prompts with their responses, ``[rows, tokens]``, and ones where there is a token."""
    import torch

    width = max(len(each.prompt) + len(each.response) for each in forced)
    ids = torch.full((len(forced), width), speaker.pad)
    mask = torch.zeros_like(ids)
    for line, each in enumerate(forced):
        tokens = each.prompt + each.response
        ids[line, : len(tokens)] = torch.tensor(tokens)
        mask[line, : len(tokens)] = 1
    return ids, mask


def _cut(forced: Sequence[Forced], batch: int) -> Iterator[Sequence[Forced]]:
    """Yields responses in their order, some at a time."""
    for start in range(0, len(forced), batch):
        yield forced[start : start + batch]


def _through(speaker: Speaker, own: Any, head: Any, states: "torch.Tensor") -> "torch.Tensor":
    """Returns the logits that the model makes of some states with one head or another, ``[places, vocabulary]``.

    The model runs on one token, and what its own head makes of that is replaced.
    """
    hook = own.register_forward_hook(lambda _module, _inputs, _output: head.forward(states[None]))
    try:
        return _logits_of(speaker, Forced((0,), (), ended=False), slice(0, 1))
    finally:
        hook.remove()


def _logits_of(speaker: Speaker, forced: Forced, places: slice) -> "torch.Tensor":
    """Returns the logits at some places of one prompt with its response, ``[places, vocabulary]``."""
    import torch

    ids = torch.tensor([forced.prompt + forced.response])
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[0, places] = True
    return _logits(speaker, ids, torch.ones_like(ids), chosen)[0]


def _logits(speaker: Speaker, ids: "torch.Tensor", mask: "torch.Tensor", chosen: "torch.Tensor") -> "torch.Tensor":
    """Returns the logits of the chosen places alone, ``[1, chosen, vocabulary]``, row after row.

    Args:
        speaker: The model.
        ids: Tokens, ``[rows, tokens]``.
        mask: Ones where there is a token.
        chosen: Whose logits are wanted.
    """
    head = speaker.network.get_output_embeddings()
    chosen = chosen.to(speaker.device)
    # Of a vocabulary of 150,000, the head is a quarter of a small model's work.
    hook = head and head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][chosen][None], *inputs[1:]))
    try:
        with speaker.computing():
            logits: torch.Tensor = speaker.network(
                input_ids=ids.to(speaker.device), attention_mask=mask.to(speaker.device), use_cache=False
            ).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits if hook is not None else logits[chosen][None]


def _kl(expected: "torch.Tensor", found: "torch.Tensor") -> list[float]:
    """Returns KL(expected ‖ found) of each row of logits, in nats."""
    values: list[float] = []
    for ours, theirs in _split(expected, found):
        logp, logq = _logarithms(ours), _logarithms(theirs)
        p = logp.exp()
        # Where p is zero, so is its part, even if both logarithms are infinite.
        values += (p * (logp - logq)).where(p > 0, 0.0).sum(-1).clamp(min=0).tolist()
    return values


def _logarithms(logits: "torch.Tensor") -> "torch.Tensor":
    """Returns the logarithms of the distributions, in float64, which not every accelerator has."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(-1)


def _split(logits: "torch.Tensor", beside: "torch.Tensor") -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Yields as many rows of both at a time as fit into memory in float64."""
    import torch

    rows = max(1, _MOST_NUMBERS // logits.shape[-1])
    yield from zip(torch.split(logits, rows), torch.split(beside, rows), strict=True)
