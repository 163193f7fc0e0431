"""Compiles the ablation's arithmetic on a CPU when the package is installed; without a C compiler, torch does it."""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("ablate_shards", "kernels", "native")
# What the C standard leaves open must not differ between CPUs: no contraction of products and sums.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


# Widths of vectors that a CPU may have; kernels/native/native.py, which knows the names, chooses one when it loads it.
VARIANTS = {"avx2": ("-mavx2",), "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}


class NativeKernels(BuildHookInterface[Any]):
    """Adds the compiled libraries to a wheel, which is then one for this platform, whatever the Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; leave the wheel as it is, for any platform, where that fails."""
        if self.target_name != "wheel":
            return
        library = KERNELS / "_native.so"
        built, problem = compile_libraries(Path(self.root), library)
        if not built:
            self.app.display_warning(f"{library} was not built, so torch does the arithmetic on a CPU: {problem}")
            return
        build_data["artifacts"] += [path.as_posix() for path in built]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_libraries(root: Path, library: Path) -> tuple[list[Path], str]:
    """Compile native.c for every CPU, and for those with wider vectors; each appears complete or not at all.

    Returns:
        What was built, nothing if not the first; and what went wrong with that.
    """
    variants = {library: ()} | {library.with_stem(f"{library.stem}_{name}"): flags for name, flags in VARIANTS.items()}
    for path in variants:
        (root / path).unlink(missing_ok=True)
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        variants = {library: ()}
    command = shlex.split(os.environ.get("CC", "")) or next(
        ([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None
    )
    if command is None:
        return [], "no C compiler was found; CC names one"
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(_compile, command, flags, root, path) for path, flags in variants.items()]
        problems = [future.result() for future in done]
    # Not every compiler knows every kind of vector.
    built = [path for path, problem in zip(variants, problems, strict=True) if problem is None]
    return (built, "") if library in built else ([], str(problems[0]))


def _compile(command: list[str], flags: tuple[str, ...], root: Path, path: Path) -> str | None:
    unfinished = root / path.with_suffix(".tmp")
    source = root / KERNELS / "native.c"
    arguments = [*command, *FLAGS, *flags, *shlex.split(os.environ.get("CFLAGS", "")), str(source), "-o"]
    try:
        done = subprocess.run([*arguments, str(unfinished)], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        unfinished.replace(root / path)
        return None
    unfinished.unlink(missing_ok=True)
    return done.stderr.strip() or f"{command[0]} failed"
