"""From Hub to Hub against from Hub to a folder: time, peak memory, peak disk, and how often the source is fetched.

The Hub is the small server of the tests, on localhost, with the real client: times are the machine's and not a
network's. Uploads go through LFS in parts. The checkpoint is one shard, half of it or more a single matrix that is
edited. The folder is verified, and the writers of the first and the last layer are compared with the definition in
float64; the repository must have the digest of that folder's shard.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import checks
from benchmarks.cases.merge import RANK, fault, write_adapter
from benchmarks.checkpoints import Layout, shards, write, write_directions
from benchmarks.harness import Bench, Contender, Sample, amount, case
from benchmarks.processes import TOOL, Command, remove, run

if TYPE_CHECKING:
    from tests.hub.hub_server import Server

__all__: list[str] = []

SOURCE, TARGET = "org/model", "me/model"
TO_FOLDER, TO_HUB = "to a folder", "to the Hub"
#: The large matrix is in none of the layers that are compared.
LAYERS, SOURCE_LAYER, LARGE_LAYER = 4, 2, 1


@case("transfer", runs=1, long=True)
def transfer(bench: Bench) -> None:
    """Ablation and merge of 2 and 4 GB from Hub to Hub through LFS, against the same into a folder."""
    from tests.hub.hub_server import Server

    hidden, unit, part = (64, 2**16, 2**16) if bench.tiny else (4096, 2**30, 2**26)
    with Server() as server:
        for size, largest in ((2, 1),) if bench.tiny else ((2, 1), (4, 3)):
            job = Job(server, one_shard(hidden, size * unit, largest * unit), bench.work / str(size), part)
            total = write(job.layout, job.source)
            title = f"{amount(total)}, a matrix of {amount(largest * unit)} in it"
            bench.race(f"ablate, {title}", job.ablations(), size=total)
            bench.race(f"merge, rank {RANK}, {title}", job.merges(), size=total)
            remove(job.work)


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint, the Hub that has it, and the folder that a command runs in.

    Attributes:
        server: Runs the Hub.
        layout: What the checkpoint consists of.
        work: Where it lies.
        part: Bytes of a part of an upload.
    """

    server: "Server"
    layout: Layout
    work: Path
    part: int

    @property
    def source(self) -> Path:
        """What the Hub has."""
        return self.work / "source"

    @property
    def here(self) -> Path:
        """The folder that a command runs in, and all the disk that it takes."""
        return self.work / "here"

    @property
    def out(self) -> Path:
        """What a command writes where it writes to a folder."""
        return self.here / "out"

    def ablations(self) -> list[Contender]:
        """Returns an ablation to a folder and to the Hub."""
        directions = self.work / "directions.safetensors"
        write_directions(self.layout, directions)
        how: list[str | Path] = ["-d", directions, "--source-layer", str(SOURCE_LAYER), "--quiet"]
        return self._both(
            lambda out: ["ablate", SOURCE, out, *how],
            lambda: checks.verified(self.source, self.out),
            lambda: checks.edit(self.layout, self.source, directions, SOURCE_LAYER, self.out),
        )

    def merges(self) -> list[Contender]:
        """Returns a merge to a folder and to the Hub."""
        adapter = self.work / "adapter"
        write_adapter(self.layout, adapter)
        return self._both(
            lambda out: ["merge", SOURCE, adapter, out, "--quiet"],
            lambda: checks.verified(self.source, self.out, "--adapter", str(adapter)),
            lambda: fault(self.layout, self.source, adapter, self.out),
        )

    def _both(self, command: Callable[[str], Command], *right: Callable[[], str | None]) -> list[Contender]:
        digests: list[str | None] = []

        def of_folder() -> str | None:
            with shards(self.out)[0].open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
            return checks.first_of(right)

        def of_repository() -> str | None:
            found = [blob.sha256 for name, blob in self.server.hub.repos[TARGET].files().items() if name in names]
            return None if found == digests else "the repository does not hold the bytes of the folder"

        names = {shard.name for shard in shards(self.source)}
        return [
            self._contender(TO_FOLDER, command(self.out.name), of_folder, against=TO_HUB),
            self._contender(TO_HUB, command(f"hub:{TARGET}"), of_repository),
        ]

    def _contender(
        self, name: str, command: Command, check: Callable[[], str | None], *, against: str | None = None
    ) -> Contender:
        return Contender(name, lambda: self._run(command), against, check, self._prepare, lambda: remove(self.here))

    def _prepare(self) -> None:
        """Makes the Hub and the folder what they were before any run."""
        hub = self.server.fresh()
        hub.add(SOURCE, self.source)
        hub.multipart_above, hub.part_size = 0, self.part
        self.here.mkdir()

    def _run(self, command: Command) -> Sample:
        hub, here = self.server.hub, str(self.here)
        disk: list[int] = []
        hub.watch = lambda _: disk.append(on_disk(self.here))
        environment = {
            **hub.environment,
            "HF_TOKEN": "hf_writer",
            **dict.fromkeys(("HF_HOME", "HOME", "TMPDIR"), here),
        }
        sample = run([*TOOL, *command], folder=self.here, environment=environment)
        return replace(sample, disk=max([*disk, on_disk(self.here)]), fetched=hub.sent("GET /blob/"))


def one_shard(hidden: int, size: int, largest: int) -> Layout:
    """Returns a layout of eight writers, one of them large, and an embedding that fills its one shard up.

    Args:
        hidden: Its hidden size.
        size: Bytes of the shard.
        largest: Bytes of the largest matrix.
    """
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{writer}.weight": (hidden, hidden)
        for layer in range(LAYERS)
        for writer in ("self_attn.o_proj", "mlp.down_proj")
    }
    tensors[f"model.layers.{LARGE_LAYER}.mlp.down_proj.weight"] = (hidden, largest // (2 * hidden))
    edited = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    tensors["model.embed_tokens.weight"] = ((size - edited) // (2 * hidden), hidden)
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": LAYERS}
    return Layout(hidden, LAYERS, tensors, config, "model-{:05d}-of-{:05d}.safetensors", size)


def on_disk(folder: Path) -> int:
    """Returns the bytes of disk that the files below a folder take, while others write and remove some."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = (Path(parent) / name).stat()
                if sys.platform == "win32":
                    size += found.st_size
                else:
                    size += found.st_blocks * 512
    return size
