"""Reads what a checkpoint holds from its headers alone, and refuses what is malformed or unsafe."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from ablate_shards.errors import CheckpointError, HubError
from ablate_shards.names import RECEIPT_NAMES, is_report

__all__ = [
    "ITEM_BYTES",
    "SKIPPED_FOLDERS",
    "Checkpoint",
    "Files",
    "Folder",
    "Remote",
    "Shard",
    "TensorInfo",
    "assemble",
    "files_of",
    "fingerprint",
    "leaves_folder",
    "open_checkpoint",
    "read_header",
    "read_range",
    "size_of",
]


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
#: Folders that an edited checkpoint does not keep, with the reason.
SKIPPED_FOLDERS = {
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


class Files(Protocol):
    """The files of a checkpoint folder, wherever it is; they go by relative names with forward slashes."""

    @property
    def name(self) -> str:
        """What messages call the folder."""

    @property
    def revision(self) -> str | None:
        """The commit they are of, None where they have no history."""

    def walk(self) -> Iterable[tuple[str, str | None]]:
        """Yields every file, with a reason where it is passed over; of a folder that is, its name alone."""

    def names(self) -> Iterable[str]:
        """Returns every file, whatever it is, sorted."""

    def shown(self, file: str) -> str:
        """Returns what messages call a file."""

    def has(self, file: str) -> bool:
        """Returns whether there is such a file."""

    def size(self, file: str) -> int:
        """Returns a file's size in bytes."""

    def read(self, file: str) -> bytes:
        """Returns a small file's content."""

    def read_into(self, file: str, data: memoryview, offset: int, stop: threading.Event) -> None:
        """Fills a buffer from an offset of a file; several threads may call it.

        Args:
            file: The file.
            data: The buffer.
            offset: Where to begin.
            stop: Set when the run has ended elsewhere.
        """

    def header(self, file: str) -> tuple[Shard, Mapping[str, str]]:
        """Returns what ``read_header`` does."""

    def stamp(self, file: str) -> str:
        """Returns what tells one state of a file from another."""


class Remote(Files, Protocol):
    """Files that are not on this machine; they can be read by byte ranges, and what is told of them does not change."""

    def now(self) -> "Remote":
        """Returns the files as they are now, should something else have written them."""

    def read_range(self, file: str, start: int, end: int) -> bytes:
        """Returns some bytes of a file."""

    def stream(self, file: str, start: int, end: int, stop: threading.Event) -> Iterator[bytes]:
        """Yields some bytes of a file as they come; ends early with an error when ``stop`` is set."""

    def digest(self, file: str) -> tuple["hashlib._Hash", str | None]:
        """Returns what to feed a file's bytes to, and the digest they then have to have; None where none is known."""

    def altered(self, file: str, found: str) -> HubError:
        """Returns the error of a file that came with the wrong digest twice."""

    def fetch(
        self,
        file: str,
        path: Path,
        *,
        stop: threading.Event,
        advance: Callable[[int], None],
        edited: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Makes a local file equal to a remote one, going on with what is there, and checks its digest.

        Args:
            file: The remote file.
            path: The local one, which may hold the beginning already, or all but the edited ranges.
            stop: Set when the run has ended elsewhere.
            advance: Hears how many more bytes are there.
            edited: The byte ranges that an interrupted run may have overwritten.
        """


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
        path: What the user named: a file or a folder.
        root: The folder that names are relative to; none of this machine where ``remote`` is set.
        shards: The weight files, sorted by name.
        tensors: Every tensor by name.
        config: ``config.json`` as parsed, or None where there is none.
        sidecars: Other files that an edited checkpoint keeps, relative names, sorted.
        left_out: Files that an edited checkpoint does not keep, with the reason.
        fingerprint: Digest of names, sizes, modification times (of remote files, digests) and headers.
        remote: Where the files come from, None where they are on this machine.
        origin: The repository and the commit that they are of, or were before they were fetched.
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

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path) if self.remote is None else self.remote.name

    @property
    def files(self) -> Files:
        """Its files, wherever they are."""
        return Folder(self.root) if self.remote is None else self.remote

    @property
    def identity(self) -> Mapping[str, str]:
        """What a receipt says of where it is from."""
        name, revision = self.origin or (self.path.resolve().name, None)
        return {"name": name} | ({"revision": revision} if revision else {})


def read_header(path: Path, name: str | None = None, shown: str | None = None) -> tuple[Shard, Mapping[str, str]]:
    """Reads one safetensors header; the safetensors library validates it first.

    Args:
        path: The file.
        name: The name the shard goes by, the file's own name if None.
        shown: What messages call the file, its path if None.

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
        raise CheckpointError(f"{shown or path}: the file does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shown or path}: not a valid safetensors file ({_reason(error)}); fetch it again or export it anew"
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
    index = _index_name(files, (name for name, _ in listed))
    weight_map = {} if index is None else _read_index(files, index)
    named = set(weight_map.values())
    shards: list[Shard] = []
    sidecars: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name, reason in listed:
        if reason is not None:
            left_out.append((name, reason))
        elif name in named:
            pass
        elif name.endswith(".safetensors"):
            shard, metadata = files.header(name)
            if metadata.get("format", "").startswith(_OWN_FORMAT):
                left_out.append((name, "activations or directions, not weights"))
            elif name.startswith("consolidated"):
                left_out.append((name, "holds the weights in another layout, unedited"))
            elif "/" in name or name == "adapter_model.safetensors":
                sidecars.append(name)
            elif index is not None:
                raise CheckpointError(
                    f"{files.shown(name)}: {index} does not name it, so it would stay unedited, and some loaders would "
                    "prefer it; move it away, or restore the index that came with the shards"
                )
            else:
                shards.append(shard)
        elif PurePosixPath(name).suffix in _OTHER_WEIGHTS or name.endswith(".bin.index.json"):
            left_out.append((name, "holds weights in another format, unedited"))
        elif name in (*RECEIPT_NAMES, "activations.npz", "directions.npz") or (edited and is_report(name)):
            left_out.append((name, "belongs to an earlier edit"))
        else:
            sidecars.append(name)
    if index is not None:
        shards = [_indexed_shard(files, name, index) for name in sorted(named)]
        _check_index(files.shown(index), weight_map, shards)
    elif not shards:
        raise CheckpointError(f"{files.name}: no safetensors weights here; convert the checkpoint to safetensors first")
    else:
        _check_numbering(files, [shard.name for shard in shards])
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


def read_range(checkpoint: Checkpoint, tensor: TensorInfo) -> bytes:
    """Returns the bytes of one small tensor."""
    if checkpoint.remote is not None:
        return checkpoint.remote.read_range(tensor.shard, tensor.start, tensor.end)
    with (checkpoint.root / tensor.shard).open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


class Folder:
    """The files of a folder on this machine.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return str(self._root)

    @property
    def revision(self) -> str | None:
        """None: a folder has no history."""
        return None

    def walk(self) -> Iterable[tuple[str, str | None]]:
        """Yields every file, with a reason where it is passed over."""
        return _walk(self._root)

    def names(self) -> Iterable[str]:
        """Returns every file, whatever it is, sorted."""
        return sorted(path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())

    def shown(self, file: str) -> str:
        """Returns what messages call a file."""
        return str(self._root / file)

    def has(self, file: str) -> bool:
        """Returns whether there is such a file."""
        return (self._root / file).is_file()

    def size(self, file: str) -> int:
        """Returns a file's size in bytes."""
        return (self._root / file).stat().st_size

    def read(self, file: str) -> bytes:
        """Returns a small file's content."""
        return (self._root / file).read_bytes()

    def read_into(self, file: str, data: memoryview, offset: int, stop: threading.Event) -> None:
        """Fills a buffer from an offset of a file.

        Raises:
            CheckpointError: The file ends before the buffer is full.
        """
        del stop
        with (self._root / file).open("rb", buffering=0) as opened:
            opened.seek(offset)
            while data:
                if not (count := opened.readinto(data)):
                    raise CheckpointError(f"{self.shown(file)}: got shorter while it was read; run again")
                data = data[count:]

    def header(self, file: str) -> tuple[Shard, Mapping[str, str]]:
        """Returns what ``read_header`` does."""
        return read_header(self._root / file, file)

    def stamp(self, file: str) -> str:
        """Returns what tells one state of a file from another."""
        stat = (self._root / file).stat()
        return f"{stat.st_size}\0{stat.st_mtime_ns}"


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
                    f"{tensor.name}: stands in both {other.shard} and {shard.name}; remove the stale shard"
                )
            tensors[tensor.name] = tensor
    return Checkpoint(
        path=path,
        root=Path(files.name),
        shards=tuple(shards),
        tensors=tensors,
        config=_read_json(files, "config.json") if files.has("config.json") else None,
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


def _walk(root: Path) -> Iterable[tuple[str, str | None]]:
    """Yields every file below root as a relative name, with a reason where it is passed over."""
    for folder, folders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        kept = []
        for name in sorted(folders):
            inner = (relative / name).as_posix()
            if (Path(folder) / name).is_symlink():
                yield f"{inner}/", "a linked folder"
            elif name in SKIPPED_FOLDERS:
                yield f"{inner}/", SKIPPED_FOLDERS[name]
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


def _index_name(files: Files, names: Iterable[str]) -> str | None:
    found = sorted(name for name in names if "/" not in name and name.endswith(".safetensors.index.json"))
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


def leaves_folder(name: str) -> bool:
    """Returns whether a relative name is none, or would be looked for outside its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name or not path.name


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
    for name in names:
        if match := _NUMBERED.match(name):
            for number in range(1, int(match["count"]) + 1):
                wanted = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
                if wanted not in names:
                    raise CheckpointError(f"{files.shown(wanted)}: missing, although {name} is here; download it")


def _read_json(files: Files, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{files.shown(name)}: not valid JSON ({_reason(error)}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{files.shown(name)}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse_own_format(shown: str, metadata: Mapping[str, str]) -> None:
    if (found := metadata.get("format", "")).startswith(_OWN_FORMAT):
        raise CheckpointError(f"{shown}: holds {found}, not the weights of a model")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
