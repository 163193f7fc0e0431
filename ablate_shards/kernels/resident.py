"""Directional ablation of weights where they lie, many at once.

:func:`ablate_shards.kernels.project.project` leaves its input as it is and measures the result. Here nothing is copied
and nothing measured: what fits the kernels of ``resident_triton`` is read from and written to the memory of the device
as little as can be, and the rest goes through the streamed form.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ablate_shards.errors import DirectionsError, PlanError
from ablate_shards.kernels.form import stored_dtype
from ablate_shards.kernels.project import (
    Form,
    ProjectOptions,
    Projector,
    Workspace,
    choose_form,
    on_host,
    one_thread,
    orthonormal,
    stored_view,
    stream,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ablate_shards.kernels.resident_triton import Resident

__all__ = ["Ablation", "project_"]


def project_(
    weights: "Sequence[Tensor]",
    basis: "np.ndarray | Tensor",
    options: ProjectOptions,
    *,
    form: Form | Literal["auto"] = "auto",
) -> int:
    """Ablate weights in place.

    Args:
        weights: ``[..., rows, cols]`` each, of any shapes, strides and devices; bfloat16, float16 or float32. A weight
            that is given twice, as tied ones are, is ablated once. Parameters are edited behind autograd's back.
        basis: ``[k, d]``, orthonormal rows, ``d`` the length of every weight's residual axis.
        options: The coefficient, the norms to preserve, the residual axis.
        form: ``native``, ``torch``, ``triton``, or what suits each weight's device.

    Returns:
        How many vectors were so nearly parallel to the directions that they were not rescaled.

    Raises:
        DirectionsError: The basis does not fit a weight, or is not orthonormal; nothing is changed.
        PlanError: A weight's dtype is none of the three, or the form cannot work in place; nothing is changed.
    """
    ablation = Ablation(weights, basis, options, form=form)
    ablation.launch()
    return ablation.settle()


class Ablation:
    """What :func:`project_` does, in two parts, of which the first may be captured in a CUDA graph.

    Args:
        weights: As :func:`project_` takes them; they must stay where they are.
        basis: As :func:`project_` takes it.
        options: As :func:`project_` takes them.
        form: As :func:`project_` takes it.

    Attributes:
        resident: What the kernels ablate.

    Raises:
        DirectionsError: As :func:`project_` does.
        PlanError: As :func:`project_` does.
    """

    def __init__(
        self,
        weights: "Sequence[Tensor]",
        basis: "np.ndarray | Tensor",
        options: ProjectOptions,
        *,
        form: Form | Literal["auto"] = "auto",
    ) -> None:
        if form in ("reference", "numpy"):
            raise PlanError(f"form: expected native, torch or triton to ablate in place, found {form}")
        self._basis, self._options = orthonormal(on_host(basis)), options
        self._streamed: list[tuple[Tensor, Form]] = []
        together: dict[tuple[torch.device, torch.dtype, torch.Size], list[Tensor]] = {}
        for weight in _once(weights):
            if stored_dtype(weight) is None:
                raise PlanError(f"dtype: expected bfloat16, float16 or float32, found {weight.dtype}")
            if weight.shape[options.axis] != self._basis.shape[1]:
                raise DirectionsError(
                    f"directions: expected [k, {weight.shape[options.axis]}] for a weight of shape "
                    f"{list(weight.shape)} with the residual axis {options.axis}, found {list(self._basis.shape)}"
                )
            chosen, _ = choose_form(weight.device, form=form, on_cpu="native")
            if chosen == "triton" and self._is_simple(weight):
                together.setdefault((weight.device, weight.dtype, weight.shape[-2:]), []).append(weight)
            else:
                self._streamed.append((weight, chosen))
        self.resident = [self._placed(group) for group in together.values()]

    def launch(self) -> None:
        """Ablate what the kernels take, without waiting for the device."""
        for resident in self.resident:
            resident.launch()

    def settle(self) -> int:
        """Ablate the rest: what the kernels do not take, and the vectors they left alone; once after each launch.

        Returns:
            How many vectors were so nearly parallel to the directions that they were not rescaled.
        """
        degenerate = 0
        for resident in self.resident:
            for matrix, columns in resident.odd():
                if columns is None:
                    degenerate += self._stream(matrix, "triton")
                else:
                    part = matrix[:, columns]
                    degenerate += self._stream(part, "triton")
                    matrix[:, columns] = part
        return degenerate + sum(self._stream(weight, form) for weight, form in self._streamed)

    def _is_simple(self, weight: "Tensor") -> bool:
        """Whether the kernels take a weight."""
        from ablate_shards.kernels.resident_triton import fits

        return len(self._basis) == 1 and self._options.axis == -2 and self._options.coefficient != 0 and fits(weight)

    def _placed(self, weights: "list[Tensor]") -> "Resident":
        import torch

        from ablate_shards.kernels.resident_triton import Resident

        direction = torch.from_numpy(self._basis[0]).to(torch.float32).to(weights[0].device)
        return Resident(weights, direction, self._options)

    def _stream(self, weight: "Tensor", form: Form) -> int:
        """Ablate a weight in the streamed form, and say how many of its vectors were not rescaled."""
        rows, cols = weight.shape[-2:]
        block = weight.contiguous().view(math.prod(weight.shape[:-2]), rows, cols)
        shape = (len(block), rows, cols)
        projector = Projector(
            self._basis, shape, str(stored_dtype(weight)), self._options, Workspace(weight.device, form)
        )
        with one_thread(form):
            stream(projector, stored_view(block, form))
        if not weight.is_contiguous():
            weight.copy_(block.view(weight.shape))
        return projector.degenerate


def _once(weights: "Sequence[Tensor]") -> "list[Tensor]":
    """Leave out what is given a second time, and what records gradients."""
    places = {(weight.device, weight.data_ptr(), weight.shape, weight.stride()): weight.detach() for weight in weights}
    return list(places.values())
