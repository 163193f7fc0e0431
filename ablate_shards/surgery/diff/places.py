"""Finds where in a model a tensor lies, from its name."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ablate_shards.surgery.anatomy.architecture import Anatomy, split_layer
from ablate_shards.surgery.diff.differences import leaf

__all__ = ["Place", "Places"]

_COMPONENTS = (
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|experts?\b|ffn|feed_forward|block_sparse_moe|fc[12]\b")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_")),
    ("embedding", re.compile(r"embed|wte|wpe")),
    ("head", re.compile(r"lm_head|embed_out")),
)
#: Parts of names that do not tell one tower from another.
_COMMON_PARTS = {"model", "layers", "h", "blocks", "block", "language_model", "transformer"}


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        shown: The layer, with the name of its tower if it is not the decoder's; the tower or ``–`` outside of layers.
        layer: The decoder layer; None elsewhere.
        component: attention, mlp, norm, embedding, head or the module's name.
        writer: Whether it writes to the residual stream; None where the architecture is unknown.
    """

    shown: str
    layer: int | None
    component: str
    writer: bool | None


class Places:
    """Finds the place of any tensor of a checkpoint."""

    def __init__(self, names: Iterable[str], anatomy: Anatomy | None) -> None:
        """Tells the decoder's layers from those of towers: it holds the writers, or else the most tensors.

        Args:
            names: All tensors of the checkpoint.
            anatomy: What writes to its residual stream; None where the architecture is unknown.
        """
        self._anatomy_known = anatomy is not None
        self._writers = {writer.name: writer for writer in anatomy.writers} if anatomy else {}
        sizes = Counter(_root_of(name) for name in names if split_layer(name)[0] is not None)
        known = {_root_of(writer.name) for writer in self._writers.values() if not writer.mtp}
        self._decoders = (known & set(sizes)) or {root for root, _ in sizes.most_common(1)}

    def of(self, name: str) -> Place:
        """Returns where the tensor of that name lies."""
        layer, root = split_layer(name)[0], _root_of(name)
        if layer is not None and root in self._decoders:
            shown = str(layer)
        else:
            shown = _outside_of_decoder(root, layer)
            layer = None
        writer = name in self._writers if self._anatomy_known else None
        return Place(shown, layer, self._component(name), writer)

    def _component(self, name: str) -> str:
        if name in self._writers:
            return self._writers[name].component
        inner = split_layer(name)[1]
        return next((component for component, pattern in _COMPONENTS if pattern.search(inner)), leaf(name))


def _outside_of_decoder(root: str, layer: int | None) -> str:
    """Returns the name of a tower, and the layer in it."""
    parts = [part for part in root.split(".") if part not in _COMMON_PARTS]
    tower = next((part for part in parts if part in ("mtp", "visual") or "tower" in part or "vision" in part), None)
    if layer is None:
        return tower or "–"
    return f"{tower or '.'.join(parts) or root} {layer}"


def _root_of(name: str) -> str:
    """Returns what stands before the layer's number; the whole name outside of layers."""
    layer, inner = split_layer(name)
    return name if layer is None else name.removesuffix(f".{layer}.{inner}")
