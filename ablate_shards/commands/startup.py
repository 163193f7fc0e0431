"""What makes a command start sooner; called before the packages that it concerns are imported."""

import gc
import os

__all__ = ["collect_garbage_less_often", "one_blas_thread"]

_ALLOCATIONS = 50_000


def one_blas_thread() -> None:
    """Keeps NumPy's OpenBLAS from starting threads, which spin for a tenth of a second; jobs are threads already."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def collect_garbage_less_often() -> None:
    """Makes garbage collection rarer: while importing it finds nothing and takes a tenth of the time."""
    gc.set_threshold(_ALLOCATIONS, *gc.get_threshold()[1:])
