"""Makes this system lack what Windows lacks, and refuse what Windows refuses."""

import ctypes
import errno
import fcntl
import importlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["MODULES", "OF_MMAP", "OF_OS", "SIGNALS", "become_other", "locking", "rename"]

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
OF_OS = (
    *("copy_file_range", "fchmod", "fdatasync", "fork", "forkpty", "getpgid", "killpg", "mkfifo"),
    *("openpty", "posix_fadvise", "posix_fallocate", "posix_spawn", "posix_spawnp", "pread", "preadv", "pwrite"),
    *("pwritev", "sched_getaffinity", "sched_setaffinity", "sendfile", "setsid", "sync", "uname"),
    *("wait4", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"),
)
OF_MMAP = ("MADV_DONTNEED", "MADV_SEQUENTIAL", "MADV_WILLNEED", "MAP_PRIVATE", "MAP_SHARED", "PROT_READ")
SIGNALS = ("SIGALRM", "SIGBUS", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")

_flock, _flags = fcntl.flock, fcntl.fcntl
_get_flags, _exclusively = fcntl.F_GETFL, fcntl.LOCK_EX | fcntl.LOCK_NB
_fsync, _open, _replace, _unlink = os.fsync, os.open, os.replace, os.unlink


def locking(descriptor: int, _mode: int, _count: int) -> None:
    """What msvcrt.locking does where another one holds the lock: PermissionError."""
    try:
        _flock(descriptor, _exclusively)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


class _NamedLibrary(ctypes.CDLL):
    def __init__(self, name: str | None, *arguments: object, **settings: object) -> None:
        if name is None:
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")
        super().__init__(name, *arguments, **settings)


def _is_open(path: os.PathLike[str] | str) -> bool:
    there = os.fspath(path) if isinstance(path, str) else str(path)
    if not os.path.isfile(there):
        return False
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.path.samefile(link, there):
                return True
        except OSError:
            continue
    return False


def _remove(path: os.PathLike[str] | str, **settings: object) -> None:
    if not settings and _is_open(path):
        raise PermissionError(errno.EACCES, "is used by another process", str(path))
    _unlink(path, **settings)


def rename(source: os.PathLike[str] | str, target: os.PathLike[str] | str, **settings: object) -> None:
    """What os.replace does on Windows, which replaces no folder and no file that is open."""
    inside = [Path(source, name) for name in os.listdir(source)] if os.path.isdir(source) else [source, target]
    if os.path.isdir(target) or any(map(_is_open, inside)):
        raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
    _replace(source, target, **settings)


def _sync(descriptor: int) -> None:
    if _flags(descriptor, _get_flags) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    _fsync(descriptor)


def _open_file(path: os.PathLike[str] | str, flags: int, *arguments: int, **settings: object) -> int:
    if not settings and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return _open(path, flags, *arguments, **settings)


def become_other() -> None:
    """Takes away and refuses, in this process from now on."""
    import mmap
    import shutil

    # Packages of others ask for what the system has that they were built for.
    for name in ("filelock", "numpy", "torch"):
        importlib.import_module(name)
    for module, names in ((os, OF_OS), (mmap, OF_MMAP), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    shutil._USE_CP_SENDFILE = False
    sys.modules["fcntl"] = None
    console = ModuleType("msvcrt")
    console.LK_NBLCK, console.locking = 2, locking
    sys.modules["msvcrt"] = console
    ctypes.CDLL = _NamedLibrary
    os.fsync, os.open, os.replace = _sync, _open_file, rename
    os.unlink = os.remove = _remove


def pytest_sessionstart() -> None:
    """As a plugin of pytest: what pytest and its plugins need of the system they do run on is imported by then."""
    become_other()
