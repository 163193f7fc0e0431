"""The kinds of writers within a component: attention or what stands in its place, and the experts of an MLP."""

import re
from collections.abc import Collection, Mapping

from ablate_shards.surgery.anatomy.families import Component, Part
from ablate_shards.surgery.anatomy.writers import LeftOut, Writer

__all__ = ["COMPONENT_OF", "Part", "belongs_to", "part_of"]

#: The component that each part belongs to: attention is all that mixes tokens, mlp all that does not.
COMPONENT_OF: Mapping[Part, Component] = {
    "attention": "attention",
    "linear-attention": "attention",
    "mamba": "attention",
    "convolution": "attention",
    "cross-attention": "attention",
    "mlp": "mlp",
    "shared-experts": "mlp",
    "routed-experts": "mlp",
    "embedding": "embedding",
}
#: What stands in place of attention or beside it, by the module's name; the first that is found counts.
_INSTEAD: tuple[tuple[Part, re.Pattern[str]], ...] = (
    (
        "cross-attention",
        re.compile(r"encoder_attn|EncDecAttention|encoder_decoder_attention|cross_?att", re.IGNORECASE),
    ),
    ("mamba", re.compile(r"(?:^|\.)(?:mamba|mixer(?!\.o_proj)|ssm)\.")),
    ("convolution", re.compile(r"(?:^|\.)(?:short_?)?conv\.")),
    ("linear-attention", re.compile(r"(?:^|\.)(?:linear_attn|mlstm_layer|temporal_block\.linear_out)(?:\.|$)")),
)
_SHARED = re.compile(r"\.shared_?(?:experts?|mlp)\b|\.share_expert\b")
_ROUTED = re.compile(r"\.experts\.|\.switch_mlp\.|\.moe\.|(?:block_sparse_moe|(?<![a-z_])mlp)\.output_linear")


def part_of(writer: Writer | LeftOut) -> Part | None:
    """Returns the part that a writer belongs to: what its description says, else what its name tells.

    None is that of what belongs to no component.
    """
    name, component = writer.name, writer.component
    if component is None or writer.part is not None:
        return writer.part
    if component == "attention":
        return next((part for part, pattern in _INSTEAD if pattern.search(name)), "attention")
    if component == "mlp":
        return "shared-experts" if _SHARED.search(name) else "routed-experts" if _ROUTED.search(name) else "mlp"
    return component


def belongs_to(writer: Writer | LeftOut, selected: Collection[Part]) -> bool:
    """Tells whether a writer's component or its part is among those selected.

    Args:
        writer: The writer.
        selected: Parts; ``attention`` and ``mlp`` stand for all that belongs to them.
    """
    return writer.component in selected or part_of(writer) in selected
