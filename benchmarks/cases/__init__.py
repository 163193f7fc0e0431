"""The registry: importing this fills ``benchmarks.harness.CASES``, in the order of the table of contents."""

from benchmarks.cases import capture, command, diff, directions, kernels, merge

__all__ = ["capture", "command", "diff", "directions", "kernels", "merge"]
