"""The NumPy, torch and Triton forms against the float64 reference, and what must hold of every form."""

import itertools
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ablate_shards.errors import DirectionsError, PlanError
from ablate_shards.kernels import reference
from ablate_shards.kernels.ablate import resident
from ablate_shards.kernels.ablate.memory import project, project_vector, stream, vector_component
from ablate_shards.kernels.ablate.options import Measure, ProjectOptions, norm_drift
from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace
from ablate_shards.kernels.ablate.resident import InPlaceAblation, project_
from ablate_shards.kernels.choose import choose_form
from ablate_shards.kernels.codecs.plain import stored_dtype

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRESERVES = ("rows", "columns", "none")
AXES = (-2, -1)

# One tolerance table: the share of elements that may differ from the correctly rounded value, and the
# largest error relative to the norm of the vector. No 16-bit element may be off by more than one unit.
TOLERANCE = {torch.bfloat16: (1e-3, None), torch.float16: (1e-3, None), torch.float32: (None, 1e-6)}

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_basis(count: int, hidden: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(hidden, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(columns).Q.mT.contiguous()


def make_weight(
    basis: Tensor,
    features: int,
    dtype: torch.dtype,
    *,
    axis: int = -2,
    batch: int = 2,
    mix: float = 0.3,
    seed: int = 1,
) -> Tensor:
    """Random weights, a share ``mix`` of whose columns' norm lies along the directions."""
    generator = torch.Generator().manual_seed(seed)
    hidden = basis.shape[1]
    noise = torch.randn(batch, hidden, features, generator=generator, dtype=torch.float64)
    along = torch.randn(batch, len(basis), features, generator=generator, dtype=torch.float64)
    weight = 0.02 * (noise + mix * math.sqrt(hidden) * basis.mT @ along)
    return (weight if axis == -2 else weight.mT).contiguous().to(dtype)


def in_residual_first(weight: Tensor, axis: int) -> Tensor:
    return weight.double() if axis == -2 else weight.double().mT


def component(weight: Tensor, basis: Tensor, axis: int = -2) -> float:
    matrix = in_residual_first(weight, axis)
    return float(torch.linalg.norm(basis @ matrix) / torch.linalg.norm(matrix))


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype around some float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny))[1] - 1
    return info.eps * torch.ldexp(torch.ones_like(values), exponent)


def largest_term(weight: Tensor, basis: Tensor, options: ProjectOptions) -> Tensor:
    """The largest of the products that several directions subtract from each element."""
    matrix = weight.double() if options.axis == -2 else weight.double().mT
    rows = torch.ones_like(matrix[..., :1])
    if options.preserve == "rows":
        rows = matrix.norm(dim=-1, keepdim=True)
        matrix = matrix / torch.where(rows > 0, rows, 1.0)
    products = basis.mT[..., None].abs() * (basis @ matrix).abs()[..., None, :, :]
    terms = abs(options.coefficient) * rows * products.amax(dim=-2)
    return terms if options.axis == -2 else terms.mT


def assert_accurate(
    result: Tensor, weight: Tensor, basis: Tensor, options: ProjectOptions, *, strict: bool = False
) -> None:
    """Compare with the reference; unless strict, allow for chance in the share of a small tensor."""
    exact, _ = reference.ablate(
        weight, basis, coefficient=options.coefficient, preserve=options.preserve, axis=options.axis
    )
    result, weight = result.cpu(), weight.cpu()
    assert result.isfinite().all()
    share, relative = TOLERANCE[weight.dtype]
    limit = torch.finfo(weight.dtype).max
    error = (result.double() - exact.clamp(-limit, limit)).abs()
    in_rows = (options.preserve == "rows") == (options.axis == -2)
    norms = torch.linalg.vector_norm(weight.double(), dim=-1 if in_rows else -2, keepdim=True)
    # Where a vector vanishes altogether, what the reference has left is float64 rounding.
    noise = 1e-13 * norms
    if share is not None:
        wrong = int(((result != reference.round_to(exact, weight.dtype)) & (error > noise)).sum())
        expected = share * weight.numel()
        assert wrong <= (expected if strict else expected + 4 * math.sqrt(expected + 1))
        larger = torch.maximum(weight.double().abs(), exact.abs())
        if len(basis) > 1:
            larger = torch.maximum(larger, largest_term(weight, basis, options))
        assert (error <= spacing(larger, weight.dtype) + noise).all()
    if relative is not None:
        assert (error <= relative * norms + spacing(torch.zeros(1).double(), weight.dtype)).all()


def in_form(weight: Tensor, form: str) -> Tensor | np.ndarray:
    """The same memory as a form takes it."""
    if form != "native":
        return weight
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def meter_of(weight: Tensor, basis: Tensor, options: ProjectOptions, form: str) -> tuple[Meter, Tensor | np.ndarray]:
    """A meter for a weight, and the weight as it takes it."""
    weight = in_form(weight, form)
    workspace = Workspace(CPU, form)
    return Meter(basis.numpy(), tuple(weight.shape), stored_dtype(weight), options, workspace), weight


def run(
    weight: Tensor,
    basis: Tensor,
    options: ProjectOptions,
    *,
    form: str = "native",
    block_rows: int = 1 << 20,
    chunks_at_once: int = 2,
) -> tuple[Tensor, Projector]:
    """Stream a weight ``[batch, rows, cols]`` through a projector as the executor does."""
    result = weight.clone()
    weight = in_form(result, form)
    shape = tuple(weight.shape)
    workspace = Workspace(result.device, form, chunks_at_once=chunks_at_once)
    projector = Projector(basis.numpy(), shape, stored_dtype(weight), options, workspace)
    stream(projector, weight, block_rows=block_rows)
    return result, projector


forms = pytest.mark.parametrize("form", ["native", "torch"])
modes = pytest.mark.parametrize(("preserve", "axis"), list(itertools.product(PRESERVES, AXES)))


@forms
class TestAgainstReference:
    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("coefficient", [1.0, 2.5])
    @pytest.mark.parametrize("mix", [0.05, 1.0])
    def test_meets_the_tolerance(self, form, preserve, axis, dtype, coefficient, mix):
        basis = make_basis(1, 192)
        weight = make_weight(basis, 333, dtype, axis=axis, mix=mix)
        options = ProjectOptions(coefficient, preserve, axis)
        result, report = project(weight, basis, options, form=form)
        assert_accurate(result, weight, basis, options, strict=True)
        assert report.before.component == pytest.approx(component(weight, basis, axis), rel=1e-6)
        assert report.after.component == pytest.approx(component(result, basis, axis), rel=1e-4, abs=1e-8)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_tolerance_rejects_what_is_wrong(self, form, dtype):
        basis = make_basis(1, 64)
        weight = make_weight(basis, 50, dtype)
        options = ProjectOptions(1.0, "columns")
        for wrong in (weight, project(weight, basis, ProjectOptions(1.01, "columns"), form=form)[0]):
            with pytest.raises(AssertionError):
                assert_accurate(wrong, weight, basis, options)

    @quick
    @given(
        hidden=st.integers(1, 70),
        features=st.integers(1, 70),
        count=st.integers(1, 4),
        batch=st.integers(1, 2),
        coefficient=st.floats(-1, 3),
        preserve=st.sampled_from(PRESERVES),
        axis=st.sampled_from(AXES),
        dtype=st.sampled_from(DTYPES),
        mix=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
        special=st.sampled_from(["none", "zero", "parallel", "orthogonal"]),
        seed=st.integers(0, 99),
    )
    def test_odd_shapes(
        self, form, hidden, features, count, batch, coefficient, preserve, axis, dtype, mix, special, seed
    ):
        basis = make_basis(min(count, (hidden + 1) // 2), hidden, seed)
        weight = make_weight(basis, features, dtype, axis=axis, batch=batch, mix=mix, seed=seed)
        first = (weight if axis == -2 else weight.mT)[:, :, 0]
        if special == "zero":
            first.zero_()
        elif special == "parallel":
            first.copy_(basis[0])
        elif special == "orthogonal":
            first.copy_(first.double() - first.double() @ basis.mT @ basis)
        options = ProjectOptions(coefficient, preserve, axis)
        result, _ = project(weight, basis, options, form=form)
        assert_accurate(result, weight, basis, options)

    @modes
    def test_reference_form_is_the_rounded_reference(self, form, preserve, axis):
        basis = make_basis(2, 40)
        weight = make_weight(basis, 30, torch.bfloat16, axis=axis)
        options = ProjectOptions(1.5, preserve, axis)
        result, report = project(weight, basis, options, form="reference")
        exact, _ = reference.ablate(weight, basis, coefficient=1.5, preserve=preserve, axis=axis)
        assert torch.equal(result, reference.round_to(exact, torch.bfloat16))
        streamed = project(weight, basis, options, form=form)[1]
        assert report.before.component == pytest.approx(streamed.before.component, rel=1e-6)
        assert np.allclose(report.before.norms, streamed.before.norms, rtol=1e-6, atol=0)

    def test_any_strides_and_leading_dimensions(self, form):
        basis = make_basis(1, 24)
        weight = torch.randn(2, 3, 50, 48, generator=torch.Generator().manual_seed(0))[..., ::2].mT.bfloat16()
        options = ProjectOptions(1.0, "columns")
        result, _ = project(weight.mT.contiguous().mT, basis, options, form=form)
        same, _ = project(weight.contiguous().view(6, 24, 50), basis, options, form=form)
        assert torch.equal(result, same.view(2, 3, 24, 50))

    def test_writes_to_out_and_leaves_the_weight(self, form):
        basis = make_basis(1, 24)
        weight = make_weight(basis, 9, torch.float16)
        before = weight.clone()
        out = torch.full_like(weight, float("nan"))
        result, _ = project(weight, basis, ProjectOptions(), form=form, out=out)
        assert result is out
        assert torch.equal(weight, before)
        assert out.isfinite().all()


class TestTriton:
    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_meets_the_tolerance(self, preserve, axis, dtype, triton_device):
        basis = make_basis(1, 70)
        weight = make_weight(basis, 300, dtype, axis=axis)
        options = ProjectOptions(2.5, preserve, axis)
        result, report = project(weight.to(triton_device), basis, options, form="triton")
        assert_accurate(result, weight, basis, options)
        assert report.before.component == pytest.approx(component(weight, basis, axis), rel=1e-6)

    @modes
    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
    def test_several_directions_and_special_vectors(self, preserve, axis, triton_device):
        basis = make_basis(3, 33)
        weight = make_weight(basis, 10, torch.float32, axis=axis)
        residual_first = weight if axis == -2 else weight.mT
        residual_first[:, :, 0] = basis[1].float()
        residual_first[:, :, 1] = 0
        residual_first[0, :, 2] *= 1e25
        options = ProjectOptions(1.0, preserve, axis)
        result, report = project(weight.to(triton_device), basis, options, form="triton")
        assert_accurate(result, weight, basis, options)
        assert report.degenerate == project(weight, basis, options, form="torch")[1].degenerate

    @modes
    def test_blocks_and_batches_do_not_show(self, preserve, axis, triton_device):
        basis = make_basis(1, 600 if axis == -2 else 40)
        weight = make_weight(basis, 40 if axis == -2 else 600, torch.float32, axis=axis).to(triton_device)
        options = ProjectOptions(2.5, preserve, axis)
        whole, projector = run(weight, basis, options, form="triton")
        assert projector.chunk_rows < 600
        assert torch.equal(run(weight, basis, options, form="triton", block_rows=1)[0], whole)
        assert torch.equal(run(weight[1:], basis, options, form="triton")[0], whole[1:])

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_compiled_kernels_at_size(self, preserve, axis, dtype):
        basis = make_basis(2, 1024)
        weight = make_weight(basis, 3584, dtype, axis=axis, batch=3).cuda()
        options = ProjectOptions(2.5, preserve, axis)
        result, report = project(weight, basis, options, form="triton")
        assert_accurate(result, weight, basis, options, strict=True)
        again, _ = project(weight, basis, options, form="triton", block_rows=1)
        assert torch.equal(result, again)
        assert report.before.component == pytest.approx(component(weight.cpu(), basis, axis), rel=1e-6)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_torch_form_on_the_gpu(self):
        basis = make_basis(1, 256)
        weight = make_weight(basis, 500, torch.bfloat16)
        options = ProjectOptions(1.0, "rows")
        result, _ = project(weight.cuda(), basis, options, form="torch")
        assert_accurate(result, weight, basis, options)


def assert_in_place(
    weights: list[Tensor],
    basis: Tensor,
    options: ProjectOptions,
    *,
    form: str,
    device: torch.device = CPU,
    left: bool | None = None,
) -> list[Tensor]:
    """Ablate copies of weights in place, check them, and return them.

    What the kernels leave to the streamed form must be as it was. With ``left``, there must be some, or none.
    """
    edited = [weight.to(device, copy=True) for weight in weights]
    given = {
        matrix.data_ptr(): original
        for weight, copy in zip(weights, edited, strict=True)
        if copy.is_contiguous()
        for matrix, original in zip(copy.view(-1, *copy.shape[-2:]), weight.view(-1, *weight.shape[-2:]), strict=True)
    }
    ablation = InPlaceAblation(edited, basis, options, form=form)
    ablation.launch()
    odd = [found for resident in ablation.resident for found in resident.odd()]
    for matrix, columns in odd:
        part = slice(None) if columns is None else columns.cpu()
        assert torch.equal(bits(matrix.cpu()[:, part]), bits(given[matrix.data_ptr()][:, part]))
    assert left is None or (bool(ablation.resident), bool(odd)) == (True, left)
    count = ablation.settle()
    for weight, result in zip(weights, edited, strict=True):
        rows, cols = weight.shape[-2:]
        assert_accurate(result.reshape(-1, rows, cols), weight.reshape(-1, rows, cols), basis, options)
    assert count == sum(project(weight, basis, options, form="torch")[1].degenerate for weight in weights)
    return edited


def bits(weight: Tensor) -> Tensor:
    """What tells zeros of either sign apart."""
    return weight.contiguous().view(torch.int16)


def carried(dtype: torch.dtype) -> float:
    """The ``mix`` of weights that float32 carries: of float16 it carries less."""
    return 0.05 if dtype == torch.float16 else 0.3


in_place = pytest.mark.parametrize("form", ["native", "torch", "triton"])


class TestInPlace:
    @in_place
    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_meets_the_tolerance(self, form, preserve, axis, dtype, triton_device):
        basis = make_basis(1, 72)
        mix = carried(dtype) / 2
        weights = [make_weight(basis, 296, dtype, axis=axis, mix=mix, seed=seed) for seed in (1, 2)]
        weights.append(make_weight(basis, 40, dtype, axis=axis, mix=mix)[0])
        device = triton_device if form == "triton" else CPU
        left = False if form == "triton" and axis == -2 and dtype != torch.float32 else None
        assert_in_place(weights, basis, ProjectOptions(2.5, preserve, axis), form=form, device=device, left=left)

    @modes
    @pytest.mark.parametrize("shape", [(300, 600), (40, 2200), (513, 8)], ids=str)
    def test_tiles_that_matrices_do_not_fill(self, preserve, axis, shape, triton_device):
        basis = make_basis(1, shape[0])
        weights = [make_weight(basis, shape[1], torch.bfloat16, axis=axis, batch=1)]
        assert_in_place(weights, basis, ProjectOptions(1.0, preserve, axis), form="triton", device=triton_device)

    @pytest.mark.parametrize("preserve", PRESERVES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_vectors_that_float32_does_not_carry(self, preserve, dtype, triton_device):
        basis = make_basis(1, 48)
        weight = make_weight(basis, 64, dtype)
        weight[0, :, 3] = 0
        weight[0, :, 4] = basis[0]
        weight[1, 5] = 0
        weight[1, 7] *= 1e-4
        near = make_weight(basis, 64, dtype, mix=30.0)
        plain = make_weight(basis, 64, dtype, mix=carried(dtype), seed=5)
        options = ProjectOptions(1.0, preserve)
        assert_in_place([weight, near, plain], basis, options, form="triton", device=triton_device, left=True)

    def test_a_row_that_float32_does_not_carry_is_found_wherever_it_lies(self, triton_device):
        basis = 0.001 * make_basis(1, 80)
        basis[0, 70] = 1
        basis /= basis.norm()
        weight = make_weight(make_basis(1, 80), 160, torch.bfloat16)
        weight[0, 70, :140] = 0
        weight[1, 70] = 0
        weight[1, 70, 1] = 1e-3
        options = ProjectOptions(1.0, "rows")
        assert_in_place([weight], basis, options, form="triton", device=triton_device, left=True)
        ablation = InPlaceAblation([weight.to(triton_device)], basis, options, form="triton")
        ablation.launch()
        assert [columns for resident in ablation.resident for _, columns in resident.odd()] == [None, None]

    def test_rows_that_lie_along_the_direction(self, triton_device):
        basis = torch.zeros(1, 16, dtype=torch.float64)
        basis[0, 2] = 1
        weight = make_weight(make_basis(1, 16), 32, torch.bfloat16)
        weight[:, 5] = -0.0
        weight[:, 5, 3] = 0.5
        for coefficient, left in ((1.0, True), (0.2, False)):
            options = ProjectOptions(coefficient, "rows")
            (result,) = assert_in_place([weight], basis, options, form="triton", device=triton_device, left=left)
            # Rows without a share in the direction keep their bytes.
            assert torch.equal(bits(result.cpu()[:, 3:]), bits(weight[:, 3:]))

    @pytest.mark.parametrize("preserve", PRESERVES)
    def test_what_the_direction_does_not_touch_keeps_its_bytes(self, preserve, triton_device):
        basis = torch.zeros(1, 16, dtype=torch.float64)
        basis[0, 2] = -1
        weight = make_weight(make_basis(1, 16), 32, torch.bfloat16)
        weight[:, 2] = -0.0
        weight[:, 5, ::3] = -0.0
        left = preserve == "rows"
        (result,) = assert_in_place(
            [weight], basis, ProjectOptions(1.0, preserve), form="triton", device=triton_device, left=left
        )
        assert torch.equal(bits(result.cpu()), bits(weight))

    @pytest.mark.parametrize("preserve", PRESERVES)
    @pytest.mark.parametrize("seed", range(16))
    def test_matrices_of_many_tiles(self, preserve, seed, triton_device, monkeypatch):
        from ablate_shards.kernels.ablate import resident_triton

        sizes = {
            "COLUMNS_TILE": (16, 8),
            "COLUMNS_STEP": 8,
            "ROWS_WIDTH": 16,
            "MIXED_WIDTH": 16,
            "PROBE_TILE": (16, 16),
        }
        if triton_device.type == "cpu":
            for name, size in sizes.items():
                monkeypatch.setattr(resident_triton, name, size)
        draw = np.random.default_rng(seed).choice
        rows, cols, batch = draw([1, 16, 33, 64, 100, 128]), 8 * draw([1, 2, 3, 4, 8, 9]), draw([1, 2])
        dtype = draw([torch.bfloat16, torch.float16])
        basis = make_basis(1, int(rows), seed)
        weight = make_weight(basis, int(cols), dtype, batch=int(batch), mix=draw([0.0, 0.05, 0.3]), seed=seed)
        if seed % 3 == 0:
            weight[-1, :, draw(cols)] = 0
        if seed % 5 == 0:
            weight[-1, draw(rows)] = 0
        options = ProjectOptions(float(draw([1.0, 2.5, -0.7])), preserve)
        assert_in_place([weight], basis, options, form="triton", device=triton_device)

    @in_place
    def test_strides_leading_dimensions_and_ties(self, form, triton_device):
        basis = make_basis(1, 24)
        options = ProjectOptions(1.0, "columns")
        device = triton_device if form == "triton" else CPU
        stacked = make_weight(basis, 50, torch.bfloat16, batch=6).view(2, 3, 24, 50)
        for strided in (stacked.mT.contiguous().mT, stacked.transpose(0, 1)):
            assert_in_place([strided], basis, options, form=form, device=device)
        assert project_([stacked[..., :0].to(device)], basis, options, form=form) == 0
        tied = torch.nn.Parameter(make_weight(basis, 48, torch.bfloat16).to(device))
        expected = tied.detach().clone()
        project_([expected], basis, options, form=form)
        project_([tied, tied, tied.view_as(tied)], basis, options, form=form)
        assert torch.equal(tied, expected)

    def test_several_directions_and_no_coefficient(self, triton_device):
        weights = [make_weight(make_basis(3, 24), 48, torch.bfloat16)]
        for basis, coefficient in ((make_basis(3, 24), 1.0), (make_basis(1, 24), 0.0)):
            assert_in_place(weights, basis, ProjectOptions(coefficient), form="triton", device=triton_device)

    @pytest.mark.parametrize("preserve", ["columns", "rows"])
    def test_a_coefficient_whose_square_float32_does_not_hold(self, preserve, triton_device):
        basis = make_basis(1, 24)
        weights = [make_weight(basis, 48, torch.bfloat16)]
        (result,) = assert_in_place(weights, basis, ProjectOptions(2e19, preserve), form="triton", device=triton_device)
        assert result.any()

    def test_what_does_not_fit_changes_nothing(self, triton_device):
        basis = make_basis(1, 24)
        weights = [make_weight(basis, 16, torch.bfloat16).to(triton_device) for _ in range(2)]
        before = [weight.clone() for weight in weights]
        with pytest.raises(DirectionsError, match=r"expected \[k, 23\] for a weight of shape \[2, 23, 16\]"):
            project_([weights[0], weights[1][:, 1:]], basis, ProjectOptions(), form="triton")
        with pytest.raises(DirectionsError, match="orthonormal"):
            project_(weights, 2 * basis, ProjectOptions(), form="triton")
        with pytest.raises(PlanError, match=r"found torch\.float64"):
            project_([*weights, weights[0].double()], basis, ProjectOptions(), form="triton")
        with pytest.raises(PlanError, match="in place, found reference"):
            project_(weights, basis, ProjectOptions(), form="reference")
        with pytest.raises(DirectionsError, match=r"at least one row, found \[0, 24\]"):
            project_(weights, basis[:0], ProjectOptions(), form="triton")
        with pytest.raises(PlanError, match=r"expected \[\.\.\., rows, cols\], found \[24\]"):
            project_([*weights, torch.ones(24)], basis, ProjectOptions(), form="torch")
        with pytest.raises(PlanError, match="torch needs weights that have values, found one on meta"):
            project_([torch.empty(24, 9, device="meta", dtype=torch.float16)] * 2, basis, ProjectOptions())
        with pytest.raises(PlanError, match="expanded from fewer elements"):
            project_([*weights, basis.bfloat16().mT.expand(24, 9)], basis, ProjectOptions(), form="torch")
        assert all(map(torch.equal, weights, before))

    @in_place
    def test_what_shares_memory_changes_nothing(self, form, triton_device, monkeypatch):
        basis = make_basis(1, 24)
        stack = make_weight(basis, 16, torch.bfloat16, batch=3).to(triton_device if form == "triton" else CPU)
        before = stack.clone()
        for other in (stack[1], stack[None], stack[:, :, 4:], stack[1:, :, ::2]):
            with pytest.raises(PlanError, match=r"\[3, 24, 16\] and \[.*\] share memory; give one of them"):
                project_([stack, other], basis, ProjectOptions(), form=form)
        assert torch.equal(stack, before)
        # Where a pointer is not an address, weights are apart by what they lie in.
        parts = [stack[0], stack[1], stack[1, :, 4:]]
        resident._once(parts[:2])
        monkeypatch.setattr(resident, "_ADDRESSED", ())
        assert len(resident._once([*parts[:2], stack.clone()])) == 3
        with pytest.raises(PlanError, match=r"\[24, 16\] and \[24, 12\] share memory"):
            resident._once(parts)
        # Columns of one matrix lie between those of the other, and share nothing with them.
        project_([stack[..., ::2], stack[..., 1::2]], basis, ProjectOptions(), form=form)
        expected = before.clone()
        project_([expected], basis, ProjectOptions(1.0, "columns"), form=form)
        project_([before[..., :8], before[..., 8:]], basis, ProjectOptions(1.0, "columns"), form=form)
        assert torch.equal(before, expected)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_native_form_is_refused_on_a_gpu(self):
        basis = make_basis(1, 24)
        with pytest.raises(PlanError, match=r"native needs a CPU.*cuda"):
            project_([make_weight(basis, 16, torch.bfloat16).cuda()], basis, ProjectOptions(), form="native")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("preserve", PRESERVES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", [(1024, 3584), (2048, 1408), (4096, 14336)], ids=str)
    def test_ten_runs_at_size_agree_to_the_bit(self, preserve, dtype, shape):
        basis = make_basis(1, shape[0])
        mix = carried(dtype)
        weights = [make_weight(basis, shape[1], dtype, batch=count, mix=mix, seed=count) for count in (1, 3)]
        options = ProjectOptions(1.0, preserve)
        first = assert_in_place(weights, basis, options, form="triton", device=torch.device("cuda"), left=False)
        for _ in range(9):
            again = [weight.cuda() for weight in weights]
            project_(again, basis, options, form="triton")
            assert all(map(torch.equal, again, first))
        # Where programs do not wait for one another, sums and update are a launch each.
        again = [weight.cuda() for weight in weights]
        ablation = InPlaceAblation(again, basis, options, form="triton")
        for group in ablation.resident:
            group._at_once = 1
        ablation.launch()
        assert ablation.settle() == 0
        assert all(map(torch.equal, again, first))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("preserve", PRESERVES)
    def test_replays_of_a_graph(self, preserve):
        basis = make_basis(1, 1024)
        weight = make_weight(basis, 3584, torch.bfloat16)
        options = ProjectOptions(1.0, preserve)
        expected = weight.cuda()
        project_([expected], basis, options, form="triton")
        edited = weight.cuda()
        ablation = InPlaceAblation([edited], basis, options, form="triton")
        ablation.launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ablation.launch()
        for _ in range(3):
            edited.copy_(weight)
            graph.replay()
            assert ablation.settle() == 0
            assert torch.equal(edited, expected)


@forms
class TestDeterminism:
    @modes
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("hidden", [64, 1400])
    def test_block_size_batching_and_threads_do_not_show(self, form, preserve, axis, dtype, hidden):
        basis = make_basis(2, hidden)
        weight = make_weight(basis, 700, dtype, axis=axis, batch=3)
        options = ProjectOptions(2.5, preserve, axis)
        whole, projector = run(weight, basis, options, form=form)
        measure = projector.before()
        for block_rows, chunks_at_once in ((1, 2), (500, 1), (2000, 1), (2000, 3)):
            blocked, other = run(
                weight, basis, options, block_rows=block_rows, chunks_at_once=chunks_at_once, form=form
            )
            assert torch.equal(blocked, whole)
            assert np.array_equal(other.before().norms, measure.norms)
            assert other.before().component == measure.component
        parts = [run(weight[entry : entry + 1], basis, options, form=form) for entry in range(3)]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole)
        joined = Measure.pooled([single.before() for _, single in parts])
        assert joined.component == measure.component
        assert np.array_equal(joined.norms, measure.norms)
        torch.set_num_threads(2)
        try:
            assert torch.equal(project(weight, basis, options, form=form)[0], whole)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(1)
        assert not torch.equal(whole, weight)

    def test_projectors_in_threads_of_their_own(self, form):
        basis = make_basis(1, 300)
        weights = [make_weight(basis, 400, torch.bfloat16, seed=seed) for seed in range(3)]
        options = ProjectOptions(1.0, "columns")
        alone = [run(weight, basis, options, form=form)[0] for weight in weights]
        found: list[Tensor | None] = [None] * 3

        def work(index: int) -> None:
            found[index] = run(weights[index], basis, options, form=form)[0]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(first, second) for first, second in zip(alone, found, strict=True))

    @modes
    def test_long_rows_and_many_directions(self, form, preserve, axis):
        basis = make_basis(4, 40 if axis == -2 else 40000)
        weight = make_weight(basis, 40000 if axis == -2 else 40, torch.float32, axis=axis, batch=1)
        options = ProjectOptions(0.5, preserve, axis)
        whole, projector = run(weight, basis, options, form=form)
        assert projector.chunk_rows < 40
        assert torch.equal(run(weight, basis, options, block_rows=1, form=form)[0], whole)
        assert torch.equal(run(weight, basis, options, chunks_at_once=1, form=form)[0], whole)
        assert_accurate(whole, weight, basis, options)

    @modes
    def test_exact_passes_do_not_depend_on_blocks_either(self, form, preserve, axis):
        basis = make_basis(1, 30)
        weight = make_weight(basis, 600, torch.float32, axis=axis, batch=2, mix=30.0)
        options = ProjectOptions(1.0, preserve, axis)
        whole, _ = run(weight, basis, options, form=form)
        assert torch.equal(run(weight, basis, options, block_rows=1, form=form)[0], whole)
        assert torch.equal(run(weight[1:], basis, options, form=form)[0], whole[1:])


@forms
class TestProperties:
    def test_columns_removes_the_direction_that_was_there(self, form):
        basis = make_basis(2, 128)
        weight = make_weight(basis, 200, torch.float32)
        result, report = project(weight, basis, ProjectOptions(1.0, "columns"), form=form)
        assert component(weight, basis) > 0.2
        assert component(result, basis) < 1e-7
        assert report.before.component > 0.2
        assert report.after.component < 1e-7
        assert report.drift < 1e-6

    def test_a_foreign_direction_stays(self, form):
        basis, foreign = make_basis(1, 128), make_basis(1, 128, seed=9)
        weight = make_weight(basis, 200, torch.float32)
        result, _ = project(weight, foreign, ProjectOptions(1.0, "columns"), form=form)
        assert component(result, basis) > 0.2

    def test_rows_keeps_row_norms_and_lets_some_back_in(self, form):
        basis = make_basis(1, 128)
        weight = make_weight(basis, 200, torch.float32)
        result, report = project(weight, basis, ProjectOptions(1.0, "rows"), form=form)
        assert torch.allclose(result.norm(dim=-1), weight.norm(dim=-1), rtol=1e-6)
        assert not torch.allclose(result.norm(dim=-2), weight.norm(dim=-2), rtol=1e-3)
        assert 1e-4 < report.after.component < report.before.component

    def test_none_changes_the_norms_and_says_so(self, form):
        basis = make_basis(1, 128)
        weight = make_weight(basis, 200, torch.float32)
        _, report = project(weight, basis, ProjectOptions(1.0, "none"), form=form)
        assert report.drift > 0.01

    @pytest.mark.parametrize("axis", AXES)
    def test_columns_is_idempotent_at_one(self, form, axis):
        basis = make_basis(1, 96)
        weight = make_weight(basis, 80, torch.float32, axis=axis)
        options = ProjectOptions(1.0, "columns", axis)
        once, _ = project(weight, basis, options, form=form)
        twice, _ = project(once, basis, options, form=form)
        assert torch.allclose(once, twice, rtol=0, atol=1e-7 * float(once.norm(dim=axis).max()))
        assert not torch.allclose(once, weight, rtol=0, atol=1e-3 * float(once.norm(dim=axis).max()))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("axis", AXES)
    def test_none_equals_columns_where_the_coefficient_reflects(self, form, dtype, axis):
        basis = make_basis(1, 96)
        weight = make_weight(basis, 80, dtype, axis=axis)
        plain, _ = project(weight, basis, ProjectOptions(2.0, "none", axis), form=form)
        kept, _ = project(weight, basis, ProjectOptions(2.0, "columns", axis), form=form)
        assert torch.equal(plain, kept)
        assert not torch.equal(kept, project(weight, basis, ProjectOptions(1.9, "columns", axis), form=form)[0])

    def test_axes_agree(self, form):
        basis = make_basis(2, 96)
        weight = make_weight(basis, 80, torch.bfloat16)
        for preserve in PRESERVES:
            first, _ = project(weight, basis, ProjectOptions(1.0, preserve, -2), form=form)
            second, _ = project(weight.mT, basis, ProjectOptions(1.0, preserve, -1), form=form)
            assert (first != second.mT).sum() <= 3

    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zero_coefficient_changes_no_byte(self, form, preserve, axis, dtype):
        basis = make_basis(1, 40)
        weight = make_weight(basis, 30, dtype, axis=axis)
        weight[0, 0, 0] = -0.0
        result, report = project(weight, basis, ProjectOptions(0.0, preserve, axis), form=form)
        assert torch.equal(as_bits(result), as_bits(weight))
        assert report.before.component == report.after.component > 0.1
        assert not torch.equal(project(weight, basis, ProjectOptions(0.1, preserve, axis), form=form)[0], weight)

    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_vectors_without_a_component_keep_their_bytes(self, form, preserve, axis, dtype):
        basis = torch.zeros(1, 8, dtype=torch.float64)
        basis[0, 0], basis[0, 1] = 0.6, -0.8
        weight = make_weight(basis, 5, dtype)
        weight[:, :2] = torch.tensor([0.0, -0.0])[:, None]
        weight[:, 3, 2] = -0.0
        weight = weight if axis == -2 else weight.mT.contiguous()
        result, _ = project(weight, basis, ProjectOptions(1.0, preserve, axis), form=form)
        assert torch.equal(as_bits(result), as_bits(weight))

    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zero_stays_zero(self, form, preserve, axis, dtype):
        basis = make_basis(1, 8 if axis == -2 else 6)
        weight = torch.zeros(1, 8, 6, dtype=dtype)
        weight[0, 3, 2] = -0.0
        result, report = project(weight, basis, ProjectOptions(1.0, preserve, axis), form=form)
        assert torch.equal(as_bits(result), as_bits(weight))
        assert (report.before.component, report.drift, report.degenerate) == (0.0, 0.0, 0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("axis", AXES)
    def test_parallel_vectors_are_removed_without_rescaling_and_counted(self, form, dtype, axis):
        basis = make_basis(1, 64)
        weight = make_weight(basis, 20, torch.float32, axis=axis)
        columns = weight if axis == -2 else weight.mT
        columns[:, :, 3] = 5 * basis[0].float()
        weight = weight.to(dtype)
        options = ProjectOptions(1.0, "columns", axis)
        _, degenerate = reference.ablate(weight, basis, preserve="columns", axis=axis)
        result, report = project(weight, basis, options, form=form)
        assert report.degenerate == int(degenerate.sum())
        assert (report.degenerate == 2) == (dtype != torch.bfloat16)
        assert_accurate(result, weight, basis, options)
        if dtype != torch.bfloat16:
            assert (result if axis == -2 else result.mT)[:, :, 3].float().norm() < 5e-3
        assert project(weight, basis, ProjectOptions(2.5, "columns", axis), form=form)[1].degenerate == 0
        assert project(weight, basis, ProjectOptions(1.0, "none", axis), form=form)[1].degenerate == 0

    @pytest.mark.parametrize("axis", AXES)
    def test_rows_that_vanish_are_counted(self, form, axis):
        basis = torch.ones(1, 4, dtype=torch.float64) / 2
        weight = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0)).expand(1, 4, 6).contiguous()
        weight = weight if axis == -2 else weight.mT.contiguous()
        result, report = project(weight, basis, ProjectOptions(1.0, "rows", axis), form=form)
        assert report.degenerate == 4
        assert result.isfinite().all()
        assert result.abs().max() < 1e-6
        assert project(weight, basis, ProjectOptions(1.5, "rows", axis), form=form)[1].degenerate == 0


@forms
class TestMagnitudes:
    @modes
    @pytest.mark.parametrize(
        ("dtype", "magnitude"),
        [
            (torch.float32, 1e25),
            (torch.float32, 1e37),
            (torch.float32, 1e-25),
            (torch.float32, 1e-36),
            (torch.bfloat16, 1e30),
            (torch.bfloat16, 1e38),
            (torch.bfloat16, 1e-37),
            (torch.bfloat16, 1e-39),
            (torch.float16, 3e4),
            (torch.float16, 1e-6),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("everywhere", [True, False])
    def test_finite_weights_stay_finite_and_accurate(self, form, preserve, axis, dtype, magnitude, everywhere):
        basis = make_basis(1, 40)
        weight = make_weight(basis, 30, torch.float64, axis=axis)
        weight = weight / weight.abs().max()
        first = weight if everywhere else weight[:, 3:5, 2:4]
        first *= magnitude
        weight = weight.to(dtype)
        options = ProjectOptions(2.5, preserve, axis)
        result, report = project(weight, basis, options, form=form)
        assert_accurate(result, weight, basis, options)
        assert math.isfinite(report.before.component)
        assert report.before.component == pytest.approx(component(weight, basis, axis), rel=1e-3)

    def test_what_would_overflow_becomes_the_largest_finite_value(self, form):
        basis = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64) / 2
        weight = torch.tensor([[[65504.0], [65504.0], [65504.0], [-65504.0]]], dtype=torch.float16)
        exact, _ = reference.ablate(weight, basis, coefficient=3.0, preserve="none")
        assert exact.abs().max() > 65504
        result, _ = project(weight, basis, ProjectOptions(3.0, "none"), form=form)
        assert result.isfinite().all()
        assert torch.equal(result, reference.round_to(exact, torch.float16))

    @modes
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_weights_are_told_with_their_matrix(self, form, preserve, axis, dtype, value):
        basis = make_basis(1, 40)
        weight = make_weight(basis, 30, dtype, axis=axis, batch=3)
        options = ProjectOptions(1.0, preserve, axis)
        assert run(weight, basis, options, form=form)[1].nonfinite == 0
        weight[1, 7, 5] = value
        _, projector = run(weight, basis, options, form=form)
        assert projector.nonfinite == 1
        assert projector.nonfinite_entries == (1,)


@forms
class TestMeasures:
    @modes
    def test_meter_agrees_with_before(self, form, preserve, axis):
        basis = make_basis(2, 96)
        weight = make_weight(basis, 80, torch.bfloat16, axis=axis, mix=0.05)
        options = ProjectOptions(1.0, preserve, axis)
        _, projector = run(weight, basis, options, form=form)
        meter, stored = meter_of(weight, basis, options, form)
        for start in range(0, weight.shape[1], meter.chunk_rows):
            meter.add(stored[:, start : start + meter.chunk_rows], start)
        assert meter.result().component == projector.before().component
        assert np.array_equal(meter.result().norms, projector.before().norms)
        line = (-1 if axis == -2 else -2) if preserve == "rows" else axis
        norms = torch.linalg.vector_norm(weight.double(), dim=line)
        assert np.allclose(meter.result().norms, norms, rtol=1e-6)

    def test_drift_ignores_zero_vectors_and_sees_the_rest(self, form):
        basis = make_basis(1, 8)
        options = ProjectOptions(1.0, "columns")
        weight = make_weight(basis, 4, torch.float32, batch=1)
        weight[:, :, 0] = 0
        changed = weight.clone()
        changed[:, :, 2] *= 1.5

        def measure(values):
            meter, stored = meter_of(values, basis, options, form)
            meter.add(stored, 0)
            return meter.result()

        assert norm_drift(measure(weight), measure(weight)) == 0
        assert norm_drift(measure(weight), measure(changed)) == pytest.approx(0.5, rel=1e-6)

    def test_passes(self, form):
        counts = {}
        for preserve, axis in itertools.product(PRESERVES, AXES):
            basis = make_basis(1, 200)
            weight = make_weight(basis, 200, torch.bfloat16, mix=0.1)
            counts[preserve, axis] = run(weight, basis, ProjectOptions(1.0, preserve, axis), form=form)[1].passes
        assert counts == {
            ("rows", -2): 1,
            ("rows", -1): 2,
            ("columns", -2): 1,
            ("columns", -1): 0,
            ("none", -2): 1,
            ("none", -1): 0,
        }

    def test_strong_cancellation_takes_another_pass(self, form):
        basis = make_basis(1, 200)
        weight = make_weight(basis, 20, torch.bfloat16, mix=30.0)
        assert run(weight, basis, ProjectOptions(1.0, "columns"), form=form)[1].passes == 2
        assert run(weight, basis, ProjectOptions(2.5, "columns"), form=form)[1].passes == 1

    def test_rows_that_may_cancel_are_probed_and_those_that_do_gathered_again(self, form):
        basis = make_basis(1, 200)
        harmless = make_weight(basis, 400, torch.bfloat16, mix=0.3)
        assert run(harmless, basis, ProjectOptions(2.5, "rows"), form=form)[1].passes == 2
        cancelled = make_weight(basis, 400, torch.bfloat16, mix=30.0)
        assert run(cancelled, basis, ProjectOptions(1.0, "rows"), form=form)[1].passes == 3

    @pytest.mark.parametrize("shape", [(0, 8, 4), (1, 8, 0)])
    def test_empty_tensors(self, form, shape):
        result, report = project(torch.zeros(shape), make_basis(1, 8), ProjectOptions(), form=form)
        assert result.shape == shape
        assert report.before.component == 0


class TestVector:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_removes_what_was_there(self, dtype):
        basis = make_basis(2, 50)
        noise = torch.randn(3, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        bias = (noise + 5 * basis[0]).to(dtype)
        stored = in_form(bias, "native")
        found = project_vector(stored, basis.numpy(), 1.0)
        exact = bias.double() - bias.double() @ basis.mT @ basis
        assert np.array_equal(found, in_form(reference.round_to(exact, dtype), "native"))
        share = (bias.double() @ basis.mT).norm() / bias.double().norm()
        assert share > 0.5
        assert vector_component(stored, basis.numpy()) == pytest.approx(float(share), rel=1e-12)
        assert vector_component(found, basis.numpy()) < 1e-2
        assert np.array_equal(project_vector(stored, basis.numpy(), 0.0), stored)

    def test_a_component_of_nothing_is_nothing_and_of_nan_not_finite(self):
        basis = make_basis(1, 4).numpy()
        assert vector_component(np.zeros(4, np.float32), basis) == 0
        assert math.isnan(vector_component(np.array([0, np.nan, 1, 1], np.float32), basis))


class TestRefusals:
    def test_a_basis_of_another_size(self):
        with pytest.raises(DirectionsError, match=r"expected \[k, 8\].*found \[1, 9\]"):
            Projector(make_basis(1, 9).numpy(), (1, 8, 4), "F32", ProjectOptions(), Workspace(CPU, "native"))

    def test_a_basis_without_directions(self):
        with pytest.raises(DirectionsError, match=r"found \[0, 8\]"):
            project(torch.zeros(8, 4), torch.zeros(0, 8, dtype=torch.float64), ProjectOptions())

    def test_a_basis_that_is_not_orthonormal(self):
        with pytest.raises(DirectionsError, match="orthonormal"):
            project(torch.zeros(8, 4), 1.001 * make_basis(1, 8), ProjectOptions())
        with pytest.raises(DirectionsError, match="orthonormal"):
            project(torch.zeros(8, 4), torch.full((1, 8), math.nan), ProjectOptions())

    def test_a_dtype_that_is_no_weight(self):
        with pytest.raises(PlanError, match="float64"):
            project(torch.zeros(8, 4, dtype=torch.float64), make_basis(1, 8), ProjectOptions())

    @pytest.mark.parametrize("options", [{"coefficient": math.nan}, {"preserve": "all"}, {"axis": 0}], ids=str)
    def test_options_without_meaning(self, options):
        with pytest.raises(PlanError, match="expected"):
            ProjectOptions(**options)


class TestForm:
    def test_choice_says_why(self):
        assert choose_form("cpu", on_cpu="native") == ("native", "a CPU needs no torch for this")
        assert choose_form(CPU) == ("torch", "Triton does not run on cpu")
        assert choose_form(CPU, form="reference") == ("reference", "asked for")
        assert choose_form("mps", on_cpu="native")[0] == "torch"

    def test_choice_without_triton(self, monkeypatch):
        pytest.importorskip("triton")
        assert choose_form("cuda:1", on_cpu="native")[0] == "triton"
        monkeypatch.setitem(sys.modules, "triton", None)
        assert choose_form(torch.device("cuda")) == ("torch", "triton is not installed")

    def test_triton_is_imported_only_where_it_runs(self):
        code = (
            "import sys, torch\n"
            "from ablate_shards.kernels.ablate.memory import project\n"
            "from ablate_shards.kernels.ablate.options import ProjectOptions\n"
            "project(torch.ones(4, 4), torch.eye(4, dtype=torch.float64)[:1], ProjectOptions())\n"
            "sys.exit('triton' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def as_bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)
