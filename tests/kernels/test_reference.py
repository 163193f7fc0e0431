"""The float64 reference, against hand-made cases and brute force."""

import math

import pytest
import torch

from ablate_shards.kernels.reference import ablate, round_to


class TestAblate:
    def test_removes_one_axis_by_hand(self):
        weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
        basis = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        plain, _ = ablate(weight, basis, preserve="none")
        assert plain.tolist() == [[0.0, 0.0], [4.0, 2.0]]
        columns, _ = ablate(weight, basis, preserve="columns")
        assert columns.tolist() == [[0.0, 0.0], [5.0, 2.0]]
        reflected, _ = ablate(weight, basis, coefficient=2.0, preserve="columns")
        assert reflected.tolist() == [[-3.0, 0.0], [4.0, 2.0]]

    def test_rows_by_hand(self):
        weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        half = math.sqrt(0.5)
        basis = torch.tensor([[half, half]], dtype=torch.float64)
        result, degenerate = ablate(weight, basis, preserve="rows")
        # The normalised rows are the identity; what is left of each is (1, -1) / 2 and its mirror image.
        assert torch.allclose(result, torch.tensor([[2 * half, -2 * half], [-3 * half, 3 * half]], dtype=torch.float64))
        assert not degenerate.any()

    def test_axes_are_transposes(self):
        weight = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
        basis = torch.eye(7, dtype=torch.float64)[2:4]
        for preserve in ("rows", "columns", "none"):
            first, marked = ablate(weight, basis, coefficient=1.3, preserve=preserve)
            second, also = ablate(weight.mT, basis, coefficient=1.3, preserve=preserve, axis=-1)
            assert torch.equal(first, second.mT)
            assert torch.equal(marked, also)

    def test_parallel_and_zero_vectors(self):
        weight = torch.tensor([[1.0, 0.0, 1.0], [1e-4, 0.0, 1.0]])
        basis = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        result, degenerate = ablate(weight, basis, preserve="columns")
        assert degenerate.tolist() == [True, False, False]
        assert torch.allclose(result[:, 0], torch.tensor([0.0, 1e-4], dtype=torch.float64))
        assert result[:, 1].tolist() == [0.0, 0.0]
        assert result[:, 2].norm().item() == pytest.approx(math.sqrt(2))


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_is_the_nearest_of_all_values(self, dtype):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
        every = every[every.isfinite()].unique()
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(len(every) - 1, (4000,), generator=generator)
        share = torch.rand(4000, generator=generator, dtype=torch.float64)
        share[:1000] = 0.5
        share[1000:2000] = 0.5 + 1e-9
        share[2000:2500] = 0.5 - 1e-9
        values = every[index] + share * (every[index + 1] - every[index])
        found = round_to(values, dtype).double()
        apart = (found - values).abs()
        nearest = torch.minimum((every[index] - values).abs(), (every[index + 1] - values).abs())
        assert torch.equal(apart, nearest)
        bits = round_to(values[:1000], dtype).view(torch.int16)
        tied = (every[index][:1000] - values[:1000]).abs() == (every[index + 1][:1000] - values[:1000]).abs()
        assert tied.sum() > 900
        assert (bits[tied] % 2 == 0).all()

    def test_two_roundings_would_err(self):
        value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
        assert value.to(torch.bfloat16).item() == 1.0
        assert round_to(value, torch.bfloat16).item() == 1 + 2.0**-7

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_stops_at_the_largest_value(self, dtype):
        largest = torch.finfo(dtype).max
        values = torch.tensor([2.0, -2.0], dtype=torch.float64) * largest
        assert round_to(values, dtype).tolist() == [largest, -largest]

    def test_keeps_the_sign_of_zero(self):
        values = torch.tensor([-0.0, 0.0], dtype=torch.float64)
        assert round_to(values, torch.bfloat16).signbit().tolist() == [True, False]
