"""One safetensors header: which tensors a shard holds, and where in it they lie."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ablate_shards.errors import CheckpointError, reason

__all__ = ["ITEM_BYTES", "Shard", "TensorInfo", "read_header"]

#: Bytes per element of the dtypes that can be edited.
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


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


_EXPORT = "export what it holds as safetensors"
#: What files begin with that are something else, and what to do about them.
_OTHER_KINDS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"),
    (b"PK\x03\x04", f"is a ZIP archive, as PyTorch (.pt) and NumPy (.npz) write; give it its own ending, or {_EXPORT}"),
    (b"\x80\x02", f"is a Python pickle, which may run code; {_EXPORT}"),
    (b"\x80\x04\x95", f"is a Python pickle, which may run code; {_EXPORT}"),
    (b"\x93NUMPY", f"is a NumPy array; give it the ending .npy, or {_EXPORT}"),
    (
        b"GGUF",
        "is a GGUF file; name the safetensors checkpoint that it was made from, or end a control vector in .gguf",
    ),
    (b"<", "is a web page, not the file itself; download the file"),
    (b"{", f"is text (JSON), not tensors; {_EXPORT}"),
    (b"[", f"is text (JSON), not tensors; {_EXPORT}"),
)


def _other_kind(path: Path) -> str | None:
    """Returns what a file is that is no safetensors file, and what to do, None where its first bytes do not tell."""
    try:
        with path.open("rb") as file:
            first = file.read(32)
    except OSError:
        return None
    for begins, what in _OTHER_KINDS:
        # A damaged safetensors file begins with the length of its header, which fewer bytes may look like.
        if first.startswith(begins) and (len(begins) > 2 or first[7:8] != b"\0"):
            return what
    return None


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
        if (other := _other_kind(path)) is not None:
            raise CheckpointError(f"{shown or path}: {other}") from error
        raise CheckpointError(
            f"{shown or path}: not a valid safetensors file ({reason(error)}); fetch it again or export it again"
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
