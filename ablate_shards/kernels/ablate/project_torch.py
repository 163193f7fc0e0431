"""The sums and the update of an ablation in PyTorch, chunk by chunk, on any device."""

import math
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ablate_shards.kernels.ablate.stepwise import Stepwise
from ablate_shards.kernels.form import GROUP_ROWS, Arithmetic, in_range

__all__ = ["DTYPES", "TorchArrays", "TorchForm"]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

SEGMENT = 8192
"""Columns that one float32 reduction along a row covers; the segments of a row are added in float64."""

ALIGNED = 16
"""Elements in a cache line; what a product reads starts on one, wherever its block starts."""


class TorchForm(Stepwise):
    """Chunk arithmetic in one precision, over scratch memory that is allocated once.

    Blocks are ``[matrices, rows, cols]`` in the storage dtype and start at a chunk; :class:`Arithmetic` says what the
    methods do.

    Args:
        precision: float32 or float64.
        chunk_rows: Rows that are loaded at once; a multiple of 64, or fewer than that.
        cols: Columns of the stored matrices.
        device: Where to compute; blocks are brought here a few chunks at a time.
        state: Where float64 sums are kept.
        chunks_at_once: Chunks that the scratch memory holds; the result does not depend on it.
    """

    def __init__(
        self,
        precision: torch.dtype,
        chunk_rows: int,
        cols: int,
        device: torch.device,
        state: torch.device,
        chunks_at_once: int = 1,
    ) -> None:
        self._precision = precision
        self._chunk_rows = chunk_rows
        self._cols = cols
        self._device = device
        self._state = state
        self._group_rows = min(chunk_rows, GROUP_ROWS)
        self._tile_rows = chunk_rows * chunks_at_once

    @property
    def is_double(self) -> bool:
        """Whether the precision is float64 rather than float32."""
        return self._precision == torch.float64

    def rows(self, block: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor:
        """Reduce along each row."""
        count = 0 if weights is None else weights.shape[1]
        batch, rows, cols = block.shape
        segments = [slice(low, low + SEGMENT) for low in range(0, cols, SEGMENT)]
        sums = self._empty(batch, len(segments), count + squares, rows)
        for entry, matrix in enumerate(block):
            lines = () if weights is None else weights[min(entry, len(weights) - 1)]
            parts = torch.split(sums[entry], self._chunk_rows, dim=-1)
            for chunk, part in zip(torch.split(matrix, self._chunk_rows), parts, strict=True):
                tile = self._load(chunk)
                for segment, outs in zip(segments, part, strict=True):
                    for line, out in zip(lines, outs, strict=False):
                        torch.mv(tile[:, segment], line[segment], out=out)
                    if squares:
                        torch.linalg.vector_norm(tile[:, segment], dim=1, out=outs[count])
        double = sums.to(self._state).double()
        if squares:
            double[:, :, count].square_()
        return double.sum(dim=1) if len(segments) > 1 else double[:, 0]

    def add_columns(
        self,
        block: Tensor,
        weights: Tensor | None,
        into: Tensor,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], Tensor],
    ) -> None:
        """Reduce along each column of each chunk, and add the chunks in order."""
        count = 0 if weights is None else weights.shape[1]
        size, group = self._chunk_rows, self._group_rows
        at_once, groups = self._tile_rows // group, size // group
        for entry, (matrix, total) in enumerate(zip(block.unbind(), into.unbind(), strict=True)):
            chunks = math.ceil(len(matrix) / size)
            sums = self._empty(count + squares, chunks * groups, 1, self._cols)
            outs = [torch.split(line, at_once) for line in sums.unbind()]
            lines: list[tuple[Tensor, ...]] = []
            if weights is not None:
                laid = self._by_group(weights[min(entry, len(weights) - 1)], chunks * groups)
                lines = [torch.split(line, at_once) for line in laid.unbind()]
            for place, part in enumerate(torch.split(matrix, self._tile_rows)):
                self._load(part)
                tile = self._tile
                if len(part) < self._tile_rows:
                    tile = tile[: len(outs[0][place]) * group]
                    tile[len(part) :] = 0
                grouped = tile.view(-1, group, self._cols)
                # One thin product per direction is faster than one product for all of them.
                for line, out in zip(lines, outs, strict=False):
                    torch.bmm(line[place], grouped, out=out[place])
                if squares:
                    torch.mul(tile, tile, out=tile)
                    torch.bmm(self._ones[: len(grouped)], grouped, out=outs[count][place])
            exact = sums[:, :, 0].to(self._state).double()
            if groups > 1:
                exact = exact.view(-1, chunks, groups, self._cols).sum(dim=2)
            failed: Container[tuple[int, int]] = unsafe or ()
            if unsafe is None and not in_range(exact[count]):
                failed = {(entry, chunk) for chunk, found in enumerate(exact[count]) if not in_range(found)}
            for chunk, part in enumerate(exact.unbind(1)):
                total.add_(repair(entry, chunk) if (entry, chunk) in failed else part)

    def update(
        self,
        block: Tensor,
        source: Tensor,
        scale: Tensor | None,
        row_factor: Tensor,
        column_factor: Tensor,
    ) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]``, rounded once."""
        size, limit = self._tile_rows, torch.finfo(block.dtype).max
        for entry, (target, matrix) in enumerate(zip(block.unbind(), source.unbind(), strict=True)):
            columns = column_factor[min(entry, len(column_factor) - 1)].unbind()
            rows = [torch.split(line[:, None], size) for line in row_factor[min(entry, len(row_factor) - 1)].unbind()]
            sources, targets = torch.split(matrix, size), torch.split(target, size)
            scales: Sequence[Tensor | None] = [None] * len(sources)
            if scale is not None:
                by_column = scale.shape[1] == 1 and len(matrix) != 1
                scales = [scale[entry]] * len(sources) if by_column else torch.split(scale[entry], size)
            for place, (given, wanted, factor) in enumerate(zip(sources, targets, scales, strict=True)):
                tile = self._load(given)
                if factor is not None:
                    tile.mul_(factor)
                for row, column in zip(rows, columns, strict=True):
                    tile.addcmul_(row[place], column, value=-1)
                if self.is_double:
                    tile.clamp_(-limit, limit)
                wanted.copy_(tile if self._device == block.device else tile.to(wanted.dtype))

    @cached_property
    def _tile(self) -> Tensor:
        return self._empty(self._tile_rows, self._cols)

    @cached_property
    def _ones(self) -> Tensor:
        group = self._group_rows
        return torch.ones(self._tile_rows // group, 1, group, dtype=self._precision, device=self._device)

    def _load(self, part: Tensor) -> Tensor:
        """Bring rows to the scratch memory."""
        tile = self._tile if len(part) == self._tile_rows else self._tile[: len(part)]
        tile.copy_(part if part.device == self._device else part.to(self._device))
        return tile

    def _by_group(self, lines: Tensor, groups: int) -> Tensor:
        """Lay out ``[k, rows]`` as ``[k, groups, 1, rows of a group]``, aligned, with zeros beyond."""
        (count, rows), group = lines.shape, self._group_rows
        if count == 1 and rows == groups * group and lines.data_ptr() % (4 * ALIGNED) == 0:
            return lines.reshape(1, groups, 1, group)
        laid = self._empty(count, groups, 1, math.ceil(group / ALIGNED) * ALIGNED).zero_()
        whole = rows // group
        laid[:, :whole, 0, :group] = lines[:, : whole * group].reshape(count, whole, group)
        if rows % group:
            laid[:, whole, 0, : rows % group] = lines[:, whole * group :]
        return laid[..., :group]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._precision, device=self._device)


class TorchArrays:
    """Blocks and sums in torch tensors; :class:`Arrays` says what the methods do.

    Args:
        device: Where the blocks are.
        chunks_at_once: Chunks that the scratch memory holds for float32; the result does not depend on it.
    """

    xp: ModuleType = torch
    #: Of a chunk: 1.8 MiB of float32 scratch, and twice that where float64 is needed.
    chunk_elements = 128 * 3584

    def __init__(self, device: torch.device, chunks_at_once: int = 2) -> None:
        self.device = device
        self._chunks_at_once = chunks_at_once
        # MPS has no float64, and not every XPU has it.
        self.state_device = device if device.type in ("cpu", "cuda") else torch.device("cpu")

    def forms(self, chunk_rows: int, cols: int) -> tuple[Arithmetic, Arithmetic]:
        """Return the arithmetic in float32 and in float64."""
        state = self.state_device
        return (
            TorchForm(torch.float32, chunk_rows, cols, self.device, state, self._chunks_at_once),
            TorchForm(torch.float64, chunk_rows, cols, state, state),
        )

    def zeros(self, *shape: int) -> Tensor:
        """Return float64 zeros for sums."""
        return torch.zeros(shape, dtype=torch.float64, device=self.state_device)

    def state(self, values: np.ndarray) -> Tensor:
        """Bring float64 values to where the sums are."""
        return torch.from_numpy(values).to(self.state_device)

    def single(self, values: Tensor) -> Tensor:
        """Bring sums in float32 to where the blocks are."""
        return values.to(torch.float32).to(self.device)

    def host(self, values: Tensor) -> np.ndarray:
        """Bring sums to NumPy."""
        return values.cpu().numpy()

    def clone(self, block: Tensor) -> Tensor:
        """Return a contiguous copy."""
        return block.clone(memory_format=torch.contiguous_format)

    def keep(self, block: Tensor, original: Tensor, still: Tensor) -> None:
        """Put back what must not change by a bit."""
        block.copy_(torch.where(still.to(block.device), original, block))

    def buffer(self, count: int) -> np.ndarray:
        """Return new memory for bytes, pinned for CUDA: that is copied from and to at full speed."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()

    def load(self, raw: np.ndarray, dtype: str, shape: tuple[int, int, int]) -> Tensor:
        """Return a block made of stored bytes, on the device."""
        return torch.from_numpy(raw).view(DTYPES[dtype]).view(shape).to(self.device)

    def store(self, block: Tensor, raw: np.ndarray) -> None:
        """Put the bytes of a block where they were loaded from."""
        if self.device.type != "cpu":
            torch.from_numpy(raw).view(block.dtype).view(block.shape).copy_(block)

    def quiet(self) -> AbstractContextManager[None]:
        """Do nothing: torch does not warn."""
        return nullcontext()
