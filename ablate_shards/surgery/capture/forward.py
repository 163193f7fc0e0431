"""Captures the residual stream after every decoder layer, one layer at a time with all prompts through it."""

import contextlib
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ablate_shards import __version__
from ablate_shards.errors import CaptureError, Interrupted, UsageError
from ablate_shards.surgery.capture.dump import DumpWriter, check_disk, check_dump, tensor_names
from ablate_shards.surgery.capture.layer_stream import Network, load_whole, open_streamed, run_layers
from ablate_shards.surgery.capture.prompts import EncodedTurn, Position, encode_pairs, make_batches
from ablate_shards.surgery.capture.ranks import is_captured, join_dump, metadata_of_part, part_of_dump, share_of_batches
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.directions.activations import ACTIVATIONS_FORMAT, LABELS
from ablate_shards.surgery.machine.crew import Engine, Workers, hired
from ablate_shards.surgery.machine.devices import resolve_device, torch_dtype
from ablate_shards.surgery.machine.parts import PARTS
from ablate_shards.surgery.machine.progress import Silent, Steps
from ablate_shards.surgery.machine.ranks import WorkerRank
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import beside, locked
from ablate_shards.surgery.model.loading import (
    Dtype,
    check_packages,
    free_memory,
    headers_digest,
    open_folder,
    open_same,
    quiet,
    read_config,
)
from ablate_shards.surgery.model.samples import Pair

if TYPE_CHECKING:
    import torch

__all__ = ["CaptureOptions", "Captured", "Offload", "Position", "capture"]

Offload = Literal["auto", "never", "always"]

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
#: Share of the free memory that weights and activations may take before the weights are streamed.
_SHARE_OF_FREE = 0.8


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What to capture, and how.

    Attributes:
        position: ``last`` token of the response, or before the answer where a pair has no response; ``mean``
            over the tokens of the response; ``auto``: ``mean`` where pairs have responses, else ``last``.
        plain: Feed the prompts as they are instead of through the chat template.
        batch: Prompts computed at a time.
        dtype: ``auto`` (that of most weights), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        offload: Whether weights are streamed from the shards, a layer at a time, instead of loaded;
            ``auto`` streams them when they would not fit.
        memory: Bytes that loaded weights may take with ``auto``, most of the free memory if None.
        resume: Go on with an interrupted run.
        overwrite: Replace an existing dump.
        rank: Which of several processes that share the prompts this one is, None where it is the only one.
        command: The words of the command line, for those who have to run another rank.
        engine: Whether the model runs here, or on workers of Ray.
        workers: How many of those, one per GPU if None, or per machine where there are none.
    """

    position: Position | Literal["auto"] = "auto"
    plain: bool = False
    batch: int = 16
    dtype: Dtype = "auto"
    device: str = "auto"
    offload: Offload = "auto"
    memory: int | None = None
    resume: bool = False
    overwrite: bool = False
    rank: WorkerRank | None = None
    command: tuple[str, ...] = ()
    engine: Engine = "local"
    workers: int | None = None


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
        device: Where; the devices of all workers of Ray, where they differ.
        streamed: Whether the weights were streamed a layer at a time, by all workers of Ray where those captured.
        resumed: Layers taken over from an interrupted run, by all workers of Ray where those captured.
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


def capture(model: Path, dump: Path, pairs: Sequence[Pair], options: CaptureOptions, progress: Steps) -> Captured:
    """Writes the residual stream after every decoder layer, at one position of each prompt, to ``dump``.

    No code from the checkpoint runs, and nothing is unpickled. The dump appears complete or not at all, and its
    bytes depend on the model, the pairs and the options alone. One of several ranks captures its share of the prompts
    into a hidden folder beside the dump.

    Args:
        model: A checkpoint folder with tokenizer.
        dump: A file ending in ``.safetensors``, or a folder of one shard per layer.
        pairs: The prompts; row i of every tensor is pair i.
        options: What to capture, and how.
        progress: Receives how far the run has come.

    Returns:
        What was captured.

    Raises:
        CaptureError: The model, its tokenizer or the pairs cannot be used, or the dump cannot be written.
        CheckpointError: The checkpoint is malformed or holds no safetensors.
        ExecuteError: Another run is writing the dump, or Ray does not answer.
        UsageError: The name of the dump or the device cannot be used.
        Interrupted: Ctrl-C or SIGTERM; the layers that are complete are kept for ``resume``.
    """
    check_packages(
        "capture runs the model with transformers and accelerate", "transformers", "accelerate", error=CaptureError
    )
    import torch

    dump = dump.resolve() if dump.is_symlink() else dump
    check_dump(model, dump, overwrite=options.overwrite)
    if not pairs:
        raise CaptureError("there are no pairs to capture; expected at least one")
    if options.engine == "ray":
        return _capture_on_workers(model, dump, pairs, options, progress)
    checkpoint = open_folder(model, CaptureError)
    device = resolve_device(options.device)
    rank = options.rank
    place = dump if rank is None else part_of_dump(dump, rank)
    with quiet(), sigterm_as_interrupt(), locked(place), torch.inference_mode():
        config = read_config(model, CaptureError)
        if getattr(config, "is_encoder_decoder", False):
            raise CaptureError(f"{model}: {config.model_type} has an encoder; expected a decoder-only language model")
        text = config.get_text_config(decoder=True)
        position = _position_of(pairs, options.position)
        prompts = encode_pairs(model, config, pairs, position, plain=options.plain)
        dtype = _dtype_of(checkpoint, config, options.dtype)
        weights = _weight_bytes(checkpoint, dtype)
        stream = sum(len(prompt.tokens) for prompt in prompts) * text.hidden_size * _BYTES[dtype]
        streamed = _is_streamed(weights, stream, device, options)
        if streamed and _is_quantised(config):
            raise CaptureError(
                f"{model}: its weights are quantised, and only plain weights can be streamed from the shards; "
                "dequantise it with `ablate-shards dequantise`, or use --offload never"
            )
        check_disk(dump, len(prompts) * text.hidden_size * text.num_hidden_layers * 4, stream)
        how = (position, options.batch, dtype)
        metadata = {
            "format": ACTIVATIONS_FORMAT,
            "positive_label": LABELS[0],
            "negative_label": LABELS[1],
            "model": model.resolve().name,
            "position": position,
            "hidden_size": str(text.hidden_size),
            "inputs": _inputs_digest(checkpoint, prompts, how),
        }
        identity = _identity(checkpoint, prompts, how, str(device))
        batches = make_batches(prompts, options.batch, _pad(text))
        captured = Captured(
            dump=dump,
            pairs=len(pairs),
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            position=position,
            dtype=dtype,
            device=str(device),
            streamed=streamed,
            resumed=0,
            longest=max(len(prompt.tokens) for prompt in prompts),
        )
        if rank is not None:
            progress.note(f"this is {rank}, as {rank.said_by} say")
            agreed = _identity(checkpoint, prompts, how, device.type)
            if is_captured(place, rank, agreed, overwrite=options.overwrite):
                progress.note("it was complete already")
                return dataclasses.replace(captured, resumed=captured.layers)
            batches = share_of_batches(batches, rank)
            metadata = metadata_of_part(metadata, agreed, batches, captured.layers, rank, options.command)
        resume = options.resume or rank is not None
        writer = DumpWriter(place, metadata, identity, resume=resume, overwrite=options.overwrite)
        try:
            resumed = 0
            if batches:
                kind = torch_dtype(dtype)
                network = (
                    open_streamed(checkpoint, config, kind, device) if streamed else load_whole(model, kind, device)
                )
                loaded = "streamed from the shards, a layer at a time" if streamed else "loaded whole"
                progress.note(f"weights: {size_text(weights)} as {dtype} on {device}, {loaded}")
                _check_tokens(model, network, prompts)
                resumed = run_layers(network, batches, writer, position, progress)
            else:
                for layer in range(captured.layers):
                    writer.write(layer, dict.fromkeys(tensor_names(layer), torch.empty(0, text.hidden_size)))
            writer.publish()
        except KeyboardInterrupt as error:
            raise Interrupted(f"{dump}: interrupted; {writer.kept}") from error
        except torch.OutOfMemoryError as error:
            less = "use a smaller --batch" if streamed else "use --offload always or a smaller --batch"
            raise CaptureError(f"{model}: {device} has too little memory; {less}") from error
        except OSError as error:
            raise CaptureError(f"{error.filename or dump}: {error.strerror or error}; {writer.kept}") from error
        finally:
            # After a success it is gone already.
            if not writer.useful:
                writer.discard()
    return dataclasses.replace(captured, resumed=resumed)


def _capture_on_workers(
    model: Path, dump: Path, pairs: Sequence[Pair], options: CaptureOptions, progress: Steps
) -> Captured:
    """Has each worker of Ray capture what a rank captures, and joins the parts."""
    if options.rank is not None:
        raise UsageError("--engine ray: deals the prompts out itself; leave out --worker-rank and --world-size")
    workers = Workers(options.engine, options.workers, options.device)
    workers.check()
    checkpoint = open_folder(model, CaptureError)
    place = beside(dump.absolute(), PARTS)
    place.mkdir(exist_ok=True)
    # What tells whether workers write where this process reads.
    token = place / f"shared-{secrets.token_hex(8)}"
    token.touch()
    alone = dataclasses.replace(options, engine="local", workers=None)
    try:
        with hired(workers, contextlib.nullcontext) as crew:
            count = crew.size
            parts = {
                index: dataclasses.replace(alone, rank=WorkerRank(index, count, "--engine ray") if count > 1 else None)
                for index in range(count)
            }
            progress.note(f"workers: {count}, each with its share of {2 * len(pairs)} prompts")
            given = (model.resolve(), headers_digest(checkpoint), dump.absolute(), token, pairs)
            captured: list[Captured] = []
            for _, part in crew.each(_part, {each: (*given, how) for each, how in parts.items()}):
                captured.append(part)
                progress.count(len(captured), count)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{dump}: interrupted; the same command goes on after the layers that are complete"
        ) from error
    finally:
        token.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # where there are parts
            place.rmdir()
    if count > 1:
        join_dump(dump, overwrite=options.overwrite)
    return _of_all(captured, dump)


def _of_all(parts: Sequence[Captured], dump: Path) -> Captured:
    """Returns what is true of all that workers captured of a dump."""
    return dataclasses.replace(
        parts[0],
        dump=dump,
        device=", ".join(sorted({part.device for part in parts})),
        streamed=all(part.streamed for part in parts),
        resumed=min(part.resumed for part in parts),
    )


def _part(
    _: None, model: Path, headers: str, dump: Path, token: Path, pairs: Sequence[Pair], options: CaptureOptions
) -> Captured:
    """Captures a rank's share on a worker of Ray."""
    open_same(model, headers, CaptureError)
    if not token.exists():
        raise CaptureError(
            f"{dump.parent}: is another folder on this machine than where the command runs; name a DUMP on a disk that "
            "all machines share"
        )
    return capture(model, dump, pairs, options, Silent())


def _position_of(pairs: Sequence[Pair], wanted: Position | Literal["auto"]) -> Position:
    """Returns where in each prompt to read; a response says in all its tokens what it is."""
    if wanted != "auto":
        return wanted
    return "mean" if all(side.response for pair in pairs for side in (pair.positive, pair.negative)) else "last"


def _dtype_of(checkpoint: Checkpoint, config: Any, wanted: Dtype) -> str:
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


def _is_quantised(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    return sum(
        (tensor.end - tensor.start) * _BYTES[dtype] // _BYTES.get(tensor.dtype, _BYTES[dtype])
        for tensor in checkpoint.tensors.values()
    )


def _is_streamed(weights: int, stream: int, device: "torch.device", options: CaptureOptions) -> bool:
    if options.offload != "auto":
        return options.offload == "always"
    if options.memory is not None:
        return weights > options.memory
    return weights + stream > _SHARE_OF_FREE * free_memory(device)


def _pad(text: Any) -> int:
    """Returns a token to fill up with."""
    pad = next((token for token in (text.pad_token_id, text.eos_token_id) if isinstance(token, int)), 0)
    return max(pad, 0)


def _check_tokens(model: Path, network: Network, prompts: Sequence[EncodedTurn]) -> None:
    known = network.decoder.get_input_embeddings().num_embeddings
    if (largest := max(max(prompt.tokens) for prompt in prompts)) >= known:
        raise CaptureError(
            f"{model}: its tokenizer gives token {largest}, but the model has {known}; the tokenizer is another model's"
        )


def _inputs_digest(checkpoint: Checkpoint, prompts: Sequence[EncodedTurn], how: tuple[Position, int, str]) -> str:
    """Returns the digest of what determines a dump: headers, configuration, tokens; position, batch and dtype."""
    return _digest(
        [
            [[shard.name, shard.header_sha256] for shard in checkpoint.shards],
            checkpoint.config,
            prompts,
            how,
        ]
    )


def _identity(
    checkpoint: Checkpoint, prompts: Sequence[EncodedTurn], how: tuple[Position, int, str], device: str
) -> dict[str, str]:
    """Returns what must be equal for a resumed run to give the same bytes, by what to call it."""
    import torch
    import transformers

    stats = [[shard.path.stat().st_size, shard.path.stat().st_mtime_ns] for shard in checkpoint.shards]
    headers = [shard.header_sha256 for shard in checkpoint.shards]
    versions = [__version__, transformers.__version__, torch.__version__]
    return {
        "the model": _digest([headers, stats, checkpoint.config]),
        "the prompts": _digest(prompts),
        "the options": _digest([*how, device]),
        "the version of ablate-shards, transformers or torch": _digest(versions),
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
