"""Writes an activation dump a layer at a time, under a hidden name until complete, and continues an interrupted one."""

import errno
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ablate_shards.errors import CaptureError, CheckpointError, ExecuteError, UsageError
from ablate_shards.surgery.checkpoint.headers import read_header
from ablate_shards.surgery.directions.activations import ACTIVATIONS_FORMAT, LABELS
from ablate_shards.surgery.machine.files import write_safetensors
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import Staging

if TYPE_CHECKING:
    import torch

__all__ = ["DumpWriter", "check_disk", "check_dump", "check_free", "holds", "shard_name", "tensor_names"]

_STREAM_FORMAT = "ablate-shards.stream/1"
_STREAM = "stream.safetensors"
_SHARDS = "layer-*.safetensors"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_COPY_CHUNK = 4 << 20
#: Saving the stream for --resume takes at most about this share of the time.
_SAVING_SHARE = 0.1


class DumpWriter:
    """An unfinished dump: a shard per layer, and the stream after one of them to continue from.

    Attributes:
        stream: The stream of each batch that an interrupted run left, empty if none did.
        done: After how many layers that is.
    """

    def __init__(
        self,
        dump: Path,
        metadata: Mapping[str, str],
        identity: Mapping[str, str],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Makes the hidden folder, or continues the one that an interrupted run left.

        Args:
            dump: The final name.
            metadata: What the dump says of itself.
            identity: What must be equal for a resumed run to give the same bytes, by what to call it.
            resume: Go on with an interrupted run, if there is one.
            overwrite: Replace a dump of that name.

        Raises:
            CaptureError: An interrupted run is in the way, or is not of these inputs.
        """
        self._dump, self._metadata = dump, metadata
        self.stream: list[torch.Tensor] = []
        self.done = 0
        self._saved = self._cost = 0.0
        try:
            self._staging = Staging.open(dump, identity, None, resume=resume, overwrite=overwrite)
        except ExecuteError as error:
            raise CaptureError(str(error)) from error
        if self.useful and not self._read_stream():
            del self._staging.done[_STREAM]

    @property
    def useful(self) -> bool:
        """Whether there is something to go on from."""
        return _STREAM in self._staging.done

    @property
    def kept(self) -> str:
        """What can be gone on from, for an error."""
        return "--resume goes on after the layers that are complete" if self.useful else "nothing was kept"

    def write(self, layer: int, tensors: Mapping[str, "torch.Tensor"]) -> None:
        """Writes a layer's shard."""
        _write(self._shard(layer), tensors, self._metadata)

    def save_stream(self, done: int, streams: Sequence["torch.Tensor"]) -> None:
        """Saves what the next layer starts from, unless that would take too large a share of the time."""
        start = time.perf_counter()
        if self.useful and start - self._saved < self._cost / _SAVING_SHARE:
            return
        tensors = {f"batch.{number}": stream for number, stream in enumerate(streams)}
        _write(self._staging.folder / _STREAM, tensors, {"format": _STREAM_FORMAT, "done": str(done)})
        if not self.useful:
            self._staging.record(_STREAM, None)
        self._saved = time.perf_counter()
        self._cost = self._saved - start

    def publish(self) -> None:
        """Gives the dump its final name, with everything in it on disk.

        Raises:
            FileExistsError: The name was taken during the run, by what may not be replaced.
        """
        if _is_taken(self._dump) and not (self._staging.overwrite and _is_dump(self._dump)):
            raise FileExistsError(errno.EEXIST, "appeared during the run and is not replaced", str(self._dump))
        folder = self._staging.folder
        if self._dump.suffix == ".safetensors":
            found = [(path, tensor) for path in sorted(folder.glob(_SHARDS)) for tensor in read_header(path)[0].tensors]
            found.sort(key=lambda place: _order(place[1].name))
            header = {tensor.name: (tensor.dtype, list(tensor.shape), tensor.end - tensor.start) for _, tensor in found}
            write_safetensors(
                self._dump, header, self._metadata, _ranges((path, tensor.start, tensor.end) for path, tensor in found)
            )
            shutil.rmtree(folder)
        else:
            # A run that was killed while it wrote leaves a part of a file.
            for rest in (folder / _STREAM, *folder.glob(".*.partial")):
                rest.unlink(missing_ok=True)
            self._staging.publish(replaceable=_is_dump)

    def discard(self) -> None:
        """Removes what was written."""
        self._staging.discard()

    def _read_stream(self) -> bool:
        from safetensors.torch import load_file

        saved = self._staging.folder / _STREAM
        try:
            _, metadata = read_header(saved)
        except CheckpointError:
            return False
        done = int(metadata["done"])
        if not all(self._shard(layer).is_file() for layer in range(done)):
            return False
        tensors = load_file(saved)
        self.stream = [tensors[f"batch.{number}"] for number in range(len(tensors))]
        self.done = done
        return True

    def _shard(self, layer: int) -> Path:
        return self._staging.folder / shard_name(layer)


def shard_name(layer: int) -> str:
    """Returns the file that a layer has in a dump that is a folder."""
    return f"layer-{layer:05}.safetensors"


def tensor_names(layer: int) -> tuple[str, ...]:
    """Returns the names of a layer's tensors, in the order of the labels."""
    return tuple(f"{label}.layers.{layer}" for label in LABELS)


def _order(name: str) -> tuple[int, str]:
    label, _, layer = name.split(".")
    return int(layer), "" if label == LABELS[0] else label


def _write(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str]) -> None:
    header = {
        name: (_DTYPES[str(tensor.dtype).removeprefix("torch.")], tensor.shape, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    write_safetensors(path, header, metadata, map(_bytes_of, tensors.values()))


def _bytes_of(tensor: "torch.Tensor") -> bytes:
    import torch

    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _ranges(places: Iterable[tuple[Path, int, int]]) -> Iterator[bytes]:
    for path, start, end in places:
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(_COPY_CHUNK, end - file.tell())):
                yield chunk


def check_dump(model: Path, dump: Path, *, overwrite: bool) -> None:
    """Refuses a name for a dump that would lose something.

    Raises:
        UsageError: It is no name for a dump, or holds the model.
        CaptureError: It may not be replaced.
    """
    if dump.suffix not in ("", ".safetensors") and not dump.is_dir():
        raise UsageError(f"{dump}: a dump is a .safetensors file or a folder; name it without {dump.suffix}")
    if not dump.absolute().parent.is_dir():
        raise UsageError(f"{dump}: the folder that it would lie in does not exist; make it first")
    if dump.resolve() in (model.resolve(), *model.resolve().parents):
        raise UsageError(f"{dump}: holds the model; name another file or folder")
    if dump.is_dir() and dump.suffix == ".safetensors":
        raise UsageError(f"{dump}: is a folder; name a folder without .safetensors")
    check_free(dump, overwrite=overwrite)


def check_free(dump: Path, *, overwrite: bool) -> None:
    """Refuses a dump that exists and may not be replaced.

    Raises:
        CaptureError: It is one.
    """
    if not _is_taken(dump):
        return
    if not _is_dump(dump):
        raise CaptureError(f"{dump}: already exists and is no activation dump, so it is not replaced; name another")
    if not overwrite:
        raise CaptureError(f"{dump}: already exists; --overwrite replaces it, or name another")


def holds(dump: Path, metadata: Mapping[str, str], layers: Iterable[Mapping[str, "torch.Tensor"]]) -> bool:
    """Returns whether a dump is there and says and holds exactly this.

    Args:
        dump: Its name.
        metadata: What it should say of itself.
        layers: The tensors of each layer in turn; asked for only where the dump says the same of itself.
    """
    from safetensors import SafetensorError, safe_open

    try:
        files = list(dump.iterdir()) if dump.is_dir() else [dump]
        if not files or any(read_header(file)[1] != metadata for file in files):
            return False
        for layer, tensors in enumerate(layers):
            with safe_open(dump / shard_name(layer) if dump.is_dir() else dump, "pt") as opened:
                for name, tensor in tensors.items():
                    found = opened.get_tensor(name)
                    if found.dtype != tensor.dtype or _bytes_of(found) != _bytes_of(tensor):
                        return False
    except (CheckpointError, SafetensorError, OSError):
        return False
    return True


def check_disk(dump: Path, rows: int, stream: int) -> None:
    """Refuses a dump that has no room.

    Args:
        dump: Its name.
        rows: Bytes of all its tensors.
        stream: Bytes of the stream of all prompts.

    Raises:
        CaptureError: There are fewer free.
    """
    # A single file is written beside its shards; a new stream is written beside the old one.
    needed = (2 if dump.suffix == ".safetensors" else 1) * rows + 2 * stream
    free = shutil.disk_usage(dump.absolute().parent).free
    if needed > free:
        raise CaptureError(
            f"{dump}: needs about {size_text(needed)} while it is written, but {size_text(free)} are free; make room "
            "or name another place"
        )


def _is_taken(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _is_dump(path: Path) -> bool:
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
        return all(read_header(file)[1].get("format") == ACTIVATIONS_FORMAT for file in files)
    except CheckpointError:
        return False
