"""Changes the tensors of a merge by what an adapter says: ``W + s·B·A``, block by block."""

import bisect
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.kernels.codecs.plain import GREATEST, STORED, decoded, encode
from ablate_shards.kernels.merge.merge_numpy import Added, NumpyMerger, update_norm
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES
from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.edit.loops import Each, in_order
from ablate_shards.surgery.edit.sections import Reader, Section
from ablate_shards.surgery.machine.devices import torch_dtype
from ablate_shards.surgery.merge.adapter import Adapter
from ablate_shards.surgery.merge.beginning import Beginning, refuse
from ablate_shards.surgery.merge.plan import PIECE_ELEMENTS, MergeEdit, MergePart
from ablate_shards.validation import Finite

if TYPE_CHECKING:
    from ablate_shards.kernels.choose import Form
    from ablate_shards.kernels.form import Turn
    from ablate_shards.kernels.merge.merge_torch import Merger

__all__ = ["MergeEditor", "MergeResult"]

_Factors: TypeAlias = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Returns left ``[rows, r]`` and right ``[r, cols]`` of an update, float32."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was measured of one changed tensor.

    Attributes:
        change: Norm of what was added, relative to the norm of what was there, before rounding; None where
            that was zero.
        blake3: Digest of the tensor's bytes in the output, as re-read from the written file.
    """

    change: Finite | None
    blake3: str


class _Squares(NamedTuple):
    """Squared norms of what was measured.

    Attributes:
        change: Of what was added, before rounding.
        before: Of what was there.
    """

    change: float
    before: float


class MergeEditor(BlockEditor[MergeEdit, MergeResult]):
    """Changes tensors by what an adapter says.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes for all buffers of all jobs together.
        jobs: Tensors, or parts of large ones, changed at a time, one per available core if None.
        stop: Set when the run should end early.
        adapter: What to merge.

    Raises:
        UsageError: There is no such device.
    """

    on_cpu = "numpy"
    needs_float64 = True

    def __init__(self, device: str, memory: int, jobs: int | None, stop: threading.Event, adapter: Adapter) -> None:
        super().__init__(device, memory, jobs, stop)
        self._adapter = adapter

    def sections(self, edit: MergeEdit) -> Sequence[Section]:
        """Returns a section per matrix, and one for a parameter that is added to or replaced."""
        each = self._each_of(edit.end - edit.start)
        if edit.kind == "parts":
            return list(self._parts(edit))
        if edit.kind == "rows":
            return [_TokenRows(edit, self._adapter, each)]
        if edit.kind != "low-rank":
            return [_WholeParameter(edit, self._adapter, each)]
        factors = _LowRankFactors(edit, self._adapter)
        if edit.magnitude is not None:
            of = functools.partial(factors.of, 0)
            return [(_RescaledColumns if edit.transposed else _RescaledRows)(edit, self._adapter, of, each)]
        height = edit.shape[-2]
        return [
            self._addition(edit, matrix * height, height, _Update(functools.partial(factors.of, matrix), edit.scale))
            for matrix in range(edit.experts if edit.expert is None else 1)
        ]

    def _parts(self, edit: MergeEdit) -> Iterator[Section]:
        """Yields a section for the rows of each part, and one for the rows between two, which stay as they are."""
        done, rows = 0, math.prod(edit.shape[:-1])
        for (first, last), parts in itertools.groupby(edit.parts, lambda part: part.rows):
            if done < first:
                yield self._between(edit, done, first)
            updates = (
                _Update(functools.partial(self._factors, part), part.scale, slice(*part.columns or (None,)))
                for part in parts
            )
            yield self._addition(edit, first, last - first, *updates)
            done = last
        if done < rows:
            yield self._between(edit, done, rows)

    def _between(self, edit: MergeEdit, first: int, last: int) -> "_Kept":
        return _Kept(edit, first, last, self._each_of((last - first) * _row_bytes(edit)))

    def _factors(self, part: MergePart) -> tuple[np.ndarray, np.ndarray]:
        down, up = (self._adapter.read(name) for name in part.source)
        return (down.T, up.T) if part.transposed else (up, down)

    def _addition(self, edit: MergeEdit, first: int, rows: int, *updates: "_Update") -> "_Addition":
        return _Addition(
            edit,
            first,
            rows,
            updates,
            form=self._form,
            device=self._device,
            room=self._room,
            begin=Beginning(edit, self._adapter),
            each=self._each_of(rows * _row_bytes(edit)) if self._form == "numpy" else in_order,
        )

    def result(self, edit: MergeEdit, measured: Sequence[Any], digest: str) -> MergeResult:
        """Returns what was measured of a tensor."""
        squares, before = (math.fsum(each[which] for each in measured) for which in range(2))
        change = math.sqrt(squares / before) if before else None if squares else 0.0
        return MergeResult(change=change, blake3=digest)


class _LowRankFactors:
    """The factors of a tensor's matrices, read when the first of them is asked for, once for all threads."""

    def __init__(self, edit: MergeEdit, adapter: Adapter) -> None:
        self._edit, self._adapter = edit, adapter
        self._read: tuple[np.ndarray, np.ndarray] | None = None
        self._reading = threading.Lock()

    def of(self, matrix: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns left ``[rows, r]`` and right ``[r, cols]`` of a matrix, float32."""
        edit = self._edit
        with self._reading:
            if self._read is None:
                down, up = (self._adapter.read(name) for name in edit.source)
                # Experts lie one after the other along the rows of A, and interleaved along the columns of B.
                self._read = down.reshape(edit.experts, -1, down.shape[-1]), up.reshape(len(up), -1, edit.experts)
        downs, ups = self._read
        expert = matrix if edit.expert is None else edit.expert
        right, left = downs[expert], ups[:, :, expert]
        if edit.transposed:
            left, right = right.T, left.T
        return (left if edit.rows is None else left[slice(*edit.rows)]), right


class _Update(NamedTuple):
    """A low-rank update of some columns of the rows of a section.

    Attributes:
        factors: What it is made of.
        scale: What their product is multiplied by.
        columns: The columns; those of several updates do not overlap and are as many in each.
    """

    factors: _Factors
    scale: float
    columns: slice = slice(None)


class _Addition:
    """Rows of one matrix that low-rank updates are added to: see ``Section``."""

    light = True

    def __init__(
        self,
        edit: MergeEdit,
        first: int,
        rows: int,
        updates: Sequence[_Update],
        *,
        form: "Form",
        device: str,
        room: int,
        begin: Beginning,
        each: Each,
    ) -> None:
        self._edit, self._updates, self.each = edit, updates, each
        self._form, self._device, self._room, self._begin = form, device, room, begin
        self._row_bytes = _row_bytes(edit)
        self.start = edit.start + first * self._row_bytes
        self.end = self.start + rows * self._row_bytes
        self.block = 0
        self.gathers = begin.gathers
        self._squares = 0.0
        #: Sums of squares of what was there, by the offset of a block.
        self._before: dict[int, list[float]] = {}
        self._mergers: list[Merger | NumpyMerger] = []
        self._kept = np.ones(edit.shape[-1], bool)
        for update in updates:
            self._kept[update.columns] = False

    def gather(self, read: Reader) -> None:
        """Reads the factors."""
        self._squares, self._before, self._mergers = 0.0, {}, []
        taken = self._begin.gather(read)
        for update in self._updates:
            left, right = update.factors()
            self._mergers.append(self._new_merger(left, right, update.scale))
            if taken is not None:
                left, right = np.hstack([left, -taken[0]]), np.vstack([right, taken[1]])
            self._squares += (update.scale * update_norm(left, right)) ** 2
        chunk = self._mergers[0].chunk_rows
        self.block = max(chunk, self._room // max(1, self._row_bytes) // chunk * chunk) * max(1, self._row_bytes)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Adds the updates to a block."""
        taken = self._begin.apply(raw, offset)
        stored = raw.view(STORED[self._edit.dtype]).reshape(-1, self._edit.shape[-1])
        start = (offset - self.start) // self._row_bytes
        beside: list[float] = []
        if self._kept.any():
            beside = np.square(decoded(stored[:, self._kept], np.float64)).sum(axis=1).tolist()
        found = self._add(stored, start) if self._form == "numpy" else self._add_on_device(raw, start)
        there = [square for each in found for square in each.squares]
        if any(each.overflows for each in found):
            refuse(self._edit, finite=all(map(math.isfinite, there)))
        self._before[offset] = [*beside, *there] if taken is None else taken

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Does nothing: the norms are known before, and the digest is the caller's."""

    def measured(self) -> _Squares:
        """Returns the squared norms of the updates and of what was there."""
        return _Squares(self._squares, math.fsum(itertools.chain.from_iterable(self._before.values())))

    def _add(self, stored: np.ndarray, start: int) -> list[Added]:
        found = []
        for update, merger in zip(self._updates, self._mergers, strict=True):
            part = stored[:, update.columns]
            # Compiled kernels take columns that lie side by side.
            beside = part if update.columns.step in (None, 1) else np.ascontiguousarray(part)
            found.append(merger.apply(beside, start))  # type: ignore[arg-type]
            if beside is not part:
                part[:] = beside
        return found

    def _add_on_device(self, raw: np.ndarray, start: int) -> list[Added]:
        import torch

        stored = torch.from_numpy(raw).view(torch_dtype(self._edit.dtype)).view(-1, self._edit.shape[-1])
        block = stored.to(self._device)
        found = [
            merger.apply(block[:, update.columns], start)  # type: ignore[arg-type]
            for update, merger in zip(self._updates, self._mergers, strict=True)
        ]
        if block is not stored:
            stored.copy_(block)
        return found

    def _new_merger(self, left: np.ndarray, right: np.ndarray, scale: float) -> "Merger | NumpyMerger":
        edit = self._edit
        if self._form == "numpy":
            return NumpyMerger(left, right, scale, edit.dtype)
        import torch

        from ablate_shards.kernels.merge.merge_torch import Merger

        there = [torch.from_numpy(np.ascontiguousarray(factor)).to(self._device) for factor in (left, right)]
        return Merger(there[0], there[1], scale, torch_dtype(edit.dtype), form=self._form)


class _Counted:
    """Measured while it is changed, as the norms are known before a block is written: what such sections share."""

    gathers, light = False, True

    def __init__(self, edit: MergeEdit, each: Each) -> None:
        self._edit, self.each = edit, each
        self.start, self.end = edit.start, edit.end
        #: By the offset of a block.
        self._squares: dict[int, _Squares] = {}

    def gather(self, read: Reader) -> None:
        """Begins anew."""
        self._squares = {}

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Does nothing: the digest is the caller's."""

    def measured(self) -> _Squares:
        """Returns the squared norms of the change and of what was there."""
        found = self._squares.values()
        return _Squares(math.fsum(each.change for each in found), math.fsum(each.before for each in found))


class _Rescaled(_Counted):
    """A matrix that an update is added to, and that is then given the norms of DoRA: what such sections share.

    ``U = W + s·B·A`` is computed in float64.
    """

    def __init__(self, edit: MergeEdit, adapter: Adapter, factors: _Factors, each: Each) -> None:
        super().__init__(edit, each)
        self._adapter, self._factors = adapter, factors
        self._row_bytes = _row_bytes(edit)
        self.block = max(1, PIECE_ELEMENTS // edit.shape[-1]) * self._row_bytes
        self._begin = Beginning(edit, adapter)
        self.gathers = self._begin.gathers
        self._left = self._right = self._magnitudes = np.empty(0)

    def gather(self, read: Reader) -> None:
        """Reads the factors and the norms."""
        super().gather(read)
        left, right = self._factors()
        self._left, self._right = left.astype(np.float64), self._edit.scale * right.astype(np.float64)
        self._magnitudes = self._adapter.read(str(self._edit.magnitude)).astype(np.float64)
        self._begin.gather(read)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Adds the update to a block of rows and rescales them."""
        old = decoded(self._numbers(raw), np.float64)
        wanted = self._updated(raw, offset)
        wanted *= self._factor(wanted, (offset - self.start) // self._row_bytes)
        if not (np.abs(wanted) <= GREATEST[self._edit.dtype]).all():
            refuse(self._edit, finite=bool(np.isfinite(old).all()))
        self._squares[offset] = _Squares(float(np.square(wanted - old).sum()), float(np.square(old).sum()))
        encode(wanted, self._numbers(raw))

    def _updated(self, raw: np.ndarray, offset: int) -> np.ndarray:
        """Returns U of a block of rows, in float64; overwrites the block."""
        self._begin.apply(raw, offset)
        first, stored = (offset - self.start) // self._row_bytes, self._numbers(raw)
        return decoded(stored, np.float64) + self._left[first : first + len(stored)] @ self._right

    def _numbers(self, raw: np.ndarray) -> np.ndarray:
        return raw.view(STORED[self._edit.dtype]).reshape(-1, self._edit.shape[-1])

    def _factor(self, updated: np.ndarray, first: int) -> np.ndarray:
        """Returns what rows, from the first on, are multiplied by."""
        raise NotImplementedError

    def _refuse_zero(self, what: str) -> NoReturn:
        raise ExecuteError(
            f"{self._edit.name}: {what} is zero with the adapter added, so it has no direction that DoRA could give a "
            "norm; train the adapter on this base"
        )


class _RescaledRows(_Rescaled):
    """A weight ``[out, in]``, ``W'_i = m_i·U_i / ‖U_i‖`` for each row: see ``Section``."""

    def _factor(self, updated: np.ndarray, first: int) -> np.ndarray:
        norms = np.linalg.norm(updated, axis=1)
        if not norms.all():
            self._refuse_zero(f"row {first + int(np.argmin(norms))}")
        factor: np.ndarray = self._magnitudes[first : first + len(updated), None] / norms[:, None]
        return factor


class _RescaledColumns(_Rescaled):
    """A weight ``[in, out]`` or an embedding, whose columns are given the norms: see ``Section``."""

    def __init__(self, edit: MergeEdit, adapter: Adapter, factors: _Factors, each: Each) -> None:
        super().__init__(edit, adapter, factors, each)
        self.gathers = True

    def gather(self, read: Reader) -> None:
        """Takes the norms of the columns."""
        super().gather(read)
        squares = np.zeros(self._edit.shape[-1])

        def take(offset: int, turn: "Turn | None") -> None:
            raw = read(offset, min(self.block, self.end - offset))
            add = functools.partial(np.add, squares, np.square(self._updated(raw, offset)).sum(axis=0), squares)
            turn.do(add) if turn else add()

        self.each(range(self.start, self.end, self.block), take)
        if not squares.all():
            self._refuse_zero(f"column {int(np.argmin(squares))}")
        self._magnitudes /= np.sqrt(squares)

    def _factor(self, updated: np.ndarray, first: int) -> np.ndarray:
        return self._magnitudes


class _Kept(_Counted):
    """Rows of a tensor that stay as they are: see ``Section``."""

    def __init__(self, edit: MergeEdit, first: int, last: int, each: Each) -> None:
        super().__init__(edit, each)
        self.start, self.end = (edit.start + row * _row_bytes(edit) for row in (first, last))
        self.block = PIECE_ELEMENTS * ITEM_BYTES[edit.dtype]

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Changes nothing."""
        old = decoded(raw.view(STORED[self._edit.dtype]), np.float64)
        self._squares[offset] = _Squares(0.0, float(np.square(old).sum()))


class _WholeParameter(_Counted):
    """A parameter that is added to or replaced, piece by piece: see ``Section``."""

    def __init__(self, edit: MergeEdit, adapter: Adapter, each: Each) -> None:
        super().__init__(edit, each)
        self._adapter = adapter
        self.block = PIECE_ELEMENTS * ITEM_BYTES[edit.dtype]

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Adds to or replaces a piece."""
        edit, stored = self._edit, raw.view(STORED[self._edit.dtype])
        old = decoded(stored, np.float64)
        first = (offset - edit.start) // stored.itemsize
        given = self._adapter.read(edit.source[0], first, len(stored)).astype(np.float64)
        wanted = old + edit.scale * given if edit.kind == "bias" else given
        if not (np.abs(wanted) <= GREATEST[edit.dtype]).all():
            refuse(edit, finite=bool(np.isfinite(old).all()))
        self._squares[offset] = _Squares(float(np.square(wanted - old).sum()), float(np.square(old).sum()))
        encode(wanted, stored)


class _TokenRows(_Counted):
    """A parameter of which some rows are replaced, the rows of trained tokens: see ``Section``."""

    def __init__(self, edit: MergeEdit, adapter: Adapter, each: Each) -> None:
        super().__init__(edit, each)
        self._adapter = adapter
        self._row_bytes = _row_bytes(edit)
        self.block = max(1, PIECE_ELEMENTS // edit.shape[-1]) * self._row_bytes
        self._begin = Beginning(edit, adapter)
        self._places = sorted((token, place) for place, token in enumerate(edit.tokens))

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Replaces the rows that lie in a block."""
        edit = self._edit
        self._begin.apply(raw, offset)
        width = edit.shape[-1]
        stored = raw.view(STORED[edit.dtype]).reshape(-1, width)
        change, before = 0.0, float(np.square(decoded(stored, np.float64)).sum())
        first = (offset - edit.start) // self._row_bytes
        for at in range(bisect.bisect_left(self._places, (first, 0)), len(self._places)):
            token, place = self._places[at]
            if token >= first + len(stored):
                break
            row = stored[token - first]
            given = self._adapter.read(edit.source[0], place * width, width).astype(np.float64)
            if not (np.abs(given) <= GREATEST[edit.dtype]).all():
                refuse(edit, finite=True)
            change += float(np.square(given - decoded(row, np.float64)).sum())
            encode(given, row)
        self._squares[offset] = _Squares(change, before)


def _row_bytes(edit: MergeEdit) -> int:
    return edit.shape[-1] * ITEM_BYTES[edit.dtype]
