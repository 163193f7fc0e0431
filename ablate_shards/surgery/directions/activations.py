"""Reads activation dumps in bounded memory: which layers, which prompts, chunk by chunk as float64."""

import io
import math
import mmap
import os
import re
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from ablate_shards.errors import ActivationsError, CheckpointError
from ablate_shards.kernels.native.native import guard
from ablate_shards.surgery.checkpoint.headers import read_header

__all__ = [
    "ACTIVATIONS_FORMAT",
    "LABELS",
    "MEASUREMENT_SUFFIXES",
    "ActivationDump",
    "Kept",
    "Label",
    "open_activations",
    "read_npz",
    "read_pickled_tensors",
]

ACTIVATIONS_FORMAT = "ablate-shards.activations/1"

Label = Literal["positive", "negative"]

_Stream: TypeAlias = io.RawIOBase | io.BufferedIOBase

LABELS: tuple[Label, Label] = ("positive", "negative")

#: Files of llm-abliteration; their tensors are pickled.
MEASUREMENT_SUFFIXES = frozenset({".pt", ".pth", ".refuse"})

_FAMILY = ACTIVATIONS_FORMAT.rpartition("/")[0]
_EXPECTED = "expected positive.layers.N and negative.layers.N"
_NAME = re.compile(r"(?P<label>positive|negative)\.layers\.(?P<layer>0|[1-9]\d{0,4})")
_MEASURED = {"positive": "harmful", "negative": "harmless"}
_MEASURED_NAME = re.compile(r"(?:harmful|harmless)_(?P<index>0|[1-9]\d{0,4})")
#: What two files of one dump may not contradict each other in.
_SAME = ("model", "position", "positive_label", "negative_label")
#: A chunk as stored and as float64 stays in the processor's cache between the steps over it.
_CHUNK_BYTES = 4 << 20
_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_NPZ_DTYPES = {np.dtype(stored): name for name, stored in _DTYPES.items() if name != "BF16"}
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NOT_AN_NPZ = (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class _Array(NamedTuple):
    """An array in a file, not read yet.

    ``dtype`` is a key of ``_DTYPES`` or the name of one that cannot be used; ``open`` gives a stream that
    begins with the array's first byte, which is byte ``start`` of a plain file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    open: Callable[[], _Stream]
    start: int | None = None


@dataclass(frozen=True, slots=True)
class ActivationDump:
    """An activation dump whose headers have been read.

    Attributes:
        path: The file or folder.
        layers: The layers it holds, ascending; layer i is the residual stream after decoder layer i.
        hidden_size: Length of an activation.
        metadata: What its files say of themselves.
        means_only: Whether it holds class means instead of prompts.
    """

    path: Path
    layers: tuple[int, ...]
    hidden_size: int
    metadata: Mapping[str, str]
    means_only: bool
    _arrays: Mapping[tuple[Label, int], tuple[_Array, ...]] = field(repr=False)

    def counts(self, layer: int) -> tuple[int, int]:
        """Returns how many positive and negative prompts a layer has."""
        positive, negative = (sum(array.shape[0] for array in self._arrays[label, layer]) for label in LABELS)
        return positive, negative

    def origin(self, layer: int, label: Label, prompt: int) -> str:
        """Returns the file, the tensor and the row that hold a prompt's activations, for an error."""
        arrays = iter(self._arrays[label, layer])
        array = next(arrays)
        while prompt >= array.shape[0]:
            prompt -= array.shape[0]
            array = next(arrays)
        return f"{array.path}: {array.name}, prompt {prompt}"

    def chunks(
        self, layer: int, label: Label, *, multiple: int = 1, kept: "Kept | None" = None
    ) -> Iterator[np.ndarray]:
        """Yields a layer's activations of one label in bounded memory, whatever files they lie in.

        Args:
            layer: The layer.
            label: The label.
            multiple: What the number of prompts in every chunk but the last is a multiple of.
            kept: Where what is read stays for the next pass over the same layer and label.

        Yields:
            ``[prompts, d]`` float64, not checked for NaN; the next chunk overwrites it.

        Raises:
            ActivationsError: A file was changed since its header was read.
        """
        size = self.hidden_size
        rows = max(1, _CHUNK_BYTES // (8 * size * multiple)) * multiple
        kept = Kept(0) if kept is None else kept
        chunk = kept.scratch("chunk", (min(rows, self.counts(layer)[LABELS.index(label)]), size), "<f8")
        filled = 0
        for values in self._pieces(layer, label, kept, rows=len(chunk)):
            if values.dtype == np.uint16:
                # The bits of bfloat16 are the upper half of a float32's.
                wide = kept.scratch("wide", values.shape, "<u4")
                np.copyto(wide, values)
                np.left_shift(wide, 16, out=wide)
                values = wide.view(np.float32)
            with np.errstate(invalid="ignore"):
                chunk[filled : filled + len(values)] = values
            filled += len(values)
            if filled == len(chunk):
                yield chunk
                filled = 0
        if filled:
            yield chunk[:filled]

    def stored(self, layer: int, label: Label, *, kept: "Kept") -> Iterator[np.ndarray]:
        """Yields what :meth:`chunks` does as it is stored, and all of an array at once where it is kept.

        Yields:
            ``[prompts, d]`` uint16 (the bits of bfloat16) or any float; the next array may overwrite it.
        """
        return self._pieces(layer, label, kept, rows=None)

    def _pieces(self, layer: int, label: Label, kept: "Kept", *, rows: int | None) -> Iterator[np.ndarray]:
        """Yields activations as stored; no piece crosses a multiple of ``rows``."""
        arrays = self._arrays[label, layer]
        kept.take((self.path, layer, label), arrays)
        filled = 0
        for number, array in enumerate(arrays):
            done, (prompts, size) = 0, array.shape
            most = rows or (prompts if kept.fits else max(1, _CHUNK_BYTES // (8 * size)))
            with nullcontext(kept.arrays[number]) if kept.fits else array.open() as source:
                while done < prompts:
                    count = min(prompts - done, most - filled)
                    if isinstance(source, np.ndarray):
                        values = source[done : done + count]
                    else:
                        values = kept.scratch("stored", (count, size), _DTYPES[array.dtype])
                        _read_into(source, values, array)
                    yield values
                    filled = (filled + count) % most if rows else 0
                    done += count
            if kept.fits:
                kept.check(array, number)


class Kept:
    """A layer's activations of one label as stored, from one pass to the next, if they fit.

    Those in a plain file are mapped and never copied.

    Args:
        room: Bytes that they may take.

    Attributes:
        fits: Whether what was asked for last fits.
        arrays: What was read, if so.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._scratch: dict[str, np.ndarray] = {}
        self._key: object = None
        self.fits = False
        self.arrays: list[np.ndarray] = []
        self._mapped: list[mmap.mmap | None] = []

    def take(self, key: object, arrays: Iterable[_Array]) -> None:
        """Reads arrays if they fit and are not those that it holds by this key."""
        if key == self._key:
            return
        self._key, self.arrays, self._mapped = None, [], []
        self.fits = sum(_size(array) for array in arrays) <= self._room
        if self.fits:
            for array in arrays:
                values, mapped = _whole(array)
                self.arrays.append(values)
                self._mapped.append(mapped)
            self._key = key

    def check(self, array: _Array, number: int) -> None:
        """Refuses an array, by its number, whose file lost its end: of a page of that, the rest reads as zeros.

        Raises:
            ActivationsError: It did.
        """
        mapped = self._mapped[number]
        if mapped is not None and mapped.size() < (array.start or 0) + _size(array):
            raise _ended(array)

    def scratch(self, use: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Returns memory that the next call for the same use returns again: new memory costs as much as reading."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(self._scratch.get(use, ())) < size:
            self._scratch[use] = np.empty(size, np.uint8)
        return self._scratch[use][:size].view(dtype).reshape(shape)


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
    if path.suffix in MEASUREMENT_SUFFIXES:
        return _dump(path, {}, _measured_arrays(path), means_only=True)
    if path.suffix == ".npz":
        arrays = _npz_arrays(path)
        _refuse_other_names(path, [array.name for array in arrays])
        return _dump(path, {}, [(_key(array.name), array) for array in arrays], means_only=False)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ActivationsError(f"{path}: a folder without safetensors files; name an activation dump")
    found: list[tuple[tuple[Label, int], _Array]] = []
    metadata: dict[str, str] = {}
    used = 0
    for file in files:
        try:
            shard, said = read_header(file)
        except CheckpointError as error:
            raise ActivationsError(str(error)) from error
        names = [tensor.name for tensor in shard.tensors]
        if len(files) > 1 and not _is_dump(said, names):
            continue
        _refuse_other_format(file, said, names)
        for key in _SAME:
            if key in said and said[key] != metadata.get(key, said[key]):
                raise ActivationsError(
                    f"{file}: its metadata say {key} {said[key]!r}, but those of a file before it {metadata[key]!r}; "
                    "keep only files that were captured alike"
                )
        metadata |= said
        used += 1
        size = said.get("hidden_size")
        for tensor in shard.tensors:
            if size is not None and tensor.shape and str(tensor.shape[-1]) != size:
                raise ActivationsError(
                    f"{file}: {tensor.name} has hidden size {tensor.shape[-1]}, but its metadata say hidden_size "
                    f"{size!r}; capture it again"
                )
            opened = partial(_open_at, file, tensor.start)
            array = _Array(file, tensor.name, tensor.dtype, tensor.shape, opened, tensor.start)
            found.append((_key(tensor.name), array))
    if not used:
        raise ActivationsError(f"{path}: none of its {len(files)} safetensors files is an activation dump; {_EXPECTED}")
    return _dump(path, metadata, found, means_only=False)


def read_pickled_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a ``.pt`` file by name, floating-point ones as float64; no code it carries is run.

    Raises:
        ActivationsError: The file is missing, or holds anything but tensors and plain types.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - safe mode
        if isinstance(content, dict | torch.Tensor):
            return {
                name or "a tensor": (value.detach().double() if value.is_floating_point() else value).numpy()
                for name, value in _by_path("", content)
                if isinstance(value, torch.Tensor)
            }
    except FileNotFoundError as error:
        raise ActivationsError(f"{path}: the file does not exist") from error
    except Exception as error:
        raise ActivationsError(
            f"{path}: cannot be read without running code it carries, or is not a PyTorch file; expected plain "
            "tensors by name"
        ) from error
    raise ActivationsError(
        f"{path}: expected plain tensors by name, found {type(content).__name__}; save them in a dictionary, each "
        "under a name that tells its layer"
    )


def _by_path(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a dictionary holds by name, with that of the dictionary before it where one lies in another."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _by_path(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a small ``.npz`` file by name, as float64.

    Raises:
        ActivationsError: The file is missing, or holds anything but plain floating-point arrays.
    """
    found = {}
    for array in _npz_arrays(path):
        _refuse_dtype(array)
        values = np.empty(array.shape, _DTYPES[array.dtype])
        with array.open() as stream:
            _read_into(stream, values, array)
        found[array.name] = values.astype(np.float64)
    return found


def _dump(
    path: Path,
    metadata: Mapping[str, str],
    found: Iterable[tuple[tuple[Label, int], _Array]],
    *,
    means_only: bool,
) -> ActivationDump:
    arrays: dict[tuple[Label, int], list[_Array]] = {}
    first: _Array | None = None
    for key, array in found:
        _refuse_dtype(array)
        if len(array.shape) != 2 or not array.shape[1]:
            raise ActivationsError(
                f"{array.path}: {array.name} has shape {list(array.shape)}, expected [prompts, hidden size]"
            )
        first = array if first is None else first
        if array.shape[1] != first.shape[1]:
            raise ActivationsError(
                f"{array.path}: {array.name} has hidden size {array.shape[1]}, but {first.name} in "
                f"{first.path.name} has {first.shape[1]}; capture all layers from one model"
            )
        arrays.setdefault(key, []).append(array)
    if first is None:
        raise ActivationsError(f"{path}: holds no activations; {_EXPECTED}")
    layers = tuple(sorted({layer for _, layer in arrays}))
    for label in LABELS:
        counts = [sum(array.shape[0] for array in arrays.get((label, layer), [])) for layer in layers]
        for layer, count in zip(layers, counts, strict=True):
            if not count:
                raise ActivationsError(
                    f"{path}: layer {layer} has no {label} activations; a direction needs both labels"
                )
            if count != counts[0]:
                raise ActivationsError(
                    f"{path}: layer {layer} has {count} {label} prompts, but layer {layers[0]} has {counts[0]}; "
                    "every layer needs the same prompts, so capture what is missing or remove what is incomplete"
                )
    return ActivationDump(
        path=path,
        layers=layers,
        hidden_size=first.shape[1],
        metadata=metadata,
        means_only=means_only,
        _arrays={key: tuple(value) for key, value in arrays.items()},
    )


def _measured_arrays(path: Path) -> list[tuple[tuple[Label, int], _Array]]:
    tensors = read_pickled_tensors(path)
    indices = {int(match["index"]) for name in tensors if (match := _MEASURED_NAME.fullmatch(name))}
    if not indices:
        names = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise ActivationsError(f"{path}: holds {names}; expected harmful_N and harmless_N, as llm-abliteration writes")
    found: list[tuple[tuple[Label, int], _Array]] = []
    # N counts hidden_states, so harmful_0 is the embedding and belongs to no decoder layer.
    for index in sorted(indices - {0}):
        for label in LABELS:
            name = f"{_MEASURED[label]}_{index}"
            if (values := tensors.get(name)) is None:
                raise ActivationsError(f"{path}: {name} is missing; a direction needs harmful_{index} and it")
            if values.ndim != 1:
                raise ActivationsError(f"{path}: {name} has shape {list(values.shape)}, expected [hidden size]")
            dtype = "F64" if values.dtype == np.float64 else str(values.dtype)
            opened = partial(io.BytesIO, values.tobytes())
            found.append(((label, index - 1), _Array(path, name, dtype, (1, len(values)), opened)))
    return found


def _npz_arrays(path: Path) -> list[_Array]:
    found = []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, fortran_order, dtype = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
                    start = stream.tell()
                if fortran_order and len(shape) > 1:
                    raise ActivationsError(
                        f"{path}: {name} is stored column by column; save it with numpy.ascontiguousarray"
                    )
                stored = _NPZ_DTYPES.get(dtype)
                if (
                    stored is not None
                    and start + int(np.prod(shape, dtype=object)) * dtype.itemsize != member.file_size
                ):
                    raise ActivationsError(f"{path}: {name} is truncated; save the file again")
                opened = partial(_open_member, path, member.filename, start)
                found.append(_Array(path, name, stored or str(dtype), shape, opened))
    except FileNotFoundError as error:
        raise ActivationsError(f"{path}: the file does not exist") from error
    except _NOT_AN_NPZ as error:
        raise ActivationsError(f"{path}: not an .npz file of plain arrays; save it with numpy.savez") from error
    return found


def _is_dump(metadata: Mapping[str, str], names: list[str]) -> bool:
    """Whether a file among others claims to be, or looks like, part of a dump."""
    return metadata.get("format", "").startswith(_FAMILY) or bool(names and all(map(_NAME.fullmatch, names)))


def _refuse_other_format(path: Path, metadata: Mapping[str, str], names: list[str]) -> None:
    found = metadata.get("format", "")
    if found.startswith("ablate-shards.") and found != ACTIVATIONS_FORMAT:
        raise ActivationsError(
            f"{path}: its format is {found}, expected {ACTIVATIONS_FORMAT}; name a dump, or update ablate-shards"
        )
    _refuse_other_names(path, names)


def _refuse_other_names(path: Path, names: list[str]) -> None:
    others = [name for name in names if not _NAME.fullmatch(name)]
    if len(others) == len(names):
        shown = ", ".join(others[:3]) or "no tensors"
        raise ActivationsError(f"{path}: not an activation dump, it holds {shown}; {_EXPECTED}")
    if others:
        raise ActivationsError(f"{path}: holds {others[0]} beside activations; remove it, {_EXPECTED} only")


def _refuse_dtype(array: _Array) -> None:
    if array.dtype not in _DTYPES:
        raise ActivationsError(
            f"{array.path}: {array.name} is {array.dtype}, expected BF16, F16, F32 or F64; convert it first"
        )


def _key(name: str) -> tuple[Label, int]:
    label, _, layer = name.split(".")
    return "positive" if label == "positive" else "negative", int(layer)


def _open_at(path: Path, start: int) -> _Stream:
    stream = path.open("rb", buffering=0)
    stream.seek(start)
    return stream


def _open_member(path: Path, name: str, start: int) -> _Stream:
    # The stream keeps the file open after its archive is closed.
    with zipfile.ZipFile(path) as archive:
        stream = cast(io.BufferedIOBase, archive.open(name))
    stream.read(start)
    return stream


def _size(array: _Array) -> int:
    return math.prod(array.shape) * np.dtype(_DTYPES[array.dtype]).itemsize


def _whole(array: _Array) -> tuple[np.ndarray, mmap.mmap | None]:
    """Returns an array as stored, and what maps it: read where its file is not plain or nothing can guard it."""
    if array.start is not None and _size(array) and (mapped := _mapped(array, array.start)) is not None:
        return mapped
    values = np.empty(array.shape, _DTYPES[array.dtype])
    with array.open() as stream:
        _read_into(stream, values, array)
    return values, None


def _mapped(array: _Array, start: int) -> tuple[np.ndarray, mmap.mmap] | None:
    """Returns an array of a plain file where the page cache holds it, without a copy; None where nothing can guard it.

    What touches it after the file was cut short ends the process with the sentence of the error.
    """
    low, end = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY, start + _size(array)
    with array.path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < end:
            raise _ended(array)
        window = mmap.mmap(file.fileno(), end - low, access=mmap.ACCESS_READ, offset=low)
    unguard = guard(np.frombuffer(window, np.uint8).ctypes.data, len(window), f"\nerror: {_ended(array)}")
    if unguard is None:
        return None
    weakref.finalize(window, unguard)
    count = math.prod(array.shape)
    return np.frombuffer(window, _DTYPES[array.dtype], count, start - low).reshape(array.shape), window


def _ended(array: _Array) -> ActivationsError:
    return ActivationsError(
        f"{array.path}: ended inside {array.name}; it was changed while it was read, so start again"
    )


def _read_into(stream: _Stream, values: np.ndarray, array: _Array) -> None:
    """Fills a C-contiguous array with the next bytes of its file."""
    view = values.reshape(-1).view(np.uint8).data
    while view:
        try:
            count = stream.readinto(view)
        except (EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ActivationsError(f"{array.path}: {array.name} is damaged ({error}); save the file again") from error
        if not count:
            raise _ended(array)
        view = view[count:]
