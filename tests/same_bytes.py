"""One digest of what the native form computes, the same on every CPU and system; needs NumPy and msgspec, no torch.

``python tests/same_bytes.py`` ends with 1 where the native form was not built or the digest is another one: the
wheels of each platform are checked by it.
"""

import hashlib
import itertools
import sys

import numpy as np

from ablate_shards.kernels.ablate.memory import project
from ablate_shards.kernels.ablate.options import ProjectOptions
from ablate_shards.kernels.codecs.grids import grid_named
from ablate_shards.kernels.codecs.plain import STORED, encode
from ablate_shards.kernels.merge.merge_numpy import NumpyMerger
from ablate_shards.kernels.native import native
from ablate_shards.kernels.rounding.directed import round_directed

EXPECTED = "0ed0f2c78c77b4b970e7005f7dfcaa2f60ffca3ea605a86e9437af3d77f82bb1"


def digest_of_results() -> str:
    """Of the bytes of edits and merges in many shapes, of codes, and of the sums that directions are made of."""
    digest = hashlib.sha256()
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        # Integers of a generator are the same everywhere; its normal numbers are made with a logarithm.
        return rng.integers(-(1 << 20), 1 << 20, shape).astype(np.float32) * np.float32(2.0**-22)

    shapes, counts = ((300, 901), (10, 9001), (1500, 33), (1, 6)), (1, 5)
    for dtype, (rows, cols), axis, count in itertools.product(STORED, shapes, (-2, -1), counts):
        basis = basis_of((rows, cols)[axis + 2], count)
        weight = np.empty((rows, cols), STORED[dtype])
        encode(values(rows, cols).astype(np.float64), weight)
        for preserve, coefficient in itertools.product(("rows", "columns"), (1.0, 2.5)):
            result, report = project(weight, basis, ProjectOptions(coefficient, preserve, axis))
            digest.update(result.data)
            digest.update(report.before.norms.data)
        sums = np.zeros((7, cols))
        assert native.add_group_sums(weight, 3, sums)
        digest.update(sums.data)
        products = np.empty(rows)
        assert native.group_dots(weight, 3, sums, sums[:, 0], products)
        digest.update(products.data)
        merged = weight.copy()
        NumpyMerger(values(rows, 3).astype(np.float64), values(3, cols).astype(np.float64), 0.5, dtype).apply(merged, 0)
        digest.update(merged.data)
    for name in ("E4M3", "E2M1", "signed8", "int4"):
        grid, codes = grid_named(name), np.zeros((96, 70), np.uint8)
        target, scales = values(96, 70), np.full((96, 70), 2.0**-6, np.float32)
        round_directed(grid, target, codes, scales, basis_of(96, 2))
        digest.update(codes.data)
    return digest.hexdigest()


def basis_of(hidden: int, count: int) -> np.ndarray:
    """Orthonormal rows whose values are exact roots and quotients."""
    basis = np.zeros((min(count, hidden), hidden))
    for line in range(len(basis)):
        basis[line, line :: len(basis)] = 1 / np.sqrt(len(basis[line, line :: len(basis)]))
    return basis


if __name__ == "__main__":
    if not native.is_built():
        sys.exit("the native form was not built")
    found = digest_of_results()
    print(found)
    sys.exit(0 if found == EXPECTED else f"expected {EXPECTED}")
