"""Loads one model with transformers, asks it greedily through its own chat template, and lets go of it again."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards import __version__
from ablate_shards.errors import EvaluateError, reason
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.machine.devices import resolve_device
from ablate_shards.surgery.model.generation import greedy, greedy_answers
from ablate_shards.surgery.model.loading import (
    UNUSABLE,
    Dtype,
    answering_dtype,
    check_packages,
    end_tokens,
    generating_class,
    load_model,
    most_tokens,
    quiet,
    read_config,
    read_tokenizer,
    render_chat,
    tokenize,
)
from ablate_shards.surgery.model.samples import Question

if TYPE_CHECKING:
    import torch

__all__ = [
    "Dtype",
    "Prompt",
    "Remedies",
    "Speaker",
    "batches",
    "check_transformers",
    "library_versions",
    "model_digest",
    "speaking",
]

#: The files beside the weights that bear on an answer.
_BEARING = ("config.json", "generation_config.json", "tokenizer", "chat_template", "special_tokens", "added_tokens")
_VOCABULARIES = ("vocab", "merges", "spiece", "sentencepiece")

#: Half a character: what a tokenizer makes of bytes that the next token completes.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True)
class Remedies:
    """What helps where memory does not suffice, as the command that asks has it.

    Attributes:
        smaller: The option whose smaller value takes less memory.
        instead: Another way, as the sentence ends.
    """

    smaller: str = "--batch"
    instead: str = "serve the model and use --endpoint"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model sees it.

    Attributes:
        tokens: The chat up to where the model answers.
        thinks: Whether the chat template has opened the model's thoughts already.
    """

    tokens: tuple[int, ...]
    thinks: bool


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model in memory, and its tokenizer.

    Attributes:
        folder: Where it is from.
        network: The model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        device: Where it computes.
        ends: The tokens that end an answer.
        pad: The token to fill up with.
        most: The most tokens that it reads, None if it does not say.
        remedies: What helps where memory does not suffice.
    """

    folder: Path
    network: Any
    tokenizer: Any
    device: "torch.device"
    ends: tuple[int, ...]
    pad: int
    most: int | None
    remedies: Remedies = Remedies()

    def prompt(self, question: Question, *, thinking: bool) -> Prompt:
        """Returns a question as the model's chat template words it.

        Raises:
            EvaluateError: The template refuses it, or it is longer than the model reads.
        """
        where = f"question {question.id}"
        text = render_chat(
            self.tokenizer,
            question.turn.messages(),
            where,
            EvaluateError,
            thinking=thinking,
            add_generation_prompt=True,
        )
        tokens = self.encode(text)
        if self.most is not None and len(tokens) >= self.most:
            raise EvaluateError(
                f"{where}: has {len(tokens)} tokens, but the model reads at most {self.most}; shorten it"
            )
        return Prompt(tokens, text.rstrip().endswith("<think>"))

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the tokens of a text, and no others."""
        return tokenize(self.tokenizer, text)

    def replies(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens: int,
        thoughts: int = 0,
        at_once: int | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> list[Reply]:
        """Answers some prompts, each step with the likeliest token.

        Args:
            prompts: At least one.
            tokens: Most tokens of an answer; fewer where the model reads no more.
            thoughts: Most tokens of the thoughts before it, if it thinks.
            at_once: How many are answered at a time, all if None.
            ended: Is called for each answer that has ended.

        Raises:
            EvaluateError: The device's memory does not suffice, or the model fails.
        """
        with self.computing():
            rows = greedy_answers(
                self.network,
                [prompt.tokens for prompt in prompts],
                [self._room(prompt, tokens + thoughts) for prompt in prompts],
                at_once=at_once or len(prompts),
                ends=self.ends,
                pad=self.pad,
                ended=ended,
            )
        replies = [self._reply(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        return [self._shortened(reply, tokens) for reply in replies] if thoughts else replies

    def stream(self, prompt: Prompt, heard: Callable[[Reply], None], *, tokens: int, thoughts: int = 0) -> Reply:
        """Answers one prompt as ``replies`` does, and tells after every token what the answer is so far.

        Args:
            prompt: What is asked.
            heard: Gets the answer so far, without half a character at its end.
            tokens: Most tokens of the answer; fewer where the model reads no more.
            thoughts: Most tokens of the thoughts before it, if it thinks.

        Raises:
            EvaluateError: The device's memory does not suffice, or the model fails.
        """
        import torch

        def tell(row: list[int]) -> None:
            reply = self._reply(row, prompt)
            heard(Reply(reply.text.rstrip(_INCOMPLETE), reply.ended))

        with self.computing():
            made = self.network.generate(
                input_ids=torch.tensor([prompt.tokens], device=self.device),
                attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.long, device=self.device),
                max_new_tokens=self._room(prompt, tokens + thoughts),
                streamer=_Listener(tell),
            )
        reply = self._reply(made[0, len(prompt.tokens) :].tolist(), prompt)
        return self._shortened(reply, tokens) if thoughts else reply

    def _room(self, prompt: Prompt, tokens: int) -> int:
        """Returns the most tokens that an answer may have."""
        return tokens if self.most is None else min(tokens, self.most - len(prompt.tokens))

    def _reply(self, row: list[int], prompt: Prompt) -> Reply:
        end = next((place for place, token in enumerate(row) if token in self.ends), None)
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Reply(f"<think>{text}" if prompt.thinks else text, end is not None)

    def _shortened(self, reply: Reply, tokens: int) -> Reply:
        """Cuts an answer that took up room which its thoughts had left."""
        thoughts, closed, answer = reply.text.rpartition("</think>")
        said = self.encode(answer)
        if len(said) <= tokens:
            return reply
        cut = self.tokenizer.decode(said[:tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Reply(f"{thoughts}{closed}{cut}", ended=False)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Computes without gradients; what the model raises meanwhile is one sentence.

        Raises:
            EvaluateError: The device's memory does not suffice, or the model fails.
        """
        import torch

        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise EvaluateError(
                f"{self.folder}: the memory of {self.device} does not suffice; use a smaller {self.remedies.smaller}, "
                f"another --device, or {self.remedies.instead}"
            ) from error
        except UNUSABLE as error:
            raise EvaluateError(f"{self.folder}: the model fails to compute: {reason(error)}") from error


@dataclass(slots=True)
class _Listener:
    """Receives the tokens of one answer as transformers makes them, the prompt first."""

    tell: Callable[[list[int]], None]
    row: list[int] = field(default_factory=list)
    asked: bool = False

    def put(self, value: "torch.Tensor") -> None:
        if self.asked:
            self.row += value.flatten().tolist()
            self.tell(self.row)
        self.asked = True

    def end(self) -> None:
        """Does nothing: what the answer is in full, the caller has."""


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Returns which prompts are answered together: as few parts of at most ``size`` as there can be, of like lengths.

    Rounding depends on what else is computed at a time, so the parts depend on the prompts alone, and not on what was
    answered before.
    """
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number].tokens), number))
    count = -(-len(order) // size)
    return [order[len(order) * part // count : len(order) * (part + 1) // count] for part in range(count)]


def model_digest(checkpoint: Checkpoint) -> str:
    """Returns the digest of all bytes that bear on a model's answers: weights, configuration, tokenizer, template."""
    digest = hashlib.sha256()
    sidecars = [
        name
        for name in checkpoint.sidecars
        if "/" not in name and (name.startswith(_BEARING) or name.startswith(_VOCABULARIES))
    ]
    for name in sorted([*sidecars, *(shard.name for shard in checkpoint.shards)]):
        with (checkpoint.root / name).open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def check_transformers() -> None:
    """Refuses to run a model without transformers.

    Raises:
        EvaluateError: It is not installed.
    """
    check_packages(
        "evaluate runs the model with transformers",
        "transformers",
        error=EvaluateError,
        instead=", or serve the model and use --endpoint",
    )


def library_versions() -> dict[str, str]:
    """Returns the versions of what computes answers.

    Raises:
        EvaluateError: It is not installed.
    """
    check_transformers()
    import torch
    import transformers

    return {"ablate-shards": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def speaking(folder: Path, *, dtype: Dtype, device: str, remedies: Remedies = Remedies()) -> Iterator[Speaker]:
    """Holds a model in memory while the context lasts; no code from the checkpoint runs, and nothing is fetched.

    Args:
        folder: A checkpoint folder with tokenizer and chat template.
        dtype: What to compute in; ``auto``: what is stored, but float32 on a CPU without instructions for it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        remedies: What helps where memory does not suffice.

    Raises:
        EvaluateError: transformers is not installed, or cannot use the model or its tokenizer.
        UsageError: There is no such device.
    """
    check_transformers()
    import torch

    chosen = resolve_device(device)
    with quiet():
        speaker = _load(folder, dtype, chosen, remedies)
        try:
            yield speaker
        finally:
            speaker.network.to("meta")
            if chosen.type == "cuda":
                torch.cuda.empty_cache()


def _load(folder: Path, dtype: Dtype, device: "torch.device", remedies: Remedies) -> Speaker:
    import torch

    tokenizer = read_tokenizer(folder, EvaluateError)
    config = read_config(folder, EvaluateError)
    kind = answering_dtype(dtype, config, device)
    try:
        network, missing = load_model(
            folder,
            generating_class(config),
            EvaluateError,
            config=config,
            dtype=kind if kind == "auto" else getattr(torch, kind),
        )
        network = network.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise EvaluateError(
            f"{folder}: does not fit into the memory of {device}; use another --device, or {remedies.instead}"
        ) from error
    if missing:
        raise EvaluateError(f"{folder}: the checkpoint holds no weight for {missing[0]}; complete the checkpoint")
    ends = end_tokens(network.generation_config.eos_token_id, tokenizer.eos_token_id)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    # The checkpoint's own configuration may ask for sampling and penalties.
    network.generation_config = greedy(ends, pad, bos_token_id=tokenizer.bos_token_id)
    return Speaker(folder, network, tokenizer, device, ends, pad, most_tokens(config), remedies)
