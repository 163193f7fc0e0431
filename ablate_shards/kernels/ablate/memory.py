"""Ablation of weights and biases that are in memory."""

import math
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ablate_shards.errors import PlanError
from ablate_shards.kernels import reference
from ablate_shards.kernels.ablate.options import Measure, ProjectOptions, ProjectReport, norm_drift
from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace
from ablate_shards.kernels.choose import Form, choose_form, one_thread
from ablate_shards.kernels.codecs.plain import decoded, encode, stored_dtype
from ablate_shards.kernels.form import Array

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["on_host", "project", "project_vector", "stored_view", "stream", "vector_component"]

_Weight = TypeVar("_Weight", np.ndarray, "Tensor")

_BLOCK_ELEMENTS = 1 << 22


def project(
    weight: "_Weight",
    basis: Array,
    options: ProjectOptions,
    *,
    form: Form | Literal["auto"] = "auto",
    block_rows: int | None = None,
    out: "_Weight | None" = None,
) -> "tuple[_Weight, ProjectReport]":
    """Ablate a weight that is in memory.

    Args:
        weight: ``[..., rows, cols]``, any strides; left as it is. A torch tensor in bfloat16, float16 or float32, or
            a NumPy array in float16 or float32, or in uint16, which are the bits of bfloat16.
        basis: ``[k, d]`` float64, orthonormal rows, ``d`` the length of the residual axis.
        options: The coefficient, the norms to preserve, the residual axis.
        form: Which implementation; ``auto`` takes the one that suits the device. NumPy arrays have the form
            ``native`` only, tensors have it on a CPU.
        block_rows: Rows that one step covers, rounded up to whole chunks; the result does not depend on it.
        out: Where to write, of the same shape and dtype; may be ``weight`` itself.

    Returns:
        The new weight and what was measured.

    Raises:
        DirectionsError: The basis does not fit the weight, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """
    device = "cpu" if isinstance(weight, np.ndarray) else weight.device
    chosen, _ = choose_form(device, form=form, on_cpu="native")
    dtype = stored_dtype(weight)
    if dtype is None:
        raise PlanError(f"dtype: expected bfloat16, float16 or float32, found {weight.dtype}")
    given, directions = stored_view(weight, chosen), on_host(basis)
    if out is None:
        out = np.empty_like(weight) if isinstance(weight, np.ndarray) else weight.new_empty(weight.shape)
    written = stored_view(out, chosen)
    if chosen == "reference":
        return out, _project_by_definition(given, directions, options, written)
    workspace = Workspace(device, chosen)
    shape = (math.prod(weight.shape[:-2]), weight.shape[-2], weight.shape[-1])
    projector = Projector(directions, shape, dtype, options, workspace)
    meter = Meter(directions, shape, dtype, options, workspace)
    result = workspace.arrays.clone(given.reshape(shape))
    with one_thread(chosen):
        stream(projector, result, block_rows=block_rows, meter=meter)
    written[...] = result.reshape(weight.shape)
    before, after = projector.before(), meter.result()
    return out, ProjectReport(before, after, norm_drift(before, after), projector.degenerate)


def stream(projector: Projector, weight: Array, *, block_rows: int | None = None, meter: Meter | None = None) -> None:
    """Ablate a weight ``[matrices, rows, cols]`` in memory, in place, in the form that a projector has.

    Args:
        projector: A new one, for this shape.
        weight: As the projector's form takes it.
        block_rows: Rows that one step covers, rounded up to whole chunks; None for what caches like.
        meter: Measures the result.
    """
    matrices, rows, cols = weight.shape
    wanted = max(1, _BLOCK_ELEMENTS // max(1, matrices * cols)) if block_rows is None else block_rows
    step_rows = -(-wanted // projector.chunk_rows) * projector.chunk_rows
    blocks = [(start, weight[:, start : start + step_rows]) for start in range(0, rows, step_rows)]
    step = 0
    while step < projector.passes:
        for start, block in blocks:
            projector.gather(step, block, start)
        step += 1
    for start, block in blocks:
        projector.apply(block, start)
        if meter is not None:
            meter.add(block, start)


def project_vector(bias: np.ndarray, basis: np.ndarray, coefficient: float) -> np.ndarray:
    """Remove the directions from what a bias writes: ``b - a RᵀRb``, float64 inside, rounded once.

    Args:
        bias: ``[..., d]``, float16, float32, or uint16, which are the bits of bfloat16.
        basis: ``[k, d]`` float64, orthonormal rows.
        coefficient: 1 removes the component, 2 reflects it.
    """
    if coefficient == 0:
        return bias.copy()
    vector = decoded(bias, np.float64)
    moved = vector.copy()
    for line in basis:
        moved -= coefficient * np.sum(vector * line, axis=-1, keepdims=True) * line
    result = np.empty_like(bias)
    encode(moved, result)
    return result


def vector_component(bias: np.ndarray, basis: np.ndarray) -> float:
    """Return the norm of a bias's component along the directions, relative to its norm; not finite if it is not."""
    vector = decoded(bias, np.float64)
    total = float(np.sum(vector * vector))
    along = math.fsum(float(np.sum(np.sum(vector * line, axis=-1) ** 2)) for line in basis)
    return math.sqrt(along / total) if total != 0 else 0.0


def stored_view(values: "np.ndarray | Tensor", form: Form) -> Array:
    """Return a view of a weight that a form understands."""
    if isinstance(values, np.ndarray):
        if form != "native":
            raise PlanError(f"form: expected native for an array in NumPy, found {form}")
        return values
    if form != "native":
        return values
    import torch

    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def on_host(basis: Array) -> np.ndarray:
    """Return directions as float64 in NumPy."""
    return np.asarray(basis if isinstance(basis, np.ndarray) else basis.cpu(), np.float64)


def _project_by_definition(
    weight: "Tensor", basis: np.ndarray, options: ProjectOptions, out: "Tensor"
) -> ProjectReport:
    import torch

    directions = torch.from_numpy(basis)
    exact, degenerate = reference.ablate(
        weight, directions, coefficient=options.coefficient, preserve=options.preserve, axis=options.axis
    )
    before = _measure_by_definition(weight, directions, options)
    out.copy_(reference.round_to(exact, weight.dtype))
    after = _measure_by_definition(out, directions, options)
    return ProjectReport(before, after, norm_drift(before, after), int(degenerate.sum()))


def _measure_by_definition(weight: "Tensor", basis: "Tensor", options: ProjectOptions) -> Measure:
    matrix = weight.double().cpu() if options.axis == -2 else weight.double().cpu().mT
    matrix = matrix.reshape(-1, *matrix.shape[-2:])
    squares = (matrix * matrix).numpy()
    dots = (basis @ matrix).numpy()
    return Measure(
        norms=np.sqrt(squares.sum(-1 if options.preserve == "rows" else -2)),
        along=tuple(float(np.sum(values * values)) for values in dots),
        total=tuple(float(np.sum(values)) for values in squares),
    )
