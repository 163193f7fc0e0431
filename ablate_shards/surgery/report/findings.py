"""Gathers what a run left behind: receipts, directions, activations, training, searches, evaluations; what there is."""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from ablate_shards.errors import AblateError, EvaluateError, ReportError
from ablate_shards.names import (
    ADAPTER_RECEIPT_NAME,
    MERGE_RECEIPT_NAME,
    RECEIPT_NAME,
    RECEIPT_NAMES,
    SEARCH_SUFFIX,
    STATE_NAME,
    TRAINING_NAME,
)
from ablate_shards.surgery.directions.activations import open_activations
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.edit.receipt import RECEIPT_FORMAT, Receipt, read_receipt, read_sealed
from ablate_shards.surgery.evaluate.evaluation import Evaluation
from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation
from ablate_shards.surgery.merge.adapter import read_adapter
from ablate_shards.surgery.merge.receipt import MERGE_FORMAT, MergeReceipt, read_merge_receipt
from ablate_shards.surgery.report.projection import LayerProjection, project_into_plane
from ablate_shards.surgery.report.search_record import Reported, Search, read_record
from ablate_shards.validation import Finite, checked

__all__ = ["Findings", "ReceiptFile", "ReportOptions", "Training", "find_work", "gather"]

_TRAINING_FORMAT = "ablate-shards.training/1"
_EVALUATION = ".evaluation.json"
_DIRECTIONS = ".directions.safetensors"
_ACTIVATIONS = "activations.safetensors"
_KINDS = "activations-*.safetensors"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Where the report looks, beside OUT.

    Attributes:
        work: The folder with what the stages made; None finds it beside OUT.
        evaluations: Evaluations, from before to after; empty takes those of the run.
    """

    work: Path | None = None
    evaluations: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiptFile(Generic[_T]):
    """The receipt of an ablation or of a merge, as found.

    Attributes:
        receipt: What of it was checked.
        content: All that it says.
        sha256: Digest of the file.
    """

    receipt: _T
    content: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True, slots=True)
class Training:
    """How an adapter was trained.

    Attributes:
        losses: Epoch, as a fraction, and training loss of every step.
        epochs: Held-out loss by kind of sample, by the number of epochs done.
        content: All that the file says.
    """

    losses: tuple[tuple[float, float], ...]
    epochs: tuple[tuple[int, Mapping[str, float]], ...]
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Step:
    epoch: Finite
    loss: Finite


@dataclass(frozen=True, slots=True)
class _Epoch:
    number: int
    evaluation: Mapping[str, float] | None


@dataclass(frozen=True)
class Findings:
    """What there is to show; a part that is not there is None or empty, and ``missing`` says why.

    Attributes:
        name: The checkpoint's folder; of searches alone, the model that was searched on.
        ablation: The receipt of the ablation.
        merge: The receipt of the merge.
        directions: The directions that were removed.
        projections: The activations they were computed from, in a plane, by layer.
        training: How the adapter was trained.
        evaluations: From before to after; one alone is after.
        searches: The searches that found the edit; where there is no edit, those in the folder.
        searched_only: Whether there are searches alone, and no edited checkpoint.
        missing: Why a part is not there, by part.
    """

    name: str
    ablation: ReceiptFile[Receipt] | None = None
    merge: ReceiptFile[MergeReceipt] | None = None
    directions: Directions | None = None
    projections: tuple[LayerProjection, ...] = ()
    training: Training | None = None
    evaluations: tuple[Evaluation, ...] = ()
    searches: tuple[Search, ...] = ()
    searched_only: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """What the evaluated models are called, each by a name of its own."""
        names = [str(evaluation.model.name) for evaluation in self.evaluations]
        return tuple(
            f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name
            for place, name in enumerate(names)
        )

    @property
    def before(self) -> Evaluation | None:
        """The first evaluation, if there is a later one."""
        return self.evaluations[0] if len(self.evaluations) > 1 else None

    @property
    def after(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None


#: The receipts of what a report can be about.
_REPORTED = (RECEIPT_NAME, MERGE_RECEIPT_NAME)


def gather(out: Path, options: ReportOptions) -> Findings:
    """Reads what a run left behind; what cannot be read is missing, and why is said.

    Args:
        out: The folder of the result, or one with searches.
        options: Where else to look.

    Raises:
        ReportError: OUT holds no receipt and no search that can be read, or a place that was named is not there.
        EvaluateError: An evaluation that was named cannot be read.
    """
    edited = any((out / name).is_file() for name in _REPORTED)
    if not edited and (out / ADAPTER_RECEIPT_NAME).is_file():
        raise ReportError(
            f"{out}: holds an adapter, whose figures are in {ADAPTER_RECEIPT_NAME}; a report is about a checkpoint, so "
            "merge it with `ablate-shards merge SOURCE ADAPTER OUT` and name that"
        )
    if not edited and not any(out.glob(f"*{SEARCH_SUFFIX}")):
        raise ReportError(
            f"{out}: holds no {' and no '.join(_REPORTED)}, nor what a search found (*{SEARCH_SUFFIX}), so there "
            "is nothing to report; name a folder that ablate, merge or run made, or the one that search wrote to"
        )
    if options.work is not None and not options.work.is_dir():
        raise ReportError(f"{options.work}: no such folder; --work names the one in which run kept its stages")
    work = find_work(out) if options.work is None else options.work
    gatherer = _Gatherer(out, work, [work, out.absolute().parent] if work else [out.absolute().parent])
    return gatherer.gather(options.evaluations) if edited else gatherer.gather_searches(options.evaluations)


def find_work(out: Path) -> Path | None:
    """Returns the folder in which ``run`` kept what its stages made, None if there is none.

    That is ``OUT.work``, or the folder beside OUT whose stages made OUT: its state holds the receipt's digest, which
    stays true when both are moved.
    """
    usual = out.absolute().with_name(f"{out.absolute().name}.work")
    if usual.is_dir():
        return usual
    made = {_digest(path) for name in RECEIPT_NAMES if (path := out / name).is_file()}
    for state in sorted(out.absolute().parent.glob(f"*/{STATE_NAME}")):
        try:
            digests = json.loads(state.read_bytes())["digests"].values()
            if made & {entry[-1] for entry in digests}:
                return state.parent
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
    return None


class _Gatherer:
    """Reads part by part, and keeps why one could not be read."""

    def __init__(self, out: Path, work: Path | None, places: Sequence[Path]) -> None:
        self._out, self._work, self._places = out, work, places
        self._missing: dict[str, str] = {}

    def gather(self, evaluations: Sequence[Path]) -> Findings:
        merge = self._merge()
        ablation = self._ablation(merge)
        directions = self._directions(ablation)
        searches = self._searches_of(ablation)
        return Findings(
            name=self._out.absolute().name,
            ablation=ablation,
            merge=merge,
            directions=directions,
            projections=self._projections(directions),
            training=self._training(merge),
            evaluations=self._evaluations(evaluations),
            searches=searches,
            missing=self._missing,
        )

    def gather_searches(self, evaluations: Sequence[Path]) -> Findings:
        """Reads the searches in a folder that holds no edited checkpoint.

        Raises:
            ReportError: None can be read.
        """
        paths = sorted(self._out.glob(f"*{SEARCH_SUFFIX}"))
        searches = self._searches(paths)
        if not searches:
            read_record(paths[0])
        shown: tuple[Evaluation, ...] = ()
        if evaluations:
            shown = _chain([read_evaluation(path) for path in evaluations])
        elif len(searches) > 1:
            self._missing["evaluation"] = (
                "Several searches are here, each with questions of its own; name the evaluations of one with "
                "--evaluation."
            )
        elif "chosen" in searches[0].reports:
            shown = _chain([searches[0].reports[name] for name in ("plain", "chosen") if name in searches[0].reports])
        else:
            self._missing["evaluation"] = "What the chosen edit does on the questions of the report was not found."
        return Findings(
            name=", ".join(dict.fromkeys(search.record.model for search in searches)),
            evaluations=shown,
            searches=searches,
            searched_only=True,
            missing=self._missing,
        )

    def _try(self, part: str, read: Callable[[], _T]) -> _T | None:
        """Reads a part; where it cannot be read, the reason is kept."""
        try:
            found = read()
        except AblateError as error:
            self._missing[part] = self._without_folders(str(error))
            return None
        except OSError as error:
            self._missing[part] = self._without_folders(f"{error.filename}: {error.strerror}")
            return None
        self._missing.pop(part, None)
        return found

    def _without_folders(self, text: str) -> str:
        """Returns an error without the folders that the reader of a page knows nothing of."""
        for folder in sorted({self._out, self._out.absolute(), *self._places}, key=lambda path: -len(str(path))):
            text = text.replace(f"{folder}/", "")
        return text

    def _merge(self) -> ReceiptFile[MergeReceipt] | None:
        if not (self._out / MERGE_RECEIPT_NAME).is_file():
            return None

        def read() -> ReceiptFile[MergeReceipt]:
            receipt, path = read_merge_receipt(self._out), self._out / MERGE_RECEIPT_NAME
            return ReceiptFile(receipt, read_sealed(self._out, MERGE_RECEIPT_NAME, MERGE_FORMAT)[0], _digest(path))

        return self._try("merge", read)

    def _ablation(self, merge: ReceiptFile[MergeReceipt] | None) -> ReceiptFile[Receipt] | None:
        def read_at(folder: Path) -> ReceiptFile[Receipt]:
            receipt, path = read_receipt(folder), folder / RECEIPT_NAME
            return ReceiptFile(receipt, read_sealed(folder, RECEIPT_NAME, RECEIPT_FORMAT)[0], _digest(path))

        if (self._out / RECEIPT_NAME).is_file():
            return self._try("ablation", partial(read_at, self._out))
        base = merge.content.get("base") if merge else None
        digests = [entry.get("sha256") for entry in base if isinstance(entry, dict)] if isinstance(base, list) else None
        for path in sorted(path for place in self._places for path in place.glob(f"*/{RECEIPT_NAME}")):
            if (digests is not None and _digest(path) in digests) or (
                merge is None and path.parent.parent == self._work
            ):
                return self._try("ablation", partial(read_at, path.parent))
        self._missing["ablation"] = (
            f"The result was merged from another checkpoint, whose {RECEIPT_NAME} was not found beside it; name the "
            "folder that holds it with --work."
        )
        return None

    def _directions(self, ablation: ReceiptFile[Receipt] | None) -> Directions | None:
        said = ablation.content["directions"] if ablation else {}
        wanted = said.get("sha256")

        def computed(path: Path) -> Directions:
            try:
                options = EstimatorOptions(**json.loads(said["metadata"]["estimator"]))
            except (LookupError, ValueError, TypeError):
                options = EstimatorOptions()
            return compute_directions(open_activations(path), options)

        # Only a digest tells whether a file that merely lies beside OUT has to do with it.
        for place in self._places if wanted else filter(None, [self._work]):
            readers = [(place / "directions.safetensors", read_directions), (place / _ACTIVATIONS, computed)]
            if wanted:
                named = [path for path in sorted(place.glob(f"*{_DIRECTIONS}")) if _digests_to(path, wanted)]
                readers[1:1] = [(path, read_directions) for path in named]
            for path, read in readers:
                if path.exists():
                    found = self._try("directions", partial(read, path))
                    if found is not None and wanted in (None, found.sha256()):
                        return found
        self._missing.setdefault(
            "directions",
            "The file of the directions that were removed was not found, so how well they separate is not known; name "
            "the folder that holds directions.safetensors with --work.",
        )
        return None

    def _projections(self, directions: Directions | None) -> tuple[LayerProjection, ...]:
        if directions is None:
            self._missing["projection"] = "Without the directions, the activations cannot be shown along them."
            return ()

        def read(path: Path) -> tuple[LayerProjection, ...]:
            dump = open_activations(path)
            same = dump.metadata.get("inputs") == directions.metadata.get("inputs")
            return project_into_plane(dump, directions.basis) if same else ()

        # Of several kinds of pairs, the inputs tell which dump it was.
        dumps = [(place / _ACTIVATIONS, *sorted(place.glob(_KINDS))) for place in self._places]
        for path in (path for found in dumps for path in found):
            if path.exists() and (found := self._try("projection", partial(read, path))):
                return found
        self._missing.setdefault(
            "projection", f"The activations that the directions were computed from were not found ({_ACTIVATIONS})."
        )
        return ()

    def _training(self, merge: ReceiptFile[MergeReceipt] | None) -> Training | None:
        if merge is None:
            return None

        def read(path: Path) -> Training | None:
            same = read_adapter(path.parent).sha256 == merge.receipt.adapter_sha256
            return _read_training(path) if same else None

        for path in sorted(path for place in self._places for path in place.glob(f"*/{TRAINING_NAME}")):
            if found := self._try("training", partial(read, path)):
                return found
        self._missing.setdefault(
            "training", f"How the adapter was trained was not found ({TRAINING_NAME}, as finetune writes it)."
        )
        return None

    def _searches_of(self, ablation: ReceiptFile[Receipt] | None) -> tuple[Search, ...]:
        """Reads the searches in the work folder and in OUT, and those beside OUT that found what was removed."""
        paths = [path for place in (self._work, self._out) if place for path in sorted(place.glob(f"*{SEARCH_SUFFIX}"))]
        if ablation and (wanted := ablation.content["directions"].get("sha256")):
            beside = sorted(self._out.absolute().parent.glob(f"*{SEARCH_SUFFIX}"))
            paths += [path for path in beside if _digests_to(_of_search(path, _DIRECTIONS), wanted)]
        return self._searches(paths)

    def _searches(self, paths: Sequence[Path]) -> tuple[Search, ...]:
        """Reads searches with their evaluations; why one cannot be read is kept."""
        found, reasons = [], []
        for path in paths:
            try:
                search = read_record(path)
            except ReportError as error:
                reasons.append(str(error))
                continue
            reports: dict[Reported, Evaluation] = {}
            for name in search.record.reports:
                try:
                    reports[name] = read_evaluation(_of_search(path, f".{name}{_EVALUATION}"))
                except EvaluateError as error:
                    reasons.append(str(error))
            found.append(dataclasses.replace(search, reports=reports))
        if reasons:
            self._missing["search"] = self._without_folders(". ".join(reasons))
        return tuple(found)

    def _evaluations(self, named: Sequence[Path]) -> tuple[Evaluation, ...]:
        if named:
            return _chain([read_evaluation(path) for path in named])
        out = self._out.absolute()
        paths = [path for place in (self._work, out) if place for path in sorted(place.glob(f"*{_EVALUATION}"))]
        paths = [path for path in paths if not _is_of_search(path)]
        paths += [path] if (path := out.with_name(f"{out.name}{_EVALUATION}")).is_file() else []
        found, reasons = [], []
        for path in paths:
            try:
                found.append(read_evaluation(path))
            except EvaluateError as error:
                reasons.append(self._without_folders(str(error)))
        found.sort(key=self._stage)
        if not found:
            reasons.append(
                "The answers were not evaluated, so what the edit did to them is not known; measure it with: "
                f"ablate-shards evaluate {shlex.quote(out.name)} --against SOURCE"
            )
        elif found[-1].model.name != out.name:
            reasons.append(f"No evaluation of {out.name} was found; what is shown is of {found[-1].model.name}.")
        if reasons:
            self._missing["evaluation"] = " ".join(reasons)
        return _chain(found) if found else ()

    def _stage(self, evaluation: Evaluation) -> tuple[bool, bool, str]:
        """Sorts what has no base first, and the result last."""
        name = str(evaluation.model.name)
        return (name == self._out.absolute().name, evaluation.base is not None, name)


def _of_search(record: Path, suffix: str) -> Path:
    """Returns another file of a search, by its record."""
    return record.with_name(f"{record.name.removesuffix(SEARCH_SUFFIX)}{suffix}")


def _digests_to(path: Path, wanted: str) -> bool:
    """Returns whether a file holds the directions of a digest; one that cannot be read may be of another run."""
    with suppress(AblateError, OSError):
        return read_directions(path).sha256() == wanted
    return False


def _is_of_search(path: Path) -> bool:
    """Returns whether an evaluation is of a search, which was in memory and is no stage of a run."""
    name, _, which = path.name.removesuffix(_EVALUATION).rpartition(".")
    return which in get_args(Reported) and path.with_name(f"{name}{SEARCH_SUFFIX}").is_file()


def _chain(found: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """Returns the evaluations that can be shown together: the last one's base, those between, and the last."""
    last = found[-1]
    between = [each for each in found[:-1] if each.questions == last.questions]
    first = last.base
    if first is not None:
        between = [each for each in between if each.model != first.model]
        between.insert(0, first)
    seen: dict[Any, Evaluation] = {each.model: each for each in between if each.model != last.model}
    return (*seen.values(), last)


def _read_training(path: Path) -> Training:
    """Reads what finetune says of its training."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _TRAINING_FORMAT:
            raise ReportError(
                f"{path}: expected {_TRAINING_FORMAT}, found {content['format']!r}; use the version that wrote it"
            )
        losses = checked(content["losses"], tuple[_Step, ...], "losses")
        epochs = checked(content["epochs"], tuple[_Epoch, ...], "epochs")
        return Training(
            tuple((step.epoch, step.loss) for step in losses),
            tuple((epoch.number, _finite(epoch.evaluation)) for epoch in epochs if epoch.evaluation is not None),
            content,
        )
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not a complete {TRAINING_NAME} ({error}); it was changed afterwards") from error


def _finite(losses: Mapping[str, float]) -> dict[str, float]:
    return {kind: loss for kind, loss in losses.items() if math.isfinite(loss)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
