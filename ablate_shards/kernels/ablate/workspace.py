"""Where ablations are computed, in which form, and with which scratch memory."""

from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.kernels.choose import Form
from ablate_shards.kernels.form import Arithmetic, Arrays
from ablate_shards.kernels.native.native import NativeArrays

if TYPE_CHECKING:
    import torch

__all__ = ["Workspace"]


class Workspace:
    """Where and how to compute, with scratch memory that is kept from one matrix to the next; one per thread.

    In the native form nothing of it but :meth:`raw` is a thread's own.

    Args:
        device: Where the blocks are: ``cpu``, ``cuda:0`` or any other that torch knows.
        form: ``native``, ``torch`` or ``triton``.
        chunks_at_once: How much scratch memory torch takes for float32, in chunks of 1.8 MiB; the result does not
            depend on it.

    Attributes:
        arrays: Where blocks and sums live.
    """

    def __init__(self, device: "torch.device | str", form: Form, *, chunks_at_once: int = 2) -> None:
        self.arrays = _arrays(device, form, chunks_at_once)
        self._raw = np.empty(0, np.uint8)
        self._kept: tuple[tuple[int, int], tuple[Arithmetic, Arithmetic]] | None = None

    def forms(self, chunk_rows: int, cols: int) -> tuple[Arithmetic, Arithmetic]:
        """Return the arithmetic for matrices cut into chunks: in float32, and in float64."""
        kept = self._kept
        if kept is None or kept[0] != (chunk_rows, cols):
            self._kept = kept = None  # frees the scratch memory before there is more of it
            self._kept = kept = ((chunk_rows, cols), self.arrays.forms(chunk_rows, cols))
        return kept[1]

    def raw(self, count: int) -> np.ndarray:
        """Return memory ``[count]`` uint8 for bytes read from and written to a file; the next call returns it again."""
        if len(self._raw) < count:
            self._raw = self.arrays.buffer(count)
        return self._raw[:count]


def _arrays(device: "torch.device | str", form: Form, chunks_at_once: int) -> Arrays:
    if form in ("native", "numpy"):
        return NativeArrays()
    # Torch and Triton are imported only where they run.
    import torch

    if form == "triton":
        from ablate_shards.kernels.ablate.project_triton import TritonArrays

        return TritonArrays(torch.device(device))
    from ablate_shards.kernels.ablate.project_torch import TorchArrays

    return TorchArrays(torch.device(device), chunks_at_once)
