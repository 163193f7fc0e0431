"""Edits parts of tensors block by block, for whoever hands the blocks over one at a time and takes them again."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    pass

__all__ = ["Reader", "Section"]

Reader: TypeAlias = Callable[[int, int], np.ndarray]
"""Returns bytes of the source, from an offset and that many, in memory that the next call may take again."""


class Section(Protocol):
    """A part of a tensor that is edited by itself, one block after the other, and again where that is wanted.

    Attributes:
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        block: Bytes of a block, known once it has been gathered; the last one may be shorter.
        gathers: Whether all of it is read before its first block can be edited.
    """

    start: int
    end: int
    block: int
    gathers: bool

    def gather(self, read: Reader) -> None:
        """Learns what has to be known of all of it.

        Raises:
            AblateError: The tensor cannot be edited.
        """

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Edits a block in place, ``[bytes]`` uint8, as read from an offset of the shard.

        Raises:
            AblateError: The tensor cannot be edited.
        """

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Takes a block as it was written; all of them once, in order."""

    def measured(self) -> Any:
        """Returns what was measured, for :meth:`BlockEditor.result`.

        Raises:
            AblateError: The tensor cannot be edited.
        """
