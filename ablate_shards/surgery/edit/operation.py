"""What is done to a checkpoint, how to run it, and how a run ends that does not come to its end."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, HubError, Interrupted
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, fingerprint
from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.machine.ranks import WorkerRank
from ablate_shards.surgery.machine.staging import Staging
from ablate_shards.surgery.plan.edits import Edit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Operation", "RunOptions", "as_it_is", "check_unchanged", "ending_early", "what_is_kept"]

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run, none of which changes a byte of the output on one device.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes that all working buffers may take together.
        jobs: Tensors, or parts of large ones, edited at a time, one per available core if None.
        resume: Go on with an interrupted run.
        overwrite: Replace a folder that an earlier run made.
        link: Make shards without an edit hard links to the source's, which share their bytes for good.
        sync: End only when everything is on the disk; otherwise as ``cp`` does, and a power failure may lose OUT.
        rank: Which of several processes that share the work this one is, None where it is the only one.
        command: The words of the command line, for those who have to run another rank.
    """

    device: str = "auto"
    memory: int = 256_000_000
    jobs: int | None = None
    resume: bool = False
    overwrite: bool = False
    link: bool = False
    sync: bool = True
    rank: WorkerRank | None = None
    command: tuple[str, ...] = ()


def as_it_is(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint that nothing is amended of."""
    return checkpoint


@dataclass(frozen=True, slots=True)
class Operation(Generic[_E, _R]):
    """What is done to a checkpoint, whatever it is: the edits, who carries them out, and the receipt.

    Attributes:
        edits: The tensors to edit.
        identity: What must be equal for an interrupted run to be resumed: values by the names that errors use.
        editor: Makes the editor of a run that ends early when the event is set.
        result: Makes a result of the fields that the journal kept of it.
        receipt_name: The file in OUT that says what was done.
        receipt: Returns its text, from the source, the results and what did the arithmetic.
        amend: Returns the source as it is before the edits; they are of what this holds.
    """

    edits: tuple[_E, ...]
    identity: Mapping[str, str]
    editor: Callable[[RunOptions, threading.Event], BlockEditor[_E, _R]]
    result: Callable[..., _R]
    receipt_name: str
    receipt: Callable[[Checkpoint, Mapping[str, _R], Mapping[str, str]], str]
    amend: Callable[[Checkpoint], Checkpoint] = as_it_is

    def identity_on(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Returns all that must be equal for an interrupted run on a checkpoint to be resumed."""
        return {
            **self.identity,
            "the source": checkpoint.fingerprint,
            "the version of ablate-shards": __version__,
        }


@contextlib.contextmanager
def ending_early(out: object, kept: Callable[[], str], discard: Callable[[], None]) -> Iterator[None]:
    """Adds what is kept to the error of a run that can be resumed; after any other error, discards what was written."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(f"{out}: interrupted; {kept()}") from error
    except HubError as error:
        raise HubError(f"{error}; {kept()}") from error
    except OSError as error:
        raise ExecuteError(f"{error.filename or out}: {error.strerror or error}; {kept()}") from error
    except Exception:
        discard()
        raise


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Compares a source that has been read with what it was before.

    Raises:
        ExecuteError: It has changed.
    """
    if fingerprint(checkpoint) != checkpoint.fingerprint:
        raise ExecuteError(f"{checkpoint.name}: changed while it was read; run again when nothing writes to it")


def what_is_kept(staging: Staging | None) -> str:
    """Returns the end of an error's sentence: what an interrupted run leaves, and how to go on."""
    if staging is None:
        return "nothing was written"
    return f"what is complete is kept in {staging.folder}, and the same command with --resume goes on"
