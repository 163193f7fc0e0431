"""The part of an operation that one of several ranks does, and how the parts of all of them become one output.

A rank's part is an output like any other, with its own shards, and those files beside them that belong to rank 0. Its
receipt says what of the whole receipt this rank measured, and what all ranks have to agree on.
"""

import collections
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ablate_shards.errors import ExecuteError, VerifyError
from ablate_shards.names import RECEIPT_NAMES
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, size_of
from ablate_shards.surgery.checkpoint.files import Files, leaves_folder
from ablate_shards.surgery.edit.operation import Operation, ending_early
from ablate_shards.surgery.edit.receipt import read_sealed, seal
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.machine.parts import Part, differing, fitting, unfitting, without_rank
from ablate_shards.surgery.machine.ranks import WorkerRank, deal
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt, uninterrupted
from ablate_shards.surgery.machine.staging import OutFolder, Staging, beside, check_free, is_staged, locked
from ablate_shards.surgery.plan.edits import Edit
from ablate_shards.validation import checked

__all__ = [
    "EditedPart",
    "Joined",
    "agreed_on",
    "are_told_of",
    "join",
    "join_in_folder",
    "lacking",
    "part_of",
    "read_part",
    "share_of",
]

_E = TypeVar("_E", bound=Edit)

_TENSORS = "tensors"

PART_FORMAT = "ablate-shards.part/1"


@dataclass(frozen=True, slots=True)
class EditedPart(Part):
    """What a rank did of an operation, as its receipt says.

    Attributes:
        files: What the part holds, and the size of each.
        receipt_name: The file in the output that says what was done.
        digests: Digests of what it says, by its keys, but of the tensors.
        measured: What it says of the tensors of this rank, by their numbers among all.
        receipt: What it says, without what other ranks measured; it is large, so rank 0 alone has it.
    """

    files: Mapping[str, int]
    receipt_name: str
    digests: Mapping[str, str]
    measured: tuple[tuple[int, Any], ...]
    receipt: Mapping[str, Any] | None = None

    def is_computed_by(self, arithmetic: Mapping[str, str]) -> bool:
        """Returns whether the arithmetic is what it was computed by; another may give other bits."""
        return self.digests.get("device") == _digest(dict(arithmetic))


@dataclass(frozen=True, slots=True)
class Joined:
    """What the parts of all ranks make.

    Attributes:
        identity: What they agree on.
        files: The folder that each file is in, and its size.
        receipt_name: The receipt's file.
        receipt: Its text.
    """

    identity: Mapping[str, str]
    files: Mapping[str, tuple[str, int]]
    receipt_name: str
    receipt: str


@dataclass(frozen=True, slots=True)
class _MeasuredElsewhere:
    """What a rank knows of the tensors of others."""


def share_of(checkpoint: Checkpoint, edits: Sequence[_E], rank: WorkerRank) -> tuple[Checkpoint, tuple[_E, ...]]:
    """Returns a rank's share of a checkpoint, and the edits in it.

    Shards are dealt out by their bytes, and edited bytes count twice; what lies beside the shards is rank 0's.
    """
    work = collections.Counter({shard.name: shard.size for shard in checkpoint.shards})
    for edit in edits:
        work[edit.shard] += edit.end - edit.start
    mine = deal(work, rank.count)[rank.index]
    share = dataclasses.replace(
        checkpoint,
        shards=tuple(shard for shard in checkpoint.shards if shard.name in mine),
        sidecars=checkpoint.sidecars if rank.index == 0 else (),
    )
    return share, tuple(edit for edit in edits if edit.shard in mine)


def part_of(
    operation: Operation[Any, Any], checkpoint: Checkpoint, rank: WorkerRank, command: Sequence[str]
) -> Operation[Any, Any]:
    """Returns what a rank does of an operation on a checkpoint.

    Args:
        operation: What all ranks do together.
        checkpoint: The source.
        rank: The rank.
        command: The words of the command line, for those who have to run it again.
    """
    whole = operation.amend(checkpoint)
    part, edits = share_of(whole, operation.edits, rank)
    sizes = {shard.name: shard.size for shard in part.shards} | {name: size_of(whole, name) for name in part.sidecars}
    measured_elsewhere = dict.fromkeys((edit.name for edit in operation.edits), _MeasuredElsewhere())

    def receipt(source: Checkpoint, results: Mapping[str, Any], arithmetic: Mapping[str, str]) -> str:
        said = json.loads(operation.receipt(source, measured_elsewhere | dict(results), arithmetic))
        del said["sha256"]
        tensors = enumerate(said.get(_TENSORS, ()))
        return seal(
            {
                "format": PART_FORMAT,
                "rank": rank.index,
                "count": rank.count,
                "identity": agreed_on(operation, source),
                "files": sizes,
                "command": without_rank(command),
                "digests": {key: _digest(value) for key, value in said.items() if key != _TENSORS},
                "measured": [(number, record) for number, record in tensors if record["name"] in results],
                **({"receipt": said} if rank.index == 0 else {}),
            }
        )

    return dataclasses.replace(
        operation,
        edits=edits,
        amend=lambda _: part,
        receipt=receipt,
    )


def agreed_on(operation: Operation[Any, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """Returns what must be equal for the parts of all ranks to make one output.

    That is what a resumed run has to have, but that a commit is the same on every machine, whenever it was fetched.
    """
    repo, revision = checkpoint.origin or (None, None)
    commit = {"the source": f"{repo}@{revision}"} if revision else {}
    return {"the command": operation.receipt_name, **operation.identity_on(checkpoint), **commit}


def read_part(files: Files) -> EditedPart:
    """Reads what a rank did, from the folder of its part.

    Raises:
        ExecuteError: It is not what a rank wrote.
    """
    name = next((name for name in RECEIPT_NAMES if files.has(name)), RECEIPT_NAMES[0])
    try:
        content, altered = read_sealed(files, name, PART_FORMAT)
        part = checked({**content, "place": files.name, "receipt_name": name}, EditedPart, name)
    except (VerifyError, ValueError) as error:
        raise ExecuteError(
            f"{files.name}: is not what a rank wrote ({error}); remove it and run that rank again"
        ) from error
    if altered or any(map(leaves_folder, part.files)):
        raise ExecuteError(
            f"{files.shown(name)}: was changed after it was written; remove {files.name} and run that rank again"
        )
    return part


def join(out: object, place: object, parts: Iterable[EditedPart]) -> Joined:
    """Joins the parts of all ranks; nothing of their shards is read.

    Args:
        out: The output, as messages call it.
        place: Where the parts are.
        parts: Those that are complete.

    Raises:
        ExecuteError: A rank is missing, or two do not fit together.
    """
    found = fitting(out, place, parts)
    first = found[0]
    for part in found:
        if wrong := [f'"{key}" in the receipt' for key in differing(first.digests, part.digests)]:
            raise unfitting(out, first, part, wrong)
    receipt = dict(first.receipt or {})
    measured = dict(record for part in found for record in part.measured)
    if _TENSORS in receipt:
        receipt[_TENSORS] = [measured[number] for number in range(len(receipt[_TENSORS]))]
    files = {name: (part.folder, size) for part in found for name, size in part.files.items()}
    return Joined(first.identity, files, first.receipt_name, seal(receipt))


def are_told_of(receipt: bytes, parts: Iterable[EditedPart]) -> bool:
    """Returns whether the receipt of an output tells of what some ranks did, however many there were."""
    try:
        said = dict(json.loads(receipt))
        tensors = said.pop(_TENSORS, [])
        digests = {key: _digest(value) for key, value in said.items() if key != "sha256"}
        return all(
            part.digests == digests and all(tensors[number] == record for number, record in part.measured)
            for part in parts
        )
    except (ValueError, TypeError, LookupError):
        return False


def join_in_folder(joined: Joined, place: Path, out: OutFolder) -> None:
    """Makes the parts of all ranks one folder, which appears when it is complete; their files are moved, not copied.

    What was interrupted goes on when it is done again.

    Args:
        joined: What the parts make.
        place: The folder of the parts.
        out: The folder to make.

    Raises:
        ExecuteError: A file of a part is gone or has another size, or something else is being made there.
    """
    with (
        sigterm_as_interrupt(),
        locked(out.path),
        ending_early(out.path, lambda: "finish again to go on", lambda: None),
    ):
        receipt = joined.receipt.encode()
        staged = beside(out.path, "staging")
        if not is_staged(out.path) and not any(
            (place / folder / name).is_file() for name, (folder, _) in joined.files.items()
        ):
            # A run that was killed moved all files. The journal went last before the name came.
            if _says(out.path / joined.receipt_name, receipt):
                shutil.rmtree(staged, ignore_errors=True)
                return
            if _says(staged / joined.receipt_name, receipt):
                with uninterrupted():
                    Staging(out.path, staged, out.overwrite).publish()
                return
        check_free(out.path, overwrite=out.overwrite)
        staging = Staging.open(out.path, joined.identity, None, resume=True, overwrite=out.overwrite)
        for name, (folder, size) in joined.files.items():
            there, here = place / folder / name, staging.folder / name
            found = next((path for path in (there, here) if path.is_file()), None)
            if found is None or found.stat().st_size != size:
                raise lacking(there, size, None if found is None else found.stat().st_size)
        for name, (folder, _) in joined.files.items():
            there, here = place / folder / name, staging.folder / name
            here.parent.mkdir(parents=True, exist_ok=True)
            if there.is_file():
                there.replace(here)
        write_whole(staging.folder / joined.receipt_name, [receipt])
        with uninterrupted():
            staging.publish()


def _says(path: Path, receipt: bytes) -> bool:
    return path.is_file() and path.read_bytes() == receipt


def lacking(path: object, size: int, found: int | None) -> ExecuteError:
    """Returns the error of a part in which a file is not what its rank wrote."""
    what = "is gone" if found is None else f"has {found} bytes, expected {size}"
    return ExecuteError(f"{path}: {what}, although its rank is complete; remove that rank's folder and run it again")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
