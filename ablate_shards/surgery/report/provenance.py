"""Says where a result comes from: digests, versions, and the recipe that makes it again."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ablate_shards.surgery.plan.recipe import layer_ranges
from ablate_shards.surgery.report.findings import Findings

__all__ = ["facts", "rebuilt_recipe"]

#: Options of finetune as the recipe calls them; the rest follows from the machine.
_TRAINED = (
    "rank",
    "alpha",
    "dropout",
    "targets",
    "epochs",
    "learning_rate",
    "length",
    "batch",
    "accumulate",
    "seed",
    "evaluation_share",
    "rslora",
    "gradient_checkpointing",
)
_ESTIMATED = ("estimator", "rank", "winsorize")
_EDITED = ("components", "coefficient", "preserve", "biproject", "source-layer", "mtp")


def facts(found: Findings) -> list[tuple[str, str]]:
    """Returns what identifies the result and all that went into it, as pairs of what and value."""
    return [(what, str(value)) for what, value in _facts(found) if value not in (None, "", {})]


def rebuilt_recipe(found: Findings) -> str:
    """Returns a recipe that makes the result again, as TOML; the names of files are those that ``run`` uses.

    A digest stands beside every file that the receipts know by digest only.
    """
    content = found.ablation.content if found.ablation else {}
    lines = ["[source]", f"source = {_toml(_get(content, 'source', 'name') or 'SOURCE')}", f"out = {_toml(found.name)}"]
    if found.ablation:
        lines += ["", *_directions_table(found), "", *_ablate_table(_table(content, "recipe"))]
    if found.merge:
        lines += ["", *_lora_table(found)]
    if found.after:
        digest = found.after.questions
        lines += ["", "[evaluate]", f"# SHA-256 of the questions {digest}", 'questions = "questions.jsonl"']
        if (text := found.after.text) is not None:
            lines += [f"# SHA-256 {_line(text.sha256)}", f"text = {_toml(text.name)}"]
    return "\n".join(lines) + "\n"


def _facts(found: Findings) -> Iterator[tuple[str, Any]]:
    for part in (found.ablation, found.merge):
        if part is None:
            continue
        what, file = ("ablation", "ablation.json") if part is found.ablation else ("merge", "merge.json")
        altered = " (altered after it was written)" if part.receipt.altered else ""
        yield f"{what} made by", _get(part.content, "tool")
        yield f"{what} computed on", _listed(_get(part.content, "device"))
        yield f"{file}, SHA-256", f"{part.sha256}{altered}"
        for name, digest in part.receipt.shards.items():
            yield f"header of {name} before the {what}, SHA-256", digest
    if found.ablation:
        content = found.ablation.content
        yield "architecture", f"{_get(content, 'family')}, hidden size {_get(content, 'hidden_size')}"
        yield "directions, SHA-256", _get(content, "directions", "sha256")
        yield "prompts captured, SHA-256", _get(content, "directions", "metadata", "inputs")
        yield "token captured", _get(content, "directions", "metadata", "position")
    if found.merge:
        yield "adapter, SHA-256", found.merge.receipt.adapter_sha256
    if found.training:
        yield "instructions, SHA-256", _get(found.training.content, "data", "sha256")
        yield "trained with", _listed(_get(found.training.content, "versions"))
    for search in found.searches:
        yield f"{search.name} made by", search.record.tool
        yield f"{search.name}, SHA-256", search.sha256
        yield f"{search.name}, seed", search.record.options.seed
    if found.after:
        yield "evaluated with", _listed(found.after.versions)
        yield "asked with", _listed(found.after.options)
        yield "questions, SHA-256", found.after.questions
        for stage, evaluation in zip(found.stages, found.evaluations, strict=True):
            yield f"files of {stage}, SHA-256", evaluation.model.sha256


def _directions_table(found: Findings) -> Iterator[str]:
    said = _table(found.ablation.content if found.ablation else {}, "directions")
    metadata = _table(said, "metadata")
    yield "[directions]"
    if _get(metadata, "inputs"):
        yield f"# SHA-256 of the prompts as captured {_line(metadata['inputs'])}"
        yield 'pairs = "pairs.jsonl"'
        if _get(metadata, "position"):
            yield f"position = {_toml(metadata['position'])}"
    else:
        yield f"# SHA-256 of the directions {_line(_get(said, 'sha256'))}"
        yield 'directions = "directions.safetensors"'
        return
    try:
        estimator = json.loads(metadata["estimator"])
        yield from (f"{key} = {_toml(estimator[key])}" for key in _ESTIMATED if estimator.get(key) is not None)
        if others := json.loads(metadata.get("without", "[]")):
            yield from (f"# SHA-256 of {_line(other['file'])} {_line(other['sha256'])}" for other in others)
            yield f"without = {_toml([other['file'] for other in others])}"
    except (LookupError, TypeError, ValueError, AttributeError):
        return


def _ablate_table(recipe: Mapping[str, Any]) -> Iterator[str]:
    yield "[ablate]"
    if recipe.get("layers"):
        yield f"layers = {_toml(_layers(recipe['layers']))}"
    yield from (f"{key} = {_toml(recipe[key])}" for key in _EDITED if key in recipe)
    for name in ("profile", "override", "target"):
        entries = recipe.get(name)
        for entry in entries if isinstance(entries, list) else ():
            yield ""
            yield f"[[ablate.{name}]]"
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if value is not None:
                    yield f"{_line(key).replace('_', '-')} = {_toml(_layers(value) if key == 'layers' else value)}"


def _lora_table(found: Findings) -> Iterator[str]:
    content = found.training.content if found.training else {}
    digest = _get(content, "data", "sha256")
    yield "[lora]"
    if digest:
        yield f"# SHA-256 {_line(digest)}"
    yield 'data = "instructions.jsonl"'
    options = _table(content, "options")
    for key in _TRAINED:
        if key in options:
            yield f"{key.replace('_', '-')} = {_toml(options[key])}"
    scale = found.merge.receipt.scale if found.merge else 1.0
    if scale != 1:
        yield f"scale = {_toml(scale)}"


def _get(record: Any, *keys: str) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _table(record: Any, key: str) -> dict[str, Any]:
    found = _get(record, key)
    return found if isinstance(found, dict) else {}


def _toml(value: Any) -> str:
    # A library (tomli-w) writes no comments, which hold the digests here, and breaks every list over several lines.
    # A basic string of TOML is a string of JSON, but for DEL, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _line(value: Any) -> str:
    """Returns a value on one line, as a comment must be."""
    return " ".join(str(value).split())


def _listed(said: Any) -> str:
    """Returns versions or options in a row."""
    items = said.items() if isinstance(said, Mapping) else ()
    return ", ".join(f"{str(key).removeprefix('version of ')} {_shown(value)}" for key, value in items)


def _shown(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _layers(value: Any) -> Any:
    """Returns a list of layers as a recipe takes it; any other value is returned unchanged."""
    if isinstance(value, list) and all(type(layer) is int for layer in value):
        return layer_ranges(value, between=",")
    return value
