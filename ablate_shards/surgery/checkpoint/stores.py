"""Where remote checkpoints are: repositories on the Hub, and whatever fsspec reads."""

import dataclasses
import re
from pathlib import Path

from ablate_shards.errors import UsageError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, fingerprint, open_checkpoint
from ablate_shards.surgery.checkpoint.files import Files, Folder
from ablate_shards.surgery.checkpoint.hub_store import HubStore, hub_errors
from ablate_shards.surgery.checkpoint.object_store import FsspecStore
from ablate_shards.surgery.checkpoint.remote import RemoteFiles, Store, open_remote

__all__ = ["cached", "hub_repository", "is_hub_id", "open_files", "open_source"]

_SCHEME = "hub:"
_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
_HUB_ID = re.compile(_REPO)
_HUB_PLACE = re.compile(rf"(?:hf://|{_SCHEME})?{_REPO}")


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
    return FsspecStore(text) if "://" in text else None


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
    with hub_errors(checkpoint.name):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    # A snapshot may hold more than was asked for, such as weights that another tool wanted in another format.
    local = dataclasses.replace(
        open_checkpoint(folder), sidecars=checkpoint.sidecars, left_out=checkpoint.left_out, origin=checkpoint.origin
    )
    return dataclasses.replace(local, fingerprint=fingerprint(local))
