"""Devices that this process may use, found without importing torch where that is possible."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ablate_shards.errors import UsageError

if TYPE_CHECKING:
    import torch


__all__ = ["computes_bfloat16", "find_device", "resolve_device", "torch_dtype"]

_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")

_RENDER_NODES = Path("/dev/dri")


def torch_dtype(name: str) -> "torch.dtype":
    """Returns the torch dtype of an editable safetensors dtype."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]


def find_device(name: str) -> str:
    """Returns the device of a name as :func:`resolve_device` does, without importing torch where that is possible.

    Raises:
        UsageError: There is no such device.
    """
    if name == "cpu" or (name == "auto" and not _may_have_accelerator()):
        return "cpu"
    return str(resolve_device(name))


def _may_have_accelerator() -> bool:
    """Returns whether there may be a device that ``auto`` would take: NVIDIA's, AMD's, or one with a render node."""
    if sys.platform == "darwin":
        return False
    if not sys.platform.startswith("linux"):
        return True
    return any(Path(path).exists() for path in _ACCELERATORS) or any(_RENDER_NODES.glob("renderD*"))


def resolve_device(name: str) -> "torch.device":
    """Returns the device of a name, the best there is for ``auto``.

    Raises:
        UsageError: There is no such device.
    """
    import torch

    if name != "auto":
        kind, _, number = name.partition(":")
        available = {
            "cpu": True,
            "cuda": torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count(),
            "mps": torch.backends.mps.is_available(),
            "xpu": torch.xpu.is_available(),
        }
        if not available.get(kind, False):
            usable = ", ".join(kind for kind, usable in available.items() if usable)
            raise UsageError(f"--device {name}: torch {torch.__version__} finds no such device, only {usable}")
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("cpu")


def computes_bfloat16(device: "torch.device") -> bool:
    """Returns whether a device has instructions for bfloat16, so that it is faster there than float32."""
    import torch

    match device.type:
        case "cpu":
            capable = torch.cpu.get_capabilities()
            return any(capable.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        case "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        case "xpu":
            return bool(torch.xpu.is_bf16_supported())
    return False
