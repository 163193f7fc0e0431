"""Measures what greedy answers hide: how far the distributions of the next token moved, and how text is predicted."""

import dataclasses
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
    "padded",
    "perplexity",
    "record",
    "token_log_likelihoods",
]

#: Tokens of a window of text, and how many of them are scored; the others are what comes before.
_WINDOW = 512
_STRIDE = 256
#: Numbers of distributions over the vocabulary that are held at a time.
_MOST_NUMBERS = 1 << 23
#: Bytes of logits that a recording keeps, so that they are not computed again for each model compared with it.
_MOST_KEPT = 1 << 28
#: Tokens that prompts must have in common for them to be computed once.
_FEWEST_SHARED = 8


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
    def count(self) -> int:
        """How many predictions there are: of each token of the response, and of its end; the first always is one."""
        return max(1, len(self.response) + self.ended)

    @property
    def places(self) -> slice:
        """The positions that predict them."""
        first = len(self.prompt) - 1
        return slice(first, first + self.count)


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model computes over some responses, small enough to be kept when the model is gone.

    The distributions themselves would be a vocabulary of numbers per token; the states from which the output head
    makes them are some hundred times fewer.

    Attributes:
        head: The output head: a copy on the CPU, or the model's own where no edit reaches it.
        states: What it was given at each place of some responses, ``[places, d]`` on the CPU.
        logits: What the model made of them, ``[places, vocabulary]``, for the first of these as far as they were kept.
    """

    head: Any
    states: Sequence["torch.Tensor"]
    logits: Sequence["torch.Tensor"] = ()


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
        copy_head: Keep a copy of the output head, for when the model is gone or its head edited; without, some of the
            logits are kept as well.

    Raises:
        EvaluateError: The model has no output head, or fails.
    """
    import copy

    head = _head(speaker)
    states: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, inputs, _output: states.append(inputs[0][0].cpu()))
    try:
        left = 0 if copy_head else _MOST_KEPT
        for _, logits in _predictions(speaker, forced, batch):
            left -= logits.nbytes
            if left >= 0:
                kept.append(logits)
    finally:
        hook.remove()
    return Recording(copy.deepcopy(head).cpu() if copy_head else head, states, kept)


def divergence(speaker: Speaker, forced: Sequence[Forced], base: Recording, *, batch: int = 1) -> Divergence | None:
    """Compares a model's distributions with those of the recorded one, over the same responses.

    The recorded states go through the recorded head in the place of the model's own, so that whatever the model does
    to the logits after its head is done to both.

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
    own = _head(speaker)
    if len(own.weight) != len(base.head.weight):
        raise EvaluateError(
            f"{speaker.folder}: its vocabulary has {len(own.weight)} tokens, that of the base "
            f"{len(base.head.weight)}, so their distributions cannot be compared; use --no-divergence"
        )
    head = base.head.to(speaker.device)
    first, total, count = 0.0, 0.0, 0
    before = itertools.zip_longest(base.states, base.logits)
    for (rows, found), (states, logits) in zip(_predictions(speaker, forced, batch), before, strict=True):
        # Both in products of one shape, so that they are rounded alike.
        expected = _through(speaker, own, head, states.to(speaker.device)) if logits is None else logits
        values = iter(_kl(expected, found))
        for row in rows:
            moved = list(itertools.islice(values, forced[row].count))
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

    Only what predicts a token of a response goes through the output head.

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
    responses = [dataclasses.replace(each, ended=False) for each in forced]
    for rows, logits in _predictions(speaker, responses, batch):
        wanted = torch.cat([torch.tensor(forced[row].response) for row in rows])
        scores = torch.cat(
            [
                (part.gather(-1, targets[:, None])[:, 0] - part.logsumexp(-1)).cpu().double()
                for part, targets in (
                    (part.float(), targets.to(part.device)) for part, targets in _split(logits, wanted)
                )
            ]
        )
        parts = torch.split(scores, [responses[row].count for row in rows])
        found.update(zip(rows, parts, strict=True))
    return [found[row] for row in range(len(forced))]


def _head(speaker: Speaker) -> Any:
    head = speaker.network.get_output_embeddings()
    if head is None:
        raise EvaluateError(f"{speaker.folder}: transformers finds no output head in the model; use --no-divergence")
    return head


def _predictions(
    speaker: Speaker, forced: Sequence[Forced], batch: int
) -> "Iterator[tuple[Sequence[int], torch.Tensor]]":
    """Yields some rows at a time, with the logits of their predictions, ``[places, vocabulary]``, row after row.

    Those of about one length together, padded on the right. What all prompts begin with is computed once, where the
    model keeps nothing of it but keys and values.
    """
    order = sorted(range(len(forced)), key=lambda row: -len(forced[row].prompt + forced[row].response))
    shared = _Shared.of(speaker, forced)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids, mask, chosen = padded(speaker, [forced[row] for row in rows])
        yield rows, _logits(speaker, ids, mask, chosen, shared)[0]


@dataclass(frozen=True, slots=True)
class _Shared:
    """What some prompts begin with, as a model has read it.

    Attributes:
        tokens: How many tokens it is.
        cache: Their keys and values, of one row; None where there are none.
    """

    tokens: int = 0
    cache: Any = None

    @classmethod
    def of(cls, speaker: Speaker, forced: Sequence[Forced]) -> "_Shared":
        """Reads what prompts have in common, without the last token of any, if that is worth it."""
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        if len(forced) < 2:
            return cls()
        # Of the smallest and the largest, as they are ordered, all others begin with what both begin with.
        least, most = min(each.prompt for each in forced), max(each.prompt for each in forced)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
        common = min(sum(1 for _ in alike), min(len(each.prompt) for each in forced) - 1)
        if common < _FEWEST_SHARED:
            return cls()
        ids = torch.tensor([least[:common]], device=speaker.device)
        with speaker.computing():
            cache = speaker.network.base_model(input_ids=ids, use_cache=True).get("past_key_values")
        keeps = type(cache) is DynamicCache and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        )
        return cls(common, cache) if keeps else cls()

    def rows(self, count: int) -> Any:
        """Returns the keys and values for some rows that go on from them."""
        import copy

        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache


def padded(speaker: Speaker, forced: Sequence[Forced]) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Returns prompts with their responses, ``[rows, tokens]``, ones where there is a token, and which predict."""
    import torch

    width = max(len(each.prompt) + len(each.response) for each in forced)
    ids = torch.full((len(forced), width), speaker.pad)
    mask = torch.zeros_like(ids)
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for line, each in enumerate(forced):
        tokens = each.prompt + each.response
        ids[line, : len(tokens)] = torch.tensor(tokens)
        mask[line, : len(tokens)] = 1
        chosen[line, each.places] = True
    return ids, mask, chosen


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


def _logits(
    speaker: Speaker,
    ids: "torch.Tensor",
    mask: "torch.Tensor",
    chosen: "torch.Tensor",
    shared: _Shared = _Shared(),
) -> "torch.Tensor":
    """Returns the logits of the chosen places alone, ``[1, chosen, vocabulary]``, row after row.

    Args:
        speaker: The model.
        ids: Tokens, ``[rows, tokens]``.
        mask: Ones where there is a token.
        chosen: Whose logits are wanted.
        shared: What all rows begin with, and where no place is chosen.
    """
    head = speaker.network.get_output_embeddings()
    chosen = chosen[:, shared.tokens :].to(speaker.device)
    cache = shared.rows(len(ids))
    # Of a vocabulary of 150,000, the head is a quarter of a small model's work.
    hook = head and head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][chosen][None], *inputs[1:]))
    try:
        with speaker.computing():
            logits: torch.Tensor = speaker.network(
                input_ids=ids[:, shared.tokens :].to(speaker.device),
                attention_mask=mask.to(speaker.device),
                use_cache=cache is not None,
                past_key_values=cache,
            ).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits if hook is not None else logits[chosen][None]


def _kl(expected: "torch.Tensor", found: "torch.Tensor") -> list[float]:
    """Returns KL(expected ‖ found) of each row of logits, in nats.

    In float32, but of differences: of each logit to the other's, and of each to the largest of its row. These are exact
    or nearly so, and the sums of their exponentials are the only numbers that are rounded, by parts in 1e7.
    """
    values: list[float] = []
    for ours, theirs in _split(expected, found):
        x, y = (each.float() - each.max(-1, keepdim=True).values.float() for each in (ours, theirs))
        weights = x.exp()
        whole = weights.sum(-1)
        moved = (weights * (x - y)).where(weights > 0, 0.0).sum(-1) / whole
        values += (moved + y.exp().sum(-1).log() - whole.log()).clamp(min=0).tolist()
    return values


def _logarithms(logits: "torch.Tensor") -> "torch.Tensor":
    """Returns the logarithms of the distributions, in float64, which not every accelerator has."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(-1)


def _split(logits: "torch.Tensor", beside: "torch.Tensor") -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Yields as many rows of both at a time as fit into memory in float64."""
    import torch

    rows = max(1, _MOST_NUMBERS // logits.shape[-1])
    yield from zip(torch.split(logits, rows), torch.split(beside, rows), strict=True)
