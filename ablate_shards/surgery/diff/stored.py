"""A tensor in an open file: its bytes and its values, read by range."""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ablate_shards.errors import ArchitectureError, ExecuteError
from ablate_shards.surgery.anatomy.scales import (
    ending_of,
    is_codes,
    names_of_scales,
    plain_name_of,
    quantisation_of,
)
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.dequantise.decoding import Kept, read_scales
from ablate_shards.surgery.diff.coded import AnyScales, StoredScales
from ablate_shards.surgery.diff.packed import PackedScales
from ablate_shards.surgery.machine import files
from ablate_shards.surgery.machine.files import pread_into

if TYPE_CHECKING:
    import torch

__all__ = ["BARE", "CHUNK_BYTES", "FLOATS", "FloatType", "StoredTensor", "open_tensors", "same_bytes"]

CHUNK_BYTES = 1 << 20
_E4M3 = "F8_E4M3"
#: How codes are stored whose scales are there and cannot be read.
BARE = "FP8 with scales that cannot be read"


class FloatType(NamedTuple):
    """A dtype whose values are decoded.

    Attributes:
        torch_name: What torch calls it.
        relative: A unit in its last place, relative to the power of two below a value.
        least: The least such unit.
    """

    torch_name: str
    relative: float
    least: float


#: By the name that safetensors has for it. Differences are float32, so that no unit is below the least of that.
FLOATS: Mapping[str, FloatType] = {
    "F64": FloatType("float64", 2.0**-52, 2.0**-149),
    "F32": FloatType("float32", 2.0**-23, 2.0**-149),
    "BF16": FloatType("bfloat16", 2.0**-7, 2.0**-133),
    "F16": FloatType("float16", 2.0**-10, 2.0**-24),
    "F8_E4M3": FloatType("float8_e4m3fn", 2.0**-3, 2.0**-9),
    "F8_E5M2": FloatType("float8_e5m2", 2.0**-2, 2.0**-16),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in an open file.

    Attributes:
        name: Its name.
        dtype: Its safetensors dtype.
        shape: Its shape; of codes, that of the weight that they stand for.
        file: The descriptor of its shard.
        inode: The device and inode of that shard.
        start: Where in it the tensor begins.
        size: Its bytes.
        scales: What its values are multiplied by where they are codes.
        role: ``codes`` or ``scales`` of a quantised weight, ``bare`` for codes whose scales cannot be read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    inode: tuple[int, int]
    start: int
    size: int
    scales: AnyScales | None = None
    role: Literal["codes", "scales", "bare"] | None = None

    @property
    def form(self) -> str | None:
        """How its codes are stored, in words, None where it holds plain numbers."""
        if self.scales is not None:
            return self.scales.form
        return BARE if self.role == "bare" else None

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes per value, 1 where several values share a byte."""
        return max(1, self.size // max(1, self.elements))

    @property
    def is_float(self) -> bool:
        """Whether its values are decoded."""
        return self.scales is not None or (self.dtype in FLOATS and self.role != "bare")

    @property
    def plain_name(self) -> str:
        """What it would be called if it were not quantised."""
        return plain_name_of(self.name) if self.role == "codes" else self.name

    def read_into(self, buffer: np.ndarray, start: int) -> None:
        """Fills a buffer of bytes from an offset within the tensor."""
        pread_into(self.file, buffer.data, self.start + start)

    def head(self, start: int, most: int) -> bytes:
        """Reads ``most`` bytes from an offset on, fewer where the tensor ends before."""
        buffer = np.empty(min(most, self.size - start), np.uint8)
        self.read_into(buffer, start)
        return buffer.tobytes()

    def decode(self, first: int, count: int) -> "torch.Tensor":
        """Reads values of a float dtype, as they are stored; codes times their scales, float32."""
        import torch

        if isinstance(self.scales, PackedScales):
            return torch.from_numpy(np.array(self.scales.decode(first, count)))
        raw = torch.empty(count * self.width, dtype=torch.uint8)
        self.read_into(raw.numpy(), first * self.width)
        values = raw.view(getattr(torch, FLOATS[self.dtype].torch_name))
        if self.scales is None:
            return values
        return values.float().mul_(torch.from_numpy(np.array(self.scales.of(first, count))))

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Reads values as float64, zero where they are not finite; of dtypes that are not decoded, their bytes."""
        if self.is_float:
            values: np.ndarray = np.nan_to_num(self.decode(first, count).double().numpy(), posinf=0, neginf=0)
            return values
        buffer = np.empty(count * self.width, np.uint8)
        self.read_into(buffer, first * self.width)
        return buffer.astype(np.float64)


def open_tensors(checkpoint: Checkpoint, cleanup: ExitStack) -> dict[str, StoredTensor]:
    """Opens every shard, to be closed by ``cleanup``, and returns the tensors by name."""
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, int] = {}
    for shard in checkpoint.shards:
        file = cleanup.enter_context(shard.path.open("rb")).fileno()
        files[shard.name] = file
        stat = os.fstat(file)
        for info in shard.tensors:
            place = (file, (stat.st_dev, stat.st_ino), info.start, info.end - info.start)
            tensors[info.name] = StoredTensor(info.name, info.dtype, info.shape, *place)
    quantisation, kept = quantisation_of(checkpoint.config), Kept()

    def read(info: TensorInfo) -> bytes:
        raw = bytearray(info.end - info.start)
        pread_into(files[info.shard], memoryview(raw), info.start)
        return bytes(raw)

    for name, info in checkpoint.tensors.items():
        if len(info.shape) < 2 or not (info.dtype == _E4M3 or is_codes(info, ending_of(name))):
            continue
        try:
            found = read_scales(info, checkpoint.tensors, quantisation, read)
            scales = (
                StoredScales(
                    found.name,
                    found.dtype,
                    files[found.shard],
                    found.start,
                    found.block,
                    info.shape,
                    found.form(info.shape),
                )
                if info.dtype == _E4M3
                else PackedScales(info, found, read, kept)
            )
        except (ArchitectureError, ExecuteError):
            # Weights that were cast have none and are what their codes say.
            if info.dtype == _E4M3 and any(each in tensors for each in names_of_scales(name)):
                tensors[name] = replace(tensors[name], role="bare")
            continue
        tensors[name] = replace(tensors[name], scales=scales, role="codes", shape=scales.shape)
        for part in (found.name, *(part.name for part in found.parts)):
            tensors[part] = replace(tensors[part], role="scales")
    return tensors


def same_bytes(one: StoredTensor, other: StoredTensor, size: int, start: int = 0, other_start: int = 0) -> bool:
    """Tells whether two tensors hold the same ``size`` bytes from an offset within each."""
    if one.inode == other.inode and one.start + start == other.start + other_start:
        return True

    def fill(tensor: StoredTensor, begin: int, data: memoryview, offset: int) -> None:
        pread_into(tensor.file, data, tensor.start + begin + offset)

    return files.same_bytes(partial(fill, one, start), partial(fill, other, other_start), size)
