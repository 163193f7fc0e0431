"""The edits of a plan: which tensor, where its bytes lie, what is removed from it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from ablate_shards.surgery.anatomy.architecture import Component
from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.headers import Shard
from ablate_shards.surgery.plan.recipe import Preserve, Rounding
from ablate_shards.validation import Finite

__all__ = ["BasisKey", "Edit", "Skip", "TensorEdit", "by_shard", "neighbours", "untouched"]


class Edit(Protocol):
    """One tensor that is to be edited, by whatever operation, and where its bytes lie."""

    @property
    def name(self) -> str:
        """The tensor."""

    @property
    def shard(self) -> str:
        """The shard that holds it."""

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as stored."""

    @property
    def start(self) -> int:
        """Offset of its first byte in the shard."""

    @property
    def end(self) -> int:
        """Offset one past its last byte."""


_E = TypeVar("_E", bound=Edit)


@dataclass(frozen=True, slots=True)
class BasisKey:
    """What tells one ablated basis from another.

    Attributes:
        source_layer: The layer the direction was measured at, or a point between two.
        references: The layers whose reference means it is made orthogonal to.
        gain: The post-norm gain tensor that the writer's output passes through.
        gain_offset: What is added to that tensor's values.
    """

    source_layer: int | float
    references: tuple[int, ...]
    gain: str | None
    gain_offset: Finite


def neighbours(layer: float) -> tuple[int, ...]:
    """Returns the layers that a point in the stack lies between; one where it is a layer itself."""
    below = math.floor(layer)
    return (below,) if layer == below else (below, below + 1)


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """One tensor to edit, and how.

    Attributes:
        name: The tensor.
        shard: The shard that holds it.
        dtype: Its safetensors dtype.
        shape: Its shape as stored.
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        axis: The residual axis, negative.
        kind: A weight, or the bias of a writer.
        layer: Its decoder layer (for MTP, the MTP layer); None for embeddings.
        component: The part of the layer it belongs to.
        mtp: Whether it belongs to a multi-token-prediction layer.
        coefficient: The α of the projection.
        preserve: Which norms stay; ``none`` for a bias.
        basis: The basis to remove.
        scales: What its codes are multiplied by, which stay; None where it holds plain numbers.
        rounding: How its codes are chosen, where it has any.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    axis: int
    kind: Literal["weight", "bias"]
    layer: int | None
    component: Component
    mtp: bool
    coefficient: Finite
    preserve: Preserve
    basis: BasisKey
    scales: Scales | None = None
    rounding: Rounding = "directed"


@dataclass(frozen=True, slots=True)
class Skip:
    """A tensor that could have been edited and is not, with the reason."""

    name: str
    layer: int | None
    component: Component | None
    reason: str


def by_shard(edits: Iterable[_E]) -> Mapping[str, Sequence[_E]]:
    """Groups edits by the shard that holds them, in the order of their bytes; a shard without one has none."""
    groups: defaultdict[str, list[_E]] = defaultdict(list)
    for edit in sorted(edits, key=lambda edit: edit.start):
        groups[edit.shard].append(edit)
    return groups


def untouched(shard: Shard, edits: Iterable[Edit]) -> Iterator[tuple[int, int]]:
    """Yields the byte ranges of a shard outside its edits (in the order of their bytes), the header among them."""
    position = 0
    for edit in edits:
        if position < edit.start:
            yield position, edit.start
        position = edit.end
    if position < shard.size:
        yield position, shard.size
