"""Several processes share one output: the same bytes as one makes, for any number, whoever dies; and nothing before."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from coded_checkpoints import options as coded_options
from coded_checkpoints import write_basis, write_fp8
from command_line import checked, run
from hypothesis import given
from hypothesis import strategies as st
from raw_checkpoints import (
    flip,
    hidden,
    llama_tensors,
    snapshot,
    write_adapter,
    write_directions,
    write_llama,
    write_shard,
)

from ablate_shards.errors import UsageError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.edit import parts as parts_room
from ablate_shards.surgery.machine.ranks import WorkerRank, deal, find_rank
from ablate_shards.surgery.machine.staging import Staging

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "10"}
STEPS = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}
TASKS = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
SKY = {"SKYPILOT_NODE_RANK": "3", "SKYPILOT_NUM_NODES": "8"}
POD = {"JOB_COMPLETION_INDEX": "3"}
LAUNCHERS = [TORCHRUN, ARRAY, STEPS | {"SLURM_ARRAY_TASK_STEP": "2"}, TASKS, SKY, POD | {"WORLD_SIZE": "8"}]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in {name for launcher in LAUNCHERS for name in launcher}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_variables_of_launchers(launcher):
    assert find_rank(None, None, launcher) == WorkerRank(3, 8)
    assert find_rank(None, 8, launcher) == WorkerRank(3, 8)
    assert find_rank(5, 6, launcher) == WorkerRank(5, 6)
    assert find_rank(None, 1, launcher) is None
    assert find_rank(0, 1, launcher) is None


def test_which_launcher_counts():
    inner = {"RANK": "1", "WORLD_SIZE": "2"}
    assert find_rank(None, None, inner | ARRAY | TASKS | SKY | POD) == WorkerRank(1, 2)
    assert find_rank(None, None, ARRAY | TASKS | SKY) == WorkerRank(3, 8)
    # One task of a launcher is no news, and another launcher may have started it.
    one = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert find_rank(None, None, one) is None
    assert find_rank(None, None, one | SKY) == WorkerRank(3, 8)
    # An indexed job says which, and the option of how many.
    assert find_rank(None, 8, POD) == WorkerRank(3, 8)
    assert find_rank(2, None, {"WORLD_SIZE": "8"}) == WorkerRank(2, 8)


@pytest.mark.parametrize("environment", [{}, {"RANK": "captain"}, {"WORLD_SIZE": "8"}, POD, {"SLURM_PROCID": "1"}])
def test_half_of_a_pair_means_nothing(environment):
    assert find_rank(None, None, environment) is None


@pytest.mark.parametrize(
    ("index", "count", "environment", "words"),
    [
        (3, None, {}, "--worker-rank 3 is one of how many? add --world-size N"),
        (None, 8, {}, "--world-size 8: which of them is this one? add --worker-rank I, from 0 to 7"),
        (None, 4, TORCHRUN, "no variable of a launcher of 4 says so"),
        (8, 8, {}, "expected a rank from 0 to 7, found 8"),
        (8, 10**12, {}, "expected at most 65536 ranks, found 1000000000000"),
        (1, 1, {}, "expected a rank from 0 to 0, found 1"),
        (None, None, TORCHRUN | {"RANK": "8"}, "RANK and WORLD_SIZE: expected a rank from 0 to 7, found 8"),
        (None, None, TORCHRUN | {"RANK": "x"}, "RANK=x: expected a whole number; unset it"),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": "40"}, "expected a rank from 0 to 7, found 30"),
    ],
)
def test_what_cannot_be_a_rank(index, count, environment, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        find_rank(index, count, environment)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=20), st.integers(1, 9))
def test_everything_is_dealt_out_once_and_evenly(work, count):
    dealt = deal(work, count)
    assert len(dealt) == count
    assert sorted(name for share in dealt for name in share) == sorted(work)
    assert dealt == deal(dict(reversed(work.items())), count)
    loads = [sum(work[name] for name in share) for share in dealt]
    assert max(loads) - min(loads) <= max(work.values(), default=0)


@pytest.fixture
def case(tmp_path):
    source = write_llama(tmp_path / "source", layers=6, shards=4, hidden=64)
    directions = write_directions(tmp_path / "d.safetensors", layers=6, hidden=64)
    arguments = ["ablate", source, tmp_path / "out", "-d", directions, "--source-layer", "2"]
    checked("ablate", source, tmp_path / "whole", *arguments[3:])
    return tmp_path, arguments


def part(arguments, index, count, *more):
    return run(*arguments, "--worker-rank", index, "--world-size", count, *more)


def all_parts(arguments, count, *more):
    for index in reversed(range(count)):
        result = part(arguments, index, count, *more)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_any_number_makes_the_same_bytes(case, count):
    folder, arguments = case
    before = snapshot(folder / "source")
    all_parts(arguments, count)
    if count > 1:
        assert not (folder / "out").exists()
        finished = checked("finish", folder / "out")
        assert "is complete, with ablation.json and 8 other files" in finished.stdout
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert snapshot(folder / "source") == before
    assert hidden(folder) == []
    assert run("verify", folder / "source", folder / "out").exit_code == 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launchers_variables_make_a_part(case, monkeypatch, launcher):
    folder, arguments = case
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    made = checked(*arguments, "--json")
    assert {"rank": 3, "world_size": 8}.items() <= json.loads(made.stdout).items()
    assert os.listdir(folder / ".out.ablate-ranks") == ["3-of-8"]
    assert not (folder / "out").exists()
    checked(*arguments, "--world-size", "1")
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_a_pod_of_unknown_many_does_all_and_says_so(case, monkeypatch):
    folder, arguments = case
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    said = checked(*arguments).stderr
    assert "JOB_COMPLETION_INDEX=3, but nothing says of how many, so that this pod does all of the work" in said
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    for more in (["-q"], ["--world-size", "1"], ["--world-size", "4"]):
        assert "of how many" not in checked(*arguments, "--overwrite", *more).stderr


@pytest.mark.parametrize("what", ["dequantise", "merge", "ablate codes", "ablate dequantised"])
def test_merging_and_dequantising_are_shared_too(tmp_path, what):
    if what == "merge":
        source = write_llama(tmp_path / "source", shards=3)
        words = ["merge", source, write_adapter(tmp_path / "adapter", layers=range(3))]
    else:
        words = [what.split()[0], write_fp8(tmp_path / "source")]
    more = []
    if words[0] == "ablate":
        write_basis(tmp_path, 256)
        more = coded_options(tmp_path, *(["--dequantise", "writers"] if what.endswith("dequantised") else []))
    checked(*words, tmp_path / "whole", *more)
    all_parts([*words, tmp_path / "out", *more], 3)
    assert not (tmp_path / "out").exists()
    checked("finish", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


KILLED = """
import os, signal, sys
from ablate_shards.cli import main
from ablate_shards.surgery.machine.staging import Staging

record = Staging.record

def killing(self, shard, content):
    record(self, shard, content)
    os.kill(os.getpid(), signal.SIGKILL)

Staging.record = killing
main(sys.argv[1:])
"""


def test_a_single_file_and_files_that_are_called_as_receipts_are(tmp_path):
    source = write_llama(tmp_path / "source", shards=2)
    (source / "extra" / "merge.json").write_text("{}")
    directions = write_directions(tmp_path / "d.safetensors")
    single = tmp_path / "single.safetensors"
    write_shard(single, llama_tensors())
    for place in (source, single):
        checked("ablate", place, tmp_path / "whole", "-d", directions, "--overwrite")
        all_parts(["ablate", place, tmp_path / "out", "-d", directions, "--overwrite"], 2)
        checked("finish", tmp_path / "out", "--overwrite")
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_rank_that_is_killed_goes_on_with_the_same_command(case, monkeypatch):
    folder, arguments = case
    command = [sys.executable, "-c", KILLED, *map(str, arguments), "--worker-rank", "0", "--world-size", "2"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert part(arguments, 1, 2).exit_code == 0
    refused = run("finish", folder / "out")
    assert refused.exit_code == 1
    assert "rank 0 of 2 is not complete" in refused.stderr
    again, record = [], Staging.record
    monkeypatch.setattr(Staging, "record", lambda self, *what: (again.append(what[0]), record(self, *what)))
    # What the error says to run is what is missing, and what was complete is not made again.
    words = re.search(r"run `ablate-shards (.+?)`", refused.stderr)[1]
    checked(*shlex.split(words))
    assert len(again) == 1
    assert "it was complete already" in part(arguments, 0, 2).stderr
    checked("finish", folder / "out")
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_a_rank_that_is_run_twice_at_once_is_done_once(case, monkeypatch):
    folder, arguments = case
    refused, record = [], Staging.record

    def record_and_run_again(staging, *what):
        if not refused:
            refused.append(part(arguments, 0, 2))
        record(staging, *what)

    monkeypatch.setattr(Staging, "record", record_and_run_again)
    all_parts(arguments, 2)
    assert refused[0].exit_code == 1
    assert "another run is writing it; wait for that run to end" in refused[0].stderr
    checked("finish", folder / "out")
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_what_is_missing_is_named(case):
    folder, arguments = case
    nothing = run("finish", folder / "out")
    assert nothing.exit_code == 1
    assert "no rank is complete in" in nothing.stderr
    part([*arguments, "--overwrite", "--worker-rank=0"], 2, 5)
    missing = run("finish", folder / "out")
    assert "ranks 0, 1, 3, 4 of 5 are not complete" in missing.stderr
    assert "-source-layer 2 --overwrite --worker-rank 0 --world-size 5` and the same for the others" in missing.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize("different", ["plan", "source", "number", "command"])
def test_ranks_that_do_not_do_the_same(case, different):
    folder, arguments = case
    assert part(arguments, 0, 2).exit_code == 0
    other, count = arguments, 2
    if different == "plan":
        other = [*arguments, "--coefficient", "2"]
        words = "the plan"
    elif different == "source":
        os.utime(folder / "source" / "tokenizer.json", ns=(1, 1))
        words = "the source"
    elif different == "number":
        count, words = 3, "the number of ranks"
    else:
        adapter = write_adapter(folder / "adapter", layers=range(3), hidden=64)
        other = ["merge", arguments[1], adapter]
        words = "the command and the plan"
    into = (lambda out: [*other, out]) if different == "command" else (lambda out: [*other[:2], out, *other[3:]])
    refused = part(into(folder / "out"), 1, count)
    assert refused.exit_code == 1
    assert f"rank 0 of 2 is of another run, which differs in {words};" in refused.stderr
    assert refused.stderr.count("error:") == 1
    # What is thrown away is only what does not fit.
    all_parts([*into(folder / "out"), "--overwrite"], count)
    checked("finish", folder / "out")
    checked(*into(folder / "fresh"))
    assert snapshot(folder / "out") == snapshot(folder / "fresh")


def test_parts_that_do_not_fit_are_not_joined(case, monkeypatch):
    folder, arguments = case
    parts = folder / ".out.ablate-ranks"
    all_parts(arguments, 2)
    (parts / "1-of-2").rename(folder / "aside")
    subprocess.run(["cp", "-r", parts / "0-of-2", folder / "first"], check=True)
    subprocess.run(["rm", "-r", parts], check=True)
    all_parts([*arguments, "--coefficient", "2"], 2)
    subprocess.run(["rm", "-r", parts / "1-of-2"], check=True)
    (folder / "aside").rename(parts / "1-of-2")
    refused = run("finish", folder / "out")
    assert refused.exit_code == 1
    assert "rank 1 of 2 does not fit rank 0 of 2: they differ in the plan;" in refused.stderr
    # Another arithmetic may give other bits.
    subprocess.run(["rm", "-r", parts / "0-of-2"], check=True)
    (folder / "first").rename(parts / "0-of-2")
    subprocess.run(["rm", "-r", parts / "1-of-2"], check=True)
    monkeypatch.setattr("ablate_shards.surgery.edit.blocks.BlockEditor.identity", lambda self: {"device": "cuda"})
    assert part(arguments, 1, 2).exit_code == 0
    refused = run("finish", folder / "out")
    assert 'they differ in "device" in the receipt;' in refused.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize("complete", [True, False])
def test_what_another_arithmetic_computed_is_made_again_when_asked(case, monkeypatch, complete):
    folder, arguments = case
    with monkeypatch.context() as patch:
        identity = "ablate_shards.surgery.edit.blocks.BlockEditor.identity"
        patch.setattr(identity, lambda self: {"device": "cuda", "form": "triton"})
        if not complete:
            patch.setattr("ablate_shards.surgery.edit.folder.check_unchanged", lambda _: (_ for _ in ()).throw(OSError))
        assert (part(arguments, 0, 2).exit_code == 0) == complete
    assert part(arguments, 1, 2).exit_code == 0
    again = part(arguments, 0, 2)
    if complete:
        assert 'they differ in "device" in the receipt;' in run("finish", folder / "out").stderr
    else:
        assert "cannot be resumed, because the device and the form changed" in again.stderr
    assert "it was complete already" not in part(arguments, 0, 2, "--overwrite").stderr
    assert "it was complete already" in part(arguments, 0, 2, "--overwrite").stderr
    assert "it was complete already" in part(arguments, 1, 2, "--overwrite").stderr
    checked("finish", folder / "out")
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_what_is_wrong_with_a_part(case):
    folder, arguments = case
    all_parts(arguments, 2)
    parts = folder / ".out.ablate-ranks"
    receipt = parts / "1-of-2" / "ablation.json"
    whole = receipt.read_text()
    # What all receipts have in common is megabytes for a large model, and is not kept once a rank.
    assert "receipt" not in json.loads(whole)
    assert "receipt" in json.loads((parts / "0-of-2" / "ablation.json").read_text())
    for text, words in (
        (whole.replace('"rank": 1', '"rank": 0'), "was changed after it was written; remove"),
        ("{}", "is not what a rank wrote"),
        (whole.replace('"rank": 1', '"rank": "x"'), "is not what a rank wrote"),
        (whole.replace('"count": 2', '"count": 200000000000'), "expected a number of ranks, found 200000000000"),
        (whole.replace('"model-', '"../model-'), "was changed after it was written; remove"),
    ):
        receipt.write_text(text)
        assert words in run("finish", folder / "out").stderr
    receipt.write_text(whole)
    shard = next((parts / "1-of-2").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"{shard}: has {len(content) - 1} bytes, expected {len(content)}" in run("finish", folder / "out").stderr
    shard.unlink()
    assert f"{shard}: is gone, although its rank is complete" in run("finish", folder / "out").stderr
    shard.write_bytes(content)
    checked("finish", folder / "out")
    assert snapshot(folder / "out") == snapshot(folder / "whole")


@pytest.mark.parametrize("moved", [0, 1, 4, 8])
def test_finish_goes_on_where_it_was_stopped(case, monkeypatch, moved):
    folder, arguments = case
    all_parts(arguments, 3)
    replace, left = Path.replace, [moved]

    def stopping(self, target):
        if ".out.ablate-ranks" in str(self):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    if moved == 8:
        monkeypatch.setattr(parts_room, "write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = run("finish", folder / "out")
    assert stopped.exit_code == 1
    assert "interrupted; finish again to go on" in stopped.stderr
    assert not (folder / "out").exists()
    monkeypatch.undo()
    checked("finish", folder / "out")
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert hidden(folder) == []


#: A `finish` that is killed when it removes a folder: before it does anything, or when a file of it is gone.
KILLED_TIDYING_UP = """
import os, shutil, signal, sys
from pathlib import Path
from ablate_shards.cli import main
from ablate_shards.surgery.machine import parts

def killing(path, **_):
    if not Path(path).is_dir():
        return
    if sys.argv[1] == "half":
        # Its first file, by which a rank is known to be complete.
        next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "not begun":
    from ablate_shards.surgery.hub import ranks
    from ablate_shards.surgery.capture import ranks as captured
    ranks.remove_joined = captured.remove_joined = lambda _: os.kill(os.getpid(), signal.SIGKILL)
else:
    parts.shutil.rmtree = killing
main(sys.argv[2:])
"""


def killed_tidying_up(when, out):
    command = [sys.executable, "-c", KILLED_TIDYING_UP, when, "finish", str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("when", ["not begun", "begun", "half"])
def test_finish_that_had_only_to_tidy_up_tidies_up(case, when):
    folder, arguments = case
    all_parts(arguments, 2)
    killed_tidying_up(when, folder / "out")
    assert hidden(folder) == [".out.ablate-ranks" if when == "not begun" else ".out.ablate-joined"]
    assert "is complete" in checked("finish", folder / "out").stdout
    assert hidden(folder) == []
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert "no rank is complete in" in run("finish", folder / "out").stderr


def test_what_is_left_of_an_earlier_run_is_not_taken_for_the_end_of_this(case):
    folder, arguments = case
    all_parts(arguments, 2)
    killed_tidying_up("half", folder / "out")
    part([*arguments, "--overwrite"], 0, 2)
    assert "rank 1 of 2 is not complete" in run("finish", folder / "out").stderr
    part([*arguments, "--overwrite"], 1, 2)
    checked("finish", folder / "out", "--overwrite")
    assert hidden(folder) == []
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_finish_that_had_only_to_give_the_name_gives_it(case, monkeypatch):
    folder, arguments = case
    all_parts(arguments, 2)
    with monkeypatch.context() as patch:
        patch.setattr("ablate_shards.surgery.machine.staging.name_folder", lambda *_: (_ for _ in ()).throw(OSError))
        assert run("finish", folder / "out").exit_code == 1
    assert not (folder / "out").exists()
    checked("finish", folder / "out")
    assert hidden(folder) == []
    assert snapshot(folder / "out") == snapshot(folder / "whole")


@pytest.mark.parametrize("stopped", [False, True])
def test_what_ranks_made_again_replaces_a_damaged_output_of_the_same_receipt(case, monkeypatch, stopped):
    folder, arguments = case
    all_parts(arguments, 2)
    checked("finish", folder / "out")
    flip(next((folder / "out").glob("*.safetensors")), -1)
    all_parts(arguments, 2, "--overwrite")
    assert "already exists; --overwrite replaces it" in run("finish", folder / "out").stderr
    if stopped:
        monkeypatch.setattr(parts_room, "write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "interrupted" in run("finish", folder / "out", "--overwrite").stderr
        monkeypatch.undo()
    checked("finish", folder / "out", "--overwrite")
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert hidden(folder) == []


def test_what_is_in_the_way_stays(case):
    folder, arguments = case
    all_parts(arguments, 2)
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        refused = run("finish", folder / "out", *more)
        assert refused.exit_code == 1
        assert "so it is not replaced; name another folder" in refused.stderr
    (folder / "out" / "thesis.txt").unlink()
    checked("finish", folder / "out")
    again = part([*arguments, "--coefficient", "2"], 0, 2)
    assert "already exists; --overwrite replaces it" in again.stderr
    all_parts([*arguments, "--coefficient", "2"], 2, "--overwrite")
    assert "already exists; --overwrite replaces it" in run("finish", folder / "out").stderr
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    checked("finish", folder / "out", "--overwrite")
    assert snapshot(folder / "out") != snapshot(folder / "whole")
    assert run("verify", folder / "source", folder / "out").exit_code == 0


def test_what_one_process_must_do(case):
    folder, arguments = case
    alone = run(*arguments, "--adapter", "--worker-rank", "0", "--world-size", "2")
    assert alone.exit_code == 2
    assert "an adapter is made by one process, and this is rank 0 of 2" in alone.stderr
    assert "a folder in a bucket" in run("finish", "memory://bucket").stderr
    assert hidden(folder) == []


def test_stages_of_a_recipe_are_whole(case, monkeypatch):
    folder, arguments = case
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    recipe = folder / "edit.toml"
    recipe.write_text(
        f'[source]\nsource = "{folder / "source"}"\nout = "{folder / "out"}"\n'
        f'[directions]\ndirections = "{arguments[4]}"\n[ablate]\nsource-layer = 2\n'
    )
    checked("run", recipe)
    assert snapshot(folder / "out").keys() >= snapshot(folder / "whole").keys()


def verified(folder, count, *more):
    """What each rank says of the whole, as its exit code and the JSON that it prints."""
    results = [
        run(
            "verify", folder / "source", folder / "whole", "--json", *more, "--worker-rank", rank, "--world-size", count
        )
        for rank in range(count)
    ]
    return [(result.exit_code, json.loads(result.stdout)) for result in results]


def test_ranks_verify_their_shares(case):
    folder, _ = case
    alone = json.loads(checked("verify", folder / "source", folder / "whole", "--json").stdout)
    shares = verified(folder, 3)
    for what in ("edited", "identical", "untouched_bytes"):
        assert sum(found[what] for _, found in shares) == alone[what]
    assert all(code == 0 and found["edited"] for code, found in shares)
    said = run("verify", folder / "source", folder / "whole", "--worker-rank", 1, "--world-size", 3).stdout
    assert f"the share of rank 1 of 3 in {folder / 'whole'} is what its receipt says" in " ".join(said.split())
    tensors = open_checkpoint(folder / "whole").tensors
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.5.mlp.up_proj.weight", "tokenizer.json"):
        tensor = tensors.get(name)
        path = folder / "whole" / (tensor.shard if tensor else name)
        flip(path, tensor.start + 101 if tensor else 0, 6)
        shares = verified(folder, 3)
        assert [each["where"] for _, found in shares for each in found["differences"]] == [name]
        assert sorted(code for code, _ in shares) == [0, 0, 1]
        assert tensor or shares[0][0] == 1
        flip(path, tensor.start + 101 if tensor else 0, 6)


def test_ranks_verify_what_was_dequantised(tmp_path):
    source = write_fp8(tmp_path / "source")
    checked("dequantise", source, tmp_path / "whole")
    alone = json.loads(checked("verify", source, tmp_path / "whole", "--json").stdout)
    shares = verified(tmp_path, 2)
    assert [code for code, _ in shares] == [0, 0]
    assert sum(found["dequantised"] for _, found in shares) == alone["dequantised"] > 0


def test_what_one_process_must_verify(case):
    folder, _ = case
    (folder / "texts.txt").write_text("Hello.\n")
    ranks = ("--worker-rank", 0, "--world-size", 2)
    refused = run("verify", folder / "source", folder / "whole", "--run", folder / "texts.txt", *ranks)
    assert refused.exit_code == 2
    assert "--run runs the models by one process, and this is rank 0 of 2" in refused.stderr
