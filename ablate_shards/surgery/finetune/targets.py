"""Finds the linear modules of a model's decoder layers without its weights, and chooses those that LoRA adapts."""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ablate_shards.errors import FinetuneError
from ablate_shards.surgery.model.loading import build, decoder_layers, generating_class

__all__ = ["SEVEN", "Skeleton", "Targets", "build_skeleton", "choose", "folded"]

Targets = Literal["auto"] | tuple[str, ...]

#: The projections of an ordinary decoder layer, without ``_proj``.
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The modules of a model, without its weights.

    Attributes:
        auto: The transformers class that loads it.
        text: Its language model's configuration.
        prefix: Path of the list of decoder layers.
        linear: Name to (inputs, outputs) of every linear module of the decoder layers but the routers, in order.
        conv: Those of them that are stored transposed (Conv1D).
        fused: Names of the parameters that hold all experts of a layer.
        mistaken: Linear modules that peft takes for these experts by their names, and so cannot be adapted.
        parameters: How many numbers the model has.
        vocabulary: Rows of the token embedding.
        token_types: Whether the model wants ``token_type_ids`` in training.
    """

    auto: Any
    text: Any
    prefix: str
    linear: Mapping[str, tuple[int, int]]
    conv: frozenset[str]
    fused: tuple[str, ...]
    mistaken: tuple[str, ...]
    parameters: int
    vocabulary: int
    token_types: bool

    def is_in_linear_attention(self, name: str) -> bool:
        """Returns whether a module belongs to a layer with linear attention."""
        layer = int(name.removeprefix(f"{self.prefix}.").partition(".")[0])
        types = getattr(self.text, "layer_types", None) or ()
        return layer < len(types) and types[layer] == "linear_attention"


def build_skeleton(model: Path, config: Any) -> Skeleton:
    """Builds a model without memory for its weights, so that what is wrong shows before they are read.

    Raises:
        FinetuneError: transformers has no generating model for this configuration, or its layers are not found.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    auto = generating_class(config)
    text = config.get_text_config(decoder=True)
    empty = build(model, auto, config, FinetuneError)
    _, layers = decoder_layers(model, empty, FinetuneError)
    prefix = next(name for name, part in empty.named_modules() if part is layers)
    linear: dict[str, tuple[int, int]] = {}
    conv, fused = set(), []
    for name, part in layers.named_modules(prefix=prefix):
        if isinstance(part, nn.Linear) and not _ROUTERS & set(name.split(".")):
            linear[name] = part.in_features, part.out_features
        elif isinstance(part, Conv1D):
            linear[name] = part.nx, part.nf
            conv.add(name)
        elif not isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fused += [f"{name}.{own}" for own, value in part.named_parameters(recurse=False) if value.ndim == 3]
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    mistaken = _mistaken(empty, linear) if fused else ()
    return Skeleton(
        auto=auto,
        text=text,
        prefix=prefix,
        linear={name: sizes for name, sizes in linear.items() if name not in mistaken},
        conv=frozenset(conv),
        fused=tuple(fused),
        mistaken=mistaken,
        parameters=parameters,
        vocabulary=empty.get_input_embeddings().weight.shape[0],
        token_types=text is not config and "token_type_ids" in inspect.signature(empty.forward).parameters,
    )


def _mistaken(empty: Any, linear: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Returns which linear modules get no adapter from peft when all are asked for; changes the model.

    For some mixtures of experts peft reads names such as ``down_proj`` as those of single experts in checkpoints
    that transformers now fuses, wherever they stand.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(LoraConfig(r=1, target_modules=list(linear)), empty, low_cpu_mem_usage=True)
    parts = dict(empty.named_modules())
    return tuple(name for name in linear if not isinstance(parts[name], LoraLayer))


def choose(skeleton: Skeleton, targets: Targets) -> tuple[str, ...]:
    """Returns the linear modules that get an adapter.

    Raises:
        FinetuneError: A name that none has, or only fused experts.
    """
    if targets == "auto":
        return tuple(skeleton.linear)
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in skeleton.linear if f".{name}".endswith((f".{target}", f".{target}_proj"))}
        if not found and not any(target in name.rpartition(".")[2] for name in skeleton.fused):
            raise FinetuneError(
                f"--targets: no linear module of the decoder layers is called {target} or {target}_proj; there are "
                f"{folded(skeleton.linear)}; name some of them, or use --targets auto for all"
            )
        chosen |= found
    if not chosen:
        raise FinetuneError(
            f"--targets {','.join(targets)}: only fused experts ({folded(skeleton.fused)}) are called that, and LoRA "
            "needs linear modules; add others, or use --targets auto"
        )
    return tuple(name for name in skeleton.linear if name in chosen)


def folded(names: Iterable[str]) -> str:
    """Returns names within their layer, each once with its count."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"^.*?\.\d+\.", "", name)) for name in names)
    shown = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
    rest = len(shown) - _MOST_NAMES
    return ", ".join(shown[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
