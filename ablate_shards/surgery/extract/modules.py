"""What the tensors of a checkpoint are called in the model that transformers builds of it, for an adapter's names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ablate_shards.surgery.anatomy.families import FAMILIES, Layout
from ablate_shards.surgery.anatomy.scales import plain_name_of
from ablate_shards.surgery.anatomy.wrappers import unwrapped
from ablate_shards.surgery.checkpoint.checkpoint import text_part
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["Form", "ModuleNames", "Place"]

Form = Literal["linear", "embedding", "parameter"]

_EMBEDDING = re.compile(r"(?:^|\.)(?:wte|wpe|embeddings?|word_embeddings|embed_(?:in|tokens|positions))$")
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d{1,5})\.(?P<leaf>[^.]+)\.weight")
_EXPERTS = re.compile(r"\.experts\.")
#: The parameter that transformers makes of an expert's matrices, by their names; and which part of it they are.
_FUSED = {
    "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
}  # fmt: skip
_GATES = {"up_proj": "gate_proj", "w3": "w1"}
#: Beside experts: names that peft takes for those of experts, wherever they stand, and routers, which are no nn.Linear.
_MISTAKEN = frozenset({"gate", "gate_proj", "router", "up_proj", "down_proj", "w1", "w2", "w3"})
#: What a module is called in the model where the checkpoint calls it otherwise.
_RENAMED = (
    (re.compile(r"\.block_sparse_moe\.(?=experts\.\d|shared_experts\.|(?:gate|\w+_proj)\.weight$)"), ".mlp."),
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".block_sparse_moe.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".block_sparse_moe.experts.down_proj"),
    (
        re.compile(r"\.(?:(?:block_sparse_moe|mlp)\.switch_mlp|mlp\.experts)\.down_proj\.weight$"),
        ".mlp.experts.down_proj",
    ),
    (re.compile(r"\.switch_mlp\.down_proj\.weight$"), ".experts.down_proj"),
    (re.compile(r"\.router\.layer\.weight$"), ".router.weight"),
    (re.compile(r"\.experts\.fc1\.weight$"), ".experts.gate_up_proj"),
    (re.compile(r"\.experts\.fc2\.weight$"), ".experts.down_proj"),
)
#: The same for one type of model, whose names are those of modules elsewhere.
_RENAMED_IN = {
    "bailing_hybrid": ((".attention.dense.", ".self_attn.o_proj."),),
    "deepseek_v4": (
        (".attn.wo_b.", ".self_attn.o_b_proj."),
        (".ffn.", ".mlp."),
        (".shared_experts.w2.", ".shared_experts.down_proj."),
    ),
    "hy_v3": ((".shared_mlp.", ".shared_experts."),),
    "step3p5": ((".moe.down_proj.weight", ".mlp.experts.down_proj"), (".share_expert.", ".mlp.shared_experts.")),
}
#: Models around a decoder that lies elsewhere in them than in the others.
_ROOTS_IN = {
    "llama4": "language_model.model.",
    "nemotron_h_omni": "language_model.model.",
    "phi4_multimodal": "model.",
}
#: What the decoder is called in the model where that is not what most checkpoints call it.
_ROOTS = {"backbone.": "model."}
_HEAD = "lm_head.weight"
_PARTS_BESIDE_TEXT = ("vision_config", "audio_config")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in the model.

    Attributes:
        path: The module whose weight it is, or the parameter.
        form: How peft adapts it.
        expert: The expert that it is of, None where it is the whole.
        part: Which of the matrices it is that an expert's is made of.
    """

    path: str
    form: Form
    expert: int | None = None
    part: int = 0


class ModuleNames:
    """Finds the modules and parameters of a model by the names of a checkpoint.

    Args:
        tensors: What the checkpoint holds.
        config: Its config.json.
        family: The row of the table of architectures, or another name where there is none.

    Attributes:
        bare: Whether the model is one without an output head, as its configuration names it.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, family: str | None) -> None:
        self._layout = next((row.layout for row in FAMILIES if row.name == family), Layout())
        self._tensors = tensors
        stored = [root for root in self._layout.roots if any(map(self._in_layers(root).match, map(unwrapped, tensors)))]
        self._stored = max(stored, key=len, default=None)
        architectures = (config or {}).get("architectures")
        self.bare = isinstance(architectures, list) and bool(architectures) and _is_bare(str(architectures[0]))
        self._root = self._root_in_model(config or {})
        text = text_part(config or {})
        self._renames = _RENAMED_IN.get(str((text[1] if text else config or {}).get("model_type")), ())
        self._experts = any(_EXPERTS.search(self._renamed(name)) for name in tensors)

    def holds(self, name: str) -> bool:
        """Returns whether a tensor belongs to the decoder or its output head, whose names are known here."""
        plain = unwrapped(name)
        return self._stored is None or plain.startswith(self._stored) or plain == _HEAD

    def place(self, tensor: TensorInfo) -> Place | None:
        """Returns where a weight is in the model, None where it is a part of what is there."""
        name = self._renamed(plain_name_of(unwrapped(tensor.name)))
        if found := _EXPERT.fullmatch(name):
            leaf, expert = found["leaf"], int(found["expert"])
            if leaf not in _FUSED:
                return None
            parameter, part = _FUSED[leaf]
            gate = tensor.name.replace(f".{leaf}.", f".{_GATES.get(leaf, leaf)}.")
            if gate not in self._tensors:  # such experts are without a gate
                parameter, part = leaf, 0
            return Place(f"{found['stack']}.{parameter}", "parameter", expert, part)
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) == 3:
            return Place(name, "parameter")
        if _EMBEDDING.search(module):
            return Place(module, "embedding")
        if self._experts and module.rpartition(".")[2] in _MISTAKEN:
            return Place(name, "parameter")
        return Place(module, "linear")

    def _in_layers(self, root: str) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(root)}{re.escape(self._layout.layers)}\.\d")

    def _renamed(self, name: str) -> str:
        if self._stored is not None and name.startswith(self._stored):
            name = self._root + name.removeprefix(self._stored)
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        for old, new in self._renames:
            name = name.replace(old, new)
        return name

    def _root_in_model(self, config: Mapping[str, Any]) -> str:
        """Returns what the names of the decoder begin with in the model."""
        stored, part = self._stored or "", text_part(config)
        if part is not None and part[0] != "text_config":
            return stored  # a class of its own, with the names of its checkpoint
        if (root := _ROOTS_IN.get(str(config.get("model_type")))) is not None:
            return root
        if part is not None or any(config.get(each) is not None for each in _PARTS_BESIDE_TEXT):
            return stored if stored in ("model.text_model.",) else "model.language_model."
        return stored if self.bare else _ROOTS.get(self._layout.roots[0], self._layout.roots[0])


def _is_bare(architecture: str) -> bool:
    """Tells whether a class of transformers has no output head; GPT2LMHeadModel has one."""
    return architecture.endswith("Model") and "Head" not in architecture
