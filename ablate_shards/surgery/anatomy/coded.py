"""What belongs to the codes of a quantised weight, its scales and other parts, and what is checked of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = [
    "BYTE",
    "POWERS",
    "WAY_OUT",
    "WORD",
    "Order",
    "Part",
    "Role",
    "Scales",
    "check_dtype",
    "check_shape",
    "leading_of",
    "only_scales",
    "part_beside",
    "scales_of",
]

POWERS = ("F8_E8M0", "U8")
"""Dtypes of scales that are powers of two."""

WAY_OUT = "dequantise the checkpoint with the library that wrote it first"

WORD, BYTE = 32, 8
"""Bits of what codes are packed into."""

#: Columns that a scale of NVFP4 is for.
_NVFP4 = 16
#: Dimensions of a stack; codes may have one more, which cuts each row into blocks.
_STACKED = 3

Role = Literal[
    "multiplier",
    "divisor",
    "maximum",
    "zero points",
    "zero points less one",
    "offsets",
    "groups",
    "shape",
    "state",
    "table",
    "nested scales",
    "nested table",
    "layout",
]
Order = Literal["rows", "line", "inputs", "outputs"]
"""How codes lie: row by row; in one line, the first code of a byte in its high bits (bitsandbytes); or transposed, in
words of codes of several inputs (GPTQ) or several outputs (AWQ).
"""


@dataclass(frozen=True, slots=True)
class Part(TensorInfo):
    """A tensor beside the codes and the scales of a weight, perhaps in another shard than these.

    Attributes:
        role: What it is: a number that all scales are multiplied or divided by, or the largest value that there can be
            with it (NVFP4 of MLX), the zero points of the scales' blocks or one less than these, what is added to
            products of theirs (MLX), the group of each column, or the rows and columns of the weight. Of bitsandbytes:
            JSON with these and more, the values of codes, scales and values of scales that are codes themselves, and a
            number that says how bytes lie.
    """

    role: Role

    @classmethod
    def of(cls, role: Role, tensor: TensorInfo) -> "Part":
        """Returns a tensor as a part."""
        return cls(*_fields(tensor), role)


@dataclass(frozen=True, slots=True)
class Scales(TensorInfo):
    """The scales of a weight's codes, perhaps in another shard than these.

    Attributes:
        block: Rows and columns of a matrix that one scale is for.
        codes: What the codes are: ``E4M3``, ``E2M1``, ``NF4``, ``FP4``, ``signed8`` (bytes), or ``int4`` and others of
            2 to 8 bits, ``uint4`` and others where they have offsets instead of zero points.
        parts: What else says what they mean.
        order: How they lie; transposed ones have transposed scales and zero points.
        rows: Rows of the weight where codes lie in one line, whose shape does not say it; else 0.
    """

    block: tuple[int, int]
    codes: str = "E4M3"
    parts: tuple[Part, ...] = ()
    order: Order = "rows"
    rows: int = 0

    def part(self, *roles: Role) -> Part | None:
        """Returns the part that has one of the roles."""
        return next((part for part in self.parts if part.role in roles), None)

    def leading(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of a weight without its columns, ``[rows]`` or ``[matrices, rows]``, from that of codes."""
        if self.order == "rows":
            return leading_of(shape)
        if self.order == "line":
            return (self.rows,)
        return (shape[-1] * (1 if self.order == "inputs" else WORD // self.bits),)

    def holds(self, codes: TensorInfo, columns: int) -> bool:
        """Tells whether rows of codes have so many columns, up to what fills the last word of a row."""
        word = WORD if codes.dtype in ("I32", "U32") else BYTE
        row = 8 * (codes.end - codes.start) // max(1, math.prod(self.leading(codes.shape)))
        return row == -(-columns * self.bits // word) * word

    @property
    def bits(self) -> int:
        """Bits of a code."""
        known = {"E4M3": 8, "E2M1": 4, "NF4": 4, "FP4": 4, "signed8": 8}
        return known.get(self.codes) or int(self.codes.removeprefix("u").removeprefix("int"))

    @property
    def meant_as(self) -> str:
        """The dtype of the scales, of bytes what they stand for: MLX stores those of NVFP4 without their dtype."""
        return "F8_E4M3" if (self.dtype, self.codes, self.block) == ("U8", "E2M1", (1, 16)) else self.dtype

    @property
    def factor(self) -> float:
        """What products with scales are multiplied by: those of LLM.int8 are the largest values of rows."""
        return 1 / 127 if self.name.endswith(".SCB") else 1.0

    @property
    def format(self) -> str:
        """What the format is called."""
        if self.codes == "E2M1":
            return "NVFP4" if self.block[1] == _NVFP4 else "MXFP4"
        if self.codes in ("NF4", "FP4"):
            return {"NF4": "NF4", "FP4": "FP4 of bitsandbytes"}[self.codes]
        if self.codes == "E4M3":
            return "MXFP8" if self.block == (1, 32) and self.dtype in POWERS else "FP8"
        if self.factor != 1:
            return "LLM.int8"
        maker = {"inputs": "GPTQ ", "outputs": "AWQ "}.get(self.order, "MLX " if self.part("offsets") else "")
        return maker + self.codes.replace("signed", "int").removeprefix("u")

    def form(self, shape: Sequence[int]) -> str:
        """Returns how the codes of a weight of a shape are stored, in words."""
        if self.format in ("MXFP4", "MXFP8", "NVFP4"):
            return self.format
        if self.order == "line":
            nested = ", their scales quantised as well" if self.part("nested scales") else ""
            return f"{self.format} in blocks of {self.block[1]}{nested}"
        zeros = ", with zero points" if self.part("zero points", "zero points less one") else ""
        if self.block == tuple(shape[-2:]):
            reach = "per tensor"
        elif self.codes != "E4M3":
            groups = self.shape[0 if self.order != "rows" else -1] if len(self.shape) > 1 else 1
            reach = "per channel" if groups == 1 else f"in groups of {self.block[1]}"
        elif self.block == (1, shape[-1]):
            reach = "per channel"
        else:
            reach = f"in blocks of {self.block[0]} x {self.block[1]}"
        return f"{self.format} {reach}{zeros}"


def leading_of(codes: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of codes that lie row by row without their columns."""
    return tuple(codes[:-2] if len(codes) > _STACKED else codes[:-1])


def scales_of(
    tensor: TensorInfo,
    block: tuple[int, int],
    codes: str = "E4M3",
    parts: Sequence[Part] = (),
    order: Order = "rows",
    rows: int = 0,
) -> Scales:
    """Returns a tensor as scales."""
    return Scales(*_fields(tensor), block, codes, tuple(parts), order, rows)


def _fields(tensor: TensorInfo) -> tuple[str, str, tuple[int, ...], str, int, int]:
    return tensor.name, tensor.dtype, tensor.shape, tensor.shard, tensor.start, tensor.end


def only_scales(names: Sequence[str], tensors: Mapping[str, TensorInfo], what: str) -> TensorInfo:
    """Returns the one tensor that has one of the names that the scales of codes may have."""
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        have = " and ".join(tensor.name for tensor in found) or "none"
        one = f"in one of {', '.join(names)}" if len(names) > 1 else f"in {names[0]}"
        raise ArchitectureError(
            f"expected the scales of {what} {one}, found {have}; fetch the shards that hold them, or {WAY_OUT}"
        )
    return found[0]


def part_beside(name: str, tensors: Mapping[str, TensorInfo], what: str) -> TensorInfo:
    """Returns the tensor that must lie beside codes; raises an error where there is none."""
    if (part := tensors.get(name)) is None:
        raise ArchitectureError(f"expected {name} beside {what}, found none; fetch the shards again")
    return part


def check_dtype(tensor: TensorInfo, expected: Sequence[str]) -> None:
    """Raises an error where a part has another dtype."""
    if tensor.dtype not in expected:
        raise ArchitectureError(f"expected {', '.join(expected)} as {tensor.name}, found {tensor.dtype}; {WAY_OUT}")


def check_shape(tensor: TensorInfo, *expected: tuple[int, ...]) -> None:
    """Raises an error where a part has another shape."""
    if tensor.shape not in expected:
        wanted = " or ".join(str(list(shape)) for shape in expected)
        raise ArchitectureError(
            f"expected {wanted} as {tensor.name}, found {list(tensor.shape)}; restore the config.json that came with "
            f"the shards, or {WAY_OUT}"
        )
