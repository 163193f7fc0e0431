"""Checkpoints in repositories on the Hub, read by byte ranges at one commit."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from ablate_shards.errors import HubError
from ablate_shards.surgery.checkpoint.remote import Entry, need, patiently

__all__ = ["HubFaults", "HubStore", "explain_hub", "hub_errors", "hub_pause", "quieten_hub"]

_TRANSIENT = {408, 429, 500, 502, 503, 504}

_LONGEST_WAIT = 600.0

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"

_TOKENS = "https://huggingface.co/settings/tokens"


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
        need("huggingface_hub", "hub")
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        super().__init__(repo + (f"@{revision}" if revision else ""))
        self._repo, self._folder = repo, ""
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

        url = hf_hub_url(self._repo, f"{self._folder}{file}", revision=self._revision)
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

    def below(self, folder: str) -> Self:
        """Returns a folder of it as a store of its own."""
        found = copy.copy(self)
        found._name, found._folder = f"{self._name}/{folder}", f"{self._folder}{folder}/"
        found._entries = {
            name.removeprefix(f"{folder}/"): entry
            for name, entry in self._entries.items()
            if name.startswith(f"{folder}/")
        }
        return found


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
            reason = f"is gated; ask for access at {constants.ENDPOINT}/{repo}, then {_LOG_IN} with that account"
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
            reason = "no such file or folder here, and HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
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
            reason = "the Hub limits how often you may ask, and still refuses; wait some minutes and run again"
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
def hub_errors(name: str) -> Iterator[None]:
    """Says in a sentence what the Hub's client raises about a repository.

    Raises:
        HubError: The client raised what is understood.
    """
    try:
        yield
    except Exception as error:
        explained = explain_hub(error, name)
        if explained is None:
            raise
        raise explained from error


def quieten_hub(*, bars: bool) -> None:
    """Keeps the client's remarks off the screen.

    Args:
        bars: Keep its progress bars off as well.

    Raises:
        UsageError: The client is not installed.
    """
    need("huggingface_hub", "hub")
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if bars:
        disable_progress_bars()
