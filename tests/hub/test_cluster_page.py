"""What docs/howto/cluster.md tells to type is typed: scripts and manifest, with stand-ins for what is not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub.object_store import fill, held
from raw_checkpoints import hidden, snapshot, write_directions, write_llama

from ablate_shards.surgery.machine.ranks import find_rank

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "howto" / "cluster.md").read_text(encoding="utf-8")

#: As SLURM's own: tells the number of the job, runs the script once for each task of its array, in that order.
SBATCH = """#!/usr/bin/env python3
import os, re, subprocess, sys

words = sys.argv[1:]
wrapped = [word.removeprefix("--wrap=") for word in words if word.startswith("--wrap=")]
if wrapped:
    assert "--dependency=afterok:77" in words, words
    sys.exit(subprocess.run(["bash", "-c", wrapped[0]]).returncode)
text = open(words[-1]).read()
first, last = map(int, re.search(r"^#SBATCH --array=(\\d+)-(\\d+)$", text, re.M).groups())
given = {"SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_MAX": last, "SLURM_ARRAY_TASK_COUNT": last - first + 1,
         "SLURM_ARRAY_TASK_STEP": 1, "SLURM_PROCID": 0, "SLURM_NTASKS": 1,
         "SLURM_CPUS_PER_TASK": re.search(r"--cpus-per-task=(\\d+)", text)[1]}
for task in range(first, last + 1):
    environment = os.environ | {name: str(value) for name, value in (given | {"SLURM_ARRAY_TASK_ID": task}).items()}
    subprocess.run(["bash", words[-1]], env=environment, check=True, stdout=sys.stderr)
print(77)
"""


def blocks(heading):
    """The blocks of code below a heading of the page."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```\w+\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a model and its directions, and the programs that the page names."""
    write_llama(tmp_path / "model", layers=6, shards=9, hidden=64)
    write_directions(tmp_path / "directions.safetensors", layers=6, hidden=64)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("ablate-shards", f'#!/bin/sh\nexec {sys.executable} -m ablate_shards "$@"\n'),
        ("torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'),
        ("sbatch", SBATCH),
        ("kubectl", '#!/bin/sh\necho "$@" >> kubectl.log\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    bash("ablate-shards model plain -d directions.safetensors")
    return tmp_path


def bash(script, **environment):
    done = subprocess.run(
        ["bash", "-euc", script], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_xargs(desk, s3):
    s3.rm("bucket/model", recursive=True)
    fill(s3, "bucket/model", desk / "model")
    bash("ablate-shards s3://bucket/model s3://bucket/plain -d directions.safetensors")
    (script,) = blocks("One machine: xargs")
    assert "rank 7 of 8" in bash(script)
    assert held(s3, "bucket/model-edited") == held(s3, "bucket/plain")


def test_torchrun(desk):
    script, on_gpus = blocks("torchrun")
    assert "this is rank 3 of 4, as RANK and WORLD_SIZE say" in bash(script)
    assert snapshot(desk / "out") == snapshot(desk / "plain")
    assert hidden(desk) == []
    bash("rm -r out")
    bash(on_gpus.replace("cuda:$LOCAL_RANK", "cpu").replace("node 4", "node 2"))
    assert len(list((desk / ".out.ablate-ranks").iterdir())) == 2


def test_slurm(desk):
    job, submission = blocks("SLURM")
    (desk / "ablate.sbatch").write_text(job)
    said = bash(submission)
    assert said.count("as SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT say") == 8
    assert snapshot(desk / "out") == snapshot(desk / "plain")
    assert hidden(desk) == []


def test_kubernetes(desk, s3):
    s3.rm("bucket/model", recursive=True)
    fill(s3, "bucket/model", desk / "model")
    bash("ablate-shards s3://bucket/model s3://bucket/plain -d directions.safetensors")
    manifest, script = blocks("Kubernetes")
    job = yaml.safe_load(manifest)
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # which backoffLimitPerIndex asks for
    given = {each["name"]: each["value"] for each in container["env"]}
    assert given == {"WORLD_SIZE": str(job["spec"]["completions"])}
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert container["workingDir"] == mounted["scratch"]
    words = [word.replace(mounted["input"], str(desk)) for word in container["command"]]
    pods = 3  # all eight would take as long again, and tell no more
    for index in range(pods):
        environment = os.environ | given | {"JOB_COMPLETION_INDEX": str(index), "WORLD_SIZE": str(pods)}
        scratch = desk / f"scratch-{index}"
        scratch.mkdir()
        subprocess.run(words, env=environment, cwd=scratch, check=True, capture_output=True)
        assert list(scratch.iterdir()) == []
    assert held(s3, "bucket/model-edited") == {}
    bash(script)
    assert (desk / "kubectl.log").read_text().startswith("apply -f ablate.yaml\nwait --for=condition=complete")
    assert held(s3, "bucket/model-edited") == held(s3, "bucket/plain")


def test_the_hub(desk, hub, monkeypatch):
    monkeypatch.chdir(desk)
    hub.add("org/model", desk / "model")
    environment = hub.environment | {"HF_TOKEN": "hf_writer"}
    bash("ablate-shards org/model hub:you/model-edited -d directions.safetensors", **environment)
    (script,) = blocks("A repository on the Hub")
    assert "rank 3 of 4" in bash(script, **environment)
    made, plain = (
        {name: blob.data for name, blob in hub.repos[repo].files().items() if name != "README.md"}
        for repo in ("me/model-edited", "you/model-edited")
    )
    assert made == plain
    assert list(hub.repos["me/model-edited"].refs) == ["main"]
    assert hidden(desk) == []


def test_the_table_of_variables_is_the_code_s():
    (table,) = re.findall(r"^\| started by .*\n(?:\|.*\n)+", PAGE, flags=re.MULTILINE)
    rows = [re.findall(r"`([A-Z_]+)`", line) for line in table.splitlines()[2:]]
    names = [(names[0], names[-1]) for names in rows]
    everything = {name: value for index, count in names for name, value in ((count, "8"), (index, "3"))}
    for index, count in names:
        assert find_rank(None, None, everything).said_by == f"{index} and {count}"
        everything.pop(index)
    assert find_rank(None, None, everything) is None
