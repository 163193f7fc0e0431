"""What a checkpoint's configuration says once some of its weights, or all, are quantised no longer."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ablate_shards.errors import PlanError, reason
from ablate_shards.surgery.anatomy.scales import method_of
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, text_part

__all__ = ["Changes", "exempting", "without_quantisation"]

CONFIG, BESIDE = "config.json", "hf_quant_config.json"
#: Mistral's own, beside shards without config.json.
_PARAMS = "params.json"
_KEY = "quantization_config"
#: The last is that of MLX.
_SAID = (_KEY, "quantization")
#: What says how weights are stored: the last is DeepSeek's word on the experts.
_KEYS = (_KEY, "quantization", "compression_config", "expert_dtype")
#: The lists of modules that are not quantised, by method; where none is there, the first is made.
_LISTS = {
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "compressed-tensors": ("ignore",),
    "modelopt": ("ignore", "exclude_modules"),
    "mxfp4": ("modules_to_not_convert",),
    "quark": ("exclude",),
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
}


class Changes:
    """What changes in the files beside the shards.

    Attributes:
        config: What is set in config.json, by keys joined by dots.
        unset: What is taken out of it.
        removed: Files that say nothing any more.
        contents: The new contents of others.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.unset: list[str] = []
        self.removed: list[str] = []
        self.contents: dict[str, bytes] = {}


def without_quantisation(checkpoint: Checkpoint) -> Changes:
    """Returns what changes where no weight is quantised any more.

    Raises:
        PlanError: There is no configuration to change.
    """
    changes = Changes()
    if _is_in_params(checkpoint):
        content = _object(checkpoint, _PARAMS)
        changes.contents[_PARAMS] = _written({key: value for key, value in content.items() if key not in _KEYS})
        return changes
    config = _config(checkpoint)
    changes.unset += [key for key in _KEYS if key in config]
    for outer, inner in config.items():
        if isinstance(inner, Mapping):
            changes.unset += [f"{outer}.{key}" for key in _KEYS if key in inner and outer not in _KEYS]
    changes.removed += [BESIDE] if BESIDE in checkpoint.sidecars else []
    return changes


def exempting(checkpoint: Checkpoint, modules: Sequence[str], experts: Sequence[str]) -> Changes:
    """Returns what changes where some modules are quantised no longer, and others still are.

    Args:
        checkpoint: The source.
        modules: Linear modules, by their names in the checkpoint.
        experts: Modules of all the routed experts of a layer.

    Raises:
        PlanError: There is no configuration to change.
    """
    changes = Changes()
    if _is_in_params(checkpoint):
        raise PlanError(
            f"{checkpoint.name}: its {_PARAMS} cannot say that a part of its weights is quantised no longer; "
            "dequantise all of them"
        )
    config = _config(checkpoint)
    part = text_part(config)
    for path, place in (("", config), *([(f"{part[0]}.", part[1])] if part else [])):
        for key in _SAID:
            if isinstance(place.get(key), Mapping):
                changes.config[f"{path}{key}"] = _exempt(place[key], method_of(place[key]) or "", modules, experts)
    if BESIDE in checkpoint.sidecars:
        content = _object(checkpoint, BESIDE)
        if not isinstance(said := content.get("quantization"), Mapping):
            raise PlanError(f"{checkpoint.files.shown(BESIDE)}: expected an object as quantization; restore the file")
        content["quantization"] = _exempt(said, "modelopt", modules, experts, "exclude_modules")
        changes.contents[BESIDE] = _written(content)
    return changes


def _exempt(
    said: Mapping[str, Any], method: str, modules: Sequence[str], experts: Sequence[str], usual: str | None = None
) -> dict[str, Any]:
    """Returns a quantisation's configuration with modules added to the lists of what is not quantised."""
    if method == "compressed-tensors":
        names = [*modules, *(f"re:{re.escape(module)}(\\..*)?$" for module in experts)]
    elif method == "modelopt":
        names = [*modules, *(name for module in experts for name in (module, f"{module}.*"))]
    else:
        names = [*modules, *experts]
    changed = dict(said)
    if method == "mlx":
        return {**changed, **dict.fromkeys(names, False)}
    if method == "auto-round":
        changed["extra_config"] = {**(said.get("extra_config") or {}), **{name: {"bits": 16} for name in names}}
        return changed
    if method == "gptq":
        patterns = [*(re.escape(name) for name in modules), *(f"{re.escape(name)}\\..*" for name in experts)]
        changed["dynamic"] = {**(said.get("dynamic") or {}), **{f"-:^{pattern}$": {} for pattern in patterns}}
        return changed
    lists = _LISTS.get(method, _LISTS["fp8"])
    keys = [key for key in lists if said.get(key) is not None] or [usual or lists[0]]
    for key in keys:
        # Where bitsandbytes is told nothing it leaves out the output head, which it then has to be told.
        there = list(said.get(key) or (("lm_head",) if method == "bitsandbytes" else ()))
        changed[key] = [*there, *(name for name in names if name not in there)]
    if isinstance(layers := said.get("quantized_layers"), Mapping):
        below = tuple(f"{module}." for module in experts)
        gone = {*modules, *experts}
        changed["quantized_layers"] = {
            name: how for name, how in layers.items() if name not in gone and not name.startswith(below)
        }
    return changed


def _is_in_params(checkpoint: Checkpoint) -> bool:
    """Tells whether Mistral's own file is all that says how weights are stored."""
    return checkpoint.config is None and _PARAMS in checkpoint.sidecars


def _written(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=4, ensure_ascii=False)}\n".encode()


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.config is None or CONFIG not in checkpoint.sidecars:
        raise PlanError(
            f"{checkpoint.name}: {CONFIG} says how its weights are stored and has to change with them, and there is "
            "none to carry over; name a folder that holds the weights and their configuration"
        )
    return _object(checkpoint, CONFIG)


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file beside the shards.

    Raises:
        PlanError: There is none.
    """
    try:
        content = json.loads(checkpoint.files.read(name))
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"{checkpoint.files.shown(name)}: not valid JSON ({reason(error)}); restore the file"
        ) from error
    if not isinstance(content, dict):
        raise PlanError(f"{checkpoint.files.shown(name)}: expected a JSON object; restore the file")
    return content
