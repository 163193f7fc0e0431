"""Activation dumps: what is read, in how much memory, and what is refused."""

import io
import itertools
import pickle
import signal
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from raw_checkpoints import decode, encode, write_llama, write_shard
from safetensors.numpy import save_file

from ablate_shards.errors import ActivationsError
from ablate_shards.kernels.native.native import is_built
from ablate_shards.surgery.directions import activations
from ablate_shards.surgery.directions.activations import LABELS, Kept, open_activations, read_npz, read_pickled_tensors

FORMAT = {"format": "ablate-shards.activations/1"}
HIDDEN = 16


def arrays(*, layers=2, prompts=5, hidden=HIDDEN, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"{label}.layers.{layer}": rng.standard_normal((prompts, hidden)).astype(np.float32)
        for layer in range(layers)
        for label in LABELS
    }


def write(path, tensors, **metadata):
    save_file(tensors, path, FORMAT | metadata)
    return path


def read(dump, layer, label, **keywords):
    return np.concatenate([chunk.copy() for chunk in dump.chunks(layer, label, **keywords)])


def read_all(path):
    dump = open_activations(path)
    return [read(dump, layer, label) for layer in dump.layers for label in LABELS]


def refused(path):
    with pytest.raises(ActivationsError) as caught:
        read_all(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(activations, "_CHUNK_BYTES", 4 * 8 * HIDDEN)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_float_dtype_is_read_exactly(tmp_path, dtype):
    tensors = arrays()
    write_shard(tmp_path / "dump.safetensors", tensors, dtype, FORMAT)

    dump = open_activations(tmp_path / "dump.safetensors")

    assert dump.layers == (0, 1)
    assert dump.hidden_size == HIDDEN
    assert dump.counts(1) == (5, 5)
    assert not dump.means_only
    for name, values in tensors.items():
        label, _, layer = name.split(".")
        found = read(dump, int(layer), label)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, decode(encode(values, dtype), dtype, values.shape))


def test_float64_and_mixed_dtypes_are_read_exactly(tmp_path):
    tensors = {name: values.astype(np.float64) * np.pi for name, values in arrays().items()}
    tensors["positive.layers.1"] = tensors["positive.layers.1"].astype(np.float16)
    dump = open_activations(write(tmp_path / "dump.safetensors", tensors))
    for name, values in tensors.items():
        label, _, layer = name.split(".")
        np.testing.assert_array_equal(read(dump, int(layer), label), values.astype(np.float64))


@pytest.mark.usefixtures("small_chunks")
def test_chunks_run_across_files_and_keep_their_multiple(tmp_path):
    whole = arrays(prompts=23)
    bounds = [0, 1, 2, 9, 23]
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        dtype = np.float64 if number % 2 else np.float32
        part = {name: values[start:end].astype(dtype) for name, values in whole.items()}
        write(tmp_path / f"{number}.safetensors", part, model="m")

    dump = open_activations(tmp_path)

    assert dump.counts(0) == (23, 23)
    assert [len(chunk) for chunk in dump.chunks(0, "positive")] == [4, 4, 4, 4, 4, 3]
    assert [len(chunk) for chunk in dump.chunks(0, "positive", multiple=3)] == [3] * 7 + [2]
    assert [len(chunk) for chunk in dump.chunks(0, "positive", multiple=10)] == [10, 10, 3]
    for multiple in (1, 3, 10, 40):
        np.testing.assert_array_equal(read(dump, 1, "negative", multiple=multiple), whole["negative.layers.1"])
    assert dump.origin(1, "negative", 10) == f"{tmp_path}/3.safetensors: negative.layers.1, prompt 1"


def test_memory_does_not_grow_with_the_dump(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_CHUNK_BYTES", 64 << 10)
    peaks = []
    for prompts in (400, 8000):
        path = tmp_path / f"{prompts}.safetensors"
        write_shard(path, arrays(layers=1, prompts=prompts, hidden=128), "BF16", FORMAT)
        np.savez_compressed(path.with_suffix(".npz"), **arrays(layers=1, prompts=prompts, hidden=128))
        for name in (path, path.with_suffix(".npz")):
            dump = open_activations(name)
            tracemalloc.start()
            count = sum(len(chunk) for chunk in dump.chunks(0, "positive"))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert count == prompts
    assert max(peaks) < 8000 * 128 * 8 / 16
    assert peaks[2] <= peaks[0] * 1.1
    assert peaks[3] <= peaks[1] * 1.1


def test_npz_holds_the_same_names(tmp_path):
    tensors = arrays() | {"positive.layers.0": arrays()["positive.layers.0"].astype(np.float16)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "dump.npz", **tensors)
        dump = open_activations(tmp_path / "dump.npz")
        assert dump.layers == (0, 1)
        for name, values in tensors.items():
            label, _, layer = name.split(".")
            np.testing.assert_array_equal(read(dump, int(layer), label), values)
            np.testing.assert_array_equal(read_npz(tmp_path / "dump.npz")[name], values)


def test_measurements_of_llm_abliteration_count_the_embedding_as_layer_0(tmp_path):
    """Its measure.py takes ``hidden_states[N]``, which is what goes into decoder layer N."""
    content = {"layers": 4}
    for index in range(4):
        for kind, sign in (("harmful", 1), ("harmless", -1)):
            content[f"{kind}_{index}"] = torch.full((HIDDEN,), float(sign * index), dtype=torch.bfloat16)
        content[f"refuse_{index}"] = torch.ones(HIDDEN)
    torch.save(content, tmp_path / "model.refuse")

    dump = open_activations(tmp_path / "model.refuse")

    assert dump.means_only
    assert dump.layers == (0, 1, 2)
    assert dump.counts(2) == (1, 1)
    for layer in dump.layers:
        assert read(dump, layer, "positive").tolist() == [[layer + 1.0] * HIDDEN]
        assert read(dump, layer, "negative").tolist() == [[-layer - 1.0] * HIDDEN]


def test_other_files_in_a_folder_are_passed_over(tmp_path):
    write_llama(tmp_path / "model")
    write(tmp_path / "model" / "dump.safetensors", arrays())
    save_file({"direction.layers.0": np.eye(1, HIDDEN, dtype=np.float32)}, tmp_path / "model" / "d.safetensors")
    assert open_activations(tmp_path / "model").counts(0) == (5, 5)


def test_a_file_without_metadata_is_known_by_its_names(tmp_path):
    save_file(arrays(), tmp_path / "dump.safetensors")
    assert open_activations(tmp_path / "dump.safetensors").layers == (0, 1)


def test_metadata_are_kept(tmp_path):
    path = write(tmp_path / "dump.safetensors", arrays(), positive_label="biased", hidden_size="16")
    assert open_activations(path).metadata["positive_label"] == "biased"


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


def with_one(**changes):
    return arrays() | {f"{key.replace('_', '.layers.')}": value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (without(arrays(), "negative.layers.1"), {}, "layer 1 has no negative activations"),
        (without(arrays(), "positive.layers.0"), {}, "layer 0 has no positive activations"),
        (with_one(negative_0=np.zeros((0, HIDDEN), np.float32)), {}, "layer 0 has no negative activations"),
        (
            with_one(positive_1=np.zeros((4, HIDDEN), np.float32)),
            {},
            "layer 1 has 4 positive prompts, but layer 0 has 5",
        ),
        (with_one(positive_1=np.zeros((5, 8), np.float32)), {}, "hidden size 8, but"),
        (with_one(positive_1=np.zeros((5, 0), np.float32)), {}, "shape [5, 0], expected [prompts, hidden size]"),
        (with_one(positive_1=np.zeros((5, HIDDEN, 1), np.float32)), {}, "shape [5, 16, 1]"),
        (with_one(positive_1=np.ones((), np.float32)), {}, "shape [], expected"),
        (with_one(positive_1=np.zeros((5, HIDDEN), np.int32)), {}, "positive.layers.1 is I32, expected BF16"),
        (arrays() | {"scale": np.ones(1, np.float32)}, {}, "holds scale beside activations"),
        (arrays() | {"positive.layers.01": np.ones((5, HIDDEN), np.float32)}, {}, "holds positive.layers.01 beside"),
        (arrays(), {"hidden_size": "32"}, "hidden size 16, but its metadata say hidden_size '32'"),
        (arrays(), {"hidden_size": "many"}, "its metadata say hidden_size 'many'"),
        (arrays(), {"format": "ablate-shards.activations/2"}, "its format is ablate-shards.activations/2, expected"),
        (arrays(), {"format": "ablate-shards.directions/1"}, "its format is ablate-shards.directions/1, expected"),
        ({}, {}, "holds no tensors"),
        ({"model.norm.weight": np.ones(4, np.float32)}, {}, "it holds model.norm.weight"),
    ],
)
def test_refused(tmp_path, tensors, metadata, said):
    path = write(tmp_path / "dump.safetensors", tensors, **metadata)
    assert said in refused(path)


def test_eight_bit_floats_are_refused(tmp_path):
    write(tmp_path / "dump.safetensors", with_one(positive_1=np.zeros((5, HIDDEN), np.uint8)))
    raw = (tmp_path / "dump.safetensors").read_bytes().replace(b'"U8"', b'"F8_E4M3"')
    size = int.from_bytes(raw[:8], "little") + len('"F8_E4M3"') - len('"U8"')
    (tmp_path / "dump.safetensors").write_bytes(size.to_bytes(8, "little") + raw[8:])
    assert "is F8_E4M3, expected BF16, F16, F32 or F64" in refused(tmp_path / "dump.safetensors")


def test_a_model_is_refused(tmp_path):
    folder = write_llama(tmp_path / "model")
    assert "it holds model.embed_tokens" in refused(folder / "model-00001-of-00002.safetensors")
    assert "none of its 2 safetensors files is an activation dump" in refused(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    assert "a folder without safetensors files" in refused(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    for name in ("dump.safetensors", "dump.npz", "dump.pt"):
        assert "does not exist" in refused(tmp_path / name)


def test_files_captured_differently_are_refused(tmp_path):
    write(tmp_path / "a.safetensors", arrays(), model="one", note="first")
    write(tmp_path / "b.safetensors", arrays(), model="one", note="second")
    assert open_activations(tmp_path).counts(0) == (10, 10)
    write(tmp_path / "b.safetensors", arrays(), model="two")
    assert "its metadata say model 'two', but those of a file before it 'one'" in refused(tmp_path)


def test_files_of_different_hidden_sizes_are_refused(tmp_path):
    write(tmp_path / "a.safetensors", arrays())
    write(tmp_path / "b.safetensors", arrays(hidden=8))
    sentence = refused(tmp_path)
    assert "b.safetensors" in sentence
    assert "a.safetensors has 16" in sentence


def test_a_newer_file_in_a_folder_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", arrays())
    write(tmp_path / "b.safetensors", arrays(), format="ablate-shards.activations/9")
    assert "activations/9" in refused(tmp_path)


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path):
    path = write(tmp_path / "dump.safetensors", arrays())
    dump = open_activations(path)
    path.write_bytes(path.read_bytes()[:-4])
    for room in (0, 1 << 20):
        with pytest.raises(ActivationsError, match=r"ended inside positive\.layers\.1"):
            read(dump, 1, "positive", kept=Kept(room))


CUT_SHORT = """
import os, sys
from ablate_shards.surgery.directions import activations
from ablate_shards.cli import main

mapped = activations._mapped
if sys.argv[1] == "without":
    activations.guard = lambda *_: lambda: None

def cut(array, start):
    found = mapped(array, start)
    os.truncate(array.path, int(sys.argv[2]))
    return found

activations._mapped = cut
main(sys.argv[3:])
"""


def after_a_cut(tmp_path, guarded, left):
    path = write(tmp_path / "dump.safetensors", arrays(prompts=4000))
    arguments = [guarded, left, "directions", path, tmp_path / "out.safetensors", "--quiet"]
    command = [sys.executable, "-c", CUT_SHORT, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert not (tmp_path / "out.safetensors").exists()
    return path, found


@pytest.mark.skipif(not is_built(), reason="without the native form nothing is mapped")
def test_a_file_that_is_cut_short_while_it_is_mapped_ends_in_a_sentence(tmp_path):
    path, found = after_a_cut(tmp_path, "with", 100_000)
    assert found.returncode == 1
    sentence = found.stderr.strip().splitlines()[-1]
    assert sentence.startswith(f"error: {path}: ended inside ")
    assert sentence.endswith("it was changed while it was read, so start again")
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(sys.platform != "linux" or not is_built(), reason="needs memory that is mapped, and its end")
def test_nothing_else_would_have_said_so(tmp_path):
    _, found = after_a_cut(tmp_path, "without", 100_000)
    assert found.returncode == -signal.SIGBUS


def test_a_file_that_loses_less_than_a_page_is_refused_too(tmp_path):
    # What is left of the page reads as zeros.
    size = write(tmp_path / "dump.safetensors", arrays(prompts=4000)).stat().st_size
    path, found = after_a_cut(tmp_path, "with", size - 8)
    assert found.returncode == 1
    assert f"{path}: ended inside " in found.stderr


def test_without_a_guard_what_is_kept_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "dump.safetensors", arrays())
    expected = read(open_activations(path), 1, "positive")
    monkeypatch.setattr(activations, "guard", lambda *_: None)
    kept = Kept(1 << 20)
    assert np.array_equal(read(open_activations(path), 1, "positive", kept=kept), expected)
    assert kept.arrays[0].flags.owndata


def test_guards_are_given_back(tmp_path):
    path = write(tmp_path / "dump.safetensors", arrays())
    dump = open_activations(path)
    for _ in range(300):
        kept = Kept(1 << 20)
        read(dump, 1, "positive", kept=kept)
        assert kept.arrays[0].flags.owndata != is_built()  # what is mapped has a guard


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["F32", "BF16", "npz", "folder"])
def test_what_fits_is_kept_for_the_next_pass(tmp_path, kind):
    path, tensors = tmp_path / ("dump.npz" if kind == "npz" else "dump.safetensors"), arrays(prompts=23)
    if kind == "npz":
        np.savez_compressed(path, **tensors)
    elif kind == "folder":
        for number, dtype in enumerate((np.float16, np.float64)):
            write(tmp_path / f"{number}.safetensors", {name: values.astype(dtype) for name, values in tensors.items()})
        path = tmp_path
    else:
        write_shard(path, tensors, kind, FORMAT)
    dump, kept, none = open_activations(path), Kept(1 << 20), Kept(0)
    expected = read(dump, 0, "positive")
    assert len(expected) == dump.counts(0)[0]
    for _ in range(2):
        for holder in (kept, none):
            np.testing.assert_array_equal(read(dump, 0, "positive", kept=holder), expected)
            assert not np.array_equal(read(dump, 1, "positive", kept=holder), expected)
    np.testing.assert_array_equal(read(dump, 0, "positive", kept=kept), expected)
    for file in tmp_path.iterdir():
        file.unlink()
    np.testing.assert_array_equal(read(dump, 0, "positive", kept=kept), expected)
    with pytest.raises(FileNotFoundError):
        read(dump, 0, "positive", kept=none)


def npz(path, member, header=None, compression=zipfile.ZIP_STORED):
    """Writes an .npz whose only member is given, or an array of ones under a header."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ones((5, HIDDEN), np.float32))
    raw = buffer.getvalue() if header is None else header
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{member}.npy", raw)
    return path


def header_only(shape, dtype="<f4", *, fortran_order=False):
    buffer = io.BytesIO()
    content = {"descr": dtype, "fortran_order": fortran_order, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, content)
    return buffer.getvalue()


def test_malformed_npz_are_refused(tmp_path):
    path = tmp_path / "dump.npz"
    path.write_bytes(b"PK not a zip")
    assert "not an .npz file" in refused(path)
    assert "not an .npz file" in refused(npz(path, "positive.layers.0", b"no header"))
    assert "positive.layers.0 is truncated" in refused(npz(path, "positive.layers.0", header_only((1 << 60, 1 << 60))))
    assert "stored column by column" in refused(npz(path, "positive.layers.0", header_only((2, 2), fortran_order=True)))
    assert "is int64, expected BF16" in refused(npz(path, "positive.layers.0", header_only((0, 2), "<i8")))
    assert "is object, expected BF16" in refused(npz(path, "positive.layers.0", header_only((0, 2), "|O")))
    assert "it holds other" in refused(npz(path, "other"))
    with pytest.raises(ActivationsError, match="other is int64"):
        read_npz(npz(path, "other", header_only((0, 2), "<i8")))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_npz_is_refused(tmp_path, compression):
    path = tmp_path / "dump.npz"
    save = np.savez if compression == zipfile.ZIP_STORED else np.savez_compressed
    save(path, **arrays(prompts=200))
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("negative.layers.1.npy")
    for offset in range(info.compress_size // 2, info.compress_size // 2 + 9):
        raw[info.header_offset + offset] ^= 0x55
    path.write_bytes(raw)
    sentence = refused(path)
    assert "damaged" in sentence or "not an .npz" in sentence


def test_malformed_measurements_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save([torch.ones(4)], path)
    assert "found list" in refused(path)
    torch.save({"weight": torch.ones(4)}, path)
    assert "holds weight; expected harmful_N" in refused(path)
    torch.save({"harmful_1": torch.ones(4)}, path)
    assert "harmless_1 is missing" in refused(path)
    torch.save({"harmful_1": torch.ones(4), "harmless_1": torch.ones(4, dtype=torch.int8)}, path)
    assert "harmless_1 is int8, expected BF16" in refused(path)
    torch.save({"harmful_1": torch.ones(2, 4), "harmless_1": torch.ones(2, 4)}, path)
    assert "harmful_1 has shape [2, 4], expected [hidden size]" in refused(path)
    torch.save({"harmful_0": torch.ones(4), "harmless_0": torch.ones(4)}, path)
    assert "holds no activations" in refused(path)
    path.write_bytes(b"not a PyTorch file")
    assert "not a PyTorch file" in refused(path)


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["x.pt", "x.refuse", "x.npz", "x.safetensors"])
def test_a_pickled_payload_does_not_run(tmp_path, name):
    mark = tmp_path / "ran"
    path = tmp_path / name
    torch.save({"harmful_1": Payload(mark)}, path)
    refused(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Payload(mark)))
    refused(path)
    assert not mark.exists()
    npz(tmp_path / "x.npz", "positive.layers.0", header_only((1, 1), "|O") + pickle.dumps(Payload(mark)))
    refused(tmp_path / "x.npz")
    assert not mark.exists()

    pickle.loads(pickle.dumps(Payload(mark))).close()
    assert mark.exists()


def test_pickled_tensors_keep_integer_dtypes_for_the_error(tmp_path):
    torch.save(
        {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.int16), "n": 3}, tmp_path / "x.pt"
    )
    found = read_pickled_tensors(tmp_path / "x.pt")
    assert {name: values.dtype for name, values in found.items()} == {"a": np.float64, "b": np.int16}
