"""Reads checkpoints that are not on this machine, by byte ranges: headers, then each file once."""

import dataclasses
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, Self, TypeVar

from ablate_shards.errors import CheckpointError, HubError, UsageError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, assemble
from ablate_shards.surgery.checkpoint.files import SKIPPED_FOLDERS, leaves_folder
from ablate_shards.surgery.checkpoint.headers import Shard, read_header

__all__ = ["Entry", "Faults", "Patience", "RemoteFiles", "Store", "need", "open_remote", "patiently"]

_T = TypeVar("_T")

_FIRST_READ = 100_000
_LARGEST_HEADER = 100_000_000
_HEADERS_AT_A_TIME = 8
_CHUNK = 1 << 20
_ATTEMPTS = 6
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_CLOCK = threading.Event()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a store.

    Attributes:
        size: Its bytes.
        stamp: A mark that changes when the file does.
        algorithm: What its digest is of: ``sha256`` of the content, or ``git`` for Git's SHA-1 of a blob.
        digest: The digest, None where the store has none.
    """

    size: int
    stamp: str
    algorithm: str = "sha256"
    digest: str | None = None


class Faults(Protocol):
    """Knows which errors are temporary, and how to explain the others."""

    def pause(self, error: Exception) -> float | None:
        """Returns the fewest seconds to wait before trying again, None where another attempt is of no use."""

    def explain(self, error: Exception, file: str | None = None) -> HubError | None:
        """Returns an error as one sentence, None where it is about something else."""


class Store(Faults, Protocol):
    """Somewhere that files can be listed and read by byte ranges."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def revision(self) -> str | None:
        """The commit that the files are of, None where there is no history."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Its files, by relative name."""

    def stream(self, file: str, start: int, end: int) -> AbstractContextManager[Iterator[bytes]]:
        """Opens a byte range of a file."""

    def now(self) -> Self:
        """Returns it as it is now; one that is pinned to a commit is always the same."""


class Patience:
    """Waits between attempts, longer each time; gives up after too many failures in a row.

    Args:
        faults: Says which errors are temporary, and how long to wait after each.
        stop: Ends the waiting when set.
    """

    def __init__(self, faults: Faults, stop: threading.Event = _CLOCK) -> None:
        self._faults, self._stop = faults, stop
        self._failed = 0

    def progress(self) -> None:
        """Notes that an attempt has brought data, so the count of failures starts again."""
        self._failed = 0

    def wait(self, error: Exception, file: str | None = None) -> None:
        """Waits before the next attempt.

        Raises:
            HubError: Another attempt is of no use, or there were too many.
            CancelledError: The run has ended meanwhile.
        """
        least = self._faults.pause(error)
        self._failed += 1
        if least is None or self._failed >= _ATTEMPTS:
            explained = self._faults.explain(error, file)
            if explained is None:
                raise error
            raise explained from error
        if self._stop.wait(max(least, min(_FIRST_PAUSE * 2 ** (self._failed - 1), _LONGEST_PAUSE))):
            raise CancelledError from error


def patiently(faults: Faults, call: Callable[[], _T]) -> _T:
    """Returns what a call returns; repeats it while its errors are temporary.

    Raises:
        HubError: An error was not temporary, or there were too many in a row.
    """
    patience = Patience(faults)
    while True:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - errors that are not temporary are raised again, explained
            patience.wait(error)


class RemoteFiles:
    """The files of a store, as ``checkpoint.Remote`` describes them.

    Args:
        store: Where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        for file in store.entries:
            if leaves_folder(file):
                raise CheckpointError(f"{store.name}: lists {file!r}, which leaves the folder; nothing of it was read")

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return self._store.name

    @property
    def revision(self) -> str | None:
        """The commit they are of."""
        return self._store.revision

    def now(self) -> "RemoteFiles":
        """Returns the files as they are now."""
        return RemoteFiles(self._store.now())

    def walk(self) -> Iterable[tuple[str, str | None]]:
        """Yields every file, with a reason where it is passed over."""
        passed = set()
        for file in sorted(self._store.entries, key=_order):
            folders = PurePosixPath(file).parent
            skipped = next((index for index, part in enumerate(folders.parts) if part in SKIPPED_FOLDERS), None)
            if skipped is None:
                yield file, None
                continue
            folder = "/".join(folders.parts[: skipped + 1])
            if folder not in passed:
                passed.add(folder)
                yield f"{folder}/", SKIPPED_FOLDERS[folders.parts[skipped]]

    def names(self) -> Iterable[str]:
        """Returns every file, whatever it is, sorted."""
        return sorted(self._store.entries)

    def shown(self, file: str) -> str:
        """Returns what messages call a file."""
        return f"{self.name}/{file}"

    def has(self, file: str) -> bool:
        """Returns whether there is such a file."""
        return file in self._store.entries

    def size(self, file: str) -> int:
        """Returns a file's size in bytes."""
        return self._store.entries[file].size

    def stamp(self, file: str) -> str:
        """Returns a mark that changes when the file does; an empty one for a file that is gone."""
        return self._store.entries[file].stamp if self.has(file) else ""

    def read(self, file: str) -> bytes:
        """Returns a small file's content."""
        if self.size(file) > _LARGEST_HEADER:
            raise CheckpointError(f"{self.shown(file)}: {self.size(file)} bytes are too many for a file of its kind")
        return self.read_range(file, 0, self.size(file))

    def read_range(self, file: str, start: int, end: int) -> bytes:
        """Returns some bytes of a file."""
        return b"".join(self.stream(file, start, end, _CLOCK))

    def stream(self, file: str, start: int, end: int, stop: threading.Event) -> Iterator[bytes]:
        """Yields the bytes of a range; after a broken connection it continues at the next byte."""
        patience = Patience(self._store, stop)
        while start < end:
            try:
                with self._store.stream(file, start, end) as chunks:
                    for data in chunks:
                        if stop.is_set():
                            raise CancelledError
                        data = data[: end - start]
                        start += len(data)
                        patience.progress()
                        yield data
                if start < end:
                    raise EOFError(f"{self.shown(file)}: ended {end - start} bytes early")
            except (CancelledError, GeneratorExit):
                raise
            except Exception as error:  # noqa: BLE001 - the store knows which errors are temporary
                patience.wait(error, file)

    def digest(self, file: str) -> tuple["hashlib._Hash", str | None]:
        """Returns a hash to feed a file's bytes to, and the digest that it must then have; None where none is known."""
        entry = self._store.entries[file]
        return _digest(entry), entry.digest

    def altered(self, file: str, found: str) -> HubError:
        """Returns the error of a file that came with the wrong digest twice."""
        entry = self._store.entries[file]
        return HubError(
            f"{self.shown(file)}: arrived twice with the wrong {entry.algorithm} digest {found}, expected "
            f"{entry.digest}; something between here and there alters it, so try another network or --cache"
        )

    def read_into(self, file: str, data: memoryview, offset: int, stop: threading.Event) -> None:
        """Fills a buffer from an offset of a file; see ``checkpoint.Files``.

        Raises:
            HubError: The file cannot be read.
            CancelledError: The run has ended elsewhere.
        """
        for piece in self.stream(file, offset, offset + len(data), stop):
            data[: len(piece)] = piece
            data = data[len(piece) :]

    def header(self, file: str) -> tuple[Shard, Mapping[str, str]]:
        """Reads one header; the first call reads those of all shards, several at a time."""
        if file not in self._headers:
            return self._header(file)
        return self._headers[file]

    def fetch(
        self,
        file: str,
        path: Path,
        *,
        stop: threading.Event,
        advance: Callable[[int], None],
        edited: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Makes a local file equal to a remote one; see ``checkpoint.Remote``.

        Raises:
            HubError: The file cannot be fetched, or not with the digest that the store has of it.
            CancelledError: The run has ended elsewhere.
        """
        entry = self._store.entries[file]
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as target:
            kept = os.fstat(target.fileno()).st_size
            if kept > entry.size:
                target.truncate(kept := 0)
            advance(kept)
            if kept == entry.size and edited and self._wrong(entry, target, stop) is not None:
                # An edit may have begun before the run was interrupted: only what it touches is fetched again.
                for start, end in edited:
                    target.seek(start)
                    for data in self.stream(file, start, end, stop):
                        target.write(data)
            found = self._complete(file, target, kept, stop, advance)
            if found is not None:
                advance(-entry.size)
                target.truncate(0)
                found = self._complete(file, target, 0, stop, advance)
            if found is not None:
                target.truncate(0)
                raise self.altered(file, found)

    def _complete(
        self, file: str, target: "_Raw", kept: int, stop: threading.Event, advance: Callable[[int], None]
    ) -> str | None:
        """Appends what is missing; returns the digest if it is not the store's."""
        entry = self._store.entries[file]
        digest = _digest(entry)
        target.seek(0)
        _feed(digest, target, kept, stop)
        for data in self.stream(file, kept, entry.size, stop):
            digest.update(data)
            target.write(data)
            advance(len(data))
        return None if entry.digest in (None, digest.hexdigest()) else digest.hexdigest()

    def _wrong(self, entry: Entry, target: "_Raw", stop: threading.Event) -> str | None:
        digest = _digest(entry)
        target.seek(0)
        _feed(digest, target, entry.size, stop)
        return None if entry.digest == digest.hexdigest() else digest.hexdigest()

    @functools.cached_property
    def _headers(self) -> Mapping[str, tuple[Shard, Mapping[str, str]]]:
        files = [file for file, reason in self.walk() if reason is None and file.endswith(".safetensors")]
        stop = threading.Event()
        with ThreadPoolExecutor(_HEADERS_AT_A_TIME) as pool:
            try:
                return dict(zip(files, pool.map(lambda file: self._header(file, stop), files), strict=True))
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _header(self, file: str, stop: threading.Event = _CLOCK) -> tuple[Shard, Mapping[str, str]]:
        size = self.size(file)
        raw = b"".join(self.stream(file, 0, min(size, _FIRST_READ), stop))
        wanted = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < wanted <= min(size, 8 + _LARGEST_HEADER):
            raw += b"".join(self.stream(file, len(raw), wanted, stop))
        # The library validates only files on disk: this one has the header and the size, and a hole for the weights.
        with tempfile.NamedTemporaryFile(prefix="ablate-shards-") as hollow:
            hollow.write(raw)
            hollow.truncate(size)
            hollow.flush()
            shard, metadata = read_header(Path(hollow.name), file, self.shown(file))
        return dataclasses.replace(shard, path=Path(self.shown(file))), metadata


def open_remote(store: Store) -> Checkpoint:
    """Reads every header of a checkpoint in a store; no weight has been read.

    Raises:
        CheckpointError: The checkpoint is malformed, incomplete or reaches out of its folder.
        HubError: The store cannot be read.
    """
    files = RemoteFiles(store)
    checkpoint = assemble(files, files)
    return dataclasses.replace(checkpoint, origin=(store.name.partition("@")[0], store.revision))


class _Raw(Protocol):
    """What is used of a raw binary file."""

    def seek(self, offset: int, /) -> int: ...

    def read(self, size: int, /) -> bytes | None: ...

    def write(self, data: bytes, /) -> int | None: ...


def _order(file: str) -> tuple[tuple[int, str], ...]:
    """Sorts files as ``os.walk`` does: those of a folder before its folders, and what is skipped first."""
    *folders, name = file.split("/")
    return (*((0 if part in SKIPPED_FOLDERS else 2, part) for part in folders), (1, name))


def _digest(entry: Entry) -> "hashlib._Hash":
    if entry.algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)


def _feed(digest: "hashlib._Hash", target: _Raw, count: int, stop: threading.Event) -> None:
    while count:
        if stop.is_set():
            raise CancelledError
        data = target.read(min(count, _CHUNK))
        if not data:
            raise EOFError("a file got shorter while it was read")
        digest.update(data)
        count -= len(data)


def need(package: str, extra: str) -> None:
    """Checks that an optional package is installed.

    Raises:
        UsageError: It is not installed.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f"{package} is not installed; install it with `pip install 'ablate-shards[{extra}]'`")
