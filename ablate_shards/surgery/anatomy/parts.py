"""The kinds of writers within a component: attention or what stands in its place, and the experts of an MLP."""

import re
from collections.abc import Mapping
from typing import Literal

from ablate_shards.surgery.anatomy.architecture import Component

__all__ = ["COMPONENT_OF", "Part", "part_of"]

Part = Literal["attention", "linear-attention", "mlp", "shared-experts", "routed-experts", "embedding"]

#: The component that each part belongs to.
COMPONENT_OF: Mapping[Part, Component] = {
    "attention": "attention",
    "linear-attention": "attention",
    "mlp": "mlp",
    "shared-experts": "mlp",
    "routed-experts": "mlp",
    "embedding": "embedding",
}
_LINEAR = re.compile(r"(?:^|\.)(?:linear_attn|mamba|mixer(?!\.o_proj)|ssm|short_?conv|conv)\.")
_SHARED = re.compile(r"\.shared_(?:experts?|mlp)\b")
_ROUTED = re.compile(r"\.experts\.")


def part_of(name: str, component: Component) -> Part:
    """Returns the part that a writer belongs to.

    Args:
        name: The tensor.
        component: The component that it belongs to.
    """
    if component == "attention":
        return "linear-attention" if _LINEAR.search(name) else "attention"
    if component == "mlp":
        return "shared-experts" if _SHARED.search(name) else "routed-experts" if _ROUTED.search(name) else "mlp"
    return component
