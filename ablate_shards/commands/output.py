"""What ``ablate`` and ``merge`` have in common: the options of an OUT, and how SOURCE and OUT are opened."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ablate_shards.commands.options import (
    COMMAND,
    as_json_flag,
    cache_flag,
    debug_flag,
    print_json,
    print_rank,
    private_flag,
    quiet_flag,
    rank_flags,
    rank_given,
    rank_record,
    resources,
    sync_flag,
)
from ablate_shards.terminal.progress import ScreenProgress, show_progress

if TYPE_CHECKING:
    from ablate_shards.surgery.hub.outputs import Prepared
    from ablate_shards.surgery.machine.ranks import WorkerRank

__all__ = ["OutputOptions", "made", "output_options"]

_OPTIONS = (
    resources,
    cache_flag,
    private_flag,
    click.option("--link", is_flag=True, help="Hard-link shards that stay as they are; they share their bytes."),
    sync_flag,
    rank_flags,
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--resume", is_flag=True, help="Go on with an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier run made."),
    as_json_flag,
    quiet_flag,
    debug_flag,
)


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the user said of OUT and of how to run; ``--help`` says what each option means."""

    device: str
    memory: int
    jobs: int | None
    cache: bool
    private: bool
    link: bool
    sync: bool
    worker_rank: int | None
    world_size: int | None
    dry_run: bool
    resume: bool
    overwrite: bool
    as_json: bool
    quiet: bool

    def show_progress(self) -> ScreenProgress:
        """Returns what shows how far the command has come, nothing where nobody would read it."""
        return show_progress(quiet=self.quiet or self.as_json)

    def check_for_adapter(self, out: Path | str) -> None:
        """Refuses an OUT in an object store, which no adapter is made in, and options that say nothing about one.

        Raises:
            UsageError: One does.
        """
        from ablate_shards.errors import UsageError
        from ablate_shards.surgery.checkpoint.stores import hub_repository

        if not isinstance(out, Path) and hub_repository(out) is None:
            raise UsageError(
                f"{out}: an adapter is made in a folder of this machine or in a repository; name one, such as "
                "hub:me/adapter, or copy the folder there"
            )
        if (rank := rank_given(self.worker_rank, self.world_size)) is not None:
            raise UsageError(
                f"--adapter: an adapter is made by one process, and this is {rank} ({rank.said_by}); leave them out, "
                "or add --world-size 1"
            )
        if self.link:
            raise UsageError("--link: an adapter holds no shard of SOURCE; leave it out")
        if self.device not in ("auto", "cpu"):
            raise UsageError(f"--device {self.device}: an adapter is computed on the CPU; leave it out")

    def prepare(
        self, source: Path | str, out: Path | str, inputs: Sequence[Path | None], progress: ScreenProgress
    ) -> "Prepared":
        """Opens SOURCE and checks OUT; what else is read may not lie in it.

        Raises:
            AblateError: SOURCE cannot be read, or OUT not be written.
        """
        from ablate_shards.surgery.checkpoint.hub_store import quieten_hub
        from ablate_shards.surgery.checkpoint.stores import hub_repository
        from ablate_shards.surgery.edit.operation import RunOptions
        from ablate_shards.surgery.hub.outputs import prepare

        run = RunOptions(
            device=self.device,
            memory=self.memory,
            jobs=self.jobs,
            resume=self.resume,
            overwrite=self.overwrite,
            link=self.link,
            sync=self.sync,
            rank=rank_given(self.worker_rank, self.world_size),
            command=click.get_current_context().meta.get(COMMAND, ()),
        )
        given = [path for path in inputs if path is not None]
        prepared = prepare(source, out, run, inputs=given, cache=self.cache, private=self.private, dry_run=self.dry_run)
        remote = prepared.checkpoint.remote
        if remote is not None and remote.revision:
            progress.note(f"{prepared.checkpoint.name} is commit {remote.revision}")
        if self.cache or hub_repository(out) is not None:
            quieten_hub(bars=self.quiet or self.as_json or not sys.stderr.isatty())
        return prepared

    def print_part(self, rank: "WorkerRank", out: Path | str, results: Mapping[str, Any]) -> None:
        """Prints what a rank did, and what ends the work of all."""
        if self.as_json:
            print_json({**made(out, None, results), **rank_record(rank)})
        elif not self.quiet:
            print_rank(rank, out)


def made(
    out: Path | str, url: str | None, results: Mapping[str, Any], *, kind: Literal["tensors", "modules"] = "tensors"
) -> dict[str, Any]:
    """Returns what ``--json`` prints of an OUT and of what was measured of its tensors, or an adapter's modules."""
    return {"out": url or str(out), kind: {name: dataclasses.asdict(found) for name, found in results.items()}}


def output_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of an OUT to a command, which gets them as ``output``."""
    names = [field.name for field in dataclasses.fields(OutputOptions)]

    @functools.wraps(command)
    def with_output(*args: Any, **given: Any) -> None:
        output = OutputOptions(**{name: given.pop(name) for name in names})
        command(*args, output=output, **given)

    for option in reversed(_OPTIONS):
        with_output = option(with_output)
    return with_output
