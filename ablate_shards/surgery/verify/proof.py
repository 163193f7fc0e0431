"""Re-reads a source and its edited copy, and finds every difference that the receipt does not explain."""

import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from blake3 import blake3

from ablate_shards.errors import AblateError, ArchitectureError, CheckpointError, HubError, UsageError, VerifyError
from ablate_shards.names import (
    ADAPTER_RECEIPT_NAME,
    BEGIN,
    CARD,
    DEQUANTISATION_RECEIPT_NAME,
    MERGE_RECEIPT_NAME,
    RECEIPT_NAME,
    RECEIPT_NAMES,
    is_report,
)
from ablate_shards.surgery.anatomy.gains import factors_of
from ablate_shards.surgery.anatomy.scales import is_codes, quantisation_of
from ablate_shards.surgery.checkpoint.amended import amend
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range
from ablate_shards.surgery.checkpoint.files import Files, Folder
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, Shard, TensorInfo
from ablate_shards.surgery.dequantise.decoding import read_scales
from ablate_shards.surgery.dequantise.dequantisation import plan_dequantisation
from ablate_shards.surgery.dequantise.found import DequantisedRecord
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.ablation_editor import AblationEditor
from ablate_shards.surgery.edit.blocks import BlockEditor, Channels
from ablate_shards.surgery.edit.dequantise import (
    DequantisationReceipt,
    Unedited,
    read_dequantisation_receipt,
)
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.edit.parts import share_of
from ablate_shards.surgery.edit.receipt import Receipt, read_receipt
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.system import cores
from ablate_shards.surgery.merge.adapter import read_adapter
from ablate_shards.surgery.merge.editor import MergeEditor
from ablate_shards.surgery.merge.plan import plan_merge
from ablate_shards.surgery.merge.receipt import MergeReceipt, read_merge_receipt
from ablate_shards.surgery.plan.bases import resolve_bases
from ablate_shards.surgery.plan.edits import Edit, TensorEdit, by_shard, neighbours, untouched

__all__ = ["Difference", "Verification", "verify"]

_CHUNK = 1 << 20
_READERS = 2
#: What is elsewhere is asked for in larger pieces, more of them at a time, because every request takes its time.
_REMOTE_CHUNK = 8 << 20
_REMOTE_READERS = 6
#: Pieces of an output kept beyond one a job: of a matrix that several threads edit, some are read again for its digest.
_READ_AGAIN = 3
#: Elements that may be rounded the other way when another device or library version recomputes an edit.
_ROUNDING_SHARE = 1e-3
_ROUNDING_LEAST = 2
_ROW_TOLERANCE = 1e-6
#: Distance of neighbouring numbers, relative to them.
_SPACING = {"BF16": 2.0**-7, "F16": 2.0**-10}
_MEASURE_TOLERANCE = 1e-6
_OTHER_DIGEST = "the receipt records another digest of its bytes"
#: What a repository has of its own, whatever is published in it.
_REPOSITORYS_OWN = (CARD, ".gitattributes")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as the receipt says.

    Attributes:
        where: The tensor or file.
        what: What was found and what was expected.
    """

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found.

    Attributes:
        differences: Everything that is not as the receipt says; empty if all is well.
        edited: Tensors recomputed.
        dequantised: Weights that were decoded again from the source's codes, or are edited.
        identical: How many of them came out the same to the bit; the rest differ by rounding alone.
        untouched_bytes: Bytes outside the edits that were compared.
        notes: Things that are no differences, a line each.
        recomputed: Whether the edited tensors were computed again, or only compared with the receipt's digests.
    """

    differences: tuple[Difference, ...]
    edited: int
    identical: int
    untouched_bytes: int
    notes: tuple[str, ...]
    recomputed: bool = True
    dequantised: int = 0


def verify(
    checkpoint: Checkpoint, out: Path | Files, run: RunOptions, progress: Progress, *, adapter: Path | None = None
) -> Verification:
    """Compares an output with its source and with its receipt: of an ablation, a merge or a dequantisation.

    Every byte outside the edited tensors must equal the source's; every edited tensor must equal a
    recomputation (to rounding, where another device or library version recomputes it) and the digest and
    measurements in the receipt. The source decides which tensors and files are compared. What is not on
    this machine is read by byte ranges, and nothing of it is kept here. The card of a published model is its own,
    so that it is a note.

    Anyone can edit a receipt and seal it anew. One that was may still say what neither weights nor files show:
    the tool, device, family and recipe of the run, the layer and component of a tensor, what was skipped or left
    out and why, the source's name, and the digest and metadata of the directions. It may describe another edit of
    the same form, if the weights are what that edit gives, and have a missing file pass for one that the source
    gained later, which is a note.

    Of several ranks each compares its share of the shards, and rank 0 what is beside them as well.

    A merge's receipt does not hold the adapter. Without it, what the merge changed is compared with the receipt's
    digests alone, which says no more than that nothing changed since.

    Args:
        checkpoint: The source.
        out: The folder to verify, or its files wherever they are.
        run: Where to recompute, in how much memory, and which rank this is.
        progress: Receives how far it has come.
        adapter: What was merged, to compute the changed tensors again.

    Raises:
        AdapterError: The adapter cannot be read, or does not fit.
        HubError: What is elsewhere cannot be read.
        VerifyError: There is no receipt, it is not of this source, or the adapter is not the one it names.
    """
    files = Folder(out) if isinstance(out, Path) else out
    recorded = _recorded(checkpoint, files, adapter)
    source, checkpoint = checkpoint, recorded.checkpoint
    own = _own_files(files)
    differences = []
    if recorded.altered:
        differences.append(Difference(recorded.receipt_name, "changed after it was written (its digest does not hold)"))
    beside: list[Difference] = []
    notes: list[str] = []
    if run.rank is None or run.rank.index == 0:
        beside, notes = _compare_names(checkpoint, files, recorded, own, {*source.sidecars} - {*checkpoint.sidecars})
        beside += _compare_given(files, recorded)
    if run.rank is not None:
        checkpoint, edits = share_of(checkpoint, recorded.edits, run.rank)
        recorded = dataclasses.replace(recorded, checkpoint=checkpoint, edits=edits)
    with _Examiner(checkpoint, files, recorded, run, progress) as examiner:
        differences += beside + examiner.examine(own)
        notes += examiner.notes
        if differences and (moved := _moved(source, recorded.revision)):
            notes.append(moved)
        return Verification(
            differences=tuple(differences),
            edited=len(recorded.edits),
            identical=examiner.identical,
            untouched_bytes=sum(
                end - start
                for shard in checkpoint.shards
                for start, end in untouched(shard, examiner.edits.get(shard.name, ()))
            ),
            notes=tuple(notes),
            recomputed=recorded.editor is not None,
            dequantised=sum(
                tensor.name in recorded.dequantised for shard in checkpoint.shards for tensor in shard.tensors
            ),
        )


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What a receipt says.

    Attributes:
        receipt_name: The receipt's file.
        checkpoint: What the output was before the edits: the source, with what the receipt says was added to it.
        revision: The commit of the source that it names.
        copied: The files that were copied beside the shards.
        edits: The edited tensors.
        digests: Digests of their bytes in the output.
        editor: Makes what computes them again, None where that cannot be.
        differ: Tells how a tensor's recorded measurements differ from those of its result, if they do.
        altered: Whether its bytes are not the ones that were written.
        given: The SHA-256 of files that are not the source's, by name.
        dequantised: The tensors that were dequantised.
    """

    receipt_name: str
    checkpoint: Checkpoint
    revision: str | None
    copied: tuple[str, ...]
    edits: tuple[Edit, ...]
    digests: Mapping[str, str]
    editor: Callable[[RunOptions, threading.Event], BlockEditor[Any, Any]] | None
    differ: Callable[[str, Any], str | None]
    altered: bool
    given: Mapping[str, str] = field(default_factory=dict)
    dequantised: Set[str] = frozenset()


def _recorded(checkpoint: Checkpoint, out: Files, adapter: Path | None) -> _Recorded:
    found = [name for name in RECEIPT_NAMES if out.has(name)]
    if len(found) > 1:
        raise VerifyError(f"{out.name}: holds both {' and '.join(found)}; remove the one that is not of these weights")
    if not found and out.has(ADAPTER_RECEIPT_NAME):
        if adapter is not None:
            raise UsageError(f"--adapter is about merges, and {out.name} holds an adapter itself; leave it out")
        raise VerifyError(
            f"{out.name}: holds an adapter, which is verified in a folder on this machine; fetch it with `hf download` "
            "first"
        )
    if found == [MERGE_RECEIPT_NAME]:
        return _recorded_merge(checkpoint, out, adapter)
    dequantised = found == [DEQUANTISATION_RECEIPT_NAME]
    recorded = (_recorded_dequantisation if dequantised else _recorded_ablation)(checkpoint, out)
    if adapter is not None:
        what = "a dequantisation" if dequantised else "an ablation"
        raise UsageError(
            f"--adapter is about merges, but {out.name} holds {recorded.receipt_name}, the receipt of {what}"
        )
    return recorded


def _recorded_dequantisation(checkpoint: Checkpoint, out: Files) -> _Recorded:
    path = out.shown(DEQUANTISATION_RECEIPT_NAME)
    receipt = read_dequantisation_receipt(out)
    _check_source(checkpoint, receipt, path)
    return _Recorded(
        receipt_name=DEQUANTISATION_RECEIPT_NAME,
        checkpoint=_dequantised(checkpoint, receipt.dequantised, path),
        revision=receipt.revision,
        copied=receipt.copied,
        edits=(),
        digests={},
        editor=Unedited,
        differ=lambda name, found: None,
        altered=receipt.altered,
        dequantised={record.name for record in receipt.dequantised},
    )


def _dequantised(checkpoint: Checkpoint, records: Sequence[DequantisedRecord], path: str) -> Checkpoint:
    """Returns the source with the weights decoded that a receipt says were."""
    if not records:
        return checkpoint
    name = records[0].name
    try:
        dequantisation = plan_dequantisation(checkpoint, [record.parts[0] for record in records])
    except (AblateError, LookupError) as error:
        raise _unfitting(name, path) from error
    if dequantisation.records() != tuple(records):
        wrong = set(records).symmetric_difference(dequantisation.records())
        raise _unfitting(min((record.name for record in wrong), default=name), path)
    return dequantisation.applied(checkpoint)


def _recorded_ablation(checkpoint: Checkpoint, out: Files) -> _Recorded:
    path = out.shown(RECEIPT_NAME)
    receipt = read_receipt(out)
    _check_source(checkpoint, receipt, path)
    checkpoint = _dequantised(checkpoint, receipt.dequantised, path)
    for edit in receipt.edits:
        if not _describes(edit, checkpoint, receipt.directions):
            raise _unfitting(edit.name, path)
    coded = [edit.scales for edit in receipt.edits if edit.scales is not None]
    scales = {name for scales in coded for name in (scales.name, *(part.name for part in scales.parts))}
    if edited := next((edit.name for edit in receipt.edits if edit.name in scales), None):
        raise _unfitting(edited, path)
    bases = resolve_bases(receipt.edits, checkpoint, receipt.directions)
    return _Recorded(
        receipt_name=RECEIPT_NAME,
        checkpoint=checkpoint,
        revision=receipt.revision,
        copied=receipt.copied,
        edits=receipt.edits,
        digests={name: result.blake3 for name, result in receipt.results.items()},
        editor=lambda run, stop: AblationEditor(
            run.device, run.memory, run.jobs, stop, bases, functools.partial(read_range, checkpoint)
        ),
        differ=lambda name, found: _measures_differ(
            receipt.results[name], found, [each.name for each in dataclasses.fields(found) if each.name != "blake3"]
        ),
        altered=receipt.altered,
        dequantised={record.name for record in receipt.dequantised},
    )


def _recorded_merge(checkpoint: Checkpoint, out: Files, adapter: Path | None) -> _Recorded:
    path = out.shown(MERGE_RECEIPT_NAME)
    receipt = read_merge_receipt(out)
    _check_source(checkpoint, receipt, path)
    checkpoint = _dequantised(checkpoint, receipt.dequantised, path)
    try:
        amended = amend(checkpoint, receipt.amendments)
    except CheckpointError as error:
        raise VerifyError(
            f"{path}: what it says was added does not fit the source ({error}); it was changed after it was written"
        ) from error
    for name, tensor in receipt.tensors.items():
        if amended.tensors.get(name) != tensor:
            raise _unfitting(name, path)
    edits: tuple[Edit, ...] = tuple(receipt.tensors.values())
    editor = None
    if adapter is not None:
        read = read_adapter(adapter)
        if read.sha256 != receipt.adapter_sha256:
            raise VerifyError(f"{adapter}: is not the adapter that {path} names")
        plan = plan_merge(checkpoint, read, receipt.scale)
        edits = plan.edits
        if {edit.name for edit in edits} != receipt.tensors.keys() or plan.amendments != receipt.amendments:
            raise VerifyError(f"{path}: does not record what {adapter} changes; it was changed after it was written")

        def editor(run: RunOptions, stop: threading.Event) -> BlockEditor[Any, Any]:
            return MergeEditor(run.device, run.memory, run.jobs, stop, read)

    return _Recorded(
        receipt_name=MERGE_RECEIPT_NAME,
        checkpoint=amended,
        revision=receipt.revision,
        copied=receipt.copied,
        edits=edits,
        digests={name: result.blake3 for name, result in receipt.results.items()},
        editor=editor,
        differ=lambda name, found: _measures_differ(receipt.results[name], found, ("change",)),
        altered=receipt.altered,
        given=receipt.amendments.files,
        dequantised={record.name for record in receipt.dequantised},
    )


def _check_source(checkpoint: Checkpoint, receipt: Receipt | MergeReceipt | DequantisationReceipt, path: str) -> None:
    if receipt.shards != {shard.name: shard.header_sha256 for shard in checkpoint.shards}:
        moved = _moved(checkpoint, receipt.revision)
        raise VerifyError(
            f"{checkpoint.name}: is not the source that {path} names; expected the shards "
            f"{', '.join(receipt.shards)} with the headers it records" + (f"; {moved}" if moved else "")
        )


def _moved(checkpoint: Checkpoint, revision: str | None) -> str | None:
    """Returns which commit a receipt is of, where the source is another one of its repository."""
    repo, found = checkpoint.origin or (None, None)
    if None in (revision, found) or revision == found:
        return None
    return f"the receipt is of commit {revision}, and this is {found}: compare it with {repo}@{revision}"


def _unfitting(name: str, path: str) -> VerifyError:
    return VerifyError(
        f"{path}: what it records of {name} does not fit the source; it was changed after it was written"
    )


class _Examiner:
    """Compares shard after shard in threads of its own."""

    def __init__(
        self, checkpoint: Checkpoint, out: Files, recorded: _Recorded, run: RunOptions, progress: Progress
    ) -> None:
        self._checkpoint, self._source, self._out = checkpoint, checkpoint.files, out
        self._recorded, self._progress = recorded, progress
        self._stop = threading.Event()
        self._editor = recorded.editor and recorded.editor(run, self._stop)
        here = all(isinstance(files, Folder) for files in (self._source, out))
        self._here, self._chunk = here, _CHUNK if here else _REMOTE_CHUNK
        jobs = self._editor.jobs if self._editor else run.jobs or cores()
        self._editors = ThreadPoolExecutor(jobs)
        if self._editor:
            self._editor.share(self._editors.submit)
        self._pieces, self._written = (
            _Pieces(functools.partial(files.read_into, stop=self._stop), self._chunk, most)
            for files, most in ((self._source, jobs), (out, jobs + _READ_AGAIN))
        )
        self._readers = ThreadPoolExecutor(_READERS if here else _REMOTE_READERS)
        self.edits = by_shard(recorded.edits)
        self.identical = 0
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for pool in (self._readers, self._editors):
            pool.shutdown(wait=True, cancel_futures=True)

    def examine(self, own: Collection[str]) -> list[Difference]:
        """Returns every difference in the shards and in the files beside them.

        Args:
            own: The files that a repository has of its own.
        """
        if self._editor:
            self._progress.note(self._editor.reason)
        self._progress.begin(sum(shard.size for shard in self._checkpoint.shards))
        differences: list[Difference] = []
        sidecars = {
            name: self._readers.submit(self._compare_sidecar, name)
            for name in self._checkpoint.sidecars
            if name in self._recorded.copied or self._out.has(name)
        }
        for name, future in sidecars.items():
            problem = future.result()
            if problem is not None and name in own:
                self.notes.append(f"{name} is the repository's own, not the source's")
            elif problem is not None:
                differences.append(Difference(name, problem))
        with self._editor.one_thread_each() if self._editor else nullcontext():
            for shard in self._checkpoint.shards:
                differences += self._examine_shard(shard)
        return differences

    def _examine_shard(self, shard: Shard) -> list[Difference]:
        if not self._out.has(shard.name):
            return [Difference(shard.name, "missing")]
        if (size := self._out.size(shard.name)) != shard.size:
            return [Difference(shard.name, f"expected {shard.size} bytes, found {size}")]
        ranges = [
            self._readers.submit(self._compare_range, shard, start, min(start + self._chunk, end))
            for first, end in untouched(shard, self.edits.get(shard.name, ()))
            for start in range(first, end, self._chunk)
        ]
        edits = {edit.name: self._start(edit) for edit in self.edits.get(shard.name, ())}
        differences = [difference for future in ranges for difference in future.result()]
        for name, found in edits.items():
            problem, identical = found()
            if problem is not None:
                differences.append(Difference(name, problem))
            self.identical += identical
        return differences

    def _compare_range(self, shard: Shard, start: int, end: int) -> list[Difference]:
        first = self._first_difference(shard.name, start, end)
        self._progress.advance(end - start)
        if first is None:
            return []
        name = next((tensor.name for tensor in shard.tensors if tensor.start <= first < tensor.end), "the header")
        if name in self._recorded.dequantised:
            return [Difference(name, f"is not what the source's codes stand for at byte {first} of {shard.name}")]
        return [Difference(name, f"differs from the source at byte {first} of {shard.name}, but was not edited")]

    def _first_difference(self, file: str, start: int, end: int) -> int | None:
        """Returns the offset of the first byte of a range that is not the source's."""
        ours, theirs = bytearray(end - start), bytearray(end - start)
        self._source.read_into(file, memoryview(ours), start, self._stop)
        self._out.read_into(file, memoryview(theirs), start, self._stop)
        if ours == theirs:
            return None
        return start + int(np.flatnonzero(np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8))[0])

    def _start(self, edit: Edit) -> Callable[[], tuple[str | None, bool]]:
        """Begins to compare an edited tensor.

        Returns:
            What waits for the end of that, and returns what is wrong, or whether it is right to the bit.
        """
        read, written = (functools.partial(pieces, edit) for pieces in (self._pieces, self._written))
        if self._editor is None:
            return self._editors.submit(self._compare_digest, edit, written).result
        coded = isinstance(edit, TensorEdit) and edit.scales is not None
        check = (_CodesCheck if coded else _RoundingCheck)(edit, written, self._chunk)

        def compare(data: memoryview, offset: int) -> None:
            check.add(data, offset)
            self._progress.advance(len(data))

        channels = Channels(read=read, write=compare, reread=written)
        whole = [functools.partial(self._editor.edit, edit, channels)]
        # Portions are read once more for the digest.
        tasks = [portion.do for portion in self._editor.portions(edit, channels)] if self._here else whole
        return functools.partial(self._ended, edit, check, [self._editors.submit(task) for task in tasks])

    def _ended(
        self, edit: Edit, check: "_CodesCheck | _RoundingCheck", tasks: Sequence[Future[Any]]
    ) -> tuple[str | None, bool]:
        try:
            (result,) = filter(None, [task.result() for task in tasks])
        except HubError:
            raise
        except AblateError as error:
            return str(error), False
        problem = check.problem()
        if problem is None and result.blake3 != self._recorded.digests[edit.name]:
            problem = _OTHER_DIGEST
        problem = problem or self._recorded.differ(edit.name, result)
        return problem, problem is None and check.differing == 0

    def _compare_digest(self, edit: Edit, written: Callable[[memoryview, int], None]) -> tuple[str | None, bool]:
        same = self._digest(edit, written) == self._recorded.digests[edit.name]
        return (None, True) if same else (_OTHER_DIGEST, False)

    def _digest(self, edit: Edit, written: Callable[[memoryview, int], None]) -> str:
        digest = blake3()
        for start in range(edit.start, edit.end, self._chunk):
            data = bytearray(min(self._chunk, edit.end - start))
            written(memoryview(data), start)
            digest.update(data)
            self._progress.advance(len(data))
        return digest.hexdigest()

    def _compare_sidecar(self, name: str) -> str | None:
        for files, what in ((self._source, "gone from the source"), (self._out, "missing")):
            if not files.has(name):
                return what
        size = self._source.size(name)
        same = size == self._out.size(name) and all(
            self._first_difference(name, start, min(start + self._chunk, size)) is None
            for start in range(0, size, self._chunk)
        )
        return None if same else "differs from the source"


class _Pieces:
    """Reads edited tensors in large pieces for several threads, and returns parts of the last ones as often as asked.

    Args:
        read: Fills a buffer from an offset of a file.
        size: Bytes of a piece.
        most: How many are kept.
    """

    def __init__(self, read: Callable[[str, memoryview, int], None], size: int, most: int) -> None:
        self._read, self._size, self._most = read, size, most
        self._kept: list[_Piece] = []
        self._choosing = threading.Lock()

    def __call__(self, edit: Edit, data: memoryview, offset: int) -> None:
        """Fills a buffer from an offset of the file that a tensor is in."""
        place = edit.shard, offset, offset + len(data)
        with self._choosing:
            piece = next((piece for piece in self._kept if piece.holds(*place)), None)
            if piece is None:
                piece = _Piece(edit.shard, offset, max(place[2], min(offset + self._size, edit.end)))
            else:
                self._kept.remove(piece)
            self._kept.append(piece)
            del self._kept[: -self._most]
        # NumPy copies without the interpreter's lock, which other threads need meanwhile.
        np.copyto(np.frombuffer(data, np.uint8), piece.bytes(self._read)[offset - piece.start :][: len(data)])


class _Piece:
    """A range of a file, which is read when it is first needed."""

    def __init__(self, file: str, start: int, end: int) -> None:
        self._file, self.start, self._end = file, start, end
        self._reading = threading.Lock()
        self._data: np.ndarray | None = None

    def holds(self, file: str, start: int, end: int) -> bool:
        """Returns whether a range of a file lies in it."""
        return file == self._file and self.start <= start <= end <= self._end

    def bytes(self, read: Callable[[str, memoryview, int], None]) -> np.ndarray:
        """Returns all of it, ``[bytes]`` uint8; only the first of several threads reads it."""
        with self._reading:
            if self._data is None:
                data = np.empty(self._end - self.start, np.uint8)
                read(self._file, data.data, self.start)
                self._data = data
            return self._data


class _RoundingCheck:
    """Counts where a written tensor differs from its recomputation by rounding, and by more; for several threads."""

    def __init__(self, edit: Edit, written: Callable[[memoryview, int], None], chunk: int) -> None:
        self._edit, self._written, self._chunk = edit, written, chunk
        self._differing: list[int] = []
        #: Elements that differ by more than rounding, and how.
        self._wrong: list[tuple[int, str]] = []

    @property
    def differing(self) -> int:
        """How many elements differ."""
        return sum(self._differing)

    def add(self, data: memoryview, offset: int) -> None:
        """Compares recomputed bytes with those written at an offset."""
        from ablate_shards.kernels.codecs.plain import STORED

        dtype = np.dtype(STORED[self._edit.dtype])
        width = self._edit.shape[-1] if self._edit.shape else 1
        row = width * dtype.itemsize
        step, rows = (max(1, size // row) for size in (self._chunk, _CHUNK))
        for first in range(0, len(data), step * row):
            piece = data[first : first + step * row]
            written = np.empty(len(piece), np.uint8)
            self._written(written.data, offset + first)
            if not np.array_equal(written, piece):
                found, expected = (np.frombuffer(raw, dtype).reshape(-1, width) for raw in (written, piece))
                # A few rows at a time, because decoded they take four times the memory.
                for start in range(0, len(found), rows):
                    part = slice(start, start + rows)
                    self._compare(found[part], expected[part], offset + first + start * row)

    def _compare(self, found: np.ndarray, expected: np.ndarray, offset: int) -> None:
        """Compares rows of stored values."""
        from ablate_shards.kernels.codecs.plain import decoded

        size, width = found.itemsize, found.shape[1]
        bits = np.uint16 if size == 2 else np.uint32
        self._differing.append(int(np.count_nonzero(found.view(bits) != expected.view(bits))))
        found, expected = (decoded(stored, np.float64) for stored in (found, expected))
        allowed = _ROW_TOLERANCE * np.linalg.norm(expected, axis=1, keepdims=True)
        if self._edit.dtype in _SPACING:
            allowed = allowed + _SPACING[self._edit.dtype] * np.maximum(np.abs(found), np.abs(expected))
        with np.errstate(invalid="ignore"):
            beyond = np.argwhere(~(np.abs(found - expected) <= allowed))
        if len(beyond):
            row, column = (int(index) for index in beyond[0])
            element = (offset - self._edit.start) // size + row * width + column
            where = ", ".join(str(int(index)) for index in np.unravel_index(element, self._edit.shape))
            said = f"element [{where}] is {found[row, column]:.6g}, but the edit gives {expected[row, column]:.6g}"
            self._wrong.append((element, said))

    def problem(self) -> str | None:
        """Returns what is wrong beyond rounding."""
        if self._wrong:
            return min(self._wrong)[1]
        total = math.prod(self._edit.shape)
        if self._edit.dtype == "F32" or self.differing <= max(_ROUNDING_LEAST, _ROUNDING_SHARE * total):
            return None
        return f"{self.differing} of {total} elements are rounded otherwise than the edit rounds them"


class _CodesCheck:
    """Counts where the codes of a written tensor are not those of its recomputation; none may differ.

    Several threads may add to it.
    """

    def __init__(self, edit: Edit, written: Callable[[memoryview, int], None], chunk: int) -> None:
        self._edit, self._written, self._chunk = edit, written, chunk
        self._differing: list[int] = []

    @property
    def differing(self) -> int:
        """How many bytes differ."""
        return sum(self._differing)

    def add(self, data: memoryview, offset: int) -> None:
        """Compares recomputed bytes with those written at an offset."""
        for first in range(0, len(data), self._chunk):
            piece = data[first : first + self._chunk]
            written = bytearray(len(piece))
            self._written(memoryview(written), offset + first)
            found, expected = np.frombuffer(written, np.uint8), np.frombuffer(piece, np.uint8)
            self._differing.append(int(np.count_nonzero(found != expected)))

    def problem(self) -> str | None:
        """Returns what is wrong."""
        total = self._edit.end - self._edit.start
        what = "codes" if self._edit.dtype == "F8_E4M3" else "bytes of codes"
        return f"{self.differing} of {total} {what} are not those that the edit gives" if self.differing else None


def _describes(edit: TensorEdit, checkpoint: Checkpoint, directions: Directions) -> bool:
    tensor = checkpoint.tensors.get(edit.name)
    ranks, axes = ((1, 2), (-1,)) if edit.kind == "bias" else ((2, 3), (-2, -1))
    shape = edit.shape if edit.scales is None else (*edit.scales.leading(edit.shape), 1)
    key = edit.basis
    if (
        tensor is None
        or len(shape) not in ranks
        or edit.axis not in axes
        or not all(layer in directions.basis for layer in neighbours(key.source_layer))
    ):
        return False
    hidden = directions.basis[neighbours(key.source_layer)[0]].shape[1:]
    gains = [] if key.gain is None else [checkpoint.tensors.get(name) for name in factors_of(key.gain)]
    return (
        (tensor.shard, tensor.dtype, tensor.shape, tensor.start, tensor.end)
        == (edit.shard, edit.dtype, edit.shape, edit.start, edit.end)
        and _stored_right(edit, checkpoint)
        and _has_length(edit, tensor, hidden[0])
        and all(layer in directions.reference for layer in key.references)
        and all(directions.reference[layer].shape == hidden for layer in key.references)
        and all(gain is not None and gain.shape == hidden for gain in gains)
    )


def _has_length(edit: TensorEdit, tensor: TensorInfo, hidden: int) -> bool:
    """Returns whether the residual axis of an edit's tensor has a length."""
    if edit.scales is None:
        return edit.shape[edit.axis] == hidden
    if edit.axis == -1:
        return edit.scales.holds(tensor, hidden)
    return edit.scales.leading(edit.shape)[-1] == hidden


def _stored_right(edit: TensorEdit, checkpoint: Checkpoint) -> bool:
    """Returns whether an edit's dtype is one that is edited, and its scales are the source's own."""
    if edit.scales is None:
        return edit.dtype in ITEM_BYTES
    tensor, read = checkpoint.tensors[edit.name], functools.partial(read_range, checkpoint)
    if edit.kind != "weight" or not is_codes(tensor, ".weight"):
        return False
    try:
        found = read_scales(tensor, checkpoint.tensors, quantisation_of(checkpoint.config), read)
    except ArchitectureError:
        return False
    return found == edit.scales


def _measures_differ(recorded: object, found: object, measures: Iterable[str]) -> str | None:
    for what in measures:
        ours, theirs = getattr(found, what), getattr(recorded, what)
        same = ours == theirs or (
            None not in (ours, theirs) and math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=_MEASURE_TOLERANCE)
        )
        if not same:
            return f"the receipt records {what} {theirs}, re-reading gives {ours}"
    return None


def _compare_given(out: Files, recorded: _Recorded) -> list[Difference]:
    """Compares files that are not the source's with the digests that the receipt has of them."""
    return [
        Difference(name, "differs from the file that the receipt names" if out.has(name) else "missing")
        for name, expected in recorded.given.items()
        if not out.has(name) or hashlib.sha256(out.read(name)).hexdigest() != expected
    ]


def _own_files(out: Files) -> Collection[str]:
    """Returns the files of an output that a repository has of its own, the card that a push made among them."""
    if out.revision is not None:
        return [name for name in _REPOSITORYS_OWN if out.has(name)]
    return [CARD] if out.has(CARD) and BEGIN.encode() in out.read(CARD) else []


def _compare_names(
    checkpoint: Checkpoint, out: Files, recorded: _Recorded, own: Collection[str], removed: Collection[str]
) -> tuple[list[Difference], list[str]]:
    differences, notes = [], []
    copied = recorded.copied
    for name in sorted({*copied}.symmetric_difference(checkpoint.sidecars)):
        if name in copied:
            what = f"says that {name} was copied, but it is not among the files of {checkpoint.name}"
            differences.append(Difference(recorded.receipt_name, what))
        elif not out.has(name):
            notes.append(f"{name} was added to the source after the edit")
        elif name not in own:
            differences.append(
                Difference(recorded.receipt_name, f"does not say that {name} was copied, but it is there")
            )
    known = {
        recorded.receipt_name,
        *recorded.given,
        *(shard.name for shard in checkpoint.shards),
        *checkpoint.sidecars,
        *own,
    }
    for name in out.names():
        if name in known or is_report(name):
            continue
        if name in removed:
            differences.append(Difference(name, "belongs to the quantised source, and misleads whoever loads this"))
        elif name.endswith(".safetensors"):
            differences.append(Difference(name, "weights that the receipt does not account for"))
        else:
            notes.append(f"{name} was added after the edit")
    return differences, notes
