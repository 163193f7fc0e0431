"""What several ranks make of one repository: each commits its part to a branch, and one commit of all ends it.

The Hub takes one commit to a repository at a time, and only so many an hour. So a rank commits what has arrived every
few minutes, the less often the more ranks there are, and waits for its turn where others commit.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ablate_shards.errors import ExecuteError, HubError
from ablate_shards.names import CARD, RECEIPT_NAMES
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.hub_store import HubFaults, HubStore
from ablate_shards.surgery.checkpoint.object_store import UNFINISHED
from ablate_shards.surgery.checkpoint.remote import Patience, RemoteFiles
from ablate_shards.surgery.edit.operation import Operation, RunOptions, ending_early
from ablate_shards.surgery.edit.parts import Joined, agreed_on, lacking
from ablate_shards.surgery.hub.published import look_at
from ablate_shards.surgery.hub.push import (
    PushOptions,
    card_of,
    commit,
    explained,
    open_for_writing,
    require_token,
    warnings_noted,
)
from ablate_shards.surgery.hub.transfer import Ledger, deliver, not_arrived, weights_of
from ablate_shards.surgery.machine.parts import is_part
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.ranks import WorkerRank
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt

__all__ = [
    "BRANCH",
    "complete_on_branch",
    "delete_branch",
    "join_on_hub",
    "open_branch",
    "perform_part_on_hub",
    "remove_from_branch",
]

#: The branch of the parts; the ranks make it, and it is deleted when they are joined.
BRANCH = "ablate-shards-ranks"

#: Seconds between two commits of unfinished parts, of all ranks together.
_COMMITS_EVERY = 60.0
#: What the Hub answers then: somebody is committing, or has just committed.
_BUSY = (409, 412)
#: Seconds to wait where another rank is committing, at least and at most, and how long in all.
_TURN = (1.0, 10.0)
_LONGEST_TURN = 900.0

_T = TypeVar("_T")


def open_branch(repo: str, options: PushOptions, *, overwrite: bool) -> None:
    """Makes the repository and the branch of the parts, where they are not there.

    Args:
        repo: ``org/name``.
        options: How to publish.
        overwrite: Whether weights that the repository has may be replaced.

    Raises:
        HubError: The repository may not be written, or holds weights already.
    """
    store, api = open_for_writing(repo, options)
    weights_of(repo, store, overwrite=overwrite)

    def make() -> None:
        if _branch(repo) is None:
            api.create_branch(repo, branch=BRANCH)

    # One that another rank has just made is in the way of this as well as a commit is.
    _in_turn(repo, make)


def complete_on_branch(repo: str) -> Iterator[RemoteFiles]:
    """Yields the folders of ranks that are complete.

    Raises:
        HubError: The repository may not be read, or there is no token to write with.
    """
    require_token(repo)
    if (store := _branch(repo)) is not None:
        # Beside them is what the main branch has.
        for folder in sorted({path.partition("/")[0] for path in store.entries}):
            files = RemoteFiles(store.below(folder))
            if is_part(folder) and any(map(files.has, RECEIPT_NAMES)):
                yield files


def perform_part_on_hub(
    checkpoint: Checkpoint,
    part: Operation[Any, Any],
    repo: str,
    rank: WorkerRank,
    run: RunOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Does what one rank does of an operation, into its folder on the branch of the parts.

    Shards are sent as :func:`ablate_shards.surgery.hub.transfer.perform_on_hub` sends them. What has arrived is
    committed every few minutes, with a ledger by which this rank goes on wherever it is started again.

    Args:
        checkpoint: The source.
        part: What the rank does.
        repo: ``org/name``, in which the branch is.
        rank: The rank.
        run: How to run; ``overwrite`` throws away what this rank did of another operation.
        progress: Receives how far it has come.

    Returns:
        The result of each edit, by tensor.

    Raises:
        ExecuteError: A tensor cannot be edited, or the rank did something else before.
        HubError: The repository may not be written.
        Interrupted: Ctrl-C or SIGTERM; what has been sent need not be sent again.
    """
    place = Path.cwd() / f"hub-{repo.replace('/', '--')}-{rank.folder}"
    identity = {**agreed_on(part, checkpoint), "the repository": repo}
    results, _ = deliver(checkpoint, part, _PartOnBranch(repo, rank, run, progress), place, identity, run, progress)
    return results


def join_on_hub(joined: Joined, repo: str, *, overwrite: bool, progress: Progress) -> None:
    """Makes the parts of all ranks one commit to the main branch; the Hub itself copies their files.

    Args:
        joined: What the parts make.
        repo: ``org/name``.
        overwrite: Whether weights that the repository has are replaced.
        progress: Receives how far it has come.

    Raises:
        ExecuteError: A file of a part is gone or has another size.
        HubError: The repository may not be written, or holds weights already.
        Interrupted: Ctrl-C or SIGTERM.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    with sigterm_as_interrupt(), ending_early(repo, lambda: "finish again to go on", lambda: None):
        options = PushOptions()
        store, api = open_for_writing(repo, options)
        parts = HubStore(repo, BRANCH)
        receipt = joined.receipt.encode()
        # The card is made of the receipt; the source's own is not copied.
        paths = {name: f"{folder}/{name}" for name, (folder, _) in joined.files.items() if name != CARD}
        for name, path in paths.items():
            size, found = joined.files[name][1], parts.entries.get(path)
            if found is None or found.size != size:
                raise lacking(f"{parts.name}/{path}", size, None if found is None else found.size)
        held = {name: parts.entries[path] for name, path in paths.items()}
        own = joined.receipt_name in store.entries and RemoteFiles(store).read(joined.receipt_name) == receipt
        if own and all(store.entries.get(name) == entry for name, entry in held.items()):
            return
        theirs = weights_of(repo, store, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix="ablate-shards-") as folder:
            (Path(folder) / joined.receipt_name).write_bytes(receipt)
            card = card_of(look_at(Path(folder)), repo, options, store)
        operations = [
            CommitOperationAdd(CARD, card.encode()),
            CommitOperationAdd(joined.receipt_name, receipt),
            *(CommitOperationCopy(path, name, src_revision=parts.revision) for name, path in paths.items()),
            *(CommitOperationDelete(name) for name in theirs if name not in held),
        ]
        with explained(repo):
            url, oid = commit(api, repo, operations, options, store, progress)
        entries = HubStore(repo, oid).entries
        for name, entry in held.items():
            if entries.get(name) != entry:
                raise not_arrived(repo, name, oid)
        progress.note(f"published at {url}")


def remove_from_branch(repo: str, folder: str) -> None:
    """Removes what a rank did.

    Raises:
        HubError: The repository may not be written.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    def remove() -> None:
        store = _branch(repo)
        if store is not None and store.below(folder).entries:
            deletion = CommitOperationDelete(f"{folder}/", is_folder=True)
            HfApi().create_commit(repo, [deletion], commit_message=f"Remove {folder}", revision=BRANCH)

    _in_turn(repo, remove)


def delete_branch(repo: str) -> None:
    """Removes what all ranks did.

    Raises:
        HubError: The repository may not be written.
    """
    from huggingface_hub import HfApi

    def delete() -> None:
        if _branch(repo) is not None:
            HfApi().delete_branch(repo, branch=BRANCH)

    _in_turn(repo, delete)


class _PartOnBranch:
    """A rank's folder on the branch of the parts, complete when it holds a receipt."""

    def __init__(self, repo: str, rank: WorkerRank, run: RunOptions, progress: Progress) -> None:
        from huggingface_hub import HfApi

        self.api, self.repo, self.folder = HfApi(), repo, f"{rank.folder}/"
        self._rank, self._run, self._progress = rank, run, progress
        self._committed = time.monotonic()

    def take_over(self, ledger: Ledger) -> None:
        """Tells the ledger of the shards that this rank committed, wherever it ran.

        Raises:
            ExecuteError: It did something else there.
        """
        store = HubStore(self.repo, BRANCH).below(self._rank.folder)
        if UNFINISHED not in store.entries:
            return
        if not self._run.resume:
            remove_from_branch(self.repo, self._rank.folder)
            return
        files = RemoteFiles(store)
        try:
            try:
                written = json.loads(files.read(UNFINISHED))
                sent = {
                    name: content
                    for name, content in dict(written["sent"]).items()
                    if name in store.entries and store.entries[name].digest == content["sha256"]
                }
                ledger.staging.agree(written["identity"])
                ledger.take_over(sent)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ExecuteError(
                    f"{files.shown(UNFINISHED)}: is not what an interrupted rank wrote; --overwrite starts again"
                ) from error
        except ExecuteError:
            if not self._run.overwrite:
                raise
            remove_from_branch(self.repo, self._rank.folder)

    def keep(self, ledger: Ledger) -> None:
        """Commits the shards that have arrived, unless ranks would commit too often."""
        from huggingface_hub import CommitOperationAdd

        if time.monotonic() - self._committed < _COMMITS_EVERY * self._rank.count:
            return
        written = {"identity": ledger.staging.identity, "sent": ledger.written()}
        journal = CommitOperationAdd(f"{self.folder}{UNFINISHED}", json.dumps(written).encode())
        try:
            with explained(self.repo):
                self._commit([*ledger.operations(), journal], lambda _: [])
        except HubError as error:
            if _is_busy(error):
                return  # after the next shard then
            self._progress.note(f"{error}; so what has arrived will be committed later")
        self._committed = time.monotonic()

    def beside(self, folder: Path, receipt_name: str, checkpoint: Checkpoint) -> list[Any]:
        """Adds the receipt of the part."""
        from huggingface_hub import CommitOperationAdd

        del checkpoint
        return [CommitOperationAdd(f"{self.folder}{receipt_name}", (folder / receipt_name).read_bytes())]

    def commit(self, operations: list[Any]) -> tuple[str, str]:
        """Commits what the branch lacks, and removes the ledger."""
        from huggingface_hub import CommitOperationDelete

        journal = f"{self.folder}{UNFINISHED}"

        def deletion(store: HubStore) -> list[Any]:
            return [CommitOperationDelete(journal)] if journal in store.entries else []

        return _in_turn(self.repo, lambda: self._commit(operations, deletion))

    def _commit(self, operations: list[Any], more: Callable[[HubStore], list[Any]]) -> tuple[str, str]:
        """Commits those additions that the branch lacks, and what else it needs as it is now."""
        store = HubStore(self.repo, BRANCH)
        lacks = [each for each in operations if not _is_there(each, store)]
        with warnings_noted(self._progress):
            info = self.api.create_commit(
                self.repo, [*lacks, *more(store)], commit_message=f"Part of {self._rank}", revision=BRANCH
            )
        return str(info.commit_url), str(info.oid)


def _is_there(operation: Any, store: HubStore) -> bool:
    """Returns whether a repository has what would be added; asked of large files alone, whose digest is known."""
    from huggingface_hub import CommitOperationAdd

    if not isinstance(operation, CommitOperationAdd):
        return False
    found = store.entries.get(operation.path_in_repo)
    return found is not None and found.digest == operation.upload_info.sha256.hex()


def _branch(repo: str) -> HubStore | None:
    """Returns the branch of the parts as it is now, None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HubStore(repo, BRANCH)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            return None
        raise


def _in_turn(repo: str, call: Callable[[], _T]) -> _T:
    """Returns what a call that changes a repository returns; repeats it while others change it.

    Raises:
        HubError: The repository may not be written, or others do not cease to change it.
    """
    patience = Patience(HubFaults(repo, writing=True))
    last = time.monotonic() + _LONGEST_TURN
    while True:
        try:
            with explained(repo):
                return call()
        except HubError as error:
            if _is_busy(error) and time.monotonic() < last:
                time.sleep(random.uniform(*_TURN))
            elif isinstance(error.__cause__, Exception):
                patience.wait(error.__cause__)
            else:
                raise


def _is_busy(error: HubError) -> bool:
    """Returns whether it was somebody else's commit that was in the way."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    return isinstance(cause, HfHubHTTPError) and cause.response.status_code in _BUSY
