"""Applies plans to a model in memory, with the bytes that ``ablate`` writes, and takes them back to the byte."""

import functools
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ablate_shards.errors import SearchError
from ablate_shards.surgery.anatomy.architecture import common_ending
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.edit.ablation_editor import AblationEditor, TensorResult
from ablate_shards.surgery.edit.blocks import Channels
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.machine.devices import torch_dtype
from ablate_shards.surgery.machine.files import pread_into
from ablate_shards.surgery.machine.system import open_file
from ablate_shards.surgery.plan.edits import TensorEdit
from ablate_shards.surgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["EditableModel"]

#: Columns of a matrix that are compared before all of it is.
_CORNER = 8


class EditableModel:
    """A model in memory whose residual writers can be edited, and taken back to what its checkpoint holds.

    Every edit starts from the bytes of the shards and is computed as ``ablate`` computes it. Where a parameter holds a
    tensor in another type or the other way round, as transformers may load it, the edited bytes are converted likewise.

    Args:
        checkpoint: What the model was loaded from, on this machine.
        network: The model of transformers.
        run: What does the arithmetic, how much memory it takes, and how many tensors are edited at a time.
        keep: Bytes of stored tensors that may stay on the host once they were read; those of a model on CUDA stay in
            pinned memory, from which a device takes them back without waiting. What does not fit is read again.
    """

    def __init__(self, checkpoint: Checkpoint, network: Any, run: RunOptions, *, keep: int = 0) -> None:
        self._checkpoint, self._run = checkpoint, run
        self._parameters: dict[str, torch.Tensor] = dict(network.named_parameters())
        self._shards = {shard.name: open_file(shard.path) for shard in checkpoint.shards}
        self._places: dict[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self._keep = keep
        self._edited: dict[str, TensorEdit] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.restore()
        finally:
            for descriptor in self._shards.values():
                os.close(descriptor)

    def apply(self, plan: Plan) -> Mapping[str, TensorResult]:
        """Makes the model what ``ablate`` would make of it by a plan, whatever it was edited by before.

        Returns:
            What was measured of each edited tensor, its digest among it.

        Raises:
            ExecuteError: A tensor cannot be edited.
            SearchError: The model holds a tensor in no parameter, or a tensor holds codes.
        """
        for edit in plan.edits:
            if edit.scales is not None:
                raise SearchError(
                    f"{edit.name}: holds codes ({edit.dtype}), and a search edits BF16, F16 or F32; search on the "
                    "checkpoint dequantised (`ablate-shards dequantise`), and use the recipe that it finds on this one"
                )
            self.place(edit)
        editor = AblationEditor(self._run.device, self._run.memory, self._run.jobs, threading.Event(), plan.bases)
        wanted = {edit.name: edit for edit in plan.edits}
        stale = [edit for name, edit in self._edited.items() if name not in wanted]
        self._edited |= wanted
        with editor.one_thread_each(), ThreadPoolExecutor(editor.jobs) as pool:
            editor.share(pool.submit)
            list(pool.map(self._restore, stale))
            results = dict(zip(wanted, pool.map(functools.partial(self._edit, editor), plan.edits), strict=True))
        self._edited = wanted
        return results

    def restore(self) -> None:
        """Takes every edit back."""
        for edit in self._edited.values():
            self._restore(edit)
        self._edited = {}

    def _edit(self, editor: AblationEditor, edit: TensorEdit) -> TensorResult:
        raw = self._memory(edit)
        target = raw.data

        def write(data: memoryview, offset: int) -> None:
            target[offset - edit.start : offset - edit.start + len(data)] = data

        def reread(data: memoryview, offset: int) -> None:
            data[:] = target[offset - edit.start : offset - edit.start + len(data)]

        result = editor.edit(edit, Channels(functools.partial(self._read, edit), write, reread))
        self._load(edit, raw)
        return result

    def _restore(self, edit: TensorEdit) -> None:
        if (kept := self._kept.get(edit.name)) is not None:
            self.place(edit).copy_(_values(edit, kept), non_blocking=True)  # nobody writes to what is kept
            return
        raw = self._memory(edit)
        pread_into(self._shards[edit.shard], raw.data, edit.start)
        self._load(edit, raw)

    def _read(self, edit: TensorEdit, data: memoryview, offset: int) -> None:
        """Fills a buffer from an offset of the shard that holds a tensor, or from what is kept of that."""
        if (kept := self._kept.get(edit.name)) is not None:
            start = offset - edit.start
            data[:] = kept.numpy().data[start : start + len(data)]
            return
        pread_into(self._shards[edit.shard], data, offset)

    def _stored(self, edit: TensorEdit, device: str) -> "torch.Tensor":
        """Returns a tensor's bytes as the shard has them, and keeps them where there is room."""
        import torch

        size = edit.end - edit.start
        kept = size <= self._keep
        stored = torch.empty(size, dtype=torch.uint8, pin_memory=kept and device == "cuda")
        pread_into(self._shards[edit.shard], stored.numpy().data, edit.start)
        if kept:
            self._keep -= size
            self._kept[edit.name] = stored
        return stored

    def _memory(self, edit: TensorEdit) -> np.ndarray:
        """Returns memory for a tensor's bytes: the parameter's own where it holds them as they are stored."""
        place = self.place(edit)
        if place.device.type == "cpu" and place.is_contiguous() and place.dtype == torch_dtype(edit.dtype):
            import torch

            found: np.ndarray = place.view(torch.uint8).reshape(-1).numpy()
            return found
        return np.empty(edit.end - edit.start, np.uint8)

    def _load(self, edit: TensorEdit, raw: np.ndarray) -> None:
        """Brings bytes into the parameter, unless they are its own."""
        import torch

        place = self.place(edit)
        values = _values(edit, torch.from_numpy(raw))
        if values.data_ptr() != place.data_ptr():
            place.copy_(values)

    def place(self, edit: TensorEdit) -> "torch.Tensor":
        """Returns where the model holds a tensor: a parameter, or a part of one.

        Raises:
            SearchError: Nowhere.
        """
        if edit.name not in self._places:
            device = next((parameter.device.type for parameter in self._parameters.values()), "cpu")
            values = _values(edit, self._stored(edit, device))
            found = next((view for view in self._candidates(edit) if _holds(view, values)), None)
            if found is None:
                raise SearchError(
                    f"{edit.name}: no parameter of the loaded model holds it as the checkpoint does, so it cannot be "
                    "edited in memory; leave its component or layer out"
                )
            self._places[edit.name] = found
        return self._places[edit.name]

    def _candidates(self, edit: TensorEdit) -> "Iterator[torch.Tensor]":
        """Yields parameters and parts of them that have a tensor's shape, the likeliest first."""
        parts = edit.name.split(".")

        def unlike(name: str) -> tuple[int, int]:
            return -common_ending(edit.name, name), len(set(parts) ^ set(name.split(".")))

        for name in sorted(self._parameters, key=unlike):
            parameter = self._parameters[name].detach()
            numbers = [int(part) for part in parts if part.isdecimal()]
            whole = [parameter] if parameter.ndim == len(edit.shape) else []
            if parameter.ndim == len(edit.shape) + 1:
                # One of a stack of experts; its own number first.
                order = sorted(range(len(parameter)), key=lambda number: number not in numbers)
                whole = [parameter[number] for number in order]
            for view in whole:
                if tuple(view.shape) == edit.shape:
                    yield view
                if view.ndim >= 2 and tuple(view.mT.shape) == edit.shape:
                    yield view.mT


def _values(edit: TensorEdit, stored: "torch.Tensor") -> "torch.Tensor":
    """Returns stored bytes as the tensor that they are."""
    return stored.view(torch_dtype(edit.dtype)).view(edit.shape)


def _holds(view: "torch.Tensor", values: "torch.Tensor") -> bool:
    """Returns whether a part of a parameter holds these values, in its own type."""

    def same(one: "torch.Tensor", other: "torch.Tensor") -> bool:
        return bool((one.cpu() == other.to(one.dtype)).all())

    return same(view[..., :_CORNER], values[..., :_CORNER]) and same(view, values)
