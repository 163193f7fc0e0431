"""Edits one tensor at a time, in blocks that fit a memory budget, and measures what was written."""

import contextlib
import functools
import gc
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from blake3 import blake3

from ablate_shards.surgery.edit.loops import Each, SharedLoops, in_order
from ablate_shards.surgery.edit.sections import Section
from ablate_shards.surgery.machine.devices import find_device
from ablate_shards.surgery.machine.system import cores
from ablate_shards.surgery.plan.edits import Edit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Workspace
    from ablate_shards.kernels.choose import Form, OnCpu
    from ablate_shards.kernels.form import Turn

__all__ = ["BlockEditor", "Channels", "Portion", "Stopped"]

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R")

_MAY_LACK_FLOAT64 = ("mps", "xpu")
_WITHOUT_TORCH = ("native", "numpy")
_CPU_BLOCK = 1 << 20
#: Bytes of a tensor that one thread edits before another may continue, and bytes read again at a time for its digest.
_PORTION, _REREAD = 32 << 20, 1 << 20
#: Bytes of a matrix that one thread edits, and of one of codes, which take longer.
_UNDIVIDED, _UNDIVIDED_CODES = 32 << 20, 4 << 20
_LEAST_MEMORY_PER_JOB = 8 << 20
_SCRATCH = 6 << 20
_ROOM_FOR_TWO_CHUNKS = 16 << 20
_DEVICE_JOBS = 2


class Stopped(Exception):  # noqa: N818 - not an error: it ends a worker whose run has ended elsewhere
    """Ends a worker whose run has failed or been interrupted elsewhere."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Where an editor's bytes come from and go to; offsets are those of the shard.

    Attributes:
        read: Fills a buffer from the source.
        write: Takes the edited bytes.
        reread: Fills a buffer from what was written.
    """

    read: Callable[[memoryview, int], None]
    write: Callable[[memoryview, int], None]
    reread: Callable[[memoryview, int], None]


class BlockEditor(ABC, Generic[_E, _R]):
    """Edits tensors on one device, in blocks that fit a memory budget; a subclass knows the arithmetic.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes for all buffers of all jobs together.
        jobs: Tensors, or parts of large ones, edited at a time, one per available core if None.
        stop: Set when the run should end early.

    Attributes:
        on_cpu: The form that the arithmetic has on a CPU.
        needs_float64: Whether devices that may lack float64 leave the arithmetic to the CPU.
        jobs: Tensors to edit at a time, fewer than asked for where memory is short.
        reason: One line that says what does the arithmetic, and why.

    Raises:
        UsageError: There is no such device.
    """

    on_cpu: ClassVar["OnCpu"] = "torch"
    needs_float64: ClassVar[bool] = False

    def __init__(self, device: str, memory: int, jobs: int | None, stop: threading.Event) -> None:
        from ablate_shards.kernels.choose import choose_form

        found = find_device(device)
        kind = found.partition(":")[0]
        self._device = "cpu" if self.needs_float64 and kind in _MAY_LACK_FLOAT64 else found
        self._form: Form
        self._form, why = choose_form(self._device, on_cpu=self.on_cpu)
        if self._device != found:
            why = f"it needs float64, which not every {kind} has"
        if self._form not in _WITHOUT_TORCH:
            with _no_collections():
                import torch  # noqa: F401 - before there are threads, which would wait for it
        self.reason = f"arithmetic: {self._form} on {self._device} ({why})"
        on_cpu = self._device == "cpu"
        wanted = jobs or (cores() if on_cpu else _DEVICE_JOBS)
        self.jobs = max(1, min(wanted, memory // _LEAST_MEMORY_PER_JOB))
        room = max(memory // self.jobs - _SCRATCH, 1 << 20)
        self._chunks_at_once = 2 if room >= _ROOM_FOR_TWO_CHUNKS else 1
        # On a CPU larger blocks gain nothing, nor does a whole tensor: they leave the cache, and reading a block again
        # takes no longer than fetching it from memory. A device holds a block of its own.
        self._room = min(room, _CPU_BLOCK) if on_cpu else room // 2
        self._stop = stop
        self._kept = threading.local()
        #: Goes over the blocks of a large matrix.
        self._each: Each = in_order

    def identity(self) -> dict[str, str]:
        """Returns what decides the last bit of a result, for the receipt and for resuming."""
        identity = {"device": self._device.partition(":")[0], "form": self._form}
        if self._form in _WITHOUT_TORCH:
            return identity
        import torch

        return identity | {"version of torch": torch.__version__.split("+")[0]}

    def share(self, submit: Callable[[Callable[[], None]], object]) -> None:
        """Divides a large matrix among the threads that have nothing else to do.

        Args:
            submit: Gives a task to a pool of :attr:`jobs` threads. Channels are then used by several threads at once.
        """
        if self.jobs > 1:
            self._each = SharedLoops(self.jobs, submit).each

    def one_thread_each(self) -> contextlib.AbstractContextManager[None]:
        """Keeps torch to one thread per job: no oversubscription, and sums in one order; other forms have one."""
        if self._form in _WITHOUT_TORCH:
            return contextlib.nullcontext()
        from ablate_shards.kernels.choose import one_thread

        return one_thread("torch")

    def edit(self, edit: _E, channels: Channels) -> _R:
        """Edits one tensor and measures it again from what was written, block by block.

        Args:
            edit: What to do.
            channels: Where the bytes come from and go to.

        Returns:
            What was measured.

        Raises:
            AblateError: The tensor cannot be edited.
        """
        digest = blake3()
        measured = self._edit(deque(self.sections(edit)), channels, digest)
        return self.result(edit, measured, digest.hexdigest())

    def portions(self, edit: _E, channels: Channels) -> "list[Portion[_R]]":
        """Returns what :meth:`edit` does, cut into portions that several threads may do at once, in any order.

        Args:
            edit: What to do.
            channels: Where the bytes come from and go to; called from several threads.

        Returns:
            The portions in the order of their bytes. The last to end returns what was measured.
        """
        whole = Portion(edit.start, edit.end, functools.partial(self.edit, edit, channels))
        # If one thread does all of it, nothing has to be read again for the digest.
        if self.jobs == 1 or edit.end - edit.start <= _PORTION:
            return [whole]
        groups: list[deque[Section]] = [deque()]
        for section in self.sections(edit):
            if groups[-1] and groups[-1][-1].end - groups[-1][0].start >= _PORTION:
                groups.append(deque())
            groups[-1].append(section)
        if len(groups) == 1:
            return [whole]
        ranges = [(group[0].start, group[-1].end) for group in groups]

        def reread(number: int, digest: blake3) -> None:
            start, end = ranges[number]
            for offset in range(start, end, _REREAD):
                raw = self._raw(min(_REREAD, end - offset))
                channels.reread(raw.data, offset)
                digest.update(raw.data)

        portions = _Portions(len(groups), reread)

        def do(number: int) -> _R | None:
            found = portions.complete(number, self._edit(groups[number], channels, None))
            return None if found is None else self.result(edit, *found)

        return [Portion(start, end, functools.partial(do, number)) for number, (start, end) in enumerate(ranges)]

    def _edit(self, sections: deque[Section], channels: Channels, digest: blake3 | None) -> list[Any]:
        """Edits sections and returns what each measured; drops each when done, which frees its memory."""

        def read(offset: int, count: int) -> np.ndarray:
            raw = self._raw(count)
            channels.read(raw.data, offset)
            return raw

        def reread(offset: int, count: int, digest: blake3) -> None:
            raw = self._raw(count)
            channels.reread(raw.data, offset)
            digest.update(raw.data)

        def take(section: Section, offset: int, turn: "Turn | None") -> None:
            raw = read(offset, min(section.block, section.end - offset))
            section.edit(raw, offset)
            channels.write(raw.data, offset)
            # Read again at once, while a core's cache still holds it.
            channels.reread(raw.data, offset)
            section.measure(raw, offset, turn)
            if digest is None:
                return
            if turn is None or turn.has_come():
                digest.update(raw.data)
            else:
                turn.do(functools.partial(reread, offset, len(raw), digest))

        measured = []
        with self._stream():
            while sections:
                section = sections.popleft()
                section.gather(read)
                section.each(range(section.start, section.end, section.block), functools.partial(take, section))
                measured.append(section.measured())
        return measured

    def _each_of(self, size: int, *, codes: bool = False) -> Each:
        """Returns what goes over the blocks of a matrix of so many bytes: several threads if it is large."""
        return self._each if size > (_UNDIVIDED_CODES if codes else _UNDIVIDED) else in_order

    def _raw(self, count: int) -> np.ndarray:
        """Returns memory of this thread, which the next call overwrites.

        Raises:
            Stopped: The run has ended elsewhere.
        """
        if self._stop.is_set():
            raise Stopped
        return self._workspace().raw(count)

    @abstractmethod
    def sections(self, edit: _E) -> Sequence[Section]:
        """Returns the sections that a tensor is edited in, in the order of their bytes; nothing has been read."""

    @abstractmethod
    def result(self, edit: _E, measured: Sequence[Any], digest: str) -> _R:
        """Returns what was measured of a tensor, from its sections and the digest of what was written."""

    def _workspace(self) -> "Workspace":
        """Returns this thread's scratch memory, which is kept so that memory is not fragmented."""
        from ablate_shards.kernels.ablate.project import Workspace

        if not hasattr(self._kept, "workspace"):
            self._kept.workspace = Workspace(self._device, self._form, chunks_at_once=self._chunks_at_once)
        kept: Workspace = self._kept.workspace
        return kept

    def _form_on_cpu(self) -> "Form":
        from ablate_shards.kernels.choose import choose_form

        return choose_form("cpu", on_cpu=self.on_cpu)[0]

    def _workspace_on_cpu(self) -> "Workspace":
        """Returns this thread's scratch memory for what is computed on the CPU whatever the device."""
        from ablate_shards.kernels.ablate.project import Workspace

        if self._device == "cpu":
            return self._workspace()
        if not hasattr(self._kept, "on_cpu"):
            self._kept.on_cpu = Workspace("cpu", self._form_on_cpu(), chunks_at_once=1)
        kept: Workspace = self._kept.on_cpu
        return kept

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        """Gives each job a stream of its own, so that one computes while another reads or writes."""
        if self._device.partition(":")[0] not in ("cuda", "xpu"):
            return contextlib.nullcontext()
        import torch

        return torch.Stream(self._device)


@dataclass(frozen=True, slots=True)
class Portion(Generic[_R]):
    """A portion of a tensor that a thread edits by itself: one section or several.

    Attributes:
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        do: Edits it, and returns what was measured of the tensor if all of it is done.
    """

    start: int
    end: int
    do: Callable[[], _R | None]


class _Portions:
    """Collects what several threads measure of a tensor's portions, and takes the digest in the order of the bytes.

    The thread that completes a portion continues the digest over all that are complete by then.

    Args:
        count: How many there are.
        reread: Feeds the digest with a portion, by its number.
    """

    def __init__(self, count: int, reread: Callable[[int, blake3], None]) -> None:
        self._measured: list[list[Any] | None] = [None] * count
        self._reread, self._digest, self._digested = reread, blake3(), 0
        self._digesting = threading.Lock()

    def complete(self, number: int, measured: list[Any]) -> tuple[list[Any], str] | None:
        """Takes what was measured of a portion.

        Returns:
            All that was measured and the digest, if every portion is complete and this call was the one to see it.
        """
        self._measured[number] = measured
        while self._is_next_complete() and self._digesting.acquire(blocking=False):
            try:
                while self._is_next_complete():
                    self._reread(self._digested, self._digest)
                    self._digested += 1
                    if self._digested == len(self._measured):
                        return [one for measured in self._measured for one in measured or ()], self._digest.hexdigest()
            finally:
                self._digesting.release()
        return None

    def _is_next_complete(self) -> bool:
        number = self._digested  # which another thread may count up at any time
        return number < len(self._measured) and self._measured[number] is not None


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Turns garbage collection off during an import: it would find nothing and take a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
