"""Which modules of a model an adapter changes, and what of the edit it cannot carry."""

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ablate_shards.errors import PlanError, UsageError
from ablate_shards.surgery.anatomy.architecture import is_published_form
from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.extract.matrices import JoinedMatrix, Pair, ReadInto
from ablate_shards.surgery.extract.modules import Form, ModuleNames, Place
from ablate_shards.surgery.plan.edits import Skip

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Workspace

__all__ = ["LIMIT", "MOST_RANK", "RANK", "AdapterPlan", "Biases", "Change", "Module", "make_adapter_plan"]

Biases = Literal["none", "added", "replaced"]

#: The rank where none is given, doubled for a module until the update lacks at most this part of the difference.
RANK, LIMIT, MOST_RANK = 32, 0.1, 256
#: From which version on peft reads stacks of experts in the order in which they are written here.
PEFT_VERSION = "0.19.1"
#: What peft refuses to adapt, or adapts without effect, by the type of the model.
_REFUSED_BESIDE_MAMBA = {
    **dict.fromkeys(("falcon_h1", "nemotron_h", "nemotron_h_omni", "mamba", "mamba2", "falcon_mamba"), "out_proj"),
    "jamba": "dt_proj",
}
#: Types of which peft renames more of an adapter than it finds, so that a part takes no effect.
_NOT_LOADED = frozenset({"laguna", "mistral_large4", "unlimited_ocr"})
_POSITIONS = "embed_positions"
#: Families whose experts transformers marks as transposed, ``[E, in, out]``.
_MARKED = frozenset({"Aria", "gpt-oss"})


def _none_to_open(*_: Any) -> Pair:
    raise RuntimeError("a bias holds no matrix")


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that an adapter is to change.

    Attributes:
        tensor: Where it lies in the source.
        kind: ``weight`` or ``bias``.
        axis: The axis of what it writes, negative, -2 for ``[..., out, in]``.
        matrices: How many matrices it holds.
        open: Makes one of its matrices before and after the edit.
        basis: The directions whose part in the difference is kept exact, ``[k, d]`` float64; None where there are none.
        exact: The rank at which nothing of the difference is missing, None where there is no such one.
        vector: Returns a bias before and after the edit, ``[d]`` float64 each.
        scales: What its codes are multiplied by, None where it holds plain numbers.
        mtp: Whether it belongs to a multi-token-prediction layer.
        below: The tensor whose rows the model has below those of this one, in the same parameter.
    """

    tensor: TensorInfo
    kind: str
    axis: int
    matrices: int = 1
    open: "Callable[[ReadInto, int, Workspace], Pair]" = field(default=_none_to_open, repr=False, compare=False)
    basis: np.ndarray | None = field(default=None, repr=False, compare=False)
    exact: int | None = None
    vector: Callable[[], tuple[np.ndarray, np.ndarray]] | None = field(default=None, repr=False, compare=False)
    scales: Scales | None = None
    mtp: bool = False
    below: TensorInfo | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensor, and the one below it."""
        return (self.tensor,) if self.below is None else (self.tensor, self.below)

    @property
    def size(self) -> int:
        """Bytes of both."""
        return sum(tensor.end - tensor.start for tensor in self.tensors)

    @property
    def name(self) -> str:
        """The tensor."""
        return self.tensor.name


@dataclass(frozen=True, slots=True)
class Module:
    """A module or a parameter of the model, and what of the checkpoint it is.

    Attributes:
        path: Its name in the model.
        form: How peft adapts it.
        changes: Its tensor, or those of its experts in their order.
        swapped: Whether peft takes what it writes for its input, as in stacks ``[E, in, out]`` that nobody marked.
        depth: How many other parameters of the same module peft wraps around it.
        bias: What changes its bias.
    """

    path: str
    form: Form
    changes: tuple[Change, ...]
    swapped: bool = False
    depth: int = 0
    bias: Change | None = None

    @property
    def matrices(self) -> int:
        """How many matrices it holds."""
        return sum(change.matrices for change in self.changes)

    @property
    def ties(self) -> bool:
        """Whether peft adapts a head that is tied to it along with it, which goes by the name of the embedding."""
        return self.path.rpartition(".")[2] == "embed_tokens"

    @property
    def prefix(self) -> str:
        """What the names of its factors begin with."""
        path = self.path.rpartition(".")[0] if self.form == "parameter" else self.path
        return f"base_model.model.{path}.{'base_layer.' * self.depth}"


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter will hold.

    Attributes:
        modules: The modules and parameters that it changes.
        left_out: Tensors of the edit that it does not change, each with the reason.
        rank: The rank that was asked for, None for the one that is enough.
        tied: Whether the output head is tied to the token embedding.
        bare: Whether the model has no output head.
        conv1d: Whether its weights are stored as ``[in, out]``.
        keeps_ties: Whether the output head changes with the embedding that it is tied to.
        biases: How it carries biases: ``added`` as those of B, which leaves the model's own as they are, or
            ``replaced``, for models in which not every module that is adapted has one.
    """

    modules: tuple[Module, ...]
    left_out: tuple[Skip, ...]
    rank: int | None
    tied: bool = False
    bare: bool = False
    conv1d: bool = False
    keeps_ties: bool = False
    biases: Biases = "none"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the run, a line for each reason to leave something out."""
        reasons: defaultdict[str, list[str]] = defaultdict(list)
        for skip in self.left_out:
            reasons[skip.reason].append(re.sub(r"(?<=\.)\d+(?=\.)", "*", skip.name))
        return tuple(f"not in the adapter: {', '.join(_counted(names))}: {reason}" for reason, names in reasons.items())

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON types."""
        return {
            "rank": self.rank,
            "fan_in_fan_out": self.conv1d,
            "ensure_weight_tying": self.keeps_ties,
            "biases": self.biases,
            "modules": [
                {
                    "path": module.path,
                    "form": module.form,
                    "tensors": [tensor.name for change in module.changes for tensor in change.tensors],
                    **({"bias": module.bias.name} if module.bias else {}),
                }
                for module in self.modules
            ],
            "left_out": [{"name": skip.name, "reason": skip.reason} for skip in self.left_out],
        }

    def sha256(self) -> str:
        """Returns the digest of the plan's canonical JSON form."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def config(self, checkpoint: Checkpoint, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Returns ``adapter_config.json``, every scale of which is 1.

        Args:
            checkpoint: The base.
            ranks: The rank of each module, by its path.
        """
        usual = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != usual}
        base = checkpoint.identity
        return {
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "task_type": None if self.bare else "CAUSAL_LM",
            "base_model_name_or_path": base["name"],
            "revision": base.get("revision"),
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "lora_dropout": 0.0,
            "bias": "lora_only" if self.biases == "replaced" else "none",
            "lora_bias": self.biases == "added",
            "fan_in_fan_out": self.conv1d,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "target_modules": sorted(module.path for module in self.modules if module.form != "parameter"),
            "target_parameters": sorted(module.path for module in self.modules if module.form == "parameter"),
            **({"ensure_weight_tying": True} if self.keeps_ties else {}),
        }


def make_adapter_plan(
    checkpoint: Checkpoint,
    changes: Sequence[Change],
    family: str | None,
    rank: int | None,
    *,
    tied: bool,
    left_out: Iterable[Skip] = (),
) -> AdapterPlan:
    """Finds the module of each tensor of an edit.

    Args:
        checkpoint: The source.
        changes: What the edit changes.
        family: The architecture the table recognised, None where it did not.
        rank: The rank that was asked for, None for the one that is enough.
        tied: Whether the output head is tied to the token embedding.
        left_out: What is left out already.

    Raises:
        PlanError: There is nothing that an adapter could carry, a module is named twice, or the names are not those of
            transformers.
        UsageError: The rank is less than that of the directions.
    """
    most = max((len(change.basis) for change in changes if change.basis is not None), default=1)
    if rank is not None and rank < most:
        raise UsageError(
            f"--adapter-rank {rank}: there are {most} directions per layer, which take as many; give at least {most}"
        )
    if family is not None and is_published_form(checkpoint.tensors, family):
        raise PlanError(
            f"{checkpoint.name}: {changes[0].name} is called as its makers publish it, and an adapter needs the names "
            "of modules of transformers; write a checkpoint instead, or take the model in the form that transformers "
            "loads"
        )
    names = ModuleNames(checkpoint.tensors, checkpoint.config, family)
    if _model_type(checkpoint) in _NOT_LOADED:
        raise PlanError(
            f"{checkpoint.name}: peft loads only a part of an adapter of a {_model_type(checkpoint)}; write a "
            "checkpoint instead"
        )
    refused = _REFUSED_BESIDE_MAMBA.get(_model_type(checkpoint))
    left_out = list(left_out)
    groups: defaultdict[str, list[tuple[Place, Change]]] = defaultdict(list)
    biases: dict[str, Change] = {}
    heads = {change.name for change in changes if change.kind == "weight" and _HEAD.search(change.name)} if tied else ()
    for change in changes:
        if change.mtp:
            left_out.append(_skip(change, "multi-token prediction is no part of the model that transformers builds"))
        elif change.kind == "bias":
            biases[change.name.removesuffix("bias").rstrip("._")] = change
        elif change.name in heads:
            left_out.append(_skip(change, "tied to the token embedding, with which it changes"))
        elif (place := names.place(change.tensor)) is None:
            left_out.append(_skip(change, "is a part of what transformers makes one parameter of"))
        elif place.path.removesuffix(".weight").rpartition(".")[2] == refused:
            left_out.append(
                _skip(change, "no adapter of a module of this name takes effect in this model's Mamba layers")
            )
        elif place.path.rpartition(".")[2] == _POSITIONS:
            left_out.append(_skip(change, "its module counts the positions itself, which peft does not know of"))
        else:
            groups[place.path].append((place, change))
    modules = _nested([_module(path, found, family) for path, found in groups.items()])
    paths = {
        module.changes[0].name.removesuffix(".weight"): module.path for module in modules if module.form == "linear"
    }
    carried = {paths[stem]: change for stem, change in biases.items() if stem in paths}
    left_out += [
        _skip(change, "peft carries the biases of linear modules only, so that this one stays as it is")
        for stem, change in biases.items()
        if stem not in paths
    ]
    prefixes = Counter(module.prefix for module in modules)
    if twice := next((module.path for module in modules if prefixes[module.prefix] > 1), None):
        raise PlanError(
            f"{checkpoint.name}: {twice} is one of several parameters of a module whose names in an adapter are not "
            "known; write a checkpoint instead"
        )
    modules = [dataclasses.replace(module, bias=carried.get(module.path)) for module in modules]
    if tied and not names.bare:
        left_out += [
            Skip("the output head", None, None, f"tied to {module.path}, and peft ties adapters of embed_tokens only")
            for module in modules
            if module.form == "embedding" and _TOKENS.search(module.path) and not module.ties
        ]
    if not modules:
        raise PlanError(f"{checkpoint.name}: an adapter can carry nothing of this edit; write a checkpoint instead")
    adapted = [module for module in modules if module.form == "linear"]
    return AdapterPlan(
        modules=tuple(modules),
        left_out=tuple(left_out),
        rank=rank,
        tied=tied,
        bare=names.bare,
        conv1d=bool(adapted) and all(module.changes[0].axis == -1 for module in adapted),
        keeps_ties=tied and any(module.ties for module in modules),
        biases="none" if not carried else "added" if len(carried) == len(modules) else "replaced",
    )


_TOKENS = re.compile(r"(?:^|\.)(?:wte|embeddings|word_embeddings|embed_in|embed_tokens)$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")


def _module(path: str, found: Iterable[tuple[Place, Change]], family: str | None) -> Module:
    places = _joined(sorted(found, key=lambda each: (each[0].expert or 0, each[0].part)))
    form, expert = places[0][0].form, places[0][0].expert
    changes = tuple(change for _, change in places)
    if (len(places) > 1 or expert) and [place.expert for place, _ in places] != list(range(len(places))):
        names = " and ".join(change.name for change in changes[:2])
        raise PlanError(
            f"{names} {'is' if len(places) == 1 else 'are'} of one parameter of the model, {path}, and not all of it; "
            "write a checkpoint instead of an adapter"
        )
    if len({tuple(tensor.shape for tensor in change.tensors) for change in changes}) > 1:
        raise PlanError(
            f"{changes[0].name}: the experts beside it have other shapes, and {path} of the model holds only those of "
            "one; write a checkpoint instead of an adapter"
        )
    stacked = form == "parameter" and (expert is not None or len(changes[0].tensor.shape) > 2)
    return Module(path, form, changes, swapped=stacked and changes[0].axis == -1 and family not in _MARKED)


def _joined(places: Sequence[tuple[Place, Change]]) -> list[tuple[Place, Change]]:
    """Makes one change of the two matrices that an expert's parameter is made of."""
    joined: list[tuple[Place, Change]] = []
    for place, change in places:
        if place.part == 0:
            joined.append((place, change))
            continue
        above = joined[-1][1] if joined and joined[-1][0].expert == place.expert else None
        if above is None or above.below is not None:
            raise PlanError(
                f"{change.name} is a part of the parameter {place.path} of the model, and the other part is not there; "
                "write a checkpoint instead of an adapter"
            )
        both = dataclasses.replace(above, below=change.tensor, open=functools.partial(_open_both, above, change))
        joined[-1] = joined[-1][0], both
    return joined


def _open_both(upper: Change, lower: Change, read: ReadInto, number: int, workspace: "Workspace") -> Pair:
    return JoinedMatrix(upper.open(read, number, workspace), lower.open(read, number, workspace))


def _nested(modules: Sequence[Module]) -> list[Module]:
    """Returns modules with their depths: of two parameters of one module, peft wraps the one that comes last around."""
    last = {
        module.path.rpartition(".")[0]
        for module in modules
        if module.form == "parameter" and module.path.endswith(".down_proj")
    }
    return [
        dataclasses.replace(module, depth=1)
        if module.path.endswith((".gate_up_proj", ".experts.up_proj")) and module.path.rpartition(".")[0] in last
        else module
        for module in modules
    ]


def _model_type(checkpoint: Checkpoint) -> str:
    return str((checkpoint.config or {}).get("model_type"))


def _skip(change: Change, reason: str) -> Skip:
    return Skip(change.name, None, None, reason)


def _counted(names: Iterable[str]) -> list[str]:
    return [name if count == 1 else f"{count} x {name}" for name, count in Counter(names).items()]
