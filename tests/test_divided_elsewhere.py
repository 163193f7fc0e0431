"""Merges, verifications and edits in memory of matrices that are divided: what one thread gives."""

import json
import os
import signal
import threading
import time
import tracemalloc

import numpy as np
import pytest
from command_line import checked, run
from progress import Heard
from raw_checkpoints import flip, snapshot, write_adapter, write_directions, write_llama, write_shard
from test_lora_variants import VARIANTS, trained
from test_merge import BY_PEFT, merge_by_peft
from tiny_models import TINY_MODELS

from ablate_shards.errors import Interrupted
from ablate_shards.kernels.merge import merge_numpy
from ablate_shards.kernels.native.native import NativeArrays
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.files import Folder
from ablate_shards.surgery.edit import blocks, loops
from ablate_shards.surgery.edit.folder import perform_in_folder
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.machine.staging import OutFolder
from ablate_shards.surgery.merge import editor
from ablate_shards.surgery.merge.adapter import read_adapter
from ablate_shards.surgery.merge.merge import merging
from ablate_shards.surgery.merge.plan import plan_merge
from ablate_shards.surgery.verify import proof

SECONDS = 0.2


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Divides every matrix, in blocks of a few rows."""
    monkeypatch.setattr(blocks, "_UNDIVIDED", 0)
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 2000)
    monkeypatch.setattr(NativeArrays, "chunk_elements", 1000)
    monkeypatch.setattr(merge_numpy, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(editor, "PIECE_ELEMENTS", 100)


@pytest.fixture
def joined(monkeypatch):
    """Loops wait a moment for a second thread; how many got one."""
    found: list[loops._Loop] = []
    work = loops._Loop.work

    def wait(self):
        late = time.monotonic() + SECONDS
        while self.threads == 1 and self.has_work and time.monotonic() < late:
            time.sleep(0.001)
        found.append(self)
        work(self)

    monkeypatch.setattr(loops._Loop, "work", wait)
    return lambda: sum(loop.threads > 1 for loop in set(found))


MERGED = {
    **{name: VARIANTS[name] for name in ("DoRA on Conv1D", "DoRA on the embedding", "PiSSA with DoRA")},
    **{name: VARIANTS[name] for name in ("PiSSA on Conv1D", "OLoRA", "every bias")},
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7, 30]}}),
}
BY_PEFT_ALONE = ("plain", "conv1d and whole modules", "experts of their own", "fused experts", "transposed experts")


@pytest.mark.parametrize("case", [*MERGED, *BY_PEFT_ALONE])
def test_a_merge_is_the_same_for_any_number_of_jobs(tmp_path, case, joined):
    """Receipts among it; and a verification in several threads computes the same."""
    if case in MERGED:
        name, settings = MERGED[case]
        trained(TINY_MODELS[name], tmp_path, settings)
        base = tmp_path / "base"
    else:
        merge_by_peft(BY_PEFT[case][0], tmp_path, BY_PEFT[case][1])
        base = tmp_path / "model"
    made = []
    for jobs in (1, 2, 3):
        out = tmp_path / f"out-{jobs}"
        checked("merge", base, tmp_path / "adapter", out, "--jobs", jobs)
        made.append(snapshot(out))
    assert made[0] == made[1] == made[2]
    assert joined() > 0
    said = checked("verify", base, tmp_path / "out-3", "--adapter", tmp_path / "adapter", "--jobs", 3, "--json")
    found = json.loads(said.stdout)
    assert found["identical"] == found["edited"] > 0


def one_matrix(folder, values, dtype="F16"):
    """Writes a checkpoint of one large matrix, and an adapter that adds to it."""
    hidden, inner = values.shape
    tensors = {
        "model.embed_tokens.weight": np.zeros((8, hidden)),
        "model.layers.0.self_attn.o_proj.weight": np.ones((hidden, hidden)),
        "model.layers.0.mlp.down_proj.weight": values,
    }
    (folder / "base").mkdir(parents=True)
    write_shard(folder / "base" / "model.safetensors", tensors, dtype=dtype)
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 1}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert inner == 2 * hidden + 8
    write_adapter(folder / "adapter", layers=[0], modules=["mlp.down_proj"], hidden=hidden)


@pytest.mark.parametrize("first", ["a value that is too large", "no number"])
def test_the_error_of_a_merge_is_that_of_the_first_block(tmp_path, first, joined):
    values = np.random.default_rng(0).standard_normal((128, 264))
    places = (3, 100) if first == "no number" else (100, 3)
    values[places[0], 5], values[places[1], 5] = np.nan, 65504
    one_matrix(tmp_path, values)
    # Rows 3 and 100 are in the first and in a later block; the update is added to both.
    said = []
    for jobs in (1, 3):
        words = ("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--quiet")
        done = checked(*words, "--jobs", jobs, code=1)
        said.append(done.output)
        assert not (tmp_path / "out").exists()
    assert said[0] == said[1]
    assert ("NaN" in said[0]) == (first == "no number")
    assert joined() > 0


def test_a_divided_merge_takes_no_more_memory_than_as_many_matrices(tmp_path, monkeypatch, joined):
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 1 << 20)
    monkeypatch.setattr(merge_numpy, "TILE_ELEMENTS", 1 << 18)
    values = np.random.default_rng(0).standard_normal((1024, 2056)).astype(np.float32)
    one_matrix(tmp_path, values, dtype="BF16")
    checkpoint, adapter = open_checkpoint(tmp_path / "base"), read_adapter(tmp_path / "adapter")
    operation = merging(adapter, plan_merge(checkpoint, adapter, 1.0))
    peaks = {}
    for jobs in (1, 3):
        out = OutFolder(tmp_path / str(jobs), overwrite=False)
        tracemalloc.start()
        perform_in_folder(checkpoint, operation, out, RunOptions(jobs=jobs), Heard())
        peaks[jobs] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert joined() > 0
    assert peaks[3] < 3.2 * peaks[1]


@pytest.fixture
def ablated(tmp_path):
    source = write_llama(tmp_path / "source", hidden=96, layers=2, shards=1)
    write_directions(tmp_path / "d.safetensors", layers=2, hidden=96)
    checked("ablate", source, tmp_path / "out", "-d", tmp_path / "d.safetensors", "--source-layer", 1)
    return source, tmp_path / "out"


def verified(source, out, jobs):
    return run("verify", source, out, "--json", "--jobs", jobs)


@pytest.mark.parametrize("portion", [None, 5000])
def test_a_verification_finds_the_same_in_any_number_of_jobs(ablated, joined, monkeypatch, portion):
    source, out = ablated
    if portion is not None:
        monkeypatch.setattr(blocks, "_PORTION", portion)
    assert verified(source, out, 3).exit_code == 0
    tensor = open_checkpoint(source).tensors["model.layers.1.mlp.down_proj.weight"]
    for offset in (tensor.end - 3, tensor.start + 9001, tensor.start + 601):
        flip(out / tensor.shard, offset, 6)
    found = [verified(source, out, jobs) for jobs in (1, 2, 3)]
    assert found[0].exit_code == 1
    assert "element [1, 100] is" in found[0].stdout
    assert found[0].stdout == found[1].stdout == found[2].stdout
    assert joined() > 0


def test_what_is_elsewhere_is_asked_for_once_whatever_the_jobs(ablated, monkeypatch, joined):
    """Whichever thread needs a piece first reads it for all of them."""

    class Elsewhere:
        """The files of a folder, as if they were not on this machine."""

        def __init__(self, folder):
            self.folder = Folder(folder)

        def __getattr__(self, name):
            return getattr(self.folder, name)

    source, out = ablated
    checkpoint, read, reading = open_checkpoint(source), [], threading.Lock()
    monkeypatch.setattr(proof, "_CHUNK", 6000)
    monkeypatch.setattr(proof, "_REMOTE_CHUNK", 6000)
    plain = Folder.read_into

    def slowly(self, file, data, offset, stop):
        time.sleep(0.002)
        with reading:
            read.append(len(data))
        plain(self, file, data, offset, stop)

    monkeypatch.setattr(Folder, "read_into", slowly)
    asked = []
    for jobs in (1, 3):
        read.clear()
        found = proof.verify(checkpoint, Elsewhere(out), RunOptions(jobs=jobs), Heard())
        assert not found.differences
        asked.append(sum(read))
    assert joined() > 0
    assert asked[1] < 1.1 * asked[0]


@pytest.mark.parametrize("what", ["merge", "verify"])
def test_ctrl_c_ends_every_thread_of_a_divided_matrix(tmp_path, monkeypatch, request, what):
    # A shell that runs tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    one_matrix(tmp_path, np.random.default_rng(0).standard_normal((480, 968)), dtype="BF16")
    checkpoint, adapter = open_checkpoint(tmp_path / "base"), read_adapter(tmp_path / "adapter")
    operation = merging(adapter, plan_merge(checkpoint, adapter, 1.0))
    if what == "verify":
        checked("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    threads, edited = set(), []
    edit = editor._Addition.edit

    def interrupted(self, raw, offset):
        threads.add(threading.get_ident())
        edited.append(offset)
        if len(threads) == 2 and len(edited) > 4:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        edit(self, raw, offset)

    monkeypatch.setattr(editor._Addition, "edit", interrupted)
    how, out = (RunOptions(jobs=2), Heard()), tmp_path / "out"
    does = {
        "merge": lambda: perform_in_folder(checkpoint, operation, OutFolder(out, overwrite=False), *how),
        "verify": lambda: proof.verify(checkpoint, out, *how, adapter=tmp_path / "adapter"),
    }
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        does[what]()
    assert len(edited) < 15
    assert (tmp_path / "out").exists() == (what == "verify")
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())
