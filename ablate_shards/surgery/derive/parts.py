"""Which part of a layer a kind of writer is: what its output depends on, and what kind of module holds it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ablate_shards.surgery.anatomy.parts import Part
from ablate_shards.surgery.derive.twin import Twin, numbers_of
from ablate_shards.surgery.derive.writers import Kind, silence

if TYPE_CHECKING:
    import torch

__all__ = ["find_parts"]

#: Tokens that a convolution may reach; windows of attention are longer on a twin.
_SHORT = 4
#: Classes that mix tokens by a state that they carry along, which no intervention tells from attention.
_LINEAR = re.compile(r"delta|lightning|linear_?att|lstm|recurrent|retention", re.IGNORECASE)
#: Experts that are tried one by one.
_TRIED = 4
#: Share by which a sum may differ from its parts.
_SAME = 1e-4


def find_parts(twin: Twin, writers: Sequence[Kind]) -> list[Kind]:
    """Returns the kinds with the parts that they are, as far as interventions and classes of modules tell.

    Args:
        twin: The tiny model.
        writers: What writes to its stream, with whether each mixes tokens.
    """
    inside = [kind for kind in writers if kind.first > 0]
    found = [
        replace(kind, part=_mixing_part(twin, kind) if kind.mixes else _routed(twin, inside, kind))
        if kind.first > 0 and not kind.vector
        else kind
        for kind in writers
    ]
    routed = [kind for kind in found if kind.part == "routed-experts"]

    def is_shared(kind: Kind) -> bool:
        open_yet = kind.first > 0 and not kind.vector and not kind.mixes and kind.part is None
        return open_yet and any(_is_beside(twin, inside, kind, experts) for experts in routed)

    return [replace(kind, part="shared-experts") if is_shared(kind) else kind for kind in found]


def _mixing_part(twin: Twin, kind: Kind) -> Part | None:
    if kind.crosses:
        return "cross-attention"
    if kind.reach <= _SHORT:
        return "convolution"
    parts = {_part_of_modules(modules, _model_name(twin)) for modules in twin.owners(kind.tensors)}
    return parts.pop() if len(parts) == 1 else None


def _model_name(twin: Twin) -> str:
    """Returns what the classes of a model begin with."""
    return type(twin.network).__name__.partition("For")[0].removesuffix("Model")


def _part_of_modules(modules: Sequence[Any], model: str) -> Part | None:
    """Returns what a module and those that it lies in are: a state space by its parameters, else by their classes.

    A model may be called like one of the classes.
    """
    if any(hasattr(module, "A_log") and hasattr(module, "D") for module in modules):
        return "mamba"
    classes = [type(module).__name__ for module in modules]
    own = [name if name.startswith("xLSTM") else name.removeprefix(model) for name in classes]
    return "linear-attention" if any(map(_LINEAR.search, own)) else None


def _routed(twin: Twin, inside: Sequence[Kind], kind: Kind) -> Part | None:
    """Returns that a kind is of experts, where what one of its matrices adds reaches some tokens and not others."""
    state = silence(twin.state, inside)
    before = twin.stream(state)[0]
    for alone in _one_by_one(twin, kind):
        added = (twin.stream({**state, **alone})[kind.first] - before).abs().amax(dim=-1)
        if bool((added > 0).any()) and bool((added == 0).any()):
            return "routed-experts"
    return None


def _one_by_one(twin: Twin, kind: Kind) -> "list[dict[str, torch.Tensor]]":
    """Returns the first matrices of a stack, or of those that are numbered within their layer, each alone."""
    import torch

    tensors = {name: twin.state[name] for name in kind.tensors}
    if all(tensor.ndim > 2 for tensor in tensors.values()):
        count = min(_TRIED, *map(len, tensors.values()))
        return [
            {name: tensor * (torch.arange(len(tensor)) == number)[:, None, None] for name, tensor in tensors.items()}
            for number in range(count)
        ]
    by_number: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        by_number.setdefault(tuple(numbers_of(name)[1:]), {})[name] = tensor
    return list(by_number.values())[:_TRIED] if len(by_number) > 1 else []


def _is_beside(twin: Twin, inside: Sequence[Kind], kind: Kind, experts: Kind) -> bool:
    """Tells whether a kind has one matrix beside the experts of each of its layers, and adds to what they add."""
    layers = {numbers_of(name)[0] for name in kind.tensors}
    others = {numbers_of(name)[0] for name in experts.tensors}
    if not layers <= others or len(layers) < len(kind.tensors):
        return False
    layer = min(layers, key=int)
    state = silence(twin.state, inside)

    def added(*kinds: Kind) -> "torch.Tensor":
        kept = {name: twin.state[name] for each in kinds for name in each.tensors if numbers_of(name)[0] == layer}
        states = twin.stream({**state, **kept})
        return states[int(layer) + 1] - states[0]

    both = added(kind, experts)
    return bool((both - added(kind) - added(experts)).abs().amax() <= _SAME * both.abs().amax())
