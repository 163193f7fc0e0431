"""Finds the tensors of a checkpoint by the names that parameters go by in the model that was trained."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ablate_shards.errors import AdapterError
from ablate_shards.surgery.anatomy.architecture import Anatomy
from ablate_shards.surgery.anatomy.wrappers import unwrapped
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint

__all__ = ["Names"]

_MOST_CANDIDATES = 6

#: Prefixes that differ between a model, its text part and its checkpoint.
_OUTER = frozenset({"base_model", "language_model", "llm", "model", "text_model", "transformer"})
#: What transformers calls an encoder in its classifiers, where that is not the type of the model.
_BASE_PREFIXES = {"camembert": "roberta", "xlm-roberta": "roberta", "xlm-roberta-xl": "roberta"}
#: What one module is called in the model that transformers builds, and in checkpoints; searched either way round.
_SPELLINGS = (
    (".mlp.", ".block_sparse_moe."),
    (".experts.gate_up_proj", ".input_linear.weight"),
    (".experts.down_proj", ".output_linear.weight"),
    (".experts.gate_up_proj", ".experts.fc1.weight"),
    (".experts.down_proj", ".experts.fc2.weight"),
    (".shared_experts.", ".shared_expert."),
    (".shared_experts.", ".shared_mlp."),
    (".mlp.shared_experts.", ".share_expert."),
    (".mlp.gate.", ".mlp.router.gate."),
    (".gate_proj.", ".linear_gate."),
    (".mlp.", ".ffn."),
    (".self_attn.o_proj.", ".attention.dense."),
    (".self_attn.forget_gate.", ".attention."),
    (".self_attn.forget_gate.", ".self_attn."),
    (".self_attn.g_proj.", ".self_attn.gate_proj."),
    (".self_attn.q_gate_proj.", ".self_attn.q_b_proj."),
    (".self_attn.", ".attention."),
    (".self_attn.", ".attn."),
    ("layernorm.mlp.fc1.", "layernorm.W_down."),
    ("layernorm.mlp.fc2.", "layernorm.W_up."),
    ("embed_tokens.", "word_embeddings."),
)
_OF_EXPERT = ((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."))


class Names:
    """Finds tensors by name.

    Args:
        checkpoint: What holds them.
        anatomy: Its writers, None where they are not known.
        file: The adapter's weights, for errors.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy | None, file: Path) -> None:
        self._checkpoint, self._file = checkpoint, file
        self._roots = () if anatomy is None else _roots_of(anatomy)
        kind = str((checkpoint.config or {}).get("model_type", ""))
        self._outer = _OUTER | {_BASE_PREFIXES.get(kind, kind.replace("-", "_"))}
        self._by_core: defaultdict[str, list[str]] = defaultdict(list)
        for name in checkpoint.tensors:
            self._by_core[self._core(name)].append(name)
        self._by_end: dict[int, Mapping[str, list[str]]] = {}

    def find(self, path: str) -> str | None:
        """Returns the tensor that a parameter of the trained model is stored as.

        The model may hold it under other prefixes than the checkpoint does. Names that are the same without them
        are the same parameter; otherwise only the decoder is searched, never towers or multi-token prediction.

        Raises:
            AdapterError: More than one tensor is meant.
        """
        paths = [path, *(_spelled(path, _OF_EXPERT) if ".experts." in path else ())]
        spellings = (spelling for each in paths for spelling in (each, *_spelled(each, _SPELLINGS)))
        found = (self._find_as_spelled(spelling) for spelling in spellings)
        return next((name for name in found if name is not None), None)

    def _find_as_spelled(self, path: str) -> str | None:
        if path in self._checkpoint.tensors:
            return path
        core = self._core(path)
        found = self._by_core.get(core, [])
        if len(found) != 1:
            among = found or self._ending_in(core)
            inside = [name for name in among if name.startswith(self._roots)]
            found = inside if inside or not found else found
        if len(found) > 1:
            shown = ", ".join(found[:_MOST_CANDIDATES])
            raise AdapterError(
                f"{self._file}: {path} may be any of {shown} of {self._checkpoint.name}; expected exactly one; "
                "merge it with peft itself"
            )
        return found[0] if found else None

    def _ending_in(self, core: str) -> list[str]:
        """Returns the tensors whose names have more parts in front of a core."""
        count = core.count(".") + 1
        if count not in self._by_end:
            ends: defaultdict[str, list[str]] = defaultdict(list)
            for name in self._checkpoint.tensors:
                _, *end = name.rsplit(".", count)
                if len(end) == count:
                    ends[".".join(end)].append(name)
            self._by_end[count] = ends
        return self._by_end[count].get(core, [])

    def _core(self, name: str) -> str:
        """Returns a name without the prefixes that differ between a model, its text part and its checkpoint."""
        parts = unwrapped(name).split(".")
        while len(parts) > 1 and parts[0] in self._outer:
            del parts[0]
        return ".".join(parts)


def _spelled(path: str, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yields what else a path may be spelled as, either way round."""
    for pair in pairs:
        for old, new in (pair, pair[::-1]):
            if old in path:
                yield path.replace(old, new)


def _roots_of(anatomy: Anatomy) -> tuple[str, ...]:
    """Returns what the names of the decoder's tensors start with."""
    marks = (
        writer.name.split(f".{writer.layer}.")[0].rpartition(".")[0]
        for writer in anatomy.writers
        if writer.layer is not None and not writer.mtp
    )
    return tuple(f"{mark}." if mark else "" for mark in dict.fromkeys(marks))
