"""Files of directions: the project's own, and the foreign ones that are read."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ablate_shards.errors import ActivationsError, CheckpointError, DirectionsError
from ablate_shards.kernels.codecs.plain import STORED, decoded
from ablate_shards.surgery.checkpoint.headers import TensorInfo, read_header
from ablate_shards.surgery.directions.activations import (
    MEASUREMENT_SUFFIXES,
    read_npz,
    read_pickled_tensors,
)
from ablate_shards.surgery.directions.directions import Directions, LayerScore, score_by_means, score_table
from ablate_shards.surgery.directions.unnamed import no_layers, only_direction, read_npy
from ablate_shards.surgery.directions.vectors import LARGEST, NOTHING_LEFT, orthonormal, smallest_singular_value, unit
from ablate_shards.surgery.machine.files import write_safetensors
from ablate_shards.validation import checked

__all__ = ["DIRECTIONS_FORMAT", "read_directions", "write_directions"]

DIRECTIONS_FORMAT = "ablate-shards.directions/1"

_ORTHONORMAL = 1e-4

_NAME = re.compile(r"(?P<kind>direction|reference)\.layers\.(?P<layer>0|[1-9]\d{0,4})")

_GGUF_NAME = re.compile(r"direction\.(?P<layer>0|[1-9]\d{0,4})")

_MEASURED_NAME = re.compile(r"(?P<kind>refuse|harmful|harmless)_(?P<index>0|[1-9]\d{0,4})")


def write_directions(directions: Directions, path: Path) -> None:
    """Writes directions as safetensors; the file appears complete or not at all, the same bytes every time.

    Raises:
        OSError: It cannot be written.
    """
    tensors = {
        f"{kind}.layers.{layer}": np.ascontiguousarray(arrays[layer], "<f4")
        for kind, arrays in (("direction", directions.basis), ("reference", directions.reference))
        for layer in sorted(arrays)
    }
    scores = json.dumps(score_table(directions))
    write_safetensors(
        path,
        {name: ("F32", array.shape, array.nbytes) for name, array in tensors.items()},
        {**directions.metadata, "format": DIRECTIONS_FORMAT, "scores": scores},
        [array.data for array in tensors.values()],
    )


def read_directions(path: Path, layer: int | None = None) -> Directions:
    """Reads directions: our own file, ``.npz`` with its names, GGUF control vectors, llm-abliteration's ``.pt``.

    Foreign directions of any length are made orthonormal. ``docs/directions.md`` says how layers are counted.

    Args:
        path: The file.
        layer: The decoder layer of a direction whose file names none: one vector in ``.pt``, ``.npy`` or ``.npz``.

    Raises:
        DirectionsError: The file is missing, malformed, or holds no usable directions.
    """
    if path.is_dir():
        raise DirectionsError(f"{path}: expected a file of directions, found a folder; name the file in it")
    try:
        if path.suffix in MEASUREMENT_SUFFIXES:
            return _read_measurements(path, layer)
        if path.suffix == ".gguf":
            return _checked(path, _orthonormal_each(path, _read_gguf(path)), {})
        if path.suffix == ".npz":
            arrays = read_npz(path)
            if not any(map(_NAME.fullmatch, arrays)):
                return _checked(path, _orthonormal_each(path, only_direction(path, arrays, layer)), {})
            basis, reference = _by_name(path, arrays)
            return _checked(path, _orthonormal_each(path, basis), reference)
        if path.suffix == ".npy":
            found = only_direction(path, {"an array": read_npy(path)}, layer)
            return _checked(path, _orthonormal_each(path, found), {})
        return _read_own(path, layer)
    except (ActivationsError, CheckpointError) as error:
        raise DirectionsError(str(error)) from error


def _read_own(path: Path, layer: int | None) -> Directions:
    shard, metadata = read_header(path)
    if "ablate-shards" not in metadata.get("format", ""):
        if len(shard.tensors) == 1:
            return _read_only_tensor(path, shard.tensors[0], layer)
        if not any(_NAME.fullmatch(tensor.name) for tensor in shard.tensors):
            raise no_layers(path, [f"{tensor.name} {list(tensor.shape)} of {tensor.dtype}" for tensor in shard.tensors])
    if (found := metadata.get("format", "not given")) != DIRECTIONS_FORMAT:
        names = ", ".join(tensor.name for tensor in shard.tensors[:2]) or "no tensors"
        raise DirectionsError(
            f"{path}: its format is {found} (holds {names}), expected {DIRECTIONS_FORMAT}; "
            "make it with `ablate-shards directions`, or update ablate-shards"
        )
    arrays = {}
    with path.open("rb") as file:
        for tensor in shard.tensors:
            if tensor.dtype != "F32":
                raise DirectionsError(f"{path}: {tensor.name} is {tensor.dtype}, expected F32; compute it again")
            file.seek(tensor.start)
            arrays[tensor.name] = np.frombuffer(file.read(tensor.end - tensor.start), "<f4").reshape(tensor.shape)
    basis, reference = _by_name(path, arrays)
    kept = {key: value for key, value in metadata.items() if key not in ("format", "scores")}
    return _checked(path, basis, reference, _read_scores(path, metadata.get("scores", "[]"), basis), kept)


def _read_only_tensor(path: Path, tensor: TensorInfo, layer: int | None) -> Directions:
    """Reads the direction that another program saved as the only tensor of a file."""
    if tensor.dtype not in STORED:
        raise DirectionsError(
            f"{path}: {tensor.name} is {tensor.dtype}, expected BF16, F16 or F32; save it as one of them"
        )
    with path.open("rb") as file:
        file.seek(tensor.start)
        stored = np.frombuffer(file.read(tensor.end - tensor.start), STORED[tensor.dtype])
    found = only_direction(path, {tensor.name: decoded(stored, np.float64).reshape(tensor.shape)}, layer)
    return _checked(path, _orthonormal_each(path, found), {})


def _read_scores(path: Path, text: str, layers: Mapping[int, Any]) -> dict[int, LayerScore]:
    try:
        scores = checked(json.loads(text), tuple[LayerScore, ...], "scores", closed=(LayerScore,))
        if odd := [score.layer for score in scores if score.layer not in layers]:
            raise ValueError(f"expected scores of its own layers, found one of layer {odd[0]}")
    except (ValueError, RecursionError) as error:
        raise DirectionsError(
            f"{path}: the scores in its metadata cannot be read ({error}); compute it again"
        ) from error
    return {score.layer: score for score in scores}


def _read_measurements(path: Path, layer: int | None) -> Directions:
    """Reads llm-abliteration's measurements, whose index N counts hidden_states: after decoder layer N - 1."""
    found: dict[str, dict[int, np.ndarray]] = {"refuse": {}, "harmful": {}, "harmless": {}}
    tensors = read_pickled_tensors(path)
    if not any(map(_MEASURED_NAME.fullmatch, tensors)):
        return _checked(path, _orthonormal_each(path, only_direction(path, tensors, layer)), {})
    for name, values in tensors.items():
        if (match := _MEASURED_NAME.fullmatch(name)) and int(match["index"]):
            if values.dtype != np.float64 or values.ndim != 1:
                raise DirectionsError(
                    f"{path}: {name} is {values.dtype} {list(values.shape)}, expected floating-point [hidden size]"
                )
            found[match["kind"]][int(match["index"]) - 1] = values
    refuse, harmful, harmless = found.values()
    basis = _orthonormal_each(path, refuse)
    directions = _checked(path, basis, harmless)
    scores = {
        layer: score_by_means(layer, harmful[layer], harmless[layer], gap, basis[layer][0])
        for layer, gap in refuse.items()
        if layer in harmful and layer in harmless
    }
    return Directions(directions.basis, directions.reference, scores)


def _read_gguf(path: Path) -> dict[int, np.ndarray]:
    """Reads a control vector: llama.cpp and repeng add ``direction.N`` to the output of decoder layer N."""
    try:
        import gguf
    except ImportError as error:
        raise DirectionsError(f"{path}: GGUF files need the gguf package: pip install 'ablate-shards[gguf]'") from error
    try:
        tensors = gguf.GGUFReader(path).tensors
    except FileNotFoundError as error:
        raise DirectionsError(f"{path}: the file does not exist") from error
    except Exception as error:
        raise DirectionsError(f"{path}: not a GGUF control vector ({error}); fetch it again") from error
    basis = {}
    for tensor in tensors:
        if match := _GGUF_NAME.fullmatch(tensor.name):
            if tensor.data.dtype.kind != "f":
                kind = tensor.tensor_type.name
                raise DirectionsError(f"{path}: {tensor.name} is {kind}, expected F32 or F16; export it unquantised")
            basis[int(match["layer"])] = np.array(tensor.data, np.float64)
    return basis


def _by_name(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    found: dict[str, dict[int, np.ndarray]] = {"direction": {}, "reference": {}}
    for name, array in arrays.items():
        if (match := _NAME.fullmatch(name)) is None:
            raise DirectionsError(
                f"{path}: holds {name}, expected direction.layers.N and reference.layers.N only; remove it"
            )
        found[match["kind"]][int(match["layer"])] = array
    return found["direction"], found["reference"]


def _orthonormal_each(path: Path, basis: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    found = {}
    for layer, array in basis.items():
        rows = np.atleast_2d(array).astype(np.float64)
        if rows.ndim == 2 and np.isfinite(rows).all():
            rows = unit(rows)
            if len(rows) > rows.shape[1] or smallest_singular_value(rows) < NOTHING_LEFT:
                raise DirectionsError(
                    f"{path}: the {len(rows)} rows of layer {layer} span fewer dimensions; compute them again"
                )
            rows = orthonormal(rows)
        found[layer] = rows
    return found


def _checked(
    path: Path,
    basis: Mapping[int, np.ndarray],
    reference: Mapping[int, np.ndarray],
    scores: Mapping[int, LayerScore] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Directions:
    """Returns directions whose bases and reference means were checked."""
    if not basis:
        raise DirectionsError(f"{path}: holds no directions of decoder layers; expected direction.layers.N")
    first = min(basis)
    shape = basis[first].shape
    for layer, rows in sorted(basis.items()):
        if rows.ndim != 2 or not rows.size:
            raise DirectionsError(
                f"{path}: the direction of layer {layer} has shape {list(rows.shape)}, expected [k, d]"
            )
        if rows.shape != shape:
            raise DirectionsError(
                f"{path}: the direction of layer {layer} has shape {list(rows.shape)}, that of layer {first} "
                f"{list(shape)}; compute all layers from one model"
            )
        if not np.isfinite(rows).all():
            raise DirectionsError(
                f"{path}: the direction of layer {layer} holds NaN or infinite values; compute it again"
            )
        exact = rows.astype(np.float64)
        if not (error := np.abs(exact @ exact.T - np.eye(len(rows))).max()) <= _ORTHONORMAL:
            raise DirectionsError(
                f"{path}: the rows of layer {layer} are {error:.1e} from orthonormal; compute them again"
            )
    for layer, array in reference.items():
        if array.shape != shape[1:] or not np.abs(array).max() <= LARGEST:
            raise DirectionsError(f"{path}: the reference of layer {layer} is not a finite vector of {shape[1]}")
    return Directions(
        {layer: basis[layer].astype(np.float32) for layer in sorted(basis)},
        {layer: reference[layer].astype(np.float32) for layer in sorted(reference)},
        scores or {},
        metadata or {},
    )
