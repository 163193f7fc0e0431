"""Describes the writers of an architecture that the table does not know, and says what names and shapes leave open."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ablate_shards.surgery.anatomy.families import FAMILIES, Axis
from ablate_shards.surgery.anatomy.roles import is_lone_bias, orientation, role_of, split_stack
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["Advice", "advise"]

_TOWER = re.compile(r"(?:^|[._])(?:visual|vision|vit|image|video|audio|speech)(?:$|[._])")
_ENCODER = re.compile(r"(?:^|[._])encoder(?:$|[._])")
_ATTENTION = re.compile(r"att(?:n|ention)|encdec|mixer|mamba|ssm|conv|recurrent|temporal", re.IGNORECASE)
_EMBEDDINGS = frozenset(
    {module.leaf for family in FAMILIES for layout in family.layouts for module in layout.embedding}
    | {"shared", "tok_embeddings", "position_embeddings", "token_type_embeddings", "embed_position", "embedding"}
    | {"tokens_embed", "positions_embed", "word_embedding"}
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|proj_out|output|cls|score|classifier|project_out)(?:\.|$)")
_NORM = re.compile(r"norm|(?:^|[._])ln(?:$|[._\d])", re.IGNORECASE)
#: Norms and vectors that stand after a sublayer and before the addition, by their names.
_AFTER = re.compile(
    r"post_?(?:feed_?forward|mlp|ffn|ff|moe|self_attn)|(?:ffn?|mlp|feed_?forward)_?post|post_?norm|sandwich"
    r"|layer_?scale|(?:^|\.)(?:ls\d|gamma\w*)(?:\.|$)|residual_scale",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=expert_)\d+(?=\.)")
#: Keys of a configuration that count positions, and those that place them elsewhere than in the stream.
_POSITIONS = re.compile(r"positions?(?:_embeddings)?$|max_seq_len")
_RELATIVE = re.compile(r"rope|rotary|alibi|relative")
_TABLE = re.compile(r"wpe|pos")
_MOST_NAMED = 12
_EXAMPLE = r"model\.layers\.(?P<layer>\d+)\.mlp\.down_proj\.(?:weight|bias)"


class Advice(NamedTuple):
    """What a recipe could say of a checkpoint.

    Attributes:
        lines: An ``[[ablate.target]]`` each.
        open: What names and shapes do not tell, a sentence each.
    """

    lines: tuple[str, ...]
    open: tuple[str, ...]


def advise(
    tensors: Mapping[str, TensorInfo], hidden: int | None, depth: int | None, keys: Iterable[str] = ()
) -> Advice:
    """Describes the writers of one decoder in the lines of a recipe, as far as names and shapes tell.

    Args:
        tensors: What the checkpoint holds.
        hidden: Length of the residual axis, if the configuration states it.
        depth: How many layers it states.
        keys: The keys of the configuration.
    """
    stacks: dict[str, list[str]] = defaultdict(list)
    outside = []
    for name in tensors:
        place = split_stack(name)
        if place is None:
            outside.append(name)
        else:
            stacks[place.head].append(name)
    head = _stream(stacks, depth)
    if head is None:
        return Advice((_line(_EXAMPLE, "mlp", "out"),), ("no list of layers was found, so the line is an example",))
    hidden = hidden or _length(tensors, stacks[head])
    if hidden is None:
        return Advice((_line(_EXAMPLE, "mlp", "out"),), ("the hidden size is not known, so the line is an example",))
    stored = orientation(tensors, stacks[head])
    lines: dict[str, tuple[str, Axis]] = {}
    doubtful = []
    for name in stacks[head]:
        role, axis = role_of(name, tensors[name].shape, hidden, stored)
        if role == "writer":
            component = "attention" if _ATTENTION.search(name.removeprefix(head)) else "mlp"
            lines[_pattern(name)] = (component, axis)
            if f"{name}_bias" in tensors:
                lines[_pattern(f"{name}_bias")] = (component, axis)
        elif role == "unknown" or is_lone_bias(name, tensors, hidden):
            doubtful.append(name)
    root = head.rpartition(".")[0]
    for name in outside:
        if not _beside(name, root, stacks, head) or hidden not in tensors[name].shape or len(tensors[name].shape) < 2:
            continue
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module == "project_in":
            lines[_pattern(name)] = ("embedding", "out")
        elif module in _EMBEDDINGS and tensors[name].shape[-1] == hidden:
            lines[_pattern(name)] = ("embedding", "in")
        elif not _HEAD.search(name):
            doubtful.append(name)
    remarks = [
        *_unplaced(doubtful),
        *_gains(tensors, stacks[head], hidden),
        *_vectors(tensors, stacks[head], hidden),
        *_embedding(
            [name for name in outside if _beside(name, root, stacks, head)],
            keys,
            [pattern for pattern, what in lines.items() if what[0] == "embedding"],
        ),
        *_stream_norm(tensors, stacks[head], outside, root, hidden),
        *_other_stacks(tensors, stacks, head, hidden),
    ]
    ordered = sorted(lines.items(), key=lambda line: line[1][0] != "embedding")
    found = [_line(pattern, *what) for pattern, what in ordered] or [_line(_EXAMPLE, "mlp", "out")]
    if not lines:
        remarks.insert(0, "no tensor could be placed, so the line is an example")
    return Advice(tuple(found), tuple(remarks))


def _line(pattern: str, component: str, axis: Axis) -> str:
    return f'[[ablate.target]]\npattern = \'{pattern}\'\ncomponent = "{component}"\naxis = "{axis}"'


def _pattern(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    tail = r"\.(?:weight|bias)" if last in ("weight", "bias") else re.escape(dot + last)
    place = split_stack(name)
    if place is None:
        return re.escape(stem) + tail
    inner = re.escape(_NUMBER.sub("#", f".{stem.removeprefix(f'{place.head}.{place.layer}.')}.")[1:-1])
    return re.escape(f"{place.head}.") + r"(?P<layer>\d+)\." + inner.replace(r"\#", r"\d+") + tail


def _stream(stacks: Mapping[str, Sequence[str]], depth: int | None) -> str | None:
    """Returns the list of layers that generates text: no tower, and no encoder where there is a decoder."""

    def preference(head: str) -> tuple[bool, bool, bool, bool, int]:
        count = len({place.layer for name in stacks[head] if (place := split_stack(name))})
        encodes = _ENCODER.search(head) is not None and "decoder" not in head
        return (
            not _TOWER.search(head) and not head.startswith("mtp"),
            not encodes,
            "decoder" in head,
            count == depth,
            len(stacks[head]),
        )

    return max(stacks, key=preference, default=None)


def _length(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> int | None:
    lengths = Counter(
        shape[0] for name in names if len(shape := tensors[name].shape) == 1 and _NORM.search(name)
    ).most_common(1)
    return lengths[0][0] if lengths else None


def _beside(name: str, root: str, stacks: Mapping[str, Sequence[str]], head: str) -> bool:
    """Tells whether a tensor outside of layers belongs to the chosen decoder rather than to another list of layers."""
    if _TOWER.search(name) or _HEAD.search(name):
        return False
    others = (other.rpartition(".")[0] for other in stacks if other != head)
    return not any(
        other and name.startswith(f"{other}.") and not f"{root}.".startswith(f"{other}.") for other in others
    )


def _unplaced(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"these could not be placed, as by shape they could write to the stream and the name does not tell: "
        f"{_fold(names)}; describe those that are added to it"
    ]


def _gains(tensors: Mapping[str, TensorInfo], names: Iterable[str], hidden: int) -> list[str]:
    vectors = [name for name in names if tensors[name].shape == (hidden,)]
    if not any(map(_AFTER.search, vectors)):
        return []
    found = [name for name in vectors if _AFTER.search(name) or re.search(r"(?:^|\.)post_?\w*norm", name)]
    return [
        f"an output may pass through {_fold(found)} before it is added to the stream; where it does, the target needs "
        "that gain, or part of the direction stays"
    ]


def _vectors(tensors: Mapping[str, TensorInfo], names: Iterable[str], hidden: int) -> list[str]:
    """Names vectors that are neither norms nor biases."""
    found = [
        name
        for name in names
        if tensors[name].shape in ((hidden,), (1, 1, hidden))
        and not (_NORM.search(name) or _AFTER.search(name) or name.endswith("bias"))
    ]
    if not found:
        return []
    return [f"{_fold(found)} may scale the stream or an output; where they do, part of the direction stays"]


def _embedding(outside: Iterable[str], keys: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Says what the lines of embeddings do not reach: a norm after them, and positions that are not stored."""
    remarks = []
    norms = [name for name in outside if _NORM.search(name) and "emb" in name.lower() and name.endswith("weight")]
    if norms:
        remarks.append(f"{_fold(norms)} may normalise the embedding, and then what is removed from that comes back")
    known = list(keys)
    counted = any(_POSITIONS.search(key) for key in known)
    if counted and not any(map(_RELATIVE.search, known)) and not any(map(_TABLE.search, patterns)):
        remarks.append(
            "no table of positions is stored: where positions are computed and added to the embedding, what they hold "
            "of the direction stays"
        )
    return remarks


def _stream_norm(
    tensors: Mapping[str, TensorInfo], inside: Iterable[str], outside: Iterable[str], root: str, hidden: int
) -> list[str]:
    """Says so where no norm stands after the last layer, as in models that normalise the stream after each addition."""
    inside = [name for name in inside if name.endswith("weight")]
    within = [name for name in inside if _NORM.search(name) and tensors[name].shape == (hidden,)]
    last = [
        name
        for name in outside
        if _NORM.search(name)
        and "embed" not in name
        and tensors[name].shape == (hidden,)
        and (not root or name.startswith(f"{root.rpartition('.')[0]}"))
    ]
    if not within or last:
        return []
    return [
        "there is no norm after the last layer, as in models that normalise the stream itself after each addition "
        f"({_fold(within)}); if this is one, what is removed from its writers comes back, and no edit of them holds"
    ]


def _other_stacks(
    tensors: Mapping[str, TensorInfo], stacks: Mapping[str, Sequence[str]], head: str, hidden: int
) -> list[str]:
    others = [
        other for other in stacks if other != head and any(len(tensors[name].shape) > 1 for name in stacks[other])
    ]
    if not others:
        return []
    verb, what = ("is", "a stream of its own") if len(others) == 1 else ("are", "streams of their own")
    return [
        f"the lines are of {head}; {', '.join(others[:_MOST_NAMED])}{' and more' if len(others) > _MOST_NAMED else ''} "
        f"{verb} taken for {what} and not described"
    ]


def _fold(names: Iterable[str]) -> str:
    """Returns each kind of name once, numbers as ``*``."""
    kinds = list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
    rest = len(kinds) - _MOST_NAMED
    return ", ".join(kinds[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
