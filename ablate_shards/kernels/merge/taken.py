"""What a training took out of a matrix before it began, as factors: found again from the matrix as peft does.

PiSSA takes the ``r`` greatest singular vectors of ``W``, ``U_r·S_r·V_r``. OLoRA takes the first ``r`` columns of Q and
rows of R of ``W = QR``, times the scale. Singular values or columns that are close to each other make the result depend
on how it is computed. So the decompositions are the very ones of peft, those of torch in float32 on a CPU.
"""

from typing import Literal, TypeAlias

import numpy as np

from ablate_shards.kernels.codecs.plain import decoded

__all__ = ["Taken", "taken_factors"]

Taken: TypeAlias = Literal["pissa", "olora"]
"""The greatest singular vectors, or the first columns of a QR decomposition."""


def taken_factors(
    taken: Taken, weight: np.ndarray, rank: int, scale: float, *, transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B as the training began with them, so that ``scale·left·right`` is what is taken out of a matrix.

    Args:
        taken: What is taken.
        weight: ``[m, n]`` as stored, bfloat16 as its bits; finite.
        rank: At most ``min(m, n)``.
        scale: The scale of the update.
        transposed: Whether the weight is stored as ``[in, out]``, of which peft decomposes the transpose in PiSSA.

    Returns:
        ``left`` ``[m, rank]`` and ``right`` ``[rank, n]``, float32.
    """
    import torch

    from ablate_shards.kernels.choose import one_thread

    with one_thread("torch"):
        matrix = torch.from_numpy(decoded(weight, np.float32))
        if taken == "olora":
            columns, rows = torch.linalg.qr(matrix)
            return columns[:, :rank].numpy(), rows[:rank].numpy()
        first, values, second = torch.linalg.svd(matrix.T if transposed else matrix, full_matrices=False)
    roots = torch.sqrt(values[:rank] / scale)
    left, right = (first[:, :rank] * roots).numpy(), (roots[:, None] * second[:rank]).numpy()
    return (right.T, left.T) if transposed else (left, right)
