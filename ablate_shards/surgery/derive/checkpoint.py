"""The lines for one checkpoint: its configuration's twin, and its own tensor names."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablate_shards.errors import ArchitectureError, reason
from ablate_shards.surgery.anatomy.architecture import Target, dissect, marks_prediction, split_layer
from ablate_shards.surgery.anatomy.gains import with_names
from ablate_shards.surgery.anatomy.roles import split_stack
from ablate_shards.surgery.anatomy.rules import read_gain
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.derive.derive import ABSENT, Derivation, derive, where
from ablate_shards.surgery.derive.twin import Twin, build_twin, kind_of
from ablate_shards.surgery.model.loading import UNUSABLE, check_packages, quiet

__all__ = ["derive_checkpoint", "leaks_of", "recipe_lines"]


def derive_checkpoint(checkpoint: Checkpoint) -> Derivation:
    """Finds the writers of a checkpoint's architecture on a tiny random twin, and names them as the checkpoint does.

    Args:
        checkpoint: The checkpoint; only its configuration and headers are read.

    Raises:
        ArchitectureError: There is no configuration, transformers does not know or cannot build the architecture, or
            the checkpoint's tensors are named as in neither of the forms that transformers saves and loads.
    """
    check_packages("--derive builds a tiny model of the architecture", "transformers", error=ArchitectureError)
    if checkpoint.config is None:
        raise ArchitectureError(
            "there is no config.json, from which a tiny twin could be built; put the model's beside the shards"
        )
    config = _read(checkpoint.config)
    stored = {_ending(name) for name in checkpoint.tensors}
    best: tuple[int, Twin] | None = None
    for original in (True, False):
        twin = build_twin(config, original=original)
        known = len(stored & {_ending(name) for name in twin.state})
        if best is None or known > best[0]:
            best = known, twin
    if best is None or not best[0]:
        raise ArchitectureError(
            f"none of the checkpoint's tensors, such as {min(checkpoint.tensors)}, is called as transformers calls or "
            f"reads those of {config.model_type!r}"
        )
    found = derive(best[1])
    targets = tuple(_renamed(target, checkpoint.tensors) for target in found.targets)
    _check(checkpoint, targets, best[1])
    return replace(found, targets=targets)


def _check(checkpoint: Checkpoint, targets: Sequence[Target], twin: Twin) -> None:
    """Refuses a checkpoint whose layers are not those that its configuration describes.

    Raises:
        ArchitectureError: It has more layers or fewer, tensors of other shapes, or some that could write and that the
            twin has none of.
    """
    anatomy = dissect(checkpoint.tensors, checkpoint.config, targets)
    way_out = "restore the config.json that came with the shards"
    heads = {place.head for writer in anatomy.writers if (place := split_stack(writer.name))}
    inner: dict[int, list[str]] = {}
    for name in checkpoint.tensors:
        if (place := split_stack(name)) is not None and place.head in heads:
            inner.setdefault(place.layer, []).append(place.inner)
    counted = len(anatomy.layers)
    last = max(layer for layer, names in inner.items() if layer < counted or not any(map(marks_prediction, names)))
    if last != counted - 1:
        raise ArchitectureError(
            f"config.json counts {counted} layers, but the last that the checkpoint holds tensors of is layer {last}, "
            f"counted from 0; {way_out}"
        )
    known = {_ending(name) for name in twin.state}
    open_yet = [name for name in anatomy.unplaced if (split_layer(name)[0] or 0) < counted]
    if strange := next((name for name in open_yet if _ending(name) not in known), None):
        raise ArchitectureError(
            f"{strange}: by its shape it could write to the stream, but the model that config.json describes has no "
            f"tensor of this name; {way_out}"
        )


def _ending(name: str) -> str:
    """Returns the end of a tensor's name, numbers as ``#``, which is the same with and without a model's head."""
    return ".".join(kind_of(name).split(".")[-4:][1:])


def _read(values: Mapping[str, Any]) -> Any:
    """Reads a config.json with transformers."""
    from transformers import AutoConfig
    from transformers import __version__ as version

    with tempfile.TemporaryDirectory() as folder, quiet():
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except UNUSABLE as unusable:
            why = reason(unusable).replace(folder, "config.json")
            raise ArchitectureError(
                f"config.json: transformers {version} does not know model_type {values.get('model_type')!r} ({why}); "
                "update transformers if it is newer, code that comes with a checkpoint is not run"
            ) from unusable


def _renamed(target: Target, names: Iterable[str]) -> Target:
    """Returns a target as the checkpoint's own names need it, where these have another beginning."""
    names = list(names)
    if any(re.fullmatch(target.pattern, name) for name in names):
        return target
    parts = target.pattern.split(r"\.")
    for dropped in range(len(parts) - 1):
        rest = r"\.".join(parts[dropped:])
        found = Counter(
            match["beginning"] for name in names if (match := re.fullmatch(rf"(?P<beginning>(?:.+\.)?){rest}", name))
        ).most_common(2)
        # Multi-token prediction has a layer or two that are called alike.
        if found and (len(found) == 1 or found[0][1] > found[1][1]):
            beginning = found[0][0]
            gain = None if target.gain is None else _moved(target.gain, dropped, beginning)
            return replace(target, pattern=re.escape(beginning) + rest, gain=gain)
        if found or "(?P<layer>" in parts[dropped]:
            break
    raise ArchitectureError(
        f"no tensor of the checkpoint is called {target.pattern!r}, as transformers calls a writer of the "
        "architecture; config.json or the shards are another model's"
    )


def _moved(gain: str, dropped: int, beginning: str) -> str:
    """Returns a gain with another beginning in place of the first parts of its names."""
    names, offset = read_gain(gain)
    own = with_names(names, lambda name: beginning + ".".join(name.split(".")[dropped:]))
    return f"1 + {own}" if offset else own


def leaks_of(found: Derivation) -> list[str]:
    """Says which states keep how much of a direction, and why as far as it is known."""
    kept = [f"{where(state)} {share:.2%}" for state, share in enumerate(found.left) if share >= ABSENT]
    leaks = [f"of a direction there is left on the tiny twin: {', '.join(kept)}"] if kept else []
    if found.unreached:
        leaks.append(f"no text reaches {', '.join(found.unreached)}, so that it is not known whether they write")
    return [*leaks, *found.problems]


def recipe_lines(targets: Iterable[Target]) -> str:
    """Returns targets as the lines of a recipe."""
    lines = []
    for target in targets:
        gain = f'\ngain = "{target.gain}"' if target.gain else ""
        component = "experts" if target.component == "routed-experts" else target.component
        lines.append(
            f"[[ablate.target]]\npattern = '{target.pattern}'\ncomponent = \"{component}\"\n"
            f'axis = "{target.axis}"{gain}\n'
        )
    return "\n".join(lines)
