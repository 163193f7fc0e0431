"""Names that torch, trainers and their wrappers put into those of tensors, and that are no part of a model."""

__all__ = ["unwrapped"]

#: torch.compile, activation checkpoints, FSDP and DeepSpeed under Lightning.
_ANYWHERE = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"})
#: DataParallel and DistributedDataParallel, and what trainers call the model that they train among several, such as
#: TRL with its value head. Deeper down a model may have modules of these names.
_FIRST = frozenset({"module", "pretrained_model", "actor", "policy", "student"})


def unwrapped(name: str) -> str:
    """Returns a tensor's or a module's name without the names of wrappers."""
    *parents, last = name.split(".")
    parents = [part for part in parents if part not in _ANYWHERE]
    while parents and parents[0] in _FIRST:
        del parents[0]
    return ".".join((*parents, last))
