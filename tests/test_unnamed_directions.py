"""Directions of other scripts: one vector that names no layer, and files that hold something else."""

import json
import pickle

import numpy as np
import pytest
import torch
from command_line import checked
from raw_checkpoints import tensor_bytes, write_llama
from safetensors.numpy import save_file

VECTOR = np.random.default_rng(4).standard_normal(32).astype(np.float32)
TENSOR = torch.from_numpy(VECTOR)

FORMS = {
    "vector.pt": lambda path: torch.save(TENSOR, path),
    "row.pt": lambda path: torch.save(TENSOR[None], path),
    "deep.pth": lambda path: torch.save(TENSOR[None, None].half().float(), path),
    "bfloat16.pt": lambda path: torch.save(TENSOR.bfloat16(), path),
    "named.pt": lambda path: torch.save({"refusal_dir": TENSOR, "layer": 14, "score": torch.tensor(0.5)}, path),
    "nested.pt": lambda path: torch.save({"direction": {"mean_diff": {"vector": TENSOR}}, "config": {"pos": -1}}, path),
    "parameter.pt": lambda path: torch.save({"v": torch.nn.Parameter(TENSOR)}, path),
    "vector.npy": lambda path: np.save(path, VECTOR),
    "row.npy": lambda path: np.save(path, VECTOR[None].astype(np.float64)),
    "vector.npz": lambda path: np.savez(path, VECTOR),
    "vector.safetensors": lambda path: save_file({"direction": VECTOR[None]}, path),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base") / "base", dtype="F32")


@pytest.mark.parametrize("name", FORMS)
def test_one_vector_is_the_direction_of_the_layer_that_is_named(tmp_path, base, name):
    path = tmp_path / name
    FORMS[name](path)
    how = ("--source-layer", 1, "--no-biproject")
    named = tmp_path / "named.npz"
    same = TENSOR.bfloat16().float().numpy() if name == "bfloat16.pt" else VECTOR
    same = TENSOR.half().float().numpy() if name == "deep.pth" else same
    np.savez(named, **{"direction.layers.1": same})
    checked("ablate", base, tmp_path / "out", "-d", path, *how, "--layers", "0-2")
    checked("ablate", base, tmp_path / "named", "-d", named, *how, "--layers", "0-2")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "named")
    for given in ((), how, ("--layers", "0-2")):
        said = " ".join(checked("ablate", base, tmp_path / "other", "-d", path, *given, code=1).output.split())
        assert "name that with --source-layer N and the layers to edit with --layers" in said


def several(path):
    torch.save({"directions": {12: TENSOR, 13: TENSOR * 2}}, path)


def written(path, write):
    with path.open("wb") as file:
        write(file)


OTHERS = {
    "several.pt": (several, "holds directions.12 [32] of float64, directions.13 [32] of float64"),
    "layers.npy": (lambda path: np.save(path, np.ones((3, 32))), "holds an array [3, 32] of float64"),
    "means.pt": (lambda path: torch.save(torch.ones(2, 3, 32), path), "holds a tensor [2, 3, 32] of float64"),
    "list.pt": (lambda path: torch.save([TENSOR], path), "found list; save them in a dictionary"),
    "layers.safetensors": (
        lambda path: save_file({f"layer_{number}": VECTOR for number in range(2)}, path),
        "holds layer_0 [32] of F32, layer_1 [32] of F32, and not what is the direction of which layer; save what is",
    ),
    "numbers.safetensors": (
        lambda path: save_file({str(number): VECTOR[None] for number in range(6)}, path),
        "3 [1, 32] of F32 and 2 more, and not what is the direction of which layer",
    ),
    "folder.safetensors": (lambda path: path.mkdir(), "expected a file of directions, found a folder"),
    "whole.npy": (lambda path: np.save(path, np.arange(32)), "holds an array [32] of int64"),
    "objects.npy": (lambda path: np.save(path, {"a": VECTOR}, allow_pickle=True), "not an array of numbers"),
    "vector.json": (lambda path: path.write_text(json.dumps({"12": VECTOR.tolist()})), "is text (JSON), not tensors"),
    "vector.bin": (lambda path: torch.save(TENSOR, path), "is a ZIP archive, as PyTorch (.pt)"),
    "arrays.safetensors": (lambda path: written(path, lambda file: np.savez(file, VECTOR)), "is a ZIP archive"),
    "array.safetensors": (lambda path: written(path, lambda file: np.save(file, VECTOR)), "is a NumPy array"),
    "pickle.safetensors": (lambda path: path.write_bytes(pickle.dumps([1.0] * 9, 4)), "is a Python pickle"),
    "model.safetensors": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(40)), "is a GGUF file"),
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
    ),
    "page.safetensors": (lambda path: path.write_text("<!DOCTYPE html><html>401</html>"), "is a web page"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_a_file_holds_is_said(tmp_path, base, name):
    write, expected = OTHERS[name]
    write(tmp_path / name)
    how = ("-d", tmp_path / name, "--source-layer", 1, "--layers", "0-2", "--no-biproject")
    said = " ".join(checked("ablate", base, tmp_path / "out", *how, code=1).output.split())
    assert expected in said
    assert "fetch it again" not in said


def test_a_pointer_in_place_of_a_shard_is_said(tmp_path):
    base = write_llama(tmp_path / "base")
    shard = base / "model-00001-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in checked("inspect", base, code=1).output
