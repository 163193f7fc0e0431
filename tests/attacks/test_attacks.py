"""Malformed and hostile inputs: one sentence, exit 1 or 2, nothing left behind, nothing run."""

import json
import os
import pickle
import struct
import time

import numpy as np
import pytest
import torch
from command_line import checked, run
from raw_checkpoints import llama_tensors, snapshot, write_directions, write_dump, write_llama, write_shard
from safetensors.numpy import save_file

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def header_of(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def rewrite(path, change):
    header, body = header_of(path)
    body = change(header, body) or body
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def change_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def first_entry(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


def truncated(folder):
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:-100])


def truncated_in_the_header(folder):
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:50])


def empty_file(folder):
    (folder / FIRST).write_bytes(b"")


def trailing_bytes(folder):
    with (folder / FIRST).open("ab") as file:
        file.write(b"hidden")


def huge_header(folder):
    (folder / FIRST).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def header_not_json(folder):
    (folder / FIRST).write_bytes(struct.pack("<Q", 16) + b"\x80" * 16)


def overlapping(folder):
    def change(header, _body):
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        entries[1]["data_offsets"][0] -= 2

    rewrite(folder / FIRST, change)


def hole_between_tensors(folder):
    def change(header, body):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
        return b"12345678" + body

    rewrite(folder / FIRST, change)


def huge_shape(folder):
    rewrite(folder / FIRST, lambda header, _: first_entry(header).update(shape=[2**40, 2**40]))


def negative_shape(folder):
    rewrite(folder / FIRST, lambda header, _: first_entry(header).update(shape=[-1, 32]))


def unknown_dtype(folder):
    rewrite(folder / FIRST, lambda header, _: first_entry(header).update(dtype="F17"))


def shape_against_bytes(folder):
    rewrite(folder / FIRST, lambda header, _: first_entry(header).update(shape=[1, 1]))


def integer_writer(folder):
    rewrite(folder / FIRST, lambda header, _: header["model.layers.0.mlp.down_proj.weight"].update(dtype="I16"))


def writer_of_another_width(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder / FIRST, lambda header, _: header[name].update(shape=header[name]["shape"][::-1]))


def vector_writer(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder / FIRST, lambda header, _: header[name].update(shape=[int(np.prod(header[name]["shape"]))]))


def nan_weights(folder):
    header, _ = header_of(folder / FIRST)
    offset = header["model.layers.0.mlp.down_proj.weight"]["data_offsets"][0] + 64

    def change(_header, body):
        return body[:offset] + b"\xc0\x7f" + body[offset + 2 :]

    rewrite(folder / FIRST, change)


def infinite_weights(folder):
    header, _ = header_of(folder / SECOND)
    offset = header["model.layers.2.self_attn.o_proj.weight"]["data_offsets"][1] - 2
    rewrite(folder / SECOND, lambda _header, body: body[:offset] + b"\x80\x7f" + body[offset + 2 :])


def missing_shard(folder):
    (folder / SECOND).unlink()


def missing_numbered_shard(folder):
    (folder / INDEX).unlink()
    (folder / SECOND).unlink()


def index_out_of_the_folder(folder):
    (folder / FIRST).rename(folder.parent / FIRST)

    def change(weight_map):
        for name, shard in weight_map.items():
            weight_map[name] = f"../{FIRST}" if shard == FIRST else shard

    change_index(folder, change)


def index_to_an_absolute_path(folder):
    change_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": "/etc/passwd"}))


def index_names_a_tensor_too_many(folder):
    change_index(folder, lambda weight_map: weight_map.update(ghost=FIRST))


def index_forgets_a_tensor(folder):
    change_index(folder, lambda weight_map: weight_map.pop("model.norm.weight"))


def index_names_the_wrong_shard(folder):
    change_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": FIRST}))


def index_not_json(folder):
    (folder / INDEX).write_text('{"weight_map": ')


def index_nested_too_deep(folder):
    (folder / INDEX).write_text("[" * 100_000)


def index_without_a_map(folder):
    (folder / INDEX).write_text('{"weight_map": ["a"]}')


def config_not_json(folder):
    (folder / "config.json").write_text("hidden_size: 32")


def config_not_an_object(folder):
    (folder / "config.json").write_text("[]")


def config_with_nonsense_sizes(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')


def tensor_in_two_shards(folder):
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "a.safetensors")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "b.safetensors")
    write_shard(folder / "b.safetensors", llama_tensors())


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def layer_without_its_writer(folder):
    name = "model.layers.1.mlp.down_proj.weight"
    for path in folder.glob("*.safetensors"):
        header, body = header_of(path)
        if name in header:
            header[name.replace("down_proj", "lost")] = header.pop(name)
            text = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    change_index(folder, lambda weights: weights.update({name.replace("down_proj", "lost"): weights.pop(name)}))


CHECKPOINTS = {
    truncated: FIRST,
    truncated_in_the_header: FIRST,
    empty_file: FIRST,
    trailing_bytes: FIRST,
    huge_header: FIRST,
    header_not_json: FIRST,
    overlapping: FIRST,
    hole_between_tensors: FIRST,
    huge_shape: FIRST,
    negative_shape: FIRST,
    unknown_dtype: FIRST,
    shape_against_bytes: FIRST,
    integer_writer: "model.layers.0.mlp.down_proj.weight",
    writer_of_another_width: "model.layers.0.mlp.down_proj.weight",
    vector_writer: "model.layers.0.mlp.down_proj.weight",
    nan_weights: "model.layers.0.mlp.down_proj.weight",
    infinite_weights: "model.layers.2.self_attn.o_proj.weight",
    missing_shard: SECOND,
    missing_numbered_shard: SECOND,
    index_out_of_the_folder: "leaves the folder",
    index_to_an_absolute_path: "leaves the folder",
    index_names_a_tensor_too_many: "ghost",
    index_forgets_a_tensor: "model.norm.weight",
    index_names_the_wrong_shard: "model.norm.weight",
    index_not_json: INDEX,
    index_nested_too_deep: INDEX,
    index_without_a_map: "weight_map",
    config_not_json: "config.json",
    config_not_an_object: "config.json",
    config_with_nonsense_sizes: "hidden_size",
    tensor_in_two_shards: "a.safetensors",
    only_pickles: "safetensors",
    layer_without_its_writer: "layer 1",
}


class Evil:
    """A pickle whose payload leaves a folder behind, which every refusal test would see."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path.parent / "tricked"),))


def refused(folder, *arguments):
    before = {path for path in folder.rglob("*") if "source" not in path.parts}
    start = time.monotonic()
    result = run(*arguments)
    assert time.monotonic() - start < 20
    assert result.exit_code in (1, 2), result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert "internal error" not in errors[0]
    assert "Traceback" not in result.output
    assert {path for path in folder.rglob("*") if "source" not in path.parts} == before
    return result.stderr


@pytest.mark.parametrize("attack", CHECKPOINTS, ids=lambda attack: attack.__name__)
def test_checkpoint(tmp_path, attack):
    source = write_llama(tmp_path / "source")
    directions = write_directions(tmp_path / "d.safetensors")
    arguments = (source, tmp_path / "out", "-d", directions, "--source-layer", 1)
    checked(*arguments, "--dry-run")
    attack(source)
    before = snapshot(source)
    message = refused(tmp_path, *arguments)
    assert CHECKPOINTS[attack] in message
    assert snapshot(source) == before


def pickled(path):
    path.write_bytes(pickle.dumps(Evil(path)))


def torch_pickled(path):
    torch.save({"harmful_0": Evil(path)}, path)


def not_a_file_at_all(path):
    path.write_text("hello")


def other_hidden_size(path):
    write_directions(path, hidden=64)


def other_layers(path):
    write_directions(path, layers=9)


def newer_format(path):
    save_file({"direction.layers.0": np.ones((1, 32), np.float32)}, path, {"format": "ablate-shards.directions/7"})


def nan_direction(path):
    tensors = {f"direction.layers.{layer}": np.full((1, 32), np.nan, np.float32) for layer in range(3)} | {
        f"reference.layers.{layer}": np.ones(32, np.float32) for layer in range(3)
    }
    save_file(tensors, path, {"format": "ablate-shards.directions/1"})


def a_model_instead(path):
    write_shard(path, llama_tensors())


def nothing_there(path):
    assert not path.exists()


DIRECTIONS = {
    (pickled, "x.pt"): "x.pt",
    (pickled, "x.refuse"): "x.refuse",
    (torch_pickled, "x.pt"): "x.pt",
    (pickled, "x.npz"): "x.npz",
    (pickled, "x.safetensors"): "x.safetensors",
    (not_a_file_at_all, "x.gguf"): "x.gguf",
    (not_a_file_at_all, "x.npz"): "x.npz",
    (not_a_file_at_all, "x.safetensors"): "x.safetensors",
    (other_hidden_size, "x.safetensors"): "64",
    (other_layers, "x.safetensors"): "layer 3",
    (newer_format, "x.safetensors"): "directions/7",
    (nan_direction, "x.safetensors"): "x.safetensors",
    (a_model_instead, "x.safetensors"): "x.safetensors",
    (nothing_there, "x.safetensors"): "x.safetensors",
}


@pytest.mark.parametrize(("make", "name"), DIRECTIONS, ids=lambda part: getattr(part, "__name__", part))
def test_directions(tmp_path, make, name):
    source = write_llama(tmp_path / "source")
    make(tmp_path / name)
    message = refused(tmp_path, source, tmp_path / "out", "-d", tmp_path / name, "--source-layer", 1)
    assert DIRECTIONS[make, name] in message


@pytest.mark.parametrize("make", [pickled, not_a_file_at_all, nothing_there, a_model_instead])
@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.pt"])
def test_activations(tmp_path, make, name):
    source = write_llama(tmp_path / "source")
    make(tmp_path / name)
    assert name in refused(tmp_path, source, tmp_path / "out", "-a", tmp_path / name)
    assert name in refused(tmp_path, "directions", tmp_path / name, tmp_path / "new.safetensors")


def test_the_payload_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "x.pt")))
    assert (tmp_path / "tricked").is_dir()


RECIPES = {
    "not toml": "not valid TOML",
    "[ablate]\ncoefficent = 1": "'coefficient'",
    "[ablat]\ncoefficient = 1": "'ablate'",
    '[ablate]\ncoefficient = "much"': "much",
    "[ablate]\nlayers = '9-2'": "9-2",
    "[[ablate.target]]\npattern = '('\ncomponent = 'mlp'\naxis = 'out'": "pattern",
    "[[ablate.target]]\npattern = 'x'\ncomponent = 'mlp'": "axis",
    "[[ablate.override]]\ncoefficient = 'x'": "coefficient",
    "[[ablate.override]]\nlayer = 1": "'layers'",
    "[[ablate.override]]\ncomponents = [1]": "found '1'",
    "[ablate]\njobs = true": "jobs",
    "[ablate]\ndry-run = 'x'": "dry-run",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipe(tmp_path, text):
    source = write_llama(tmp_path / "source")
    directions = write_directions(tmp_path / "d.safetensors")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    arguments = (source, tmp_path / "out", "-d", directions, "--source-layer", 1, "--recipe", recipe)
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert RECIPES[text] in result.stderr
    assert "internal error" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_harness_would_notice(tmp_path):
    """The same call with an intact checkpoint succeeds, so that the refusals above mean something."""
    source = write_llama(tmp_path / "source")
    dump = write_dump(tmp_path / "a.safetensors")
    checked(source, tmp_path / "out", "-a", dump)
    checked("verify", source, tmp_path / "out")
