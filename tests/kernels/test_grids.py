"""Every format is decoded as its makers decode it, to the bit, and rounded as the definition says in C and in NumPy.

``decoded_by_oracles.json`` has random codes and scales, and what the named package
made of them in the dtype that it computes in.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from coded_checkpoints import direction_of

from ablate_shards.kernels.codecs.grids import grid_named
from ablate_shards.kernels.codecs.packing import pack, packed_bytes, unpack
from ablate_shards.kernels.codecs.plain import STORED, decoded, encode
from ablate_shards.kernels.codecs.scales import Spread, decode_scales
from ablate_shards.kernels.native import native
from ablate_shards.kernels.rounding.directed import round_directed
from ablate_shards.kernels.rounding.reference import round_by_definition

ORACLES = json.loads((Path(__file__).parent / "decoded_by_oracles.json").read_text())
GRIDS = ["E4M3", "E2M1", "NF4", "FP4", "int2", "int3", "int4", "int8", "uint3", "uint4", "uint8"]


def single(raw):
    return np.frombuffer(bytes.fromhex(raw), "<f4")


def case_of(oracle):
    """The packed codes of a case, and what they are decoded with."""
    grid, (rows, cols) = grid_named(oracle["codes"]), oracle["shape"]
    packed = np.frombuffer(bytes.fromhex(oracle["packed"]), np.uint8).reshape(rows, -1).copy()
    scales = decode_scales(bytes.fromhex(oracle["scales"]), oracle["scales_dtype"]).reshape(rows, -1)
    if "divisor" in oracle:
        scales = scales / single(oracle["divisor"])
    if "multiplier" in oracle:
        scales = scales * single(oracle["multiplier"])
    zeros = None
    if "zeros" in oracle:
        words = np.frombuffer(bytes.fromhex(oracle["zeros"]), "<i4").reshape(-1, scales.shape[1])
        codes = unpack(np.ascontiguousarray(words.T).view(np.uint8), grid.bits, rows)
        zeros = grid.levels_of(codes).T.astype(np.int8)
    return packed, cols, Spread(grid, tuple(oracle["block"]), scales, zeros)


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda case: f"{case['form']} by {case['oracle'].split()[0]}")
def test_codes_mean_what_their_makers_say(oracle):
    packed, cols, spread = case_of(oracle)
    values = spread.decode_rows(unpack(packed, spread.grid.bits, cols), 0)
    expected = np.frombuffer(bytes.fromhex(oracle["value"]), STORED[oracle["dtype"]]).reshape(values.shape)
    found = np.empty_like(expected)
    encode(values.astype(np.float64), found)
    # Some oracles give zero no sign.
    assert np.array_equal(decoded(found, np.float64), decoded(expected, np.float64))


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda case: f"{case['form']} by {case['oracle'].split()[0]}")
def test_an_unedited_matrix_is_encoded_to_the_bytes_that_it_had(oracle):
    packed, cols, spread = case_of(oracle)
    grid, rows = spread.grid, len(packed)
    codes = unpack(packed, grid.bits, cols).copy()
    scales, zeros = spread.part(slice(0, rows), slice(0, cols))
    target = spread.decode_rows(codes, 0)
    rounded = round_directed(grid, target, codes, scales, direction_of(rows), zeros)
    written = packed.copy()
    pack(codes, grid.bits, written)
    assert np.array_equal(written, packed)
    assert not rounded.changed.any()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("cols", [1, 7, 8, 37])
def test_packed_codes_come_back_and_bits_beyond_them_stay(bits, cols):
    rng = np.random.default_rng(bits)
    raw = rng.integers(0, 256, (5, packed_bytes(cols, bits) + 3), np.uint8)
    given, codes = raw.copy(), rng.integers(0, 1 << bits, (5, cols), np.uint8)
    pack(codes, bits, raw)
    assert np.array_equal(unpack(raw, bits, cols), codes)
    wholes = [
        (int.from_bytes(one, "little"), int.from_bytes(other, "little")) for one, other in zip(raw, given, strict=True)
    ]
    assert all(one >> bits * cols == other >> bits * cols for one, other in wholes)
    assert [int(one) >> bits * (cols - 1) & (1 << bits) - 1 for one, _ in wholes] == codes[:, -1].tolist()


@pytest.mark.parametrize("name", GRIDS)
def test_levels_are_the_codes_in_the_order_of_their_values(name):
    grid = grid_named(name)
    codes = np.flatnonzero(~np.isnan(grid.values)).astype(np.uint8)
    levels = grid.levels_of(codes)
    assert np.array_equal(np.unique(levels), np.arange(grid.lowest, grid.highest + 1))
    assert np.array_equal(levels[np.argsort(grid.values[codes], kind="stable")], np.sort(levels))
    assert np.array_equal(grid.codes_of(levels, codes), codes)
    assert np.array_equal(grid.nearest_levels(grid.values[codes]), levels)


def test_nearest_rounds_halves_to_even():
    halves = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5, 9], np.float32)
    e2m1 = grid_named("E2M1")
    assert e2m1.values[e2m1.codes_of(e2m1.nearest_levels(halves), np.zeros(11, np.uint8))].tolist() == [
        *(0, 1, 1, 2, 2, 4, 4, 0, -1, -4, 6)
    ]
    int4 = grid_named("int4")
    values = np.array([0.5, 1.5, -0.5, -1.5, 7.5, -8.5, 1e30, -1e30], np.float32)
    assert int4.nearest_levels(values).tolist() == [0, 2, 0, -2, 7, -8, 7, -8]
    assert int4.nearest_levels(values, np.int16(3)).tolist() == [3, 5, 3, 1, 7, -5, 7, -8]


def problem(name, rows, cols, *, count=1, zeros=False):
    """Random codes on their grid, their scales and zero points, the matrix without the directions, and these.

    Of grids that take scales of either sign there are both.
    """
    grid, rng = grid_named(name), np.random.default_rng(rows)
    basis = direction_of(rows, count, rows)
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    scales = rng.uniform(0.8, 1.25, (rows, cols)).astype(np.float32) * np.float32(2.8 / np.nanmax(grid.values))
    around = rng.integers(-2, 3, (rows, cols)).astype(np.int8) if zeros else None
    if grid.kind in ("affine", "table"):
        scales *= rng.choice(np.array([-1, 1], np.float32), scales.shape)
    if grid.kind == "affine":
        scales *= 2
        around = -scales * grid.values.max() * rng.uniform(0.4, 0.6, scales.shape).astype(np.float32)
    wide = levels_of_zeros(grid, around)
    levels = grid.levels_nearest_to(weights, np.zeros(weights.shape, np.int16), scales, wide)
    codes = grid.codes_of(levels, np.zeros(levels.shape, np.uint8))
    values = grid.values_of(levels, scales, wide).astype(np.float64)
    target = (values - basis.T @ (basis @ values)).astype(np.float32)
    return grid, codes, scales, around, values, target, basis


def levels_of_zeros(grid, zeros):
    return zeros if zeros is None or grid.kind == "affine" else zeros.astype(np.int16)


def component(grid, codes, scales, zeros, basis):
    wide = levels_of_zeros(grid, zeros)
    return np.linalg.norm(basis @ grid.values_of(grid.levels_of(codes), scales, wide).astype(np.float64))


CASES = [(name, False) for name in GRIDS] + [("int4", True), ("int8", True)]


@pytest.mark.parametrize(("name", "zeros"), CASES)
def test_at_4096_rows_a_thousandth_is_left_where_the_nearest_codes_keep_it(name, zeros):
    grid, codes, scales, around, values, target, basis = problem(name, 4096, 32, zeros=zeros)
    before = np.linalg.norm(basis @ values)
    rounded = round_directed(grid, target, codes, scales, basis, around)
    assert np.sqrt(rounded.nearest.sum()) > (0.8 if grid.bits <= 4 else 0.05) * before
    assert component(grid, codes, scales, around, basis) < 1e-3 * before


@pytest.mark.skipif(not native.is_built(), reason="the library was not built")
@pytest.mark.parametrize("library", sorted(native.LIBRARY.parent.glob("_native*.so")), ids=lambda path: path.stem)
@pytest.mark.parametrize(("name", "zeros"), CASES)
@pytest.mark.parametrize(("rows", "cols", "count"), [(300, 33, 1), (200, 1, 2)])
def test_c_and_numpy_give_the_same_bits(name, zeros, rows, cols, count, library, monkeypatch):
    widths = {"_native": 4, "_native_avx2": 8, "_native_avx512": 16}
    if native._load(library) is None or native._load(native.LIBRARY).ablate_vector_width() < widths[library.stem]:
        pytest.skip("this CPU has no vectors of this width")
    grid, codes, scales, around, _, target, basis = problem(name, rows, cols, count=count, zeros=zeros)
    scales[rows // 2] = 0
    target[:, 0] *= 50  # to both ends of the range
    other = codes.copy()
    monkeypatch.setattr(native, "_library", lambda: native._load(library))
    in_c = round_directed(grid, target, codes, scales, basis, around)
    monkeypatch.setattr(native, "_library", lambda: None)
    in_numpy = round_directed(grid, target, other, scales, basis, around)
    assert np.array_equal(codes, other)
    assert all(np.array_equal(one, two) for one, two in zip(in_c, in_numpy, strict=True))


@pytest.mark.parametrize(("name", "zeros"), CASES)
def test_it_is_what_the_definition_says(name, zeros):
    grid, codes, scales, around, _, target, basis = problem(name, 300, 5, zeros=zeros)
    expected = round_by_definition(grid, target, codes, scales, basis, around)
    given = codes.copy()
    round_directed(grid, target, codes, scales, basis, around)
    assert (grid.levels_of(codes) != expected).mean() <= 2e-3
    assert (codes != given).any()


@pytest.mark.parametrize("name", ["E2M1", "int4"])
def test_a_row_in_which_the_direction_is_tiny_is_not_filled_with_errors(name):
    grid, codes, scales, _, values, _, basis = problem(name, 1024, 192)
    basis[0, 7] = 1e-7  # polishing to the last digit would take many steps in this row
    basis /= np.linalg.norm(basis)
    target = (values - basis.T @ (basis @ values)).astype(np.float32)
    given = component(grid, codes, scales, None, basis)
    round_directed(grid, target, codes, scales, basis)
    off = grid.values_of(grid.levels_of(codes), scales) - target
    errors = np.linalg.norm(off, axis=1) / np.linalg.norm(target, axis=1)
    assert errors[7] < 0.1
    assert errors.max() < 0.35
    assert component(grid, codes, scales, None, basis) < 1e-4 * given
