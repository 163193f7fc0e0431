"""The registry: importing this fills ``benchmarks.harness.CASES``, in this order."""

# ruff: noqa: I001

from benchmarks.cases import command
from benchmarks.cases import kernels
from benchmarks.cases import directions
from benchmarks.cases import merge
from benchmarks.cases import diff
from benchmarks.cases import capture
from benchmarks.cases import transfer
from benchmarks.cases import answers

__all__ = ["answers", "capture", "command", "diff", "directions", "kernels", "merge", "transfer"]
