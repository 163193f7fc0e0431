"""Publishes an edited checkpoint or an adapter on the Hub: verified, in one commit, and checked after."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ablate_shards.errors import AblateError, HubError, UsageError
from ablate_shards.names import WEIGHTS_NAME
from ablate_shards.surgery.checkpoint.hub_store import HubFaults, HubStore, explain_hub, hub_pause
from ablate_shards.surgery.checkpoint.remote import Entry, Patience, RemoteFiles, patiently
from ablate_shards.surgery.checkpoint.stores import is_hub_id, open_source
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.hub.card import CardOptions, PublishedKind, metadata_of, model_card
from ablate_shards.surgery.hub.published import CARD, Published, look_at
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.verify.adapter_proof import verify_adapter
from ablate_shards.surgery.verify.proof import verify

__all__ = [
    "FilePlan",
    "PushOptions",
    "PushPlan",
    "Pushed",
    "card_of",
    "check_place_of_adapter",
    "commit",
    "explained",
    "open_for_writing",
    "plan_push",
    "push",
    "require_token",
    "warnings_noted",
]

_CHUNK = 1 << 20
_MOST_NAMES = 3
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class PushOptions:
    """How to publish.

    Attributes:
        private: Make a new repository private.
        create_pr: Open a pull request instead of committing to the branch.
        revision: The branch to commit to, the main branch if None; it is made if it does not exist.
        message: The summary of the commit.
        base_model: The base model's repository, where the receipt does not know it.
        card: A card to start from, instead of the repository's own.
        source: What the folder was made of, to verify it with; where it is on the Hub the receipt knows it.
        adapter: What was merged, to verify a merge with.
        replace: Delete weights from the repository that the folder does not have, in the same commit.
    """

    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    message: str | None = None
    base_model: str | None = None
    card: Path | None = None
    source: Path | str | None = None
    adapter: Path | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file to publish, and what the repository has of that name.

    Attributes:
        name: The relative name.
        size: Its bytes.
        state: Whether the repository lacks it, has another, or has the same.
    """

    name: str
    size: int
    state: Literal["new", "changed", "same"]


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push would do.

    Attributes:
        repo: The repository.
        exists: Whether it is there already.
        kind: What the folder holds.
        base: The base model's repository, if it is known.
        files: What would be published.
        deleted: Weights of the repository that would be deleted.
        card: The model card.
        unverified: Why the folder would be verified first, None where its receipt is fresh.
    """

    repo: str
    exists: bool
    kind: PublishedKind
    base: str | None
    files: tuple[FilePlan, ...]
    deleted: tuple[str, ...]
    card: str
    unverified: str | None


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did.

    Attributes:
        url: The commit, or the pull request.
        commit: The commit's hash.
        files: How many files of the folder were checked against the repository.
        verified: Whether the folder was verified first, because its receipt was not fresh.
        new: Whether there is a commit of it now, or the repository held all of it already.
    """

    url: str
    commit: str
    files: int
    verified: bool
    new: bool


def plan_push(folder: Path, repo: str, options: PushOptions) -> PushPlan:
    """Returns what a push would do; nothing is written anywhere.

    Raises:
        HubError: The repository may not be read, or is in the way.
        UsageError: The folder holds nothing that can be published.
        VerifyError: Its receipt cannot be read.
    """
    published = look_at(folder, options.base_model)
    _spare_base(published, repo, options)
    store = _repository(repo, options)
    card = card_of(published, repo, options, store).encode()
    theirs = store.entries if store else {}
    files = [FilePlan(CARD, len(card), _state(card, theirs.get(CARD)))]
    for name in published.files:
        path = folder / name
        files.append(FilePlan(name, path.stat().st_size, _state(path, theirs.get(name))))
    return PushPlan(
        repo=repo,
        exists=store is not None,
        kind=published.kind,
        base=published.base,
        files=tuple(sorted(files, key=lambda file: file.name)),
        deleted=_to_delete(published, repo, options, store),
        card=card.decode(),
        unverified=published.stale,
    )


def push(folder: Path, repo: str, options: PushOptions, run: RunOptions, progress: Progress) -> Pushed:
    """Publishes a folder in one commit, so that nobody ever sees half of it.

    Args:
        folder: An ablated or merged checkpoint, or an adapter.
        repo: ``org/name``; made if it does not exist.
        options: How.
        run: Where to recompute, should the folder have to be verified.
        progress: Receives how far it has come.

    Raises:
        EvaluateError: The folder's evaluation cannot be read, or is of another version.
        HubError: The repository may not be written, or the folder is not what its receipt says.
        UsageError: The folder holds nothing that can be published.
        VerifyError: Its receipt cannot be read.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    published = look_at(folder, options.base_model)
    _spare_base(published, repo, options)
    require_token(repo)
    store = _repository(repo, options)
    deleted = _to_delete(published, repo, options, store)
    card = card_of(published, repo, options, store)
    if published.stale is not None:
        progress.note(f"{published.stale}, so it is verified first")
        _verify(published, options, run, progress)
    store, api = _made(repo, options, store)
    progress.note(f"sending to {repo} those of {len(published.files) + 1} files that it does not have")
    with explained(repo):
        operations = [
            CommitOperationAdd(CARD, card.encode()),
            *(CommitOperationAdd(name, folder / name) for name in published.files),
            *(CommitOperationDelete(name) for name in deleted),
        ]
        url, oid = commit(api, repo, operations, options, store, progress)
        found = patiently(store, lambda: api.verify_repo_checksums(repo, revision=oid, local_dir=folder))
    wrong = [item["path"] for item in found.mismatches if item["path"] in published.files]
    wrong += [name for name in found.extra_paths if name in published.files]
    if wrong:
        raise HubError(
            f"{repo}: {_names(wrong)} did not arrive as in {folder}; push again, and if it stays so, revert commit "
            f"{oid}"
        )
    return Pushed(
        url=url,
        commit=oid,
        files=len(published.files),
        verified=published.stale is not None,
        new=oid != store.revision,
    )


def open_for_writing(repo: str, options: PushOptions) -> tuple[HubStore, Any]:
    """Returns the repository as it is now, made if it is not there, and what writes to it.

    Raises:
        HubError: It may not be written.
    """
    require_token(repo)
    return _made(repo, options, _repository(repo, options))


def commit(
    api: Any, repo: str, operations: list[Any], options: PushOptions, store: HubStore, progress: Progress
) -> tuple[str, str]:
    """Sends what is not there yet, makes one commit of it all, and returns the commit's address and hash.

    Raises:
        HubError: The repository has changed since ``store`` was opened, or may not be written.
    """
    patience = Patience(HubFaults(repo, writing=True))
    while True:
        try:
            with warnings_noted(progress):
                info = api.create_commit(
                    repo,
                    operations,
                    commit_message=options.message or "Edited with ablate-shards",
                    revision=options.revision,
                    create_pr=options.create_pr,
                    parent_commit=store.revision,
                )
            return info.pr_url or str(info.commit_url), str(info.oid)
        except Exception as error:
            passes = hub_pause(error) is not None
            if passes and options.create_pr:
                # A second attempt could open a second pull request: only a person can tell whether the first is there.
                raise
            head = patiently(store, lambda: api.repo_info(repo, revision=options.revision).sha) if passes else None
            if head not in (None, store.revision):
                # The answer was lost, not the commit; whether it is this one, the checksums tell.
                return f"{api.endpoint}/{repo}/commit/{head}", str(head)
            patience.wait(error)


def check_place_of_adapter(repo: str, options: PushOptions, *, overwrite: bool) -> None:
    """Refuses a repository that an adapter cannot be put in, before the adapter is made.

    Args:
        repo: ``org/name``.
        options: How to publish.
        overwrite: Whether an adapter that is there may be replaced.

    Raises:
        HubError: It may not be written, or holds an adapter, or the weights of a model.
    """
    require_token(repo)
    store = _repository(repo, options)
    _refuse_model(repo, store)
    if store is not None and WEIGHTS_NAME in store.entries and not overwrite:
        raise HubError(f"{repo}: holds an adapter already; --overwrite replaces it, in one commit")


def _refuse_model(repo: str, store: HubStore | None) -> None:
    """Refuses to put an adapter beside the weights of a model."""
    names = () if store is None else sorted(store.entries)
    weights = next(
        (name for name in names if name.endswith(_WEIGHTS) and "/" not in name and name != WEIGHTS_NAME), None
    )
    if weights is not None:
        raise HubError(
            f"{repo}: holds {weights}, and transformers adds an adapter that lies beside a model whenever it loads "
            "that; name another repository"
        )


def _spare_base(published: Published, repo: str, options: PushOptions) -> None:
    """Refuses to put an edited model where its own base is, unless a branch or a pull request is asked for."""
    own = published.base is not None and repo.lower() == published.base.lower()
    if own and options.revision is None and not options.create_pr:
        raise UsageError(
            f"{repo}: is what {published.path} was made of, and would be replaced; name another repository, a branch "
            "with --revision, or add --create-pr"
        )


def require_token(repo: str) -> None:
    """Refuses to write without a token.

    Raises:
        HubError: There is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"{repo}: a token is needed to write; log in with `hf auth login` or set HF_TOKEN")


def _made(repo: str, options: PushOptions, store: HubStore | None) -> tuple[HubStore, Any]:
    """Returns the repository, made if it was not there, with the branch that is asked for."""
    from huggingface_hub import HfApi

    api, faults = HfApi(), HubFaults(repo, writing=True)
    with explained(repo):
        if store is None:
            patiently(faults, lambda: api.create_repo(repo, private=options.private or None, exist_ok=True))
            store = HubStore(repo)
        branch = options.revision
        if branch and not branch.startswith("refs/") and not options.create_pr:
            patiently(faults, lambda: api.create_branch(repo, branch=branch, exist_ok=True))
            store = HubStore(repo, branch)
    return store, api


def _verify(published: Published, options: PushOptions, run: RunOptions, progress: Progress) -> None:
    folder = published.path
    source = options.source or published.origin
    if source is None:
        raise HubError(f"{published.stale}; add --source with what {folder} was made of, so that it can be verified")
    if published.kind == "adapter":
        differences = verify_adapter(open_source(source), folder, run, progress).differences
    else:
        differences = verify(open_source(source), folder, run, progress, adapter=options.adapter).differences
    if differences:
        first = differences[0]
        rest = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise HubError(f"{folder}: is not what its receipt says: {first.where}: {first.what}{rest}; nothing was sent")


def _repository(repo: str, options: PushOptions) -> HubStore | None:
    """Returns the repository as it is now, None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if not is_hub_id(repo) or "@" in repo:
        raise UsageError(f"{repo}: expected a repository such as me/my-model (a branch goes to --revision)")
    try:
        store = HubStore(repo, options.revision)
    except HubError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            return HubStore(repo)
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise
    if options.private and not store.private:
        raise HubError(
            f"{repo}: exists and is public, so --private would not hide what is pushed; make it private in its "
            "settings first, or leave --private out"
        )
    return store


def card_of(published: Published, repo: str, options: PushOptions, store: HubStore | None) -> str:
    """Returns the card of a folder, made around the one there is.

    Args:
        published: The folder.
        repo: Where it goes.
        options: How to publish.
        store: What is there now.

    Raises:
        HubError: The card there is, or a receipt, cannot be read, or the Hub refuses what would be the metadata.
    """
    folder, own = published.path, None
    if (folder / CARD).is_file():
        own = (folder / CARD).read_text(encoding="utf-8-sig")
    inherited: Mapping[str, Any] = {}
    if own and published.kind != "adapter" and CARD in published.copied:
        inherited = metadata_of(own)
    elif published.base is not None:
        inherited = _base_metadata(published.base, published.revision)
    existing = None
    if options.card is not None:
        existing = options.card.read_text(encoding="utf-8-sig")
    elif own and CARD not in published.copied:
        existing = own
    elif store is not None and CARD in store.entries:
        existing = RemoteFiles(store).read(CARD).decode("utf-8-sig")
    card = model_card(
        folder,
        CardOptions(
            repo=repo,
            kind=published.kind,
            base=published.base,
            revision=published.revision,
            inherited=inherited,
            existing=existing,
            files=published.files,
        ),
    )
    _check_metadata(card, repo)
    return card


def _check_metadata(card: str, repo: str) -> None:
    """Asks the Hub about a card's metadata before anything is made or sent, because it would refuse the commit."""
    from huggingface_hub import ModelCard

    faults = HubFaults(repo)
    try:
        patiently(faults, ModelCard(card).validate)
    except ValueError as error:
        try:
            said = "; ".join(str(each["message"]) for each in json.loads(str(error))["errors"])
        except (ValueError, LookupError, TypeError):
            said = " ".join(str(error).split())
        raise HubError(
            f"{repo}: the Hub refuses the metadata of the card ({said}); repair README.md, or start from another card "
            "with --card"
        ) from error


def _base_metadata(base: str, revision: str | None) -> Mapping[str, Any]:
    """Returns the metadata of the base model's card; a base that cannot be read has none."""
    try:
        store = HubStore(base, revision)
        return metadata_of(RemoteFiles(store).read(CARD).decode("utf-8-sig")) if CARD in store.entries else {}
    except HubError:
        return {}


def _to_delete(published: Published, repo: str, options: PushOptions, store: HubStore | None) -> tuple[str, ...]:
    """Returns weights of the repository that a loader would take for those of the folder."""
    if published.kind == "adapter":
        _refuse_model(repo, store)
        return ()
    if store is None:
        return ()
    left = tuple(
        name
        for name in sorted(store.entries)
        if "/" not in name and name.endswith(_WEIGHTS) and name not in published.files
    )
    if left and not options.replace:
        raise HubError(
            f"{repo}: has {_names(left)}, which {published.path} does not have and a loader might prefer; "
            "--replace deletes them in the same commit"
        )
    return left


def _state(content: Path | bytes, theirs: Entry | None) -> Literal["new", "changed", "same"]:
    if theirs is None:
        return "new"
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != theirs.size:
        return "changed"
    digest = hashlib.sha256() if theirs.algorithm == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
    return "same" if digest.hexdigest() == theirs.digest else "changed"


def _names(names: list[str] | tuple[str, ...]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong while a repository is written."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, AblateError):
            # What was being sent could not be read.
            raise error.__cause__ from None
        explained = explain_hub(error, repo, writing=True)
        if explained is None and isinstance(error, OSError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise explained or HubError(
            f"{repo}: the upload failed ({lines[0]}); push again, what has arrived is not sent twice"
        ) from error


@contextmanager
def warnings_noted(progress: Progress) -> Iterator[None]:
    """Shows warnings of the client, such as those about a card, as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            progress.note(" ".join(str(warning.message).split()))
