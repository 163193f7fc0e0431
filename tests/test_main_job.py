"""The main job through the command line: bytes, accuracy, receipt, refusals."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import checked
from raw_checkpoints import (
    decode,
    llama_tensors,
    snapshot,
    tensor_bytes,
    write_directions,
    write_dump,
    write_llama,
    write_shard,
)
from safetensors.numpy import load_file

from ablate_shards.kernels import reference
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.directions.directions import biproject
from ablate_shards.surgery.directions.formats import read_directions

WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture
def source(tmp_path):
    return write_llama(tmp_path / "source")


@pytest.fixture
def directions(tmp_path):
    return write_directions(tmp_path / "d.safetensors")


def test_only_the_writers_change(tmp_path, source, directions):
    before = snapshot(source)
    out = tmp_path / "out"
    checked(source, out, "-d", directions, "--source-layer", 1)

    assert snapshot(source) == before
    after = snapshot(out)
    assert set(after) == (set(before) - {"pytorch_model.bin"}) | {"ablation.json"}
    for name in after:
        if not name.endswith((".safetensors", "ablation.json")):
            assert after[name] == before[name]
    ours, theirs = tensor_bytes(out), tensor_bytes(source)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    assert changed == {f"model.layers.{layer}.{writer}" for layer in range(3) for writer in WRITERS}
    for name in before:
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(before[name][:8], "little")
            assert after[name][:header] == before[name][:header]
            assert len(after[name]) == len(before[name])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("preserve", ["rows", "columns", "none"])
@pytest.mark.parametrize("coefficient", [1.0, 2.5])
@pytest.mark.parametrize("source_layer", ["own", "1"])
def test_accuracy_against_float64(tmp_path, dtype, preserve, coefficient, source_layer):
    source = write_llama(tmp_path / "source", hidden=96, layers=2, dtype=dtype)
    directions = write_directions(tmp_path / "d.safetensors", hidden=96, layers=2)
    out = tmp_path / "out"
    checked(
        source,
        out,
        "-d",
        directions,
        "--preserve",
        preserve,
        "--coefficient",
        coefficient,
        "--source-layer",
        source_layer,
    )

    found = read_directions(directions)
    given, edited = tensor_bytes(source), tensor_bytes(out)
    elements = wrong = 0
    for name, tensor in open_checkpoint(source).tensors.items():
        if not name.endswith(WRITERS):
            continue
        at = int(name.split(".")[2])
        measured = at if source_layer == "own" else int(source_layer)
        basis, _ = biproject(found.basis[measured], [found.reference[layer] for layer in {measured, at}])
        weight = torch.from_numpy(decode(given[name], dtype, tensor.shape))
        exact, _ = reference.ablate(
            weight, torch.from_numpy(basis), coefficient=coefficient, preserve=preserve, axis=-2
        )
        actual = torch.from_numpy(decode(edited[name], dtype, tensor.shape))
        assert not torch.equal(weight, actual)
        if dtype == "F32":
            along = 1 if preserve == "rows" else 0
            assert ((actual - exact).norm(dim=along) <= 1e-6 * weight.norm(dim=along)).all()
            continue
        kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        rounded = reference.round_to(exact, kind).double()
        elements += rounded.numel()
        wrong += int((rounded != actual).sum())
        largest = torch.maximum(weight.abs(), exact.abs())
        ulp = torch.finfo(kind).eps * 2.0 ** torch.floor(torch.log2(largest.clamp(min=torch.finfo(kind).tiny)))
        assert ((actual - exact).abs() <= ulp).all()
    assert wrong <= 1e-3 * elements


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("memory", ["8MB", "1GB"])
def test_jobs_and_memory_change_no_byte(tmp_path, source, directions, jobs, memory):
    checked(source, tmp_path / "a", "-d", directions, "--source-layer", 1)
    checked(source, tmp_path / "b", "-d", directions, "--source-layer", 1, "--jobs", jobs, "--memory", memory)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_one_file(tmp_path, directions):
    source = tmp_path / "in.safetensors"
    write_shard(source, llama_tensors())
    checked(source, tmp_path / "out", "-d", directions, "--source-layer", 0)
    assert sorted(snapshot(tmp_path / "out")) == ["ablation.json", "in.safetensors"]
    checked("verify", source, tmp_path / "out")


def test_bare_shards_and_odd_names(tmp_path, directions):
    source = write_llama(tmp_path / "source", shards=1)
    (source / "model.safetensors.index.json").unlink()
    checked(source, tmp_path / "bare", "-d", directions, "--source-layer", 0)
    name = "model.safetensors-00001-of-00001.safetensors"
    (source / "model-00001-of-00001.safetensors").rename(source / name)
    weight_map = dict.fromkeys(llama_tensors(), name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checked(source, tmp_path / "odd", "-d", directions, "--source-layer", 0)
    assert (tmp_path / "odd" / name).read_bytes() == (
        tmp_path / "bare" / "model-00001-of-00001.safetensors"
    ).read_bytes()


def test_receipt_tells_what_was_measured(tmp_path, source, directions):
    out = tmp_path / "out"
    checked(source, out, "-d", directions, "--source-layer", 1, "--preserve", "columns", "--no-biproject")
    receipt = json.loads((out / "ablation.json").read_text())
    basis = read_directions(directions).basis[1].astype(np.float64)
    given, edited = tensor_bytes(source), tensor_bytes(out)
    assert len(receipt["tensors"]) == 6
    for record in receipt["tensors"]:
        old, new = (decode(side[record["name"]], "BF16", record["shape"]) for side in (given, edited))
        for key, weight in (("before", old), ("after", new)):
            component = np.linalg.norm(basis @ weight) / np.linalg.norm(weight)
            assert record[key] == pytest.approx(component, rel=1e-5, abs=1e-7)
        drift = np.abs(np.linalg.norm(new, axis=0) / np.linalg.norm(old, axis=0) - 1).max()
        assert record["norm_drift"] == pytest.approx(drift, rel=1e-3, abs=1e-8)
        assert record["after"] < record["before"] / 50
        assert record["source_layer"] == 1
    assert receipt["directions"]["sha256"] == read_directions(directions).sha256()
    assert {skip["name"] for skip in receipt["skipped"]} == {"model.embed_tokens.weight"}
    assert [entry["name"] for entry in receipt["files"]["left_out"]] == ["pytorch_model.bin"]


def test_activations_equal_their_directions(tmp_path, source):
    dump = write_dump(tmp_path / "a.safetensors")
    checked("directions", dump, tmp_path / "d.safetensors")
    checked(source, tmp_path / "one", "-a", dump)
    checked(source, tmp_path / "two", "-d", tmp_path / "d.safetensors")
    assert tensor_bytes(tmp_path / "one") == tensor_bytes(tmp_path / "two")
    assert tensor_bytes(tmp_path / "one") != tensor_bytes(source)


def test_directions_beside_the_weights_are_used_and_not_copied(tmp_path, source):
    plain = checked(source, tmp_path / "none", code=2)
    assert "directions.safetensors" in plain.output
    assert not (tmp_path / "none").exists()
    write_dump(source / "activations.safetensors")
    checked(source, tmp_path / "dump")
    checked("directions", source / "activations.safetensors", source / "directions.safetensors")
    checked(source, tmp_path / "file")
    assert tensor_bytes(tmp_path / "dump") == tensor_bytes(tmp_path / "file")
    assert not list((tmp_path / "file").glob("*ions.safetensors"))


def test_dry_run_writes_nothing(tmp_path, source, directions):
    before = sorted(path.name for path in tmp_path.iterdir())
    result = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, "--dry-run")
    assert "down_proj" in result.stdout
    plan = json.loads(
        checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, "--dry-run", "--json").stdout
    )
    assert {edit["name"] for edit in plan["edits"]} == {
        f"model.layers.{layer}.{writer}" for layer in range(3) for writer in WRITERS
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_layers_and_components(tmp_path, source, directions):
    checked(
        source,
        tmp_path / "out",
        "-d",
        directions,
        "--source-layer",
        1,
        "--layers",
        "1-2",
        "--components",
        "mlp",
    )
    ours, theirs = tensor_bytes(tmp_path / "out"), tensor_bytes(source)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


def test_coefficient_zero_changes_nothing_but_adds_a_receipt(tmp_path, source, directions):
    checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, "--coefficient", 0)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_coefficient_above_one_is_explained(tmp_path, source, directions):
    result = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, "--coefficient", 2.5)
    assert "-1.5 times itself" in result.stderr
    calm = checked(source, tmp_path / "calm", "-d", directions, "--source-layer", 1)
    assert "times itself" not in calm.stderr


def test_recipe_gives_flags_and_a_flag_wins(tmp_path, source, directions):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[source]\nsource = "source"\nout = "by-recipe"\n[directions]\ndirections = "d.safetensors"\n'
        '[ablate]\nsource-layer = 1\ncoefficient = 2.0\npreserve = "columns"\nlayers = [1, 2]\n'
        '[[ablate.override]]\nlayers = "2"\ncomponents = ["mlp"]\ncoefficient = 0.5\n'
    )
    checked("ablate", "--recipe", recipe)
    records = {
        record["name"]: record
        for record in json.loads((tmp_path / "by-recipe" / "ablation.json").read_text())["tensors"]
    }
    assert records["model.layers.2.mlp.down_proj.weight"]["coefficient"] == 0.5
    assert records["model.layers.1.mlp.down_proj.weight"]["coefficient"] == 2.0
    assert {record["layer"] for record in records.values()} == {1, 2}
    assert {record["preserve"] for record in records.values()} == {"columns"}
    checked(source, tmp_path / "flag", "--recipe", recipe, "--preserve", "rows")
    flag = json.loads((tmp_path / "flag" / "ablation.json").read_text())
    assert {record["preserve"] for record in flag["tensors"]} == {"rows"}


def test_directions_without_scores_serve_where_every_source_layer_is_named(tmp_path, source, directions):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[ablate.override]]\nsource-layer = 1\n")
    named = checked(source, tmp_path / "named", "-d", directions, "--recipe", recipe, "--source-layer", "best")
    assert "best by its scores" not in named.output
    checked(source, tmp_path / "said", "-d", directions, "--source-layer", 1)
    assert tensor_bytes(tmp_path / "named") == tensor_bytes(tmp_path / "said")
    refused = checked(source, tmp_path / "best", "-d", directions, "--source-layer", "best", code=1)
    assert "the directions carry no scores" in refused.output


def test_targets_describe_an_unknown_architecture(tmp_path, source, directions):
    config = json.loads((source / "config.json").read_text()) | {"model_type": "novel"}
    (source / "config.json").write_text(json.dumps(config))
    refused = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "[[ablate.target]]" in refused.output
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[[ablate.target]]\npattern = 'model\\.layers\\.(?P<layer>\\d+)\\.self_attn\\.o_proj\\.weight'\n"
        "component = 'attention'\naxis = 'out'\n"
        "[[ablate.target]]\npattern = 'model\\.layers\\.(?P<layer>\\d+)\\.mlp\\.down_proj\\.weight'\n"
        "component = 'mlp'\naxis = 'out'\n"
    )
    checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, "--recipe", recipe)
    config["model_type"] = "llama"
    (source / "config.json").write_text(json.dumps(config))
    checked(source, tmp_path / "known", "-d", directions, "--source-layer", 1)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "known")


def test_refuses_what_would_lose_something(tmp_path, source, directions):
    arguments = ("-d", directions, "--source-layer", 1)
    checked(source, source, *arguments, code=2)
    checked(source, source / "inside", *arguments, code=2)
    checked(source, tmp_path, *arguments, code=2)
    checked(source / "model-00001-of-00002.safetensors", source, *arguments, code=2)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    checked(source, precious, *arguments, code=1)
    checked(source, precious, *arguments, "--overwrite", code=1)
    assert (precious / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    checked(source, tmp_path / "empty", *arguments)
    refused = checked(source, tmp_path / "empty", *arguments, code=1)
    assert "--overwrite" in refused.output
    checked(source, tmp_path / "empty", *arguments, "--overwrite", "--preserve", "none")
    receipt = json.loads((tmp_path / "empty" / "ablation.json").read_text())
    assert receipt["recipe"]["preserve"] == "none"
    inside = shutil.copy(directions, tmp_path / "empty" / "d.safetensors")
    held = checked(source, tmp_path / "empty", "-d", inside, "--source-layer", 1, "--overwrite", code=2)
    assert f"holds {inside}, which would be replaced" in held.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_found_before_the_first_byte(tmp_path, source, directions, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    result = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "free" in result.output
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_link_shares_only_what_is_not_edited(tmp_path, source, directions):
    arguments = ("-d", directions, "--source-layer", 1, "--layers", "2")
    checked(source, tmp_path / "copied", *arguments)
    checked(source, tmp_path / "linked", *arguments, "--link")
    assert snapshot(tmp_path / "linked") == snapshot(tmp_path / "copied")
    shared = {path.name: path.samefile(source / path.name) for path in (tmp_path / "linked").glob("*.safetensors")}
    assert shared == {"model-00001-of-00002.safetensors": True, "model-00002-of-00002.safetensors": False}
    assert not any(path.samefile(source / path.name) for path in (tmp_path / "copied").glob("*.safetensors"))
    checked("verify", source, tmp_path / "linked")


def test_linked_shards_as_in_a_download_cache(tmp_path, source, directions):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    checked("verify", source, tmp_path / "out")


def test_inspect_shows_writers_and_what_is_left(source):
    result = checked("inspect", source)
    assert "self_attn.o_proj" in result.stdout
    assert "pytorch_model.bin" in result.stdout
    content = json.loads(checked("inspect", source, "--json").stdout)
    assert len(content["writers"]) == 7
    assert content["family"]


def test_help_needs_no_torch():
    code = "import sys; from ablate_shards.cli import main\ntry:\n main(['--help'])\nexcept SystemExit:\n pass\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("words", "threads"), [(("-d", "x"), "1"), (("-a", "x"), None)])
def test_blas_has_one_thread_before_numpy_is_imported(tmp_path, words, threads):
    code = """
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            print(os.environ.get("OPENBLAS_NUM_THREADS"))

sys.meta_path.insert(0, Finder())
from ablate_shards.cli import main
main(["ablate", "--source-layer", "3", "none", "out", *sys.argv[1:]])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    found = subprocess.run(
        [sys.executable, "-c", code, *words], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.stdout.split() == [str(threads)], found.stderr


def test_rank_two_directions(tmp_path, source):
    directions = write_directions(tmp_path / "two.safetensors", rank=2)
    checked(
        source,
        tmp_path / "out",
        "-d",
        directions,
        "--source-layer",
        1,
        "--preserve",
        "columns",
        "--no-biproject",
    )
    name = "model.layers.0.mlp.down_proj.weight"
    shape = open_checkpoint(source).tensors[name].shape
    basis = load_file(directions)["direction.layers.1"]
    old, new = (decode(tensor_bytes(side)[name], "BF16", shape) for side in (source, tmp_path / "out"))
    assert np.linalg.norm(basis @ old) > 0.1
    assert np.linalg.norm(basis @ new) < 0.02 * np.linalg.norm(basis @ old)


def test_weights_beside_the_index_are_refused(tmp_path, source, directions):
    """Loaders prefer ``model.safetensors`` to the index, so it may not slip through unedited."""
    write_shard(source / "model.safetensors", llama_tensors())
    refused = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "model.safetensors" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_code_and_notes_are_sidecars_whatever_their_name(tmp_path, source, directions):
    for name in ("activations.py", "directions.md", "activations.json"):
        (source / name).write_text("kept")
    checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1)
    assert {"activations.py", "directions.md", "activations.json"} <= set(snapshot(tmp_path / "out"))


def test_an_index_spells_each_shard_in_one_way(tmp_path, source, directions):
    path = source / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model-00001', '"./model-00001'))
    refused = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "write it as" in refused.stderr


def test_links_into_out_are_not_lost(tmp_path, source, directions):
    arguments = ("-d", directions, "--source-layer", 1)
    checked(source, tmp_path / "a", *arguments)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (tmp_path / "a").iterdir():
        (linked / path.name).symlink_to(path)
    before = snapshot(tmp_path / "a")
    checked(linked, tmp_path / "a", *arguments, "--overwrite", code=2)
    assert snapshot(tmp_path / "a") == before


def test_out_may_be_a_link_to_an_empty_folder(tmp_path, source, directions):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1)
    assert (tmp_path / "real" / "ablation.json").is_file()
    assert (tmp_path / "out").is_symlink()


def test_a_flag_wins_over_the_other_kind_in_a_recipe(tmp_path, source, directions):
    dump = write_dump(tmp_path / "a.safetensors")
    recipe = tmp_path / "r.toml"
    recipe.write_text('[directions]\ndirections = "d.safetensors"\n[ablate]\nsource-layer = 1\n')
    checked(source, tmp_path / "out", "--recipe", recipe, "-a", dump)
    checked(source, tmp_path / "plain", "-a", dump, "--source-layer", 1)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "plain")
    checked(source, tmp_path / "both", "-a", dump, "-d", directions, code=2)
    checked(source, tmp_path / "both", "-d", directions, "--source-layer", 1, "--estimator", "svd", code=2)


def test_a_missing_expert_is_noticed(tmp_path, directions):
    source = tmp_path / "moe"
    source.mkdir()
    tensors = {name: values for name, values in llama_tensors().items() if "down_proj" not in name}
    for layer in range(3):
        for expert in range(4):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"] = np.ones((32, 16))
    config = {"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    write_shard(source / "model.safetensors", tensors)
    checked(source, tmp_path / "whole", "-d", directions, "--source-layer", 1)
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    write_shard(source / "model.safetensors", tensors)
    refused = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "expert 2 of 4 is missing" in refused.stderr


def test_the_coverage_error_lists_the_tensors_of_that_layer_alone(tmp_path, directions):
    source = tmp_path / "part"
    source.mkdir()
    tensors = {
        name: values for name, values in llama_tensors().items() if name != "model.layers.1.mlp.down_proj.weight"
    }
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    write_shard(source / "model.safetensors", tensors)
    refused = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "layer 1: no mlp writer" in refused.stderr
    assert "model.layers.1.mlp.up_proj.weight" in refused.stderr
    assert "layers.0" not in refused.stderr
    assert "layers.2" not in refused.stderr
    assert "none" in checked("inspect", source).stdout
