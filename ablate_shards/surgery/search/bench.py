"""A model in memory that settings are tried on: edited, measured, and taken back."""

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablate_shards.errors import SearchError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.edit.ablation_editor import TensorResult
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.evaluate.answers import Dtype, Remedies, Speaker, check_transformers, model_digest, speaking
from ablate_shards.surgery.machine.devices import resolve_device
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.model.loading import answering_dtype, free_memory, read_config, weight_bytes
from ablate_shards.surgery.model.samples import Question
from ablate_shards.surgery.plan.plan import Plan, make_plan
from ablate_shards.surgery.search.applied import EditableModel
from ablate_shards.surgery.search.contrasts import Contrasts
from ablate_shards.surgery.search.objectives import Asking, Measures, make_measures
from ablate_shards.surgery.search.space import Setting, Space

__all__ = ["Bench", "Tried", "excess", "opened_bench"]

#: One part in so many of the free memory of the host keeps stored weights; pinned memory may take twice its size.
_HOST_SHARE = 4


@dataclass(frozen=True, slots=True)
class Tried:
    """What was measured of a setting.

    Attributes:
        values: Each measure, by its name; those that were not reached are missing.
        over: By how much it is over its limits; see ``excess``.
        seconds: How long it took.
        digest: SHA-256 over the digests of the edited tensors; ``ablate`` with the same setting writes the same bytes.
    """

    values: Mapping[str, float]
    over: float
    seconds: float
    digest: str

    @property
    def complete(self) -> bool:
        """Whether everything was measured, is a number, and is within its limit."""
        return self.over <= 0 and all(math.isfinite(value) for value in self.values.values())


class Bench:
    """A loaded model, and what settings of a space do to it.

    Args:
        checkpoint: What was loaded.
        speaker: The model.
        contrasts: The directions that there are.
        space: What may vary.
        run: What does the arithmetic of edits.
        keep: Bytes of stored weights that may stay on the host: :class:`EditableModel`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        speaker: Speaker,
        contrasts: Contrasts,
        space: Space,
        run: RunOptions,
        *,
        keep: int = 0,
    ) -> None:
        self.checkpoint, self.speaker = checkpoint, speaker
        self._contrasts, self._space = contrasts, space
        self._model = EditableModel(checkpoint, speaker.network, run, keep=keep)

    def close(self) -> None:
        """Takes the edit back, and lets go of the shards."""
        self._model.__exit__()

    def plan(self, setting: Setting) -> Plan:
        """Returns what ``ablate`` would do by a setting."""
        edit = self._space.edit(setting)
        directions = self._contrasts.directions(edit.contrast, edit.rank, edit.without)
        return make_plan(self.checkpoint, directions, edit.options)

    @functools.cached_property
    def model_sha256(self) -> str:
        """Digest of the files that bear on the unedited model's answers, which are all read for it."""
        return model_digest(self.checkpoint)

    def edit(self, setting: Setting | None) -> str:
        """Edits the model by a setting, or takes it back to what it was if None; returns the digest of the edit.

        Whatever it was edited by before: an edit begins from the shards' bytes.
        """
        if setting is None:
            self._model.restore()
            return digest_of({})
        return digest_of(self._model.apply(self.plan(setting)))

    def measures(self, names: Sequence[str], questions: Sequence[Question], asking: Asking) -> Measures:
        """Makes the measures of the unedited model, those of names and those that have limits.

        Raises:
            UsageError: There is no objective of a name, or no question that it looks at.
        """
        self.edit(None)
        return make_measures(names, self.speaker, questions, asking)

    def try_out(self, setting: Setting, measures: Measures, limits: Mapping[str, float]) -> Tried:
        """Measures a setting; one whose divergence is above its limit is not measured further."""
        started = time.monotonic()
        values: dict[str, float] = {}
        digest = self.edit(setting)
        # What can end a trial comes first. A subject that is lost does not, so that another limit needs no new trials.
        for measure in sorted(measures.every, key=lambda measure: measure.name != "kl"):
            value = values[measure.name] = measure.measure(self.speaker)
            if not math.isfinite(value) or (measure.name == "kl" and excess(values, limits) > 0):
                break
        return Tried(values, excess(values, limits), time.monotonic() - started, digest)


def excess(values: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """Returns by how much the measure that is furthest over its limit is over it, as a share of the limit.

    Negative where all are below, 0 where none has a limit, infinite where one is not a number.
    """
    shares = [values[name] / limit - 1 for name, limit in limits.items() if name in values]
    return max((share if math.isfinite(share) else math.inf for share in shares), default=0.0)


def digest_of(results: Mapping[str, TensorResult]) -> str:
    """Returns the digest of an edit: over the names of its tensors and the digests of their bytes."""
    text = "".join(f"{name} {results[name].blake3}\n" for name in sorted(results))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def opened_bench(
    folder: Path,
    checkpoint: Checkpoint,
    contrasts: Contrasts,
    space: Space,
    run: RunOptions,
    *,
    dtype: Dtype,
) -> Iterator[Bench]:
    """Loads a model for as long as the context lasts.

    Raises:
        EvaluateError: transformers cannot use the model.
        SearchError: It does not fit into memory.
        UsageError: There is no such device.
    """
    check_transformers()
    device = resolve_device(run.device)
    kind = answering_dtype(dtype, read_config(folder, SearchError), device)
    needed, free = weight_bytes(checkpoint, kind), free_memory(device)
    if needed > free:
        raise SearchError(
            f"{folder}: its weights take {size_text(needed)} in {kind}, but {size_text(free)} are free on {device}; "
            "use another --device, or search on a machine with more memory"
        )
    remedies = Remedies(instead="search on a machine with more memory")
    with speaking(folder, dtype=dtype, device=run.device, remedies=remedies) as speaker:
        # Elsewhere the page cache, which holds the shards, is as near to the model.
        keep = free_memory(resolve_device("cpu")) // _HOST_SHARE if device.type in ("cuda", "xpu") else 0
        bench = Bench(checkpoint, speaker, contrasts, space, run, keep=keep)
        try:
            yield bench
        finally:
            bench.close()
