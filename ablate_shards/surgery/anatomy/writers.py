"""What is found of a checkpoint: the tensors that write to the residual stream, and what looks like one."""

from dataclasses import dataclass
from typing import Literal

from ablate_shards.surgery.anatomy.absent import Absent
from ablate_shards.surgery.anatomy.families import Axis, Component, Part
from ablate_shards.surgery.anatomy.scales import Scales

__all__ = ["Anatomy", "LeftOut", "Target", "Writer"]


@dataclass(frozen=True, slots=True)
class Writer:
    """A tensor whose output is added to the residual stream.

    Attributes:
        name: The tensor.
        layer: Its decoder layer (for multi-token prediction, that layer's own index); None for embeddings.
        component: The part of the layer it belongs to.
        axis: The residual axis, negative: -2 or -1 of a matrix or a stack of them, -1 of a bias.
        kind: A weight, or the bias added to its output.
        gain: The norm weight that the output is multiplied by before it is added to the stream; several with ``*``
            between them, and ``centred`` before it where the norm subtracts the mean.
        gain_offset: 1.0 where that norm multiplies by one plus its weight, else 0.0.
        mtp: Whether it belongs to a multi-token-prediction layer.
        scales: What its codes are multiplied by, None where it is no quantised weight.
        part: The part of its component, where a target says so; else its name tells.
    """

    name: str
    layer: int | None
    component: Component
    axis: int
    kind: Literal["weight", "bias"]
    gain: str | None
    gain_offset: float
    mtp: bool
    scales: Scales | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that is, or looks like, a writer and is not among the writers.

    Attributes:
        name: The tensor.
        layer: Its decoder layer, if it lies in one.
        component: What it would belong to, if that is known.
        reason: Why it is left out, and what to do about it if there is something.
        blocked: It writes to the stream, or may, and cannot be edited: selecting it must be refused.
        mtp: Whether it belongs to a multi-token-prediction layer.
        part: The part of its component, where a target says so.
    """

    name: str
    layer: int | None
    component: Component | None
    reason: str
    blocked: bool = False
    mtp: bool = False
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of writer of an architecture that the table does not know.

    Attributes:
        pattern: Regular expression that must match the whole tensor name; its group ``layer`` is the layer.
        component: The component that it belongs to, or a part of it.
        axis: ``out`` for ``[..., d, n]`` as in nn.Linear, ``in`` for ``[..., n, d]`` as in Conv1D.
        gain: Name of the post-norm gain, with the pattern's groups in braces, such as
            ``model.layers.{layer}.post_feedforward_layernorm.weight``; preceded by ``1 +`` where the norm
            multiplies by one plus its weight, or ``centred`` where it subtracts the mean; several with ``*`` between.
    """

    pattern: str
    component: Part
    axis: Axis
    gain: str | None = None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What writes to the residual stream of a checkpoint.

    Attributes:
        family: The row of the table that applied.
        hidden_size: Length of the residual axis.
        layers: The decoder layers, ascending.
        writers: Every tensor that can be edited, embeddings first, then by layer.
        left_out: Every tensor that looks like a writer and is not among them.
        absent: The parts that layers do not have by design.
        missing: The parts that layers should have and of which no writer is stored, each with what tells.
        unplaced: What lies in the layers of the writers, is none of them, and could write by its shape.
        tied: Whether the token embedding is the output head as well.
        notes: Facts to show to the user, a line each.
    """

    family: str
    hidden_size: int
    layers: tuple[int, ...]
    writers: tuple[Writer, ...]
    left_out: tuple[LeftOut, ...]
    tied: bool
    notes: tuple[str, ...]
    absent: tuple[Absent, ...] = ()
    missing: tuple[Absent, ...] = ()
    unplaced: tuple[str, ...] = ()
