"""A digest that differs between models, taken without reading all of their weights."""

import hashlib
import threading

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint

__all__ = ["SOURCE_WEIGHTS", "base_digest"]

#: What the receipt of an adapter calls the digest of its source, whose headers may be those of many models.
SOURCE_WEIGHTS = "source_weights"

_PIECES, _PIECE = 8, 4096


def base_digest(checkpoint: Checkpoint) -> str | None:
    """Returns a digest that differs between checkpoints, without reading all of their weights.

    It covers every tensor's name, dtype and shape and eight evenly spaced pieces of 4 KiB of its bytes, in the
    order of the names; how the tensors are spread over files does not matter. It is no proof against tampering.

    Returns:
        The digest, or None for a checkpoint that is not on this machine, where this many reads would take long.
    """
    if checkpoint.remote is not None:
        return None
    digest, never = hashlib.sha256(), threading.Event()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\n".encode())
        last = max(tensor.start, tensor.end - _PIECE)
        for start in sorted({tensor.start + (last - tensor.start) * n // (_PIECES - 1) for n in range(_PIECES)}):
            piece = bytearray(min(_PIECE, tensor.end - start))
            checkpoint.files.read_into(tensor.shard, memoryview(piece), start, never)
            digest.update(piece)
    return digest.hexdigest()
