"""On filesystems that can share blocks between files, only what is edited takes space."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from command_line import checked
from raw_checkpoints import llama_tensors, snapshot, write_directions, write_shard

FILLER_BYTES = 48 << 20


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request, tmp_path):
    """A filesystem of 320 MiB in a file, mounted."""
    make = shutil.which(f"mkfs.{request.param}", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if make is None or os.geteuid() != 0:
        pytest.skip(f"needs root and mkfs.{request.param}")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(320 << 20)
    folder.mkdir()
    subprocess.run([make, "-q", image], check=True, capture_output=True)
    mount = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"mount: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def used(folder):
    os.sync()
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def write_source(path):
    """One shard, most of it a tensor that no edit touches."""
    filler = np.random.default_rng(0).standard_normal(FILLER_BYTES // 2)
    write_shard(path, llama_tensors() | {"visual.filler": filler})
    return path


def test_blocks_are_shared_and_only_edits_take_space(mounted, tmp_path):
    source = write_source(mounted / "source.safetensors")
    directions = write_directions(tmp_path / "d.safetensors")
    before, content = used(mounted), source.read_bytes()
    checked(source, mounted / "out", "-d", directions, "--source-layer", 1)
    taken = used(mounted) - before

    shutil.copy(source, tmp_path / "source.safetensors")
    checked(tmp_path / "source.safetensors", tmp_path / "out", "-d", directions, "--source-layer", 1)
    assert snapshot(mounted / "out") == snapshot(tmp_path / "out")
    assert source.read_bytes() == content != (mounted / "out" / "source.safetensors").read_bytes()
    checked("verify", source, mounted / "out")
    assert taken < FILLER_BYTES / 4


# A Btrfs as small as this one says that space is free which it cannot give.
@pytest.mark.parametrize("mounted", ["xfs"], indirect=True)
def test_a_disk_without_room_for_a_copy_is_enough(mounted, tmp_path):
    source = write_source(mounted / "source.safetensors")
    directions = write_directions(tmp_path / "d.safetensors")
    with (mounted / "full").open("wb") as file:
        while shutil.disk_usage(mounted).free > FILLER_BYTES * 3 // 4:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    assert shutil.disk_usage(mounted).free < source.stat().st_size
    checked(source, mounted / "out", "-d", directions, "--source-layer", 1)
    checked("verify", source, mounted / "out")


def test_elsewhere_it_is_refused(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source.safetensors")
    directions = write_directions(tmp_path / "d.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, FILLER_BYTES // 2))
    refused = checked(source, tmp_path / "out", "-d", directions, "--source-layer", 1, code=1)
    assert "needs 50.401 MB, but its disk has 25.166 MB free" in refused.output
    assert not list(tmp_path.glob("*out*"))
