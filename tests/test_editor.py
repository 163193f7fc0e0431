"""One tensor edited in portions, by several threads: the same bytes, measures and digest as in one go."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blake3 import blake3
from raw_checkpoints import encode

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.edit import blocks as module
from ablate_shards.surgery.edit.ablation_editor import AblationEditor
from ablate_shards.surgery.edit.blocks import Channels, Stopped
from ablate_shards.surgery.plan.edits import BasisKey, TensorEdit

SHAPE = (7, 48, 32)
BASIS = BasisKey(source_layer=0, references=(), gain=None, gain_offset=0.0)


@pytest.fixture
def small(monkeypatch):
    """Makes a section of each matrix, and a portion of every two."""
    size = SHAPE[1] * SHAPE[2] * 2
    monkeypatch.setattr(module, "_CPU_BLOCK", size)
    monkeypatch.setattr(module, "_PORTION", 2 * size)
    monkeypatch.setattr(module, "_REREAD", 1000)


def edit_of(name, source, dtype, shape, axis, preserve):
    """The edit of a tensor that is all of a shard, by :data:`BASIS` alone."""
    return TensorEdit(
        name=name,
        shard="model.safetensors",
        dtype=dtype,
        shape=shape,
        start=0,
        end=len(source),
        axis=axis,
        kind="weight",
        layer=0,
        component="mlp",
        mtp=False,
        coefficient=1.0,
        preserve=preserve,
        basis=BASIS,
    )


class Tensor:
    """A fused-expert tensor and an editor of it, in memory."""

    def __init__(self, values=None, preserve="rows", jobs=3):
        values = np.random.default_rng(0).standard_normal(SHAPE) if values is None else values
        self.source = bytearray(encode(values.astype(np.float32), "BF16"))
        self.written = bytearray(len(self.source))
        self.stop = threading.Event()
        vector = np.random.default_rng(1).standard_normal((1, SHAPE[1]))
        self.editor = AblationEditor("cpu", 256_000_000, jobs, self.stop, {BASIS: vector / np.linalg.norm(vector)})
        self.edit = edit_of("experts.down_proj", self.source, "BF16", SHAPE, -2, preserve)

    @property
    def channels(self):
        def fill(stored):
            def read(data, offset):
                data[:] = stored[offset : offset + len(data)]

            return read

        def write(data, offset):
            self.written[offset : offset + len(data)] = data

        return Channels(read=fill(self.source), write=write, reread=fill(self.written))

    def portions(self):
        return self.editor.portions(self.edit, self.channels)


@pytest.mark.parametrize("preserve", ["rows", "columns", "none"])
def test_parts_in_any_order_give_what_one_go_gives(small, preserve):
    whole = Tensor(preserve=preserve)
    expected = whole.editor.edit(whole.edit, whole.channels)
    assert expected.blake3 == blake3(whole.written).hexdigest()
    assert whole.written != whole.source
    for order in itertools.permutations(range(4)):
        tensor = Tensor(preserve=preserve)
        portions = tensor.portions()
        assert [(portion.start, portion.end) for portion in portions] == [
            (first * 3072, min(first + 2, 7) * 3072) for first in (0, 2, 4, 6)
        ]
        results = [portions[number].do() for number in order]
        assert results == [None, None, None, expected]
        assert tensor.written == whole.written


def test_parts_in_threads_give_what_one_go_gives(small):
    whole = Tensor()
    expected = whole.editor.edit(whole.edit, whole.channels)
    for _ in range(20):
        tensor = Tensor()
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda portion: portion.do(), tensor.portions()))
        assert [result for result in results if result is not None] == [expected]
        assert tensor.written == whole.written


def test_a_small_tensor_has_one_part():
    (portion,) = Tensor().portions()
    assert (portion.start, portion.end) == (0, Tensor().edit.end)


def test_one_job_has_one_part(small):
    tensor = Tensor(jobs=1)
    (portion,) = tensor.portions()
    assert portion.do() == Tensor().editor.edit(tensor.edit, Tensor().channels)
    assert portion.end == len(tensor.written)


def test_the_part_that_cannot_be_edited_says_so(small):
    values = np.random.default_rng(0).standard_normal(SHAPE)
    values[5, 3, 3] = np.nan
    tensor = Tensor(values)
    first, second, third, last = tensor.portions()
    with pytest.raises(ExecuteError, match=r"experts\.down_proj, expert 5: holds NaN"):
        third.do()
    assert [portion.do() for portion in (first, second, last)] == [None, None, None]


def test_parts_end_when_the_run_has(small):
    tensor = Tensor()
    portions = tensor.portions()
    tensor.stop.set()
    for portion in portions:
        with pytest.raises(Stopped):
            portion.do()
    assert not any(tensor.written)
