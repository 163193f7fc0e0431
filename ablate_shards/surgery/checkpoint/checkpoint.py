"""Reads what a checkpoint holds from its headers alone, and refuses what is malformed or unsafe."""

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ablate_shards.errors import CheckpointError, PlanError, reason
from ablate_shards.names import CONFIG_NAME, RECEIPT_NAMES, WEIGHTS_NAME, is_report
from ablate_shards.surgery.checkpoint.files import Files, Folder, Remote, leaves_folder, pointed_at
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, Shard, TensorInfo, read_header
from ablate_shards.surgery.machine.files import same_bytes

__all__ = [
    "Checkpoint",
    "assemble",
    "files_of",
    "fingerprint",
    "index_of",
    "open_checkpoint",
    "read_config",
    "read_range",
    "read_vector",
    "same_tensor",
    "size_of",
    "text_part",
]

_OWN_FORMAT = "ablate-shards."
_OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".refuse",
}
_CONSOLIDATED = "consolidated"
_QUANTISATION, _BESIDE = "quantization_config", "hf_quant_config.json"
_INDEX_SUFFIX = ".safetensors.index.json"
#: The name that loaders look for first, and those of the same weights in another dtype beside it.
_MODEL, _VARIANT = "model.safetensors", re.compile(r"model\.[\w-]+\.safetensors|diffusion_pytorch_model\.safetensors")
#: What models around a decoder call its part of their configuration: transformers, InternVL and DeepSeek-VL.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
#: What peft puts into a model that it adapts.
_ADAPTED = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|base_layer)(?:\.|$)")
#: Written by transformers 5.4, where a part of a name was taken for the whole of it.
_DOUBLED = "_blocks_blocks"
_MLX_ADAPTER = re.compile(r"(?:\d+_)?adapters\.safetensors")
_NUMBERED = re.compile(r"^(?P<stem>.*?)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.safetensors$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
        path: What the user named: a file or a folder.
        root: The folder that names are relative to; none of this machine where ``remote`` is set.
        shards: The weight files, sorted by name.
        tensors: Every tensor by name.
        config: ``config.json`` as parsed, or None where there is none; with the ``quantization_config`` that
            ``hf_quant_config.json`` beside it stands for.
        sidecars: Other files that an edited checkpoint keeps, relative names, sorted.
        left_out: Files that an edited checkpoint does not keep, with the reason.
        fingerprint: Digest of names, sizes, modification times (of remote files, digests) and headers.
        remote: Where the files come from, None where they are on this machine.
        origin: The repository and the commit that they are of, or were before they were fetched.
        amended: Files that are not those of the source: see ``amended.py``.
        view: What reads these files, and all others, where there are any.
    """

    path: Path
    root: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] | None
    sidecars: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    fingerprint: str
    remote: Remote | None = None
    origin: tuple[str, str | None] | None = None
    amended: frozenset[str] = frozenset()
    view: Remote | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path) if self.remote is None else self.remote.name

    @property
    def files(self) -> Files:
        """Its files, wherever they are."""
        return self.view or self.remote or Folder(self.root)

    def fetched(self, file: str) -> Remote | None:
        """Returns what brings one of its files here, None where it can be opened."""
        return self.view if file in self.amended else self.remote

    @property
    def identity(self) -> Mapping[str, str]:
        """What a receipt says of where it is from."""
        name, revision = self.origin or (self.path.resolve().name, None)
        return {"name": name} | ({"revision": revision} if revision else {})


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads every header of a checkpoint and checks the index against the shards, both ways.

    Args:
        path: One ``.safetensors`` file, or a folder with an index or with bare shards.

    Returns:
        The checkpoint; no weight has been read.

    Raises:
        CheckpointError: The checkpoint is missing, malformed, incomplete or reaches out of its folder.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a .safetensors file or a folder of them")
        shard, metadata = read_header(path)
        _refuse_own_format(str(path), metadata)
        return _checkpoint(path, Folder(path.parent), [shard], sidecars=[], left_out=[])
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    return assemble(Folder(path))


def assemble(files: Files, remote: Remote | None = None) -> Checkpoint:
    """Reads every header of a checkpoint folder, wherever it is, and checks the index against the shards.

    Args:
        files: Its files.
        remote: The same, where they are not on this machine.

    Raises:
        CheckpointError: The checkpoint is malformed, incomplete or reaches out of its folder.
    """
    listed = list(files.walk())
    edited = any(name in RECEIPT_NAMES for name, _ in listed)
    with_adapter = files.has(CONFIG_NAME)
    here = [name for name, why in listed if why is None and "/" not in name]
    aside = _consolidated_are_aside(files, here)
    index = _index_name(files, [name for name in here if not (aside and name.startswith(_CONSOLIDATED))])
    weight_map = {} if index is None else _read_index(files, index)
    named = set(weight_map.values())
    _check_set(files, index, named, here)
    shards: list[Shard] = []
    sidecars: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name, why in listed:
        if why is not None:
            left_out.append((name, why))
        elif name in named:
            pass
        elif name.endswith(".safetensors"):
            shard, metadata = files.header(name)
            if metadata.get("format", "").startswith(_OWN_FORMAT):
                left_out.append((name, "activations or directions, not weights"))
            elif index is None and _MODEL in here and _VARIANT.fullmatch(name):
                left_out.append((name, "a variant of the weights, unedited"))
            elif aside and name.startswith(_CONSOLIDATED):
                left_out.append((name, "holds the weights in another layout, unedited"))
            elif "/" in name or name == WEIGHTS_NAME or (with_adapter and _MLX_ADAPTER.fullmatch(name)):
                sidecars.append(name)
            elif index is not None:
                raise CheckpointError(
                    f"{files.shown(name)}: {index} does not name it, so it would stay unedited, and some loaders would "
                    "prefer it; move it away, or restore the index that came with the shards"
                )
            else:
                shards.append(shard)
        elif aside and name.startswith(_CONSOLIDATED) and name.endswith(_INDEX_SUFFIX):
            left_out.append((name, "the index of weights in another layout"))
        elif PurePosixPath(name).suffix in _OTHER_WEIGHTS or name.endswith(".bin.index.json"):
            left_out.append((name, "holds weights in another format, unedited"))
        elif name in (*RECEIPT_NAMES, "activations.npz", "directions.npz") or (edited and is_report(name)):
            left_out.append((name, "belongs to an earlier edit"))
        else:
            sidecars.append(name)
    if index is not None:
        shards = [_indexed_shard(files, name, index) for name in sorted(named)]
        _check_index(files.shown(index), weight_map, shards)
    elif not shards and with_adapter:
        raise CheckpointError(
            f"{files.name}: holds an adapter, not a model; name the model that it was trained on, or add it "
            "to that one with `ablate-shards merge MODEL ADAPTER OUT`"
        )
    elif not shards:
        below = pointed_at(name for name in sidecars if name.endswith(".safetensors"))
        way_out = below or "; convert the checkpoint to safetensors first"
        raise CheckpointError(f"{files.name}: no safetensors weights here{way_out}")
    else:
        _check_numbering(files, [shard.name for shard in shards])
    if with_adapter:
        raise CheckpointError(
            f"{files.shown(CONFIG_NAME)}: lies beside the weights of a model, so transformers adds its adapter to them "
            f"whenever it loads the folder, and they alone are not the model; move {CONFIG_NAME} and the adapter's "
            "weights to a folder of their own (from the Hub, download the repository first), and add them with "
            "`ablate-shards merge MODEL ADAPTER OUT` if they belong to it"
        )
    root = Path(files.name)
    return _checkpoint(root, files, shards, sidecars=sidecars, left_out=left_out, remote=remote)


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Returns the paths of every shard and sidecar that is on this machine."""
    if checkpoint.remote is not None:
        return []
    return [shard.path for shard in checkpoint.shards] + [checkpoint.root / name for name in checkpoint.sidecars]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns the digest of names, sizes and modification times as they are now, and of the headers read.

    Raises:
        HubError: A remote folder cannot be listed.
        OSError: A file is gone.
    """
    files = checkpoint.files if checkpoint.remote is None else checkpoint.remote.now()
    return _fingerprint(files, checkpoint.shards, checkpoint.sidecars)


def size_of(checkpoint: Checkpoint, file: str) -> int:
    """Returns the size in bytes of one of a checkpoint's files."""
    return checkpoint.files.size(file)


def index_of(checkpoint: Checkpoint) -> str | None:
    """Returns the file that says which shard holds which tensor, None where there is none."""
    return _index_name(checkpoint.files, (name for name in checkpoint.sidecars if "/" not in name))


def read_range(checkpoint: Checkpoint, tensor: TensorInfo) -> bytes:
    """Returns the bytes of one small tensor."""
    if (remote := checkpoint.fetched(tensor.shard)) is not None:
        return remote.read_range(tensor.shard, tensor.start, tensor.end)
    with (checkpoint.root / tensor.shard).open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


def same_tensor(first: Checkpoint, one: TensorInfo, second: Checkpoint, other: TensorInfo) -> bool:
    """Tells whether a tensor of each of two checkpoints has the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    never = threading.Event()

    def fill(checkpoint: Checkpoint, tensor: TensorInfo, data: memoryview, offset: int) -> None:
        checkpoint.files.read_into(tensor.shard, data, tensor.start + offset, never)

    return same_bytes(partial(fill, first, one), partial(fill, second, other), one.end - one.start)


def _checkpoint(
    path: Path,
    files: Files,
    shards: list[Shard],
    *,
    sidecars: list[str],
    left_out: list[tuple[str, str]],
    remote: Remote | None = None,
) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if (other := tensors.get(tensor.name)) is not None:
                raise CheckpointError(
                    f"{tensor.name}: is in both {other.shard} and {shard.name}; remove the stale shard"
                )
            tensors[tensor.name] = tensor
    if (adapted := next((name for name in tensors if _ADAPTED.search(name)), None)) is not None:
        if len(shards) == 1 and shards[0].name == WEIGHTS_NAME:
            raise CheckpointError(
                f"{files.shown(WEIGHTS_NAME)}: holds the weights of an adapter, not a model; name its folder, and add "
                "it to its model with `ablate-shards merge MODEL ADAPTER OUT`"
            )
        raise CheckpointError(
            f"{adapted}: belongs to an adapter, so {tensors[adapted].shard} is of a model saved with it inside; load "
            "it as it was saved, and save it again after peft's merge_and_unload()"
        )
    if (doubled := next((name for name in tensors if name.endswith(_DOUBLED)), None)) is not None:
        raise CheckpointError(
            f"{doubled}: transformers 5.4 saves the blocks of gpt-oss under such names, which nothing loads; "
            f"rename them in {tensors[doubled].shard}, *{_DOUBLED} to *_blocks and *_blocks_scales to *_scales"
        )
    return Checkpoint(
        path=path,
        root=Path(files.name),
        shards=tuple(shards),
        tensors=tensors,
        config=read_config(files),
        sidecars=tuple(sidecars),
        left_out=tuple(left_out),
        fingerprint=_fingerprint(files, shards, sidecars),
        remote=remote,
    )


def _fingerprint(files: Files, shards: Iterable[Shard], sidecars: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name, header in (
        *((shard.name, shard.header_sha256) for shard in shards),
        *((name, "") for name in sidecars),
    ):
        digest.update(f"{name}\0{files.stamp(name)}\0{header}\n".encode())
    return digest.hexdigest()


def _consolidated_are_aside(files: Files, names: Sequence[str]) -> bool:
    """Returns whether files called consolidated, as Mistral publishes them, hold what others hold as well."""
    weights = [name for name in names if name.endswith(".safetensors") and name != WEIGHTS_NAME]
    if all(not name.startswith(_CONSOLIDATED) for name in weights):
        return True
    others = (name for name in weights if not name.startswith(_CONSOLIDATED))
    return any(not files.header(name)[1].get("format", "").startswith(_OWN_FORMAT) for name in others)


def _check_set(files: Files, index: str | None, named: Set[str], names: Sequence[str]) -> None:
    """Refuses an index none of whose shards is there, beside other weights: it may be what is out of place."""
    others = [name for name in names if name.endswith(".safetensors") and name != WEIGHTS_NAME]
    if index is not None and others and not any(map(files.has, named)):
        raise CheckpointError(
            f"{files.shown(index)}: names {min(named)}, and nothing of what it names is here, but {others[0]} is; "
            "remove the index if that is the whole model, or download the shards"
        )


def _index_name(files: Files, names: Iterable[str]) -> str | None:
    found = sorted(name for name in names if name.endswith(_INDEX_SUFFIX))
    if "model.safetensors.index.json" in found:
        return "model.safetensors.index.json"
    if len(found) > 1:
        raise CheckpointError(f"{files.name}: more than one index ({', '.join(found)}); leave the one to edit")
    return found[0] if found else None


def _read_index(files: Files, name: str) -> dict[str, str]:
    index = files.shown(name)
    content = _read_json(files, name)
    weight_map = content.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(value, str) for value in weight_map.values())
    ):
        raise CheckpointError(
            f'{index}: expected a "weight_map" from tensor names to shards, found none; '
            "restore the index, or remove it if the shards are complete"
        )
    for tensor, name in weight_map.items():
        shard = PurePosixPath(name)
        if leaves_folder(name):
            raise CheckpointError(
                f"{index}: {tensor} points to {name!r}, which leaves the folder; only shards beside the index are read"
            )
        if name != shard.as_posix():
            raise CheckpointError(f"{index}: {tensor} points to {name!r}; write it as {shard.as_posix()!r}")
    return weight_map


def _indexed_shard(files: Files, name: str, index: str) -> Shard:
    if not files.has(name):
        raise CheckpointError(f"{files.shown(name)}: missing, although {index} names it; download it")
    shard, metadata = files.header(name)
    _refuse_own_format(files.shown(name), metadata)
    return shard


def _check_index(index: str, weight_map: Mapping[str, str], shards: Iterable[Shard]) -> None:
    actual = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    for tensor, name in weight_map.items():
        found = actual.get(tensor)
        if found != name:
            where = f"it is in {found}" if found else "no shard holds it"
            raise CheckpointError(
                f"{index}: says {tensor} is in {name}, but {where}; restore the index that came with the shards"
            )
    for tensor, name in actual.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{index}: does not list {tensor}, which {name} holds; restore the index that came with the shards"
            )


def _check_numbering(files: Files, names: list[str]) -> None:
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            sets.setdefault((match["stem"], match["count"]), {})[int(match["number"])] = match["number"]
    for (stem, count), numbers in sets.items():
        digits, first = min(map(len, numbers.values())), 0 if 0 in numbers else 1  # most count from 1
        for number in range(first, int(count) + first):
            if number not in numbers:
                wanted = f"{stem}-{number:0{digits}d}-of-{count}.safetensors"
                here = f"{stem}-{next(iter(numbers.values()))}-of-{count}.safetensors"
                raise CheckpointError(f"{files.shown(wanted)}: missing, although {here} is here; download it")


def text_part(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Returns what a config.json says of the decoder alone and the key of it, None where all of it is about that."""
    return next(((key, config[key]) for key in _TEXT_PARTS if isinstance(config.get(key), Mapping)), None)


def read_config(files: Files) -> dict[str, Any] | None:
    """Returns config.json, with what ModelOpt says of quantised weights beside it where it says nothing of them.

    Raises:
        CheckpointError: It is not a JSON object, or the other is not as ModelOpt writes it.
    """
    if not files.has("config.json"):
        return None
    config = _read_json(files, "config.json")
    part = text_part(config)
    said = any(place.get(_QUANTISATION) is not None for place in (config, *([part[1]] if part else [])))
    if said or not files.has(_BESIDE):
        return config
    quantisation = _read_json(files, _BESIDE).get("quantization")
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{files.shown(_BESIDE)}: expected an object as quantization; restore the file")
    return {**config, _QUANTISATION: {"quant_method": "modelopt", **quantisation}}


def _read_json(files: Files, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{files.shown(name)}: not valid JSON ({reason(error)}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{files.shown(name)}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse_own_format(shown: str, metadata: Mapping[str, str]) -> None:
    if (found := metadata.get("format", "")).startswith(_OWN_FORMAT):
        raise CheckpointError(f"{shown}: holds {found}, not the weights of a model")


def read_vector(checkpoint: Checkpoint, tensor: TensorInfo) -> np.ndarray:
    """Reads one small tensor of any float dtype as float64, in its own shape.

    Raises:
        PlanError: The dtype is not BF16, F16 or F32, or a value is not finite.
    """
    if tensor.dtype not in ITEM_BYTES:
        raise PlanError(f"{tensor.name}: expected BF16, F16 or F32, found {tensor.dtype}")
    raw = read_range(checkpoint, tensor)
    if tensor.dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, "<f2" if tensor.dtype == "F16" else "<f4")
    if not np.isfinite(values).all():
        raise PlanError(f"{tensor.name}: holds NaN or infinite values; the checkpoint is damaged")
    return values.astype(np.float64).reshape(tensor.shape)
