"""Computes what a job on a checkpoint costs on many machines, and says what limits it: CPU, network or store.

    python -m benchmarks.cluster                                    a table of cases
    python -m benchmarks.cluster --machines 16 --network 100        one case, in units of the options

Processes take their shards as ranks do. Each reads and edits a shard at the same time and then sends it; all that read
share what the store gives, and those of one machine share its network, each way by itself. The speed of a core, and the
memory of a process, are those of a measured case; network and store are assumptions, which the options change.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ablate_shards.surgery.machine.ranks import deal

__all__ = ["CASES", "Cluster", "Cost", "main", "measured", "simulate", "table"]

_RESULT = Path(__file__).parent / "results" / "command-4gb.json"
_GB = 10**9
_SHORTEST = 1e-9
_DIFFER, _GOLDEN = 0.1, 0.618034

Limit = Literal["CPU", "network", "store"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A job and the machines that do it.

    Attributes:
        job: ``edit`` reads and writes each shard once; ``capture`` streams all weights through every machine.
        total: Bytes of the checkpoint.
        shard: Bytes of a shard, in a file of its own.
        machines: How many.
        processes: Processes of each machine.
        cores: Cores of each machine.
        network: Bytes a second of each machine, each way.
        store: Bytes a second of the store for all machines, each way.
        core: Bytes a second that a core edits.
    """

    core: float
    job: Literal["edit", "capture"] = "edit"
    total: float = 1000 * _GB
    shard: float = 5 * _GB
    machines: int = 8
    processes: int = 4
    cores: int = 16
    network: float = 3.125 * _GB
    store: float = 10 * _GB


@dataclass(frozen=True, slots=True)
class Cost:
    """What a job costs.

    Attributes:
        seconds: From the first byte to the last.
        read: Bytes that the store gives.
        written: Bytes that it takes.
        limit: What holds up most bytes.
        share: Share of the time in which that holds up somebody.
    """

    seconds: float
    read: float
    written: float
    limit: Limit
    share: float


@dataclass(slots=True)
class _Process:
    """What one process has still to do: bytes to read and edit, or to send, shard by shard."""

    machine: int
    shards: list[float]
    size: float = 0.0
    left: float = 0.0
    sends: bool = False


def measured() -> tuple[float, int]:
    """Returns the bytes a second that a core edited, and the peak memory in bytes, of the whole command on 4 GB."""
    record = json.loads(_RESULT.read_text())
    table = record["tables"][0]
    row = next(row for row in table["rows"] if row["contender"] == "ablate-shards --no-sync")
    return table["bytes"] / row["median"] / record["machine"]["cores"], row["peak_bytes"]


def simulate(cluster: Cluster) -> Cost:
    """Follows all processes from event to event, each at the rate that the scarcest of what it uses gives it."""
    running = _processes(cluster)
    seconds, held = 0.0, dict.fromkeys(("CPU", "network", "store"), 0.0)
    while running:
        rates = [_rate(cluster, process, running) for process in running]
        step = max(min(process.left / rate for process, (rate, _) in zip(running, rates, strict=True)), _SHORTEST)
        for scarce in {limit for _, limit in rates}:
            held[scarce] += step
        for process, (rate, _) in zip(running, rates, strict=True):
            process.left -= rate * step
            if process.left <= rate * _SHORTEST:
                _go_on(cluster, process)
        running = [process for process in running if process.left > 0]
        seconds += step
    limit: Limit = max(("store", "network", "CPU"), key=lambda name: held[name])
    copies = 1 if cluster.job == "edit" else cluster.machines
    written = cluster.total if cluster.job == "edit" else 0.0
    return Cost(seconds, copies * cluster.total, written, limit, held[limit] / seconds)


def _processes(cluster: Cluster) -> list[_Process]:
    # Shards differ in size, here by a tenth each way, so that processes do not all read, and then all send.
    count = max(1, round(cluster.total / cluster.shard))
    weights = [1 + _DIFFER * (2 * (number * _GOLDEN % 1) - 1) for number in range(count)]
    sizes = {number: round(cluster.total * weight / sum(weights)) for number, weight in enumerate(weights)}
    if cluster.job == "capture":
        # Every machine computes its share of the prompts, and for that all weights go through it.
        shares = [frozenset(sizes)] * cluster.machines
    else:
        shares = list(deal(sizes, cluster.machines * cluster.processes))
    # Ranks go round the machines.
    started = [
        _Process(rank % cluster.machines, [float(sizes[shard]) for shard in sorted(share)])
        for rank, share in enumerate(shares)
        if share
    ]
    for process in started:
        process.size = process.left = process.shards.pop()
    return started


def _go_on(cluster: Cluster, process: _Process) -> None:
    """Gives a process what comes next; nothing is left where it is done."""
    process.sends = cluster.job == "edit" and not process.sends
    if not process.sends:
        process.size = process.shards.pop() if process.shards else 0.0
    process.left = process.size


def _rate(cluster: Cluster, process: _Process, running: Sequence[_Process]) -> tuple[float, Limit]:
    """Returns a process's bytes a second, and what they are limited by."""
    same = [other for other in running if other.sends == process.sends]
    here = sum(other.machine == process.machine for other in same)
    shares: dict[Limit, float] = {"store": cluster.store / len(same), "network": cluster.network / here}
    if cluster.job == "edit" and not process.sends:
        shares["CPU"] = cluster.core * cluster.cores / cluster.processes
    limit = min(shares, key=lambda name: shares[name])
    return shares[limit], limit


def _cases(core: float) -> dict[str, Cluster]:
    usual = Cluster(core)
    return {
        "edit": usual,
        "edit, one machine": replace(usual, machines=1),
        "edit, one process each": replace(usual, processes=1),
        "edit, store 100 GB/s": replace(usual, store=100 * _GB),
        "edit, store 100 GB/s, 100 Gbit/s each": replace(usual, store=100 * _GB, network=12.5 * _GB),
        "edit, the same with 2 cores each": replace(usual, store=100 * _GB, network=12.5 * _GB, cores=2),
        "capture, weights streamed": replace(usual, job="capture"),
    }


#: What the page on clusters shows.
CASES = _cases(measured()[0])


def table(cases: dict[str, Cluster]) -> str:
    """Returns what cases cost, as Markdown."""
    memory = measured()[1] / 2**20
    lines = [
        "| job | read | written | time | limited by | of the time | memory of a machine |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, cluster in cases.items():
        cost = simulate(cluster)
        needed = f"{cluster.processes * memory:.0f} MiB" if cluster.job == "edit" else "a layer and the stream"
        moved = f"{cost.read / 1e12:.3g} TB | {cost.written / 1e12:.3g} TB"
        lines.append(f"| {name} | {moved} | {cost.seconds:.0f} s | {cost.limit} | {cost.share:.0%} | {needed} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser("python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--job", choices=["edit", "capture"])
    for name, what in (("machines", "how many"), ("processes", "of each machine"), ("cores", "of each machine")):
        parser.add_argument(f"--{name}", type=int, help=what)
    for name, what in (("total", "GB of the checkpoint"), ("shard", "GB of a shard"), ("store", "GB/s of the store")):
        parser.add_argument(f"--{name}", type=float, help=what)
    parser.add_argument("--network", type=float, help="Gbit/s of each machine, each way")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if any(isinstance(value, int | float) and not value > 0 for value in given.values()):
        parser.error("every size, number and rate must be more than 0")
    units = {"total": _GB, "shard": _GB, "store": _GB, "network": _GB / 8}
    chosen = {name: value * units.get(name, 1) for name, value in given.items() if name != "job"}
    if "job" in given:
        chosen["job"] = given["job"]
    print(table({"as given": replace(CASES["edit"], **chosen)} if given else CASES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
