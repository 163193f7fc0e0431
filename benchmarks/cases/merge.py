"""A merge against ``cp -r`` of the same checkpoint and against the eager form.

The checkpoint has the layout of Qwen3.5-0.8B, the adapter the seven usual targets, rank 16. The targets of the first
and the last layer are compared with ``W + s·B·A`` in float64, and ``verify`` reads every byte of ours.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks import checks
from benchmarks.checkpoints import Layout, qwen, read, shards, wide, write
from benchmarks.harness import Bench, Contender, amount, case
from benchmarks.processes import EAGER, TOOL, copying, reading, run, unsynced, writing

__all__ = ["RANK", "fault", "write_adapter"]

TARGETS = tuple(f"{name}_proj.weight" for name in ("gate", "up", "mlp.down", "q", "k", "v", "self_attn.o"))
RANK, ALPHA = 16, 32
SYNCED, UNSYNCED, PER_CORE = "ablate-shards merge", "ablate-shards merge --no-sync", "a job per core"


@case("merge")
def merge(bench: Bench) -> None:
    """Merge of a rank-16 adapter on seven targets into 1.5 GB, against a copy and the eager form."""
    layout = qwen(tiny=bench.tiny)
    source, adapter, out, copied = (bench.work / name for name in ("source", "adapter", "out", "copied"))
    size = write(layout, source)
    changed = write_adapter(layout, adapter)

    def rounded() -> str | None:
        return fault(layout, source, adapter, out)

    def check() -> str | None:
        return checks.verified(source, out, "--adapter", str(adapter)) or rounded()

    ours: list[str | Path] = [*TOOL, "merge", source, adapter, out, "--quiet"]
    without = unsynced("merge")
    bench.race(
        f"{amount(size)}, rank {RANK}, {changed} tensors changed",
        [
            *([writing(UNSYNCED, [*ours, *without], out, check=check)] if without else []),
            copying(source, copied, against=UNSYNCED, sync=False),
            writing(SYNCED, ours, out, check=check),
            copying(source, copied, against=SYNCED, sync=True),
            writing(
                "eager float32, then sync",
                [*EAGER, "merge", source, adapter, out],
                out,
                against=SYNCED,
                sync=True,
                check=rounded,
            ),
        ],
        size=size,
    )


@case("large-merge", runs=5, long=True)
def large_merge(bench: Bench) -> None:
    """Merge into one shard that is nearly all one matrix, and verifying it: in one job and in one per core."""
    layout = wide(tiny=bench.tiny)
    source, adapter, out, copied = (bench.work / name for name in ("source", "adapter", "out", "copied"))
    size = write(layout, source)
    write_adapter(layout, adapter)
    title = f"{amount(size)}, a matrix of {list(layout.tensors[layout.writers(0)[0]])} in it"
    merges: list[str | Path] = [*TOOL, "merge", source, adapter, out, "--quiet"]
    check = partial(checks.verified, source, out, "--adapter", str(adapter))
    ways = {"--jobs 1": ["--jobs", "1"], PER_CORE: []}
    bench.race(
        f"merge, rank {RANK}, {title}",
        [
            *(writing(name, [*merges, *flags], out, check=check) for name, flags in ways.items()),
            copying(source, copied, against=PER_CORE, sync=True),
        ],
        size=size,
    )
    run(merges)
    verifies: list[str | Path] = [*TOOL, "verify", source, out, "--adapter", adapter, "--quiet"]
    bench.race(
        f"verify, {title}",
        [
            *(Contender(name, partial(run, [*verifies, *flags])) for name, flags in ways.items()),
            reading([*shards(source), *shards(out)], against=PER_CORE),
        ],
        size=2 * size,
    )


def targets(layout: Layout, layer: int) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of a layer that the adapter changes, with their shapes."""
    found = layout.tensors.items()
    return {name: shape for name, shape in found if f"layers.{layer}." in name and name.endswith(TARGETS)}


def module(tensor: str) -> str:
    """Returns what peft calls the module of a tensor."""
    inside = tensor.removeprefix("model.").removeprefix("language_model.").removesuffix(".weight")
    return f"base_model.model.model.{inside}"


def write_adapter(layout: Layout, folder: Path) -> int:
    """Writes an adapter as peft would and returns the number of its targets."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    factors = {}
    for layer in range(layout.layers):
        for name, (outer, inner) in targets(layout, layer).items():
            factors[f"{module(name)}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) / 32
            factors[f"{module(name)}.lora_B.weight"] = rng.standard_normal((outer, RANK), np.float32) / 256
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return len(factors) // 2


def fault(layout: Layout, source: Path, adapter: Path, out: Path) -> str | None:
    """Compares the targets of the first and the last layer with the definition."""
    from safetensors.torch import load_file

    from ablate_shards.kernels import reference

    factors = load_file(adapter / "adapter_model.safetensors")
    for layer in (0, layout.layers - 1):
        names = list(targets(layout, layer))
        for (name, before), (_, after) in zip(read(source, names), read(out, names), strict=True):
            down, up = (factors[f"{module(name)}.lora_{side}.weight"] for side in "AB")
            if said := checks.against_exact(after, reference.merge(before, up, down, ALPHA / RANK)):
                return f"{name}: {said}"
    return None
