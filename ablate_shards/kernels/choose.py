"""Which form of the arithmetic suits a device: C, NumPy, torch or Triton."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ablate_shards.kernels.native.native import is_built

if TYPE_CHECKING:
    import torch

__all__ = ["Form", "OnCpu", "choose_form", "one_thread"]

Form = Literal["reference", "native", "numpy", "torch", "triton"]

OnCpu = Literal["native", "numpy", "torch"]


def choose_form(
    device: "torch.device | str", *, form: Form | Literal["auto"] = "auto", on_cpu: OnCpu = "torch"
) -> tuple[Form, str]:
    """Choose the form that suits a device, and say why in a few words.

    Args:
        device: Where the blocks will be.
        form: A form to insist on, or ``auto``.
        on_cpu: The form that what is to be done has on a CPU: ``native`` for an ablation, ``numpy`` for a merge.
    """
    kind = str(device).partition(":")[0]
    if form != "auto":
        return form, "asked for"
    if kind == "cpu" and on_cpu == "native" and not is_built():
        return "torch", "no C compiler was there to build the native form"
    if kind == "cpu" and on_cpu != "torch":
        return on_cpu, "a CPU needs no torch for this"
    if kind not in ("cuda", "xpu"):
        return "torch", f"Triton does not run on {kind}"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "torch", "triton is not installed"
    return "triton", f"Triton runs on {kind}"


@contextlib.contextmanager
def one_thread(form: Form) -> Iterator[None]:
    """Keep torch to one thread if the form is torch's: with several, a sum depends on how many there are."""
    if form != "torch":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
