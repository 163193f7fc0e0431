"""The NumPy, torch and Triton forms of the low-rank update against the float64 reference."""

import hashlib
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ablate_shards.errors import PlanError
from ablate_shards.kernels import reference
from ablate_shards.kernels.merge import merge_numpy
from ablate_shards.kernels.merge.merge_numpy import Added, NumpyMerger
from ablate_shards.kernels.merge.merge_torch import TILE_COLS, TILE_ROWS, Merger, merge, update_norm
from ablate_shards.kernels.native import native

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
FACTORS = (torch.bfloat16, torch.float32)

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make(rows, cols, rank, dtype, *, factor=torch.float32, size=0.01, seed=0):
    """Returns weight, left and right; the update is ``size`` times the weight in norm, or so."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, cols, generator=generator)
    left = size * 0.02 / math.sqrt(rank) * torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, cols, generator=generator)
    return weight.to(dtype), left.to(factor), right.to(factor)


def assert_accurate(result, weight, left, right, scale=1.0, *, strict=False):
    exact = reference.merge(weight, left, right, scale)
    result, dtype = result.cpu(), weight.dtype
    # Factors of few bits make results that lie between two float32 numbers, as far as float64 can tell.
    tie = 1e-12 * exact.abs()
    wrong = int(
        ((result != reference.round_to(exact - tie, dtype)) & (result != reference.round_to(exact + tie, dtype))).sum()
    )
    expected = 1e-3 * result.numel()
    assert wrong <= (expected if strict else expected + 4 * math.sqrt(expected + 1))
    info = torch.finfo(dtype)
    largest = torch.maximum(weight.cpu().double().abs(), exact.abs()).clamp(min=info.tiny)
    unit = info.eps * torch.ldexp(torch.ones_like(exact), torch.frexp(largest)[1] - 1)
    assert ((result.double() - exact).abs() <= unit).all()


def as_stored(weight):
    """Returns a view of a tensor's values, bfloat16 as its bits."""
    return weight.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()


def in_blocks(merger, block, step):
    """Adds an update to a matrix block by block; returns what was found of all of it."""
    found = [merger.apply(block[start : start + step], start) for start in range(0, len(block), step)]
    return Added([squares for each in found for squares in each.squares], any(each.overflows for each in found))


def norm_of(added):
    return math.sqrt(math.fsum(added.squares))


def with_numpy(weight, left, right, scale=1.0, *, block_rows=1):
    """Returns the result of the NumPy form, and what was found meanwhile."""
    result = weight.clone(memory_format=torch.contiguous_format)
    merger = NumpyMerger(left.float().numpy(), right.float().numpy(), scale, STORED[weight.dtype])
    return result, in_blocks(merger, as_stored(result), -(-block_rows // merger.chunk_rows) * merger.chunk_rows)


def is_rounded(result, weight, left, right, scale=1.0):
    """Which elements are the exact sum correctly rounded, as far as float64 can tell on which side of a tie it is."""
    exact = reference.merge(weight, left, right, scale)
    tie = 1e-12 * reference.merge(weight.abs(), left.abs(), right.abs(), abs(scale))
    least, most = (reference.round_to(exact + side, weight.dtype) for side in (-tie, tie))
    return (least <= result) & (result <= most)


@quick
@given(
    rows=st.integers(1, 2 * TILE_ROWS + 3),
    cols=st.sampled_from([1, 7, 64, 300, 4096, 4100]),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from(FACTORS),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    scale=st.sampled_from([1.0, 2.0, -0.37]),
    block_rows=st.integers(1, 400),
)
def test_the_numpy_form_rounds_every_element_as_the_exact_sum(rows, cols, rank, dtype, factor, size, scale, block_rows):
    weight, left, right = make(rows, cols, rank, dtype, factor=factor, size=size, seed=rows)
    result, found = with_numpy(weight, left, right, scale, block_rows=block_rows)
    assert is_rounded(result, weight, left, right, scale).all()
    assert not found.overflows
    again, other = with_numpy(weight, left, right, scale, block_rows=1000)
    assert torch.equal(again, result)
    assert other == found


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("rank", [4, 64])
def test_without_its_bound_float32_would_round_some_the_other_way(monkeypatch, rank, is_built):
    if not is_built:
        monkeypatch.setattr(native, "_library", lambda: None)
    weight, left, right = make(1000, 3000, rank, torch.bfloat16, size=1.0)
    # In some places next to nothing is left of large terms.
    left[:, 1], right[1] = left[:, 0], -right[0] * (1 + 2.0**-9)
    again = []
    single = NumpyMerger._add_single
    monkeypatch.setattr(NumpyMerger, "_add_single", lambda *given: again.append(single(*given)) or again[-1])
    result, _ = with_numpy(weight, left, right, 0.3)
    assert is_rounded(result, weight, left, right, 0.3).all()
    assert 0 < sum(len(unsure) for unsure, _ in again) < merge_numpy.MOST_AGAIN * weight.numel()
    monkeypatch.setattr(merge_numpy, "UNIT", 0.0)
    careless, _ = with_numpy(weight, left, right, 0.3)
    assert not is_rounded(careless, weight, left, right, 0.3).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiler_changes_no_bit(monkeypatch, dtype):
    weight, left, right = make(333, 4500, 16, dtype, size=1.0)
    compiled, found = with_numpy(weight, left, right, 0.3)
    monkeypatch.setattr(native, "_library", lambda: None)
    result, other = with_numpy(weight, left, right, 0.3)
    assert torch.equal(result, compiled)
    assert norm_of(other) == pytest.approx(norm_of(found), rel=1e-7)


THREADS = """
import hashlib
import numpy as np
from ablate_shards.kernels.merge.merge_numpy import NumpyMerger, update_norm

digest = hashlib.sha256()
rng = np.random.default_rng(0)
for rows, cols in ((500, 1000), (40, 9000)):
    for rank in (3, 16, 80):
        left = rng.standard_normal((rows, rank), np.float32) * 0.01
        right = rng.standard_normal((rank, cols), np.float32)
        for dtype, stored in (("BF16", np.uint16), ("F16", np.float16), ("F32", np.float32)):
            weight = rng.standard_normal((rows, cols), np.float32)
            weight = weight.view(np.uint32) >> 16 if dtype == "BF16" else weight
            weight = weight.astype(stored)
            merger = NumpyMerger(left, right, 0.7, dtype)
            found = merger.apply(weight, 0)
            digest.update(weight.data)
            digest.update(f"{found} {update_norm(left, right)}".encode())
print(digest.hexdigest())
"""


def test_no_thread_count_of_blas_shows_in_the_numpy_form():
    digests = {
        subprocess.run(
            [sys.executable, "-c", THREADS],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


@quick
@given(
    rows=st.integers(1, 2 * TILE_ROWS + 3),
    cols=st.integers(1, 300),
    rank=st.integers(1, 33),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from(FACTORS),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    scale=st.sampled_from([1.0, 2.0, -0.37]),
    block_rows=st.integers(1, 400),
)
def test_every_shape_is_accurate_whatever_the_blocks(rows, cols, rank, dtype, factor, size, scale, block_rows):
    weight, left, right = make(rows, cols, rank, dtype, factor=factor, size=size, seed=rows)
    kept = weight.clone()
    result = merge(weight, left, right, scale, form="torch", block_rows=block_rows)
    assert torch.equal(weight, kept)
    assert_accurate(result, weight, left, right, scale)
    assert torch.equal(result, merge(weight, left, right, scale, form="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_matrix_is_accurate_and_a_float32_sum_would_not_be(dtype):
    weight, left, right = make(513, TILE_COLS + 700, 64, dtype, size=1.0)
    # Two directions that cancel each other, and are far larger than all the rest.
    left[:, 0] *= 1e4 if dtype == torch.float32 else 1e7
    left[:, 63], right[63] = -left[:, 0], right[0]
    result = merge(weight, left, right, form="torch")
    assert_accurate(result, weight, left, right, strict=True)
    assert is_rounded(with_numpy(weight, left, right)[0], weight, left, right).all()
    careless = (weight.float() + left @ right).to(dtype)
    with pytest.raises(AssertionError):
        assert_accurate(careless, weight, left, right, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "rank"), [(1, 1, 1), (65, 257, 3), (130, 300, 16)])
def test_the_triton_form_is_accurate(triton_device, dtype, rows, cols, rank):
    weight, left, right = (part.to(triton_device) for part in make(rows, cols, rank, dtype, size=0.3))
    result = merge(weight, left, right, 0.5, form="triton")
    assert_accurate(result, weight, left, right, 0.5)
    again = merge(weight, left, right, 0.5, form="triton", block_rows=1)
    assert torch.equal(result, again)
    assert not torch.equal(result, weight)


def test_strided_factors_and_an_output_in_place():
    weight, left, right = make(70, 90, 4, torch.bfloat16, size=0.5)
    expected = merge(weight, left, right, form="torch")
    transposed = merge(weight.mT.contiguous().mT, left.mT.contiguous().mT, right.mT.contiguous().mT, form="torch")
    assert torch.equal(transposed, expected)
    assert merge(weight, left, right, form="torch", out=weight) is weight
    assert torch.equal(weight, expected)


def test_threads_do_not_change_a_bit():
    weight, left, right = make(400, 1000, 16, torch.float32, size=1.0)
    expected = merge(weight, left, right, form="torch")
    results = []

    def run():
        results.append(merge(weight, left, right, form="torch", block_rows=TILE_ROWS))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(2)
    run()
    torch.set_num_threads(1)
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # from the interpreter, which is NumPy
@pytest.mark.parametrize("form", ["numpy", "torch", "triton"])
def test_norms_and_overflow_are_seen(form, triton_device):
    weight, left, right = (part.to(triton_device) for part in make(200, 300, 3, torch.float16))

    def found_in(block, scale):
        if form == "numpy":
            return with_numpy(block.cpu(), left.cpu(), right.cpu(), scale)[1]
        merger = Merger(left, right, scale, torch.float16, form=form)
        return in_blocks(merger, block, merger.chunk_rows)

    found = found_in(weight.clone(), 1.0)
    assert norm_of(found) == pytest.approx(float(weight.double().norm()), rel=1e-6 if form == "numpy" else 1e-12)
    assert not found.overflows
    assert found_in(weight.clone(), 1e9).overflows
    for bad in (math.nan, math.inf):
        broken = weight.clone()
        broken[150, 7] = bad
        found = found_in(broken, 1.0)
        assert found.overflows
        assert not math.isfinite(norm_of(found))


def test_the_norm_of_an_update_needs_no_product():
    _, left, right = make(50, 60, 7, torch.float32)
    whole = float((left.double() @ right.double()).norm())
    assert update_norm(left, right) == pytest.approx(whole, rel=1e-12)
    assert update_norm(torch.zeros(5, 2), right[:2]) == 0.0
    assert merge_numpy.update_norm(left.numpy(), right.numpy()) == pytest.approx(whole, rel=1e-12)
    assert merge_numpy.update_norm(np.zeros((5, 2)), right[:2].numpy()) == 0.0


def test_what_does_not_fit_is_refused():
    weight, left, right = make(10, 12, 2, torch.float32)
    with pytest.raises(PlanError, match=r"\[10\] and \[11\]"):
        merge(weight, left, right[:, :11])
    with pytest.raises(PlanError, match=r"\[10, 2\] and \[1, 12\]"):
        merge(weight, left, right[:1])
    with pytest.raises(PlanError, match="float64"):
        merge(weight.double(), left, right)
