"""What a writer's output is multiplied by before it is added to the stream: stored vectors, and a mean subtracted."""

from collections.abc import Callable

import numpy as np

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_vector

__all__ = ["CENTRED", "TIMES", "factors_of", "is_centred", "vector_of", "with_names"]

#: Between the names of vectors that an output is multiplied by one after another.
TIMES = " * "
#: Before them where a mean is subtracted from the output first, as LayerNorm does.
CENTRED = "centred "


def factors_of(gain: str) -> tuple[str, ...]:
    """Returns the vectors of a gain."""
    return tuple(name.strip() for name in gain.removeprefix(CENTRED).split(TIMES))


def is_centred(gain: str) -> bool:
    """Tells whether a mean is subtracted from the output before it is multiplied."""
    return gain.startswith(CENTRED)


def with_names(gain: str, name_of: Callable[[str], str]) -> str:
    """Returns a gain with other names of its vectors."""
    start = CENTRED if is_centred(gain) else ""
    return start + TIMES.join(map(name_of, factors_of(gain)))


def vector_of(checkpoint: Checkpoint, gain: str, offset: float) -> np.ndarray:
    """Returns what a gain multiplies by, ``[d]`` float64.

    Args:
        checkpoint: What holds its vectors.
        gain: Their names.
        offset: What is added to each of them first.

    Raises:
        PlanError: One is not BF16, F16 or F32, or is damaged.
    """
    vectors = [read_vector(checkpoint, checkpoint.tensors[name]) + offset for name in factors_of(gain)]
    return np.asarray(np.prod(vectors, axis=0))
