"""The native form alone: it rounds as torch does, and neither the CPU nor a thread count shows in a result."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from same_bytes import EXPECTED, digest_of_results

from ablate_shards.kernels import reference
from ablate_shards.kernels.ablate.memory import project
from ablate_shards.kernels.ablate.options import ProjectOptions
from ablate_shards.kernels.ablate.project import Projector, Workspace
from ablate_shards.kernels.choose import choose_form
from ablate_shards.kernels.codecs.plain import decoded, encode
from ablate_shards.kernels.native import native
from ablate_shards.kernels.native.native import NativeForm, is_built

ROOT = Path(__file__).parents[2]
HALVES = {"bfloat16": (np.uint16, torch.bfloat16), "float16": (np.float16, torch.float16)}
EVERY = np.arange(1 << 16, dtype=np.uint16)

halves = pytest.mark.parametrize(("kind", "dtype"), HALVES.values(), ids=HALVES)


def torch_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()


def in_c(values: np.ndarray, kind: type) -> np.ndarray:
    """Rounds values as the update does, which multiplies what is stored by them: ones."""
    ones = np.empty(values.shape, kind)
    encode(np.ones(values.shape), ones)
    block, nothing = ones[None, None], np.zeros((1, 0, 1), values.dtype)
    form = NativeForm(values.dtype.type, 1)
    form.update(block, block, values[None, None], nothing, np.zeros((1, 0, len(values)), values.dtype))
    return block[0, 0]


def in_numpy(values: np.ndarray, kind: type) -> np.ndarray:
    out = np.empty(values.shape, kind)
    with np.errstate(all="ignore"):
        encode(values.astype(np.float64), out)
    return out


rounding = pytest.mark.parametrize("encoded", [in_c, in_numpy])


@halves
def test_every_stored_value_is_decoded_as_torch_decodes_it(kind, dtype):
    theirs = torch.from_numpy(EVERY.copy()).view(dtype).float().numpy()
    finite = np.isfinite(theirs)
    assert 63000 < finite.sum() < 65536
    for found, expected in ((EVERY, theirs), (EVERY[finite], theirs[finite])):
        values = decoded(found.view(kind), np.float32)
        assert np.array_equal(values, expected, equal_nan=True)
        assert np.array_equal(np.signbit(values), np.signbit(expected))
        in_c = NativeForm(np.float32, 1).rows(
            found.view(kind)[None, :, None], np.ones((1, 1, 1), np.float32), squares=False
        )
        assert np.array_equal(in_c[0, 0], expected, equal_nan=True)
    assert np.array_equal(decoded(EVERY.view(kind), np.float64)[finite], theirs[finite].astype(np.float64))


@rounding
@halves
def test_float32_is_rounded_to_nearest_with_ties_to_even(encoded, kind, dtype):
    stored = np.unique(decoded(EVERY.view(kind), np.float32))
    stored = stored[np.isfinite(stored)]
    ties = ((stored[1:].astype(np.float64) + stored[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    scales = np.float32(10.0) ** rng.uniform(-9, 4, 1 << 16).astype(np.float32)
    anything = rng.standard_normal(1 << 16, np.float32) * scales
    above, below = (np.nextafter(ties, np.float32(side)) for side in (np.inf, -np.inf))
    for values in (stored, ties, above, below, anything[np.abs(anything) < 65000], np.array([-0.0], np.float32)):
        assert np.array_equal(encoded(values, kind).view(np.uint16), torch_bits(values, dtype))
    # What ties tell: cutting off, or rounding them up, would be wrong.
    assert (decoded(encoded(ties, kind).view(kind), np.float32) > ties).any()
    assert (decoded(encoded(ties, kind).view(kind), np.float32) < ties).any()


@rounding
@pytest.mark.parametrize(
    ("kind", "dtype"), [*HALVES.values(), (np.float32, torch.float32)], ids=["bfloat16", "float16", "float32"]
)
def test_float64_is_rounded_once_and_stays_finite(encoded, kind, dtype):
    rng = np.random.default_rng(0)
    stored = rng.standard_normal(1 << 16) if kind == np.float32 else decoded(EVERY.view(kind), np.float64)
    stored = stored[np.isfinite(stored)].astype(np.float32).astype(np.float64)
    near_ties = (stored[1:] + stored[:-1]) / 2 * (1 + rng.choice([-1, 0, 1], len(stored) - 1) * 2.0**-45)
    values = np.concatenate([near_ties, [1e39, -1e39, 70000.0, -0.0, 1 + 2.0**-8 + 2.0**-40]])
    expected = reference.round_to(torch.from_numpy(values), dtype)
    out = encoded(values, kind)
    assert np.array_equal(decoded(out, np.float64), expected.double().numpy())
    assert np.isfinite(decoded(out, np.float64)).all()


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compiles the library anew, for every CPU alone, and uses it."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)

    def build(flags: str, compiler: str = "cc") -> str | None:
        monkeypatch.setenv("CC", compiler)
        monkeypatch.setenv("CFLAGS", flags)
        monkeypatch.setattr(hook, "VARIANTS", {})
        _, problem = hook.compile_libraries(ROOT, tmp_path / "_native.so")
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
        native._library.cache_clear()
        return problem or None

    yield build
    monkeypatch.undo()
    native._library.cache_clear()


def test_the_library_is_built_here():
    assert is_built()
    assert choose_form("cpu", on_cpu="native")[0] == "native"


def test_the_bytes_are_those_of_every_machine():
    assert digest_of_results() == EXPECTED


@pytest.mark.parametrize("blas", ["Nehalem", "Haswell"])
def test_neither_numpy_nor_its_blas_shows(blas):
    # On wider vectors NumPy takes powers, and its BLAS takes sums, in other ways.
    names = ("AVX512F", "AVX512CD", "AVX512_SKX", "AVX512_CLX", "AVX512_CNL", "AVX512_ICL", "AVX512_SPR")
    settings = {"OPENBLAS_CORETYPE": blas, "NPY_DISABLE_CPU_FEATURES": " ".join(names), "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests/same_bytes.py"], capture_output=True, text=True,
        env=os.environ | settings,
    )  # fmt: skip
    assert (found.returncode, found.stdout.strip()) == (0, EXPECTED), found.stderr


def test_the_vectors_of_a_cpu_do_not_show(monkeypatch):
    paths = sorted(native.LIBRARY.parent.glob("_native*.so"))
    assert native.LIBRARY in paths
    digests = set()
    for path in paths:
        width = {"_native_avx2": 8, "_native_avx512": 16}.get(path.stem, 4)
        if native._load(native.LIBRARY).ablate_vector_width() < width:
            continue
        monkeypatch.setattr(native, "LIBRARY", path)
        monkeypatch.setattr(native, "_VARIANTS", {})
        native._library.cache_clear()
        assert Path(native._library()._name) == path
        digests.add(digest_of_results())
        monkeypatch.undo()
    native._library.cache_clear()
    assert len(digests) == 1


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="needs a CPU with AVX2")
def test_the_widest_vectors_of_a_cpu_are_used():
    assert Path(native._library()._name).stem in {"_native_avx2", "_native_avx512"}


@pytest.mark.skipif("fma" not in Path("/proc/cpuinfo").read_text(), reason="needs a CPU with fused multiply-adds")
def test_contracted_products_would_show(compiled):
    ours = digest_of_results()
    assert compiled("-O2 -fno-tree-vectorize -mfma -ffp-contract=fast") is None
    assert digest_of_results() != ours


def test_without_a_compiler_torch_does_the_arithmetic(compiled, tmp_path):
    assert "no-such-compiler" in str(compiled("", compiler="no-such-compiler"))
    assert not (tmp_path / "_native.so").exists()
    assert not is_built()
    assert choose_form("cpu", on_cpu="native") == ("torch", "no C compiler was there to build the native form")
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    basis = torch.eye(16, dtype=torch.float64)[:1]
    result, _ = project(weight, basis, ProjectOptions(1.0, "columns"))
    assert result[0].abs().max() < 1e-6 < weight[0].abs().max()
    with pytest.raises(RuntimeError, match="not built"):
        NativeForm(np.float32, 8)


def test_a_library_of_another_version_is_not_used(compiled):
    assert compiled("-O0 -DVERSION=0") is None
    assert not is_built()


def test_a_library_that_lacks_a_function_is_not_used(compiled):
    assert compiled("-O0 -Dablate_move=by_another_name") is None
    assert not is_built()


@pytest.mark.parametrize("preserve", ["rows", "columns", "none"])
@pytest.mark.parametrize("coefficient", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("count", [1, 2])
def test_columns_updated_by_themselves_are_those_of_the_whole(preserve, coefficient, count):
    rng = np.random.default_rng(count)
    basis = np.linalg.qr(rng.standard_normal((24, count)))[0].T.copy()
    weight = rng.standard_normal((24, 75)).astype(np.float32)
    # Among them columns along the direction, and rows that one of them makes up: float64 has to take over there.
    weight[:, :40] = basis[0][:, None] * rng.standard_normal(40) + 1e-3 * weight[:, :40]
    weight[3], weight[:, 5], weight[4] = 0, 0, 1e20 * weight[4]
    workspace = Workspace("cpu", "native")
    projector = Projector(basis, (1, *weight.shape), "F32", ProjectOptions(coefficient, preserve, -2), workspace)
    step = 0
    while step < projector.passes:
        projector.gather(step, weight[None].copy(), 0)
        step += 1
    whole = weight[None].copy()
    projector.apply(whole, 0)
    if preserve == "rows" and coefficient:
        exact = projector._passes._crosses[0, :, 1]
        assert 0 < exact.sum() < len(exact)
    for columns in (slice(0, 1), slice(1, 39), slice(39, 75)):
        part = weight[None, :, columns].copy()
        projector.apply_part(part, 0, columns)
        assert np.array_equal(part, whole[..., columns])


def test_a_thread_count_does_not_show():
    ours = digest_of_results()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(digest_of_results())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ours] * 2
