"""Files read and written in full, and files that appear whole or not at all."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.machine.system import read_at, sync_file, sync_folder, write_at

__all__ = [
    "append_lines",
    "fsync_files",
    "pread_into",
    "pwrite_all",
    "same_bytes",
    "write_safetensors",
    "write_whole",
]

_PIECE = 1 << 20


def pread_into(descriptor: int, data: memoryview, offset: int) -> None:
    """Fills a buffer from an offset of a file.

    Raises:
        ExecuteError: The file ends before the buffer is full.
    """
    while data:
        count = read_at(descriptor, data, offset)
        if count == 0:
            raise ExecuteError(f"a shard ended {len(data)} bytes early while it was read; it was changed meanwhile")
        data, offset = data[count:], offset + count


def pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes a whole buffer at an offset of a file."""
    while data:
        count = write_at(descriptor, data, offset)
        data, offset = data[count:], offset + count


def same_bytes(one: Callable[[memoryview, int], None], other: Callable[[memoryview, int], None], size: int) -> bool:
    """Tells whether two ranges hold the same bytes.

    Args:
        one: Fills a buffer from an offset within the first range.
        other: The same for the second.
        size: Bytes of each.
    """
    import numpy as np  # --help does without

    buffers = tuple(np.empty(min(_PIECE, size), np.uint8) for _ in range(2))
    for done in range(0, size, _PIECE):
        ours, theirs = (buffer[: size - done] for buffer in buffers)
        one(ours.data, done)
        other(theirs.data, done)
        whole = len(ours) // 8 * 8  # compared eight at a time
        if not np.array_equal(ours[:whole].view(np.uint64), theirs[:whole].view(np.uint64)):
            return False
        if not np.array_equal(ours[whole:], theirs[whole:]):
            return False
    return True


def fsync_files(folder: Path) -> None:
    """Makes the files that a library wrote into a folder, and their names, durable."""
    for path in folder.iterdir():
        if path.is_file():
            sync_file(path)
    sync_folder(folder)


def append_lines(path: Path, records: Iterable[object], *, sync: bool = True) -> None:
    """Appends records to a file, one a line as JSON, durably unless ``sync`` is off.

    Each begins with a line break, which ends a line that a kill has torn.
    """
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(f"\n{json.dumps(record)}\n" for record in records)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file beside its place and gives it its name when it is complete and on the disk.

    Raises:
        OSError: It cannot be written; what had the name before still has it.
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        with staged.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.absolute().parent)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int], int]],
    metadata: Mapping[str, str],
    data: Iterable[bytes | memoryview],
) -> None:
    """Writes a safetensors file as :func:`write_whole` does; the same content gives the same bytes.

    The header is made here, since the library writes metadata in an order that changes from call to call.

    Args:
        path: The file.
        tensors: For each name its safetensors dtype, its shape and how many bytes it takes, in the order of the bytes.
        metadata: The header's ``__metadata__``.
        data: The bytes of the tensors, in that order.

    Raises:
        OSError: It cannot be written; what had the name before still has it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, itertools.chain([len(text).to_bytes(8, "little") + text], data))
