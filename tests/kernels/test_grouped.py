"""Sums and products of grouped rows: in C and in NumPy, against a loop over the rows."""

import numpy as np
import pytest

from ablate_shards.kernels.codecs.plain import STORED, decoded, encode
from ablate_shards.kernels.measure.grouped import add_group_sums, group_dots, pairs_in_order
from ablate_shards.kernels.native import native


@pytest.fixture(params=["C", "NumPy"])
def form(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(native, "_library", lambda: None)
    return request.param


def rows(kind: str, count: int, size: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((count, size))
    if kind == "F64":
        return values
    stored = np.empty(values.shape, STORED[kind])
    encode(values, stored)
    return stored


@pytest.mark.parametrize("kind", [*STORED, "F64"])
@pytest.mark.parametrize("size", [1, 7, 8, 513, 1030])
@pytest.mark.parametrize("groups", [1, 2, 10])
def test_every_row_counts_once_in_its_group(form, kind, size, groups):
    weights = np.random.default_rng(1).standard_normal((groups, size))
    offsets = np.arange(1.0, groups + 1)
    for count, first in ((0, 0), (1, 3), (9, 0), (79, 1), (1023, 7)):
        block = rows(kind, count, size)
        exact = block if kind == "F64" else decoded(block, np.float64)
        expected, sums = np.zeros((groups, size)), np.ones((groups, size))
        for number, row in enumerate(exact):
            expected[(first + number) % groups] += row
        add_group_sums(block, first, sums)
        np.testing.assert_allclose(sums, 1 + expected, rtol=1e-12, atol=1e-12)
        of_row = [(first + number) % groups for number in range(count)]
        products = [row @ weights[group] - offsets[group] for row, group in zip(exact, of_row, strict=True)]
        np.testing.assert_allclose(group_dots(block, first, weights, offsets), products, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_what_is_not_finite_shows_in_the_sum(form, kind):
    block = rows(kind, 12, 20)
    block[5, 6] = 0x7F80 if kind == "BF16" else np.inf
    block[6, 7] = 0x7FC0 if kind == "BF16" else np.nan
    sums = np.zeros((2, 20))
    with np.errstate(invalid="ignore"):
        add_group_sums(block, 0, sums)
    assert sums[1, 6] == np.inf
    assert np.isnan(sums[0, 7])
    assert np.isfinite(sums).sum() == 38


@pytest.mark.parametrize(("lower", "higher"), [(1, 1), (1, 50), (50, 1), (200, 300)])
@pytest.mark.parametrize("digits", [0, 1, 12])
def test_pairs_are_counted_in_any_order_and_ties_half(form, lower, higher, digits):
    rng = np.random.default_rng(0)
    for shift in (-9.0, 0.0, 0.5, 9.0):
        low, high = np.round(rng.standard_normal(lower), digits), np.round(rng.standard_normal(higher) + shift, digits)
        expected = 2 * (low[:, None] < high).sum() + (low[:, None] == high).sum()
        assert pairs_in_order(low, high) == expected


def test_as_many_ties_as_can_be_are_counted_in_linear_time(form):
    assert pairs_in_order(np.ones(10**6), np.ones(10**6)) == 10**12


def test_values_may_begin_anywhere_in_a_file(form):
    stored = rows("F32", 10, 9)
    raw = np.frombuffer(b"\0" + stored.tobytes(), np.uint8)[1:].view(np.float32).reshape(stored.shape)
    assert not raw.flags.aligned
    sums, expected = np.zeros((3, 9)), np.zeros((3, 9))
    add_group_sums(raw, 2, sums)
    add_group_sums(stored, 2, expected)
    np.testing.assert_allclose(sums, expected, rtol=1e-12)
    offsets = np.zeros(3)
    found = group_dots(raw, 2, expected, offsets)
    np.testing.assert_allclose(found, group_dots(stored, 2, expected, offsets), rtol=1e-12)
