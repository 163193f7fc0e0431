"""The whole command against ``cp -r`` of the same checkpoint, equally durable: without a sync, and with one.

The source is in the page cache. ``ablate-shards`` syncs what it writes, so it is compared with ``cp -r`` and a sync
of that file system; with ``--no-sync`` it is compared with ``cp -r`` alone. Every byte of ours is verified before a
time is shown, and the writers of the first and the last layer are compared with the definition in float64.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ablate_shards.terminal.tables import counted
from benchmarks import checks
from benchmarks.checkpoints import Layout, fp8, llama, qwen, wide, write, write_directions
from benchmarks.harness import Bench, Contender, Race, amount, case, mebibytes
from benchmarks.processes import EAGER, TOOL, copying, remove, unsynced, writing

__all__ = ["SYNCED", "SYNCED_COPY", "fit"]

SYNCED, UNSYNCED, SYNCED_COPY = "ablate-shards", "ablate-shards --no-sync", "cp -r, then sync"
#: Of the layout with hidden 2048: 1, 2, 4 and 8 GB.
SCALES = (11, 25, 53, 109)


@dataclass(frozen=True, slots=True)
class Job:
    """An ablation of a checkpoint with random weights.

    Attributes:
        layout: What the checkpoint consists of.
        work: Where it lies.
        size: Bytes of its tensors.
        exact: Whether memory is enough to compare weights with the definition in float64, of a whole matrix.
    """

    layout: Layout
    work: Path
    size: int
    exact: bool = True

    @classmethod
    def prepared(cls, layout: Layout, work: Path) -> "Job":
        """Writes the checkpoint and its directions."""
        job = cls(layout, work, write(layout, work / "source"))
        write_directions(layout, job.directions)
        return job

    @property
    def title(self) -> str:
        """How much is edited of how much."""
        edited = sum(len(self.layout.writers(layer)) for layer in range(self.layout.layers))
        return f"{amount(self.size)}, {counted(self.layout.layers, 'layer')}, {counted(edited, 'tensor')} edited"

    @property
    def source(self) -> Path:
        """The checkpoint."""
        return self.work / "source"

    @property
    def out(self) -> Path:
        """What the edited one is called."""
        return self.work / "out"

    @property
    def directions(self) -> Path:
        """What is removed."""
        return self.work / "directions.safetensors"

    @property
    def source_layer(self) -> int:
        """The layer in the middle, whose direction is removed from every other."""
        return self.layout.layers // 2

    def fault(self) -> str | None:
        """Says what is wrong with the edited weights of the first and the last layer."""
        if not self.exact:
            return None
        return checks.edit(self.layout, self.source, self.directions, self.source_layer, self.out)

    def edit(self, name: str, *flags: str) -> Contender:
        """Returns the command of ours with more flags."""
        how: list[str | Path] = ["-d", self.directions, "--source-layer", str(self.source_layer), "--quiet", *flags]
        check = partial(checks.first_of, (lambda: checks.verified(self.source, self.out), self.fault))
        return writing(name, [*TOOL, "ablate", self.source, self.out, *how], self.out, check=check)

    def eager(self) -> Contender:
        """Returns the usual form: every shard loaded, edited in float32 and saved."""
        command: list[str | Path] = [*EAGER, "ablate", self.source, self.directions, str(self.source_layer), self.out]
        return writing("eager float32, then sync", command, self.out, against=SYNCED, sync=True, check=self.fault)

    def synced(self, *flags: str) -> list[Contender]:
        """Returns ours and ``cp -r``, both with a sync."""
        return [
            self.edit(SYNCED, *flags),
            copying(self.source, self.work / "copied", against=SYNCED, sync=True),
        ]

    def both(self) -> list[Contender]:
        """Returns ours and ``cp -r``, without a sync and with one."""
        without = unsynced("ablate")
        return [
            *([self.edit(UNSYNCED, *without)] if without else []),
            copying(self.source, self.work / "copied", against=UNSYNCED, sync=False),
            *self.synced(),
        ]


@case("command")
def command(bench: Bench) -> None:
    """Whole command, Qwen3.5-0.8B layout: 1.5 GB, 48 edited tensors."""
    job = Job.prepared(qwen(tiny=bench.tiny), bench.work)
    bench.race(job.title, [*job.both(), job.eager()], size=job.size)


@case("command-4gb")
def command_of_four_gigabytes(bench: Bench) -> None:
    """Whole command, Llama layout of 4 GB: 53 layers, hidden 2048, intermediate 4096, five shards."""
    job = Job.prepared(llama(3 if bench.tiny else 53, tiny=bench.tiny), bench.work)
    bench.race(job.title, job.both(), size=job.size)


@case("command-shards", long=True)
def command_of_shards(bench: Bench) -> None:
    """Whole command, 4 GB of that layout in many shards of 122 MB, and in one."""
    layout = llama(3 if bench.tiny else 53, tiny=bench.tiny)
    for shard_bytes in (100_000 if bench.tiny else 122_000_000, 1 << 62):
        cut = replace(layout, shard_bytes=shard_bytes)
        job = Job.prepared(cut, bench.work / "sharded")
        bench.race(f"{job.title}, {counted(len(cut.shards()), 'shard')}", job.both(), size=job.size)
        remove(job.work)


@case("command-codes", runs=3)
def command_of_codes(bench: Bench) -> None:
    """Whole command, 4 GB in FP8 blocks: the Llama layout with 106 layers, whose codes are chosen."""
    job = Job.prepared(fp8(llama(3 if bench.tiny else 106, tiny=bench.tiny)), bench.work)
    bench.race(job.title, job.both(), size=job.size)


@case("large-matrix", runs=5, long=True)
def large_matrix(bench: Bench) -> None:
    """Whole command, one shard that is nearly all one matrix, in bf16 and in FP8: in one job and in one per core."""
    for kind, layout in (("plain", wide(tiny=bench.tiny)), ("codes", fp8(wide(tiny=bench.tiny, width=16_384)))):
        work = bench.work / kind
        # Its edit is recomputed by one thread, byte for byte, when it is verified.
        job = replace(Job.prepared(layout, work), exact=False)
        title = f"{job.title}, one of {list(layout.tensors[layout.writers(0)[0]])}"
        edits = [job.edit("--jobs 1", "--jobs", "1"), job.edit("a job per core")]
        bench.race(
            title, [*edits, copying(job.source, work / "copied", against="a job per core", sync=True)], size=job.size
        )
        remove(work)


@case("memory-codes", runs=1, long=True)
def memory_of_codes(bench: Bench) -> None:
    """Peak memory of editing codes, with a fused-expert tensor of 2 GiB of FP8: in one job and in two."""
    layout = fp8(qwen(tiny=bench.tiny, experts_bytes=400_000 if bench.tiny else 2**32))
    job = Job.prepared(layout, bench.work)
    codes = max((name for name in layout.tensors if layout.dtype(name) == "F8_E4M3"), key=layout.size)
    title = f"{job.title}, one of {amount(layout.size(codes))}"
    edits = [job.edit(f"--jobs {jobs}", "--jobs", jobs) for jobs in ("1", "2")]
    copy = copying(job.source, bench.work / "copied", against="--jobs 2", sync=True)
    bench.race(title, [*edits, copy], size=job.size)


@case("scaling", runs=3, long=True)
def scaling(bench: Bench) -> None:
    """Whole command, synced, on 1, 2, 4 and 8 GB of that layout: time and memory against bytes."""
    for layers in (2, 3, 5) if bench.tiny else SCALES:
        work = bench.work / str(layers)
        job = Job.prepared(llama(layers, tiny=bench.tiny), work)
        bench.race(job.title, job.synced(), size=job.size)
        remove(work)
    for name in (SYNCED, SYNCED_COPY):
        rows = [found[name] for found in bench.races]
        if all(row.seconds for row in rows):
            slope, start = fit(bench.races, name)
            least, most = (mebibytes(choose(row.peak or 0 for row in rows)) for choose in (min, max))
            line = f"{slope:.3f} s per GB and {start:+.2f} s, least squares"
            bench.note(f"{name}: {line}; peak memory {least} to {most} MiB")


@case("memory", runs=1)
def memory(bench: Bench) -> None:
    """Peak memory at --memory 8MB, 64MB and 256MB, without and with a fused-expert tensor of 2 GiB."""
    for experts in (0, 200_000 if bench.tiny else 2**31):
        work = bench.work / str(experts)
        job = Job.prepared(qwen(tiny=bench.tiny, experts_bytes=experts), work)
        last = max(job.layout.tensors.values(), key=np.prod) if experts else None
        title = f"{job.title}{f', one of {list(last)}' if last else ''}"
        edits = [job.edit(f"--memory {size}", "--memory", size) for size in ("8MB", "64MB", "256MB")]
        copy = copying(job.source, work / "copied", against="--memory 256MB", sync=True)
        bench.race(title, [*edits, copy], size=job.size)
        remove(work)


@case("command-gpu", gpu=True)
def command_on_gpu(bench: Bench) -> None:
    """Whole command with the edits on a GPU, both layouts."""
    device = "cpu" if bench.tiny else "cuda"
    for layout in (qwen(tiny=bench.tiny), llama(3 if bench.tiny else 53, tiny=bench.tiny)):
        work = bench.work / layout.config["model_type"]
        job = Job.prepared(layout, work)
        bench.race(job.title, job.synced("--device", device), size=job.size)
        remove(work)


def fit(races: list[Race], contender: str) -> tuple[float, float]:
    """Returns the least-squares line through every run's time against bytes: seconds per GB, and seconds at 0."""
    points = np.array([((race.size or 0) / 1e9, seconds) for race in races for seconds in race[contender].seconds])
    slope, start = np.polyfit(points[:, 0], points[:, 1], 1)
    return float(slope), float(start)
