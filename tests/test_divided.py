"""One matrix edited by several threads: the same bytes, measures and digest as by one."""

import random
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blake3 import blake3
from coded_checkpoints import FORMS, inner_of, options, write_basis, write_coded, write_fp8
from command_line import checked
from raw_checkpoints import encode, snapshot, write_directions, write_shard
from test_editor import BASIS, edit_of
from test_mlx_stacks import HIDDEN, INT4, write_moe

from ablate_shards.errors import ExecuteError
from ablate_shards.kernels.native.native import NativeArrays
from ablate_shards.kernels.rounding import directed
from ablate_shards.surgery.edit import ablation_editor, blocks, coded, loops
from ablate_shards.surgery.edit.ablation_editor import AblatedMatrices, AblationEditor
from ablate_shards.surgery.edit.blocks import Channels, Stopped
from ablate_shards.surgery.edit.loops import SharedLoops, in_order

SECONDS = 30
PRESERVED = ("rows", "columns", "none")


@pytest.fixture
def small(monkeypatch):
    """Divides every matrix, in blocks of a few rows."""
    monkeypatch.setattr(blocks, "_UNDIVIDED", 0)
    monkeypatch.setattr(NativeArrays, "chunk_elements", 4000)
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 4000)


def basis_of(length, directions=1):
    return np.linalg.qr(np.random.default_rng(1).standard_normal((length, directions)))[0].T


class Tensor:
    """A tensor and an editor of it, in memory.

    Args:
        shape: Its shape.
        dtype: What it is stored in.
        values: Other values than random ones.
        jobs: Threads of the editor.
        meet: Threads that have to read at the same time before any goes on.
        directions: How many are removed.
        memory: The budget.
    """

    def __init__(
        self, shape, dtype="BF16", preserve="rows", axis=-2, values=None, jobs=1, meet=0, directions=1, memory=1 << 28
    ):
        values = np.random.default_rng(0).standard_normal(shape) if values is None else values
        self.source = bytearray(encode(values.astype(np.float32), dtype))
        self.written = bytearray(len(self.source))
        self.stop = threading.Event()
        self.barrier = threading.Barrier(max(meet, 1))
        self.readers = set()
        basis = basis_of(shape[axis], directions)
        self.editor = AblationEditor("cpu", memory, jobs, self.stop, {BASIS: basis})
        self.edit = edit_of("down_proj", self.source, dtype, shape, axis, preserve)

    def read(self, data, offset):
        if self.barrier.parties > 1 and threading.get_ident() not in self.readers:
            self.readers.add(threading.get_ident())
            if len(self.readers) <= self.barrier.parties:
                self.barrier.wait(SECONDS)
        time.sleep(random.choice((0, 0, 0.001)))
        data[:] = self.source[offset : offset + len(data)]

    def write(self, data, offset):
        self.written[offset : offset + len(data)] = data

    def reread(self, data, offset):
        data[:] = self.written[offset : offset + len(data)]

    def whole(self):
        """Edits it in one thread."""
        return self.editor.edit(self.edit, Channels(self.read, self.write, self.reread))

    def divided(self):
        """Edits it in the threads of a pool, as a shard is."""
        with ThreadPoolExecutor(self.editor.jobs) as pool:
            self.editor.share(pool.submit)
            portions = self.editor.portions(self.edit, Channels(self.read, self.write, self.reread))
            results = [each.result() for each in [pool.submit(portion.do) for portion in portions]]
        (result,) = filter(None, results)
        return result


def awkward(shape):
    """What float32 does not carry, rows of zeros, and rows that nothing is left of."""
    values = np.random.default_rng(3).standard_normal(shape)
    values[5] *= 1e-25
    values[40:43] = 0
    values[70] *= 1e22
    values[:, 7] *= 1e-24
    return values


CASES = [
    ((97, 200), "BF16", -2, 1),
    ((97, 201), "F32", -2, 1),
    ((301, 33), "F16", -2, 1),  # several groups of rows in a block
    ((97, 4001), "BF16", -2, 3),  # rows that are wider than a block
    ((211, 64), "BF16", -1, 1),
    ((211, 65), "F32", -1, 2),
    ((197, 64), "F16", -1, 1),
    ((3, 97, 150), "BF16", -2, 1),
    ((3, 150, 97), "F16", -1, 1),
]


@pytest.mark.parametrize("jobs", [1, 2, 3, 8])
@pytest.mark.parametrize("preserve", PRESERVED)
@pytest.mark.parametrize(("shape", "dtype", "axis", "directions"), CASES)
def test_any_number_of_threads_gives_what_one_gives(small, shape, dtype, axis, directions, preserve, jobs):
    one = Tensor(shape, dtype, preserve, axis, directions=directions)
    expected = one.whole()
    assert one.written != one.source
    meet = min(jobs, 3)
    several = Tensor(shape, dtype, preserve, axis, directions=directions, jobs=jobs, meet=meet)
    assert several.divided() == expected
    assert several.written == one.written
    assert expected.blake3 == blake3(one.written).hexdigest()
    assert len(several.readers) >= meet or jobs == 1


@pytest.mark.parametrize("preserve", PRESERVED)
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_needs_float64_is_no_other_in_several_threads(small, dtype, axis, preserve):
    shape = (300, 97)
    one = Tensor(shape, dtype, preserve, axis, awkward(shape))
    expected = one.whole()
    for _ in range(3):
        several = Tensor(shape, dtype, preserve, axis, awkward(shape), jobs=4, meet=4)
        assert several.divided() == expected
        assert several.written == one.written


@pytest.mark.parametrize("axis", [-2, -1])
def test_vectors_that_nothing_is_left_of_are_counted_once(small, axis):
    values = np.random.default_rng(0).standard_normal((128, 128))
    rows = values if axis == -1 else values.T
    rows[::3] = basis_of(128)
    one, several = (Tensor(values.shape, "F32", "columns", axis, values, jobs=jobs, meet=jobs) for jobs in (1, 4))
    expected = one.whole()
    assert expected.degenerate == 43
    assert several.divided() == expected


@pytest.mark.parametrize("preserve", PRESERVED)
def test_memory_stays_within_the_budget(preserve):
    values = np.resize(np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32), (512, 36_000))
    tensor = Tensor(values.shape, preserve=preserve, values=values, jobs=3, meet=3, memory=3 << 23)
    tracemalloc.start()
    tensor.divided()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tensor.readers) == 3
    assert peak < 3 << 23


def test_a_small_matrix_is_not_divided():
    tensor = Tensor((64, 64), jobs=4)
    with ThreadPoolExecutor(4) as pool:
        tensor.editor.share(pool.submit)
        assert [section.each for section in tensor.editor.sections(tensor.edit)] == [in_order]


@pytest.mark.parametrize("preserve", PRESERVED)
def test_values_that_are_not_finite_are_refused(small, preserve):
    values = np.random.default_rng(0).standard_normal((200, 64))
    values[150, 3] = np.nan
    tensor = Tensor(values.shape, preserve=preserve, values=values, jobs=3, meet=3)
    with pytest.raises(ExecuteError, match="down_proj: holds NaN"):
        tensor.divided()


def test_an_error_in_any_thread_ends_all_of_them(small):
    tensor = Tensor((400, 64), jobs=4, meet=4)
    healthy = tensor.read

    def read(data, offset):
        healthy(data, offset)
        if offset > 20_000:
            raise OSError(5, "no such block")

    tensor.read = read
    with pytest.raises(OSError, match="no such block"):
        tensor.divided()


def test_a_run_that_has_ended_elsewhere_ends_all_of_them(small):
    tensor = Tensor((400, 64), jobs=4)
    tensor.stop.set()
    with pytest.raises(Stopped):
        tensor.divided()


class TestCodes:
    """Matrices of codes, whose columns are rounded by several threads."""

    @pytest.fixture(autouse=True)
    def small_stripes(self, small, monkeypatch):
        monkeypatch.setattr(blocks, "_UNDIVIDED_CODES", 0)
        monkeypatch.setattr(ablation_editor, "_CODES_AT_ONCE", 4000)
        monkeypatch.setattr(coded, "_STRIPE", 4 * 256 * 64)
        monkeypatch.setattr(coded, "_TILE", 256 * 8)

    def same_for_any_number(self, source, folder, monkeypatch, *more):
        threads, met = set(), threading.Barrier(3)
        rounded = directed.round_directed

        def meet(*arguments):
            if threading.get_ident() not in threads and len(threads) < 3:
                threads.add(threading.get_ident())
                met.wait(SECONDS)
            return rounded(*arguments)

        checked(source, folder / "one", *options(folder, *more, "--jobs", 1))
        monkeypatch.setattr(directed, "round_directed", meet)
        checked(source, folder / "three", *options(folder, *more, "--jobs", 3))
        monkeypatch.setattr(directed, "round_directed", rounded)
        checked(source, folder / "eight", *options(folder, *more, "--jobs", 8))
        assert len(threads) == 3
        assert snapshot(folder / "one") == snapshot(folder / "three") == snapshot(folder / "eight")

    @pytest.mark.parametrize("form", FORMS)
    def test_any_form_is_the_same(self, tmp_path, monkeypatch, form):
        source = write_coded(tmp_path / "source", form, inner=inner_of(form), layers=1)
        write_basis(tmp_path, 256)
        self.same_for_any_number(source, tmp_path, monkeypatch, "--layers", 0)

    @pytest.mark.parametrize("experts", [0, 3])
    @pytest.mark.parametrize("preserve", PRESERVED)
    def test_any_norms_are_kept_the_same(self, tmp_path, monkeypatch, preserve, experts):
        kind = "mixtral" if experts else "llama"
        source = write_fp8(tmp_path / "source", experts=experts, model_type=kind)
        write_basis(tmp_path, 256, 2)
        self.same_for_any_number(source, tmp_path, monkeypatch, "--preserve", preserve)

    @pytest.mark.parametrize("preserve", PRESERVED)
    def test_rows_along_the_stream_are_the_same(self, tmp_path, monkeypatch, preserve):
        source = write_moe(tmp_path / "source", INT4, vocabulary=1100)
        write_basis(tmp_path, HIDDEN)
        more = ("--preserve", preserve, "--components", "embedding")
        self.same_for_any_number(source, tmp_path, monkeypatch, *more)

    def test_the_nearest_codes_are_the_same(self, tmp_path):
        source = write_fp8(tmp_path / "source")
        write_basis(tmp_path, 256)
        for jobs in (1, 4):
            more = ("--rounding", "nearest", "--force", "--jobs", jobs)
            checked(source, tmp_path / str(jobs), *options(tmp_path, *more))
        assert snapshot(tmp_path / "1") == snapshot(tmp_path / "4")


class TestLoops:
    """Loops by themselves."""

    def test_threads_take_offsets_in_order_and_turns_come_in_order(self):
        taken, turns = [], []

        def do(offset, turn):
            taken.append(offset)
            time.sleep(random.choice((0, 0.002)))
            if turn.has_come():
                turns.append(offset)
            else:
                turn.do(lambda: turns.append(offset))

        with ThreadPoolExecutor(4) as pool:
            SharedLoops(4, pool.submit).each(range(10, 200, 5), do)
        assert turns == list(range(10, 200, 5))
        assert sorted(taken) == turns

    def test_nobody_is_waited_for(self):
        busy = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(busy.wait, SECONDS)
            threads = set()
            SharedLoops(2, pool.submit).each(range(9), lambda offset, turn: threads.add(threading.get_ident()))
            busy.set()
        assert threads == {threading.get_ident()}

    def test_who_comes_joins_the_loop_with_the_fewest_threads(self):
        met = threading.Barrier(4)
        inside: dict[str, set[int]] = {"one": set(), "other": set()}

        def loop(loops, name):
            def do(offset, turn):
                inside[name].add(threading.get_ident())
                if offset == 0 or len(inside[name]) == 2:
                    met.wait(SECONDS)

            loops.each(range(2), do)

        with ThreadPoolExecutor(4) as pool:
            loops = SharedLoops(4, pool.submit)
            for future in [pool.submit(loop, loops, name) for name in inside]:
                future.result()
        assert [len(threads) for threads in inside.values()] == [2, 2]

    def test_the_loop_goes_on_alone_when_the_pool_is_shut_down(self):
        pool = ThreadPoolExecutor(2)
        pool.shutdown()
        done = []
        SharedLoops(2, pool.submit).each(range(3), lambda offset, turn: done.append(offset))
        assert done == [0, 1, 2]

    @pytest.mark.parametrize("in_turn", [False, True])
    def test_the_first_error_is_raised_and_ends_the_loop(self, in_turn):
        done = []

        def fail():
            raise ValueError("three")

        def do(offset, turn):
            done.append(offset)
            if offset == 3:
                turn.do(fail) if in_turn else fail()
            turn.do(lambda: None)
            time.sleep(0.001)

        with ThreadPoolExecutor(4) as pool, pytest.raises(ValueError, match="three"):
            SharedLoops(4, pool.submit).each(range(1000), do)
        assert len(done) < 20

    @pytest.mark.parametrize("place", ["_take", "_end"])
    def test_an_interruption_between_offsets_ends_the_loop_in_every_thread(self, monkeypatch, place):
        """As Ctrl-C is raised wherever the main thread is."""
        main, inner, calls = threading.get_ident(), getattr(loops._Loop, place), []

        def interrupted(self, *given):
            if threading.get_ident() == main and len(calls) > 3:
                raise KeyboardInterrupt
            return inner(self, *given)

        def do(offset, turn):
            calls.append(offset)
            time.sleep(0.001)
            turn.do(lambda: None)

        monkeypatch.setattr(loops._Loop, place, interrupted)
        with ThreadPoolExecutor(3) as pool, pytest.raises(KeyboardInterrupt):
            SharedLoops(3, pool.submit).each(range(1000), do)
        assert len(calls) < 20

    def test_what_waits_for_its_turn_is_bounded(self):
        late = threading.Event()
        taken = []

        def do(offset, turn):
            taken.append(offset)
            if offset == 0:
                assert late.wait(SECONDS)
            turn.do(lambda: None)

        with ThreadPoolExecutor(3) as pool:
            loops = SharedLoops(2, pool.submit)
            running = pool.submit(loops.each, range(50), do)
            while len(taken) < 4:
                time.sleep(0.001)
            time.sleep(0.05)
            assert len(taken) == 4
            late.set()
            running.result()
        assert len(taken) == 50

    def test_nothing_to_do(self):
        with ThreadPoolExecutor(2) as pool:
            SharedLoops(2, pool.submit).each(range(0), pytest.fail)


@pytest.fixture(scope="module")
def one_large_matrix(tmp_path_factory):
    """A checkpoint in one shard, most of which is one matrix."""
    folder = tmp_path_factory.mktemp("large")
    hidden, inner = 512, 36_000
    values = np.random.default_rng(0).standard_normal((hidden, inner), np.float32)
    small = values[:, :hidden]
    tensors = {
        "model.embed_tokens.weight": small,
        "model.layers.0.self_attn.o_proj.weight": small,
        "model.layers.0.mlp.down_proj.weight": values,
        "model.norm.weight": np.ones(hidden),
    }
    (folder / "source").mkdir()
    write_shard(folder / "source" / "model.safetensors", tensors)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden}
    text = str({**config, "num_hidden_layers": 1}).replace("'", '"')
    (folder / "source" / "config.json").write_text(text)
    write_directions(folder / "directions.safetensors", layers=1, hidden=hidden)
    return folder


@pytest.mark.parametrize("preserve", PRESERVED)
def test_a_large_matrix_of_a_checkpoint_is_divided_among_the_jobs(one_large_matrix, tmp_path, monkeypatch, preserve):
    met, threads = threading.Barrier(3), set()
    edit = AblatedMatrices.edit

    def meet(self, raw, offset):
        if self.each is not in_order and met is not None and threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            met.wait(SECONDS)
        edit(self, raw, offset)

    made = {}
    for jobs in (1, 2, 3, 8):
        out = tmp_path / str(jobs)
        if jobs == 3:
            monkeypatch.setattr(AblatedMatrices, "edit", meet)
        checked(
            *("ablate", one_large_matrix / "source", out, "-d", one_large_matrix / "directions.safetensors"),
            *("--preserve", preserve, "--jobs", jobs, "--memory", "256MB"),
        )
        monkeypatch.setattr(AblatedMatrices, "edit", edit)
        made[jobs] = snapshot(out)
    assert len(threads) == 3
    assert all(files == made[1] for files in made.values())
