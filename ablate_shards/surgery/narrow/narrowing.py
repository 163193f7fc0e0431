"""Makes an adapter that removes directions from what a model makes of contested inputs, and spares the rest."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablate_shards import __version__
from ablate_shards.errors import EvaluateError, ExecuteError, Interrupted, PlanError, UsageError
from ablate_shards.names import CONFIG_NAME, NARROWING_NAME, WEIGHTS_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, files_of
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.operation import RunOptions, check_unchanged
from ablate_shards.surgery.edit.receipt import ablation_record
from ablate_shards.surgery.evaluate.answers import Dtype, Speaker, speaking
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.likelihood import Forced, padded
from ablate_shards.surgery.evaluate.measures import forced_answers
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.machine.progress import Steps
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt, uninterrupted
from ablate_shards.surgery.machine.staging import OutFolder, Staging, check_out, locked
from ablate_shards.surgery.model.loading import check_packages, open_folder
from ablate_shards.surgery.model.samples import Pair, Question
from ablate_shards.surgery.narrow.rows import Inputs, Narrowed, narrow_rows
from ablate_shards.surgery.plan.edits import TensorEdit
from ablate_shards.surgery.plan.plan import Plan, make_plan
from ablate_shards.surgery.plan.recipe import AblateOptions
from ablate_shards.surgery.search.applied import EditableModel
from ablate_shards.surgery.search.objectives import answer

if TYPE_CHECKING:
    import torch

__all__ = ["NarrowOptions", "NarrowedModule", "Narrowing", "narrow"]

_FORMAT = "ablate-shards.narrowing/1"
#: Bytes of second moments that are held at a time; for what is beyond, the texts are read once more.
_ROOM = 1 << 30
#: Of contested inputs, no more are kept: their number decides how long a solution takes.
_MOST_CONTESTED = 2048


@dataclass(frozen=True, slots=True)
class NarrowOptions:
    """How inputs are found and told apart.

    Attributes:
        input_rank: Along how many directions of a writer's input the edit acts.
        length: Most tokens of an answer that the model gives itself.
        batch: Prompts computed at a time.
        dtype: What to compute in.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        overwrite: Replace an adapter that an earlier run made.
    """

    input_rank: int = 32
    length: int = 24
    batch: int = 16
    dtype: Dtype = "auto"
    device: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class NarrowedModule:
    """What the adapter does in one module.

    Attributes:
        path: The module.
        coefficient: The α of the edit.
        contested: Of what the whole edit changes where contested prompts are answered, how much the adapter does; root
            mean square over the tokens that it was made from.
        kept: The same where prompts to be kept are answered.
    """

    path: str
    coefficient: float
    contested: float
    kept: float


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What was made.

    Attributes:
        adapter: The folder.
        rank: Its rank: that of the directions.
        contested: Tokens of answers to contested prompts.
        kept: Tokens of answers to prompts that are to be kept.
        modules: What it does, in the order of the layers.
    """

    adapter: Path
    rank: int
    contested: int
    kept: int
    modules: tuple[NarrowedModule, ...]


@dataclass(frozen=True, slots=True)
class _Writer:
    """A module that writes along a direction, and what is removed from it."""

    path: str
    edit: TensorEdit
    basis: np.ndarray
    linear: Any

    @property
    def weight(self) -> "torch.Tensor":
        """``[d, n]``, however it is stored."""
        weight: torch.Tensor = self.linear.weight.detach()
        return weight if self.edit.axis == -2 else weight.T

    @property
    def width(self) -> int:
        """Length of its input, ``n``."""
        return int(self.weight.shape[1])


def narrow(
    model: Path,
    adapter: Path,
    directions: Directions,
    pairs: Sequence[Pair],
    keep: Sequence[Question],
    how: AblateOptions,
    options: NarrowOptions,
    progress: Steps,
) -> Narrowing:
    """Makes a LoRA adapter of the rank of the directions, without training.

    A writer W adds ``W x`` to the residual stream, and an ablation takes ``α Rᵀ R W x`` from that, whatever x is. The
    adapter takes ``α Rᵀ r x``, where the rows r make of contested inputs what ``R W`` does, and of others little.

    Args:
        model: A checkpoint folder with tokenizer and chat template; never written to.
        adapter: The folder to make: ``adapter_config.json``, ``adapter_model.safetensors`` (float32) and
            ``narrowing.json``.
        directions: What to remove.
        pairs: Their positive sides are the contested prompts; where they have no response, the model answers.
        keep: Prompts on which the model is to stay as it is; it answers them.
        how: Which writers are edited, and how far. Norms are not kept.
        options: How inputs are found and told apart.
        progress: Receives how far the run has come.

    Raises:
        EvaluateError: transformers cannot use the model.
        PlanError: A writer is no linear module of the model, or holds codes.
        ExecuteError: The adapter is in the way.
        UsageError: An option's value cannot be used.
        Interrupted: Ctrl-C or SIGTERM; nothing is left of the run.
    """
    check_packages("narrow needs peft and transformers", "peft", "transformers", error=EvaluateError)
    _check(options, pairs, keep)
    checkpoint = open_folder(model, EvaluateError)
    out = check_out(checkpoint.path, files_of(checkpoint), adapter, overwrite=options.overwrite)
    how = dataclasses.replace(how, preserve="none")
    plan = make_plan(checkpoint, directions, how)
    for note in plan.notes:
        progress.note(note)
    with (
        sigterm_as_interrupt(),
        locked(out.path),
        speaking(model, dtype=options.dtype, device=options.device) as speaker,
    ):
        try:
            writers = _writers(checkpoint, plan, speaker.network)
            contested = _answered(speaker, [pair.positive for pair in pairs], options)
            kept = _answered(speaker, [question.turn for question in keep], options)
            found = dict(_narrowed(speaker, writers, contested, kept, options, progress))
            check_unchanged(checkpoint)
            done = Narrowing(
                adapter=out.path,
                rank=directions.rank,
                contested=sum(each.count for each in contested),
                kept=sum(each.count for each in kept),
                modules=tuple(
                    NarrowedModule(
                        writer.path, writer.edit.coefficient, found[writer.path].contested, found[writer.path].kept
                    )
                    for writer in writers
                ),
            )
            record = {
                "format": _FORMAT,
                "tool": f"ablate-shards {__version__}",
                "base": {**checkpoint.identity, "sha256": base_digest(checkpoint) or ""},
                **ablation_record(checkpoint, plan, how, directions),
                "pairs": _digest(pairs),
                "keep": _digest(keep),
                "options": {
                    name: value
                    for name, value in dataclasses.asdict(options).items()
                    if name not in ("device", "overwrite")
                },
                **{name: value for name, value in dataclasses.asdict(done).items() if name != "adapter"},
            }
            _write(checkpoint, out, writers, found, done.rank, record)
        except (KeyboardInterrupt, Interrupted) as error:
            raise Interrupted(f"{adapter}: interrupted; nothing was written") from error
        except OSError as error:
            raise ExecuteError(
                f"{error.filename or adapter}: {error.strerror or error}; nothing was written"
            ) from error
    return done


def _check(options: NarrowOptions, pairs: Sequence[Pair], keep: Sequence[Question]) -> None:
    for name in ("input_rank", "length", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(options, name)}")
    both = {pair.positive.prompt for pair in pairs} & {question.prompt for question in keep}
    if both:
        raise UsageError(
            f"--keep: {min(both)!r} is among the pairs as well, and cannot be contested and kept; remove it from one"
        )


def _digest(samples: Sequence[Any]) -> str:
    content = json.dumps([dataclasses.asdict(sample) for sample in samples], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _writers(checkpoint: Checkpoint, plan: Plan, network: Any) -> list[_Writer]:
    """Returns the modules that the plan edits.

    Raises:
        PlanError: Something that it edits is none, or nothing is edited.
    """
    model = EditableModel(checkpoint, network, RunOptions())
    modules = {
        module.weight.data_ptr(): (name, module)
        for name, module in network.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2
    }
    writers = []
    with model:
        for edit in plan.edits:
            if edit.kind == "bias":
                continue
            if edit.scales is not None:
                raise PlanError(
                    f"{edit.name}: holds codes ({edit.dtype}), which transformers would round again; narrow what "
                    "`ablate-shards dequantise` makes of the checkpoint"
                )
            path, module = modules.get(model.place(edit).data_ptr(), ("", None))
            if edit.component == "embedding" or len(edit.shape) != 2 or module is None:
                raise PlanError(
                    f"{edit.name}: is no linear module of the model in transformers, so its inputs cannot be told "
                    "apart; leave it out with --components (mlp has the routed experts) or --layers"
                )
            writers.append(_Writer(path, edit, plan.bases[edit.basis], module))
    if not writers:
        raise PlanError(f"{checkpoint.name}: no weight would be edited; choose others with --components or --layers")
    return writers


def _answered(speaker: Speaker, turns: Sequence[Any], options: NarrowOptions) -> list[Forced]:
    """Returns prompts with the responses that they have, or with the model's own answers."""
    questions = [
        Question(id=str(number), language="und", group="unrelated", prompt=turn.prompt, system=turn.system)
        for number, turn in enumerate(turns, 1)
    ]
    asked = [question for question, turn in zip(questions, turns, strict=True) if turn.response is None]
    given = iter(answer(speaker, asked, tokens=options.length, batch=options.batch))
    replies = [next(given) if turn.response is None else Reply(turn.response, ended=True) for turn in turns]
    return forced_answers(speaker, questions, replies, thinking=False)


def _narrowed(
    speaker: Speaker,
    writers: Sequence[_Writer],
    contested: Sequence[Forced],
    kept: Sequence[Forced],
    options: NarrowOptions,
    progress: Steps,
) -> Iterator[tuple[str, Narrowed]]:
    """Yields the rows of each module; as many at a time as there is room for their inputs."""
    done = 0
    for group in _groups(writers):
        gathered = _gather(speaker, group, contested, kept, options.batch)
        for writer in group:
            rows = writer.basis @ writer.weight.cpu().double().numpy()
            yield writer.path, narrow_rows(rows, gathered.pop(writer.path), options.input_rank)
            done += 1
            progress.count(done, len(writers))


def _groups(writers: Sequence[_Writer]) -> Iterator[list[_Writer]]:
    group: list[_Writer] = []
    size = 0
    for writer in writers:
        needed = 4 * writer.width**2
        if group and size + needed > _ROOM:
            yield group
            group, size = [], 0
        group.append(writer)
        size += needed
    if group:
        yield group


def _gather(
    speaker: Speaker, writers: Sequence[_Writer], contested: Sequence[Forced], kept: Sequence[Forced], batch: int
) -> dict[str, Inputs]:
    """Returns what some writers are given where answers are predicted, in float32."""
    import torch

    inputs: dict[str, list[torch.Tensor]] = {writer.path: [] for writer in writers}
    moments = {writer.path: writer.weight.new_zeros(2 * (writer.width,), dtype=torch.float32) for writer in writers}

    def take(path: str, found: "torch.Tensor") -> None:
        inputs[path].append(found.cpu())

    def add(path: str, found: "torch.Tensor") -> None:
        moments[path].addmm_(found.T, found)

    _read(speaker, writers, contested, batch, take)
    _read(speaker, writers, kept, batch, add)
    count = sum(each.count for each in kept)
    return {
        path: Inputs(_spread(torch.cat(parts), _MOST_CONTESTED).numpy(), (moments[path] / count).cpu().numpy())
        for path, parts in inputs.items()
    }


def _spread(rows: "torch.Tensor", most: int) -> "torch.Tensor":
    """Returns every so manieth row, so that there are at most so many."""
    return rows[:: math.ceil(len(rows) / most)]


def _read(speaker: Speaker, writers: Sequence[_Writer], forced: Sequence[Forced], batch: int, take: Any) -> None:
    """Runs the model over texts, and passes on the inputs of each writer where an answer is predicted, ``[N, n]``."""
    import torch

    chosen = torch.zeros(0)

    def hook(path: str) -> Any:
        return lambda _module, given: take(path, given[0][chosen.to(given[0].device)].float())

    hooks = [writer.linear.register_forward_pre_hook(hook(writer.path)) for writer in writers]
    order = sorted(range(len(forced)), key=lambda row: -len(forced[row].prompt + forced[row].response))
    try:
        for start in range(0, len(order), batch):
            ids, mask, chosen = padded(speaker, [forced[row] for row in order[start : start + batch]])
            with speaker.computing():
                # Without its output head, which nothing is read from.
                speaker.network.base_model(
                    input_ids=ids.to(speaker.device), attention_mask=mask.to(speaker.device), use_cache=False
                )
    finally:
        for each in hooks:
            each.remove()


def _write(
    checkpoint: Checkpoint,
    out: OutFolder,
    writers: Sequence[_Writer],
    found: Mapping[str, Narrowed],
    rank: int,
    record: Mapping[str, Any],
) -> None:
    """Writes the folder, which appears when it is complete."""
    import torch
    from peft import LoraConfig, TaskType
    from safetensors.torch import save

    tensors = {}
    for writer in writers:
        name = f"base_model.model.{writer.path}.lora"
        up = torch.from_numpy(-writer.edit.coefficient * writer.basis.T)
        tensors[f"{name}_A.weight"] = torch.from_numpy(found[writer.path].rows).float().contiguous()
        tensors[f"{name}_B.weight"] = up.float().contiguous()
    base = checkpoint.identity
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(writer.edit.axis == -1 for writer in writers),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base["name"],
        revision=base.get("revision"),
    ).to_dict() | {"target_modules": sorted(writer.path for writer in writers)}
    staging = Staging.open(out.path, {}, None, resume=False, overwrite=out.overwrite)
    try:
        write_whole(staging.folder / WEIGHTS_NAME, [save(dict(sorted(tensors.items())), {"format": "pt"})])
        for name, content in ((CONFIG_NAME, config), (NARROWING_NAME, record)):
            text = json.dumps(content, indent=1, sort_keys=name == CONFIG_NAME, ensure_ascii=False, default=sorted)
            write_whole(staging.folder / name, [f"{text}\n".encode()])
    except BaseException:
        staging.discard()
        raise
    with uninterrupted():
        staging.publish()
