"""What a figure depends on besides the code: the commit, versions and the machine."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe", "gpu"]

ROOT = Path(__file__).parent.parent
PACKAGES = ("ablate-shards", "numpy", "safetensors", "torch", "triton", "transformers")


def describe(work: Path, *, device: str | None) -> dict[str, Any]:
    """Returns commit, date, versions, processor, memory, system and the file system of ``work``."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        # A case's own result is no change of what the next one measures.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(work),
        "device": device,
    }


def gpu() -> str | None:
    """Returns the name of the first GPU that torch sees; None where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> int:
    """Returns the bytes of memory, 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str | None:
    """Returns the type of the mount that a folder lies in."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return None
    found = {fields[1]: fields[2] for fields in map(str.split, mounts.read_text().splitlines())}
    return next(found[str(parent)] for parent in (folder.resolve(), *folder.resolve().parents) if str(parent) in found)
