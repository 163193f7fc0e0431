"""Edits a checkpoint into a repository on the Hub, shard by shard: without a copy here, or with one shard for Xet."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ablate_shards.errors import HubError
from ablate_shards.names import DEQUANTISATION_RECEIPT_NAME, MERGE_RECEIPT_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, size_of
from ablate_shards.surgery.checkpoint.headers import Shard
from ablate_shards.surgery.checkpoint.hub_store import HubFaults, HubStore
from ablate_shards.surgery.checkpoint.remote import patiently
from ablate_shards.surgery.checkpoint.stores import is_hub_id
from ablate_shards.surgery.edit.edited_file import EditedFile
from ablate_shards.surgery.edit.operation import (
    Operation,
    RunOptions,
    check_unchanged,
    ending_early,
    what_is_kept,
)
from ablate_shards.surgery.edit.queue import Work
from ablate_shards.surgery.edit.shard_writer import ShardWriter
from ablate_shards.surgery.hub.card import PublishedKind
from ablate_shards.surgery.hub.foreign import addition_of, has_xet, is_stored_as_text, mark_sent, refuses_to_copy
from ablate_shards.surgery.hub.published import CARD, Published
from ablate_shards.surgery.hub.push import PushOptions, card_of, commit, explained, open_for_writing, warnings_noted
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import Staging, locked
from ablate_shards.surgery.plan.edits import Edit, by_shard

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["Destination", "Ledger", "deliver", "not_arrived", "perform_on_hub", "weights_of"]

_SENT = "sent.json"
#: Bytes above which a file beside the shards is not sent from memory.
_LARGE = 10_000_000

_E = TypeVar("_E", bound=Edit)


def perform_on_hub(
    checkpoint: Checkpoint,
    operation: Operation[_E, Any],
    repo: str,
    options: PushOptions,
    run: RunOptions,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    """Carries out an operation into a repository, which shows all of it at once or nothing.

    Edited shards are sent one at a time. Through LFS nothing of them is kept here: each is computed twice from the
    source's bytes, once for its digest and once while it is sent. Xet takes files alone, so each is made in a folder
    here, sent and removed; where the disk has no room for one, it goes through LFS. What is not edited the Hub copies
    by itself where the source is on the Hub; where it refuses to, it passes through here in the same way. One commit
    at the end makes all of it visible.

    Args:
        checkpoint: The source.
        operation: What to do.
        repo: ``org/name``; made if it does not exist.
        options: How to publish.
        run: How to run; ``overwrite`` replaces weights that the repository has.
        progress: Receives how far the run has come.

    Returns:
        The result of each edit, by tensor, and the commit's URL.

    Raises:
        ExecuteError: A tensor cannot be edited.
        HubError: The repository may not be written, or holds weights already.
        Interrupted: Ctrl-C or SIGTERM; what has been sent need not be sent again.
    """
    store, api = open_for_writing(repo, options)
    theirs = weights_of(repo, store, overwrite=run.overwrite)
    own = {shard.name for shard in operation.amend(checkpoint).shards}
    deleted = [name for name in theirs if name not in own]
    # Beside it, hidden, are the lock and the shard under way.
    place = Path.cwd() / f"hub-{repo.replace('/', '--')}"
    identity = {**operation.identity_on(checkpoint), "the repository": repo}
    destination = _MainBranch(api, repo, store, options, deleted, progress)
    return deliver(checkpoint, operation, destination, place, identity, run, progress)


def weights_of(repo: str, store: HubStore, *, overwrite: bool) -> list[str]:
    """Returns the weights that a repository has.

    Raises:
        HubError: It has some, and they may not be replaced.
    """
    theirs = [name for name in store.entries if "/" not in name and name.endswith(".safetensors")]
    if theirs and not overwrite:
        raise HubError(f"{repo}: holds weights already ({theirs[0]}); --overwrite replaces them, in one commit")
    return theirs


class Destination(Protocol):
    """Where a repository gets what a run made.

    Attributes:
        api: What writes to it.
        repo: The repository.
        folder: What the path of each file begins with, empty or ending in a slash.
    """

    api: Any
    repo: str
    folder: str

    def take_over(self, ledger: "Ledger") -> None:
        """Tells the ledger of the shards that an earlier run committed."""

    def keep(self, ledger: "Ledger") -> None:
        """May commit the shards that have arrived, when one more has."""

    def beside(self, folder: Path, receipt_name: str, checkpoint: Checkpoint) -> list[Any]:
        """Returns what the commit does beside adding what the source has, with the folder that holds the receipt."""

    def commit(self, operations: list[Any]) -> tuple[str, str]:
        """Makes the commit that ends the run; returns its address and hash."""


class _MainBranch:
    """The main branch, which gets one commit of everything."""

    folder = ""

    def __init__(
        self, api: Any, repo: str, store: HubStore, options: PushOptions, deleted: Sequence[str], progress: Progress
    ) -> None:
        self.api, self.repo = api, repo
        self._store, self._options, self._deleted, self._progress = store, options, deleted, progress

    def take_over(self, ledger: "Ledger") -> None:
        """Does nothing: before the only commit there is none."""

    def keep(self, ledger: "Ledger") -> None:
        """Does nothing: there is one commit."""

    def beside(self, folder: Path, receipt_name: str, checkpoint: Checkpoint) -> list[Any]:
        """Adds the card and the receipt, and deletes weights that a loader would take for those of the output."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        published = _published(folder, checkpoint, receipt_name, self._options)
        card = card_of(published, self.repo, self._options, self._store)
        return [
            CommitOperationAdd(CARD, card.encode()),
            CommitOperationAdd(receipt_name, (folder / receipt_name).read_bytes()),
            *(CommitOperationDelete(name) for name in self._deleted),
        ]

    def commit(self, operations: list[Any]) -> tuple[str, str]:
        """Commits on top of what was there at the start."""
        return commit(self.api, self.repo, operations, self._options, self._store, self._progress)


def deliver(
    checkpoint: Checkpoint,
    operation: Operation[_E, Any],
    destination: Destination,
    place: Path,
    identity: Mapping[str, str],
    run: RunOptions,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    """Carries out an operation, sends what it makes, and commits it.

    Args:
        checkpoint: The source.
        operation: What to do.
        destination: What is committed, and where.
        place: A name beside which, hidden, is what the run keeps here.
        identity: What must be equal for an interrupted run to be resumed.
        run: How to run.
        progress: Receives how far the run has come.

    Returns:
        The result of each edit, by tensor, and the commit's URL.

    Raises:
        ExecuteError: A tensor cannot be edited.
        HubError: The repository may not be written.
        Interrupted: Ctrl-C or SIGTERM; what has been sent need not be sent again.
    """
    repo = destination.repo
    amended = operation.amend(checkpoint)
    own = {shard.name for shard in amended.shards}
    edited = {edit.shard for edit in operation.edits} | amended.amended
    on_hub = checkpoint.remote is not None and checkpoint.remote.revision is not None
    passing = checkpoint.remote is not None and not on_hub
    here = tuple(shard for shard in amended.shards if shard.name in edited or passing)
    here += _large(amended) if passing else ()
    staging: Staging | None = None

    def discard() -> None:
        if staging is not None and not run.resume:
            staging.discard()

    with sigterm_as_interrupt(), locked(place), ending_early(repo, lambda: what_is_kept(staging), discard):
        sizes = {shard.name: shard.size for shard in here}
        staging = Staging.open(place, identity, sizes, resume=run.resume, overwrite=run.overwrite)
        ledger = Ledger(staging, destination, progress)
        destination.take_over(ledger)
        send = _way(staging, amended, progress)
        device = send(_part(amended, here), operation, run, ledger, progress)
        check_unchanged(checkpoint)
        results = ledger.results(operation)
        receipt = staging.folder / operation.receipt_name
        receipt.write_text(operation.receipt(checkpoint, results, device), encoding="utf-8", newline="\n")
        made = destination.beside(staging.folder, operation.receipt_name, checkpoint)
        left = own - sizes.keys() - ledger.digests().keys()
        copied = _copies(amended, left, ledger, destination.folder, by_hub=on_hub)

        def publish(copied: list[Any]) -> tuple[str, str]:
            with explained(repo):
                return destination.commit([*ledger.operations(), *copied, *made])

        try:
            url, oid = publish(copied)
        except HubError as error:
            if not on_hub or not refuses_to_copy(error.__cause__):
                raise
            progress.note(f"the Hub does not copy files of {checkpoint.name} by itself, so they pass through here")
            rest = (*(shard for shard in amended.shards if shard.name in left), *_large(amended))
            send(_part(amended, rest), operation, run, ledger, progress)
            on_hub = False
            url, oid = publish(_copies(amended, set(), ledger, destination.folder, by_hub=False))
        expected = ledger.digests()
        if checkpoint.remote is not None and on_hub:
            expected |= {name: checkpoint.remote.stamp(name) for name in left}
        _check_arrival(destination, oid, expected, amended)
        staging.discard()
    return results, url


@dataclass(frozen=True, slots=True)
class _Sent:
    """What is known of a shard to send.

    Attributes:
        sha256: Its digest.
        size: Its bytes.
        content: What was measured of its edits.
        arrived: Whether the Hub has it.
    """

    sha256: str
    size: int
    content: dict[str, Any]
    arrived: bool


class Ledger:
    """Sends shards and records what the commit needs to know of them, so that a later run need not send them again.

    Args:
        staging: Where it is kept.
        destination: Where the commit goes.
        progress: Receives what the client warns of.
    """

    def __init__(self, staging: Staging, destination: Destination, progress: Progress) -> None:
        self.staging = staging
        self._destination, self._progress = destination, progress
        self._path = staging.folder / _SENT
        self._shards = _as_sent(json.loads(self._path.read_bytes())) if self._path.is_file() else {}

    def __getitem__(self, name: str) -> _Sent | None:
        return self._shards.get(name)

    def arrived(self) -> dict[str, _Sent]:
        """Returns the shards that the Hub has."""
        return {name: sent for name, sent in self._shards.items() if sent.arrived}

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of each shard that the Hub has."""
        return {name: sent.sha256 for name, sent in self.arrived().items()}

    def results(self, operation: Operation[Any, Any]) -> dict[str, Any]:
        """Returns what was measured, by tensor."""
        return {
            tensor: operation.result(**values)
            for sent in self._shards.values()
            for tensor, values in sent.content.items()
        }

    def note(self, name: str, sent: _Sent) -> None:
        """Writes down, durably, what is known of a shard."""
        self._shards[name] = sent
        self._write()
        if sent.arrived:
            self._destination.keep(self)

    def take_over(self, written: Mapping[str, Any]) -> None:
        """Adds what the ledger of another run says of the shards that arrived."""
        self._shards |= {name: sent for name, sent in _as_sent(written).items() if sent.arrived}
        self._write()

    def written(self) -> dict[str, Any]:
        """Returns all of it as JSON has it."""
        return {name: dataclasses.asdict(sent) for name, sent in self._shards.items()}

    def forget(self, name: str) -> None:
        """Strikes a shard out."""
        del self._shards[name]
        self._write()

    def send(self, addition: "CommitOperationAdd") -> None:
        """Sends a shard, unless the Hub has its bytes already."""
        name, repo, api = addition.path_in_repo, self._destination.repo, self._destination.api
        with explained(repo), warnings_noted(self._progress):
            faults = HubFaults(repo, writing=True)
            patiently(faults, lambda: api.preupload_lfs_files(repo, [addition], free_memory=False))
        if is_stored_as_text(addition):
            raise HubError(f"{repo}: would store {name} as text; add `*.safetensors filter=lfs` to its .gitattributes")

    def operations(self) -> "list[CommitOperationAdd]":
        """Returns what the commit says of the shards that the Hub has, which need not be here."""
        operations = []
        for name, sent in sorted(self.arrived().items()):
            addition = addition_of(f"{self._destination.folder}{name}", sent.size, sent.sha256)
            mark_sent(addition)
            operations.append(addition)
        return operations

    def _write(self) -> None:
        write_whole(self._path, [json.dumps(self.written()).encode()])


def _as_sent(written: Mapping[str, Any]) -> dict[str, _Sent]:
    return {name: _Sent(**values) for name, values in written.items()}


_Send = Callable[[Checkpoint, Operation[Any, Any], RunOptions, Ledger, Progress], dict[str, str]]


def _way(staging: Staging, checkpoint: Checkpoint, progress: Progress) -> _Send:
    """Returns how shards are sent: through Xet where there is one and a shard has room here, else through LFS."""
    if not has_xet():
        return _stream
    needed, free = max((shard.size for shard in checkpoint.shards), default=0), shutil.disk_usage(staging.folder).free
    if free < needed:
        progress.note(
            f"{staging.folder.parent} has {size_text(free, 5)} free, too little for a shard of {size_text(needed, 5)} "
            "as Xet needs it here, so shards go through LFS, which takes longer"
        )
        return _stream
    return _stage


def _stream(
    checkpoint: Checkpoint, operation: Operation[Any, Any], run: RunOptions, ledger: Ledger, progress: Progress
) -> dict[str, str]:
    """Sends shards that are computed while they are sent; returns what did the arithmetic."""
    window = run.memory // 2
    editor = operation.editor(dataclasses.replace(run, memory=run.memory - window), threading.Event())
    progress.note(editor.reason)
    identity = editor.identity()
    ledger.staging.agree({f"the {what}": value for what, value in identity.items()})
    todo = [shard for shard in checkpoint.shards if shard.name not in ledger.arrived()]
    progress.begin(sum(shard.size * (1 if ledger[shard.name] else 2) for shard in todo))
    edits = by_shard(operation.edits)
    with editor.one_thread_each(), ThreadPoolExecutor(editor.jobs) as pool:
        editor.share(pool.submit)
        for shard in todo:
            with EditedFile(
                checkpoint, shard, edits.get(shard.name, ()), editor, window=window, advance=progress.advance
            ) as file:
                known = ledger[shard.name] or _known(checkpoint, shard, edited=shard.name in edits)
                if known is None:
                    survey = file.survey()
                    content = {name: dataclasses.asdict(result) for name, result in survey.results.items()}
                    known = _Sent(survey.sha256, shard.size, content, arrived=False)
                ledger.note(shard.name, known)
                refusal = None
                try:
                    ledger.send(addition_of(shard.name, known.size, known.sha256, file, file.sample))
                except HubError as error:
                    refusal = error
                if file.digest not in (None, known.sha256):
                    # Neither pass can be trusted; the next run begins with the first.
                    ledger.forget(shard.name)
                    raise HubError(
                        f"{checkpoint.name}: {shard.name} was not the same when it was read again to be sent; "
                        "run again when nothing writes to it"
                    ) from refusal
                if refusal is not None:
                    raise refusal
            ledger.note(shard.name, dataclasses.replace(known, arrived=True))
    return identity


def _known(checkpoint: Checkpoint, shard: Shard, *, edited: bool) -> _Sent | None:
    """Returns what is known of a shard without reading it: the digest that the Hub has of one that is not edited."""
    if edited or checkpoint.remote is None:
        return None
    digest, expected = checkpoint.remote.digest(shard.name)
    return _Sent(expected, shard.size, {}, arrived=False) if expected and digest.name == "sha256" else None


def _stage(
    checkpoint: Checkpoint, operation: Operation[Any, Any], run: RunOptions, ledger: Ledger, progress: Progress
) -> dict[str, str]:
    """Sends shards that are made here one at a time and removed again; returns what did the arithmetic."""
    staging = ledger.staging
    made = set(staging.done) - ledger.arrived().keys()
    staging.done |= {name: sent.content for name, sent in ledger.arrived().items()}
    progress.begin(sum(shard.size for shard in checkpoint.shards if shard.name not in staging.done))
    with _Stager(checkpoint, operation, ledger, progress) as stager:
        for name in sorted(made):
            stager.send(name)
        _, identity = stager.write(run)
    return identity


class _Stager(ShardWriter[_E, Any]):
    """Edits one shard at a time, sends it, and removes it here."""

    in_flight = 1

    def __init__(
        self, checkpoint: Checkpoint, operation: Operation[_E, Any], ledger: Ledger, progress: Progress
    ) -> None:
        super().__init__(checkpoint, operation, ledger.staging, progress, link=False)
        self._ledger = ledger

    def finish(self, work: Work[Any]) -> dict[str, Any]:
        """Waits for a shard and sends it."""
        results = super().finish(work)
        self.send(work.shard.name)
        return results

    def send(self, name: str) -> None:
        """Sends a shard that is complete, and removes it here."""
        from huggingface_hub import CommitOperationAdd

        path = self._staging.folder / name
        addition = CommitOperationAdd(name, path)
        self._ledger.send(addition)
        sha256, size = addition.upload_info.sha256.hex(), addition.upload_info.size
        self._ledger.note(name, _Sent(sha256, size, self._staging.done[name], arrived=True))
        path.unlink()


def _part(checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> Checkpoint:
    return dataclasses.replace(checkpoint, shards=shards, sidecars=())


def _large(checkpoint: Checkpoint) -> tuple[Shard, ...]:
    """Returns the sidecars that may not fit into memory, to be sent as shards are."""
    kept = (name for name in checkpoint.sidecars if name != CARD and name not in checkpoint.amended)
    sizes = {name: size_of(checkpoint, name) for name in kept}
    return tuple(Shard(name, Path(name), size, "", ()) for name, size in sizes.items() if size > _LARGE)


def _copies(checkpoint: Checkpoint, shards: set[str], ledger: Ledger, folder: str, *, by_hub: bool) -> list[Any]:
    """Returns how to bring over what has not been sent, into a folder: by the Hub itself, or from this disk."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy

    sent = ledger.digests()
    names = [*sorted(shards), *(name for name in checkpoint.sidecars if name != CARD and name not in sent)]
    repo, revision = checkpoint.origin or (None, None)

    def bring(name: str) -> Any:
        path = f"{folder}{name}"
        if by_hub and repo is not None and name not in checkpoint.amended:
            return CommitOperationCopy(name, path, src_revision=revision, src_repo_id=repo, src_repo_type="model")
        if (remote := checkpoint.fetched(name)) is None:
            return CommitOperationAdd(path, checkpoint.root / name)
        return CommitOperationAdd(path, remote.read_range(name, 0, size_of(checkpoint, name)))

    return [bring(name) for name in names]


def _published(folder: Path, checkpoint: Checkpoint, receipt_name: str, options: PushOptions) -> Published:
    kinds: dict[str, PublishedKind] = {
        MERGE_RECEIPT_NAME: "merge",
        DEQUANTISATION_RECEIPT_NAME: "dequantisation",
    }
    kind = kinds.get(receipt_name, "ablation")
    base, revision = checkpoint.origin or (None, None)
    if base is not None and not is_hub_id(base):
        base = None  # a folder of an object store, which no card can name
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


def _check_arrival(destination: Destination, oid: str, expected: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Compares the digests of the commit with what was sent and with the source's."""
    entries = HubStore(destination.repo, oid).entries
    for shard in checkpoint.shards:
        digest = expected.get(shard.name)
        found = entries.get(f"{destination.folder}{shard.name}")
        if found is None or found.size != shard.size or (digest is not None and found.digest != digest):
            raise not_arrived(destination.repo, shard.name, oid)


def not_arrived(repo: str, name: str, oid: str) -> HubError:
    """Returns the error of a file that a commit has otherwise than it was sent."""
    return HubError(f"{repo}: {name} did not arrive as it was sent; revert commit {oid} and run again")
