"""What differs between systems, chosen by what this one has: Linux, macOS and Windows lack different things."""

import contextlib
import ctypes
import errno
import importlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "copy_in_kernel",
    "cores",
    "exchange_folders",
    "exclusive",
    "name_folder",
    "open_file",
    "read_at",
    "reserve",
    "share_blocks",
    "start_writing",
    "sync",
    "sync_file",
    "sync_folder",
    "write_at",
]

_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WRITE = 2
_RENAME_EXCHANGE = 2
_AT_CWD = -100
#: What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
#: Bytes that are read at a time where they must be copied once more.
_PIECE = 1 << 24

_one_at_a_time = threading.Lock()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _c_library() -> Any:
    """Return the C library of this process, None where it has no name."""
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None


_fcntl = _module("fcntl")
#: Windows has this one, POSIX systems have the one above.
_msvcrt: Any = None if _fcntl is not None else _module("msvcrt")
_libc = _c_library()
_sync_file_range: Any = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_renameat2: Any = getattr(_libc, "renameat2", None)


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_file(path: Path, *, write: bool = False, new: bool = False) -> int:
    """Opens a file to be read, or to be read and written, and made if need be; Python keeps it from child processes.

    Raises:
        OSError: It cannot be opened; with ``new``, it is there already.
    """
    flags = os.O_RDWR | os.O_CREAT if write or new else os.O_RDONLY
    # Windows would take some bytes for the ends of lines.
    return os.open(path, flags | (os.O_EXCL if new else 0) | getattr(os, "O_BINARY", 0), 0o666)


def read_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Reads bytes from an offset of a file, from several threads at a time; returns how many, 0 at the file's end."""
    if hasattr(os, "preadv"):
        count: int = os.preadv(descriptor, [data], offset)
        return count
    with _one_at_a_time:
        os.lseek(descriptor, offset, os.SEEK_SET)
        part = os.read(descriptor, min(len(data), _PIECE))
    data[: len(part)] = part
    return len(part)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Writes bytes at an offset of a file, from several threads at a time; returns how many were written."""
    if hasattr(os, "pwrite"):
        count: int = os.pwrite(descriptor, data, offset)
        return count
    with _one_at_a_time:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def share_blocks(source: int, target: int) -> None:
    """Makes an empty file share another's blocks until either is written to.

    Raises:
        OSError: The system or the filesystem cannot: ENOSYS, ENOTTY and others.
    """
    if _fcntl is None:
        raise _missing()
    _fcntl.ioctl(target, _FICLONE, source)


def reserve(descriptor: int, size: int) -> None:
    """Gives a file its size and its blocks.

    Raises:
        OSError: The system or the filesystem cannot: ENOSYS and others.
    """
    if not hasattr(os, "posix_fallocate"):
        raise _missing()
    os.posix_fallocate(descriptor, 0, size)


def copy_in_kernel(source: int, target: int, start: int, end: int) -> int:
    """Copies bytes to the same place of another file, past this process; returns how many, 0 at the file's end.

    Raises:
        OSError: The system or the filesystem cannot: ENOSYS and others.
    """
    if not hasattr(os, "copy_file_range"):
        raise _missing()
    count: int = os.copy_file_range(source, target, end - start, start, start)
    return count


def _missing() -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def start_writing(descriptor: int, start: int, end: int) -> None:
    """Starts writing a range of a file to the disk, where the system can, without waiting for it."""
    if _sync_file_range is not None and start < end:
        _sync_file_range(descriptor, start, end - start, _SYNC_FILE_RANGE_WRITE)


def sync(descriptor: int) -> None:
    """Waits until a file is on the disk; where only a file open for writing can be waited for, not for another one."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF or _opens_folders():
            raise


def sync_file(path: Path) -> None:
    """Waits until a file that is closed is on the disk."""
    descriptor = open_file(path, write=not _opens_folders())
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system lets a folder be opened for that."""
    if _opens_folders():
        sync_file(folder)


def _opens_folders() -> bool:
    """Whether folders are files, as on POSIX systems: on Windows they are not, and only what is written is synced."""
    return hasattr(os, "O_DIRECTORY")


def name_folder(folder: Path, name: Path) -> None:
    """Gives a folder a name that is free, or that of an empty folder."""
    try:
        folder.replace(name)
    except (FileExistsError, PermissionError):
        # Windows replaces no folder, not even an empty one.
        if not name.is_dir():
            raise
        name.rmdir()
        folder.replace(name)


def exchange_folders(new: Path, old: Path, aside: Path) -> None:
    """Swaps two folders, in one step where the system can (Linux 3.15); else by way of a third name."""
    if _renameat2 is not None:
        if _renameat2(_AT_CWD, os.fsencode(new), _AT_CWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(old))
    if aside.exists():
        shutil.rmtree(aside)
    old.replace(aside)
    new.replace(old)
    aside.replace(new)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Locks a name for as long as the context lasts, or the process; gives False where another run has it locked."""
    while True:
        descriptor = open_file(path, write=True)
        if not _lock(descriptor):
            os.close(descriptor)
            yield False
            return
        # Where open files can be removed, whoever had it before may have done so between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if _fcntl is None or path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        yield True
    finally:
        if _fcntl is None:  # no open file can be removed; who has opened it meanwhile keeps it
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.unlink()
        else:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; return False where it is locked already.

    A disk that has no locks, as Lustre and NFS may be mounted, locks nothing.
    """
    try:
        if _fcntl is not None:
            _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        else:
            _msvcrt.locking(descriptor, _msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    return True
