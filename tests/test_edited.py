"""A shard read as it will be when edited: the same bytes as in a file, from any offset, in any order."""

import dataclasses
import hashlib
import os
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from coded_checkpoints import write_fp8
from progress import Heard
from raw_checkpoints import (
    encode,
    llama_tensors,
    snapshot,
    write_adapter,
    write_directions,
    write_llama,
    write_shard,
)
from safetensors.numpy import load_file, save_file
from test_mlx_stacks import HIDDEN, INT4, write_moe

from ablate_shards.errors import ExecuteError
from ablate_shards.kernels.merge import merge_numpy
from ablate_shards.kernels.native.native import NativeArrays
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.edit import ablation_editor, blocks
from ablate_shards.surgery.edit import edited_file as edited
from ablate_shards.surgery.edit.ablation import ablation
from ablate_shards.surgery.edit.ablation_editor import AblatedMatrices
from ablate_shards.surgery.edit.edited_file import EditedFile
from ablate_shards.surgery.edit.folder import perform_in_folder
from ablate_shards.surgery.edit.loops import SharedLoops
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.machine.staging import OutFolder
from ablate_shards.surgery.merge.adapter import read_adapter
from ablate_shards.surgery.merge.merge import merging
from ablate_shards.surgery.merge.plan import plan_merge
from ablate_shards.surgery.plan.edits import by_shard
from ablate_shards.surgery.plan.plan import make_plan
from ablate_shards.surgery.plan.recipe import AblateOptions

SHARD = "model-00001-of-00001.safetensors"


def prepared(folder, **options):
    """Returns a checkpoint and what ablating all of it would be."""
    checkpoint = open_checkpoint(folder / "model")
    directions = read_directions(folder / "d.safetensors")
    options = AblateOptions(source_layer=1, **options)
    return checkpoint, ablation(checkpoint, make_plan(checkpoint, directions, options), directions, options)


def prepared_merge(folder):
    """Returns a checkpoint with a bias, and what adding to it, replacing in it and low-rank updates of it would be."""
    rng = np.random.default_rng(4)
    hidden, outer, module = 640, 320, "base_model.model.model.layers.0"
    model, tensors = folder / "with-bias", llama_tensors(layers=1, hidden=hidden)
    model.mkdir()
    write_shard(model / SHARD, tensors | {"model.layers.0.self_attn.k_proj.bias": rng.standard_normal(outer)})
    (model / "config.json").write_text(f'{{"model_type": "llama", "hidden_size": {hidden}, "num_hidden_layers": 1}}')
    adapter = write_adapter(folder / "adapter", layers=[0], hidden=hidden, lora_bias=True, modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    added = {
        f"{module}.self_attn.k_proj.lora_A.weight": rng.standard_normal((4, hidden)),
        f"{module}.self_attn.k_proj.lora_B.weight": rng.standard_normal((outer, 4)),
        f"{module}.self_attn.k_proj.lora_B.bias": rng.standard_normal(outer),
        "base_model.model.lm_head.weight": rng.standard_normal((48, hidden)),
    }
    save_file(load_file(file) | {name: values.astype(np.float32) for name, values in added.items()}, file)
    checkpoint, read = open_checkpoint(model), read_adapter(adapter)
    operation = merging(read, plan_merge(checkpoint, read, 0.5))
    assert {edit.kind for edit in operation.edits} == {"low-rank", "bias", "replaced"}
    return checkpoint, operation


def performed(checkpoint, operation, out):
    return perform_in_folder(checkpoint, operation, OutFolder(out, overwrite=False), RunOptions(), Heard())


def opened(checkpoint, operation, *, window, progress=None, room=None, pool=None):
    editor = operation.editor(RunOptions(jobs=3 if pool else 1), threading.Event())
    if pool is not None:
        editor.share(pool.submit)
    if room is not None:
        editor._room = room
    shard = checkpoint.shards[0]
    edits = by_shard(operation.edits)[shard.name]
    return EditedFile(checkpoint, shard, edits, editor, window=window, advance=(progress or Heard()).advance)


@pytest.fixture
def folder(tmp_path):
    write_llama(tmp_path / "model", hidden=640, shards=1)
    write_directions(tmp_path / "d.safetensors", hidden=640)
    return tmp_path


@pytest.mark.parametrize("what", ["rows", "columns", "none", "merge"])
@pytest.mark.parametrize("window", [0, 600_000, 1 << 30])
def test_the_bytes_and_the_results_of_a_file(folder, what, window):
    """Down to a window into which no matrix fits, and blocks far smaller than a matrix."""
    if what == "merge":
        checkpoint, operation = prepared_merge(folder)
    else:
        checkpoint, operation = prepared(folder, preserve=what, components=("attention", "mlp", "embedding"))
    results = perform_in_folder(
        checkpoint, operation, OutFolder(folder / "out", overwrite=False), RunOptions(), Heard()
    )
    expected = snapshot(folder / "out")[SHARD]
    assert expected != checkpoint.shards[0].path.read_bytes()
    progress = Heard()
    with opened(checkpoint, operation, window=window, progress=progress, room=1 << 17) as file:
        survey = file.survey()
        assert survey.sha256 == hashlib.sha256(expected).hexdigest()
        assert survey.results == results
        assert file.digest is None
        assert file.read() == expected
        assert file.digest == survey.sha256
        assert progress.advanced == 2 * len(expected)
        assert file.read(1) == b""


@pytest.mark.parametrize("window", [0, 90_000, 1 << 30])
def test_codes_as_in_a_file(tmp_path, window):
    """Their sections are heavy: none is kept for the passes after the first."""
    write_fp8(tmp_path / "model", hidden=300, inner=300)
    write_directions(tmp_path / "d.safetensors", layers=2, hidden=300)
    checkpoint, operation = prepared(tmp_path)
    results = perform_in_folder(
        checkpoint, operation, OutFolder(tmp_path / "out", overwrite=False), RunOptions(), Heard()
    )
    shard = checkpoint.shards[0]
    expected = snapshot(tmp_path / "out")[shard.name]
    editor = operation.editor(RunOptions(jobs=1), threading.Event())
    edits = by_shard(operation.edits)[shard.name]
    with EditedFile(checkpoint, shard, edits, editor, window=window, advance=Heard().advance) as file:
        survey = file.survey()
        assert survey.results == results
        assert file.read() == expected
        assert not file._kept
        file.seek(len(expected) // 2)
        assert file.read(50_000) == expected[len(expected) // 2 :][:50_000]


@pytest.fixture
def pool(monkeypatch):
    """Threads among which every matrix is divided, in blocks of a few rows."""
    monkeypatch.setattr(blocks, "_UNDIVIDED", 0)
    monkeypatch.setattr(blocks, "_UNDIVIDED_CODES", 0)
    monkeypatch.setattr(ablation_editor, "_CODES_AT_ONCE", 4000)
    monkeypatch.setattr(NativeArrays, "chunk_elements", 4000)
    monkeypatch.setattr(merge_numpy, "TILE_ELEMENTS", 1)
    with ThreadPoolExecutor(3) as threads:
        yield threads


@pytest.mark.parametrize("what", ["rows", "columns", "merge", "codes", "codes along the stream"])
@pytest.mark.parametrize("window", [0, 1 << 30])
def test_several_threads_give_the_same_and_ask_the_same_of_the_source(tmp_path, pool, monkeypatch, what, window):
    monkeypatch.setattr(edited, "_CHUNK", 100_000)
    if what == "merge":
        checkpoint, operation = prepared_merge(tmp_path)
    elif "codes" in what:
        if what == "codes":
            write_fp8(tmp_path / "model", hidden=300, inner=300)
        else:
            write_moe(tmp_path / "model", INT4, vocabulary=1100)
        write_directions(tmp_path / "d.safetensors", layers=2, hidden=300 if what == "codes" else HIDDEN)
        parts = ("embedding",) if what != "codes" else ("attention", "mlp")
        checkpoint, operation = prepared(tmp_path, components=parts)
    else:
        write_llama(tmp_path / "model", hidden=200, shards=1)
        write_directions(tmp_path / "d.safetensors", hidden=200)
        checkpoint, operation = prepared(tmp_path, preserve=what)
    results = perform_in_folder(
        checkpoint, operation, OutFolder(tmp_path / "out", overwrite=False), RunOptions(jobs=1), Heard()
    )
    shard = checkpoint.shards[0]
    expected = snapshot(tmp_path / "out")[shard.name]
    assert expected != shard.path.read_bytes()
    asked, threads = [], set()
    each = SharedLoops.each

    def noticed(self, offsets, do):
        def slowly(offset, turn):
            threads.add(threading.get_ident())
            time.sleep(0.0005)
            do(offset, turn)

        each(self, offsets, slowly)

    monkeypatch.setattr(SharedLoops, "each", noticed)
    for shared in (None, pool):
        store = Store(shard.path.parent)
        remote = dataclasses.replace(checkpoint, remote=store)
        with opened(remote, operation, window=window, room=4000, pool=shared) as file:
            assert file.survey().results == results
            assert file.read() == expected
            file.seek(len(expected) // 3)
            assert file.read(90_000) == expected[len(expected) // 3 :][:90_000]
        asked.append(store.asked)
    assert asked[0] == asked[1]
    assert len(threads) > 1


def test_an_interruption_of_a_divided_edit_waits_for_nobody(folder, pool, monkeypatch):
    checkpoint, operation = prepared(folder)
    move, main = AblatedMatrices.edit, threading.get_ident()

    def interrupted(self, raw, offset):
        if threading.get_ident() == main:
            raise KeyboardInterrupt
        move(self, raw, offset)

    monkeypatch.setattr(AblatedMatrices, "edit", interrupted)
    with opened(checkpoint, operation, window=0, room=4000, pool=pool) as file, pytest.raises(KeyboardInterrupt):
        file.survey()


@pytest.mark.parametrize("prepare", [prepared, prepared_merge])
def test_the_form_that_devices_compute_in(folder, prepare, monkeypatch):
    monkeypatch.setattr("ablate_shards.kernels.choose.choose_form", lambda *_, **__: ("torch", "asked for"))
    checkpoint, operation = prepare(folder)
    results = perform_in_folder(
        checkpoint, operation, OutFolder(folder / "out", overwrite=False), RunOptions(), Heard()
    )
    for window in (0, 1 << 30):
        with opened(checkpoint, operation, window=window, room=1 << 17) as file:
            assert file.survey().results == results
            assert file.read() == snapshot(folder / "out")[SHARD]


@pytest.mark.parametrize("prepare", [prepared, prepared_merge])
def test_any_offset_in_any_order(folder, prepare):
    checkpoint, operation = prepare(folder)
    performed(checkpoint, operation, folder / "out")
    expected = snapshot(folder / "out")[SHARD]
    rng = np.random.default_rng(0)
    for window in (0, 1 << 30):
        with opened(checkpoint, operation, window=window, room=1 << 17) as file:
            for offset in [*rng.integers(0, len(expected), 30).tolist(), 0, len(expected), len(expected) + 5]:
                size = int(rng.integers(0, 200_000))
                assert file.seek(offset) == offset
                assert file.read(size) == expected[offset : offset + size]
                assert file.tell() == max(offset, min(offset + size, len(expected)))
            assert file.seek(-7, os.SEEK_END) == len(expected) - 7
            assert file.seek(2, os.SEEK_CUR) == len(expected) - 5
            assert file.read(-1) == expected[-5:]
            with pytest.raises(ValueError, match="there is no offset -1"):
                file.seek(-1)


def test_what_is_sent_again_counts_once(folder):
    """Parts that are sent again, as after a lost connection, and a whole file that begins again."""
    checkpoint, operation = prepared(folder)
    progress = Heard()
    with opened(checkpoint, operation, window=0, progress=progress) as file:
        sha256 = file.survey().sha256
        size = progress.advanced
        for offset, count in ((0, 100_000), (100_000, 50_000), (100_000, 100_000), (150_000, 10)):
            file.seek(offset)
            file.read(count)
        assert progress.advanced == size + 200_000
        file.seek(200_000)
        file.read()
        assert (progress.advanced, file.digest) == (2 * size, sha256)
        file.seek(0)
        file.read(10)
        assert (progress.advanced, file.digest) == (size + 10, None)


class Store:
    """A remote store of one folder's files that counts what it is asked for."""

    revision = None

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def stream(self, file, start, end, stop):
        self.asked.append((start, end))
        data = (self.folder / file).read_bytes()[start:end]
        for first in range(0, len(data), 1000):
            yield data[first : first + 1000]

    def digest(self, file):
        return hashlib.sha256(), None


@pytest.mark.parametrize(("window", "times"), [(1 << 30, 1), (0, 2)])
def test_each_pass_is_one_request_but_for_what_is_gathered_outside_the_window(folder, window, times):
    checkpoint, operation = prepared(folder, layers=frozenset({1}), components=("mlp",))
    (edit,) = operation.edits
    store = Store(folder / "model")
    remote = dataclasses.replace(checkpoint, remote=store)
    with opened(remote, operation, window=window, room=1 << 17) as file:
        file.survey()
        size = checkpoint.shards[0].size
        first = [(0, size)] if times == 1 else [(0, edit.start), (edit.start, edit.end), (edit.start, size)]
        assert store.asked == first
        store.asked.clear()
        file.read()
        # The second pass has the sums of the first.
        assert store.asked == ([(0, size)] if times == 1 else [(0, edit.start), (edit.start, size)])


def test_memory_is_that_of_blocks_not_of_the_tensor(tmp_path, monkeypatch):
    """A matrix of 24 MB through a window of 1 MB and blocks of 1 MB."""
    folder = tmp_path / "model"
    folder.mkdir()
    hidden, inner = 256, 48_000
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": np.zeros((8, hidden)),
        "model.layers.0.self_attn.o_proj.weight": rng.standard_normal((hidden, hidden)),
        "model.layers.0.mlp.down_proj.weight": rng.standard_normal((hidden, inner)),
    }
    write_shard(folder / SHARD, tensors)
    (folder / "config.json").write_text(f'{{"model_type": "llama", "hidden_size": {hidden}, "num_hidden_layers": 1}}')
    write_directions(tmp_path / "d.safetensors", layers=2, hidden=hidden)
    checkpoint, operation = prepared(tmp_path, layers=frozenset({0}))
    size = checkpoint.shards[0].size
    monkeypatch.setattr(edited, "_CHUNK", 1 << 20)
    with opened(checkpoint, operation, window=1 << 20, room=1 << 20) as file:
        tracemalloc.start()
        file.survey()
        while file.read(1 << 16):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < size // 2


def test_experts_are_sections_of_their_own(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    hidden, inner, experts = 64, 48, 6
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((8, hidden)),
        "model.layers.0.self_attn.o_proj.weight": rng.standard_normal((hidden, hidden)),
        "model.layers.0.self_attn.o_proj.bias": rng.standard_normal(hidden),
        "model.layers.0.mlp.experts.down_proj": rng.standard_normal((experts, inner, hidden)),
        "model.layers.0.mlp.experts.down_proj_bias": rng.standard_normal((experts, hidden)),
    }
    write_shard(folder / SHARD, tensors)
    config = f'{{"model_type": "gpt_oss", "hidden_size": {hidden}, "num_hidden_layers": 1}}'
    (folder / "config.json").write_text(config)
    write_directions(tmp_path / "d.safetensors", layers=2, hidden=hidden)
    checkpoint, operation = prepared(tmp_path, layers=frozenset({0}))
    assert {edit.kind for edit in operation.edits} == {"weight", "bias"}
    results = perform_in_folder(
        checkpoint, operation, OutFolder(tmp_path / "out", overwrite=False), RunOptions(), Heard()
    )
    expected = snapshot(tmp_path / "out")[SHARD]
    for window, room in ((0, 1 << 11), (1 << 12, 1 << 14), (1 << 30, 1 << 20)):
        with opened(checkpoint, operation, window=window, room=room) as file:
            assert file.survey().results == results
            assert file.read() == expected
            file.seek(len(expected) // 2)
            assert file.read() == expected[len(expected) // 2 :]


def test_values_that_nothing_can_edit_are_named(folder):
    tensor = open_checkpoint(folder / "model").tensors["model.layers.1.mlp.down_proj.weight"]
    with (folder / "model" / SHARD).open("r+b") as file:
        file.seek(tensor.start)
        file.write(encode(np.array([np.nan]), "BF16"))
    checkpoint, operation = prepared(folder)
    with (
        opened(checkpoint, operation, window=1 << 30) as file,
        pytest.raises(ExecuteError, match=r"layers\.1\.mlp\.down_proj\.weight: holds NaN or infinite values"),
    ):
        file.survey()
