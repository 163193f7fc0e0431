"""Which tensors of a layer could write to the residual stream, by their shapes, and which do, by their names."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from ablate_shards.surgery.anatomy.families import FAMILIES, Axis
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["Role", "Stack", "is_lone_bias", "orientation", "role_of", "split_stack"]

#: ``writer`` by shape and name, ``unknown`` by shape alone, ``none`` by either.
Role = Literal["writer", "unknown", "none"]

_LEAVES = {
    module.leaf
    for layout in {layout for family in FAMILIES for layout in family.layouts}
    for module in (*layout.attention, *layout.mlp)
}
#: What modules are called whose output is added to the stream.
_WRITERS = frozenset(
    (_LEAVES - {"linear"})
    | {"wo", "o", "out", "out_lin", "lin2", "fc_out", "linear2", "linear_2", "linear_fc2", "linear_out", "proj_out"}
    | {"output_linear", "output", "fc2_latent_proj", "ffn_out", "attn_out", "w_o", "dense_out", "dense"}
) - {"proj", "linear_attn"}
#: Words that say nothing of what a matrix is for, only that something comes out of it.
_VAGUE = frozenset({"dense", "output", "out", "o"})
#: Queries, keys and values, whose length may be that of the stream by chance.
_QUERIES = re.compile(
    r"(?:w|to_|c_)?_?(?:q|k|v|qk|kv|qkv|query|key|value|query_key_value)(?:_(?:a|b|c|up|down))?(?:_(?:proj|lin|linear|attn))?"
    r"(?:_with_mqa|_fused)?|c_attn|w_?pack|in_proj_(?:weight|qkvz|ba|qkv|z|a|b)",
    re.IGNORECASE,
)
#: What lies within a module: states, gates, routers, positions and convolutions that mix no channels.
_WITHIN = re.compile(
    r"x_proj|\w*gate_preact|dt_proj|g_proj|router|gate|(?:relative|position).*|.*conv1?d?|rotary.*|A_log"
)
_ATTENTION = re.compile(r"att(?:n|ention)|mixer|mamba", re.IGNORECASE)
#: What reads the stream where its shape says so; where it does not, as ``up`` of an adapter, the name says nothing.
_READERS = frozenset(
    {
        "up_proj",
        "gate_proj",
        "gate_up_proj",
        "up",
        "gate_up",
        "fc1",
        "fc_in",
        "w1",
        "w3",
        "wi",
        "wi_0",
        "wi_1",
        "in_proj",
    }
    | {"lin1", "linear1", "linear_1", "linear_fc1", "c_fc", "dense_h_to_4h", "input_linear", "linear_x", "linear_y"}
    | {"in_layer", "fc_1", "fc_2", "intermediate", "ff_proj", "linear_in", "proj_in", "down"}
)
_STACK = re.compile(r"(?P<head>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(?P<layer>\d{1,5})\.(?P<inner>.+)")
_PLAIN_ENDING = re.compile(r"\.(?:weight|bias)$")


class Stack(NamedTuple):
    """Where a tensor lies: the list of layers, the layer, and its name within it."""

    head: str
    layer: int
    inner: str


def split_stack(name: str) -> Stack | None:
    """Returns the list of layers that a tensor lies in, whatever it is called; None where it lies in none."""
    place = _STACK.fullmatch(name)
    return Stack(place["head"], int(place["layer"]), place["inner"]) if place else None


def orientation(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Axis:
    """Returns how matrices are stored: ``in``, as Conv1D does, where the length of a bias says so, else ``out``."""
    for name in names:
        shape = tensors[name].shape
        bias = tensors.get(f"{name.removesuffix('weight')}bias") if name.endswith(".weight") else None
        if bias is not None and len(shape) == 2 and shape[0] != shape[1] and len(bias.shape) == 1:
            return "out" if bias.shape[0] == shape[0] else "in"
    return "out"


def role_of(name: str, shape: tuple[int, ...], hidden: int, stored: Axis) -> tuple[Role, Axis]:
    """Returns what a tensor of a layer does, and along which axis it writes if it does.

    Args:
        name: The tensor.
        shape: Its shape.
        hidden: Length of the residual axis.
        stored: How the matrices of its layer are stored.
    """
    module = _PLAIN_ENDING.sub("", name).rpartition(".")[2]
    if len(shape) < 2:
        return "none", stored
    if len(shape) > 2 and re.search(r"conv", name):
        return ("unknown" if shape[0] == hidden and shape[1] > 1 else "none"), "out"
    axis: Axis = stored
    writes, reads = (shape[-2], shape[-1]) if stored == "out" else (shape[-1], shape[-2])
    if len(shape) > 2 and writes != hidden:
        # Stacks of experts are stored either way within one model.
        axis, writes, reads = ("in" if stored == "out" else "out"), reads, writes
    if writes != hidden:
        # Called like a writer, yet of a writer's shape only when transposed.
        return ("unknown" if reads == hidden and module in _WRITERS - _VAGUE else "none"), axis
    if _WITHIN.fullmatch(module):
        return "none", axis
    if _QUERIES.fullmatch(module):
        return ("none" if reads == hidden or _ATTENTION.search(name) else "unknown"), axis
    if module in _READERS:
        return ("none" if reads == hidden or len(shape) > 2 else "unknown"), axis
    return ("writer" if module in _WRITERS else "unknown"), axis


def is_lone_bias(name: str, tensors: Mapping[str, TensorInfo], hidden: int) -> bool:
    """Tells whether a tensor could be a bias that is added to the stream and belongs to no weight."""
    if not name.endswith("bias") or tensors[name].shape != (hidden,):
        return False
    stem = name.removesuffix("bias").rstrip("._")
    return not any(other in tensors for other in (f"{stem}.weight", f"{stem}_weight", stem))
