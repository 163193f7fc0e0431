"""Runs a source and its edited output on prompts: what layers add along the removed directions, and what it cost."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablate_shards.errors import EvaluateError, VerifyError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.directions.vectors import span
from ablate_shards.surgery.edit.receipt import Receipt
from ablate_shards.surgery.plan.bases import resolve_bases
from ablate_shards.surgery.plan.edits import TensorEdit

if TYPE_CHECKING:
    import torch

    from ablate_shards.surgery.evaluate.answers import Speaker
    from ablate_shards.surgery.evaluate.likelihood import Forced

__all__ = ["LayerRun", "RunProof", "prove_by_running", "read_prompts"]

_BATCH = 8
_FEWEST_TOKENS = 2


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What an edited layer does to the residual stream along the directions that were removed from it.

    Attributes:
        layer: The decoder layer.
        added_before: Share of the length of what it adds that lies along them, in the source, mean over all tokens.
        added_after: The same in the output.
        stream_before: The same of the stream after it, in the source.
        stream_after: The same in the output.
    """

    layer: int
    added_before: float
    added_after: float
    stream_before: float
    stream_after: float


@dataclass(frozen=True, slots=True)
class RunProof:
    """What running both showed.

    Attributes:
        layers: The edited layers.
        divergence: KL(source ‖ output) of the next token, mean over all tokens, in nats.
        tokens: How many tokens were predicted.
        prompts: How many prompts were read.
    """

    layers: tuple[LayerRun, ...]
    divergence: float
    tokens: int
    prompts: int


def read_prompts(path: Path) -> list[str]:
    """Returns the lines of a text that are not empty.

    Raises:
        VerifyError: It cannot be read, or holds none.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VerifyError(
            f"{path}: cannot be read as UTF-8 text ({error}); name a file with a prompt a line"
        ) from error
    if not prompts:
        raise VerifyError(f"{path}: holds no line of text; expected a prompt a line")
    return prompts


def prove_by_running(
    checkpoint: Checkpoint, out: Path, receipt: Receipt, prompts: Sequence[str], *, device: str
) -> RunProof:
    """Runs the source and the output on the same tokens.

    Args:
        checkpoint: The source, a folder on this machine with its tokenizer.
        out: The output.
        receipt: The receipt of the ablation.
        prompts: Plain texts, read as they are.
        device: Where to compute.

    Raises:
        EvaluateError: transformers is not installed or cannot use one of the models.
        VerifyError: A prompt has too few tokens, no decoder layer was edited, or a model gives no numbers.
    """
    from ablate_shards.surgery.evaluate.answers import speaking
    from ablate_shards.surgery.evaluate.likelihood import divergence, record

    bases = _bases_by_layer(checkpoint, receipt)
    if not bases:
        raise VerifyError(f"{out}: no decoder layer of it was edited, so running it has nothing to show")
    with speaking(checkpoint.root, dtype="auto", device=device) as source:
        forced = [_forced(source, prompt) for prompt in prompts]
        with _watching(source, bases) as before:
            recording = record(source, forced, batch=_BATCH)
    with speaking(out, dtype="auto", device=device) as edited, _watching(edited, bases) as after:
        moved = divergence(edited, forced, recording, batch=_BATCH)
    if moved is None:
        raise VerifyError(f"{out}: gives values that are not finite on these prompts; evaluate it, or edit less")
    layers = tuple(
        LayerRun(layer, before[layer].added, after[layer].added, before[layer].stream, after[layer].stream)
        for layer in sorted(bases)
    )
    return RunProof(layers, moved.tokens, moved.count, len(prompts))


def _forced(speaker: "Speaker", prompt: str) -> "Forced":
    """Returns a text as the prediction of each of its tokens from those before."""
    from ablate_shards.surgery.evaluate.likelihood import Forced

    tokens = speaker.encode(prompt)[: speaker.most]
    if len(tokens) < _FEWEST_TOKENS:
        raise VerifyError(f"the prompt {prompt!r} has too few tokens for the model to predict one; make it longer")
    return Forced(tokens[:1], tokens[1:], ended=False)


def _bases_by_layer(checkpoint: Checkpoint, receipt: Receipt) -> Mapping[int, np.ndarray]:
    """Returns what was removed from each layer as directions of the stream, ``[k, d]`` float64, orthonormal rows."""
    edits: dict[int, list[TensorEdit]] = {}
    for edit in receipt.edits:
        if edit.layer is not None and not edit.mtp and edit.coefficient:
            # A basis that was carried through a gain is one of what the gain is given, not of the stream.
            plain = dataclasses.replace(edit, basis=dataclasses.replace(edit.basis, gain=None, gain_offset=0.0))
            edits.setdefault(edit.layer, []).append(plain)
    every = [edit for found in edits.values() for edit in found]
    bases = resolve_bases(every, checkpoint, receipt.directions)
    return {
        layer: span(itertools.chain.from_iterable(bases[edit.basis] for edit in found), bases[found[0].basis].shape[1])
        for layer, found in edits.items()
    }


class _Shares:
    """What share of what a layer adds, and of the stream after it, lies along its directions; means over tokens.

    Of each token by itself: the first of a text is often hundreds of times as long as the others.
    """

    def __init__(self, basis: np.ndarray) -> None:
        self._basis = basis
        self._added = self._stream = 0.0
        self._tokens = 0

    def add(self, old: "torch.Tensor", new: "torch.Tensor") -> None:
        """Takes the stream before and after the layer, ``[tokens, d]``."""
        self._added += self._sum(new.float() - old.float())
        self._stream += self._sum(new.float())
        self._tokens += len(new)

    def _sum(self, states: "torch.Tensor") -> float:
        import torch

        along = states @ torch.from_numpy(self._basis).to(states.device, torch.float32).T
        lengths = states.norm(dim=-1)
        return float((along.norm(dim=-1) / lengths.where(lengths > 0, 1.0)).double().sum())

    @property
    def added(self) -> float:
        """The share of what was added."""
        return self._added / max(1, self._tokens)

    @property
    def stream(self) -> float:
        """The share of the stream."""
        return self._stream / max(1, self._tokens)


@contextmanager
def _watching(speaker: "Speaker", bases: Mapping[int, np.ndarray]) -> "Iterator[Mapping[int, _Shares]]":
    """Measures what layers add while the context lasts, of the tokens that are not filled up with."""
    from ablate_shards.surgery.model.loading import decoder_layers

    _, layers = decoder_layers(speaker.folder, speaker.network, EvaluateError)
    shares = {layer: _Shares(basis) for layer, basis in bases.items()}
    mask: list[Any] = []

    def keep_mask(_: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
        mask[:] = [kwargs["attention_mask"].bool()]

    def measure(layer: int, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        old = args[0] if args else kwargs["hidden_states"]
        new = output[0] if isinstance(output, tuple) else output
        if old.shape[1] > 1:  # a single token stands for none: it only carries states to the output head
            chosen = mask[0].to(old.device)
            shares[layer].add(old[chosen], new[chosen])

    hooks = [speaker.network.register_forward_pre_hook(keep_mask, with_kwargs=True)]
    hooks += [
        layers[layer].register_forward_hook(
            lambda _, args, kwargs, output, layer=layer: measure(layer, args, kwargs, output), with_kwargs=True
        )
        for layer in bases
    ]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
