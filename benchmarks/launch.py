"""Runs commands one after another and prints their seconds, their peak memory and what that peak starts at, in bytes.

    python -I -S launch.py COMMAND [ARGUMENT ...] [';' COMMAND ...]

A process of its own and a small one: on Linux a program's ru_maxrss starts at the peak of the process that started
it, whether by fork, vfork or posix_spawn, so that ``cp`` would seem to take what the benchmark takes.
"""

import os
import sys
import time


def own_peak() -> int:
    """Returns this process's peak in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return 0


def main(words: list[str]) -> int:
    """Runs the commands, stops at the first that fails, and returns its status."""
    if sys.platform == "win32":
        raise OSError("Windows says no peak of a process that has ended: measure on Linux or macOS")
    commands: list[list[str]] = [[]]
    for word in words:
        if word == ";":
            commands.append([])
        else:
            commands[-1].append(word)
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    peak = status = 0
    start = time.perf_counter()
    for command in commands:
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=silent)
        _, status, usage = os.wait4(child, 0)
        peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        if status:
            break
    seconds = time.perf_counter() - start
    print(seconds, peak, own_peak())
    return os.waitstatus_to_exitcode(status) and 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
