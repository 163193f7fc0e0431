"""The NumPy form alone: that it rounds as torch does, and that no thread count and no strip shows in a result."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ablate_shards.kernels import project_numpy, reference
from ablate_shards.kernels.project import ProjectOptions, project
from ablate_shards.kernels.project_numpy import NumpyArrays, NumpyForm, decoded, encode

HALVES = {"bfloat16": (np.uint16, torch.bfloat16), "float16": (np.float16, torch.float16)}
EVERY = np.arange(1 << 16, dtype=np.uint16)

halves = pytest.mark.parametrize(("kind", "dtype"), HALVES.values(), ids=HALVES)


def torch_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()


def encoded(values: np.ndarray, kind: type) -> np.ndarray:
    out = np.empty(values.shape, kind)
    with NumpyArrays().quiet():
        encode(values.copy(), out, np.empty_like(values))
    return out.view(np.uint16)


@halves
def test_every_stored_value_is_decoded_as_torch_decodes_it(kind, dtype):
    theirs = torch.from_numpy(EVERY.copy()).view(dtype).float().numpy()
    finite = np.isfinite(theirs)
    assert 63000 < finite.sum() < 65536
    for found, expected in ((EVERY, theirs), (EVERY[finite], theirs[finite])):
        values = decoded(found.view(kind), np.float32)
        assert np.array_equal(values, expected, equal_nan=True)
        assert np.array_equal(np.signbit(values), np.signbit(expected))
    assert np.array_equal(decoded(EVERY.view(kind), np.float64)[finite], theirs[finite].astype(np.float64))


@halves
def test_float32_is_rounded_to_nearest_with_ties_to_even(kind, dtype):
    stored = np.unique(decoded(EVERY.view(kind), np.float32))
    stored = stored[np.isfinite(stored)]
    ties = ((stored[1:].astype(np.float64) + stored[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    scales = np.float32(10.0) ** rng.uniform(-9, 4, 1 << 16).astype(np.float32)
    anything = rng.standard_normal(1 << 16, np.float32) * scales
    above, below = (np.nextafter(ties, np.float32(side)) for side in (np.inf, -np.inf))
    for values in (stored, ties, above, below, anything[np.abs(anything) < 65000], np.array([-0.0], np.float32)):
        assert np.array_equal(encoded(values, kind), torch_bits(values, dtype))
    # What ties tell: cutting off, or rounding them up, would be wrong.
    assert (decoded(encoded(ties, kind).view(kind), np.float32) > ties).any()
    assert (decoded(encoded(ties, kind).view(kind), np.float32) < ties).any()


@pytest.mark.parametrize(
    ("kind", "dtype"), [*HALVES.values(), (np.float32, torch.float32)], ids=["bfloat16", "float16", "float32"]
)
def test_float64_is_rounded_once_and_stays_finite(kind, dtype):
    rng = np.random.default_rng(0)
    stored = rng.standard_normal(1 << 16) if kind == np.float32 else decoded(EVERY.view(kind), np.float64)
    stored = stored[np.isfinite(stored)].astype(np.float32).astype(np.float64)
    near_ties = (stored[1:] + stored[:-1]) / 2 * (1 + rng.choice([-1, 0, 1], len(stored) - 1) * 2.0**-45)
    values = np.concatenate([near_ties, [1e39, -1e39, 70000.0, -0.0, 1 + 2.0**-8 + 2.0**-40]])
    expected = reference.round_to(torch.from_numpy(values), dtype)
    out = np.empty(values.shape, kind)
    encode(values.copy(), out, np.empty_like(values))
    assert np.array_equal(decoded(out, np.float64), expected.double().numpy())
    assert np.isfinite(decoded(out, np.float64)).all()


@pytest.mark.parametrize("strip", [1, 1 << 12, 1 << 20])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("preserve", ["rows", "columns"])
def test_the_size_of_a_strip_does_not_show(monkeypatch, strip, axis, preserve):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((700, 2)))[0].T
    weight = rng.standard_normal((2, 700, 260) if axis == -2 else (2, 260, 700), np.float32)
    options = ProjectOptions(2.5, preserve, axis)
    whole, report = project(weight, basis, options)
    monkeypatch.setattr(project_numpy, "STRIP_ELEMENTS", strip)
    again, same = project(weight, basis, options)
    assert np.array_equal(again, whole)
    assert same.before.component == report.before.component
    assert not np.array_equal(whole, weight)


THREADS = """
import hashlib
import numpy as np
from ablate_shards.kernels.project import ProjectOptions, project

digest = hashlib.sha256()
rng = np.random.default_rng(0)
for rows, cols in ((1500, 3001), (40, 40000), (9000, 33)):
    for axis in (-2, -1):
        for count in (1, 4):
            hidden = (rows, cols)[axis + 2]
            basis = np.zeros((count, hidden))
            for line in range(count):
                basis[line, line::count] = len(basis[line, line::count]) ** -0.5
            weight = rng.standard_normal((rows, cols), np.float32)
            for preserve in ("rows", "columns"):
                result, report = project(weight, basis, ProjectOptions(2.5, preserve, axis))
                digest.update(result.data)
                digest.update(report.before.norms.data)
print(digest.hexdigest())
"""


def test_no_thread_count_shows():
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


def test_products_stay_below_what_openblas_gives_to_several_threads():
    for chunk_rows, cols in ((512, 1), (512, 896), (128, 3584), (16, 28672), (1, 500_000)):
        form = NumpyForm(np.float32, chunk_rows, cols)
        assert form._group * form._width < 9216
        assert form._strip % form._group == 0
        assert form._width * form._panels >= cols
        assert form._width * form._panels < cols + 16 * math.ceil(cols / project_numpy.PANEL) + 16
    assert project_numpy.SEGMENT < 10_000
