"""Compiles the ablation's arithmetic on a CPU when the package is installed; without a C compiler, torch does it."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("ablate_shards", "kernels")
# What the C standard leaves open must not differ between CPUs: no contraction of products and sums.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


class NativeKernels(BuildHookInterface[Any]):
    """Adds the compiled library to a wheel, which is then one for this platform, whatever the Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; leave the wheel as it is, for any platform, where that fails."""
        if self.target_name != "wheel":
            return
        library = KERNELS / "_native.so"
        if problem := compile_library(Path(self.root), library):
            self.app.display_warning(f"{library} was not built, so torch does the arithmetic on a CPU: {problem}")
            return
        build_data["artifacts"].append(library.as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_library(root: Path, library: Path) -> str | None:
    """Compile native.c to a library that appears complete or not at all; return what went wrong."""
    (root / library).unlink(missing_ok=True)
    command = shlex.split(os.environ.get("CC", "")) or next(
        ([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None
    )
    if command is None:
        return "no C compiler was found; CC names one"
    unfinished = root / library.with_suffix(".tmp")
    source = root / KERNELS / "native.c"
    # Not every compiler can make a function in several versions, one for each kind of CPU.
    for clones in ((), ("-DNO_CLONES",)):
        flags = (*FLAGS, *clones, *shlex.split(os.environ.get("CFLAGS", "")))
        arguments = [*command, *flags, str(source), "-o", str(unfinished)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        if done.returncode == 0:
            unfinished.replace(root / library)
            return None
    unfinished.unlink(missing_ok=True)
    return done.stderr.strip() or f"{command[0]} failed"
