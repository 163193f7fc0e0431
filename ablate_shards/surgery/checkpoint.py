"""Reads what a checkpoint holds from its headers alone, and refuses what is malformed or unsafe."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from ablate_shards.errors import CheckpointError

__all__ = [
    "ITEM_BYTES",
    "RECEIPT_NAME",
    "Checkpoint",
    "Shard",
    "TensorInfo",
    "files_of",
    "fingerprint",
    "open_checkpoint",
    "read_header",
]

RECEIPT_NAME = "ablation.json"

#: Bytes per element of the dtypes that can be edited.
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}

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
_SKIPPED_FOLDERS = {
    "original": "holds the weights in another format",
    ".git": "version control",
    ".cache": "download cache",
    "__pycache__": "compiled Python",
}
_NUMBERED = re.compile(r"^(?P<stem>.*?)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: The tensor's name in the header.
        dtype: The safetensors dtype, such as ``BF16``.
        shape: The shape as stored.
        shard: The shard's file name, relative to the checkpoint.
        start: Offset of the first byte, from the start of the file.
        end: Offset one past the last byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file and what its header says.

    Attributes:
        name: The file's name, relative to the checkpoint.
        path: Where to open it.
        size: Bytes of the whole file.
        header_sha256: Digest of the length prefix and the header.
        tensors: The tensors in the order of their bytes.
    """

    name: str
    path: Path
    size: int
    header_sha256: str
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
        path: What the user named: a file or a folder.
        root: The folder that names are relative to.
        shards: The weight files, sorted by name.
        tensors: Every tensor by name.
        config: ``config.json`` as parsed, or None where there is none.
        sidecars: Other files that an edited checkpoint keeps, relative names, sorted.
        left_out: Files that an edited checkpoint does not keep, with the reason.
        fingerprint: Digest of names, sizes, modification times and headers.
    """

    path: Path
    root: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] | None
    sidecars: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    fingerprint: str


def read_header(path: Path, name: str | None = None) -> tuple[Shard, Mapping[str, str]]:
    """Reads one safetensors header; the safetensors library validates it first.

    Args:
        path: The file.
        name: The name the shard goes by, the file's own name if None.

    Returns:
        The shard and the header's ``__metadata__``, empty where it has none.

    Raises:
        CheckpointError: The file is missing, unreadable or not valid safetensors.
    """
    name = path.name if name is None else name
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            prefix = file.read(8)
            raw = file.read(int.from_bytes(prefix, "little"))
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file ({_reason(error)}); fetch it again or export it anew"
        ) from error
    header = json.loads(raw)
    metadata = header.pop("__metadata__", {})
    base = 8 + len(raw)
    tensors = (
        TensorInfo(
            name=key,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            shard=name,
            start=base + entry["data_offsets"][0],
            end=base + entry["data_offsets"][1],
        )
        for key, entry in header.items()
    )
    shard = Shard(
        name=name,
        path=path,
        size=size,
        header_sha256=hashlib.sha256(prefix + raw).hexdigest(),
        tensors=tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.end, tensor.name))),
    )
    return shard, metadata


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
        _refuse_own_format(path, metadata)
        return _checkpoint(path, path.parent, [shard], sidecars=[], left_out=[])
    if not path.is_dir():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(path)):
            hint = "; a Hub repository must be downloaded first, for example with `hf download`"
        raise CheckpointError(f"{path}: no such file or folder{hint}")

    index = _index_path(path)
    weight_map = {} if index is None else _read_index(index)
    named = set(weight_map.values())
    shards: list[Shard] = []
    sidecars: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name, reason in _walk(path):
        if reason is not None:
            left_out.append((name, reason))
        elif name in named:
            pass
        elif name.endswith(".safetensors"):
            shard, metadata = read_header(path / name, name)
            if metadata.get("format", "").startswith(_OWN_FORMAT):
                left_out.append((name, "activations or directions, not weights"))
            elif name.startswith("consolidated"):
                left_out.append((name, "holds the weights in another layout, unedited"))
            elif "/" in name or name == "adapter_model.safetensors":
                sidecars.append(name)
            elif index is not None:
                raise CheckpointError(
                    f"{path / name}: {index.name} does not name it, so it would stay unedited, and some loaders would "
                    "prefer it; move it away, or restore the index that came with the shards"
                )
            else:
                shards.append(shard)
        elif PurePosixPath(name).suffix in _OTHER_WEIGHTS or name.endswith(".bin.index.json"):
            left_out.append((name, "holds weights in another format, unedited"))
        elif name in (RECEIPT_NAME, "activations.npz", "directions.npz"):
            left_out.append((name, "belongs to an earlier edit"))
        else:
            sidecars.append(name)
    if index is not None:
        shards = [_indexed_shard(path, name, index) for name in sorted(named)]
        _check_index(index, weight_map, shards)
    elif not shards:
        raise CheckpointError(f"{path}: no safetensors weights here; convert the checkpoint to safetensors first")
    else:
        _check_numbering(path, [shard.name for shard in shards])
    return _checkpoint(path, path, shards, sidecars=sidecars, left_out=left_out)


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Returns the paths of every shard and sidecar."""
    return [shard.path for shard in checkpoint.shards] + [checkpoint.root / name for name in checkpoint.sidecars]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns the digest of names, sizes and modification times as they are now, and of the headers read.

    Raises:
        OSError: A file is gone.
    """
    return _fingerprint(checkpoint.root, checkpoint.shards, checkpoint.sidecars)


def _checkpoint(
    path: Path,
    root: Path,
    shards: list[Shard],
    *,
    sidecars: list[str],
    left_out: list[tuple[str, str]],
) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if (other := tensors.get(tensor.name)) is not None:
                raise CheckpointError(
                    f"{tensor.name}: stands in both {other.shard} and {shard.name}; remove the stale shard"
                )
            tensors[tensor.name] = tensor
    return Checkpoint(
        path=path,
        root=root,
        shards=tuple(shards),
        tensors=tensors,
        config=_read_config(root / "config.json"),
        sidecars=tuple(sidecars),
        left_out=tuple(left_out),
        fingerprint=_fingerprint(root, shards, sidecars),
    )


def _fingerprint(root: Path, shards: Iterable[Shard], sidecars: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path, header in (
        *((shard.path, shard.header_sha256) for shard in shards),
        *((root / name, "") for name in sidecars),
    ):
        stat = path.stat()
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{header}\n".encode())
    return digest.hexdigest()


def _walk(root: Path) -> Iterable[tuple[str, str | None]]:
    """Yields every file below root as a relative name, with a reason where it is passed over."""
    for folder, folders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        kept = []
        for name in sorted(folders):
            inner = (relative / name).as_posix()
            if (Path(folder) / name).is_symlink():
                yield f"{inner}/", "a linked folder"
            elif name in _SKIPPED_FOLDERS:
                yield f"{inner}/", _SKIPPED_FOLDERS[name]
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            inner = (relative / name).as_posix()
            path = Path(folder) / name
            if path.is_file():
                yield inner, None
            elif path.is_symlink():
                yield inner, "a broken link"
            else:
                yield inner, "not a regular file"


def _index_path(root: Path) -> Path | None:
    found = sorted(root.glob("*.safetensors.index.json"))
    for path in found:
        if path.name == "model.safetensors.index.json":
            return path
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{root}: more than one index ({names}); leave the one to edit")
    return found[0] if found else None


def _read_index(index: Path) -> dict[str, str]:
    content = _read_json(index)
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
        if shard.is_absolute() or ".." in shard.parts or "\0" in name or "\\" in name or not shard.name:
            raise CheckpointError(
                f"{index}: {tensor} points to {name!r}, which leaves the folder; only shards beside the index are read"
            )
        if name != shard.as_posix():
            raise CheckpointError(f"{index}: {tensor} points to {name!r}; write it as {shard.as_posix()!r}")
    return weight_map


def _indexed_shard(root: Path, name: str, index: Path) -> Shard:
    path = root / name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, although {index.name} names it; download it")
    shard, metadata = read_header(path, name)
    _refuse_own_format(path, metadata)
    return shard


def _check_index(index: Path, weight_map: Mapping[str, str], shards: Iterable[Shard]) -> None:
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


def _check_numbering(root: Path, names: list[str]) -> None:
    for name in names:
        if match := _NUMBERED.match(name):
            for number in range(1, int(match["count"]) + 1):
                wanted = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
                if wanted not in names:
                    raise CheckpointError(f"{root / wanted}: missing, although {name} is here; download it")


def _read_config(path: Path) -> Mapping[str, Any] | None:
    return _read_json(path) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({_reason(error)}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse_own_format(path: Path, metadata: Mapping[str, str]) -> None:
    if (found := metadata.get("format", "")).startswith(_OWN_FORMAT):
        raise CheckpointError(f"{path}: holds {found}, not the weights of a model")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
