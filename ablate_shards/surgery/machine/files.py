"""Files read and written in full, and files that appear whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ablate_shards.errors import ExecuteError

if TYPE_CHECKING:
    pass

__all__ = ["fsync_folder", "pread_into", "pwrite_all"]


def pread_into(descriptor: int, data: memoryview, offset: int) -> None:
    """Fills a buffer from an offset of a file.

    Raises:
        ExecuteError: The file ends before the buffer is full.
    """
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise ExecuteError(f"a shard ended {len(data)} bytes early while it was read; it was changed meanwhile")
        data, offset = data[count:], offset + count


def pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes a whole buffer at an offset of a file."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
