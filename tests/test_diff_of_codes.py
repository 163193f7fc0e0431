"""``diff`` of FP8 weights compares what codes and scales stand for, and tells rounding from an edit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coded_checkpoints import BLOCK, SCALES, decoded, direction_of, quantise, spread_scales
from command_line import checked
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

HIDDEN, INNER, LAYERS, CODED = 256, 200, 3, 18
FILE = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
#: The values of the grid that a code may stand for, in float64.
GRID = np.unique(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().nan_to_num().numpy())


def write(folder: Path, tensors: dict[str, torch.Tensor], layout: str | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    if layout:
        blocks = list(BLOCK) if layout == "block" else None
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(48, HIDDEN), "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for part in "qkvo":
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = normal(HIDDEN, INNER)
        tensors[f"{prefix}mlp.up_proj.weight"] = normal(INNER, HIDDEN)
    return tensors


def coded(tensors: dict[str, torch.Tensor], layout: str = "block", kind: str = "F32", factor: float = 1.0) -> dict:
    """Quantises the matrices of layers; a factor makes scales other than the largest value asks for."""
    found = {}
    for name, values in tensors.items():
        if "proj" not in name:
            found[name] = values
            continue
        found[name], scales = quantise(values.float(), layout, kind)
        if factor != 1.0:
            scales = scales * factor
            wide = spread_scales(scales, tuple(values.shape), BLOCK if layout == "block" else None)
            found[name] = (values.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scales
    return found


def differences(first: Path, second: Path, *more: object) -> dict:
    return json.loads(checked("diff", first, second, "--json", *more).stdout)


def kinds(found: dict) -> dict[str, int]:
    counted: dict[str, int] = {}
    for tensor in found["tensors"]:
        counted[tensor["kind"]] = counted.get(tensor["kind"], 0) + 1
    return counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint in BF16, in FP8, and both ablated."""
    folder = tmp_path_factory.mktemp("codes")
    tensors = plain()
    write(folder / "plain", tensors)
    write(folder / "coded", coded(tensors), "block")
    rows = direction_of(HIDDEN).astype(np.float32)
    arrays = {f"direction.layers.{layer}": rows for layer in range(LAYERS)}
    save_arrays(arrays, folder / "d.safetensors", metadata={"format": "ablate-shards.directions/1"})
    for preserve in ("none", "rows", "columns"):
        for source in ("plain", "coded"):
            options = ("-d", folder / "d.safetensors", "--preserve", preserve, "--no-biproject", "-q")
            checked(folder / source, folder / f"{source}-{preserve}", *options)
        ablated = load_file(folder / f"plain-{preserve}" / FILE)
        write(folder / f"requantised-{preserve}", coded(ablated), "block")
    return folder


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("layout", ["block", "channel", "tensor"])
def test_a_checkpoint_and_its_own_codes_differ_by_rounding(
    layout: str, kind: str, folder: Path, tmp_path: Path
) -> None:
    tensors = plain()
    codes = coded(tensors, layout, kind)
    if kind == "U8":
        codes = {name: each.view(torch.uint8) if "scale" in name else each for name, each in codes.items()}
    found = differences(folder / "plain", write(tmp_path / "b", codes, layout))
    form = {"block": "in blocks of 128 x 128", "channel": "per channel", "tensor": "per tensor"}[layout]
    assert kinds(found) == {"rounding": CODED}
    assert found["verdict"][0].startswith(f"18 tensors differ by rounding to FP8 {form} (")
    assert "none by more than half a step of its grid" in found["verdict"][0]
    assert f"18 tensors retyped from BF16 to FP8 {form}, differences are rounding only" in found["verdict"]
    assert "18 tensors of scales only in B" in found["verdict"]
    for tensor in found["tensors"]:
        old, scales = tensors[tensor["name"]], codes[f"{tensor['name']}_scale_inv"]
        if kind == "U8":
            scales = scales.view(torch.float8_e8m0fnu)
        new = decoded(codes[tensor["name"]], scales, layout)
        assert tensor["changed"] == int((old.float() != new).sum())
        assert tensor["relative"] == pytest.approx(float((new - old).double().norm() / old.double().norm()), rel=1e-5)
        assert tensor["beyond"] == 0
        assert (tensor["codes"], tensor["new_codes"]) == (None, f"FP8 {form}")


def test_which_side_holds_the_codes_makes_no_difference(folder: Path) -> None:
    there, back = (differences(folder / one, folder / other) for one, other in (("plain", "coded"), ("coded", "plain")))
    assert kinds(there) == kinds(back) == {"rounding": CODED}
    for one, other in zip(there["tensors"], back["tensors"], strict=True):
        assert (one["changed"], one["beyond"], one["units"]) == (other["changed"], other["beyond"], other["units"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.49, 0.51, 0.6])
def test_half_a_step_is_where_rounding_ends(share: float, tmp_path: Path) -> None:
    """Values are set a share of the step beside codes, of every size and toward either neighbour."""
    generator = np.random.default_rng(2)
    places = generator.integers(1, len(GRID) - 1, (HIDDEN, INNER))
    toward = generator.choice([-1, 1], places.shape)
    scales = torch.from_numpy(generator.uniform(0.5, 2, (HIDDEN, 1)).astype(np.float32))
    codes = GRID[places]
    values = codes + share * (GRID[places + toward] - codes)
    first = write(tmp_path / "a", {DOWN: torch.from_numpy(values * scales.numpy().astype(np.float64)).float()})
    stored = {DOWN: torch.from_numpy(codes).to(torch.float8_e4m3fn), f"{DOWN}_scale_inv": scales}
    (tensor,) = differences(first, write(tmp_path / "b", stored, "channel"))["tensors"]
    assert tensor["units"] == pytest.approx(share, abs=2e-5)
    assert tensor["beyond"] == (0 if share < 0.5 else HIDDEN * INNER)
    if share < 0.5:
        assert tensor["kind"] == ("rounding" if tensor["changed"] else "retyped")


def test_codes_that_were_not_the_nearest_are_counted(folder: Path, tmp_path: Path) -> None:
    """A quantiser that divides in BF16 is off by a little more than half a step here and there."""
    tensors = plain()
    codes = coded(tensors)
    beyond = {}
    for name in (name for name in tensors if "proj" in name):
        wide = spread_scales(codes[f"{name}_scale_inv"], tuple(tensors[name].shape), BLOCK)
        codes[name] = (tensors[name] / wide.bfloat16()).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        exact, chosen = (tensors[name].double() / wide).numpy(), codes[name].double().numpy()
        nearest = GRID[np.abs(exact[..., None] - GRID).argmin(-1)]
        # Values halfway between two codes go to either, and are many, as weights and scales are BF16.
        farther = np.abs(exact - chosen) - np.abs(exact - nearest)
        beyond[name] = int((farther > 2e-4 * np.abs(nearest - chosen)).sum())
    assert min(beyond.values()) > 100
    found = differences(folder / "plain", write(tmp_path / "b", codes, "block"))
    assert kinds(found) == {"rounding": CODED}
    for tensor in found["tensors"]:
        assert tensor["beyond"] == pytest.approx(beyond[tensor["name"]], abs=2)
        assert 0.5 < tensor["units"] < 0.6
    assert (
        f"{sum(tensor['beyond'] for tensor in found['tensors'])} values by more than half a step" in found["verdict"][0]
    )


@pytest.mark.parametrize("preserve", ["none", "rows", "columns"])
@pytest.mark.parametrize(
    ("first", "second", "rounded"),
    [("plain", "requantised", 12), ("plain", "coded", 12), ("coded", "coded", 0), ("coded", "requantised", 0)],
)
def test_an_ablation_is_told_beneath_the_rounding(
    first: str, second: str, rounded: int, preserve: str, folder: Path
) -> None:
    found = differences(folder / first, folder / f"{second}-{preserve}", "-d", folder / "d.safetensors")
    told = kinds(found)
    assert told.pop("scales", 0) == (6 if (first, second) == ("coded", "requantised") else 0)
    assert told == {"ablation": 6} | ({"rounding": rounded} if rounded else {})
    for tensor in found["tensors"]:
        if tensor["kind"] == "ablation":
            assert tensor["ablation"]["coefficient"] == pytest.approx(1, abs=0.05)
            assert tensor["alignment"]["best_cosine"] > 0.98
    assert "consistent with directional ablation" in found["verdict"][0]


def test_codes_on_one_grid_are_counted(folder: Path) -> None:
    before, after = (load_file(folder / name / FILE) for name in ("coded", "coded-rows"))
    found = differences(folder / "coded", folder / "coded-rows")
    counts = {}
    for tensor in found["tensors"]:
        old, new = (each[tensor["name"]].double() for each in (before, after))
        apart = np.abs(np.searchsorted(GRID, old.numpy()) - np.searchsorted(GRID, new.numpy()))
        counts[tensor["name"]] = int((apart > 0).sum())
        assert tensor["equal_scales"]
        assert tensor["changed"] == tensor["beyond"] == counts[tensor["name"]]
        assert tensor["units"] == pytest.approx(apart.max(), rel=1e-4)
    assert any(
        line.startswith(f"{sum(counts.values())} codes of 6 tensors in FP8 changed (") for line in found["verdict"]
    )


@pytest.mark.parametrize("other", ["scales", "layout"])
def test_two_sets_of_codes_of_one_model_differ_by_rounding(other: str, folder: Path, tmp_path: Path) -> None:
    layout, factor = ("block", 1.07) if other == "scales" else ("channel", 1.0)
    second = write(tmp_path / "b", coded(plain(), layout, factor=factor), layout)
    found = differences(folder / "coded", second)
    assert kinds(found) == {"rounding": CODED, "scales": CODED}
    assert "none by more than one step of its grid" in found["verdict"][0]


def test_equal_codes_with_other_scales_are_not_equal(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "coded" / FILE)
    tensors[f"{DOWN}_scale_inv"] = tensors[f"{DOWN}_scale_inv"] * 2
    found = differences(folder / "coded", write(tmp_path / "b", tensors, "block"))
    changed = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert changed[DOWN]["kind"] == "scaled"
    assert changed[DOWN]["relative"] == pytest.approx(1)
    assert changed[f"{DOWN}_scale_inv"]["kind"] == "scales"


def test_other_weights_and_one_code_are_not_rounding(folder: Path, tmp_path: Path) -> None:
    found = differences(folder / "plain", write(tmp_path / "other", coded(plain(4)), "block"))
    assert kinds(found)["full-rank"] == CODED + 1
    generator = torch.Generator().manual_seed(9)
    noisy = {
        name: (each + 0.01 * torch.randn(each.shape, generator=generator)).bfloat16() if "proj" in name else each
        for name, each in plain().items()
    }
    found = differences(folder / "plain", write(tmp_path / "noisy", coded(noisy), "block"))
    assert kinds(found) == {"full-rank": CODED}
    tensors = load_file(folder / "coded" / FILE)
    tensors[DOWN].view(torch.uint8)[3, 5] ^= 1
    (tensor,) = differences(folder / "coded", write(tmp_path / "one", tensors, "block"))["tensors"]
    assert (tensor["kind"], tensor["changed"], tensor["units"]) == ("sparse", 1, pytest.approx(1))


@pytest.mark.parametrize("layout", ["block", "channel", "tensor"])
def test_a_stack_of_experts(layout: str, tmp_path: Path) -> None:
    values = torch.randn(3, HIDDEN, INNER, generator=torch.Generator().manual_seed(1)).mul_(0.05).bfloat16()
    name = "model.layers.0.mlp.experts.down_proj"
    codes, scales = quantise(values.float(), layout)
    first = write(tmp_path / "a", {name: values})
    second = write(tmp_path / "b", {name: codes, f"{name}_scale_inv": scales}, layout)
    (tensor,) = differences(first, second)["tensors"]
    assert (tensor["kind"], tensor["beyond"]) == ("rounding", 0)
    assert tensor["changed"] == int((values.float() != decoded(codes, scales, layout)).sum())


def test_codes_whose_scales_cannot_be_read_are_not_compared(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder / "coded", tmp_path / "bare")
    shutil.copy(folder / "plain" / "config.json", bare / "config.json")
    found = differences(folder / "plain", bare)
    assert kinds(found) == {"raw": CODED}
    assert not any("full rank" in line or "more than rounding" in line for line in found["verdict"])
    assert any("restore the config.json that came with the shards" in line for line in found["verdict"])


def test_codes_without_scales_are_numbers(tmp_path: Path) -> None:
    values = torch.randn(HIDDEN, INNER, generator=torch.Generator().manual_seed(1))
    first = write(tmp_path / "a", {DOWN: values})
    (tensor,) = differences(first, write(tmp_path / "b", {DOWN: values.to(torch.float8_e4m3fn)}))["tensors"]
    assert (tensor["kind"], tensor["new_codes"]) == ("rounding", None)


def test_memory_and_jobs_do_not_change_the_result(folder: Path) -> None:
    pair = folder / "plain", folder / "requantised-rows"
    assert differences(*pair, "--memory", "8MB", "--jobs", 1) == differences(*pair, "--jobs", 4)
