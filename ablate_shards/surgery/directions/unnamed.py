"""A direction that a file holds without saying of which decoder layer, as many scripts save it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ablate_shards.errors import DirectionsError, reason

__all__ = ["no_layers", "only_direction", "read_npy"]

_BY_NAME = "save what is meant as direction.layers.N of shape [d] in an .npz file (numpy.savez), N the decoder layer"
_MOST_SHOWN = 4


def read_npy(path: Path) -> np.ndarray:
    """Reads one array of numbers; no code that the file carries is run.

    Raises:
        DirectionsError: The file is missing, or holds anything else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DirectionsError(f"{path}: the file does not exist") from error
    except (ValueError, OSError, EOFError) as error:
        raise DirectionsError(
            f"{path}: not an array of numbers as NumPy saves it ({reason(error)}); {_BY_NAME}"
        ) from error
    if not isinstance(found, np.ndarray):
        raise DirectionsError(f"{path}: several arrays; give the file the ending .npz")
    return found


def only_direction(path: Path, arrays: Mapping[str, np.ndarray], layer: int | None) -> dict[int, np.ndarray]:
    """Returns the one direction that a file holds, ``[1, d]``, under the layer that the user names.

    Args:
        path: The file, for the error.
        arrays: What it holds, by name.
        layer: The decoder layer, None where nobody named one.

    Raises:
        DirectionsError: It holds none, or several, or the layer is not named.
    """
    held = [f"{name} {list(array.shape)} of {array.dtype}" for name, array in arrays.items()]
    vectors = [array for array in arrays.values() if array.size > 1]
    if len(vectors) != 1 or vectors[0].dtype.kind != "f" or vectors[0].size != vectors[0].shape[-1]:
        raise no_layers(path, held)
    if layer is None:
        raise DirectionsError(
            f"{path}: holds {', '.join(held[:_MOST_SHOWN])}, one direction, and does not say of which decoder layer; "
            "name that with --source-layer N and the layers to edit with --layers, both in `ablate-shards SOURCE OUT`, "
            f"or {_BY_NAME}"
        )
    return {layer: vectors[0].reshape(1, -1)}


def no_layers(path: Path, held: Sequence[str]) -> DirectionsError:
    """Returns the error of a file whose names do not tell which layer each direction is of.

    Args:
        path: The file.
        held: What it holds: names, shapes and dtypes.
    """
    more = f" and {len(held) - _MOST_SHOWN} more" if len(held) > _MOST_SHOWN else ""
    shown = ", ".join(held[:_MOST_SHOWN]) or "nothing"
    return DirectionsError(f"{path}: holds {shown}{more}, and not what is the direction of which layer; {_BY_NAME}")
