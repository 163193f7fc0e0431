"""Reads activation dumps in bounded memory: which layers, which prompts, chunk by chunk as float64."""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ablate_shards.errors import ActivationsError, CheckpointError
from ablate_shards.surgery.checkpoint import read_header

__all__ = [
    "ACTIVATIONS_FORMAT",
    "LABELS",
    "ActivationDump",
    "Label",
    "open_activations",
    "read_npz",
    "read_pickled_tensors",
]

ACTIVATIONS_FORMAT = "ablate-shards.activations/1"

Label = Literal["positive", "negative"]

LABELS: tuple[Label, Label] = ("positive", "negative")

_NAME = re.compile(r"(?P<label>positive|negative)\.layers\.(?P<layer>\d{1,5})")
_FOREIGN = {"harmful": "positive", "harmless": "negative"}
_FOREIGN_NAME = re.compile(r"(?P<label>harmful|harmless)_(?P<layer>\d{1,5})")
_CHUNK_BYTES = 16 << 20
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


class _Part(NamedTuple):
    """The activations of one label and layer in one file."""

    path: Path
    dtype: str
    rows: int
    start: int
    array: np.ndarray | None


@dataclass(frozen=True, slots=True)
class ActivationDump:
    """An activation dump whose headers have been read.

    Attributes:
        path: The file or folder.
        layers: The layers it holds, ascending; layer i is the residual stream after decoder layer i.
        hidden_size: Length of an activation.
        metadata: The metadata of its (first) file.
        means_only: Whether it holds class means instead of prompts.
    """

    path: Path
    layers: tuple[int, ...]
    hidden_size: int
    metadata: Mapping[str, str]
    means_only: bool
    _parts: Mapping[tuple[Label, int], tuple[_Part, ...]]

    def counts(self, layer: int) -> tuple[int, int]:
        """Returns how many positive and negative prompts a layer has."""
        positive, negative = (sum(part.rows for part in self._parts[label, layer]) for label in LABELS)
        return positive, negative

    def chunks(self, layer: int, label: Label) -> Iterator[np.ndarray]:
        """Yields a layer's activations of one label, ``[prompts, d]`` float64, in bounded memory.

        Raises:
            ActivationsError: A value is NaN or infinite.
        """
        done = 0
        for part in self._parts[label, layer]:
            for values in self._read(part):
                if not np.isfinite(values).all():
                    prompt = done + int(np.argmax(~np.isfinite(values).all(axis=1)))
                    raise ActivationsError(
                        f"{part.path}: {label}.layers.{layer} holds NaN or infinite values at prompt {prompt}; "
                        "capture it again without that prompt"
                    )
                done += len(values)
                yield values

    def _read(self, part: _Part) -> Iterator[np.ndarray]:
        step = max(1, _CHUNK_BYTES // (8 * self.hidden_size))
        if part.array is not None:
            for first in range(0, part.rows, step):
                yield part.array[first : first + step].astype(np.float64)
            return
        row_bytes = self.hidden_size * _ITEM_BYTES[part.dtype]
        with part.path.open("rb") as file:
            for first in range(0, part.rows, step):
                count = min(step, part.rows - first)
                raw = os.pread(file.fileno(), count * row_bytes, part.start + first * row_bytes)
                if len(raw) < count * row_bytes:
                    raise ActivationsError(f"{part.path}: ended while it was read; it was changed meanwhile")
                if part.dtype == "BF16":
                    values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
                else:
                    values = np.frombuffer(raw, _NUMPY[part.dtype])
                yield values.reshape(count, self.hidden_size).astype(np.float64)


def open_activations(path: Path) -> ActivationDump:
    """Reads the headers of an activation dump.

    Args:
        path: A safetensors file, a folder of them (the same names are joined over prompts, in the order of
            the file names), an ``.npz`` file with the same names, or a ``.pt`` or ``.refuse`` file with the
            class means of llm-abliteration (``harmful_{i}``, ``harmless_{i}``).

    Returns:
        The dump.

    Raises:
        ActivationsError: The file is missing, malformed, or holds no usable activations.
    """
    if path.suffix == ".npz":
        return _from_arrays(path, read_npz(path), means_only=False)
    if path.suffix in (".pt", ".pth", ".refuse"):
        arrays = {}
        for name, array in read_pickled_tensors(path).items():
            if match := _FOREIGN_NAME.fullmatch(name):
                arrays[f"{_FOREIGN[match['label']]}.layers.{match['layer']}"] = array.reshape(1, -1)
        return _from_arrays(path, arrays, means_only=True)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ActivationsError(f"{path}: a folder without safetensors files; expected an activation dump")
    parts: dict[tuple[Label, int], list[_Part]] = {}
    shapes: list[tuple[Path, str, tuple[int, ...]]] = []
    first: Mapping[str, str] | None = None
    for file in files:
        try:
            shard, metadata = read_header(file)
        except CheckpointError as error:
            raise ActivationsError(str(error)) from error
        if not _is_dump(file, metadata, [tensor.name for tensor in shard.tensors], alone=len(files) == 1):
            continue
        first = metadata if first is None else first
        for tensor in shard.tensors:
            match = _NAME.fullmatch(tensor.name)
            if match is None:
                raise ActivationsError(
                    f"{file}: holds {tensor.name}, expected only positive.layers.N and negative.layers.N"
                )
            if tensor.dtype not in _ITEM_BYTES:
                raise ActivationsError(f"{file}: {tensor.name} is {tensor.dtype}, expected BF16, F16, F32 or F64")
            shapes.append((file, tensor.name, tensor.shape))
            rows = tensor.shape[0] if tensor.shape else 0
            part = _Part(file, tensor.dtype, rows, tensor.start, None)
            parts.setdefault((_label(match["label"]), int(match["layer"])), []).append(part)
    if first is None:
        raise ActivationsError(f"{path}: holds no activation dump; expected tensors positive.layers.N")
    return _dump(path, first, parts, shapes, means_only=False)


def read_pickled_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a ``.pt`` file as float64, by name; nothing is unpickled but tensors and plain types.

    Raises:
        ActivationsError: The file is missing, or holds anything else.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - safe mode
    except FileNotFoundError as error:
        raise ActivationsError(f"{path}: the file does not exist") from error
    except Exception as error:
        raise ActivationsError(
            f"{path}: cannot be read without running code it carries, or is no PyTorch file; expected plain "
            "tensors by name"
        ) from error
    if not isinstance(content, dict):
        raise ActivationsError(f"{path}: expected tensors by name, found {type(content).__name__}")
    return {
        str(name): value.detach().double().numpy()
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads an ``.npz`` file of plain arrays, by name."""
    try:
        with np.load(path, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except FileNotFoundError as error:
        raise ActivationsError(f"{path}: the file does not exist") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ActivationsError(f"{path}: not an .npz file of plain arrays; save it with numpy.savez") from error


def _from_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, means_only: bool) -> ActivationDump:
    parts: dict[tuple[Label, int], list[_Part]] = {}
    shapes = []
    for name, array in arrays.items():
        if (match := _NAME.fullmatch(name)) is None:
            continue
        if not np.issubdtype(array.dtype, np.floating):
            raise ActivationsError(f"{path}: {name} is {array.dtype}, expected a floating-point type")
        shapes.append((path, name, array.shape))
        part = _Part(path, "", array.shape[0] if array.ndim else 0, 0, array)
        parts.setdefault((_label(match["label"]), int(match["layer"])), []).append(part)
    if not parts:
        raise ActivationsError(
            f"{path}: holds {', '.join(sorted(arrays)[:4]) or 'no tensors'}, expected positive.layers.N and "
            "negative.layers.N (or harmful_N and harmless_N)"
        )
    return _dump(path, {}, parts, shapes, means_only=means_only)


def _dump(
    path: Path,
    metadata: Mapping[str, str],
    parts: Mapping[tuple[Label, int], list[_Part]],
    shapes: list[tuple[Path, str, tuple[int, ...]]],
    *,
    means_only: bool,
) -> ActivationDump:
    hidden = None
    if (said := metadata.get("hidden_size")) is not None:
        if not said.isdigit():
            raise ActivationsError(f"{path}: hidden_size in the metadata is {said!r}, expected a number")
        hidden = int(said)
    for file, name, shape in shapes:
        if len(shape) != 2:
            raise ActivationsError(f"{file}: {name} has shape {list(shape)}, expected [prompts, hidden size]")
        hidden = shape[1] if hidden is None else hidden
        if shape[1] != hidden:
            raise ActivationsError(
                f"{file}: {name} has hidden size {shape[1]}, expected {hidden} as elsewhere in the dump"
            )
    layers = sorted({layer for _, layer in parts})
    for layer in layers:
        for label in LABELS:
            if not sum(part.rows for part in parts.get((label, layer), [])):
                raise ActivationsError(
                    f"{path}: layer {layer} has no {label} activations; a direction needs both labels"
                )
    return ActivationDump(
        path=path,
        layers=tuple(layers),
        hidden_size=hidden or 0,
        metadata=metadata,
        means_only=means_only,
        _parts={key: tuple(value) for key, value in parts.items()},
    )


def _is_dump(path: Path, metadata: Mapping[str, str], names: list[str], *, alone: bool) -> bool:
    found = metadata.get("format")
    if found == ACTIVATIONS_FORMAT or (names and all(_NAME.fullmatch(name) for name in names)):
        if found not in (None, ACTIVATIONS_FORMAT, "pt", "np"):
            raise ActivationsError(f"{path}: expected {ACTIVATIONS_FORMAT}, found {found}")
        return True
    if alone:
        shown = ", ".join(sorted(names)[:3]) or "no tensors"
        raise ActivationsError(
            f"{path}: is not an activation dump (format {found or 'not given'}; holds {shown}); expected "
            "positive.layers.N and negative.layers.N"
        )
    return False


def _label(text: str) -> Label:
    return "positive" if text == "positive" else "negative"
