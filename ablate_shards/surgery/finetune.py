"""Fine-tunes a checkpoint with LoRA through peft and transformers' Trainer, on the responses alone."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, FinetuneError, Interrupted, UsageError
from ablate_shards.surgery.adapter import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME, base_digest
from ablate_shards.surgery.checkpoint import Checkpoint, files_of, open_checkpoint
from ablate_shards.surgery.editor import resolve_device
from ablate_shards.surgery.samples import Instruction
from ablate_shards.surgery.staging import Staging, check_out, fsync_folder, locked

if TYPE_CHECKING:
    import torch

__all__ = ["SEVEN", "Epoch", "FinetuneOptions", "Finetuned", "Progress", "Targets", "finetune"]

Targets = Literal["auto"] | tuple[str, ...]

#: The projections of an ordinary decoder layer, without ``_proj``.
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")

_FORMAT = "ablate-shards.training/1"
_IGNORED = -100
_CHECKPOINTS = "trainer"
#: Bytes per trained number: itself, its gradient and Adam's two moments, all in float32.
_TRAINED_BYTES = 16
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_MOST_NAMES = 12
_OURS_NOT_THEIRS = r"(peft|transformers|accelerate|torch)\b"
#: What transformers, peft and torch raise for a model or a tokenizer that they cannot use.
_UNUSABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, RuntimeError, ImportError)


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """What to train, and how.

    Attributes:
        rank: Rank of each adapter.
        alpha: Its scale: the change is ``alpha / rank`` times ``B A``.
        dropout: Share of an adapter's inputs that are dropped in training.
        targets: Linear modules of the decoder layers by the end of their name, with or without ``_proj``;
            ``auto`` takes all but the routers.
        epochs: Times that each sample is seen.
        learning_rate: At the first step; it falls linearly to zero.
        length: Most tokens of a sample; longer responses are cut.
        batch: Samples computed at a time.
        accumulate: Batches per step.
        seed: Of the split, the order, the adapters' first values and dropout.
        evaluation_share: Share of each kind of sample that is not trained on.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (rank-stabilised LoRA).
        gradient_checkpointing: Compute activations twice to keep fewer of them; on a GPU if None.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``.
        resume: Go on with an interrupted run.
        overwrite: Replace an adapter that an earlier run made.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: Targets = SEVEN
    epochs: int = 3
    learning_rate: float = 2e-4
    length: int = 512
    batch: int = 2
    accumulate: int = 4
    seed: int = 0
    evaluation_share: float = 0.1
    rslora: bool = False
    gradient_checkpointing: bool | None = None
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Epoch:
    """The losses around one pass over the data, in nats per token.

    Attributes:
        number: Which pass; 0 is before the first step.
        training: Mean over the steps of the pass, None before the first.
        evaluation: Mean over the samples held out, by kind.
    """

    number: int
    training: float | None
    evaluation: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What was trained.

    Attributes:
        adapter: The folder.
        modules: How many modules have an adapter.
        parameters: How many numbers were trained.
        samples: Samples trained on.
        held_out: Samples evaluated on.
        truncated: Names of the samples whose response was cut.
        losses: The training loss of every step.
        epochs: The losses around every epoch.
        resumed: Steps taken over from an interrupted run.
    """

    adapter: Path
    modules: int
    parameters: int
    samples: int
    held_out: int
    truncated: tuple[str, ...]
    losses: tuple[float, ...]
    epochs: tuple[Epoch, ...]
    resumed: int


class Progress(Protocol):
    """Hears how far a training has come."""

    def count(self, done: int, total: int) -> None:
        """Says that some of so many steps are done."""

    def note(self, text: str) -> None:
        """Says something in one line."""


def finetune(
    model: Path, adapter: Path, data: Sequence[Instruction], options: FinetuneOptions, progress: Progress
) -> Finetuned:
    """Trains a LoRA adapter on the responses of ``data`` and writes it as a peft folder.

    No code from the checkpoint runs, and nothing is fetched. The folder appears complete or not at all; its bytes
    depend on the model, the data, the options, the device and the versions of torch, transformers and peft alone.

    Args:
        model: A checkpoint folder with tokenizer and chat template; never written to.
        adapter: The folder to make: ``adapter_config.json``, ``adapter_model.safetensors`` (float32) and
            ``training.json``.
        data: The samples, of all kinds.
        options: What to train, and how.
        progress: Hears how far the run has come.

    Returns:
        What was trained, and the loss curve.

    Raises:
        FinetuneError: The model, its chat template, the data or the targets cannot be used together.
        CheckpointError: The checkpoint is malformed.
        ExecuteError: The adapter is in the way, or an interrupted run cannot be gone on with.
        UsageError: An option's value cannot be used.
        Interrupted: Ctrl-C or SIGTERM; the complete epochs are kept for ``resume``.
    """
    _check_packages()
    _check_options(options)
    device = resolve_device(options.device)
    checkpoint = _open(model)
    _check_adapter(checkpoint, adapter, overwrite=options.overwrite)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_deterministic())
        run = _prepare(model, adapter, data, options, device)
        _report(run, progress)
        stack.enter_context(locked(adapter))
        stack.enter_context(_sigterm_as_interrupt())
        identity = _identity(checkpoint, run)
        staging = _open_staging(adapter, identity, options)
        try:
            trainer, resumed = _train(run, staging, progress)
            done = _write(trainer, run, checkpoint, staging.folder, identity, resumed)
            staging.publish()
        except KeyboardInterrupt as error:
            kept = "--resume goes on after the last complete epoch" if staging.done else "no epoch was complete"
            raise Interrupted(f"{adapter}: interrupted; {kept}") from error
        except OSError as error:
            raise ExecuteError(f"{error.filename or adapter}: {error.strerror or error}") from error
        except FinetuneError:
            staging.discard()
            raise
        finally:
            if not staging.done:
                staging.discard()
    return done


# ---------------------------------------------------------------------------------------- what is given


def _check_packages() -> None:
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise FinetuneError(
            f"finetune trains with peft, transformers and accelerate, and {error.name} is not installed; "
            "`pip install 'ablate-shards[lora]'`"
        ) from error


def _check_options(options: FinetuneOptions) -> None:
    at_least_one = ("rank", "epochs", "batch", "accumulate")
    checks = [(name, getattr(options, name) >= 1, "at least 1") for name in at_least_one]
    checks += [(name, 0 < getattr(options, name) < math.inf, "more than 0") for name in ("alpha", "learning_rate")]
    checks += [
        (name, 0 <= getattr(options, name) < 1, "at least 0 and less than 1")
        for name in ("dropout", "evaluation_share")
    ]
    checks += [
        ("length", options.length >= 2, "at least 2"),
        ("seed", 0 <= options.seed < 2**32, "at least 0 and less than 2^32"),
        ("targets", bool(options.targets), "auto or names of modules"),
    ]
    for name, fine, expected in checks:
        if not fine:
            raise UsageError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(options, name)}")
    kind, _, number = options.device.partition(":")
    if int(number or 0):
        raise UsageError(
            f"--device {options.device}: training takes the first GPU it sees; set CUDA_VISIBLE_DEVICES={number} and "
            f"use --device {kind}"
        )


def _open(model: Path) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    if checkpoint.config is None or not model.is_dir():
        raise FinetuneError(f"{model}: expected a checkpoint folder with a config.json; name one as transformers saves")
    if "quantization_config" in checkpoint.config:
        raise FinetuneError(
            f"{model}: its weights are quantised, and an adapter of them could not be merged; dequantise it first"
        )
    return checkpoint


def _check_adapter(checkpoint: Checkpoint, adapter: Path, *, overwrite: bool) -> None:
    check_out(checkpoint.path, files_of(checkpoint), adapter, overwrite=overwrite)
    if adapter.is_dir() and any(adapter.iterdir()) and not (adapter / TRAINING_NAME).is_file():
        raise ExecuteError(
            f"{adapter}: already exists and holds no {TRAINING_NAME}, so it is not replaced; name another"
        )


def _read_config(model: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as error:
        raise FinetuneError(f"{model}: transformers cannot read its config.json ({_reason(error)})") from error


def _read_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False, padding_side="right"
        )
    except _UNUSABLE as error:
        raise FinetuneError(
            f"{model}: its tokenizer cannot be loaded ({_reason(error)}); put its files there"
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise FinetuneError(f"{model}: its tokenizer has no chat template; put the model's chat_template.jinja there")
    if tokenizer.eos_token_id is None:
        raise FinetuneError(f"{model}: its tokenizer names no eos_token to end a response with; add it to its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _ends(model: Path, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens at which generation stops."""
    path = model / "generation_config.json"
    try:
        stated = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise FinetuneError(f"{path}: not a JSON object; restore the file") from error
    listed = stated if isinstance(stated, list) else [stated]
    return frozenset({tokenizer.eos_token_id, *(token for token in listed if isinstance(token, int))})


# ---------------------------------------------------------------------------------------- the modules


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """The modules of a model, without its weights.

    Attributes:
        auto: The transformers class that loads it.
        text: Its language model's configuration.
        prefix: Path of the list of decoder layers.
        linear: Name to (inputs, outputs) of every linear module of the decoder layers but the routers, in order.
        conv: Those of them that are stored transposed (Conv1D).
        fused: Names of the parameters that hold all experts of a layer.
        mistaken: Linear modules that peft takes for these experts by their names, and so cannot be adapted.
        parameters: How many numbers the model has.
        vocabulary: Rows of the token embedding.
        token_types: Whether the model wants ``token_type_ids`` in training.
    """

    auto: Any
    text: Any
    prefix: str
    linear: Mapping[str, tuple[int, int]]
    conv: frozenset[str]
    fused: tuple[str, ...]
    mistaken: tuple[str, ...]
    parameters: int
    vocabulary: int
    token_types: bool

    @classmethod
    def build(cls, model: Path, config: Any) -> "_Skeleton":
        """Builds the model without memory for its weights, so that what is wrong shows before they are read.

        Raises:
            FinetuneError: transformers has no generating model for this configuration, or its layers are not found.
        """
        import inspect

        from accelerate import init_empty_weights
        from torch import nn
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.pytorch_utils import Conv1D

        auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
        text = config.get_text_config(decoder=True)
        try:
            with init_empty_weights():
                empty = auto.from_config(config, trust_remote_code=False)
            decoder = empty.get_decoder()
        except _UNUSABLE as error:
            raise FinetuneError(f"{model}: transformers cannot build the model ({_reason(error)})") from error
        layers = next(
            (
                part
                for part in decoder.modules()
                if isinstance(part, nn.ModuleList) and len(part) == text.num_hidden_layers
            ),
            None,
        )
        prefix = next((name for name, part in empty.named_modules() if part is layers), None)
        if layers is None or prefix is None:
            raise FinetuneError(
                f"{model}: expected {text.num_hidden_layers} decoder layers in {type(decoder).__name__}, found none"
            )
        linear: dict[str, tuple[int, int]] = {}
        conv, fused = set(), []
        for name, part in layers.named_modules(prefix=prefix):
            if isinstance(part, nn.Linear) and not _ROUTERS & set(name.split(".")):
                linear[name] = part.in_features, part.out_features
            elif isinstance(part, Conv1D):
                linear[name] = part.nx, part.nf
                conv.add(name)
            elif not isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                fused += [f"{name}.{own}" for own, value in part.named_parameters(recurse=False) if value.ndim == 3]
        parameters = sum(parameter.numel() for parameter in empty.parameters())
        mistaken = _mistaken(empty, linear) if fused else ()
        return cls(
            auto=auto,
            text=text,
            prefix=prefix,
            linear={name: sizes for name, sizes in linear.items() if name not in mistaken},
            conv=frozenset(conv),
            fused=tuple(fused),
            mistaken=mistaken,
            parameters=parameters,
            vocabulary=empty.get_input_embeddings().weight.shape[0],
            token_types=text is not config and "token_type_ids" in inspect.signature(empty.forward).parameters,
        )

    def is_in_linear_attention(self, name: str) -> bool:
        """Returns whether a module belongs to a layer with linear attention."""
        layer = int(name.removeprefix(f"{self.prefix}.").partition(".")[0])
        types = getattr(self.text, "layer_types", None) or ()
        return layer < len(types) and types[layer] == "linear_attention"


def _mistaken(empty: Any, linear: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Returns which linear modules get no adapter from peft when all are asked for; changes the model.

    For some mixtures of experts peft reads names such as ``down_proj`` as those of single experts in checkpoints
    that transformers now fuses, wherever they stand.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(LoraConfig(r=1, target_modules=list(linear)), empty, low_cpu_mem_usage=True)
    parts = dict(empty.named_modules())
    return tuple(name for name in linear if not isinstance(parts[name], LoraLayer))


def _choose(skeleton: _Skeleton, targets: Targets) -> tuple[str, ...]:
    """Returns the linear modules that get an adapter."""
    if targets == "auto":
        return tuple(skeleton.linear)
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in skeleton.linear if f".{name}".endswith((f".{target}", f".{target}_proj"))}
        if not found and not any(target in name.rpartition(".")[2] for name in skeleton.fused):
            raise FinetuneError(
                f"--targets: no linear module of the decoder layers is called {target} or {target}_proj; there are "
                f"{_folded(skeleton.linear)}; name some of them, or use --targets auto for all"
            )
        chosen |= found
    if not chosen:
        raise FinetuneError(
            f"--targets {','.join(targets)}: only fused experts ({_folded(skeleton.fused)}) are called that, and LoRA "
            "needs linear modules; add others, or use --targets auto"
        )
    return tuple(name for name in skeleton.linear if name in chosen)


def _folded(names: Iterable[str]) -> str:
    """Returns names within their layer, each once with its count."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"^.*?\.\d+\.", "", name)) for name in names)
    shown = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
    rest = len(shown) - _MOST_NAMES
    return ", ".join(shown[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------------- the samples


class _Sample(NamedTuple):
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
            "labels": [_IGNORED] * self.start + self.tokens[self.start :],
        }
        return given | {"token_type_ids": [0] * count} if token_types else given


def _encode_all(
    model: Path, tokenizer: Any, skeleton: _Skeleton, data: Sequence[Instruction], length: int
) -> list[_Sample]:
    if not data:
        raise FinetuneError("there are no samples to train on; expected at least one")
    most = getattr(skeleton.text, "max_position_embeddings", None)
    length = min(length, most) if isinstance(most, int) else length
    ends = _ends(model, tokenizer)
    samples = [_encode(tokenizer, ends, sample, length) for sample in data]
    for sample, encoded in zip(data, samples, strict=True):
        if encoded.start >= len(encoded.tokens):
            raise FinetuneError(
                f"sample {sample.id}: its prompt alone has {encoded.start} tokens, which leaves none of {length} for "
                "the response; shorten it, or raise --length"
            )
        if max(encoded.tokens) >= skeleton.vocabulary:
            raise FinetuneError(
                f"{model}: its tokenizer gives token {max(encoded.tokens)} (sample {sample.id}), but the model has "
                f"{skeleton.vocabulary} tokens; put the tokenizer there that belongs to the model"
            )
    return samples


def _encode(tokenizer: Any, ends: frozenset[int], sample: Instruction, length: int) -> _Sample:
    messages = sample.turn.messages()
    try:
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises whatever it likes
        raise FinetuneError(f"sample {sample.id}: the chat template refuses it: {_reason(error)}") from error
    if not whole.startswith(before):
        # Some templates open the answer with what they do not keep of it later, such as a mark for reasoning.
        at = whole.rfind(sample.response.strip())
        if at < 0:
            raise FinetuneError(
                f"sample {sample.id}: the chat template rewrites the response, so its tokens cannot be told apart"
            )
        before = whole[:at]
    prompt, tokens = _tokens(tokenizer, before), _tokens(tokenizer, whole)
    if tokens[: len(prompt)] != prompt:
        # A token reaches over the border; when it generates, the model sees the prompt's own tokens.
        tokens = prompt + _tokens(tokenizer, whole[len(before) :])
    last = max((at for at in range(len(prompt), len(tokens)) if tokens[at] in ends), default=None)
    tokens = [*tokens, tokenizer.eos_token_id] if last is None else tokens[: last + 1]
    return _Sample(tokens[:length], len(prompt), len(tokens) > length)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _split(data: Sequence[Instruction], share: float, seed: int) -> tuple[list[int], dict[str, list[int]]]:
    """Returns the samples to train on and, by kind, those held out: the same share of each kind, but never all."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(data):
        kinds[sample.kind].append(number)
    held: dict[str, list[int]] = {}
    for kind, numbers in sorted(kinds.items()):
        count = min(max(round(share * len(numbers)), 1), len(numbers) - 1) if share else 0
        if count:
            held[kind] = sorted(random.Random(f"{seed} {kind}").sample(numbers, count))
    out = {number for numbers in held.values() for number in numbers}
    return [number for number in range(len(data)) if number not in out], held


# ---------------------------------------------------------------------------------------- before the training


@dataclass(frozen=True, slots=True)
class _Run:
    """All that a training needs, checked.

    Attributes:
        model: The checkpoint folder.
        adapter: The folder to make.
        data: The samples.
        options: What to train, and how.
        device: Where.
        config: The model's configuration.
        tokenizer: Its tokenizer.
        skeleton: Its modules.
        chosen: The linear modules that get an adapter.
        encoded: The tokens of each sample.
        trained: Which samples are trained on.
        held: By kind, which are held out.
    """

    model: Path
    adapter: Path
    data: Sequence[Instruction]
    options: FinetuneOptions
    device: "torch.device"
    config: Any
    tokenizer: Any
    skeleton: _Skeleton
    chosen: tuple[str, ...]
    encoded: Sequence[_Sample]
    trained: Sequence[int]
    held: Mapping[str, Sequence[int]]

    @property
    def untouched(self) -> list[str]:
        """The linear modules that get no adapter."""
        chosen = set(self.chosen)
        return [name for name in self.skeleton.linear if name not in chosen]

    @property
    def truncated(self) -> list[str]:
        """The samples whose response is cut."""
        return [sample.id for sample, encoded in zip(self.data, self.encoded, strict=True) if encoded.cut]

    @property
    def held_out(self) -> int:
        """How many samples are held out."""
        return sum(map(len, self.held.values()))

    @property
    def bfloat16(self) -> bool:
        """Whether the device computes in bfloat16."""
        import torch

        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return self.device.type == "xpu" and bool(torch.xpu.is_bf16_supported())

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed twice; on a processor, time is scarcer than memory."""
        chosen = self.options.gradient_checkpointing
        return self.device.type != "cpu" if chosen is None else chosen

    @property
    def alpha(self) -> float:
        """Alpha as peft writes it, without a fraction where it has none."""
        alpha = self.options.alpha
        return int(alpha) if alpha == int(alpha) else alpha

    @property
    def settings(self) -> dict[str, Any]:
        """The options that change the result, as they turned out."""
        settings = dataclasses.asdict(self.options) | {
            "alpha": self.alpha,
            "gradient_checkpointing": self.recomputes,
        }
        return {name: value for name, value in settings.items() if name not in ("device", "resume", "overwrite")}


def _prepare(
    model: Path, adapter: Path, data: Sequence[Instruction], options: FinetuneOptions, device: "torch.device"
) -> _Run:
    config = _read_config(model)
    tokenizer = _read_tokenizer(model)
    skeleton = _Skeleton.build(model, config)
    trained, held = _split(data, options.evaluation_share, options.seed)
    return _Run(
        model=model,
        adapter=adapter,
        data=data,
        options=options,
        device=device,
        config=config,
        tokenizer=tokenizer,
        skeleton=skeleton,
        chosen=_choose(skeleton, options.targets),
        encoded=_encode_all(model, tokenizer, skeleton, data, options.length),
        trained=trained,
        held=held,
    )


def _report(run: _Run, progress: Progress) -> None:
    """Says what will be trained and what not, and refuses what cannot fit."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(sample.kind for sample in run.data).items()))
    progress.note(f"{len(run.data)} samples ({kinds}): {len(run.trained)} to train on, {run.held_out} held out")
    if cut := run.truncated:
        progress.note(
            f"{len(cut)} of {len(run.data)} responses are cut, so that no sample has more than {run.options.length} "
            f"tokens: {', '.join(cut[:_MOST_NAMES])}{' …' if len(cut) > _MOST_NAMES else ''}; --length takes more"
        )
    progress.note(f"adapters on {_folded(run.chosen)}")
    if untouched := run.untouched:
        where = " of the linear-attention layers" if all(map(run.skeleton.is_in_linear_attention, untouched)) else ""
        progress.note(f"these targets leave modules{where} untouched: {_folded(untouched)}; --targets auto adds them")
    if run.skeleton.fused:
        progress.note(f"untouched: {_folded(run.skeleton.fused)}: fused experts, which are no linear modules")
    if run.skeleton.mistaken:
        progress.note(f"untouched: {_folded(run.skeleton.mistaken)}: peft takes these names for those of the experts")
    hybrid = any(map(run.skeleton.is_in_linear_attention, run.skeleton.linear))
    if hybrid and run.device.type == "cuda" and importlib.util.find_spec("fla") is None:
        progress.note(
            "linear attention is computed without fast kernels; `pip install flash-linear-attention` has them"
        )
    _check_memory(run, progress)


def _check_memory(run: _Run, progress: Progress) -> None:
    skeleton, options = run.skeleton, run.options
    item = 2 if run.bfloat16 else 4
    weights = skeleton.parameters * item
    adapters = _TRAINED_BYTES * options.rank * sum(sum(skeleton.linear[name]) for name in run.chosen)
    tokens = options.batch * max(len(sample.tokens) for sample in run.encoded)
    # What a layer keeps for its gradient is about the inputs and outputs of its linear modules.
    kept = tokens * item * sum(map(sum, skeleton.linear.values()))
    layers = skeleton.text.num_hidden_layers
    if run.recomputes:
        kept = kept // layers + tokens * item * layers * skeleton.text.hidden_size
    # The logits, the same in float32, and their gradient.
    kept += tokens * skeleton.vocabulary * (item + 8)
    needed, free = weights + adapters + kept, _free_memory(run.device)
    told = (
        f"about {_size(needed)} on {run.device} ({_size(weights)} weights, {_size(adapters)} adapters, "
        f"{_size(kept)} activations)"
    )
    if weights + adapters > free:
        raise FinetuneError(f"training takes {told}, but {_size(free)} are free; use a larger device")
    progress.note(f"training takes {told}")
    if needed > free:
        progress.note(f"only {_size(free)} are free; --batch 1 or a smaller --length takes less")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _free_memory(device: "torch.device") -> int:
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    return int(free["cpu"] if device.type == "cpu" else free.get(device.index or 0, free["cpu"]))


# ---------------------------------------------------------------------------------------- the training


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {
        "ablate_shards": __version__,
        "peft": peft.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _identity(checkpoint: Checkpoint, run: _Run) -> dict[str, str]:
    """Returns what must be equal for a resumed run to give the same bytes, by what to call it."""
    return {
        "the model": base_digest(checkpoint) or "",
        "the data": _digest([dataclasses.asdict(sample) for sample in run.data]),
        "the options": _digest(run.settings),
        "the device or a version": _digest([run.device.type, _versions()]),
    }


def _open_staging(adapter: Path, identity: Mapping[str, str], options: FinetuneOptions) -> Staging:
    folder = adapter.resolve().with_name(f".{adapter.resolve().name}.ablate-staging")
    states = folder.glob(f"{_CHECKPOINTS}/checkpoint-*/trainer_state.json")
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in states}
    return Staging.open(adapter, identity, sizes, resume=options.resume, overwrite=options.overwrite)


def _train(run: _Run, staging: Staging, progress: Progress) -> tuple[Any, int]:
    """Trains, or goes on training, and returns the trainer and the steps that were done before."""
    import torch
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments, set_seed

    options, held = run.options, run.held
    features = [sample.features(token_types=run.skeleton.token_types) for sample in run.encoded]
    set_seed(options.seed)
    model = _with_adapters(run)
    arguments = TrainingArguments(
        output_dir=str(staging.folder / _CHECKPOINTS),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=run.recomputes,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=run.bfloat16,
        use_cpu=run.device.type == "cpu",
        seed=options.seed,
        eval_strategy="epoch" if held else "no",
        eval_on_start=bool(held),
        prediction_loss_only=True,
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=run.device.type == "cuda",
    )
    # More than one would be trained on at once, through DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(run.tokenizer, label_pad_token_id=_IGNORED),
        train_dataset=[features[number] for number in run.trained],
        eval_dataset={kind: [features[number] for number in numbers] for kind, numbers in held.items()} or None,
        callbacks=[_callback(staging, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    name = max(staging.done, key=lambda name: int(staging.done[name]["step"]), default=None)
    step = int(staging.done[name]["step"]) if name else 0
    if name:
        progress.note(f"going on after step {step}")
    try:
        trainer.train(resume_from_checkpoint=str((staging.folder / name).parent) if name else None)
    except torch.OutOfMemoryError as error:
        raise FinetuneError(f"{run.device} ran out of memory; --batch 1 or a smaller --length takes less") from error
    return trainer, step


def _with_adapters(run: _Run) -> Any:
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    model = _load(run, torch.bfloat16 if run.bfloat16 else torch.float32)
    model.config.use_cache = False
    config = LoraConfig(
        r=run.options.rank,
        lora_alpha=run.alpha,
        lora_dropout=run.options.dropout,
        use_rslora=run.options.rslora,
        target_modules=list(run.chosen),
        fan_in_fan_out=bool(run.skeleton.conv & set(run.chosen)),
        task_type=TaskType.CAUSAL_LM,
    )
    adapted = get_peft_model(model, config)
    found = {name.removeprefix("base_model.model.") for name in adapted.base_model.targeted_module_names}
    if found != set(run.chosen):
        missed = found ^ set(run.chosen)
        raise FinetuneError(f"peft put adapters elsewhere than asked: {_folded(sorted(missed))}; use --targets auto")
    return adapted


def _load(run: _Run, dtype: "torch.dtype") -> Any:
    try:
        model, told = run.skeleton.auto.from_pretrained(
            run.model,
            config=run.config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except _UNUSABLE as error:
        raise FinetuneError(f"{run.model}: transformers cannot load the model ({_reason(error)})") from error
    if missing := sorted(told["missing_keys"]):
        raise FinetuneError(
            f"{run.model}: no weights for {_folded(missing)}, which would be random; complete the checkpoint first"
        )
    return model


def _callback(staging: Staging, progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        """Passes on how far the trainer is, and writes down which of its checkpoints are complete."""

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            progress.count(state.global_step, state.max_steps)

        def on_log(self, _args: Any, state: Any, _control: Any, **told: Any) -> None:
            losses = {name: value for name, value in told["logs"].items() if name.endswith("loss")}
            if not all(map(math.isfinite, losses.values())):
                raise FinetuneError(
                    f"the loss is not finite at step {state.global_step}; lower --learning-rate, and check the model "
                    "with a prompt of its own"
                )

        def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _make_durable(folder)
            name = (folder / "trainer_state.json").relative_to(staging.folder).as_posix()
            staging.record(name, {"step": state.global_step})
            last = _epochs(state.log_history)[-1]
            losses = {"training": last.training, **last.evaluation}
            told = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
            progress.note(f"epoch {last.number} of {args.num_train_epochs:g}: loss {told}")

    return Reporter()


def _losses(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns the training loss of every step, and where in the epochs it was."""
    return [
        {"step": entry["step"], "epoch": entry["epoch"], "loss": entry["loss"]} for entry in history if "loss" in entry
    ]


def _epochs(history: Sequence[Mapping[str, Any]]) -> tuple[Epoch, ...]:
    """Returns the losses around every epoch from the trainer's log."""
    training: dict[int, list[float]] = defaultdict(list)
    evaluation: dict[int, dict[str, float]] = defaultdict(dict)
    for entry in history:
        if "loss" in entry:
            training[math.ceil(entry["epoch"] - 1e-6)].append(entry["loss"])
        for name, value in entry.items():
            if match := re.fullmatch(r"eval_(\w+)_loss", name):
                evaluation[round(entry["epoch"])][match[1]] = value
    return tuple(
        Epoch(number, sum(losses) / len(losses) if (losses := training.get(number)) else None, evaluation[number])
        for number in sorted(training.keys() | evaluation.keys())
    )


# ---------------------------------------------------------------------------------------- the folder


def _write(
    trainer: Any, run: _Run, checkpoint: Checkpoint, folder: Path, identity: Mapping[str, str], resumed: int
) -> Finetuned:
    """Writes the adapter beside the trainer's checkpoints, durably, and removes those."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    config = trainer.model.peft_config["default"]
    base = checkpoint.identity
    described = config.to_dict() | {
        "base_model_name_or_path": base["name"],
        "revision": base.get("revision"),
        "inference_mode": True,
        # peft shortens the list to endings, which would match a vision tower's modules too.
        "target_modules": sorted(run.chosen),
    }
    state = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(state.items())}
    history = trainer.state.log_history
    epochs = _epochs(history)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    training = {
        "format": _FORMAT,
        "base": {**base, "sha256": identity["the model"]},
        "data": {
            "sha256": identity["the data"],
            "training": dict(sorted(Counter(run.data[number].kind for number in run.trained).items())),
            "held_out": {kind: [run.data[number].id for number in numbers] for kind, numbers in run.held.items()},
            "truncated": run.truncated,
        },
        "options": run.settings,
        "device": run.device.type,
        "dtype": "bfloat16" if run.bfloat16 else "float32",
        "modules": len(run.chosen),
        "parameters": parameters,
        "untouched": [*run.untouched, *run.skeleton.fused, *run.skeleton.mistaken],
        "losses": _losses(history),
        "epochs": [dataclasses.asdict(epoch) for epoch in epochs],
        "versions": _versions(),
    }
    (folder / WEIGHTS_NAME).write_bytes(save(tensors, {"format": "pt"}))
    for name, content in ((CONFIG_NAME, described), (TRAINING_NAME, training)):
        text = json.dumps(content, indent=1, sort_keys=name == CONFIG_NAME, ensure_ascii=False, default=sorted)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    _make_durable(folder)
    shutil.rmtree(folder / _CHECKPOINTS)
    return Finetuned(
        adapter=run.adapter,
        modules=len(run.chosen),
        parameters=parameters,
        samples=len(run.trained),
        held_out=run.held_out,
        truncated=tuple(run.truncated),
        losses=tuple(entry["loss"] for entry in _losses(history)),
        epochs=epochs,
        resumed=resumed,
    )


def _make_durable(folder: Path) -> None:
    """Waits until what a library wrote into a folder is on disk."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(folder)


# ---------------------------------------------------------------------------------------- surroundings


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries from writing to the terminal; what matters of it is said in their place."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_OURS_NOT_THEIRS)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Asks torch for operations that give the same bits each time, wherever it has them."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
