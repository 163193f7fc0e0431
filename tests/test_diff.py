"""``diff`` names real edits for what they are, and never takes one for another."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from command_line import run
from progress import Heard
from raw_checkpoints import write_directions, write_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_model

from ablate_shards.data.demo import MODEL as DEMO
from ablate_shards.errors import DirectionsError
from ablate_shards.kernels.measure.sketch import Unit, compare_matrix
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.diff.differences import DiffKind
from ablate_shards.surgery.diff.survey import DiffOptions, diff
from ablate_shards.surgery.directions.formats import read_directions

UNITS = {torch.bfloat16: Unit(2**-7, 2**-133), torch.float32: Unit(2**-23, 2**-149)}


def compare(first, second, directions=None, **options):
    given = read_directions(directions) if directions else None
    return diff(open_checkpoint(first), open_checkpoint(second), DiffOptions(**options), Heard(), given)


def by_kind(found):
    kinds = {}
    for tensor in found.tensors:
        kinds.setdefault(tensor.kind, []).append(tensor)
    return kinds


def rewrite(source, out, change, *, metadata=None):
    """Copies a checkpoint of one shard with its tensors changed."""
    shutil.copytree(source, out)
    file = out / "model.safetensors"
    with safe_open(file, "pt") as old:
        metadata = old.metadata() if metadata is None else metadata
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, metadata)
    return out


@pytest.fixture(scope="module")
def directions(tmp_path_factory):
    return write_directions(tmp_path_factory.mktemp("directions") / "d.safetensors", layers=8, hidden=128)


# ---------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("preserve", ["none", "rows", "columns"])
@pytest.mark.parametrize("coefficient", [1.0, 2.5])
@pytest.mark.parametrize("biproject", ["--biproject", "--no-biproject"])
def test_an_ablation_is_recognised_with_its_coefficient_and_direction(
    tmp_path, directions, preserve, coefficient, biproject
):
    out = tmp_path / "out"
    edit = ("-d", directions, "--layers", "1-7", "--source-layer", 4, biproject)
    result = run(DEMO, out, *edit, "--preserve", preserve, "--coefficient", coefficient, "-q")
    assert result.exit_code == 0, result.output
    found = compare(DEMO, out, directions)
    assert set(by_kind(found)) == {"ablation"}
    assert len(found.tensors) == 14
    assert found.equal == 144 - 14
    assert {tensor.layer for tensor in found.tensors} == set(range(1, 8))
    for tensor in found.tensors:
        assert tensor.rank == 1
        assert tensor.writer
        assert tensor.form == ("plain" if preserve == "none" else preserve)
        assert tensor.kept == (() if preserve == "none" else (preserve,))
        assert tensor.ablation.axis == -2
        assert tensor.ablation.coefficient == pytest.approx(coefficient, rel=0.02)
        assert tensor.ablation.cosine > 0.99
        assert tensor.alignment.best_layer == 4
        assert tensor.alignment.best_cosine > 0.99
        assert tensor.alignment.biprojected is (biproject == "--biproject")
        if tensor.layer != 4:
            assert tensor.alignment.cosine < 0.5
    verdict = found.verdict[0]
    assert verdict.startswith("rank-1 edits of 14 residual writers in layers 1–7, consistent with directional ablation")
    told = [float(number) for number in re.findall(r"coefficients? ([\d.]+)(?: to ([\d.]+))?", verdict)[0] if number]
    assert told == pytest.approx([coefficient] * len(told), rel=0.02)
    kept = {"none": "norms not kept", "rows": "row norms kept to ", "columns": "column norms kept to "}
    assert kept[preserve] in verdict
    assert "the given direction of layer 4" in verdict


FAMILIES = ["gemma3", "gpt2", "gpt-oss", "qwen3-moe-fused", "opt"]


@pytest.mark.parametrize("preserve", ["none", "rows", "columns"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_a_writer_is_seen_through(tmp_path, family, preserve):
    source = save_tiny_model(TINY_MODELS[family], tmp_path / "source")
    directions = write_directions(tmp_path / "d.safetensors", layers=3)
    edit = ("-d", directions, "--source-layer", 1, "--layers", "0-1", "--no-biproject")
    result = run(source, tmp_path / "out", *edit, "--preserve", preserve, "-q")
    assert result.exit_code == 0, result.output
    found = compare(source, tmp_path / "out", directions)
    matrices = [tensor for tensor in found.tensors if not tensor.name.endswith("bias")]
    assert matrices
    writers = {item["name"]: item["axis"] for item in json.loads(run("inspect", source, "--json").stdout)["writers"]}
    for tensor in matrices:
        assert tensor.kind == "ablation", (tensor.name, tensor.kind, tensor.form, tensor.rank)
        assert tensor.ablation.axis == writers[tensor.name], tensor.name
        assert tensor.ablation.coefficient == pytest.approx(1, rel=0.05)
        assert tensor.alignment.best_cosine > 0.98, tensor.name


def test_two_directions_are_two(tmp_path):
    directions = write_directions(tmp_path / "d.safetensors", layers=8, hidden=128, rank=2)
    run(DEMO, tmp_path / "out", "-d", directions, "--source-layer", 4, "--preserve", "rows", "-q")
    found = compare(DEMO, tmp_path / "out", directions)
    assert {(tensor.kind, tensor.rank) for tensor in found.tensors} == {("ablation", 2)}
    assert all(tensor.alignment.best_cosine > 0.95 for tensor in found.tensors)
    assert found.verdict[0].startswith("rank-2 edits of 16 residual writers")


def test_own_directions_are_said_to_differ(tmp_path, directions):
    run(DEMO, tmp_path / "out", "-d", directions, "--source-layer", "own", "-q")
    found = compare(DEMO, tmp_path / "out", directions)
    assert {tensor.alignment.best_layer == tensor.layer for tensor in found.tensors} == {True}
    assert "directions differ" in found.verdict[0]
    assert "the given directions of their own layers" in found.verdict[0]
    assert run("diff", DEMO, tmp_path / "out", "-q").stdout == ""


def test_a_direction_of_another_model_is_refused(tmp_path):
    other = write_directions(tmp_path / "d.safetensors", hidden=64)
    with pytest.raises(DirectionsError, match=r"64 entries.*128"):
        compare(DEMO, DEMO, other)


# ---------------------------------------------------------------------------------------- other edits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_merged_adapter_is_a_low_rank_update(tmp_path):
    pytest.importorskip("peft")
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.02)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = compare(plain, tmp_path / "merged")
    assert set(by_kind(found)) == {"low-rank"}
    assert len(found.tensors) == 8 * 3 + 2 * 4
    assert {tensor.rank for tensor in found.tensors} == {4}
    assert {tensor.form for tensor in found.tensors} == {"plain"}
    expected = "low-rank update of rank ≤ 4 of down, gate, up, k, o, q, v in 8 layers, consistent with a merged LoRA"
    assert found.verdict[0].startswith(expected)
    assert "ablation" not in found.verdict[0]


@pytest.mark.parametrize("along", [False, True])
def test_rank_one_alone_is_no_ablation(tmp_path, along):
    """The same output direction with an unrelated input direction is an adapter; with the weight's own, an ablation."""
    name = "model.language_model.layers.2.mlp.down_proj.weight"

    def update(tensors):
        old, generator = tensors[name].float(), torch.Generator().manual_seed(0)
        left = torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0)
        right = left @ old if along else torch.randn(256, generator=generator) * (left @ old).std()
        return tensors | {name: (old + 0.7 * torch.outer(left, right)).bfloat16()}

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", update))
    (tensor,) = found.tensors
    assert (tensor.kind, tensor.rank) == ("ablation" if along else "low-rank", 1)
    if along:
        assert tensor.ablation.coefficient == pytest.approx(-0.7, rel=0.01)


@pytest.mark.parametrize("size", [0.001, 0.05])
def test_training_is_full_rank(tmp_path, size):
    generator = torch.Generator().manual_seed(0)

    def train(tensors):
        return {
            name: (tensor.float() + size * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(
                tensor.dtype
            )
            if tensor.ndim == 2
            else tensor
            for name, tensor in tensors.items()
        }

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", train))
    kinds = by_kind(found)
    assert not set(kinds) & {"ablation", "low-rank", "scaled"}
    if size > 0.01:
        assert len(kinds["full-rank"]) > 60
        assert "changed at full rank" in found.verdict[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_are_scales(tmp_path, axis):
    name = "model.language_model.layers.2.mlp.up_proj.weight"

    def scale(tensors):
        generator = torch.Generator().manual_seed(0)
        factors = 1 + torch.rand(tensors[name].shape[axis], generator=generator)
        factors = factors[:, None] if axis == 0 else factors
        return tensors | {name: (tensors[name].float() * factors).bfloat16()}

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", scale))
    assert [(tensor.name, tensor.kind, tensor.form) for tensor in found.tensors] == [
        (name, "scaled", ["rows", "columns"][axis])
    ]
    assert found.verdict[0].startswith(f"{['rows', 'columns'][axis]} of 1 tensor rescaled in layer 2")


def test_a_flipped_value_is_not_an_edit(tmp_path):
    name = "model.language_model.layers.2.mlp.up_proj.weight"

    def flip(tensors):
        tensors[name][3, 5] = 1.0
        return tensors

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", flip))
    (tensor,) = found.tensors
    assert (tensor.name, tensor.kind, tensor.changed) == (name, "sparse", 1)
    assert found.verdict == ("1 single value changed in 1 tensor in layer 2",)


def test_values_that_are_not_finite_are_told(tmp_path):
    name = "model.language_model.layers.2.mlp.up_proj.weight"

    def poison(tensors):
        tensors[name][0] *= 1.5
        tensors[name][3, 5], tensors[name][4, 4] = float("nan"), float("inf")
        return tensors

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", poison))
    (tensor,) = found.tensors
    assert (tensor.kind, tensor.nonfinite) == ("non-finite", 2)
    result = run("diff", DEMO, tmp_path / "out", "--json")
    json.loads(result.stdout, parse_constant=lambda text: pytest.fail(f"{text} in JSON"))


# ---------------------------------------------------------------------------------------- rounding, types and names


def test_identical_checkpoints_have_no_difference(tmp_path):
    out = tmp_path / "out"
    shutil.copytree(DEMO, out)
    found = compare(DEMO, out)
    assert found.same
    assert found.verdict == ("no difference",)
    assert run("diff", DEMO, out, "--exit-code").exit_code == 0
    assert run("diff", DEMO, out).stdout.splitlines()[-1] == "no difference"


def test_another_dtype_is_rounding_only(tmp_path):
    out = rewrite(DEMO, tmp_path / "out", lambda tensors: {name: value.half() for name, value in tensors.items()})
    found = compare(DEMO, out)
    assert set(by_kind(found)) <= {"retyped", "rounding"}
    assert sum(tensor.beyond for tensor in found.tensors) == 0
    assert "every tensor retyped from BF16 to F16, differences are rounding only" in found.verdict
    wide = rewrite(DEMO, tmp_path / "wide", lambda tensors: {name: value.float() for name, value in tensors.items()})
    assert "every tensor retyped from BF16 to F32, values equal" in compare(DEMO, wide).verdict
    assert "every tensor retyped from F32 to BF16, values equal" in compare(wide, DEMO).verdict


def test_an_edit_is_seen_through_another_dtype(tmp_path, directions):
    run(DEMO, tmp_path / "edited", "-d", directions, "--layers", "1-7", "--source-layer", 4, "-q")
    out = rewrite(tmp_path / "edited", tmp_path / "out", lambda tensors: {k: v.half() for k, v in tensors.items()})
    found = compare(DEMO, out, directions)
    assert len(by_kind(found)["ablation"]) == 14
    assert any("14 of them changed by more than rounding" in line for line in found.verdict)


def test_rounded_twice_is_rounding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    exact = {f"w{number}": torch.randn(96, 64, generator=generator) for number in range(3)}
    save_file({name: value.bfloat16() for name, value in exact.items()}, tmp_path / "nearest.safetensors")
    cut = {name: (value.view(torch.int32) & -65536).view(torch.float32).bfloat16() for name, value in exact.items()}
    save_file(cut, tmp_path / "cut.safetensors")
    found = compare(tmp_path / "nearest.safetensors", tmp_path / "cut.safetensors")
    assert {tensor.kind for tensor in found.tensors} == {"rounding"}
    assert max(tensor.units for tensor in found.tensors) == 1
    assert "3 tensors differ by rounding only" in found.verdict[0]
    for name in ("nearest", "cut"):
        one = load_file(tmp_path / f"{name}.safetensors")["w0"]
        save_file({"w0": one}, tmp_path / f"one-{name}.safetensors")
    alone = compare(tmp_path / "one-nearest.safetensors", tmp_path / "one-cut.safetensors")
    assert re.match(r"1 tensor differs by rounding only \(\S+ of its values", alone.verdict[0])
    told = run("diff", tmp_path / "one-nearest.safetensors", tmp_path / "one-cut.safetensors").stdout
    assert "1 tensor in both, 0 of them" in told


def test_one_edit_is_one_edit(tmp_path, directions):
    run(DEMO, tmp_path / "out", "-d", directions, "--layers", 3, "--components", "mlp", "-q", "--source-layer", 4)
    assert (
        compare(DEMO, tmp_path / "out").verdict[0].startswith("rank-1 edit of 1 residual writer in layer 3, consistent")
    )


def test_what_transformers_loses_is_named(tmp_path):
    import transformers

    transformers.AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "out"
    )
    found = compare(DEMO, tmp_path / "out")
    assert {name.split(".")[0] for name in found.lost} == {"mtp"}
    assert "15 MTP tensors missing in B" in found.verdict
    assert not found.added
    assert any(line.startswith("tokenizer.json: lost") for line in found.files)
    assert "tokenizer.json: lost" in run("diff", DEMO, tmp_path / "out").stdout


def test_renamed_tensors_are_found_by_their_values(tmp_path, directions):
    run(DEMO, tmp_path / "edited", "-d", directions, "--layers", "1-7", "--source-layer", 4, "-q")

    def rename(tensors):
        return {name.replace("model.language_model.", "model."): value for name, value in tensors.items()}

    found = compare(DEMO, rewrite(tmp_path / "edited", tmp_path / "out", rename))
    assert not found.lost
    assert not found.added
    assert len(by_kind(found)["ablation"]) == 14
    for tensor in found.tensors:
        assert tensor.new_name == tensor.name.replace("model.language_model.", "model.")
    assert any("from model.language_model. to model." in line for line in found.verdict)


def test_a_tensor_is_not_renamed_to_one_of_other_values(tmp_path):
    def replace(tensors):
        old = tensors.pop("model.language_model.layers.0.mlp.up_proj.weight")
        generator = torch.Generator().manual_seed(0)
        return tensors | {"model.new.up_proj.weight": torch.randn(old.shape, generator=generator).bfloat16()}

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", replace))
    assert found.lost == ("model.language_model.layers.0.mlp.up_proj.weight",)
    assert found.added == ("model.new.up_proj.weight",)
    assert "1 tensor missing in B" in found.verdict


def test_joined_and_split_tensors_are_recognised(tmp_path):
    root = "model.language_model.layers.3.self_attn."
    parts = [f"{root}{name}_proj.weight" for name in ("q", "k", "v")]

    def join(tensors):
        return tensors | {f"{root}qkv.weight": torch.cat([tensors.pop(name) for name in parts])}

    out = rewrite(DEMO, tmp_path / "out", join)
    found = compare(DEMO, out)
    (fusion,) = found.fused
    assert (fusion.whole, fusion.parts, fusion.split, fusion.equal) == (f"{root}qkv.weight", tuple(parts), False, 3)
    assert not found.lost
    assert not found.added
    assert found.verdict == ("3 tensors joined into 1, every part equal to the byte",)
    assert compare(out, DEMO).verdict == ("1 tensor split into 3, every part equal to the byte",)

    def join_changed(tensors):
        tensors[parts[1]][-1] += 1
        return join(tensors)

    verdict = compare(DEMO, rewrite(DEMO, tmp_path / "changed", join_changed)).verdict
    assert verdict == ("3 tensors joined into 1, 1 part changed as well",)


def test_other_shapes_are_recognised(tmp_path):
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    embedding = "model.language_model.embed_tokens.weight"
    bias = "model.visual.blocks.0.mlp.linear_fc1.weight"

    def reshape(tensors):
        more = torch.cat([tensors[embedding], torch.ones(5, 128).bfloat16()])
        return tensors | {name: tensors[name].T, embedding: more, bias: tensors[bias].view(32, 64)}

    found = compare(DEMO, rewrite(DEMO, tmp_path / "out", reshape))
    kinds = {tensor.name: tensor.kind for tensor in found.tensors}
    assert kinds == {name: "transposed", embedding: "resized", bias: "reshaped"}

    def reshape_changed(tensors):
        tensors = reshape(tensors)
        changed = tensors[name].clone()
        changed[2, 200] += 1
        return tensors | {name: changed, embedding: torch.zeros(7, 128).bfloat16()}

    found = compare(DEMO, rewrite(DEMO, tmp_path / "changed", reshape_changed))
    assert {tensor.name: tensor.kind for tensor in found.tensors} == {
        name: "other shape",
        embedding: "other shape",
        bias: "reshaped",
    }


def test_shards_metadata_and_files(tmp_path):
    one = write_llama(tmp_path / "one", shards=1)
    two = write_llama(tmp_path / "two", shards=3)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"rope_theta": 7, "num_hidden_layers": 4}))
    (two / "tokenizer.json").write_text("{ }")
    (two / "extra" / "notes.txt").unlink()
    (two / "ablation.json").write_text("{}")
    found = compare(one, two)
    assert found.equal == len(open_checkpoint(one).tensors)
    assert found.metadata == ("sharding: 1 files, then 3",)
    assert found.files == (
        "config.json: num_hidden_layers 3 → 4",
        "config.json: rope_theta added (7)",
        "extra/notes.txt: lost",
        "tokenizer.json: differs in layout only",
        "ablation.json: added (not compared)",
    )
    assert found.verdict[0] == "the weights are equal"
    assert run("diff", one, two, "--exit-code").exit_code == 1
    assert run("diff", one, two).exit_code == 0


def test_every_float_type_is_decoded(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 48, generator=generator)
    types = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        empty, single = torch.zeros(0, 4), torch.tensor(1.0)
        save_file({"w": values.to(dtype), "empty": empty, "single": single}, tmp_path / f"{name}.safetensors")
        found = compare(tmp_path / "float64.safetensors", tmp_path / f"{name}.safetensors")
        assert {tensor.kind for tensor in found.tensors} <= {"rounding", "retyped"}, dtype
        changed = values.clone()
        changed[:, 7] *= 1.5
        save_file({"w": changed.to(dtype), "empty": empty, "single": single * 2}, tmp_path / "changed.safetensors")
        found = compare(tmp_path / f"{name}.safetensors", tmp_path / "changed.safetensors")
        assert {tensor.name for tensor in found.tensors} == {"w", "single"}
        (changed,) = (tensor.changed for tensor in found.tensors if tensor.name == "w")
        assert changed == pytest.approx(64, abs=2)


def test_raw_dtypes_are_counted(tmp_path):
    packed = {"w.qweight": torch.arange(512, dtype=torch.int32).view(16, 32), "small": torch.ones(3)}
    save_file(packed, tmp_path / "a.safetensors")
    packed["w.qweight"][2, :4] += 1
    save_file(packed, tmp_path / "b.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [(tensor.kind, tensor.changed) for tensor in found.tensors] == [("raw", 4)]
    assert found.verdict == ("1 tensor of types that are not decoded changed (I32; 4 values)",)


def test_renamed_tensors_of_raw_types_are_found(tmp_path):
    """Those of one shape and several types lie side by side, as in quantised checkpoints."""
    values = {"weight": torch.ones(16, 32) / 3, "packed": torch.arange(512, dtype=torch.int32).view(16, 32)}
    for prefix in ("old", "new"):
        save_file({f"{prefix}.{name}": value for name, value in values.items()}, tmp_path / f"{prefix}.safetensors")
    found = compare(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    assert {(tensor.name, tensor.new_name, tensor.kind) for tensor in found.tensors} == {
        ("old.weight", "new.weight", "equal"),
        ("old.packed", "new.packed", "equal"),
    }


def test_renamed_tensors_of_half_a_byte_are_found(tmp_path):
    for name in ("old", "new"):
        header = json.dumps({f"{name}.w": {"dtype": "F4", "shape": [64, 64], "data_offsets": [0, 2048]}}).encode()
        raw = len(header).to_bytes(8, "little") + header + bytes(number * 7 % 256 for number in range(2048))
        (tmp_path / f"{name}.safetensors").write_bytes(raw)
    (tensor,) = compare(tmp_path / "old.safetensors", tmp_path / "new.safetensors").tensors
    assert (tensor.name, tensor.new_name, tensor.kind) == ("old.w", "new.w", "equal")


# ---------------------------------------------------------------------------------------- which kind wins


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNIT = torch.nn.functional.normalize(normal(48, seed=1), dim=0)
MATRIX, STACK, VECTOR = normal(48, 32), normal(3, 48, 32), normal(80)
#: Between 1 and 2, where a unit in the last place of float32 is 2^-23 everywhere.
LEVEL = 1 + torch.rand(48, 32, generator=torch.Generator().manual_seed(0))
ROW_SCALES = 1 + torch.rand(48, 1, generator=torch.Generator().manual_seed(2))
INTEGERS = torch.arange(48 * 32, dtype=torch.int32).view(48, 32)


def ablated(old):
    return old - torch.outer(UNIT, UNIT @ old)


def updated(old):
    """Adds what has rank two and nothing to do with the old values."""
    return old + 0.1 * normal(48, 2, seed=3) @ normal(2, 32, seed=4)


def trained(old):
    return old + 0.1 * normal(*old.shape, seed=5)


def changed(old, count, by=1.0):
    """Changes so many values, in a pattern that has no low rank."""
    new = old.clone()
    new.view(-1)[torch.randperm(new.numel(), generator=torch.Generator().manual_seed(6))[:count]] += by
    return new


def stacked(*edits):
    return torch.stack([edit(old) for edit, old in zip(edits, STACK, strict=True)])


def unchanged(old):
    return old


def negative_zeros(old):
    return torch.where(old == 0, -0.0, old)


def not_a_number(old):
    return torch.cat([old[:-1], torch.full_like(old[-1:], float("nan"))])


def huge(old):
    return torch.cat([old[:-1], torch.full_like(old[-1:], 3e38)])


TINY = torch.full((48, 32), 1e-30)
HOLLOW = torch.where(MATRIX.abs() < 0.1, 0.0, MATRIX)
#: A pattern of rank one that is a unit in the last place everywhere.
FAINT = LEVEL + 2**-23 * torch.outer(normal(48).sign(), normal(32, seed=1).sign())

KINDS = {
    "retyped": (MATRIX, MATRIX.double()),
    "rounding": (MATRIX.bfloat16(), MATRIX.half()),
    "sparse": (MATRIX, changed(MATRIX, 1)),
    "ablation": (MATRIX, ablated(MATRIX)),
    "low-rank": (MATRIX, updated(MATRIX)),
    "scaled": (MATRIX, ROW_SCALES * MATRIX),
    "full-rank": (MATRIX, trained(MATRIX)),
    "vector": (VECTOR, trained(VECTOR)),
    "non-finite": (MATRIX, not_a_number(MATRIX)),
    "raw": (INTEGERS, INTEGERS + 1),
    "reshaped": (MATRIX, MATRIX.view(24, 64)),
    "transposed": (MATRIX, MATRIX.T),
    "resized": (MATRIX, MATRIX[:40]),
    "other shape": (MATRIX, normal(48, 40)),
}


def kind_of(folder, old, new, **options):
    for name, tensor in (("a", old), ("b", new)):
        save_file({"w": tensor.contiguous()}, folder / f"{name}.safetensors")
    (tensor,) = compare(folder / "a.safetensors", folder / "b.safetensors", **options).tensors
    return tensor.kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told(tmp_path, kind):
    assert kind_of(tmp_path, *KINDS[kind]) == kind


def test_no_kind_is_left_out():
    """Tensors that are equal are told of only where they have another name; scales are in test_diff_of_codes.py."""
    assert {*KINDS, "equal", "scales"} == set(get_args(DiffKind))


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        pytest.param(MATRIX, ablated(MATRIX), "ablation", id="an ablation"),
        pytest.param(MATRIX, not_a_number(ablated(MATRIX)), "non-finite", id="an ablation with a NaN"),
        pytest.param(MATRIX, not_a_number(MATRIX).double(), "non-finite", id="another dtype with a NaN"),
        pytest.param(VECTOR, not_a_number(VECTOR), "non-finite", id="one NaN in a vector"),
        pytest.param(MATRIX, huge(MATRIX), "non-finite", id="values whose squares overflow"),
        pytest.param(VECTOR, huge(VECTOR), "non-finite", id="such a value in a vector"),
        pytest.param(huge(MATRIX), huge(ablated(MATRIX)), "ablation", id="such values on both sides, and an ablation"),
        pytest.param(1e9 * MATRIX, 1e9 * ablated(MATRIX), "ablation", id="values whose squares are large"),
        pytest.param(HOLLOW, negative_zeros(HOLLOW), "rounding", id="zeros of the other sign"),
        pytest.param(HOLLOW, negative_zeros(HOLLOW).double(), "retyped", id="zeros of the other sign, another dtype"),
        pytest.param(TINY, 2 * TINY, "rounding", id="differences whose squares vanish"),
        pytest.param(LEVEL, FAINT, "low-rank", id="a pattern of a unit in the last place"),
        pytest.param(LEVEL, FAINT.double(), "rounding", id="such a pattern, another dtype"),
        pytest.param(LEVEL, changed(LEVEL, 1, by=2**-23), "rounding", id="one value off by a unit"),
        pytest.param(LEVEL, changed(LEVEL, 4, by=2**-22), "sparse", id="four values off by two units"),
        pytest.param(LEVEL, changed(LEVEL, 16, by=2**-22), "rounding", id="sixteen values off by two units"),
        pytest.param(MATRIX, changed(MATRIX, 4), "sparse", id="four values"),
        pytest.param(MATRIX, changed(MATRIX, 40), "full-rank", id="forty values"),
        pytest.param(VECTOR, changed(VECTOR, 4), "sparse", id="four values of a vector"),
        pytest.param(VECTOR, changed(VECTOR, 5), "vector", id="five values of a vector"),
        pytest.param(VECTOR[:64], changed(VECTOR[:64], 1), "vector", id="one value of a short vector"),
        pytest.param(VECTOR, torch.nextafter(VECTOR, torch.zeros(())), "rounding", id="a vector within a unit"),
        pytest.param(STACK, stacked(ablated, ablated, unchanged), "ablation", id="experts ablated"),
        pytest.param(STACK, stacked(ablated, updated, unchanged), "low-rank", id="one ablated, one updated"),
        pytest.param(STACK, stacked(ablated, trained, unchanged), "full-rank", id="one ablated, one trained"),
        pytest.param(STACK, stacked(*3 * [lambda old: ROW_SCALES * old]), "scaled", id="experts scaled"),
        pytest.param(STACK, stacked(lambda old: ROW_SCALES * old, updated, unchanged), "low-rank", id="one updated"),
        pytest.param(INTEGERS, INTEGERS.long(), "raw", id="integers of another size"),
        pytest.param(INTEGERS, INTEGERS.float(), "raw", id="integers and floats"),
        pytest.param(MATRIX, MATRIX.T.double(), "other shape", id="transposed, another dtype"),
    ],
)
def test_where_several_kinds_apply_the_first_wins(tmp_path, old, new, kind):
    assert kind_of(tmp_path, old, new, rank=8) == kind


# ---------------------------------------------------------------------------------------- the sketch


def blocks_of(old, new, step):
    def blocks():
        for row in range(0, len(old), step):
            part = old[row : row + step].float()
            yield row, part, new[row : row + step].float() - part

    return blocks


@pytest.mark.parametrize("shape", [(96, 64), (64, 300), (257, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sketch_agrees_with_a_full_decomposition(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    old = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    factors = [torch.randn(side, 6, generator=generator) for side in shape]
    spectrum = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.1, 0.05]) * 0.01
    new = (old.float() + (factors[0] * spectrum) @ factors[1].T).to(dtype)
    change = compare_matrix(blocks_of(old, new, 17), shape, UNITS[dtype], 16)
    exact = new.double() - old.double()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    assert change.fit.form == "plain"
    assert change.fit.rank == 6
    torch.testing.assert_close(change.fit.values[:6], values[:6], rtol=1e-4, atol=0)
    assert change.energy == pytest.approx(float(exact.square().sum()), rel=1e-6)
    for number in range(3):
        assert abs(float(change.fit.left[:, number] @ left[:, number])) > 0.9999
        assert abs(float(change.fit.right[:, number] @ right[number])) > 0.9999
    again = compare_matrix(blocks_of(old, new, 17), shape, UNITS[dtype], 16)
    assert torch.equal(again.fit.values, change.fit.values)
    assert compare_matrix(blocks_of(old, new, 17), shape, UNITS[dtype], 1).fit.form in ("plain", "full")


def test_more_than_the_rank_asked_for_is_full(tmp_path):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(128, 160, generator=generator)
    new = old + 0.01 * torch.randn(128, 24, generator=generator) @ torch.randn(24, 160, generator=generator)
    unit = UNITS[torch.float32]
    assert compare_matrix(blocks_of(old, new, 64), (128, 160), unit, 8).fit.form == "full"
    wider = compare_matrix(blocks_of(old, new, 64), (128, 160), unit, 32)
    assert (wider.fit.form, wider.fit.rank) == ("plain", 24)


def test_memory_and_jobs_change_nothing(tmp_path, directions):
    run(DEMO, tmp_path / "out", "-d", directions, "--source-layer", 4, "-q")
    found = compare(DEMO, tmp_path / "out", directions)
    assert compare(DEMO, tmp_path / "out", directions, jobs=1, memory=8_000_000) == found
    assert compare(DEMO, tmp_path / "out", directions, jobs=3, memory=1_000_000_000) == found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_flat(tmp_path):
    """Every value of 32 MB changes, which decoded would take 128 MB; it takes little more than a small tensor."""
    pairs = []
    for rows in (256, 16 << 10):
        for name, step in (("a", 0.0), ("b", 0.01)):
            pairs.append(tmp_path / f"{name}{rows}.safetensors")
            values = (torch.arange(rows * 1024) % 997 / 997).view(rows, 1024) + step
            save_file({"w": values.bfloat16()}, pairs[-1])
    script = (
        "import sys; from ablate_shards.cli import cli\n"
        "for pair in (sys.argv[1:3], sys.argv[3:]):\n"
        "    cli(['diff', *pair, '--memory', '64MB', '-q'], standalone_mode=False)\n"
        "    print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, pairs)], capture_output=True, text=True, check=True)
    peaks = [int(line) // 1024 for line in done.stdout.split()]
    assert peaks[1] - peaks[0] < 48, peaks


# ---------------------------------------------------------------------------------------- what is shown


def test_the_table_fits_and_has_no_colour(tmp_path, directions, monkeypatch):
    run(DEMO, tmp_path / "out", "-d", directions, "--source-layer", 4, "-q")
    result = run("diff", DEMO, tmp_path / "out", "-d", directions)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "1.00 layer 4" in result.stdout
    assert "out_proj" in result.stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "70")
    assert "\x1b[1m" in run("diff", DEMO, tmp_path / "out").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    narrow = run("diff", DEMO, tmp_path / "out").stdout
    assert "\x1b[3" not in narrow
    table = [line for line in narrow.splitlines() if "down_p" in line]
    assert table
    assert max(map(len, table)) < 110


def test_json_holds_everything(tmp_path, directions):
    run(DEMO, tmp_path / "out", "-d", directions, "--source-layer", 4, "-q")
    content = json.loads(run("diff", DEMO, tmp_path / "out", "-d", directions, "--json").stdout)
    found = compare(DEMO, tmp_path / "out", directions)
    assert content["verdict"] == list(found.verdict)
    assert content["tensors"] == json.loads(json.dumps([dataclasses.asdict(tensor) for tensor in found.tensors]))
    assert content["family"].startswith("Qwen3.5")


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    result = run("diff", DEMO, tmp_path / "nothing")
    assert result.exit_code == 1
    assert "no such file or folder" in result.stderr
    assert run("diff", DEMO).exit_code == 2
