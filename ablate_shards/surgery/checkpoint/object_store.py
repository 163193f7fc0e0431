"""Checkpoints in object stores, through fsspec."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from ablate_shards.errors import CheckpointError, HubError, UsageError
from ablate_shards.surgery.checkpoint.remote import Entry, need, patiently

__all__ = ["UNFINISHED", "FsspecFaults", "FsspecStore", "entry_of", "listing", "open_system"]

#: The journal of a folder in an object store that is half made; it goes when the folder is complete.
UNFINISHED = ".ablate-unfinished.json"

_CHUNK = 1 << 20


class FsspecFaults:
    """What goes wrong with calls to an object store.

    Args:
        url: The folder, as messages call it.
        writing: Whether the calls are to change it.
    """

    def __init__(self, url: str, *, writing: bool = False) -> None:
        self._url, self._verb = url, "written" if writing else "read"

    def pause(self, error: Exception) -> float | None:
        """Returns how long to wait before trying again."""
        stays = FileNotFoundError | PermissionError | NotImplementedError | HubError
        return 0.0 if isinstance(error, OSError | EOFError) and not isinstance(error, stays) else None

    def explain(self, error: Exception, file: str | None = None) -> HubError | None:
        """Returns an error as one sentence."""
        where = f"{self._url}/{file}" if file else self._url
        match error:
            case HubError():
                return error
            case FileNotFoundError():
                return HubError(f"{where}: not found; check the name")
            case PermissionError():
                return HubError(
                    f"{where}: may not be {self._verb} ({error}); check the credentials and what they permit"
                )
            case _ if "Credentials" in type(error).__name__:
                return HubError(
                    f"{where}: cannot be {self._verb} without credentials ({error}); set them as for the store's own "
                    "client, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws"
                )
            case _:
                return HubError(f"{where}: cannot be {self._verb} ({type(error).__name__}: {error})")


def open_system(url: str) -> tuple[Any, str]:
    """Returns what fsspec reads a URL with, and the path in there.

    Raises:
        UsageError: The package for it is not installed.
    """
    need("fsspec", "hub")
    import fsspec  # type: ignore[import-untyped]

    protocol = url.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        how = "; `pip install 'ablate-shards[s3]'` brings it" if protocol == "s3" else ""
        raise UsageError(f"{url}: fsspec needs another package for {protocol}:// ({error}){how}") from error
    except ValueError as error:
        raise UsageError(f"{url}: fsspec knows no {protocol}:// ({error})") from error
    return system, str(root).rstrip("/")


def listing(system: Any, root: str) -> dict[str, Entry]:
    """Returns the files of a folder as they are now, by relative name; the name of a file itself is empty."""
    system.invalidate_cache()
    return {path[len(root) :].lstrip("/"): entry_of(info) for path, info in system.find(root, detail=True).items()}


def entry_of(info: Mapping[str, Any]) -> Entry:
    """Returns what fsspec knows of a file."""
    stamp = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "mtime", "created") if key in info), "")
    return Entry(info["size"], f"{info['size']} {stamp}")


class FsspecStore(FsspecFaults):
    """A folder of whatever file system fsspec knows, such as ``s3://bucket/model``.

    Args:
        url: The folder.

    Raises:
        CheckpointError: There is no such folder, or an interrupted run has left it half made.
        UsageError: The package for it is not installed.
    """

    revision = None

    def __init__(self, url: str) -> None:
        super().__init__(url.rstrip("/"))
        self._system, self._root = open_system(self._url)
        self._entries = patiently(self, lambda: listing(self._system, self._root))
        if "" in self._entries or (not self._entries and self._system.isfile(self._root)):
            raise CheckpointError(f"{url}: is a file; name the folder that holds the checkpoint")
        if not self._entries:
            raise CheckpointError(f"{url}: no such folder, or an empty one")
        if UNFINISHED in self._entries:
            raise CheckpointError(f"{url}: a run that makes it is under way or was interrupted; let it end first")

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._url

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Its files."""
        return self._entries

    @contextmanager
    def stream(self, file: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Opens a byte range of a file."""
        path = f"{self._root}/{file}"
        step = 16 * _CHUNK
        yield (
            self._system.cat_file(path, start=first, end=min(first + step, end)) for first in range(start, end, step)
        )

    def now(self) -> Self:
        """Returns the folder as it is now."""
        return type(self)(self._url)
