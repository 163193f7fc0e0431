"""Compiles the ablation's arithmetic on a CPU when the package is installed; without a C compiler, torch does it."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("ablate_shards", "kernels", "native")
# What the C standard leaves open must not differ between CPUs: no contraction of products and sums.
FLAGS = ("-std=gnu11", "-O3", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
ON_WINDOWS = sys.platform == "win32"
#: Those that know vectors of a given size, which Microsoft's does not; on Windows GCC misplaces wide ones on the stack.
COMPILERS = ("clang",) if ON_WINDOWS else ("cc", "gcc", "clang")

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
        build_data["tag"] = wheel_tag(sysconfig.get_platform(), platform.machine())


def wheel_tag(system: str, machine: str) -> str:
    """Return the tag of a wheel for any Python on a system, whose Python may be for more machines than this one."""
    if system.endswith("universal2"):
        version = "11.0" if machine == "arm64" else system.split("-")[1]  # the first with such machines
        system = f"macosx-{version}-{machine}"
    return f"py3-none-{system.replace('-', '_').replace('.', '_')}"


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
    command = _words("CC") or next(([name] for name in COMPILERS if shutil.which(name)), None)
    if command is None:
        return [], f"no C compiler ({', '.join(COMPILERS)}) was found; CC names one"
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(_compile, command, flags, root, path) for path, flags in variants.items()]
        problems = [future.result() for future in done]
    # Not every compiler knows every kind of vector.
    built = [path for path, problem in zip(variants, problems, strict=True) if problem is None]
    return (built, "") if library in built else ([], str(problems[0]))


def _compile(command: list[str], flags: tuple[str, ...], root: Path, path: Path) -> str | None:
    source = root / KERNELS / "native.c"
    shared = () if ON_WINDOWS else ("-fPIC",)
    # Some linkers leave more than the library.
    with tempfile.TemporaryDirectory(dir=(root / path).parent) as folder:
        made = Path(folder, path.name)
        arguments = [*command, *FLAGS, *shared, *flags, *_words("ARCHFLAGS"), *_words("CFLAGS"), str(source), "-o"]
        try:
            done = subprocess.run([*arguments, str(made)], capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        if done.returncode != 0:
            return done.stderr.strip() or f"{command[0]} failed"
        made.replace(root / path)
    return None


def _words(variable: str) -> list[str]:
    """Return what an environment variable holds; on Windows a backslash is part of a path."""
    return shlex.split(os.environ.get(variable, ""), posix=not ON_WINDOWS)
