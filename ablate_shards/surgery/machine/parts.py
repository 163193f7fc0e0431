"""What a rank did of a job that several share, and whether what all of them did fits together."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.machine.ranks import MOST_RANKS, WorkerRank
from ablate_shards.surgery.machine.staging import beside

__all__ = [
    "PARTS",
    "Part",
    "differing",
    "fitting",
    "is_complete",
    "is_part",
    "remove_joined",
    "removed_rest",
    "unfitting",
    "without_rank",
]

#: What the hidden folder of all parts is for, in its name beside the output.
PARTS = "ranks"
#: The same for parts that have been joined, while they are removed.
_JOINED = "joined"

_RANK_OPTIONS = ("--worker-rank", "--world-size")


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank did.

    Attributes:
        place: Where it is, as messages call it.
        rank: Its number.
        count: How many ranks there are.
        identity: What must be equal for the parts of all ranks to make one output, by the names that errors use.
        command: The words of the command that made it, without what says which rank it is.
    """

    place: str
    rank: int
    count: Annotated[int, msgspec.Meta(ge=2, le=MOST_RANKS, description="a number of ranks")]
    identity: Mapping[str, str]
    command: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The name of its folder, among those of other ranks."""
        return WorkerRank(self.rank, self.count).folder

    def unlike(self, identity: Mapping[str, str], count: int) -> list[str]:
        """Returns what is not as another rank has it."""
        number = ["the number of ranks"] if self.count != count else []
        return number + differing(self.identity, identity)


_P = TypeVar("_P", bound=Part)


def is_part(folder: str) -> bool:
    """Returns whether a folder has a name of those that ranks make."""
    return re.fullmatch(r"\d+-of-\d+", folder) is not None


def is_complete(
    rank: WorkerRank, identity: Mapping[str, str], parts: Iterable[Part], *, remove: Callable[[Part], None] | None
) -> bool:
    """Returns whether a rank is complete, and refuses or removes what ranks did of another job.

    Args:
        rank: The rank.
        identity: What all ranks must agree on.
        parts: Those of ranks that are complete.
        remove: Removes a part; None to refuse it.

    Raises:
        ExecuteError: A part is of another job.
    """
    complete = False
    for part in parts:
        if not (wrong := part.unlike(identity, rank.count)):
            complete = complete or part.rank == rank.index
        elif remove is not None:
            remove(part)
        else:
            raise ExecuteError(
                f"{part.place}: rank {part.rank} of {part.count} is of another run, which differs in "
                f"{' and '.join(wrong)}; run all ranks with the same source, options and number, or add --overwrite to "
                "throw such parts away"
            )
    return complete


def fitting(out: object, place: object, parts: Iterable[_P]) -> list[_P]:
    """Returns the parts of all ranks in their order.

    Args:
        out: The output, as messages call it.
        place: Where the parts are.
        parts: Those that are complete.

    Raises:
        ExecuteError: A rank is missing, or two do not fit together.
    """
    found = sorted(parts, key=lambda part: (part.count, part.rank))
    if not found:
        raise ExecuteError(
            f"{out}: no rank is complete in {place}; run each with --worker-rank I --world-size N and this OUT first, "
            "unless it was finished before"
        )
    first = found[0]
    for part in found:
        if wrong := part.unlike(first.identity, first.count):
            raise unfitting(out, first, part, wrong)
    if missing := sorted({*range(first.count)} - {part.rank for part in found}):
        several = len(missing) > 1
        command = f"ablate-shards {shlex.join(first.command)} --worker-rank {missing[0]} --world-size {first.count}"
        raise ExecuteError(
            f"{out}: {'ranks' if several else 'rank'} {', '.join(map(str, missing))} of {first.count} "
            f"{'are' if several else 'is'} not complete; run `{command}`"
            f"{' and the same for the others' if several else ''}, then finish again"
        )
    return found


def unfitting(out: object, first: Part, part: Part, wrong: Sequence[str]) -> ExecuteError:
    """Returns the error of two parts that do not fit together."""
    return ExecuteError(
        f"{out}: rank {part.rank} of {part.count} does not fit rank {first.rank} of {first.count}: they differ in "
        f"{' and '.join(wrong)}; run all ranks with the same source, options and number, and add --overwrite to those "
        "that are to be made again"
    )


def remove_joined(out: Path) -> None:
    """Removes the parts of an output that is complete.

    They get another name first, so that what an interruption leaves is not taken for ranks of which some are missing.
    """
    place, rest = beside(out, PARTS), beside(out, _JOINED)
    shutil.rmtree(rest, ignore_errors=True)
    if place.is_dir():
        place.replace(rest)
        shutil.rmtree(rest, ignore_errors=True)


def removed_rest(out: Path) -> bool:
    """Removes what an interrupted :func:`remove_joined` left; returns whether nothing else was to be done."""
    rest = beside(out, _JOINED)
    if not (rest.is_dir() and out.exists()) or beside(out, PARTS).is_dir():
        return False
    shutil.rmtree(rest, ignore_errors=True)
    return True


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Returns the keys whose values differ."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def without_rank(command: Sequence[str]) -> tuple[str, ...]:
    """Returns the words of a command without the options that say which rank it is."""
    words, skip = [], False
    for word in command:
        if skip:
            skip = False
        elif word in _RANK_OPTIONS:
            skip = True
        elif word.partition("=")[0] not in _RANK_OPTIONS:
            words.append(word)
    return tuple(words)
