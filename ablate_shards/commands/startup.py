"""What makes a command start sooner; called before what it is about is imported."""

import gc
import os

__all__ = ["one_blas_thread", "rarer_collections"]

_ALLOCATIONS = 50_000


def one_blas_thread() -> None:
    """Keeps NumPy's OpenBLAS from starting threads, which spin for a tenth of a second; jobs are threads already."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def rarer_collections() -> None:
    """Makes the search for garbage rarer: what imports make stays, and looking costs a tenth of their time."""
    gc.set_threshold(_ALLOCATIONS, *gc.get_threshold()[1:])
