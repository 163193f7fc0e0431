"""In what two checkpoints can differ, as pure data."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["AblationFit", "Alignment", "Diff", "DiffKind", "Fusion", "TensorDiff", "leaf"]

DiffKind = Literal[
    "equal",
    "retyped",
    "rounding",
    "sparse",
    "ablation",
    "low-rank",
    "scaled",
    "full-rank",
    "vector",
    "non-finite",
    "raw",
    "reshaped",
    "transposed",
    "resized",
    "other shape",
    "scales",
]


@dataclass(frozen=True, slots=True)
class AblationFit:
    """The directional ablation that explains a difference.

    Attributes:
        axis: -2 where columns of the stored matrix lost the direction, -1 where rows did.
        coefficient: How much of the component was removed; 1 removes it, negative where it was added.
        cosine: Of the difference, scales undone, and that ablation.
        same_direction: Cosine with the direction of the first ablated tensor.
        in_codes: Whether codes were chosen for it together, in which the direction shows only where it is largest.
    """

    axis: int
    coefficient: float
    cosine: float
    same_direction: float
    in_codes: bool = False


@dataclass(frozen=True, slots=True)
class Alignment:
    """How well the output directions of a difference fit given ones.

    Attributes:
        cosine: With the direction of the tensor's own layer; None where there is none.
        best_layer: The layer whose direction fits best.
        best_cosine: With that one.
        biprojected: Whether it fits best once made orthogonal to the reference means.
    """

    cosine: float | None
    best_layer: int
    best_cosine: float
    biprojected: bool


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How one tensor differs.

    Attributes:
        name: Its name in the first checkpoint.
        new_name: Its name in the second.
        dtype: Its safetensors dtype in the first.
        new_dtype: Its dtype in the second.
        shape: Its shape in the first.
        new_shape: Its shape in the second.
        place: The layer, with the name of its tower if it is not the decoder's; ``–`` outside of layers.
        layer: The decoder layer; None elsewhere.
        component: attention, mlp, norm, embedding, head or the module's name.
        writer: Whether it writes to the residual stream; None where the architecture is unknown.
        kind: What sort of difference it is.
        elements: How many values it has.
        changed: How many of them differ.
        beyond: How many differ by more than rounding allows: a unit in the last place of the narrower dtype; where
            one side holds codes, half a step of their grid; where both do, a step, or nothing if their scales are
            equal.
        units: The largest difference in such units or steps.
        largest: The largest difference.
        nonfinite: How many values are NaN or infinite on one side at least.
        relative: Frobenius norm of the difference, relative to the first's.
        form: ``plain``, or ``rows`` or ``columns`` where scales of those had to be undone first; None at full rank.
        rank: Effective rank; of a stack, that of the matrix with the highest. A lower bound at full rank.
        stable_rank: Squared Frobenius norm over squared spectral norm.
        values: The largest singular values of the difference, scales undone.
        shares: Their shares of its energy.
        row_drift: Largest relative change of a row's norm.
        column_drift: Largest relative change of a column's norm.
        kept: ``rows`` and ``columns`` whose norms changed by no more than rounding does.
        ablation: The ablation that explains the difference.
        alignment: How its output directions fit given ones.
        codes: How its codes and scales are stored in the first, in words; None where it holds plain numbers.
        new_codes: The same of the second.
        equal_scales: Whether both hold codes with equal scales.
    """

    name: str
    new_name: str
    dtype: str
    new_dtype: str
    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    place: str
    layer: int | None
    component: str
    writer: bool | None
    kind: DiffKind
    elements: int = 0
    changed: int = 0
    beyond: int = 0
    units: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    relative: float | None = None
    form: str | None = None
    rank: int | None = None
    stable_rank: float | None = None
    values: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    row_drift: float | None = None
    column_drift: float | None = None
    kept: tuple[str, ...] = ()
    ablation: AblationFit | None = None
    alignment: Alignment | None = None
    codes: str | None = None
    new_codes: str | None = None
    equal_scales: bool = False


@dataclass(frozen=True, slots=True)
class Fusion:
    """Tensors of one checkpoint that lie one after the other in a tensor of the other.

    Attributes:
        whole: The fused tensor.
        parts: What it is made of, in order.
        split: Whether the first checkpoint holds the whole and the second the parts.
        equal: How many parts are equal to the byte.
    """

    whole: str
    parts: tuple[str, ...]
    split: bool
    equal: int


@dataclass(frozen=True, slots=True)
class Diff:
    """Everything in which two checkpoints differ.

    Attributes:
        first: The first checkpoint, as named.
        second: The second.
        family: The architecture of the first, if the table knows it.
        equal: Tensors that are equal to the byte under the same name.
        tensors: Every other tensor that both hold.
        lost: Tensors that only the first holds.
        added: Tensors that only the second holds.
        fused: Tensors that were joined or split.
        metadata: Differences of the headers' metadata and of the sharding, a line each.
        files: Differences of the other files, a line each.
        verdict: What the differences come to, in words.
    """

    first: str
    second: str
    family: str | None
    equal: int
    tensors: tuple[TensorDiff, ...]
    lost: tuple[str, ...]
    added: tuple[str, ...]
    fused: tuple[Fusion, ...]
    metadata: tuple[str, ...]
    files: tuple[str, ...]
    verdict: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.tensors or self.lost or self.added or self.fused or self.metadata or self.files)


#: What names end with that say nothing of a module.
_LEAVES = ("weight", "weight_packed", "qweight", "bias")


def leaf(name: str) -> str:
    """Returns the last part of a tensor's name that is not a number, a weight or a bias."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in _LEAVES]
    return parts[-1] if parts else name
