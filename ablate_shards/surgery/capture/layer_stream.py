"""Runs a decoder one layer at a time with all prompts through it, its weights loaded or streamed from the shards."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards.errors import CaptureError, reason
from ablate_shards.surgery.capture.dump import DumpWriter, tensor_names
from ablate_shards.surgery.capture.foreign import WeightLoader
from ablate_shards.surgery.capture.prompts import Position, PromptBatch
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.machine.progress import Steps
from ablate_shards.surgery.model.loading import build, decoder_layers, load_model

if TYPE_CHECKING:
    import torch

__all__ = ["REST", "Network", "NotOneStream", "load_whole", "open_streamed", "record_calls", "run_layers"]

#: The part of a decoder that is no layer: embeddings, last norm.
REST = -1


# ---------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Network:
    """A decoder whose layers are on the device, or come there one at a time.

    Attributes:
        decoder: The part of the model that takes tokens and runs the layers.
        layers: Its layers.
        device: Where it computes.
        shards: Where its weights come from, None if they are loaded.
    """

    decoder: Any
    layers: Any
    device: "torch.device"
    shards: "_Shards | None" = None

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

    @property
    def parked(self) -> "torch.device":
        """Where the stream of a batch waits for the next layer."""
        import torch

        return torch.device("cpu") if self.shards is not None else self.device


def load_whole(folder: Path, dtype: "torch.dtype", device: "torch.device") -> Network:
    """Loads a model whole.

    Raises:
        CaptureError: transformers cannot load it, or the checkpoint lacks a weight of its decoder.
        OutOfMemoryError: The device's memory does not suffice.
    """
    from transformers import AutoModel

    where = None if device.type == "cpu" else {"": device}
    network, missing = load_model(folder, AutoModel, CaptureError, dtype=dtype, device_map=where)
    decoder, layers = decoder_layers(folder, network.eval(), CaptureError)
    name = next(name for name, module in network.named_modules() if module is decoder)
    if missing := [key for key in missing if _is_inside(key, name)]:
        raise CaptureError(f"{folder}: the checkpoint holds no weight for {missing[0]}; complete the checkpoint")
    return Network(decoder, layers, device)


def open_streamed(checkpoint: Checkpoint, config: Any, dtype: "torch.dtype", device: "torch.device") -> Network:
    """Builds a model without weights, each part of which is loaded when it is held.

    Raises:
        CaptureError: transformers cannot build it, or loads weights in a way that is not known here.
    """
    import transformers

    network = build(checkpoint.path, transformers.AutoModel, config, CaptureError, dtype=dtype).eval()
    decoder, layers = decoder_layers(checkpoint.path, network, CaptureError)
    try:
        shards = _Shards(checkpoint, network, decoder, layers, device)
    except (ImportError, AttributeError, TypeError) as error:
        raise CaptureError(
            f"transformers {transformers.__version__} loads weights in a way that is not known here "
            f"({reason(error)}), so they cannot be streamed; use --offload never, or another version"
        ) from error
    return Network(decoder, layers, device, shards)


class _Shards:
    """Loads parts of a model built without weights."""

    def __init__(self, checkpoint: Checkpoint, model: Any, decoder: Any, layers: Any, device: "torch.device") -> None:
        self._loader = WeightLoader(model, device)
        names = {module: name for name, module in model.named_modules()}
        self._modules: dict[int, tuple[str, Any]] = {
            REST: (names[decoder], decoder),
            **{index: (names[layer], layer) for index, layer in enumerate(layers)},
        }
        self._tensors: dict[int, list[tuple[str, Path]]] = {part: [] for part in self._modules}
        for shard in checkpoint.shards:
            for tensor in shard.tensors:
                target = self._loader.target(tensor.name)
                if target is not None and (part := self._part_of(target)) is not None:
                    self._tensors[part].append((tensor.name, shard.path))
        for module in decoder.modules():
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, name, buffer.to(device))

    def _part_of(self, target: str) -> int | None:
        """Returns the part that a parameter belongs to, None if it is not in the decoder."""
        inside = [(len(name), part) for part, (name, _) in self._modules.items() if _is_inside(target, name)]
        return max(inside, key=lambda place: place[0])[1] if inside else None

    def load(self, part: int) -> None:
        """Brings one part's weights to the device."""
        from safetensors import safe_open

        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}
            tensors = {}
            for name, path in self._tensors[part]:
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensors[name] = files[path].get_slice(name)
            problems = self._loader.load(tensors)
        where, _ = self._modules[part]
        if problems:
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
        if part != REST:
            return parameters
        return [
            (name, parameter)
            for name, parameter in parameters
            if self._part_of(f"{where}.{name}" if where else name) == REST
        ]


def _is_inside(target: str, module: str) -> bool:
    return not module or target.startswith(f"{module}.")


# ---------------------------------------------------------------------------------------- running


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The arguments of a layer besides the stream."""

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

    @property
    def values(self) -> tuple[Any, ...]:
        """All that it was called with."""
        return (*self.args, *self.kwargs.values())


@dataclass(slots=True)
class _Passage:
    """A batch on its way through the layers.

    Attributes:
        batch: The prompts.
        hidden: Their stream as it stands, ``[prompts, tokens, d]``.
        inputs: What each layer is called with beside it.
    """

    batch: PromptBatch
    hidden: "torch.Tensor"
    inputs: list[_Inputs]


class NotOneStream(Exception):  # noqa: N818 - caught where it is raised
    """A model does more between its layers than pass on the stream."""


class _OtherOutput(NotOneStream):
    """A model takes something else from its layers than it was given."""


def run_layers(
    network: Network, batches: Sequence[PromptBatch], dump: DumpWriter, position: Position, progress: Steps
) -> int:
    """Captures every layer into a dump; returns how many an interrupted run had captured.

    Raises:
        CaptureError: The architecture cannot be captured this way, a weight is missing, or the model overflowed.
        OutOfMemoryError: The device's memory does not suffice.
    """
    try:
        with network.holding(REST):
            passages = record_calls(network, batches)
    except NotOneStream as error:
        if network.shards is not None:
            raise CaptureError(
                f"{type(network.decoder).__name__}: {error}, so its layers cannot be run one at a time; use --offload "
                "never"
            ) from error
        _run_whole(network, batches, dump, position)
        return 0
    total, first = len(network.layers), 0
    # A layer that is given some object may leave something in it for a later one, and a run can only start again.
    keeps = all(_is_plain(value) for passage in passages for inputs in passage.inputs for value in inputs.values)
    if keeps and dump.stream:
        first = dump.done
        for passage, hidden in zip(passages, dump.stream, strict=True):
            passage.hidden = hidden
        dump.stream.clear()
    progress.count(first, total)
    try:
        for index in range(first, total):
            rows = _Rows(position)
            with network.holding(index):
                for passage in passages:
                    hidden = passage.inputs[index].call(network.layers[index], passage.hidden.to(network.device))
                    rows.add(passage.batch, hidden)
                    passage.hidden = hidden.to(network.parked)
            dump.write(index, rows.tensors(index, network.decoder))
            if keeps and index + 1 < total:
                dump.save_stream(index + 1, [passage.hidden for passage in passages])
            progress.count(index + 1, total)
    except CaptureError:
        # It would end the same way again.
        dump.discard()
        raise
    return first


def _run_whole(network: Network, batches: Sequence[PromptBatch], dump: DumpWriter, position: Position) -> None:
    """Captures every layer in one forward pass per batch."""
    rows = [_Rows(position) for _ in network.layers]
    for batch in batches:
        hooks = [
            layer.register_forward_hook(
                lambda _module, _inputs, output, batch=batch, row=row: row.add(batch, _stream_of(output))
            )
            for layer, row in zip(network.layers, rows, strict=True)
        ]
        try:
            _forward(network, batch)
        finally:
            for hook in hooks:
                hook.remove()
    for index, row in enumerate(rows):
        dump.write(index, row.tensors(index, network.decoder))


def _forward(network: Network, batch: PromptBatch) -> None:
    ids, mask = batch.ids.to(network.device), batch.mask.to(network.device)
    network.decoder(input_ids=ids, attention_mask=mask, use_cache=False)


def record_calls(network: Network, batches: Sequence[PromptBatch]) -> list[_Passage]:
    """Finds what each layer of each batch is called with, without running a layer.

    Raises:
        NotOneStream: What a layer is called with depends on more than the tokens.
    """
    first, tuples = batches[0], False
    try:
        begun = _record_batch(network, first, tuples=False)
    except _OtherOutput:
        tuples = True
        begun = _record_batch(network, first, tuples=True)
    # A second time with another stream: what changes was computed from it, and would be wrong.
    again = _record_batch(network, first, tuples=tuples, shift=1.0)
    for before, after in zip(begun.inputs, again.inputs, strict=True):
        if not _same((*before.args, *before.kwargs.items()), (*after.args, *after.kwargs.items())):
            raise NotOneStream("computes more from the residual stream than its layers do")
    return [begun, *(_record_batch(network, batch, tuples=tuples) for batch in batches[1:])]


def _record_batch(network: Network, batch: PromptBatch, *, tuples: bool, shift: float = 0.0) -> _Passage:
    """Runs a model whose layers only add ``shift``."""
    import torch

    streams: list[torch.Tensor] = []
    inputs: list[_Inputs] = []
    expected: list[torch.Tensor] = []

    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        named = not args
        hidden = kwargs.pop("hidden_states", None) if named else args[0]
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or len(hidden) != len(batch.rows):
            raise _OtherOutput("hands its layers something else than one residual stream")
        if expected and not torch.equal(hidden, expected[-1]):
            raise NotOneStream("changes the residual stream between its layers")
        if not streams:
            streams.append(hidden)
        inputs.append(_Inputs(args[1:], kwargs, named))
        expected[:] = [hidden + shift if shift else hidden]
        return (expected[-1], None) if tuples else expected[-1]

    for layer in network.layers:
        layer.forward = layer_forward
    try:
        _forward(network, batch)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise _OtherOutput("wants more from its layers than a residual stream") from error
    finally:
        for layer in network.layers:
            layer.__dict__.pop("forward", None)
    if len(inputs) != len(network.layers):
        raise NotOneStream(f"runs {len(inputs)} layers in a pass instead of {len(network.layers)}")
    return _Passage(batch, streams[0].to(network.parked), inputs)


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


class _Rows:
    """Gathers one layer's activations at the positions that count."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._rows: dict[int, torch.Tensor] = {}

    def add(self, batch: PromptBatch, hidden: "torch.Tensor") -> None:
        """Takes the rows of a batch from its stream, ``[prompts, tokens, d]``."""
        for line, (row, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True)):
            taken = hidden[line, start:end].cpu()
            self._rows[row] = taken[-1].clone() if self._position == "last" else taken.double().mean(0).float()

    def tensors(self, layer: int, decoder: Any) -> dict[str, "torch.Tensor"]:
        """Returns the dump's tensors of a layer, each ``[pairs, d]``; of a rank's share of rows, half of these each.

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
        return dict(zip(tensor_names(layer), rows.tensor_split(2), strict=True))
