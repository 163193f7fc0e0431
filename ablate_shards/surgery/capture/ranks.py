"""What one of several ranks captures, and how the parts of all of them become one dump.

Batches are made of all prompts and then dealt out, since the last bit of an activation may depend on its batch. A
rank's part is a folder of one shard per layer, as a dump is, with the rows of its batches alone.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ablate_shards.errors import CheckpointError, ExecuteError
from ablate_shards.surgery.capture.dump import DumpWriter, check_free, holds, shard_name, tensor_names
from ablate_shards.surgery.capture.prompts import PromptBatch
from ablate_shards.surgery.checkpoint.headers import read_header
from ablate_shards.surgery.edit.operation import ending_early
from ablate_shards.surgery.machine.parts import PARTS, Part, fitting, is_complete, remove_joined, without_rank
from ablate_shards.surgery.machine.ranks import WorkerRank, deal
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt
from ablate_shards.surgery.machine.staging import beside, locked
from ablate_shards.validation import checked

if TYPE_CHECKING:
    import torch

__all__ = ["is_captured", "join_dump", "metadata_of_part", "part_of_dump", "share_of_batches"]

PART_FORMAT = "ablate-shards.activations-part/1"
_SHARE = "share"


@dataclass(frozen=True, slots=True)
class _CapturedPart(Part):
    """What a rank captured.

    Attributes:
        rows: Which prompts, in the order of its rows: those of all positives, then of all negatives.
        layers: How many layers.
        dump: The metadata of the dump.
    """

    rows: tuple[int, ...]
    layers: int
    dump: Mapping[str, str]


def share_of_batches(batches: Sequence[PromptBatch], rank: WorkerRank) -> list[PromptBatch]:
    """Returns a rank's batches; they are dealt out by their tokens."""
    mine = deal({number: batch.ids.numel() for number, batch in enumerate(batches)}, rank.count)[rank.index]
    return [batches[number] for number in sorted(mine)]


def part_of_dump(dump: Path, rank: WorkerRank) -> Path:
    """Returns the folder for what a rank captures, in a hidden one beside the dump."""
    place = beside(dump, PARTS)
    place.mkdir(exist_ok=True)
    return place / rank.folder


def is_captured(part: Path, rank: WorkerRank, identity: Mapping[str, str], *, overwrite: bool) -> bool:
    """Returns whether a rank is complete; what ranks captured of something else is removed if it may be overwritten.

    Raises:
        ExecuteError: Another rank captured something else.
    """
    place = part.parent
    remove = (lambda other: shutil.rmtree(place / other.folder, ignore_errors=True)) if overwrite else None
    return is_complete(rank, identity, _read_parts(place), remove=remove)


def metadata_of_part(
    metadata: Mapping[str, str],
    identity: Mapping[str, str],
    batches: Sequence[PromptBatch],
    layers: int,
    rank: WorkerRank,
    command: Sequence[str],
) -> dict[str, str]:
    """Returns what each shard of a part says of itself.

    Args:
        metadata: What the dump will say of itself.
        identity: What all ranks must agree on.
        batches: The rank's batches.
        layers: How many layers there are.
        rank: The rank.
        command: The words of the command line, for those who have to run it again.
    """
    share = {
        "rank": rank.index,
        "count": rank.count,
        "identity": dict(identity),
        "command": without_rank(command),
        "rows": sorted(row for batch in batches for row in batch.rows),
        "layers": layers,
        "dump": dict(metadata),
    }
    return {"format": PART_FORMAT, _SHARE: json.dumps(share)}


def join_dump(dump: Path, *, overwrite: bool) -> tuple[int, int] | None:
    """Joins what all ranks captured, and gives it the name of the dump.

    Where a dump of that name is what the parts make, an interrupted run has joined them, and only they are removed.

    Args:
        dump: A file ending in ``.safetensors``, or a folder of one shard per layer.
        overwrite: Whether a dump of that name is replaced.

    Returns:
        How many pairs and layers it has, None where no rank captured anything.

    Raises:
        CaptureError: The dump may not be replaced, or something else is being captured into it.
        ExecuteError: A rank is missing, two do not fit together, or a part was changed.
        Interrupted: Ctrl-C or SIGTERM.
    """
    dump = dump.resolve() if dump.is_symlink() else dump
    place = beside(dump, PARTS)
    if not (found := list(_read_parts(place))):
        return None
    parts = fitting(dump, place, found)
    first = parts[0]

    def layers() -> "Iterator[Mapping[str, torch.Tensor]]":
        return (_joined(place, parts, layer) for layer in range(first.layers))

    with sigterm_as_interrupt(), locked(dump), ending_early(dump, lambda: "finish again to go on", lambda: None):
        if not overwrite and holds(dump, first.dump, layers()):
            shutil.rmtree(beside(dump, "staging"), ignore_errors=True)
        else:
            check_free(dump, overwrite=overwrite)
            writer = DumpWriter(dump, first.dump, first.identity, resume=True, overwrite=overwrite)
            for layer, tensors in enumerate(layers()):
                writer.write(layer, tensors)
            writer.publish()
    remove_joined(dump)
    return sum(len(part.rows) for part in parts) // 2, first.layers


def _joined(place: Path, parts: Sequence[_CapturedPart], layer: int) -> "dict[str, torch.Tensor]":
    """Returns a layer's tensors, ``[pairs, hidden size]``, of the rows that all ranks captured."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    rows: dict[int, torch.Tensor] = {}
    for part in parts:
        path = place / part.folder / shard_name(layer)
        try:
            tensors = load_file(path)
            halves = [tensors[name] for name in tensor_names(layer)]
            rows |= zip(part.rows, torch.cat(halves), strict=True)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ExecuteError(
                f"{path}: is not what rank {part.rank} captured ({error}); remove {place / part.folder} and run that "
                "rank again"
            ) from error
    whole = torch.stack([rows[row] for row in range(len(rows))])
    return dict(zip(tensor_names(layer), whole.chunk(2), strict=True))


def _read_parts(place: Path) -> Iterator[_CapturedPart]:
    """Yields what the ranks captured that are complete."""
    for path in sorted(place.glob("[0-9]*-of-*")):
        shard = path / shard_name(0)
        if not shard.is_file():
            continue
        try:
            _, metadata = read_header(shard)
            if metadata.get("format") != PART_FORMAT:
                continue
            yield checked({**json.loads(metadata[_SHARE]), "place": str(path)}, _CapturedPart, str(shard))
        except (CheckpointError, ValueError, KeyError) as error:
            raise ExecuteError(
                f"{path}: is not what a rank captured ({error}); remove it and run that rank again"
            ) from error
