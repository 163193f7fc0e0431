"""Which tensors write to the residual stream, along which axis and through which gain."""

from ablate_shards.surgery.anatomy.architecture import Anatomy, Target, Writer, dissect

__all__ = ["Anatomy", "Target", "Writer", "dissect"]
