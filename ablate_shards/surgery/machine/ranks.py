"""Which of several processes this one is, by its options or by what launched it, and what is dealt out to each."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ablate_shards.errors import UsageError

__all__ = ["INDEXED_JOB", "MOST_RANKS", "WorkerRank", "deal", "find_rank"]

_K = TypeVar("_K", str, int)

#: More would each have less than a shard of any checkpoint to do.
MOST_RANKS = 1 << 16
#: The variables of launchers: the number of this process, and of how many. What starts processes last comes first.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("JOB_COMPLETION_INDEX", "WORLD_SIZE"),
)
_ARRAY = "SLURM_ARRAY_TASK_ID"
#: Kubernetes says the number of a pod, and not of how many.
INDEXED_JOB = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True, slots=True)
class WorkerRank:
    """One of several processes that share a job.

    Attributes:
        index: Its number, from 0.
        count: How many there are, at least two.
        said_by: What says so.
    """

    index: int
    count: int
    said_by: str = field(default="--worker-rank and --world-size", compare=False)

    @property
    def folder(self) -> str:
        """The name of the folder of its part, among those of other ranks."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"rank {self.index} of {self.count}"


def find_rank(index: int | None, count: int | None, environment: Mapping[str, str]) -> WorkerRank | None:
    """Returns which of several processes this one is, None where it is the only one.

    Options win over variables. Of variables, both of a launcher count, or its number alone where the option says of how
    many; the first launcher in the order of torchrun, SLURM's arrays, SLURM's tasks, SkyPilot and Kubernetes decides.

    Args:
        index: What ``--worker-rank`` says.
        count: What ``--world-size`` says.
        environment: The environment's variables.

    Raises:
        UsageError: One is given without the other, or the number is not below the count.
    """
    if index is not None:
        count = count or next((_whole(environment, size) for _, size in _LAUNCHERS if size in environment), None)
        if count is None:
            raise UsageError(f"--worker-rank {index} is one of how many? add --world-size N")
        return _checked(WorkerRank(index, count))
    if count == 1:
        return None
    for name, size in _LAUNCHERS:
        if name not in environment or (size not in environment and name != INDEXED_JOB):
            continue
        said = _whole(environment, size, count or 1)
        if said == (count or said) and said > 1:
            return _checked(WorkerRank(_position(environment, name), said, f"{name} and {size}"))
    if count is not None:
        raise UsageError(
            f"--world-size {count}: which of them is this one? add --worker-rank I, from 0 to {count - 1}; no variable "
            f"of a launcher of {count} says so ({', '.join(name for name, _ in _LAUNCHERS)})"
        )
    return None


def deal(work: Mapping[_K, int], count: int) -> tuple[frozenset[_K], ...]:
    """Deals pieces of work out to ranks, the largest first, each to the one with least; always in the same way.

    Args:
        work: How much each piece is.
        count: How many ranks there are.

    Returns:
        The pieces of each rank, none where there are too few.
    """
    dealt: list[set[_K]] = [set() for _ in range(count)]
    loads = [(0, rank) for rank in range(count)]
    for name in sorted(work, key=lambda name: (-work[name], name)):
        load, rank = loads[0]
        dealt[rank].add(name)
        heapq.heapreplace(loads, (load + work[name], rank))
    return tuple(map(frozenset, dealt))


def _checked(rank: WorkerRank) -> WorkerRank | None:
    if not 0 <= rank.index < rank.count:
        raise UsageError(
            f"{rank.said_by}: expected a rank from 0 to {rank.count - 1}, found {rank.index}; give both --worker-rank "
            "and --world-size"
        )
    if rank.count > MOST_RANKS:
        raise UsageError(f"{rank.said_by}: expected at most {MOST_RANKS} ranks, found {rank.count}")
    return rank if rank.count > 1 else None


def _position(environment: Mapping[str, str], name: str) -> int:
    """Returns the number that a launcher's variable says; an array may begin anywhere and go in steps."""
    found = _whole(environment, name)
    if name != _ARRAY:
        return found
    first = _whole(environment, "SLURM_ARRAY_TASK_MIN", 0)
    return (found - first) // (_whole(environment, "SLURM_ARRAY_TASK_STEP", 1) or 1)


def _whole(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(
            f"{name}={text}: expected a whole number; unset it, or give both --worker-rank and --world-size"
        ) from error
