"""Captures the residual stream after every decoder layer, one layer at a time with all prompts through it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ablate_shards import __version__
from ablate_shards.errors import CaptureError, CheckpointError, Interrupted, UsageError
from ablate_shards.surgery.activations import ACTIVATIONS_FORMAT, LABELS
from ablate_shards.surgery.checkpoint import Checkpoint, open_checkpoint, read_header
from ablate_shards.surgery.editor import resolve_device
from ablate_shards.surgery.samples import Pair, Turn
from ablate_shards.surgery.staging import fsync_folder, locked

if TYPE_CHECKING:
    import torch

__all__ = ["CaptureOptions", "Captured", "Offload", "Position", "Progress", "capture"]

Position = Literal["last", "mean"]
Offload = Literal["auto", "never", "always"]

_STREAM_FORMAT = "ablate-shards.stream/1"
_STREAM = "stream.safetensors"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_COPY_CHUNK = 4 << 20
#: The part of a decoder that is no layer: embeddings, last norm.
_REST = -1
#: Share of the free memory that weights and activations may take before the weights are streamed.
_SHARE_OF_FREE = 0.8
#: Saving the stream for --resume takes at most about this share of the time.
_SAVING_SHARE = 0.1
#: What transformers, torch and Jinja raise for a model or a template that they cannot use.
_UNUSABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, RuntimeError, ImportError)


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What to capture, and how.

    Attributes:
        position: ``last`` token of the response, or before the answer where a pair has no response; ``mean``
            over the tokens of the response.
        plain: Feed the prompts as they are instead of through the chat template.
        batch: Prompts computed at a time.
        dtype: ``auto`` (that of most weights), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        offload: Whether weights are streamed from the shards, a layer at a time, instead of loaded;
            ``auto`` streams them when they would not fit.
        memory: Bytes that loaded weights may take with ``auto``, most of the free memory if None.
        resume: Go on with an interrupted run.
        overwrite: Replace an existing dump.
    """

    position: Position = "last"
    plain: bool = False
    batch: int = 16
    dtype: str = "auto"
    device: str = "auto"
    offload: Offload = "auto"
    memory: int | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """What was captured.

    Attributes:
        dump: The file or folder.
        pairs: How many pairs of prompts.
        layers: How many layers.
        hidden_size: Length of an activation.
        position: Where in each prompt.
        dtype: The safetensors dtype that the model computed in.
        device: Where.
        streamed: Whether the weights were streamed a layer at a time.
        resumed: Layers taken over from an interrupted run.
        longest: Tokens of the longest prompt.
    """

    dump: Path
    pairs: int
    layers: int
    hidden_size: int
    position: Position
    dtype: str
    device: str
    streamed: bool
    resumed: int
    longest: int


class Progress(Protocol):
    """Hears how far a capture has come."""

    def count(self, done: int, total: int) -> None:
        """Says that some of so many layers are done."""

    def note(self, text: str) -> None:
        """Says something in one line."""


def capture(model: Path, dump: Path, pairs: Sequence[Pair], options: CaptureOptions, progress: Progress) -> Captured:
    """Writes the residual stream after every decoder layer, at one position of each prompt, to ``dump``.

    No code from the checkpoint runs, and nothing is unpickled. The dump appears complete or not at all, and its
    bytes depend on the model, the pairs and the options alone.

    Args:
        model: A checkpoint folder with tokenizer.
        dump: A file ending in ``.safetensors``, or a folder of one shard per layer.
        pairs: The prompts; row i of every tensor is pair i.
        options: What to capture, and how.
        progress: Hears how far the run has come.

    Returns:
        What was captured.

    Raises:
        CaptureError: The model, its tokenizer or the pairs cannot be used, or the dump cannot be written.
        CheckpointError: The checkpoint is malformed or holds no safetensors.
        UsageError: The name of the dump or the device cannot be used.
        Interrupted: Ctrl-C; the layers that are complete are kept for ``resume``.
    """
    try:
        import accelerate  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise CaptureError(
            f"capture runs the model with transformers and accelerate, and {error.name} is not installed; "
            "`pip install 'ablate-shards[lora]'`"
        ) from error
    dump = dump.resolve() if dump.is_symlink() else dump
    _check_dump(model, dump, overwrite=options.overwrite)
    if not pairs:
        raise CaptureError("there are no pairs to capture; expected at least one")
    if not (model / "config.json").is_file():
        raise CaptureError(f"{model}: expected a checkpoint folder with a config.json; name one as transformers saves")
    checkpoint = open_checkpoint(model)
    device = resolve_device(options.device)
    with _quiet(), locked(dump), torch.inference_mode():
        config = _read_config(model)
        prompts = _prompts(model, config, pairs, options)
        dtype = _dtype_of(checkpoint, config, options.dtype)
        streamed = _is_streamed(checkpoint, config, prompts, dtype, device, options)
        if streamed and _is_quantised(config):
            raise CaptureError(
                f"{model}: its weights are quantised, and only plain weights can be streamed from the shards; "
                "dequantise it first, or use --offload never"
            )
        text = config.get_text_config(decoder=True)
        _check_disk(dump, prompts, text.hidden_size, text.num_hidden_layers, _BYTES[dtype])
        staging = _Staging.open(dump, _identity(checkpoint, prompts, dtype, options), options)
        try:
            run = _open_streamed(checkpoint, config, dtype, device) if streamed else _load(model, dtype, device)
            width, count = run.hidden_size, len(run.layers)
            metadata = {
                "format": ACTIVATIONS_FORMAT,
                "positive_label": LABELS[0],
                "negative_label": LABELS[1],
                "model": model.resolve().name,
                "position": options.position,
                "hidden_size": str(width),
                "inputs": _digest(checkpoint, prompts, dtype, options),
            }
            progress.note(_how(run, checkpoint, dtype, device))
            _check_tokens(model, run, prompts)
            resumed = _run(run, _batches(prompts, options.batch, run.pad), staging, metadata, options, progress)
            staging.publish(metadata)
        except KeyboardInterrupt as error:
            raise Interrupted(f"{dump}: interrupted; {staging.kept}") from error
        except OSError as error:
            raise CaptureError(f"{error.filename or dump}: {error.strerror or error}; {staging.kept}") from error
        finally:
            # After a success it is gone already.
            if not staging.useful:
                staging.discard()
    return Captured(
        dump=dump,
        pairs=len(pairs),
        layers=count,
        hidden_size=width,
        position=options.position,
        dtype=dtype,
        device=str(device),
        streamed=streamed,
        resumed=resumed,
        longest=max(len(prompt.tokens) for prompt in prompts),
    )


# ---------------------------------------------------------------------------------------- prompts


class _Prompt(NamedTuple):
    """The tokens of one prompt, up to the last that counts, and the first that does."""

    tokens: tuple[int, ...]
    start: int


def _prompts(model: Path, config: Any, pairs: Sequence[Pair], options: CaptureOptions) -> list[_Prompt]:
    """Returns the prompts of all positives, then of all negatives."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as error:
        raise CaptureError(
            f"{model}: its tokenizer cannot be loaded ({_reason(error)}); put its files there"
        ) from error
    if not options.plain and not getattr(tokenizer, "chat_template", None):
        raise CaptureError(
            f"{model}: its tokenizer has no chat template; put the model's chat_template.jinja there, or use the raw "
            "prompts with --plain"
        )
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
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
            if options.position == "mean" and turn.response is None:
                raise CaptureError(f"{where}: has no response to take the mean over; add one, or use --position last")
            prompt = _prompt(tokenizer, turn, where, options)
            if isinstance(most, int) and len(prompt.tokens) > most:
                raise CaptureError(
                    f"{where}: has {len(prompt.tokens)} tokens, but the model reads at most {most}; shorten it"
                )
            prompts.append(prompt)
    return prompts


def _prompt(tokenizer: Any, turn: Turn, where: str, options: CaptureOptions) -> _Prompt:
    response = (turn.response or "").strip()
    if options.plain:
        if turn.system is not None:
            raise CaptureError(f"{where}: has a system message, which --plain has no place for; remove one of the two")
        text = (turn.prompt + (turn.response or "")).rstrip() if response else turn.prompt
    else:
        messages = dataclasses.replace(turn, response=response or None).messages()
        # What follows a response in the template, such as its end marker, is cut off.
        ending = "continue_final_message" if response else "add_generation_prompt"
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **{ending: True})
        except Exception as error:  # a template raises whatever it likes
            raise CaptureError(f"{where}: the chat template refuses it: {_reason(error)}") from error
    tokens = _encode(tokenizer, text, special=options.plain)
    if not tokens:
        raise CaptureError(f"{where}: has no tokens; expected a prompt")
    if options.position == "last":
        return _Prompt(tokens, len(tokens) - 1)
    if not text.endswith(response):
        raise CaptureError(f"{where}: the chat template rewrites the response, so its tokens cannot be told apart")
    before = _encode(tokenizer, text[: len(text) - len(response)], special=options.plain)
    same = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), len(before))
    return _Prompt(tokens, min(same, len(tokens) - 1))


def _encode(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])


@dataclass(slots=True)
class _Batch:
    """Some prompts, padded on the right: what follows a token never reaches it, and its position is its index.

    Attributes:
        rows: Which prompts.
        spans: First and last position that count, per prompt.
        ids: Tokens, ``[prompts, tokens]``.
        mask: Ones where there is a token.
        inputs: What each layer is called with beside the stream, once recorded.
        hidden: The stream as it stands, ``[prompts, tokens, d]``, once recorded.
    """

    rows: list[int]
    spans: list[tuple[int, int]]
    ids: "torch.Tensor"
    mask: "torch.Tensor"
    inputs: list["_Inputs"] = field(default_factory=list)
    hidden: "torch.Tensor" = field(init=False)


def _batches(prompts: Sequence[_Prompt], size: int, pad: int) -> list[_Batch]:
    import torch

    # Of one length, as far as possible; the longest first, so that what does not fit fails at once.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].tokens))
    batches = []
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        width = len(prompts[rows[0]].tokens)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for line, row in enumerate(rows):
            count = len(prompts[row].tokens)
            ids[line, :count] = torch.tensor(prompts[row].tokens)
            mask[line, :count] = 1
        spans = [(prompts[row].start, len(prompts[row].tokens)) for row in rows]
        batches.append(_Batch(rows, spans, ids, mask))
    return batches


# ---------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class _Model:
    """A decoder whose layers are on the device, or come there one at a time.

    Attributes:
        decoder: The part of the model that takes tokens and runs the layers.
        layers: Its layers.
        device: Where it computes.
        hidden_size: Length of the residual stream.
        pad: A token to fill up with.
        shards: Where its weights come from, None if they are loaded.
    """

    decoder: Any
    layers: Any
    device: "torch.device"
    hidden_size: int
    pad: int
    shards: "_Shards | None"

    @contextlib.contextmanager
    def holding(self, part: int) -> Iterator[None]:
        """Keeps the weights of one layer, or of the rest of the decoder, on the device while the context lasts."""
        if self.shards is None:
            yield
            return
        try:
            self.shards.load(part)
            yield
        finally:
            self.shards.free(part)


class _Shards:
    """Loads parts of a model built without weights, through the conversions that transformers knows for it."""

    def __init__(self, checkpoint: Checkpoint, model: Any, decoder: Any, layers: Any, device: "torch.device") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.modeling_utils import LoadStateDictConfig

        self._model = model
        names = {module: name for name, module in model.named_modules()}
        self._modules: dict[int, tuple[str, Any]] = {
            _REST: (names[decoder], decoder),
            **{index: (names[layer], layer) for index, layer in enumerate(layers)},
        }
        mapping = get_model_conversion_mapping(model)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=mapping,
        )
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = model.state_dict()
        prefix = model.base_model_prefix
        self._tensors: dict[int, list[tuple[str, Path]]] = {part: [] for part in self._modules}
        for shard in checkpoint.shards:
            for tensor in shard.tensors:
                target, _ = rename_source_key(tensor.name, renamings, converters, prefix, known)
                if target not in known:
                    target, _ = rename_source_key(tensor.name, [], [], prefix, known)
                if target in known and (part := self._part_of(target)) is not None:
                    self._tensors[part].append((tensor.name, shard.path))
        for module in decoder.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def _part_of(self, target: str) -> int | None:
        """Returns the part that a parameter belongs to, None if it is not in the decoder."""
        inside = [(len(name), part) for part, (name, _) in self._modules.items() if _is_inside(target, name)]
        return max(inside, key=lambda place: place[0])[1] if inside else None

    def load(self, part: int) -> None:
        """Brings one part's weights to the device."""
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}
            tensors = {}
            for name, path in self._tensors[part]:
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensors[name] = files[path].get_slice(name)
            found, _ = convert_and_load_state_dict_in_model(self._model, tensors, self._config, None)
        where, _ = self._modules[part]
        if problems := [*found.conversion_errors, *(str(name) for name, *_ in found.mismatched_keys)]:
            raise CaptureError(f"{problems[0]}: does not have the shape that config.json asks for; restore the file")
        for name, parameter in self._parameters(part):
            if parameter.is_meta:
                raise CaptureError(
                    f"{where or 'the model'}: the checkpoint holds no weight for {name}, or shares it with another "
                    "layer; complete the checkpoint, or use --offload never"
                )

    def free(self, part: int) -> None:
        """Drops one part's weights."""
        from accelerate.utils import set_module_tensor_to_device

        module = self._modules[part][1]
        for name, _ in self._parameters(part):
            set_module_tensor_to_device(module, name, "meta")

    def _parameters(self, part: int) -> list[tuple[str, Any]]:
        where, module = self._modules[part]
        parameters = list(module.named_parameters())
        if part != _REST:
            return parameters
        return [
            (name, parameter)
            for name, parameter in parameters
            if self._part_of(f"{where}.{name}" if where else name) == _REST
        ]


def _is_inside(target: str, module: str) -> bool:
    return not module or target.startswith(f"{module}.")


def _read_config(model: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as error:
        raise CaptureError(
            f"{model}: transformers does not know the model of its config.json ({_reason(error)}); update transformers "
            "if it is newer, code that comes with a checkpoint is not run"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{model}: {config.model_type} has an encoder; expected a decoder-only language model")
    return config


def _load(model: Path, dtype: str, device: "torch.device") -> _Model:
    """Loads a model whole."""
    from transformers import AutoModel

    where = None if device.type == "cpu" else {"": device}
    try:
        network, found = AutoModel.from_pretrained(
            model,
            dtype=_torch_dtype(dtype),
            device_map=where,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _UNUSABLE as error:
        raise CaptureError(f"{model}: transformers cannot load the model: {_reason(error)}") from error
    opened = _opened(model, network, device)
    name = next(name for name, module in network.named_modules() if module is opened.decoder)
    if missing := sorted(key for key in found["missing_keys"] if _is_inside(key, name)):
        raise CaptureError(f"{model}: the checkpoint holds no weight for {missing[0]}; complete the checkpoint")
    return opened


def _open_streamed(checkpoint: Checkpoint, config: Any, dtype: str, device: "torch.device") -> _Model:
    """Builds a model without weights, each part of which is loaded when it is held."""
    import transformers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            network = transformers.AutoModel.from_config(config, dtype=_torch_dtype(dtype), trust_remote_code=False)
    except _UNUSABLE as error:
        raise CaptureError(f"{checkpoint.path}: transformers cannot build the model: {_reason(error)}") from error
    model = _opened(checkpoint.path, network, device)
    try:
        shards = _Shards(checkpoint, network, model.decoder, model.layers, device)
    except (ImportError, AttributeError, TypeError) as error:
        raise CaptureError(
            f"transformers {transformers.__version__} loads weights in a way that is not known here "
            f"({_reason(error)}), so they cannot be streamed; use --offload never, or another version"
        ) from error
    return dataclasses.replace(model, shards=shards)


def _opened(path: Path, network: Any, device: "torch.device") -> _Model:
    import torch

    decoder = network.eval().get_decoder()
    text = network.config.get_text_config(decoder=True)
    lists = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == text.num_hidden_layers
    ]
    outermost = [module for depth, module in lists if depth == min(depth for depth, _ in lists)]
    if len(outermost) != 1:
        raise CaptureError(
            f"{path}: found {len(outermost)} lists of {text.num_hidden_layers} layers in {type(decoder).__name__}, "
            "expected one; its decoder layers cannot be told"
        )
    pad = next((token for token in (text.pad_token_id, text.eos_token_id) if isinstance(token, int)), 0)
    return _Model(decoder, outermost[0], device, text.hidden_size, max(pad, 0), None)


def _dtype_of(checkpoint: Checkpoint, config: Any, wanted: str) -> str:
    """Returns the safetensors dtype to compute in."""
    if wanted != "auto":
        return _DTYPES[wanted]
    sizes = dict.fromkeys(_BYTES, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.end - tensor.start
    said = _DTYPES.get(str(config.dtype).removeprefix("torch."))
    if said is not None and (_is_quantised(config) or not any(sizes.values())):
        return said
    return max(sizes, key=lambda dtype: sizes[dtype])


def _torch_dtype(dtype: str) -> "torch.dtype":
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]


def _is_quantised(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    return sum(
        (tensor.end - tensor.start) * _BYTES[dtype] // _BYTES.get(tensor.dtype, _BYTES[dtype])
        for tensor in checkpoint.tensors.values()
    )


def _is_streamed(
    checkpoint: Checkpoint,
    config: Any,
    prompts: Sequence[_Prompt],
    dtype: str,
    device: "torch.device",
    options: CaptureOptions,
) -> bool:
    if options.offload != "auto":
        return options.offload == "always"
    needed = _weight_bytes(checkpoint, dtype)
    if options.memory is not None:
        return needed > options.memory
    stream = _stream_bytes(prompts, config.get_text_config(decoder=True).hidden_size, _BYTES[dtype])
    return needed + stream > _SHARE_OF_FREE * _free_memory(device)


def _free_memory(device: "torch.device") -> int:
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    if device.type in ("cuda", "xpu"):
        return int(free[device.index or 0])
    found = int(free.get(device.type, free["cpu"]))
    group = Path("/sys/fs/cgroup")
    # A container may be allowed less than the machine has; pages of files are given back on demand.
    with contextlib.suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(counts["file"])
        found = min(found, int((group / "memory.max").read_text()) - used)
    return found


def _stream_bytes(prompts: Sequence[_Prompt], width: int, item: int) -> int:
    return sum(len(prompt.tokens) for prompt in prompts) * width * item


def _how(run: _Model, checkpoint: Checkpoint, dtype: str, device: "torch.device") -> str:
    how = "streamed from the shards, a layer at a time" if run.shards else "loaded whole"
    return f"weights: {_size(_weight_bytes(checkpoint, dtype))} as {dtype} on {device}, {how}"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _check_tokens(model: Path, run: _Model, prompts: Sequence[_Prompt]) -> None:
    known = run.decoder.get_input_embeddings().num_embeddings
    if (largest := max(max(prompt.tokens) for prompt in prompts)) >= known:
        raise CaptureError(
            f"{model}: its tokenizer gives token {largest}, but the model has {known}; the tokenizer is another model's"
        )


# ---------------------------------------------------------------------------------------- running


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a layer was called with; the stream itself is left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool

    def call(self, layer: Any, hidden: "torch.Tensor") -> "torch.Tensor":
        """Runs a layer; returns the stream after it."""
        if self.named:
            output = layer(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            output = layer(hidden, *self.args, **self.kwargs)
        return _stream_of(output)


class _NotOneStream(Exception):  # noqa: N818 - caught where it is raised
    """A model does more between its layers than hand on the stream."""


class _OtherOutput(_NotOneStream):
    """A model takes something else from its layers than it was given."""


def _run(
    run: _Model,
    batches: list[_Batch],
    staging: "_Staging",
    metadata: Mapping[str, str],
    options: CaptureOptions,
    progress: Progress,
) -> int:
    """Captures every layer into the staging folder; returns how many an interrupted run had captured."""
    try:
        with run.holding(_REST):
            _record_all(run, batches)
    except _NotOneStream as error:
        if run.shards is not None:
            raise CaptureError(
                f"{type(run.decoder).__name__}: {error}, so its layers cannot be run one at a time; use --offload never"
            ) from error
        _run_whole(run, batches, staging, metadata, options)
        return 0
    total = len(run.layers)
    # Without the first state of what layers share, a run can only start again.
    keeps = not any(_is_opaque(inputs) for batch in batches for inputs in batch.inputs)
    first = staging.take_up(batches) if keeps else 0
    progress.count(first, total)
    parked = _parked(run)
    try:
        for index in range(first, total):
            rows = _Rows(options.position)
            with run.holding(index):
                for batch in batches:
                    hidden = batch.inputs[index].call(run.layers[index], batch.hidden.to(run.device))
                    rows.add(batch, hidden)
                    batch.hidden = hidden.to(parked)
            staging.write(index, rows.tensors(index, run.decoder), metadata)
            if keeps and index + 1 < total:
                staging.save_stream(index + 1, batches)
            progress.count(index + 1, total)
    except CaptureError:
        # It would end the same way again.
        staging.discard()
        raise
    return first


def _parked(run: _Model) -> "torch.device":
    """Returns where the stream of a batch waits for the next layer."""
    import torch

    return torch.device("cpu") if run.shards is not None else run.device


def _run_whole(
    run: _Model, batches: list[_Batch], staging: "_Staging", metadata: Mapping[str, str], options: CaptureOptions
) -> None:
    """Captures every layer in one forward pass per batch."""
    rows = [_Rows(options.position) for _ in run.layers]
    for batch in batches:
        hooks = [
            layer.register_forward_hook(
                lambda _module, _inputs, output, batch=batch, row=row: row.add(batch, _stream_of(output))
            )
            for layer, row in zip(run.layers, rows, strict=True)
        ]
        try:
            _forward(run, batch)
        finally:
            for hook in hooks:
                hook.remove()
    for index, row in enumerate(rows):
        staging.write(index, row.tensors(index, run.decoder), metadata)


def _forward(run: _Model, batch: _Batch) -> None:
    run.decoder(input_ids=batch.ids.to(run.device), attention_mask=batch.mask.to(run.device), use_cache=False)


def _record_all(run: _Model, batches: list[_Batch]) -> None:
    """Finds what each layer of each batch is called with, without running a layer.

    Raises:
        _NotOneStream: What a layer is called with depends on more than the tokens.
    """
    first = batches[0]
    tuples = False
    try:
        entered, inputs = _record(run, first, tuples=False)
    except _OtherOutput:
        tuples = True
        entered, inputs = _record(run, first, tuples=True)
    # A second time with another stream: what changes was computed from it, and would be wrong.
    _, again = _record(run, first, tuples=tuples, shift=1.0)
    for before, after in zip(inputs, again, strict=True):
        if not _same((before.args, tuple(before.kwargs.items())), (after.args, tuple(after.kwargs.items()))):
            raise _NotOneStream("computes more from the residual stream than its layers do")
    first.hidden, first.inputs = entered.to(_parked(run)), inputs
    for batch in batches[1:]:
        entered, batch.inputs = _record(run, batch, tuples=tuples)
        batch.hidden = entered.to(_parked(run))


def _record(run: _Model, batch: _Batch, *, tuples: bool, shift: float = 0.0) -> tuple["torch.Tensor", list[_Inputs]]:
    """Runs a model whose layers only add ``shift``; returns the first layer's stream and every layer's inputs."""
    import torch

    streams: list[torch.Tensor] = []
    inputs: list[_Inputs] = []
    expected: list[torch.Tensor] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        named = not args
        hidden = kwargs.pop("hidden_states", None) if named else args[0]
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or len(hidden) != len(batch.rows):
            raise _OtherOutput("hands its layers something else than one residual stream")
        if expected and not torch.equal(hidden, expected[-1]):
            raise _NotOneStream("changes the residual stream between its layers")
        if not streams:
            streams.append(hidden)
        inputs.append(_Inputs(args[1:], kwargs, named))
        expected[:] = [hidden + shift if shift else hidden]
        return (expected[-1], None) if tuples else expected[-1]

    for layer in run.layers:
        layer.forward = record
    try:
        _forward(run, batch)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise _OtherOutput("wants more from its layers than a residual stream") from error
    finally:
        for layer in run.layers:
            layer.__dict__.pop("forward", None)
    if len(inputs) != len(run.layers):
        raise _NotOneStream(f"runs {len(inputs)} layers in a pass instead of {len(run.layers)}")
    return streams[0], inputs


def _stream_of(output: Any) -> "torch.Tensor":
    import torch

    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        raise CaptureError(
            "a decoder layer returns something else than a residual stream [prompts, tokens, hidden size]; "
            "this architecture cannot be captured"
        )
    return hidden


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return (
            isinstance(other, tuple | list)
            and len(one) == len(other)
            and all(_same(left, right) for left, right in zip(one, other, strict=True))
        )
    return not _is_plain(one) or bool(one == other)


def _is_plain(value: Any) -> bool:
    import torch

    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor | torch.dtype | torch.device)


def _is_opaque(inputs: _Inputs) -> bool:
    """Whether a layer is given an object that it may leave something in for a later one."""
    return not all(_is_plain(value) for value in (*inputs.args, *inputs.kwargs.values()))


class _Rows:
    """Gathers one layer's activations at the positions that count."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._rows: dict[int, torch.Tensor] = {}

    def add(self, batch: _Batch, hidden: "torch.Tensor") -> None:
        """Takes the rows of a batch from its stream, ``[prompts, tokens, d]``."""
        for line, (row, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True)):
            taken = hidden[line, start:end].cpu()
            self._rows[row] = taken[-1].clone() if self._position == "last" else taken.double().mean(0).float()

    def tensors(self, layer: int, decoder: Any) -> dict[str, "torch.Tensor"]:
        """Returns the dump's tensors of a layer, each ``[pairs, d]``.

        Raises:
            CaptureError: The model overflowed.
        """
        import torch

        rows = torch.stack([self._rows[row] for row in sorted(self._rows)])
        if not rows.isfinite().all():
            raise CaptureError(
                f"layer {layer} of {type(decoder).__name__}: its output is not finite; "
                + ("use --dtype bfloat16 or float32" if rows.dtype == torch.float16 else "the weights are damaged")
            )
        return {f"{label}.layers.{layer}": half for label, half in zip(LABELS, rows.chunk(2), strict=True)}


# ---------------------------------------------------------------------------------------- the dump


@dataclass(slots=True)
class _Staging:
    """A half-made dump, out of sight: a shard per layer, and the stream after one of them to go on from.

    Attributes:
        dump: The final name.
        folder: Where the shards are until then.
        overwrite: Whether a dump of that name may be replaced.
        identity: What must be equal for a resumed run, by what to call it.
        stream: The stream of each batch after the last layer that can be gone on from.
        done: How many layers that is.
        useful: Whether the folder holds something to go on from.
    """

    dump: Path
    folder: Path
    overwrite: bool
    identity: dict[str, str]
    stream: list["torch.Tensor"] = field(default_factory=list)
    done: int = 0
    useful: bool = False
    _saved: float = 0.0
    _cost: float = 0.0

    @classmethod
    def open(cls, dump: Path, identity: dict[str, str], options: CaptureOptions) -> "_Staging":
        """Makes the folder, or takes up the one that an interrupted run left.

        Raises:
            CaptureError: An interrupted run is in the way, or is not of these inputs.
        """
        out = dump.resolve()
        staging = cls(dump, out.with_name(f".{out.name}.ablate-staging"), options.overwrite, identity)
        saved = staging.folder / _STREAM
        if saved.is_file():
            if options.resume and staging._read(saved, overwrite=options.overwrite):
                return staging
            if not options.resume and not options.overwrite:
                raise CaptureError(
                    f"{dump}: an interrupted run is staged in {staging.folder}; --resume goes on with it, "
                    "--overwrite starts again"
                )
        if staging.folder.exists():
            shutil.rmtree(staging.folder)
        staging.folder.mkdir()
        return staging

    def _read(self, saved: Path, *, overwrite: bool) -> bool:
        from safetensors.torch import load_file

        try:
            _, metadata = read_header(saved)
        except CheckpointError:
            return False
        before = json.loads(metadata.get("identity", "{}"))
        changed = [what for what, value in self.identity.items() if before.get(what) != value]
        if changed and overwrite:
            return False
        if changed:
            raise CaptureError(
                f"{self.dump}: cannot be resumed, because {' and '.join(changed)} changed since the interrupted run; "
                "--overwrite starts again"
            )
        done = int(metadata["done"])
        if not all(self._shard(layer).is_file() for layer in range(done)):
            return False
        tensors = load_file(saved)
        self.stream = [tensors[f"batch.{number}"] for number in range(len(tensors))]
        self.done, self.useful = done, True
        return True

    @property
    def kept(self) -> str:
        """What can be gone on from, for an error."""
        return "--resume goes on after the layers that are complete" if self.useful else "nothing was kept"

    def take_up(self, batches: Sequence[_Batch]) -> int:
        """Gives the batches the stream of an interrupted run; returns after how many layers it stands."""
        for batch, stream in zip(batches, self.stream, strict=False):
            batch.hidden = stream
        self.stream.clear()
        return self.done

    def write(self, layer: int, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str]) -> None:
        """Writes a layer's shard."""
        header = {name: (_stored(tensor), list(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
        _write(self._shard(layer), header, metadata, (_bytes_of(tensor) for tensor in tensors.values()))

    def save_stream(self, done: int, batches: Sequence[_Batch]) -> None:
        """Saves what the next layer starts from, unless that would take too large a share of the time."""
        from safetensors.torch import save_file

        start = time.perf_counter()
        if self.useful and start - self._saved < self._cost / _SAVING_SHARE:
            return
        path = self.folder / _STREAM
        partial = self.folder / f"{_STREAM}.partial"
        metadata = {"format": _STREAM_FORMAT, "identity": json.dumps(self.identity), "done": str(done)}
        tensors = {f"batch.{number}": batch.hidden.cpu().contiguous() for number, batch in enumerate(batches)}
        save_file(tensors, partial, metadata)
        partial.replace(path)
        self.useful = True
        self._saved = time.perf_counter()
        self._cost = self._saved - start

    def publish(self, metadata: Mapping[str, str]) -> None:
        """Gives the dump its final name, with everything in it on disk."""
        shards = sorted(self.folder.glob("layer-*.safetensors"))
        if self.dump.suffix == ".safetensors":
            whole = self.folder / "whole.partial"
            found = [(path, tensor) for path in shards for tensor in read_header(path)[0].tensors]
            found.sort(key=lambda place: _order(place[1].name))
            header = {tensor.name: (tensor.dtype, list(tensor.shape), tensor.end - tensor.start) for _, tensor in found}
            _write(whole, header, metadata, _ranges((path, tensor.start, tensor.end) for path, tensor in found))
            whole.replace(self.dump)
            shutil.rmtree(self.folder)
        else:
            for rest in [path for path in self.folder.iterdir() if path not in shards]:
                rest.unlink()
            fsync_folder(self.folder)
            aside = self.folder.with_suffix(".ablate-replaced")
            if self.dump.exists():
                shutil.rmtree(aside, ignore_errors=True)
                self.dump.replace(aside)
            self.folder.replace(self.dump)
            if aside.exists():
                shutil.rmtree(aside)
        fsync_folder(self.dump.absolute().parent)

    def discard(self) -> None:
        """Removes the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shard(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05}.safetensors"


def _order(name: str) -> tuple[int, str]:
    label, _, layer = name.split(".")
    return int(layer), "" if label == LABELS[0] else label


def _stored(tensor: "torch.Tensor") -> str:
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _bytes_of(tensor: "torch.Tensor") -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _ranges(places: Iterable[tuple[Path, int, int]]) -> Iterator[bytes]:
    for path, start, end in places:
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(_COPY_CHUNK, end - file.tell())):
                yield chunk


def _write(
    path: Path, header: Mapping[str, tuple[str, list[int], int]], metadata: Mapping[str, str], data: Iterable[bytes]
) -> None:
    """Writes a safetensors file, durably; by hand, since the library orders metadata anew in every call."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in header.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data)
        file.flush()
        os.fsync(file.fileno())


def _check_dump(model: Path, dump: Path, *, overwrite: bool) -> None:
    if dump.suffix not in ("", ".safetensors") and not dump.is_dir():
        raise UsageError(f"{dump}: a dump is a .safetensors file or a folder; name it without {dump.suffix}")
    if not dump.absolute().parent.is_dir():
        raise UsageError(f"{dump}: the folder that it would lie in does not exist; make it first")
    if dump.resolve() in (model.resolve(), *model.resolve().parents):
        raise UsageError(f"{dump}: holds the model; name another file or folder")
    if not dump.exists() or (dump.is_dir() and not any(dump.iterdir())):
        return
    if not _is_dump(dump):
        raise CaptureError(f"{dump}: already exists and is no activation dump, so it is not replaced; name another")
    if dump.is_dir() and dump.suffix == ".safetensors":
        raise UsageError(f"{dump}: is a folder; name a folder without .safetensors")
    if not overwrite:
        raise CaptureError(f"{dump}: already exists; --overwrite replaces it, or name another")


def _is_dump(path: Path) -> bool:
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
        return all(read_header(file)[1].get("format") == ACTIVATIONS_FORMAT for file in files)
    except CheckpointError:
        return False


def _check_disk(dump: Path, prompts: Sequence[_Prompt], width: int, layers: int, item: int) -> None:
    copies = 2 if dump.suffix == ".safetensors" else 1
    needed = copies * len(prompts) * width * layers * 4 + 2 * _stream_bytes(prompts, width, item)
    free = shutil.disk_usage(dump.absolute().parent).free
    if needed > free:
        raise CaptureError(
            f"{dump}: needs about {_size(needed)} while it is written, but {_size(free)} are free; make room or name "
            "another place"
        )


def _digest(checkpoint: Checkpoint, prompts: Sequence[_Prompt], dtype: str, options: CaptureOptions) -> str:
    """Returns the digest of what determines a dump: headers, configuration, tokens, position and dtype."""
    content = [
        [[shard.name, shard.header_sha256] for shard in checkpoint.shards],
        checkpoint.config,
        prompts,
        [options.position, options.batch, dtype],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(
    checkpoint: Checkpoint, prompts: Sequence[_Prompt], dtype: str, options: CaptureOptions
) -> dict[str, str]:
    """Returns what must be equal for a resumed run to give the same bytes, by what to call it."""
    import torch
    import transformers

    stats = [[shard.path.stat().st_size, shard.path.stat().st_mtime_ns] for shard in checkpoint.shards]
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    contents = {
        "the model": [headers, stats, checkpoint.config],
        "the prompts": prompts,
        "the options": [options.position, options.batch, dtype, str(resolve_device(options.device))],
        "the version of ablate-shards, transformers or torch": [
            __version__,
            transformers.__version__,
            torch.__version__,
        ],
    }
    return {
        what: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        for what, content in contents.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from writing to the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
