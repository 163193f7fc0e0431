"""Copies files and parts of files: as links, as shared blocks, or byte for byte."""

import errno
import os
from pathlib import Path

from ablate_shards.surgery.machine.files import pread_into, pwrite_all
from ablate_shards.surgery.machine.system import copy_in_kernel, reserve, share_blocks

__all__ = ["allocate", "clone", "copy_range", "link"]

_FALLBACK_CHUNK = 1 << 20
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def link(source: Path, target: Path) -> bool:
    """Makes a hard link; returns False where the two do not share a filesystem."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False
    return True


def clone(source: int, target: int) -> bool:
    """Makes an empty file share another's blocks until either is written to; False where the filesystem cannot."""
    try:
        share_blocks(source, target)
    except OSError as error:
        if error.errno not in {*_NOT_HERE, errno.ENOTTY}:
            raise
        return False
    return True


def allocate(descriptor: int, size: int) -> None:
    """Gives a file its size, and its blocks where the filesystem can."""
    if size:
        try:
            reserve(descriptor, size)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
        else:
            return
    os.ftruncate(descriptor, size)


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copies the bytes from one offset to another to the same place in another file, by the kernel where it can."""
    try:
        while start < end:
            count = copy_in_kernel(source, target, start, end)
            if count == 0:
                break
            start += count
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    buffer = memoryview(bytearray(min(_FALLBACK_CHUNK, end - start)))
    while start < end:
        data = buffer[: end - start]
        pread_into(source, data, start)
        pwrite_all(target, data, start)
        start += len(data)
