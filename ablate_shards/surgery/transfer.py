"""Edits a checkpoint into a repository on the Hub, shard by shard, with no more than one shard on this disk."""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, HubError
from ablate_shards.surgery.card import Kind
from ablate_shards.surgery.checkpoint import MERGE_RECEIPT_NAME, Checkpoint, Remote, Shard, fingerprint, size_of
from ablate_shards.surgery.execute import (
    ExecuteOptions,
    Operation,
    Progress,
    Surgeon,
    Work,
    ending_early,
    sigterm_as_interrupt,
    what_is_kept,
)
from ablate_shards.surgery.hub import PushOptions, card_of, commit, explained, open_for_writing, warnings_noted
from ablate_shards.surgery.plan import Edit
from ablate_shards.surgery.published import CARD, Published
from ablate_shards.surgery.remote import patiently
from ablate_shards.surgery.staging import Staging, locked
from ablate_shards.surgery.stores import HubFaults, HubStore

__all__ = ["Transferred", "perform_on_hub"]

_SENT = "sent.json"

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Transferred(Generic[_R]):
    """What a transfer did.

    Attributes:
        url: The commit.
        results: The result of each edit, by tensor.
        sent: How many shards were edited here and sent.
        copied: How many files the Hub copied by itself.
    """

    url: str
    results: Mapping[str, _R]
    sent: int
    copied: int


def perform_on_hub(
    checkpoint: Checkpoint,
    operation: Operation[_E, Any],
    repo: str,
    options: PushOptions,
    run: ExecuteOptions,
    progress: Progress,
) -> Transferred[Any]:
    """Carries out an operation into a repository, which shows all of it at once or nothing.

    Edited shards are made one at a time in a folder here, sent, and removed. What is not edited the Hub copies by
    itself where the source is on the Hub; where it refuses to, it passes through here, shard by shard. One commit at
    the end makes all of it visible.

    Args:
        checkpoint: The source.
        operation: What to do.
        repo: ``org/name``; made if it does not exist.
        options: How to publish.
        run: How to run; ``overwrite`` replaces weights that the repository has.
        progress: Hears how far the run has come.

    Raises:
        ExecuteError: The disk is too small, or a tensor cannot be edited.
        HubError: The repository may not be written, or holds weights already.
        Interrupted: Ctrl-C or SIGTERM; what has been sent need not be sent again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    store, api = open_for_writing(repo, options)
    own = {shard.name for shard in checkpoint.shards}
    theirs = [name for name in store.entries if "/" not in name and name.endswith(".safetensors")]
    if theirs and not run.overwrite:
        raise HubError(f"{repo}: holds weights already ({theirs[0]}); --overwrite replaces them, in one commit")
    edited = {edit.shard for edit in operation.edits}
    on_hub = checkpoint.remote is not None and checkpoint.remote.revision is not None
    here = tuple(
        shard for shard in checkpoint.shards if shard.name in edited or (checkpoint.remote is not None and not on_hub)
    )
    # Beside it, hidden, are the lock and the shard under way.
    place = Path.cwd() / f"hub-{repo.replace('/', '--')}"
    identity = {
        **operation.identity,
        "the source": checkpoint.fingerprint,
        "the repository": repo,
        "the version of ablate-shards": __version__,
    }
    staging: Staging | None = None

    def discard() -> None:
        if staging is not None and not run.resume:
            staging.discard()

    with sigterm_as_interrupt(), locked(place), ending_early(repo, lambda: what_is_kept(staging), discard):
        sizes = {shard.name: shard.size for shard in here}
        staging = Staging.open(place, identity, sizes, resume=run.resume, overwrite=run.overwrite)
        _check_disk(staging, max(sizes.values(), default=0))
        progress.begin(sum(size for name, size in sizes.items() if name not in staging.done))
        part = dataclasses.replace(checkpoint, shards=here, sidecars=())
        with _Sender(part, operation, staging, progress, api, repo) as sender:
            results, device = sender.operate(run)
        if fingerprint(checkpoint) != checkpoint.fingerprint:
            raise ExecuteError(f"{checkpoint.name}: changed while it was read; run again when it is at rest")
        receipt = staging.folder / operation.receipt_name
        receipt.write_text(operation.receipt(results, device), encoding="utf-8")
        card = card_of(_published(staging.folder, checkpoint, operation.receipt_name, options), repo, options, store)
        made = [
            CommitOperationAdd(CARD, card.encode()),
            CommitOperationAdd(operation.receipt_name, receipt.read_bytes()),
            *(CommitOperationDelete(name) for name in theirs if name not in own),
        ]
        left = own - sizes.keys() - sender.digests().keys()
        copied = _copies(checkpoint, left, by_hub=on_hub)
        try:
            with explained(repo):
                operations = [*sender.operations(), *copied, *made]
                url, oid = commit(api, repo, operations, options, store, progress)
        except HubError as error:
            if checkpoint.remote is None or not on_hub or not _refuses_to_copy(error.__cause__):
                raise
            progress.note(f"the Hub does not copy files of {checkpoint.name} by itself, so they pass through here")
            sender.carry_over(checkpoint.remote, [shard for shard in checkpoint.shards if shard.name in left])
            on_hub = False
            with explained(repo):
                operations = [*sender.operations(), *_copies(checkpoint, set(), by_hub=False), *made]
                url, oid = commit(api, repo, operations, options, store, progress)
        expected = sender.digests()
        if checkpoint.remote is not None and on_hub:
            expected |= {name: checkpoint.remote.stamp(name) for name in left}
        _check_arrival(repo, oid, expected, checkpoint)
        staging.discard()
    return Transferred(url, results, sent=len(sender.digests()), copied=len(copied) if on_hub else 0)


class _Sender(Surgeon[_E, Any]):
    """Edits one shard at a time, sends it, and keeps of it what the commit needs."""

    in_flight = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        operation: Operation[_E, Any],
        staging: Staging,
        progress: Progress,
        api: Any,
        repo: str,
    ) -> None:
        super().__init__(checkpoint, operation, staging, progress, link=False)
        self._api, self._repo = api, repo
        journal = staging.folder / _SENT
        self._sent: dict[str, dict[str, Any]] = json.loads(journal.read_bytes()) if journal.is_file() else {}
        for name in staging.done:
            self._send(name)

    def complete(self, work: Work[Any]) -> dict[str, Any]:
        """Waits for a shard and sends it."""
        results = super().complete(work)
        self._send(work.shard.name)
        return results

    def operations(self) -> list[Any]:
        """Returns what the commit says of the shards sent, in this run or in an earlier one."""
        return [self._operation_of(name) for name in sorted(self._sent)]

    def carry_over(self, remote: Remote, shards: Iterable[Shard]) -> None:
        """Fetches shards without an edit one at a time, and sends them."""
        for shard in shards:
            _check_disk(self._staging, shard.size)
            path = self._staging.folder / shard.name
            remote.fetch(shard.name, path, stop=threading.Event(), advance=lambda _: None)
            self._send(shard.name)
            path.unlink()

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of each shard sent."""
        return {name: sent["sha256"] for name, sent in self._sent.items()}

    def _send(self, name: str) -> None:
        from huggingface_hub import CommitOperationAdd

        if name in self._sent:
            return
        path = self._staging.folder / name
        addition = CommitOperationAdd(name, path)
        with explained(self._repo), warnings_noted(self._progress):
            faults = HubFaults(self._repo, writing=True)
            patiently(faults, lambda: self._api.preupload_lfs_files(self._repo, [addition], free_memory=False))
        if addition._upload_mode != "lfs":
            raise HubError(f"{self._repo}: takes {name} for text; add `*.safetensors filter=lfs` to its .gitattributes")
        size = path.stat().st_size
        self._sent[name] = {"sha256": addition.upload_info.sha256.hex(), "size": size}
        _write(self._staging.folder / _SENT, json.dumps(self._sent))
        # A hole of the same size stands for what has been sent: the journal looks for a file of that size.
        os.truncate(path, 0)
        os.truncate(path, size)

    def _operation_of(self, name: str) -> Any:
        """Returns an addition whose content is at the Hub already, and need not be here."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo

        known = self._sent[name]
        addition = CommitOperationAdd(name, b"")
        addition.upload_info = UploadInfo(size=known["size"], sample=b"", sha256=bytes.fromhex(known["sha256"]))
        addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
        return addition


def _copies(checkpoint: Checkpoint, shards: set[str], *, by_hub: bool) -> list[Any]:
    """Returns how to bring over what is not edited: by the Hub itself, or from this disk."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

    names = [*sorted(shards), *(name for name in checkpoint.sidecars if name != CARD)]
    if checkpoint.remote is None:
        return [CommitOperationAdd(name, checkpoint.root / name) for name in names]
    if not by_hub or checkpoint.origin is None:
        remote = checkpoint.remote
        return [CommitOperationAdd(name, remote.read_range(name, 0, size_of(checkpoint, name))) for name in names]
    repo, revision = checkpoint.origin
    return [
        CommitOperationCopy(name, name, src_revision=revision, src_repo_id=repo, src_repo_type="model")
        for name in names
    ]


def _refuses_to_copy(error: BaseException | None) -> bool:
    """Returns whether it was the copying between repositories that failed, and not the commit."""
    from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.url.path.endswith("/lfs-files/duplicate")
    return isinstance(error, FileDuplicationError) or (isinstance(error, ValueError) and "no xet hash" in str(error))


def _published(folder: Path, checkpoint: Checkpoint, receipt_name: str, options: PushOptions) -> Published:
    kind: Kind = "merge" if receipt_name == MERGE_RECEIPT_NAME else "ablation"
    base, revision = checkpoint.origin or (None, None)
    return Published(
        path=folder,
        kind=kind,
        files=(receipt_name,),
        base=options.base_model or base,
        revision=revision,
        origin=None,
        copied=(CARD,),
        stale=None,
    )


def _check_arrival(repo: str, oid: str, expected: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Compares the digests of the commit with what was sent and with the source's."""
    entries = HubStore(repo, oid).entries
    for shard in checkpoint.shards:
        digest = expected.get(shard.name)
        found = entries.get(shard.name)
        if found is None or found.size != shard.size or (digest is not None and found.digest != digest):
            raise HubError(f"{repo}: {shard.name} did not arrive as it was sent; revert commit {oid} and run again")


def _check_disk(staging: Staging, needed: int) -> None:
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise ExecuteError(
            f"{staging.folder}: needs {needed / 1e9:.2f} GB for one shard, but its disk has {free / 1e9:.2f} GB free; "
            "free some, or run it from a folder on another disk"
        )


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
