"""Re-reads a source and its edited copy, and finds whatever the receipt does not account for."""

import filecmp
import functools
import math
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from ablate_shards.errors import AblateError, VerifyError
from ablate_shards.surgery.checkpoint import ITEM_BYTES, RECEIPT_NAME, Checkpoint, Shard
from ablate_shards.surgery.directions import Directions
from ablate_shards.surgery.editor import Channels, Editor, pread_into, torch_dtype
from ablate_shards.surgery.execute import ExecuteOptions, Progress, untouched
from ablate_shards.surgery.plan import TensorEdit, by_shard, resolve_bases
from ablate_shards.surgery.receipt import Receipt, TensorResult, read_receipt

if TYPE_CHECKING:
    import torch

__all__ = ["Difference", "Verification", "verify"]

_CHUNK = 1 << 20
#: Elements that may be rounded the other way when another device or library version recomputes an edit.
_ROUNDING_SHARE = 1e-3
_ROUNDING_LEAST = 2
_ROW_TOLERANCE = 1e-6
_MEASURE_TOLERANCE = 1e-6


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
        identical: How many of them came out the same to the bit; the rest differ by rounding alone.
        untouched_bytes: Bytes outside the edits that were compared.
        notes: Things that are no differences, a line each.
    """

    differences: tuple[Difference, ...]
    edited: int
    identical: int
    untouched_bytes: int
    notes: tuple[str, ...]


def verify(checkpoint: Checkpoint, out: Path, run: ExecuteOptions, progress: Progress) -> Verification:
    """Compares an edited checkpoint with its source and with its receipt.

    Every byte outside the edited tensors must equal the source's; every edited tensor must equal a
    recomputation (to rounding, where another device or library version recomputes it) and the digest and
    measurements in the receipt. Which tensors and files there are to compare is told by the source.

    Anyone can edit a receipt and seal it anew. One that was may still say what neither weights nor files show:
    the tool, device, family and recipe of the run, the layer and component of a tensor, what was skipped or left
    out and why, the source's name, and the digest and metadata of the directions. It may describe another edit of
    the same form, if the weights are what that edit gives, and have a missing file pass for one that the source
    gained later, which is a note.

    Args:
        checkpoint: The source.
        out: The folder to verify.
        run: Where to recompute, and in how much memory.
        progress: Hears how far it has come.

    Raises:
        VerifyError: There is no receipt, or it is not of this source.
    """
    receipt = read_receipt(out)
    if receipt.shards != {shard.name: shard.header_sha256 for shard in checkpoint.shards}:
        raise VerifyError(
            f"{checkpoint.path}: is not the source that {out / RECEIPT_NAME} names; expected the shards "
            f"{', '.join(receipt.shards)} with the headers it records"
        )
    for edit in receipt.edits:
        if not _describes(edit, checkpoint, receipt.directions):
            raise VerifyError(
                f"{out / RECEIPT_NAME}: what it records of {edit.name} does not fit the source; "
                "it was changed after it was written"
            )
    differences = []
    if receipt.altered:
        differences.append(Difference(RECEIPT_NAME, "changed after it was written (its digest does not hold)"))
    unknown, notes = _compare_names(checkpoint, out, receipt.copied)
    with _Examiner(checkpoint, out, receipt, run, progress) as examiner:
        differences += unknown + examiner.examine()
        return Verification(
            differences=tuple(differences),
            edited=len(receipt.edits),
            identical=examiner.identical,
            untouched_bytes=sum(
                end - start
                for shard in checkpoint.shards
                for start, end in untouched(shard, examiner.edits.get(shard.name, ()))
            ),
            notes=tuple(notes),
        )


class _Examiner:
    """Compares shard after shard in threads of its own."""

    def __init__(
        self, checkpoint: Checkpoint, out: Path, receipt: Receipt, run: ExecuteOptions, progress: Progress
    ) -> None:
        self._checkpoint, self._out, self._receipt, self._progress = checkpoint, out, receipt, progress
        self._stop = threading.Event()
        self._editor = Editor(run.device, run.memory, run.jobs, self._stop)
        self._editors = ThreadPoolExecutor(self._editor.jobs)
        self._readers = ThreadPoolExecutor(2)
        self.edits = by_shard(receipt.edits)
        self._bases = resolve_bases(receipt.edits, checkpoint, receipt.directions)
        self.identical = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for pool in (self._readers, self._editors):
            pool.shutdown(wait=True, cancel_futures=True)

    def examine(self) -> list[Difference]:
        """Returns every difference in the shards and in the files beside them."""
        self._progress.note(self._editor.reason)
        self._progress.begin(sum(shard.size for shard in self._checkpoint.shards))
        differences: list[Difference] = []
        for name in self._checkpoint.sidecars:
            if name in self._receipt.copied or (self._out / name).exists():
                differences += self._compare_sidecar(name)
        with self._editor.one_thread_each():
            for shard in self._checkpoint.shards:
                differences += self._examine_shard(shard)
        return differences

    def _examine_shard(self, shard: Shard) -> list[Difference]:
        path = self._out / shard.name
        if not path.is_file():
            return [Difference(shard.name, "missing")]
        if (size := path.stat().st_size) != shard.size:
            return [Difference(shard.name, f"expected {shard.size} bytes, found {size}")]
        with shard.path.open("rb") as source, path.open("rb") as target:
            files = (source.fileno(), target.fileno())
            ranges = [
                self._readers.submit(self._compare_range, shard, files, start, min(start + _CHUNK, end))
                for first, end in untouched(shard, self.edits.get(shard.name, ()))
                for start in range(first, end, _CHUNK)
            ]
            edits = {
                edit.name: self._editors.submit(self._compare_edit, edit, files)
                for edit in self.edits.get(shard.name, ())
            }
            differences = [difference for future in ranges for difference in future.result()]
            for name, future in edits.items():
                problem, identical = future.result()
                if problem is not None:
                    differences.append(Difference(name, problem))
                self.identical += identical
            return differences

    def _compare_range(self, shard: Shard, files: tuple[int, int], start: int, end: int) -> list[Difference]:
        ours, theirs = bytearray(end - start), bytearray(end - start)
        pread_into(files[0], memoryview(ours), start)
        pread_into(files[1], memoryview(theirs), start)
        self._progress.advance(end - start)
        if ours == theirs:
            return []
        first = start + int(np.flatnonzero(np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8))[0])
        name = next((tensor.name for tensor in shard.tensors if tensor.start <= first < tensor.end), "the header")
        return [Difference(name, f"differs from the source at byte {first} of {shard.name}, but was not edited")]

    def _compare_edit(self, edit: TensorEdit, files: tuple[int, int]) -> tuple[str | None, bool]:
        """Returns what is wrong with an edited tensor, or whether it is right to the bit."""
        recorded = self._receipt.results[edit.name]
        comparison = _Comparison(edit, files[1])

        def compare(data: memoryview, offset: int) -> None:
            comparison.add(data, offset)
            self._progress.advance(len(data))

        channels = Channels(
            read=functools.partial(pread_into, files[0]),
            write=compare,
            reread=functools.partial(pread_into, files[1]),
        )
        try:
            result = self._editor.edit(edit, self._bases[edit.basis], channels)
        except AblateError as error:
            return str(error), False
        problem = comparison.problem()
        if problem is None and result.sha256 != recorded.sha256:
            problem = "the receipt records another digest of its bytes"
        problem = problem or _measures_differ(recorded, result)
        return problem, problem is None and comparison.differing == 0

    def _compare_sidecar(self, name: str) -> list[Difference]:
        ours, theirs = self._checkpoint.root / name, self._out / name
        for path, what in ((ours, "gone from the source"), (theirs, "missing")):
            if not path.is_file():
                return [Difference(name, what)]
        same = ours.stat().st_size == theirs.stat().st_size and filecmp.cmp(ours, theirs, shallow=False)
        return [] if same else [Difference(name, "differs from the source")]


class _Comparison:
    """Counts where a written tensor differs from its recomputation by rounding, and by more."""

    def __init__(self, edit: TensorEdit, target: int) -> None:
        self._edit, self._target = edit, target
        self.differing = 0
        self._total = 0
        self._wrong: str | None = None

    def add(self, data: memoryview, offset: int) -> None:
        """Compares recomputed bytes with those written at an offset."""
        import torch

        dtype = torch_dtype(self._edit.dtype)
        width = self._edit.shape[-1]
        step = max(1, _CHUNK // (width * dtype.itemsize)) * width * dtype.itemsize
        for first in range(0, len(data), step):
            piece = data[first : first + step]
            written = bytearray(len(piece))
            pread_into(self._target, memoryview(written), offset + first)
            self._total += len(piece) // dtype.itemsize
            if written != piece:
                found, expected = (torch.frombuffer(raw, dtype=dtype).view(-1, width) for raw in (written, piece))
                self._compare(found, expected, offset + first)

    def _compare(self, found: "torch.Tensor", expected: "torch.Tensor", offset: int) -> None:
        import torch

        dtype, width = found.dtype, found.shape[1]
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        self.differing += int((found.view(bits) != expected.view(bits)).sum())
        found, expected = found.float(), expected.float()
        allowed = expected.norm(dim=1, keepdim=True).mul(_ROW_TOLERANCE)
        if dtype.itemsize == 2:
            allowed = allowed + torch.finfo(dtype).eps * torch.maximum(found.abs(), expected.abs())
        beyond = torch.nonzero(~((found - expected).abs() <= allowed))
        if len(beyond) and self._wrong is None:
            row, column = (int(index) for index in beyond[0])
            element = (offset - self._edit.start) // dtype.itemsize + row * width + column
            where = ", ".join(str(int(index)) for index in np.unravel_index(element, self._edit.shape))
            self._wrong = (
                f"element [{where}] is {found[row, column]:.6g}, but the edit gives {expected[row, column]:.6g}"
            )

    def problem(self) -> str | None:
        """Returns what is wrong beyond rounding."""
        if self._wrong is None and self._edit.dtype != "F32":
            allowed = max(_ROUNDING_LEAST, _ROUNDING_SHARE * self._total)
            if self.differing > allowed:
                return f"{self.differing} of {self._total} elements are rounded otherwise than the edit rounds them"
        return self._wrong


def _describes(edit: TensorEdit, checkpoint: Checkpoint, directions: Directions) -> bool:
    tensor = checkpoint.tensors.get(edit.name)
    ranks, axes = ((1, 2), (-1,)) if edit.kind == "bias" else ((2, 3), (-2, -1))
    key = edit.basis
    if (
        tensor is None
        or len(edit.shape) not in ranks
        or edit.axis not in axes
        or key.source_layer not in directions.basis
    ):
        return False
    hidden = directions.basis[key.source_layer].shape[1:]
    gain = None if key.gain is None else checkpoint.tensors.get(key.gain)
    return (
        (tensor.shard, tensor.dtype, tensor.shape, tensor.start, tensor.end)
        == (edit.shard, edit.dtype, edit.shape, edit.start, edit.end)
        and edit.dtype in ITEM_BYTES
        and edit.shape[edit.axis] == hidden[0]
        and all(layer in directions.reference for layer in key.references)
        and all(directions.reference[layer].shape == hidden for layer in key.references)
        and (key.gain is None or (gain is not None and gain.shape == hidden))
    )


def _measures_differ(recorded: TensorResult, found: TensorResult) -> str | None:
    for what in ("before", "after", "norm_drift", "degenerate"):
        ours, theirs = getattr(found, what), getattr(recorded, what)
        same = ours == theirs or (
            None not in (ours, theirs) and math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=_MEASURE_TOLERANCE)
        )
        if not same:
            return f"the receipt records {what} {theirs}, re-reading gives {ours}"
    return None


def _compare_names(checkpoint: Checkpoint, out: Path, copied: Collection[str]) -> tuple[list[Difference], list[str]]:
    differences, notes = [], []
    for name in sorted({*copied}.symmetric_difference(checkpoint.sidecars)):
        if name in copied:
            what = f"says that {name} was copied, but it is not among the files of {checkpoint.path}"
            differences.append(Difference(RECEIPT_NAME, what))
        elif (out / name).exists():
            differences.append(Difference(RECEIPT_NAME, f"does not say that {name} was copied, but it is there"))
        else:
            notes.append(f"{name} was added to the source after the edit")
    known = {RECEIPT_NAME, *(shard.name for shard in checkpoint.shards), *checkpoint.sidecars}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name in known or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            differences.append(Difference(name, "weights that the receipt does not account for"))
        else:
            notes.append(f"{name} was added after the edit")
    return differences, notes
