"""The files of a checkpoint, wherever they are: what can be asked of them, and a folder on this machine."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Protocol

from ablate_shards.errors import CheckpointError, HubError
from ablate_shards.surgery.checkpoint.headers import Shard, read_header

__all__ = ["SKIPPED_FOLDERS", "Files", "Folder", "Remote", "leaves_folder", "pointed_at"]

#: Folders that an edited checkpoint does not keep, with the reason.
SKIPPED_FOLDERS = {
    "original": "holds the weights in another format",
    ".git": "version control",
    ".cache": "download cache",
    "__pycache__": "compiled Python",
}


_MOST_FOLDERS = 3


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
    """Files that are not on this machine, read by byte ranges; their listing stays as it was when they were opened."""

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
            advance: Receives how many more bytes are there.
            edited: The byte ranges that an interrupted run may have overwritten.
        """


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


def pointed_at(names: Iterable[str]) -> str:
    """Returns the end of a message about what is not in a folder: where below it such files are, none if nowhere.

    Args:
        names: The files of the kind that was looked for, relative to the folder.
    """
    folders = list(dict.fromkeys(PurePosixPath(name).parent.as_posix() for name in names if "/" in name))
    if not folders:
        return ""
    more = f" and {len(folders) - _MOST_FOLDERS} more" if len(folders) > _MOST_FOLDERS else ""
    return f", but in {', '.join(folders[:_MOST_FOLDERS])}{more}; name {'that folder' if len(folders) == 1 else 'one'}"


def leaves_folder(name: str) -> bool:
    """Returns whether a relative name is none, or would be looked for outside its folder."""
    path = PurePosixPath(name)
    return (
        path.is_absolute()
        or ".." in path.parts
        or "\0" in name
        or "\\" in name
        or not path.name
        or bool(PurePath(name).drive)
    )
