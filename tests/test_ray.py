"""What holds a model, on two workers of a local cluster of Ray: the same results, nothing lost, nothing twice."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from command_line import checked
from test_search import arguments, folder  # noqa: F401 - a fixture

from ablate_shards.errors import ExecuteError, SearchError, UsageError
from ablate_shards.surgery.machine import crew as crew_module
from ablate_shards.surgery.machine.crew import RayCrew, Workers, hired
from ablate_shards.surgery.model.loading import open_same

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ablate-shards[ray]'")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of this machine, with room for two workers of one core."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    crew_module._import_ray()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def workers_of_this_cluster():
    """Returns the processes of workers that hold something."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "_Actor" in " ".join(process.cmdline()):
                found.append(process)
    return found


# ---------------------------------------------------------------------------------- what runs on the workers


@contextlib.contextmanager
def counted(place):
    """Holds a place, and leaves a mark there each time it is opened."""
    (place / f"opened-{os.getpid()}").touch()
    yield place


def marked(place, number, dies_once=-1, dies_always=-1):
    """Leaves a mark for each time that a piece of work is begun."""
    before = len(list(place.glob(f"begun-{number}-*")))
    (place / f"begun-{number}-{os.getpid()}-{before}").touch()
    if number == dies_always or (number == dies_once and not before):
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def refused(place):
    raise SearchError(f"{place}: what is wrong")


class TestCrew:
    def crew(self, place, count=2):
        return hired(Workers("ray", count, "cpu"), functools.partial(counted, place))

    def test_each_worker_opens_once_and_each_work_has_one_result(self, tmp_path):
        with self.crew(tmp_path) as crew:
            found = list(crew.each(marked, {number: (number,) for number in range(12)}))
            assert crew.do(marked, 99) == 990
        assert sorted(found) == [(number, number * 10) for number in range(12)]
        assert len(list(tmp_path.glob("opened-*"))) == 2
        assert len(list(tmp_path.glob("begun-*"))) == 13

    def test_one_that_dies_is_replaced_and_nothing_counts_twice(self, tmp_path):
        with self.crew(tmp_path) as crew:
            found = list(crew.each(marked, {number: (number,) for number in range(8)}, dies_once=3))
        assert sorted(found) == [(number, number * 10) for number in range(8)]
        assert len(list(tmp_path.glob("begun-3-*"))) == 2
        assert len(list(tmp_path.glob("opened-*"))) == 3

    def test_work_that_kills_each_worker_ends_in_a_sentence(self, tmp_path):
        with self.crew(tmp_path) as crew, pytest.raises(ExecuteError, match=r"died 3 times .* use fewer --workers"):
            list(crew.each(marked, {number: (number,) for number in range(4)}, dies_always=1))
        assert len(list(tmp_path.glob("begun-1-*"))) == 3

    def test_what_stays_outside_outlives_its_workers(self, tmp_path):
        with self.crew(tmp_path) as crew:
            kept = crew.keep(marked, 7)
        with self.crew(tmp_path) as crew:
            assert crew.do(added, kept) == 71

    def test_an_error_keeps_its_kind_and_says_where(self, tmp_path):
        with self.crew(tmp_path) as crew, pytest.raises(SearchError, match=r"what is wrong \(said by the worker on"):
            crew.do(refused)

    def test_a_worker_without_the_model_says_so(self, tmp_path):
        opened = functools.partial(without, tmp_path / "model")
        with (
            hired(Workers("ray", 1, "cpu"), opened) as crew,
            pytest.raises(SearchError, match=r"model: there is no such folder on this machine; .* at the same path"),
        ):
            crew.do(added, 1)

    def test_workers_of_another_version_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(crew_module, "_versions", lambda: {"ablate-shards": "0", "torch": "1.0"})
        with (
            pytest.raises(ExecuteError, match=r"has ablate-shards \S+ installed, and here it is 0"),
            self.crew(tmp_path),
        ):
            pass

    def test_those_that_find_no_room_are_done_without(self, tmp_path, monkeypatch):
        monkeypatch.setattr(crew_module, "_START", 15.0)
        other = ray.remote(num_cpus=1)(Other).remote()
        assert ray.get(other.answer.remote())
        with self.crew(tmp_path, 2) as crew:
            assert isinstance(crew, RayCrew)
            assert crew.size == 1
        ray.kill(other)

    def test_more_workers_than_cores(self, tmp_path):
        with pytest.raises(UsageError, match=r"--workers 3: the cluster has 2 cores"), self.crew(tmp_path, 3):
            pass


class Other:
    """Takes a core."""

    def answer(self):
        return True


def added(_, number):
    return number + 1


@contextlib.contextmanager
def without(model):
    open_same(model, "", SearchError)
    yield


@pytest.mark.parametrize(
    ("machines", "count", "device", "expected"),
    [
        ([(8, 0)], None, "auto", (1, {"num_cpus": 8})),
        ([(8, 0), (8, 0)], None, "auto", (2, {"num_cpus": 8})),
        ([(3, 0), (3, 0)], 3, "cpu", (3, {"num_cpus": 1})),
        ([(16, 4), (16, 4), (4, 0)], None, "auto", (8, {"num_gpus": 1, "num_cpus": 4})),
        ([(16, 4)], 2, "cuda", (2, {"num_gpus": 1, "num_cpus": 4})),
        ([(16, 4)], None, "cpu", (1, {"num_cpus": 16})),
        ([(16, 4)], 5, "auto", "the cluster has 4 GPUs"),
        ([(16, 0)], None, "cuda", "--device cuda: the cluster has none"),
    ],
)
def test_what_a_worker_takes(machines, count, device, expected):
    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            crew_module._shares(nodes, Workers("ray", count, device))
    else:
        assert crew_module._shares(nodes, Workers("ray", count, device)) == expected


@pytest.fixture
def closed_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class TestAddress:
    def refused(self, monkeypatch, address):
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        before = time.monotonic()
        with pytest.raises((ExecuteError, UsageError)) as caught, hired(Workers("ray"), contextlib.nullcontext):
            pass
        return str(caught.value), time.monotonic() - before

    def test_one_that_does_not_answer(self, monkeypatch, closed_port):
        message, seconds = self.refused(monkeypatch, f"127.0.0.1:{closed_port}")
        assert message == (
            f"RAY_ADDRESS=127.0.0.1:{closed_port}: no cluster of Ray answers there ([Errno 111] Connection refused); "
            "start one with `ray start --head`, correct the address, or unset it to use this machine alone"
        )
        assert seconds < 10

    @pytest.mark.parametrize(
        ("answer", "why"), [(b"HTTP/1.1 400 Bad\r\n\r\n", "something else does"), (b"", "timed out")]
    )
    def test_something_else_that_answers(self, monkeypatch, answer, why):
        monkeypatch.setattr(crew_module, "_ANSWER", 1.0)
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve():
                with server.accept()[0] as connection:
                    connection.sendall(answer)
                    connection.recv(4096)
                    time.sleep(3)

            threading.Thread(target=serve, daemon=True).start()
            message, seconds = self.refused(monkeypatch, f"127.0.0.1:{server.getsockname()[1]}")
        assert f"no cluster of Ray answers there ({why})" in message
        assert seconds < 10

    def test_one_that_asks_for_a_token(self, monkeypatch):
        def refuse(**_):
            raise ConnectionError("Failed to connect to Ray cluster")

        monkeypatch.setattr(ray, "init", refuse)
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve():
                with server.accept()[0] as connection:
                    connection.sendall(b"\0\0\0\4\0\0\0\0\0")
                    connection.recv(4096)

            threading.Thread(target=serve, daemon=True).start()
            message, _ = self.refused(monkeypatch, f"127.0.0.1:{server.getsockname()[1]}")
        assert "a cluster of Ray answers there, but cannot be used (Failed to connect" in message
        assert "if it asks for a token, set RAY_AUTH_MODE=token" in message

    @pytest.mark.parametrize("address", ["nonsense:port", "no.such.host.invalid:6379"])
    def test_one_that_is_none(self, monkeypatch, address):
        message, _ = self.refused(monkeypatch, address)
        assert message.startswith(f"RAY_ADDRESS={address}: no cluster of Ray answers there (")

    @pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
    def test_that_of_the_jobs(self, monkeypatch, address):
        message, _ = self.refused(monkeypatch, address)
        assert "expected HOST:PORT" in message
        assert "ray job submit" in message


# ---------------------------------------------------------------------------------- the commands


def searched(folder, out, *more, trials=20):  # noqa: F811
    checked(*arguments(folder, out, "--engine", "ray", *more, trials=trials))
    return json.loads(out.with_name(out.name.replace(".toml", ".search.json")).read_text())


def tried(record):
    return [(trial["number"], trial["setting"], trial["values"], trial["digest"]) for trial in record["trials"]]


def finished_in(journal):
    return journal.read_text().count('"number"') if journal.exists() else 0


@pytest.fixture(scope="module")
def alone(folder):  # noqa: F811
    return searched(folder, folder / "one.toml", "--workers", 1)


class TestSearch:
    def test_neither_two_workers_nor_the_death_of_one_change_what_is_tried(self, folder, alone, tmp_path):  # noqa: F811
        """20 trials: the last four are proposed from what others measured."""
        killed = []

        def kill_one():
            while finished_in(tmp_path / "two.study.journal") < 4:
                time.sleep(0.1)
            victim = workers_of_this_cluster()[0]
            victim.kill()
            killed.append(victim.pid)

        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        two = searched(folder, tmp_path / "two.toml", "--workers", 2)
        killer.join()
        assert killed
        assert tried(two) == tried(alone)
        assert [number for number, *_ in tried(two)] == list(range(20))
        for what in ("chosen", "candidates", "front"):
            assert two[what] == alone[what]

    def test_after_ctrl_c_it_goes_on_as_it_would_have(self, folder, alone, tmp_path):  # noqa: F811
        out = tmp_path / "stopped.toml"
        words = [str(word) for word in arguments(folder, out, "--engine", "ray", "--workers", 2, trials=20)]
        address = ray.get_runtime_context().gcs_address
        hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        with subprocess.Popen(
            # A shell that starts the tests in the background has them ignore it.
            [sys.executable, "-c", f"{hear}; from ablate_shards.cli import main; main()", *words],
            env={**os.environ, "RAY_ADDRESS": address},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while finished_in(tmp_path / "stopped.study.journal") < 3:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert said.splitlines()[-1].startswith("error: ")
        assert "interrupted; finished trials are kept there, and the same command goes on" in said
        kept = finished_in(tmp_path / "stopped.study.journal")
        assert 3 <= kept < 20
        assert tried(searched(folder, out, "--workers", 2)) == tried(alone)

    def test_trials_of_the_other_engine_are_those_of_another_search(self, folder, alone, tmp_path):  # noqa: F811
        (tmp_path / "one.study.journal").write_bytes((folder / "one.study.journal").read_bytes())
        said = checked(*arguments(folder, tmp_path / "one.toml"), code=1).output
        assert "the engine changed" in said


class TestEvaluate:
    def test_it_is_what_this_process_would_have_found(self, folder, tmp_path):  # noqa: F811
        base = tmp_path / "base"
        checked("ablate", folder / "model", base, "-d", folder / "cue.directions.safetensors", "-q")
        words = (folder / "model", "--against", base, "--questions", folder / "q.jsonl", "--dtype", "float32")
        short = ("--length", 8, "--batch", 4, "-q")
        checked("evaluate", *words, *short, "-o", tmp_path / "here.json")
        # By a process of its own, which connects with the cluster as a user's does.
        command = [sys.executable, "-m", "ablate_shards", "evaluate", *words, *short, "-o", tmp_path / "ray.json"]
        done = subprocess.run(
            [*map(str, command), "--engine", "ray", "--workers", "2"],
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "ray.json").read_bytes() == (tmp_path / "here.json").read_bytes()
        assert json.loads((tmp_path / "ray.json").read_text())["comparison"]["divergence"]
        assert not list(tmp_path.glob(".*.answers"))

    @pytest.mark.parametrize("more", [("--tasks", "arc_easy"), ("--endpoint", "http://127.0.0.1:1")])
    def test_what_it_cannot_do(self, folder, more):  # noqa: F811
        said = checked("evaluate", folder / "model", "--engine", "ray", *more, code=2).output
        assert f"{more[0]}: cannot be had with --engine ray" in said

    def test_gpus_are_given_out_by_ray(self, folder):  # noqa: F811
        said = checked("evaluate", folder / "model", "--engine", "ray", "--device", "cuda:1", code=2).output
        assert "--device cuda:1: Ray gives each worker its GPU; use --device cuda" in said


class TestCapture:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_dump_has_the_same_bytes(self, folder, tmp_path, workers):  # noqa: F811
        words = ("--pairs", folder / "pairs.jsonl", "--dtype", "float32", "--batch", 4)
        dump = tmp_path / "dump.safetensors"
        checked("capture", folder / "model", tmp_path / "here.safetensors", *words, "-q")
        said = checked("capture", folder / "model", dump, *words, "--engine", "ray", "--workers", workers).output
        assert dump.read_bytes() == (tmp_path / "here.safetensors").read_bytes()
        assert "24 pairs" in said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.safetensors", "here.safetensors"]

    def test_what_workers_need_not_do_again_is_said(self, folder, tmp_path):  # noqa: F811
        words = (folder / "model", tmp_path / "d.safetensors", "--pairs", folder / "pairs.jsonl", "--dtype", "float32")
        for rank in range(2):
            checked("capture", *words, "--worker-rank", rank, "--world-size", 2)
        found = json.loads(checked("capture", *words, "--engine", "ray", "--workers", 2, "--json").stdout)
        assert found["resumed"] == found["layers"] > 0
        assert found["device"] == "cpu"

    def test_parts_of_other_ranks_are_in_the_way_of_other_ranks_alone(self, folder, tmp_path):  # noqa: F811
        words = (folder / "model", tmp_path / "d.safetensors", "--pairs", folder / "pairs.jsonl", "--dtype", "float32")
        checked("capture", *words, "--worker-rank", 0, "--world-size", 3)
        said = checked("capture", *words, "--engine", "ray", "--workers", 2, code=1).output
        assert "of 3" in said
        assert not (tmp_path / "d.safetensors").exists()
        checked("capture", *words, "--engine", "ray", "--workers", 2, "--overwrite")
        assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]

    def test_a_disk_that_workers_do_not_share(self, folder, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setattr("pathlib.Path.touch", lambda *_: None)
        words = ("--pairs", folder / "pairs.jsonl", "--engine", "ray", "--workers", 1)
        said = checked("capture", folder / "model", tmp_path / "d.safetensors", *words, code=1).output
        assert "name a DUMP on a disk that all machines share" in said
        assert not list(tmp_path.iterdir())

    def test_ranks_are_refused(self, folder, tmp_path):  # noqa: F811
        words = ("--pairs", folder / "pairs.jsonl", "--engine", "ray", "--worker-rank", 0, "--world-size", 2)
        said = checked("capture", folder / "model", tmp_path / "d.safetensors", *words, code=2).output
        assert "leave out --worker-rank and --world-size" in said
