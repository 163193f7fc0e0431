"""Where remote checkpoints are: repositories on the Hub, and whatever fsspec reads."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ablate_shards.errors import CheckpointError, HubError, UsageError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, Files, Folder, fingerprint, open_checkpoint
from ablate_shards.surgery.checkpoint.remote import Entry, RemoteFiles, Store, open_remote, patiently

__all__ = [
    "HubFaults",
    "HubStore",
    "cached",
    "explain_hub",
    "hub_pause",
    "hub_repository",
    "is_hub_id",
    "open_files",
    "open_source",
    "quieten_hub",
]

#: The journal of a folder in an object store that is half made; it goes when the folder is complete.
UNFINISHED = ".ablate-unfinished.json"

_SCHEME = "hub:"
_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
_HUB_ID = re.compile(_REPO)
_HUB_PLACE = re.compile(rf"(?:hf://|{_SCHEME})?{_REPO}")
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 600.0
_CHUNK = 1 << 20
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_TOKENS = "https://huggingface.co/settings/tokens"


def is_hub_id(text: str | Path) -> bool:
    """Returns whether a text has the form ``org/name[@revision]``."""
    return _HUB_ID.fullmatch(str(text)) is not None


def hub_repository(out: str | Path) -> str | None:
    """Returns the repository that an OUT such as ``hub:me/model`` names, None where it is a folder.

    Raises:
        UsageError: What follows ``hub:`` is not a repository.
    """
    text = str(out)
    if not text.startswith(_SCHEME):
        return None
    repo = text.removeprefix(_SCHEME)
    if not is_hub_id(repo) or "@" in repo:
        raise UsageError(f"{text}: expected a repository such as {_SCHEME}me/model-edited")
    return repo


def open_files(place: str | Path) -> Files:
    """Lists the files of a folder, wherever it is; a path that exists here wins over a Hub id.

    Args:
        place: A folder, a Hub id ``org/name[@revision]`` with or without ``hub:``, or a URL that fsspec reads.

    Returns:
        The files; none has been read. Those of a Hub id are pinned to a commit.

    Raises:
        CheckpointError: There is no such folder in the object store, or it is half made.
        HubError: The repository or the object store cannot be read.
        UsageError: The package that reads it is not installed.
    """
    store = _store(place)
    return Folder(Path(place)) if store is None else RemoteFiles(store)


def _store(place: str | Path) -> Store | None:
    text = str(place)
    if not Path(place).exists() and (match := _HUB_PLACE.fullmatch(text)):
        return HubStore(match["repo"], match["revision"])
    if text.startswith("hf://"):
        # fsspec would read it as well, but at no commit in particular.
        raise UsageError(f"{text}: expected a model repository, such as org/name or hf://org/name@revision")
    return _FsspecStore(text) if "://" in text else None


def open_source(source: str | Path) -> Checkpoint:
    """Reads every header of a checkpoint, wherever it is; a path that exists here wins over a Hub id.

    Args:
        source: A ``.safetensors`` file, a folder, a Hub id as for :func:`open_files`, or a URL that fsspec reads.

    Returns:
        The checkpoint; no weight has been read. That of a Hub id is pinned to a commit.

    Raises:
        CheckpointError: The checkpoint is missing, malformed, incomplete or reaches out of its folder.
        HubError: The repository or the object store cannot be read.
        UsageError: It is a part of a repository, or the package that reads it is not installed.
    """
    store = _store(source)
    return open_checkpoint(Path(source)) if store is None else open_remote(store)


def cached(checkpoint: Checkpoint) -> Checkpoint:
    """Fetches what a run needs of a Hub checkpoint to the ordinary cache, and reads it from there.

    Raises:
        HubError: It cannot be fetched.
        OSError: The disk that holds the cache is full.
        UsageError: The checkpoint is not from the Hub.
    """
    if checkpoint.remote is None or checkpoint.remote.revision is None or checkpoint.origin is None:
        raise UsageError(f"{checkpoint.name}: --cache is for sources on the Hub; leave it out")
    from huggingface_hub import snapshot_download

    repo, revision = checkpoint.origin
    wanted = [shard.name for shard in checkpoint.shards] + [*checkpoint.sidecars, "config.json"]
    names = [re.sub(r"([\[*?])", r"[\1]", name) for name in wanted]
    with _hub_errors(checkpoint.name):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    # A snapshot may hold more than was asked for, such as weights that another tool wanted in another format.
    local = dataclasses.replace(
        open_checkpoint(folder), sidecars=checkpoint.sidecars, left_out=checkpoint.left_out, origin=checkpoint.origin
    )
    return dataclasses.replace(local, fingerprint=fingerprint(local))


class HubFaults:
    """What goes wrong with calls to the Hub.

    Args:
        name: The repository, as messages call it.
        writing: Whether the calls are to change it.
    """

    def __init__(self, name: str, *, writing: bool = False) -> None:
        self._name, self._writing = name, writing

    def pause(self, error: Exception) -> float | None:
        """Returns the seconds after which a call may be tried again, None for an error that stays."""
        return hub_pause(error)

    def explain(self, error: Exception, file: str | None = None) -> HubError | None:
        """Returns an error as one sentence."""
        return explain_hub(error, self._name, file, writing=self._writing)


class HubStore(HubFaults):
    """A repository on the Hub, pinned to the commit that the revision is now.

    Args:
        repo: ``org/name``.
        revision: A branch, tag or commit; the main branch if None.

    Attributes:
        private: Whether only some may read it.

    Raises:
        HubError: It does not exist, or may not be read.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        _need("huggingface_hub", "hub")
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        super().__init__(repo + (f"@{revision}" if revision else ""))
        self._repo = repo
        self._entries: dict[str, Entry] = {}
        self._revision = ""
        api = HfApi()
        info = patiently(self, lambda: api.model_info(repo, revision=revision))
        self._revision = str(info.sha)
        self.private = bool(info.private)
        for item in patiently(self, lambda: list(api.list_repo_tree(repo, recursive=True, revision=self._revision))):
            if isinstance(item, RepoFile):
                self._entries[item.path] = (
                    Entry(item.size, item.lfs.sha256, "sha256", item.lfs.sha256)
                    if item.lfs
                    else Entry(item.size, item.blob_id, "git", item.blob_id)
                )

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def revision(self) -> str:
        """The commit."""
        return self._revision

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The files of that commit."""
        return self._entries

    @contextmanager
    def stream(self, file: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Opens a byte range of a file."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self._repo, file, revision=self._revision)
        # The identity encoding, because a range of compressed bytes would be of no use.
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and start:
                raise HubError(f"{self.name}/{file}: the server does not answer byte ranges; try --cache")
            # In pieces as they come: larger ones would be lost when the connection breaks.
            yield response.iter_bytes()

    def now(self) -> Self:
        """Returns itself: a commit does not change."""
        return self


def hub_pause(error: Exception) -> float | None:
    """Returns the seconds after which a call to the Hub may be tried again, None for an error that stays."""
    from httpx2 import NetworkError, RemoteProtocolError, TimeoutException
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    error = _unwrapped(error)
    if isinstance(error, NetworkError | RemoteProtocolError | TimeoutException | EOFError):
        return 0.0
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in _TRANSIENT:
        return None
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    asked = headers.get("Retry-After", "")
    if limit is not None and limit.remaining == 0:
        seconds = float(limit.reset_in_seconds)
    else:
        seconds = float(asked) if asked.isdecimal() else 0.0
    return seconds if seconds <= _LONGEST_WAIT else None


def explain_hub(error: Exception, name: str, file: str | None = None, *, writing: bool = False) -> HubError | None:
    """Returns an error of huggingface_hub as one sentence without a URL, which could carry a signature.

    Args:
        error: The error.
        name: The repository, as messages call it.
        file: The file it is about.
        writing: Whether the call was to change the repository.
    """
    from httpx2 import HTTPError
    from huggingface_hub import constants, errors

    where = f"{name}/{file}" if file else name
    repo, _, revision = name.partition("@")
    error = _unwrapped(error)
    match error:
        case HubError():
            return error
        case errors.GatedRepoError():
            reason = f"is gated; ask for access at {constants.ENDPOINT}/{repo}, and {_LOG_IN} as who has it"
        case errors.RepositoryNotFoundError() if not writing:
            reason = (
                f"no repository on the Hub that you may read, nor a file or folder here; check the name, or {_LOG_IN} "
                "if it is private"
            )
        case errors.RepositoryNotFoundError():
            reason = f"no repository on the Hub that you may write; check the name, and {_LOG_IN} with a write token"
        case errors.RevisionNotFoundError():
            reason = f"there is no revision {revision or 'main'}; check {constants.ENDPOINT}/{repo}/tree/main"
        case errors.EntryNotFoundError():
            reason = "the file is gone; run again"
        case errors.HFValidationError():
            reason = "is not the name of a repository; expected org/name"
        case errors.OfflineModeIsEnabled():
            reason = "no such file or folder here, and HF_HUB_OFFLINE keeps the Hub out of reach; unset it"
        case errors.FileDuplicationError():
            reason = "the Hub cannot copy files of the source by itself; ablate to a folder here, then push it"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            reason = f"the Hub refuses the token; make one at {_TOKENS}, then {_LOG_IN}"
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            verb, right = ("write to", "write") if writing else ("read", "read")
            said = f" ({error.server_message})" if error.server_message else ""
            reason = (
                f"the token may not {verb} this repository{said}; give it {right} access to the repositories of "
                f"{repo.partition('/')[0]} at {_TOKENS}, then {_LOG_IN}"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 404:
            reason = f"nothing on the Hub that you may {'write' if writing else 'read'}; check the name, or {_LOG_IN}"
        case errors.HfHubHTTPError() if error.response.status_code in (409, 412):
            reason = "someone else has committed meanwhile, so nothing was committed; run again"
        case errors.HfHubHTTPError() if error.response.status_code == 429:
            reason = "the Hub limits how often you may ask, and does so still; wait some minutes and run again"
        case errors.HfHubHTTPError():
            said = f" ({error.server_message})" if error.server_message else ""
            reason = f"the Hub answered {error.response.status_code}{said}; run again later"
        case HTTPError() | EOFError():
            reason = (
                f"the Hub cannot be reached or breaks off ({type(error).__name__}); check the network and run again"
            )
        case _:
            return None
    return HubError(f"{where}: {reason}")


def _unwrapped(error: Exception) -> Exception:
    """Returns the error itself where the client has wrapped one to say which file it was."""
    return error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        explained = explain_hub(error, name)
        if explained is None:
            raise
        raise explained from error


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
    _need("fsspec", "hub")
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


class _FsspecStore(FsspecFaults):
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


def quieten_hub(*, bars: bool) -> None:
    """Keeps the client's remarks off the screen.

    Args:
        bars: Keep its progress bars off as well.

    Raises:
        UsageError: The client is not installed.
    """
    _need("huggingface_hub", "hub")
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if bars:
        disable_progress_bars()


def _need(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f"{package} is not installed; install it with `pip install 'ablate-shards[{extra}]'`")
