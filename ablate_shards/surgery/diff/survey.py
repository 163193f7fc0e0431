"""Compares any two checkpoints tensor by tensor, streamed, and says in words what kind of edit lies between them.

A tensor goes through the modules of this room in this order: ``pairing`` finds its partner, ``measuring`` compares
bytes and then values (read by ``stored``), ``kinds`` says what kind of edit that is, ``alignment`` how it fits given
directions, and ``verdict`` puts all tensors into words.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from ablate_shards.errors import ArchitectureError, DirectionsError
from ablate_shards.surgery.anatomy.architecture import Anatomy, dissect
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.diff.alignment import GivenDirections, mean_cosine
from ablate_shards.surgery.diff.differences import Diff, TensorDiff
from ablate_shards.surgery.diff.kinds import Explained
from ablate_shards.surgery.diff.measuring import Measuring
from ablate_shards.surgery.diff.pairing import pair_tensors
from ablate_shards.surgery.diff.places import Place, Places
from ablate_shards.surgery.diff.sidecars import compare_files, compare_metadata
from ablate_shards.surgery.diff.stored import StoredTensor, open_tensors
from ablate_shards.surgery.diff.verdict import describe
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.system import cores

__all__ = ["DiffOptions", "diff"]

_LEAST_MEMORY_PER_JOB = 64_000_000


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """How to compare.

    Attributes:
        memory: Bytes that all working buffers may take together.
        jobs: Tensors compared at a time, one per available core if None.
        rank: The largest rank that is recognised as low; a difference of a higher one counts as full rank.
    """

    memory: int = 256_000_000
    jobs: int | None = None
    rank: int = 32


def diff(
    first: Checkpoint,
    second: Checkpoint,
    options: DiffOptions,
    progress: Progress,
    directions: Directions | None = None,
) -> Diff:
    """Compares two checkpoints; neither is held in memory, and no model is built.

    Tensors are matched by name, then by shape and values. Equal bytes are found by comparing bytes; only what
    differs is decoded. Experts of a stack are measured one by one.

    Args:
        first: The checkpoint to start from.
        second: The checkpoint to compare with it.
        options: How to compare.
        progress: Receives how many bytes of each have been compared.
        directions: Directions that changes are compared with.

    Returns:
        The differences, tensors in the order of the first checkpoint.

    Raises:
        DirectionsError: The directions are not as long as the hidden size.
        ExecuteError: A shard was cut short meanwhile.
    """
    anatomy = _anatomy(first)
    if directions is not None and anatomy is not None and directions.hidden_size != anatomy.hidden_size:
        raise DirectionsError(
            f"the directions have {directions.hidden_size} entries, but the hidden size of {first.path} is "
            f"{anatomy.hidden_size}; give directions of this model"
        )
    places = Places(first.tensors, anatomy)
    given = GivenDirections(directions, first, anatomy) if directions is not None else None
    with ExitStack() as cleanup:
        pairing = pair_tensors(open_tensors(first, cleanup), open_tensors(second, cleanup))
        progress.begin(sum(old.size for old, _ in pairing.pairs))
        explained = _explain_all(pairing.pairs, places, options, progress, cleanup)
        compared = _compare_directions(explained, given)
        tensors = tuple(item for item in compared if item.kind != "equal" or item.name != item.new_name)
    found = Diff(
        first=str(first.path),
        second=str(second.path),
        family=anatomy.family if anatomy else None,
        equal=len(pairing.pairs) - len(tensors),
        tensors=tensors,
        lost=pairing.lost,
        added=pairing.added,
        fused=pairing.fused,
        metadata=tuple(compare_metadata(first, second)),
        files=tuple(compare_files(first, second)),
    )
    return replace(found, verdict=describe(found))


def _anatomy(checkpoint: Checkpoint) -> Anatomy | None:
    """Returns what writes to the residual stream, None of an architecture that is not known."""
    try:
        return dissect(checkpoint.tensors, checkpoint.config)
    except ArchitectureError:
        return None


def _blank(old: StoredTensor, new: StoredTensor, place: Place) -> TensorDiff:
    """Returns a tensor before anything of it is compared."""
    return TensorDiff(
        name=old.name,
        new_name=new.name,
        dtype=old.dtype,
        new_dtype=new.dtype,
        shape=old.shape,
        new_shape=new.shape,
        place=place.shown,
        layer=place.layer,
        component=place.component,
        writer=place.writer,
        kind="equal",
        elements=old.elements,
    )


def _explain_all(
    pairs: Sequence[tuple[StoredTensor, StoredTensor]],
    places: Places,
    options: DiffOptions,
    progress: Progress,
    cleanup: ExitStack,
) -> Iterator[Explained]:
    """Returns how every tensor differs, in order, from threads that ``cleanup`` ends."""
    jobs = max(1, min(options.jobs or cores(), options.memory // _LEAST_MEMORY_PER_JOB))
    measuring = Measuring(options.memory // jobs, options.rank, cleanup)

    def explain(pair: tuple[StoredTensor, StoredTensor]) -> Explained:
        old, new = pair
        try:
            return measuring.measure(_blank(old, new, places.of(old.name)), old, new)
        finally:
            progress.advance(old.size)

    pool = ThreadPoolExecutor(jobs)
    cleanup.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool.map(explain, pairs)


def _compare_directions(explained: Iterable[Explained], given: GivenDirections | None) -> Iterator[TensorDiff]:
    """Yields the tensors, their directions compared with that of the first ablated one and with given ones."""
    first: np.ndarray | None = None
    for each in explained:
        tensor = each.tensor
        if tensor.ablation is not None:
            first = each.bases[0] if first is None else first
            cosine = mean_cosine(each.bases[0], first)
            tensor = replace(tensor, ablation=replace(tensor.ablation, same_direction=cosine))
        if given is not None:
            tensor = replace(tensor, alignment=given.align(tensor, each.bases))
        yield tensor
