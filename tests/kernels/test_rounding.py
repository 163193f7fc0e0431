"""FP8 codes mean what torch and transformers say, and directed rounding of all codes does what its definition does."""

import itertools

import numpy as np
import pytest
import torch
from coded_checkpoints import SCALES, decoded, direction_of, quantise, spread_scales

from ablate_shards.kernels.codecs.e4m3 import E4M3
from ablate_shards.kernels.codecs.scales import Spread, decode_scales, spread
from ablate_shards.kernels.native import native
from ablate_shards.kernels.rounding.directed import round_directed
from ablate_shards.kernels.rounding.reference import round_by_definition

CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
VALUES = torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy()
ONE = np.float32(1)


def test_every_code_is_decoded_as_torch_does():
    assert E4M3.values_of(E4M3.levels_of(CODES), ONE).tobytes() != b""
    assert np.array_equal(E4M3.values_of(E4M3.levels_of(CODES), ONE), VALUES)
    assert np.array_equal(E4M3.levels_of(CODES)[np.argsort(VALUES, kind="stable")], np.sort(E4M3.levels_of(CODES)))
    assert not E4M3.has_nan(CODES)
    assert E4M3.has_nan(np.array([0x7F], np.uint8))
    assert E4M3.has_nan(np.array([0, 0xFF], np.uint8))


def test_every_code_is_the_nearest_to_its_value_and_keeps_its_byte():
    assert np.array_equal(E4M3.codes_of(E4M3.nearest_levels(VALUES), CODES), CODES)  # -0 among them


def test_nearest_rounds_as_torch_does():
    rng = np.random.default_rng(0)
    grid = np.sort(VALUES)
    ties = (grid[1:] + grid[:-1]) / 2
    values = [rng.standard_normal(20_000) * size for size in (1e-4, 1e-2, 1, 100, 400)]
    values = np.concatenate([*values, ties, np.nextafter(ties, np.float32(np.inf))]).astype(np.float32)
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3.values_of(E4M3.nearest_levels(values), ONE), expected)


def test_what_is_too_large_becomes_the_greatest_and_never_nan():
    levels = E4M3.nearest_levels(np.array([449, 1e30, np.inf, -1e9], np.float32))
    assert E4M3.codes_of(levels, np.zeros(4, np.uint8)).tolist() == [0x7E, 0x7E, 0x7E, 0xFE]


@pytest.mark.parametrize("kind", SCALES)
def test_scales_are_decoded_as_torch_does(kind):
    generator = torch.Generator().manual_seed(1)
    scales = (torch.rand(300, generator=generator) * 8).to(SCALES[kind])
    found = decode_scales(scales.view(torch.uint8).numpy().tobytes(), kind)
    assert np.array_equal(found, scales.float().numpy())


def test_powers_of_two_at_both_ends_and_nan():
    found = decode_scales(bytes([0, 1, 127, 254, 255]), "F8_E8M0")
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert np.isnan(found[4])


@pytest.mark.parametrize("shape", [(200, 300), (128, 256), (129, 1), (1, 130)])
@pytest.mark.parametrize("layout", ["block", "channel", "tensor"])
@pytest.mark.parametrize("kind", SCALES)
def test_a_matrix_is_decoded_to_the_bit(shape, layout, kind):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    codes, scales = quantise(values, layout, kind)
    rows, cols = shape
    block = {"block": (128, 128), "channel": (1, cols), "tensor": (rows, cols)}[layout]
    grid = scales.float().numpy().reshape(-(-rows // block[0]), -1)
    stored = codes.view(torch.uint8).numpy()
    expected = decoded(codes, scales, layout).numpy()
    for down, across in itertools.product(
        (slice(0, rows), slice(rows // 2, rows)), (slice(0, cols), slice(cols // 3, cols))
    ):
        found = E4M3.values_of(E4M3.levels_of(stored[down, across]), spread(grid, block, down, across))
        assert np.array_equal(found, expected[down, across])
    for first in (0, rows // 2):
        assert np.array_equal(Spread(E4M3, block, grid).decode_rows(stored[first:], first), expected[first:])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_blocks_are_decoded_as_transformers_does(kind):
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config

    codes, scales = quantise(torch.randn((256, 384), generator=torch.Generator().manual_seed(3)), "block")
    scales = scales.to(kind)
    oracle = finegrained.Fp8Dequantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))
    expected = oracle._dequantize_one(codes, scales)
    spreaded = spread(scales.float().numpy(), (128, 128), slice(0, 256), slice(0, 384))
    found = torch.from_numpy(E4M3.values_of(E4M3.levels_of(codes.view(torch.uint8).numpy()), spreaded))
    assert torch.equal(found.to(expected.dtype), expected)


def problem(rows, cols, *, count=1, share=1.0, layout="block", seed=0):
    """Codes, their scales spread out, the ideal matrix without the directions, and the directions."""
    rng = np.random.default_rng(seed)
    basis = direction_of(rows, count, seed)
    values = rng.standard_normal((rows, cols)) * 0.02
    values += (share - 1) * basis.T @ (basis @ values)
    codes, scales = quantise(torch.from_numpy(values).float(), layout)
    wide = spread_scales(scales, (rows, cols), (128, 128) if layout == "block" else None).contiguous().numpy()
    found = decoded(codes, scales, layout).numpy().astype(np.float64)
    target = (found - basis.T @ (basis @ found)).astype(np.float32)
    return codes.view(torch.uint8).numpy().copy(), wide, target, basis


LIBRARIES = sorted(native.LIBRARY.parent.glob("_native*.so"))


@pytest.mark.skipif(not native.is_built(), reason="the library was not built")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("rows", "cols", "count", "layout"),
    [
        (64, 5, 1, "block"),
        (300, 33, 2, "block"),
        (1024, 17, 1, "channel"),
        (512, 16, 3, "tensor"),
        (130, 1, 1, "block"),
    ],
)
def test_c_and_numpy_give_the_same_bits(rows, cols, count, layout, library, monkeypatch):
    if native._load(library) is None or native._load(native.LIBRARY).ablate_vector_width() < widths(library):
        pytest.skip("this CPU has no vectors of this width")
    codes, scales, target, basis = problem(rows, cols, count=count, layout=layout)
    scales[rows // 2] = 0
    codes[3] = 0x80
    wide_codes, wide_target = np.zeros((rows, cols + 3), np.uint8), np.zeros((rows, cols + 2), np.float32)
    wide_codes[:, :cols], wide_target[:, :cols] = codes, target
    monkeypatch.setattr(native, "_library", lambda: native._load(library))
    in_c = round_directed(E4M3, wide_target[:, :cols], wide_codes[:, :cols], scales, basis)
    monkeypatch.setattr(native, "_library", lambda: None)
    in_numpy = round_directed(E4M3, target, codes, scales, basis)
    assert np.array_equal(wide_codes[:, :cols], codes)
    assert not wide_codes[:, cols:].any()
    assert all(np.array_equal(one, other) for one, other in zip(in_c, in_numpy, strict=True))


def widths(library):
    return {"_native": 4, "_native_avx2": 8, "_native_avx512": 16}[library.stem]


def component(codes, scales, basis):
    return basis @ E4M3.values_of(E4M3.levels_of(codes), scales).astype(np.float64)


@pytest.mark.parametrize(("rows", "count", "least"), [(1024, 1, 0.15), (2048, 1, 0.2), (4096, 1, 0.3), (1024, 3, 0.05)])
@pytest.mark.parametrize("layout", ["block", "channel", "tensor"])
def test_the_component_is_gone_where_the_nearest_codes_keep_it(rows, count, least, layout):
    codes, scales, target, basis = problem(rows, 48, count=count, layout=layout)
    before = np.linalg.norm(component(codes, scales, basis))
    nearest = E4M3.codes_of(E4M3.nearest_levels(target / scales), codes)
    rounded = round_directed(E4M3, target, codes, scales, basis)
    assert np.linalg.norm(component(nearest, scales, basis)) > least * before
    assert np.linalg.norm(component(codes, scales, basis)) < 2e-5 * before
    assert np.isclose(np.sqrt(rounded.nearest.sum()), np.linalg.norm(component(nearest, scales, basis)), rtol=1e-4)
    off = E4M3.values_of(E4M3.levels_of(codes), scales).astype(np.float64) - target
    assert np.isclose(rounded.error.sum(), (off**2).sum())
    # It costs little more than the nearest codes do.
    assert rounded.error.sum() < 2.3 * rounded.nearest_error.sum()


@pytest.mark.parametrize(("rows", "cols", "count"), [(64, 5, 1), (300, 7, 1), (300, 3, 2), (1024, 2, 1)])
@pytest.mark.parametrize("form", ["native", "numpy"])
def test_it_is_what_the_definition_says(rows, cols, count, form, monkeypatch):
    if form == "numpy":
        monkeypatch.setattr(native, "_library", lambda: None)
    codes, scales, target, basis = problem(rows, cols, count=count)
    expected = round_by_definition(E4M3, target, codes, scales, basis)
    given = codes.copy()
    round_directed(E4M3, target, codes, scales, basis)
    different = E4M3.levels_of(codes) != expected
    assert different.mean() <= 2e-3
    assert (codes != given).any()


@pytest.mark.parametrize("form", ["native", "numpy"])
def test_columns_do_not_depend_on_what_they_are_computed_with(form, monkeypatch):
    if form == "numpy":
        monkeypatch.setattr(native, "_library", lambda: None)
    codes, scales, target, basis = problem(200, 70)
    together = codes.copy()
    whole = round_directed(E4M3, target, together, scales, basis)
    for start, end in ((0, 1), (1, 64), (64, 69), (69, 70)):
        part = np.ascontiguousarray(codes[:, start:end])
        measured = round_directed(
            E4M3, np.ascontiguousarray(target[:, start:end]), part, np.ascontiguousarray(scales[:, start:end]), basis
        )
        assert np.array_equal(part, together[:, start:end])
        assert all(np.array_equal(one[start:end], other) for one, other in zip(whole, measured, strict=True))


def test_an_unedited_matrix_keeps_every_byte():
    codes = np.random.default_rng(4).choice(CODES, (130, 40))
    scales = np.random.default_rng(5).uniform(0, 2, (130, 1)).astype(np.float32)
    scales[3] = 0
    given = codes.copy()
    round_directed(E4M3, E4M3.values_of(E4M3.levels_of(codes), scales), codes, scales, direction_of(130))
    assert np.array_equal(codes, given)


def test_a_zero_scale_moves_nothing_and_the_greatest_value_goes_no_further():
    codes, scales, target, basis = problem(256, 6)
    scales[10:20] = 0
    given = codes.copy()
    round_directed(E4M3, target * 1e4, codes, scales, basis)
    assert np.array_equal(codes[10:20], given[10:20])
    assert not E4M3.has_nan(codes)
    assert (np.abs(E4M3.levels_of(codes)) == 126).any()
