"""Directional ablation of weights in place, many at once.

:func:`.project.project` leaves its input as it is and measures the result. Here nothing is copied
or measured: weights that fit the kernels of ``resident_triton`` are read from and written to device memory as little as
possible, and the rest goes through the streamed form.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ablate_shards.errors import PlanError
from ablate_shards.kernels.ablate.memory import on_host, stored_view, stream
from ablate_shards.kernels.ablate.options import ProjectOptions, check_fit, checked_basis
from ablate_shards.kernels.ablate.project import Projector, Workspace
from ablate_shards.kernels.choose import Form, choose_form, one_thread
from ablate_shards.kernels.codecs.plain import stored_dtype
from ablate_shards.kernels.native.native import is_built

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ablate_shards.kernels.ablate.resident_triton import Resident

__all__ = ["InPlaceAblation", "project_"]

#: Devices where ``data_ptr`` is an address.
_ADDRESSED = ("cpu", "cuda", "xpu")


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
            What is on a GPU is edited on the current stream.
        basis: ``[k, d]``, orthonormal rows, ``d`` the length of every weight's residual axis.
        options: The coefficient, the norms to preserve, the residual axis.
        form: ``native``, ``torch``, ``triton``, or what suits each weight's device.

    Returns:
        How many vectors were so nearly parallel to the directions that they were not rescaled.

    Raises:
        DirectionsError: The basis does not fit a weight, or is not orthonormal; nothing is changed.
        PlanError: A weight's dtype is none of the three, weights share memory without being the same, or the form
            cannot work in place or where a weight is; nothing is changed.
    """
    ablation = InPlaceAblation(weights, basis, options, form=form)
    ablation.launch()
    return ablation.settle()


class InPlaceAblation:
    """What :func:`project_` does, in two parts, of which the first may be captured in a CUDA graph.

    One launches and settles on the stream where one makes it, after one another if there are several. A capture needs a
    launch of weights of the same shapes before it, in which Triton compiles; what a capture holds is settled after each
    replay, not after the capture.

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
        self._basis, self._options = checked_basis(on_host(basis)), options
        self._streamed: list[tuple[Tensor, Form]] = []
        together: dict[tuple[torch.device, torch.dtype, torch.Size], list[Tensor]] = {}
        devices = {weight.device for weight in weights}
        forms = {device: choose_form(device, form=form, on_cpu="native")[0] for device in devices}
        for weight in weights:
            self._check(weight, forms[weight.device])
        for weight in _once(weights):
            chosen = forms[weight.device]
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
        """Ablate the rest: weights the kernels do not take, and vectors they left unchanged; once after each launch.

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

    def _check(self, weight: "Tensor", form: Form) -> None:
        """Refuse what cannot be ablated, before anything is."""
        shape = list(weight.shape)
        if stored_dtype(weight) is None:
            raise PlanError(f"dtype: expected bfloat16, float16 or float32, found {weight.dtype}")
        if len(shape) < 2:
            raise PlanError(f"weights: expected [..., rows, cols], found {shape}")
        check_fit(self._basis, shape, self._options.axis)
        if any(size > 1 and not stride for size, stride in zip(shape, weight.stride(), strict=True)):
            raise PlanError(f"weights: one of shape {shape} is expanded from fewer elements; ablate these")
        if (problem := _unusable(form, weight.device.type)) is not None:
            raise PlanError(f"form: {form} {problem}, found one on {weight.device}")

    def _is_simple(self, weight: "Tensor") -> bool:
        """Whether the kernels take a weight; they square the coefficient in float32."""
        from ablate_shards.kernels.ablate.resident_triton import fits

        fine = len(self._basis) == 1 and self._options.axis == -2 and 0 < abs(self._options.coefficient) <= 1e6
        return fine and fits(weight)

    def _placed(self, weights: "list[Tensor]") -> "Resident":
        import torch

        from ablate_shards.kernels.ablate.resident_triton import Resident

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
    """Return each weight once, as a view that records no gradients.

    Raises:
        PlanError: Two weights share memory without being the same.
    """
    places = {
        (weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()): weight.detach()
        for weight in weights
    }
    found = list(places.values())
    under_way: list[tuple[str, int, int, int]] = []
    for span in sorted((*_span(one), number) for number, one in enumerate(found) if one.numel()):
        memory, start, _, number = span
        under_way = [other for other in under_way if other[0] == memory and other[2] > start]
        for *_, other in under_way:
            if np.shares_memory(_layout(found[other]), _layout(found[number])):
                shapes = " and ".join(str(list(found[one].shape)) for one in sorted((other, number)))
                raise PlanError(f"weights: those of shape {shapes} share memory; give one of them")
        under_way.append(span)
    return found


def _span(weight: "Tensor") -> tuple[str, int, int]:
    """Return the memory that a weight is in, and between which bytes of it."""
    memory, start = str(weight.device), weight.data_ptr()
    if weight.device.type not in _ADDRESSED:
        # A pointer there is one to what stands for the memory.
        memory = f"{memory} {weight.untyped_storage().data_ptr()}"
        start = 1 + int(weight.storage_offset()) * weight.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return memory, start, start + (reach + 1) * weight.element_size()


def _layout(weight: "Tensor") -> np.ndarray:
    """Describe the memory of a weight for NumPy, which finds overlaps by it; nothing there is read."""
    size = weight.element_size()
    interface = {
        "version": 3,
        "typestr": f"|V{size}",
        "shape": tuple(weight.shape),
        "strides": tuple(size * stride for stride in weight.stride()),
        "data": (_span(weight)[1], False),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _unusable(form: Form, device: str) -> str | None:
    """Return why a form cannot ablate on a kind of device, None if it can."""
    if device == "meta":
        return "needs weights that have values"
    if form == "native":
        return None if device == "cpu" and is_built() else "needs a CPU, and a C compiler when it was installed"
    if form != "triton":
        return None
    try:
        from ablate_shards.kernels.ablate.resident_triton import INTERPRETED
    except ImportError:
        return "needs the package triton"
    return None if INTERPRETED or device != "cpu" else "needs a GPU"
