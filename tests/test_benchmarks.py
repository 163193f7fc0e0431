"""The benchmarks: no speed for what is wrong, ratios by pairs, memory of a process alone, and every case still runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub.hub_server import Server

from benchmarks import checks, machine, processes, real, record
from benchmarks.__main__ import main
from benchmarks.cases import command as command_cases
from benchmarks.cases import diff as diff_cases
from benchmarks.cases import directions as directions_cases
from benchmarks.cases import merge as merge_cases
from benchmarks.cases import transfer as transfer_cases
from benchmarks.cases.kernels import Pool
from benchmarks.checkpoints import llama, qwen, shards, write
from benchmarks.harness import CASES, Bench, BenchmarkError, Case, Contender, Race, Sample, cells, race
from benchmarks.processes import EAGER, TOOL, run, unsynced

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROW = {"contender", "wrong", "seconds", "median", "least", "most", "against", "ratio", "peak_bytes", "peak_is_bound"}
MACHINE = {"date", "commit", "dirty", "python", "packages", "cpu", "cores", "kernel", "file_system", "device"}


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    """What other processes write meanwhile is not waited for."""
    monkeypatch.setattr(processes, "settle", lambda folder: None)


def scripted(name, seconds, log=None, **more):
    """A contender whose first run is the one to check, and whose others take these seconds."""
    left = iter([0.0, *seconds])

    def step():
        if log is not None:
            log.append(name)
        return Sample(next(left), more.get("peak"))

    return Contender(name, step, **{key: value for key, value in more.items() if key != "peak"})


def test_a_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians():
    ours, copy = race([scripted("ours", [1, 4, 9]), scripted("cp", [1, 2, 1], against="ours")], 3)
    assert (ours.median, copy.median) == (4, 1)
    assert copy.ratio == 2
    assert ours.ratio is None


def test_contenders_take_turns_and_every_other_round_goes_backwards():
    log = []
    race([scripted(name, [1, 1, 1], log) for name in "abc"], 3)
    assert "".join(log) == "abc" + "abc" + "cba" + "abc"


def test_the_run_that_is_checked_counts_where_times_mean_nothing():
    log = []
    rows = race([scripted(name, [1, 1], log, check=lambda: log.append("?")) for name in "ab"], 2, first_counts=True)
    assert log == ["a", "?", "b", "?", "a", "b"]
    assert [row.seconds for row in rows] == [(0.0, 1)] * 2


def test_a_peak_is_the_largest_of_all_runs():
    peaks = iter([1, 5, 9, 7])
    (row,) = race([Contender("ours", lambda: Sample(1.0, next(peaks)))], 3)
    assert row.peak == 9


def test_what_is_fetched_is_told_as_a_multiple_of_the_source():
    disk = iter([10_000, 3000, 7000])
    rows = race([Contender("ours", lambda: Sample(1.0, disk=next(disk), fetched=250)), scripted("cp", [1, 1])], 2)
    ours, copy = cells(Race("", rows, 100))
    assert (ours["peak disk"], ours["fetched"]) == ("7 kB", "2.50 times")
    assert (copy["peak disk"], copy["fetched"]) == ("", "")


def test_a_contender_is_checked_once_before_it_is_timed_and_cleaned_up_after_every_run():
    log = []
    contender = Contender(
        "ours",
        lambda: log.append("run") or Sample(1.0),
        check=lambda: log.append("check"),
        before=lambda: log.append("before"),
        after=lambda: log.append("after"),
    )
    race([contender], 2)
    assert log == ["before", "run", "check", "after", *["before", "run", "after"] * 2]


@pytest.fixture
def registered(monkeypatch):
    """Registers a case of scripted contenders."""

    def register(*contenders):
        def measure(bench):
            """Scripted seconds."""
            bench.race("scripted", contenders, size=10**9)

        monkeypatch.setitem(CASES, "scripted", Case("scripted", measure, 3, gpu=False, long=False))

    return register


def test_a_wrong_result_gets_no_speed_and_fails(registered, tmp_path, capsys):
    registered(
        scripted("ours", [0.125] * 3, check=lambda: "3 elements are off"),
        scripted("cp", [0.25] * 3, against="ours"),
    )
    assert main(["scripted", "--work", str(tmp_path / "work"), "--json", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("ours"))
    assert line.rstrip() == "ours: WRONG, no speed: 3 elements are off"
    assert "0.12" not in shown
    assert "0.25" in shown
    ours, copy = json.loads((tmp_path / "scripted.json").read_text())["tables"][0]["rows"]
    assert (ours["seconds"], ours["median"], ours["wrong"]) == ([], None, "3 elements are off")
    assert copy["ratio"] is None
    assert "0.12" not in record.markdown("scripted", tmp_path)


def test_a_right_result_gets_a_speed(registered, tmp_path, capsys):
    registered(scripted("ours", [0.125] * 3), scripted("cp", [0.25] * 3, against="ours", peak=1 << 20))
    assert main(["scripted", "--work", str(tmp_path / "work"), "--json", str(tmp_path)]) == 0
    assert "0.12 s" in capsys.readouterr().out
    found = json.loads((tmp_path / "scripted.json").read_text())
    assert found["command"] == "python -m benchmarks scripted --runs 3"
    assert found["machine"].keys() >= MACHINE
    assert {"numpy", "torch"} <= found["machine"]["packages"].keys()
    assert found["tables"][0]["rows"][1].keys() >= ROW
    assert found["tables"][0]["rows"][1]["ratio"] == 0.5
    assert not list((tmp_path / "work").iterdir())
    quoted = record.markdown("scripted", tmp_path).splitlines()
    assert quoted[0] == "<!-- python -m benchmarks --quote scripted -->"
    assert found["machine"]["date"] in quoted[1]
    assert quoted[-1] == "| cp | 0.25 s | 0.25–0.25 | 0.50 | 1 MiB |"


@pytest.mark.parametrize("name", [case.name for case in CASES.values()])
def test_every_case_runs_at_tiny_size(name, tmp_path):
    # The default is a relative path too.
    words = [name, "--tiny", "--runs", "1", "--work", os.path.relpath(tmp_path / "work"), "--json", str(tmp_path)]
    if name in ("kernels-gpu", "sweep-gpu"):
        # Triton decides at import whether it interprets.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT, env=environment, check=True)
    else:
        assert main(words) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    rows = [row for table in found["tables"] for row in table["rows"]]
    assert rows
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows)
    assert any(row["ratio"] for row in rows)
    with pytest.raises(BenchmarkError, match="tiny sizes"):
        record.read(name, tmp_path)


def test_a_long_case_is_run_where_it_or_everything_is_asked_for(monkeypatch, tmp_path):
    ran = []
    cases = {
        name: Case(name, lambda bench, name=name: ran.append(name), 1, gpu=name == "gpu", long=name == "long")
        for name in ("short", "long", "gpu")
    }
    monkeypatch.setattr("benchmarks.__main__.CASES", cases)
    for words in ([], ["--all"], ["long"]):
        assert main([*words, "--work", str(tmp_path)]) == 0
    assert ran == ["short", "short", "long", "long"]


def test_every_case_says_in_one_line_what_it_measures(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CASES)
    assert all(len(line) > 40 for line in lines)


def test_documents_name_every_case_and_no_other():
    named = {
        word
        for page in PAGES
        for words in re.findall(r"python -m benchmarks((?: (?!-)[a-z][a-z0-9-]*)+)", page.read_text())
        for word in words.split()
    }
    assert "command" in named
    assert named <= CASES.keys()
    told = (ROOT / "docs" / "speed.md").read_text()
    assert all(f"`{name}`" in told for name in CASES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_quoted_table_is_that_of_the_result(page):
    text = page.read_text()
    for name in re.findall(r"<!-- python -m benchmarks --quote ([\w-]+) -->", text):
        assert record.markdown(name) in text, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(machine.gpu() is not None, reason="tries everything without a GPU")
def test_the_script_for_a_gpu_runs_dry_and_says_how_each_step_ended(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh"]
    refused = subprocess.run([*command, tmp_path / "no"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "sees no GPU; --dry tries everything without one" in refused.stderr
    subprocess.run([*command, "--dry", tmp_path / "out"], cwd=ROOT, env=environment, check=True, capture_output=True)
    steps = ("tests", "kernels-gpu", "command-gpu", "sweep-gpu")
    lines = (tmp_path / "out" / "steps.txt").read_text().splitlines()
    assert [line.partition(" after ")[0] for line in lines] == [f"{name}: exit code 0" for name in steps]
    for name in steps[1:]:
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["machine"]["packages"]["torch"]
    assert "skipped" in (tmp_path / "out" / "tests.txt").read_text()


def test_a_step_that_takes_too_long_is_ended_and_the_script_fails(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "GPU_SECONDS": "0"}
    found = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry", tmp_path], cwd=ROOT, env=environment, capture_output=True
    )
    assert found.returncode == 1
    assert "kernels-gpu: exit code 124" in (tmp_path / "steps.txt").read_text()


def test_without_a_gpu_its_cases_are_refused_in_one_sentence(tmp_path, capsys):
    assert main(["--gpu", "--work", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "benchmarks: command-gpu, kernels-gpu, sweep-gpu: expected a GPU, and torch sees none; "
        "the other cases need none\n"
    )


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["comand"])
    assert stopped.value.code == 2
    assert "no case is called comand" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="what a child begins with is Linux's")
def test_peak_memory_is_that_of_the_process_and_not_of_its_parent():
    script = (
        "import os; from benchmarks.processes import run\n"
        "held = bytearray(b'x' * 300_000_000)\n"
        "plain = os.wait4(os.posix_spawnp('true', ['true'], os.environ), 0)[2].ru_maxrss * 1024\n"
        "small = run(['true'])\n"
        "large = run(['python3', '-c', 'x = bytearray(b\"x\" * 100_000_000)'], ['true'])\n"
        "print(plain, small.peak, small.bound, large.peak, large.bound)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    plain, small, small_bound, large, large_bound = done.stdout.split()
    assert int(plain) > 300_000_000
    assert int(small) < 30_000_000
    assert 100_000_000 < int(large) < 300_000_000
    assert (small_bound, large_bound) == ("True", "False")


def test_a_command_that_fails_is_named_with_what_it_said(tmp_path):
    with pytest.raises(BenchmarkError, match=r"nowhere ; touch .* failed: cat: .*No such file"):
        run(["true"], ["cat", tmp_path / "nowhere"], ["touch", tmp_path / "after"])
    assert not (tmp_path / "after").exists()


def test_a_copy_without_a_sync_is_compared_only_with_ours_without_one(tmp_path, monkeypatch):
    job = command_cases.Job.prepared(llama(1, tiny=True), tmp_path)
    for option in (None, ("--no-sync",)):
        monkeypatch.setattr(command_cases, "unsynced", lambda _, option=option: option)
        pairs = {contender.name: contender.against for contender in job.both()}
        assert ("ablate-shards --no-sync" in pairs) == (option is not None)
        assert pairs["cp -r"] == "ablate-shards --no-sync"
        assert pairs["cp -r, then sync"] == "ablate-shards"


def test_the_option_that_leaves_the_sync_out_is_asked_of_the_command():
    told = subprocess.run([*TOOL, "ablate", "--help"], capture_output=True, text=True, check=True).stdout
    assert (unsynced("ablate") is not None) == ("--no-sync" in told)


def test_layouts_have_the_sizes_that_are_told():
    def size(layout):
        return sum(2 * torch.Size(shape).numel() for shape in layout.tensors.values())

    whole = qwen(tiny=False)
    assert 1.4e9 < size(whole) < 1.6e9
    assert sum(len(whole.writers(layer)) for layer in range(whole.layers)) == 48
    assert len(whole.shards()) == 1
    stacked = qwen(tiny=False, experts_bytes=2**31)
    assert 0 <= 2**31 - max(2 * torch.Size(shape).numel() for shape in stacked.tensors.values()) < 2**23
    scales = [size(llama(layers, tiny=False)) / 1e9 for layers in command_cases.SCALES]
    assert scales == pytest.approx([1, 2, 4, 8], rel=0.05)
    assert len(llama(53, tiny=False).shards()) == 5


class TestChecksCanFail:
    """What each check is for: a result that is wrong is found to be."""

    def test_an_edit_that_was_not_made(self, tmp_path, monkeypatch):
        monkeypatch.setattr(command_cases, "EAGER", ("sh", "-c", 'cp -r "$2" "$5"', "sh"))
        job = command_cases.Job.prepared(llama(2, tiny=True), tmp_path)
        (row,) = race([job.eager()], 1)
        assert "o_proj.weight" in row.wrong or "down_proj.weight" in row.wrong
        assert row.seconds == ()

    def test_an_edit_with_a_changed_byte(self, tmp_path):
        job = command_cases.Job.prepared(llama(2, tiny=True), tmp_path)
        ours = job.edit("ours")
        ours.run()
        assert ours.check() is None
        shard = shards(tmp_path / "out")[0]
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        assert ours.check() is not None

    def test_a_merge_that_was_not_made(self, tmp_path):
        layout = qwen(tiny=True)
        write(layout, tmp_path / "source")
        merge_cases.write_adapter(layout, tmp_path / "adapter")
        run([*EAGER, "merge", tmp_path / "source", tmp_path / "adapter", tmp_path / "out"])
        assert merge_cases.fault(layout, tmp_path / "source", tmp_path / "adapter", tmp_path / "out") is None
        told = merge_cases.fault(layout, tmp_path / "source", tmp_path / "adapter", tmp_path / "source")
        assert "of the elements are not the correctly rounded ones" in told

    def test_directions_of_another_dump(self, tmp_path):
        dump, out = tmp_path / "dump.safetensors", tmp_path / "out.safetensors"
        directions_cases.write_dump(dump, "F32", 2, 40, 8)
        run([*TOOL, "directions", dump, out, "--quiet"])
        assert directions_cases.fault(dump, out, 2) is None
        directions_cases.write_dump(dump, "F32", 2, 41, 8)
        assert "layer 0: direction is off by" in directions_cases.fault(dump, out, 2)

    def test_a_difference_that_is_none(self, tmp_path):
        layout = qwen(tiny=True)
        write(layout, tmp_path / "a")
        assert diff_cases.fault(layout, tmp_path / "a", tmp_path / "a", None) is None
        assert diff_cases.fault(layout, tmp_path / "a", tmp_path / "a", "ablation") == (
            "0 tensors are said to differ, and 8 do"
        )

    def test_a_transfer_of_other_bytes(self, tmp_path):
        with Server() as server:
            job = transfer_cases.Job(server, transfer_cases.one_shard(64, 2**17, 2**16), tmp_path, 2**16)
            write(job.layout, job.source)
            folder, repository = job.ablations()
            shutil.copytree(job.source, job.out)
            assert "ablation.json" in folder.check()
            server.hub.add(transfer_cases.TARGET, job.out)
            assert repository.check() is None
            with shards(job.out)[0].open("ab") as shard:
                shard.write(b"more")
            server.hub.add(transfer_cases.TARGET, job.out)
            assert repository.check() == "the repository does not hold the bytes of the folder"

    def test_values_that_are_a_unit_off(self):
        exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
        found = exact.bfloat16()
        assert checks.against_exact(found, exact) is None
        found[:2] += 0.01
        assert checks.against_exact(found, exact) == "0.20% of the elements are not the correctly rounded ones"

    def test_bits_that_change_from_run_to_run(self):
        counts = iter(range(100))
        with Pool(torch.ones(1, 4, 4), 1, 0) as pool:
            steady = pool.each(lambda _, target: target.mul_(2))
            steady()
            assert pool.repeats(steady) is None
            drifting = pool.each(lambda _, target: target.add_(next(counts) // 5))
            pool.restore()
            drifting()
            assert pool.repeats(drifting) == "run 6 of 10 on the same weights gives other bits"


def test_the_line_goes_through_every_run(tmp_path):
    races = []
    for size in (1, 2, 4):
        bench = Bench(tmp_path, runs=2, tiny=False, show=lambda _: None)
        races.append(bench.race(str(size), [scripted("ours", [size + 0.4, size + 0.6])], size=size * 10**9))
    assert command_cases.fit(races, "ours") == pytest.approx((1.0, 0.5))


def test_the_chart_is_drawn_from_the_result_and_the_same_every_time(tmp_path):
    def measure(bench):
        for size in (1, 2):
            ours = scripted(command_cases.SYNCED, [size, size], peak=10**7)
            copy = scripted(command_cases.SYNCED_COPY, [size, size], against=command_cases.SYNCED, peak=10**6)
            bench.race(str(size), [ours, copy], size=size * 10**9)

    case = replace(CASES["scaling"], measure=measure)
    bench = Bench(tmp_path, runs=2, tiny=False, show=lambda _: None)
    case.measure(bench)
    (tmp_path / "scaling.json").write_text(json.dumps(record.as_dict(case, bench, {})))
    chart = tmp_path / "scaling.svg"
    record.draw(chart, tmp_path)
    drawn = chart.read_bytes()
    assert b"<svg" in drawn
    record.draw(chart, tmp_path)
    assert chart.read_bytes() == drawn


def test_a_result_that_was_never_measured_is_missed_by_name(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no result of command; measure it with `python -m benchmarks command"):
        record.markdown("command", tmp_path)


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fails(key):
        raise real.NotHere(f"{key}: cannot be downloaded")

    monkeypatch.setattr(real, "build", fails)

    assert main(["evaluate", "--work", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "benchmarks: qwen: cannot be downloaded\n"
