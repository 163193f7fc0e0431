"""What a part of a tensor must offer so that its blocks can be edited one at a time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ablate_shards.surgery.edit.loops import Each

if TYPE_CHECKING:
    from ablate_shards.kernels.form import Turn

__all__ = ["Reader", "Section"]

Reader: TypeAlias = Callable[[int, int], np.ndarray]
"""Takes an offset and a count; returns those bytes of the source, in memory that the next call may overwrite."""


class Section(Protocol):
    """A part of a tensor that is edited by itself, one block after the other; blocks may be edited more than once.

    Attributes:
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        block: Bytes of a block, known once it has been gathered; the last one may be shorter.
        gathers: Whether all of it must be read before its first block can be edited.
        light: Whether what it keeps of that is little beside its bytes.
        each: Goes over its blocks, in several threads if it is large and they may edit and measure them at once.
    """

    start: int
    end: int
    block: int
    gathers: bool
    light: bool
    each: Each

    def gather(self, read: Reader) -> None:
        """Reads all of it and takes the sums that editing a block needs.

        Raises:
            AblateError: The tensor cannot be edited.
        """

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Edits a block in place, ``[bytes]`` uint8, as read from an offset of the shard.

        Raises:
            AblateError: The tensor cannot be edited.
        """

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Measures a block as it was written; called once for each block, in order or, by several threads, in turn."""

    def measured(self) -> Any:
        """Returns what was measured, for the editor's ``result``; each editor has a type of its own for it.

        It is called once after each gather, when all blocks have been edited and measured: some of it is not true
        before. After the call measuring begins anew.

        Raises:
            AblateError: The tensor cannot be edited.
        """
