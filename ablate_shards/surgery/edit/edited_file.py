"""An edited shard that is read like a file but is stored nowhere: its bytes are computed when they are read.

An edit is deterministic, so the shard can be read as often as a protocol needs it: once to find its digest and to
measure the edit, then once more to send it. Each of these passes reads each byte of the source once. Only in the first
pass, a matrix that is larger than the window is read as often as its arithmetic needs it.
"""

import bisect
import hashlib
import io
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from blake3 import blake3

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import Shard
from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.edit.sections import Section
from ablate_shards.surgery.machine.files import pread_into
from ablate_shards.surgery.machine.system import open_file
from ablate_shards.surgery.plan.edits import Edit, untouched

if TYPE_CHECKING:
    from _typeshed import DataclassInstance, WriteableBuffer

    from ablate_shards.kernels.form import Turn

__all__ = ["EditedFile", "Survey"]

_E = TypeVar("_E", bound=Edit)
_R = TypeVar("_R", bound="DataclassInstance")

#: Bytes that are read at a time, and edited where no section begins among them.
_CHUNK = 4 << 20
#: Sections whose sums stay for the passes after the first: they are a thousandth of the weights that they are of.
_MOST_KEPT = 128


@dataclass(frozen=True, slots=True)
class Survey(Generic[_R]):
    """What the first pass over an edited shard finds.

    Attributes:
        sha256: Digest of all its bytes.
        results: What was measured of each edited tensor, from these bytes.
    """

    sha256: str
    results: Mapping[str, _R]


class _Stretch(NamedTuple):
    """A byte range of a shard: bytes that stay as they are, or one section of an edit.

    Attributes:
        start: Offset of its first byte.
        end: Offset one past its last byte.
        edit: The edit, None for bytes that stay as they are.
        section: The number of the section.
        gathers: Whether all of it has to be read before its first block can be edited.
    """

    start: int
    end: int
    edit: Any = None
    section: int = 0
    gathers: bool = False


class EditedFile(io.BufferedIOBase, Generic[_E, _R]):
    """A seekable file of a shard's bytes, edited; for one thread at a time, which its editor may help with others.

    Args:
        checkpoint: The source.
        shard: The shard.
        edits: Its edits, in the order of their bytes.
        editor: Carries them out.
        window: Most bytes of a section that are kept in memory, so that they are not read from the source twice.
        advance: Called with how many more bytes have been read here for the first time, in each pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: Shard,
        edits: Sequence[_E],
        editor: BlockEditor[_E, _R],
        *,
        window: int,
        advance: Callable[[int], None],
    ) -> None:
        self._shard, self._editor = shard, editor
        self._window, self._advance = window, advance
        self._remote = checkpoint.fetched(shard.name)
        self._source = _Source(checkpoint, shard)
        self._stretches = sorted(_stretches(shard, edits, editor), key=lambda stretch: (stretch.start, stretch.end))
        # A section that is gathered and does not fit is read more than once: requests for what is before it end there.
        self._borders = [stretch.start for stretch in self._stretches if stretch.gathers and not self._fits(stretch)]
        self._ends = [stretch.end for stretch in self._stretches]
        self._room = np.empty(0, np.uint8)
        self._data, self._at, self._position = memoryview(b""), 0, 0
        self._under_way: tuple[Any, list[Section | None]] = (None, [])
        self._current: tuple[int, Section | None] = (-1, None)
        self._kept: dict[int, Section] = {}
        self._sent, self._sent_to = hashlib.sha256(), 0

    def survey(self) -> Survey[_R]:
        """Reads all of it, finds its digest and measures its edits.

        Raises:
            ExecuteError: A tensor cannot be edited.
            HubError: The source cannot be read, or its digest is not the one that its store states.
        """
        survey, wrong = self._survey()
        if wrong is not None and self._remote is not None:
            self._kept.clear()
            self._advance(-self._shard.size)
            survey, wrong = self._survey()
            if wrong is not None:
                raise self._remote.altered(self._shard.name, wrong)
        return survey

    @property
    def sample(self) -> bytes:
        """Its first bytes; a store decides by them whether a file is text."""
        first = bytearray(min(512, self._shard.size))
        self._source.fill(memoryview(first), 0, len(first))
        return bytes(first)

    @property
    def digest(self) -> str | None:
        """Digest of all its bytes, each counted once; None until the last has been read."""
        return self._sent.hexdigest() if self._sent_to == self._shard.size else None

    # What follows is a file's.

    def readable(self) -> bool:
        """Returns that it can be read."""
        return True

    def seekable(self) -> bool:
        """Returns that any byte can be read next."""
        return True

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Sets the offset of the next byte; nothing is read."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shard.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"{self._shard.name}: there is no offset {origin + offset}")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns the next bytes; fewer only at the end."""
        left = max(0, self._shard.size - self._position)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fills a buffer with the next bytes and returns how many; fewer only at the end."""
        wanted = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(wanted) and self._position < self._shard.size:
            if not 0 <= self._position - self._at < len(self._data):
                self._at, self._data = self._load(self._position)
            data = self._data[self._position - self._at :][: len(wanted) - filled]
            wanted[filled : filled + len(data)] = data
            self._note(data)
            self._position += len(data)
            filled += len(data)
        return filled

    def close(self) -> None:
        """Closes the source."""
        if not self.closed and hasattr(self, "_source"):
            self._source.close()
        super().close()

    def _note(self, data: memoryview) -> None:
        """Adds bytes that are returned to the digest, unless they were returned before."""
        if self._position == 0 and self._sent_to > 0:
            self._advance(-self._sent_to)
            self._sent, self._sent_to = hashlib.sha256(), 0
        if self._position <= self._sent_to:
            new = data[self._sent_to - self._position :]
            self._sent.update(new)
            self._sent_to += len(new)
            self._advance(len(new))

    def _load(self, position: int) -> tuple[int, memoryview]:
        """Returns edited bytes around an offset, and where they start."""
        stretch = self._stretches[bisect.bisect_right(self._ends, position)]
        if stretch.edit is None:
            return position, self._fill(position, min(position + _CHUNK, stretch.end)).data
        section = self._gathered(stretch)
        if section is None:
            return stretch.start, self._whole(stretch, self._section(stretch)).data
        start = position - (position - stretch.start) % section.block
        raw = self._fill(start, min(start + _together(section), stretch.end))
        _edit(section, raw, start)
        return start, raw.data

    def _gathered(self, stretch: _Stretch) -> Section | None:
        """Returns a section whose blocks can be edited one by one, None for one that is better read whole."""
        known = self._kept.get(stretch.start) or (self._current[1] if self._current[0] == stretch.start else None)
        if known is None and not (stretch.gathers and self._fits(stretch)):
            known = self._section(stretch)
            self._gather(stretch, known)
            self._current = (stretch.start, known)
        return known

    def _gather(self, stretch: _Stretch, section: Section) -> None:
        section.gather(_Forward(lambda data, offset: self._source.fill(data, offset, stretch.end), stretch.start))
        self._keep(stretch, section)

    def _whole(self, stretch: _Stretch, section: Section, digest: "hashlib._Hash | None" = None) -> np.ndarray:
        """Returns the edited bytes of a section that fits into the window."""
        raw = self._fill(stretch.start, stretch.end)
        if digest is not None:
            digest.update(raw.data)

        section.gather(lambda offset, count: raw[offset - stretch.start :][:count])
        self._keep(stretch, section)
        _edit(section, raw, stretch.start)
        return raw

    def _keep(self, stretch: _Stretch, section: Section) -> None:
        if (
            section.gathers
            and section.light
            and section.block < stretch.end - stretch.start
            and len(self._kept) < _MOST_KEPT
        ):
            self._kept[stretch.start] = section

    def _section(self, stretch: _Stretch) -> Section:
        """Returns a stretch's section; a tensor's sections are made together, each dropped when returned."""
        edit, sections = self._under_way
        if edit is not stretch.edit or sections[stretch.section] is None:
            sections = list(self._editor.sections(stretch.edit))
            self._under_way = (stretch.edit, sections)
        section, sections[stretch.section] = sections[stretch.section], None
        if section is None:
            raise RuntimeError(f"{stretch.edit.name}: has no section {stretch.section}")
        return section

    def _fits(self, stretch: _Stretch) -> bool:
        return stretch.end - stretch.start <= self._window

    def _fill(self, start: int, end: int, until: int | None = None) -> np.ndarray:
        """Returns bytes of the source, in memory that the next call overwrites.

        Args:
            start: Offset of the first.
            end: Offset one past the last.
            until: Where a request that has to be made for them ends; where they are next read twice, if None.
        """
        if len(self._room) < end - start:
            self._room = np.empty(end - start, np.uint8)
        raw = self._room[: end - start]
        self._data = memoryview(b"")
        border = bisect.bisect_right(self._borders, start)
        if until is None:
            until = self._borders[border] if border < len(self._borders) else self._shard.size
        self._source.fill(raw.data, start, max(end, until))
        return raw

    def _survey(self) -> tuple[Survey[_R], str | None]:
        """Reads all of it once; also returns the source's digest if it is not the one that its store states."""
        whole = hashlib.sha256()
        source, expected = hashlib.sha256(), None
        if self._remote is not None:
            source, expected = self._remote.digest(self._shard.name)
        results: dict[str, _R] = {}
        measured: list[Any] = []
        tensor = blake3()
        for number, stretch in enumerate(self._stretches):
            if stretch.edit is None:
                for start in range(stretch.start, stretch.end, _CHUNK):
                    raw = self._fill(start, min(start + _CHUNK, stretch.end))
                    source.update(raw.data)
                    whole.update(raw.data)
                    self._advance(len(raw))
                continue
            section = self._section(stretch)
            for start, raw in self._blocks(stretch, section, source):
                whole.update(raw.data)
                tensor.update(raw.data)
                section.measure(raw, start)
                self._advance(len(raw))
            measured.append(section.measured())
            if number + 1 == len(self._stretches) or self._stretches[number + 1].edit is not stretch.edit:
                results[stretch.edit.name] = self._editor.result(stretch.edit, measured, tensor.hexdigest())
                measured, tensor = [], blake3()
        wrong = source.hexdigest() if expected not in (None, source.hexdigest()) else None
        return Survey(whole.hexdigest(), results), wrong

    def _blocks(self, stretch: _Stretch, section: Section, source: "hashlib._Hash") -> Iterator[tuple[int, np.ndarray]]:
        """Yields the edited blocks of a section, and adds their bytes before the edit to the digest of the source."""
        if stretch.gathers and self._fits(stretch):
            whole = self._whole(stretch, section, source)
            for offset in range(0, len(whole), section.block):
                yield stretch.start + offset, whole[offset : offset + section.block]
            return
        self._gather(stretch, section)
        for start in range(stretch.start, stretch.end, _together(section)):
            raw = self._fill(start, min(start + _together(section), stretch.end))
            source.update(raw.data)
            _edit(section, raw, start)
            for offset in range(0, len(raw), section.block):
                yield start + offset, raw[offset : offset + section.block]


def _together(section: Section) -> int:
    """Returns how many bytes of a section are edited together: whole blocks."""
    return max(section.block, _CHUNK // section.block * section.block)


def _edit(section: Section, raw: np.ndarray, start: int) -> None:
    """Edits some blocks of a section in place, ``[bytes]`` uint8 as read from an offset of the shard."""

    def edit(offset: int, turn: "Turn | None") -> None:
        section.edit(raw[offset - start :][: section.block], offset)

    section.each(range(start, start + len(raw), section.block), edit)


class _Forward:
    """Reads a range of the source in order for several threads, which ask for its parts nearly in order.

    Where they go over it again, it is read again from its start.

    Args:
        fill: Fills a buffer from an offset.
        start: Where the range starts.
    """

    def __init__(self, fill: Callable[[memoryview, int], None], start: int) -> None:
        self._fill, self._start, self._next = fill, start, start
        #: What was read before what another thread asked for first, and how much of it nobody has asked for yet.
        self._passed: list[tuple[int, np.ndarray]] = []
        self._reading = threading.Lock()

    def __call__(self, offset: int, count: int) -> np.ndarray:
        """Returns the bytes of a part, ``[count]`` uint8; each is asked for once."""
        with self._reading:
            for place, (start, raw) in enumerate(self._passed):
                if start <= offset < start + len(raw):
                    low, high = offset - start, offset - start + count
                    self._passed[place : place + 1] = [
                        (first, left) for first, left in ((start, raw[:low]), (start + high, raw[high:])) if len(left)
                    ]
                    return raw[low:high]
            if offset < self._next:
                self._next, self._passed = self._start, []
            if offset > self._next:
                self._passed.append((self._next, self._read(offset - self._next)))
            return self._read(count)

    def _read(self, count: int) -> np.ndarray:
        raw = np.empty(count, np.uint8)
        self._fill(raw.data, self._next)
        self._next += count
        return raw


def _stretches(shard: Shard, edits: Sequence[_E], editor: BlockEditor[_E, Any]) -> Iterator[_Stretch]:
    for start, end in untouched(shard, edits):
        yield _Stretch(start, end)
    for edit in edits:
        for number, section in enumerate(editor.sections(edit)):
            yield _Stretch(section.start, section.end, edit, number, section.gathers)


class _Source:
    """Reads a shard of the source; what is asked for in order comes through one request."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard) -> None:
        self._file, self._remote = shard.name, checkpoint.fetched(shard.name)
        self._descriptor = open_file(shard.path) if self._remote is None else -1
        self._chunks: Iterator[bytes] = iter(())
        self._left, self._position = memoryview(b""), 0

    def fill(self, data: memoryview, offset: int, end: int) -> None:
        """Fills a buffer from an offset; a request that has to be made for it goes on to ``end``."""
        if self._remote is None:
            pread_into(self._descriptor, data, offset)
            return
        if offset != self._position:
            self._stop()
            self._position = offset
        while data:
            if not self._left:
                self._left = memoryview(next(self._chunks, b""))
            if not self._left:
                self._chunks = self._remote.stream(self._file, self._position, end, threading.Event())
                continue
            count = min(len(data), len(self._left))
            data[:count] = self._left[:count]
            data, self._left = data[count:], self._left[count:]
            self._position += count

    def close(self) -> None:
        """Ends the request under way, and closes the file."""
        self._stop()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _stop(self) -> None:
        if isinstance(self._chunks, Generator):
            self._chunks.close()
        self._chunks, self._left = iter(()), memoryview(b"")
