"""Answers many prompts greedily: where an answer ends, the next prompt takes its place in the batch."""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate_shards.surgery.model.loading import pad_left

if TYPE_CHECKING:
    import torch

__all__ = ["greedy", "greedy_answers"]

#: Share of a batch that has to be free before new prompts are read: the weights are read once more for each reading.
_FREE = 4


def greedy(ends: Sequence[int], pad: int, **settings: Any) -> Any:
    """Returns the configuration with which transformers takes the likeliest token each time."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, eos_token_id=list(ends) or None, pad_token_id=pad, **settings)


def greedy_answers(
    network: Any,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    *,
    at_once: int,
    ends: Sequence[int],
    pad: int,
    ended: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, the likeliest each time, up to and with the first that ends it.

    A step costs the reading of all weights, and little more for each row. So a batch is kept full: where answers have
    ended, their rows leave it and the next prompts come in. What is computed at a time depends on the prompts and
    ``at_once`` alone. A model whose memory of a text is not kept in rows, or that is called in a way of its own, is
    given to transformers' ``generate``, ``at_once`` prompts after another.

    Args:
        network: The model, in evaluation mode; gradients must be off.
        prompts: Tokens of each prompt, read in this order.
        most: The most tokens of each answer, at least one.
        at_once: The most that are answered at a time.
        ends: The tokens that end an answer.
        pad: The token to fill up with.
        ended: Is called for each answer that has ended.
    """
    batch = _Batch(network, pad)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))

    def go_on(numbers: Sequence[int], tokens: "torch.Tensor") -> list[int]:
        """Adds a token to some answers, and returns the places of those that have not ended."""
        left = []
        for place, (number, token) in enumerate(zip(numbers, tokens.tolist(), strict=True)):
            answers[number].append(token)
            if token in ends or len(answers[number]) == most[number]:
                ended()
            else:
                left.append(place)
        return left

    while waiting or batch.numbers:
        free = at_once - len(batch.numbers)
        if waiting and (free >= max(1, at_once // _FREE) or not batch.numbers):
            numbers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            fresh = batch.read(numbers, [prompts[number] for number in numbers])
            if fresh is None:
                rest = [*numbers, *waiting]
                for number, tokens in _generate(network, rest, prompts, most, at_once=at_once, ends=ends, pad=pad):
                    answers[number] = tokens
                    ended()
                return answers
            batch.join(fresh.kept(go_on(numbers, fresh.last)))
        else:
            batch.keep(go_on(batch.numbers, batch.step()))
    return answers


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some prompts as far as a model has read and answered them.

    Attributes:
        numbers: Which prompts.
        cache: What the model keeps of each row.
        mask: Ones where a row has a token, ``[rows, tokens]``; rows end together.
        last: The token that each row has just got, ``[rows]``.
    """

    numbers: list[int]
    cache: Any
    mask: "torch.Tensor"
    last: "torch.Tensor"

    def kept(self, places: Sequence[int]) -> "_Rows | None":
        """Returns the rows at some places, without the columns that none of them needs; None where there are none."""
        import torch

        if not places:
            return None
        if len(places) == len(self.numbers):
            return self
        chosen = torch.tensor(places, device=self.mask.device)
        mask = self.mask[chosen]
        width = mask.shape[1] - int(mask.any(0).int().argmax())
        self.cache.reorder_cache(chosen)
        for layer in self.cache.layers:
            _narrow(layer, width)
        return _Rows([self.numbers[place] for place in places], self.cache, mask[:, -width:], self.last[chosen])

    def joined(self, others: "_Rows") -> "_Rows":
        """Returns these rows and others below them, which the shorter ones of them are padded for on the left."""
        import torch

        width = max(self.mask.shape[1], others.mask.shape[1])
        masks = [torch.nn.functional.pad(each, (width - each.shape[1], 0)) for each in (self.mask, others.mask)]
        for mine, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            _join(mine, theirs)
        return _Rows(
            [*self.numbers, *others.numbers], self.cache, torch.cat(masks), torch.cat([self.last, others.last])
        )


class _Batch:
    """The rows that a model is answering."""

    def __init__(self, network: Any, pad: int) -> None:
        self._network, self._pad = network, pad
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(network) else {}
        self._rows: _Rows | None = None

    @property
    def numbers(self) -> list[int]:
        """Which prompts they are."""
        return [] if self._rows is None else self._rows.numbers

    def read(self, numbers: list[int], prompts: Sequence[Sequence[int]]) -> _Rows | None:
        """Reads some prompts; returns None where their rows could not join others."""
        if not _is_called_as_usual(self._network):
            return None
        ids, mask = (each.to(self._network.device) for each in pad_left(prompts, self._pad))
        output = self._call(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None)
        cache = output.past_key_values
        return _Rows(numbers, cache, mask, _likeliest(output)) if _is_of_rows(cache) else None

    def join(self, fresh: _Rows | None) -> None:
        """Adds rows that have just been read."""
        self._rows = fresh if self._rows is None else self._rows if fresh is None else self._rows.joined(fresh)

    def step(self) -> "torch.Tensor":
        """Reads the last token of each row; returns the next one of each."""
        import torch

        rows = self._rows
        if rows is None:
            raise IndexError("a batch without rows has no next step")
        mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.numbers), 1)], dim=-1)
        output = self._call(rows.last[:, None], mask, mask.sum(-1, keepdim=True) - 1, rows.cache)
        self._rows = _Rows(rows.numbers, rows.cache, mask, _likeliest(output))
        return self._rows.last

    def keep(self, places: Sequence[int]) -> None:
        """Lets all rows go but those at some places."""
        self._rows = self._rows and self._rows.kept(places)

    def _call(self, ids: "torch.Tensor", mask: "torch.Tensor", positions: "torch.Tensor", cache: Any) -> Any:
        return self._network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._only_last,
        )


def _parameters(network: Any) -> Any:
    return inspect.signature(network.forward).parameters


def _likeliest(output: Any) -> "torch.Tensor":
    tokens: torch.Tensor = output.logits[:, -1].float().argmax(-1)
    return tokens


def _is_called_as_usual(network: Any) -> bool:
    """Returns whether ``generate`` would call a model with tokens, a mask and positions, and change nothing in it."""
    from transformers import GenerationMixin

    usual = type(network).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    # On an accelerator, generate has experts computed in another way; older versions of transformers do not.
    experts = getattr(network, "get_experts_implementation", dict[str, str])()
    switched = network.device.type != "cpu" and "grouped_mm" in experts.values()
    return usual and not switched and "position_ids" in _parameters(network)


def _is_of_rows(cache: Any) -> bool:
    """Returns whether all that a model keeps of a text are keys and values, or states, of each row."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    return type(cache) is DynamicCache and all(
        # Older versions of transformers keep other states.
        type(layer) in kinds and isinstance(getattr(layer, "conv_states", {}), dict)
        for layer in cache.layers
    )


def _narrow(layer: Any, width: int) -> None:
    """Leaves out what a layer keeps of all tokens before the last ``width``; states have no tokens."""
    if getattr(layer, "keys", None) is None:
        return
    layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
    if layer.is_sliding:
        layer.cumulative_length = min(layer.cumulative_length, width)


def _join(mine: Any, theirs: Any) -> None:
    """Adds the rows of one layer's memory to another's."""
    import torch

    if hasattr(mine, "conv_states"):
        for states, others in (
            (mine.conv_states, theirs.conv_states),
            (mine.recurrent_states, theirs.recurrent_states),
        ):
            for number in states:
                if states[number] is not None:
                    states[number] = torch.cat([states[number], others[number]])
        return
    # Layers that share the keys of others keep none.
    if mine.keys is None:
        return
    width = max(mine.keys.shape[-2], theirs.keys.shape[-2])

    def joined(*each: "torch.Tensor") -> "torch.Tensor":
        return torch.cat([torch.nn.functional.pad(one, (0, 0, width - one.shape[-2], 0)) for one in each])

    mine.keys, mine.values = joined(mine.keys, theirs.keys), joined(mine.values, theirs.values)
    if mine.is_sliding:
        mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)


def _generate(
    network: Any,
    numbers: Sequence[int],
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    *,
    at_once: int,
    ends: Sequence[int],
    pad: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yields some prompts' numbers with their answers by transformers' ``generate``, a batch until all have ended."""
    # What is said to generate does not keep it from taking penalties from the checkpoint's own configuration.
    own, network.generation_config = network.generation_config, greedy(ends, pad)
    try:
        for start in range(0, len(numbers), at_once):
            rows = numbers[start : start + at_once]
            ids, mask = pad_left([prompts[row] for row in rows], pad)
            made = network.generate(
                input_ids=ids.to(network.device),
                attention_mask=mask.to(network.device),
                max_new_tokens=max(most[row] for row in rows),
            )
            for row, tokens in zip(rows, made[:, ids.shape[1] :].tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
                yield row, tokens[: min(end or most[row], most[row])]
    finally:
        network.generation_config = own
