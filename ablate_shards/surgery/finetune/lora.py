"""Fine-tunes a checkpoint with LoRA through peft and transformers' Trainer, on the responses alone."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, FinetuneError, Interrupted, UsageError
from ablate_shards.names import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, files_of
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.finetune.responses import EncodedSample, draw, encode_instructions, split
from ablate_shards.surgery.finetune.targets import SEVEN, Targets, build_skeleton, choose, folded
from ablate_shards.surgery.finetune.training import (
    CHECKPOINTS,
    KEPT_KIND,
    Epoch,
    FinetuneOptions,
    TrainingRun,
    deterministic,
    epochs_of,
    train,
)
from ablate_shards.surgery.machine.devices import resolve_device
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.machine.progress import Steps
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.machine.staging import Staging, check_out, locked
from ablate_shards.surgery.model.loading import (
    check_packages,
    free_memory,
    open_folder,
    quiet,
    read_config,
    read_tokenizer,
)
from ablate_shards.surgery.model.samples import Instruction, Question

if TYPE_CHECKING:
    import torch

__all__ = ["SEVEN", "Epoch", "FinetuneOptions", "Finetuned", "Targets", "finetune"]

_FORMAT = "ablate-shards.training/1"
#: Bytes per trained number: itself, its gradient and Adam's two moments, all in float32.
_TRAINED_BYTES = 16
_MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What was trained.

    Attributes:
        adapter: The folder.
        modules: How many modules have an adapter.
        parameters: How many numbers were trained.
        samples: Samples trained on.
        held_out: Samples evaluated on.
        truncated: Names of the samples whose response was cut.
        losses: The training loss of every step.
        epochs: The losses around every epoch.
        resumed: Steps taken over from an interrupted run.
    """

    adapter: Path
    modules: int
    parameters: int
    samples: int
    held_out: int
    truncated: tuple[str, ...]
    losses: tuple[float, ...]
    epochs: tuple[Epoch, ...]
    resumed: int


def finetune(
    model: Path,
    adapter: Path,
    data: Sequence[Instruction],
    options: FinetuneOptions,
    progress: Steps,
    *,
    keep: Sequence[Question] = (),
) -> Finetuned:
    """Trains a LoRA adapter on the responses of ``data`` and writes it as a peft folder.

    No code from the checkpoint runs, and nothing is fetched. The folder appears complete or not at all; its bytes
    depend on the model, the data, the options, the device and the versions of torch, transformers and peft alone.

    Args:
        model: A checkpoint folder with tokenizer and chat template; never written to.
        adapter: The folder to make: ``adapter_config.json``, ``adapter_model.safetensors`` (float32) and
            ``training.json``.
        data: The samples, of all kinds.
        options: What to train, and how.
        progress: Receives how far the run has come.
        keep: Prompts on which the model is to stay as it is: it answers them itself before the first step, and is held
            to these answers.

    Returns:
        What was trained, and the loss curve.

    Raises:
        FinetuneError: The model, its chat template, the data or the targets cannot be used together.
        CheckpointError: The checkpoint is malformed.
        ExecuteError: The adapter is in the way, or an interrupted run cannot be gone on with.
        UsageError: An option's value cannot be used.
        Interrupted: Ctrl-C or SIGTERM; the complete epochs are kept for ``resume``.
    """
    check_packages(
        "finetune trains with peft, transformers and accelerate",
        "peft",
        "transformers",
        "accelerate",
        error=FinetuneError,
    )
    import torch

    _check_options(options)
    device = resolve_device(options.device)
    checkpoint = _open(model)
    _check_adapter(checkpoint, adapter, overwrite=options.overwrite)
    with quiet(), deterministic():
        run = _prepare(model, adapter, data, keep, options, device)
        _report(run, progress)
        with locked(adapter), sigterm_as_interrupt():
            identity = _identity(checkpoint, run)
            staging = Staging.open(adapter, identity, None, resume=options.resume, overwrite=options.overwrite)
            try:
                trainer, resumed = train(run, staging, progress)
                done = _write(trainer, run, checkpoint, staging.folder, identity, resumed)
                staging.publish()
            except KeyboardInterrupt as error:
                kept = "--resume goes on after the last complete epoch" if staging.done else "no epoch was complete"
                raise Interrupted(f"{adapter}: interrupted; {kept}") from error
            except torch.OutOfMemoryError as error:
                raise FinetuneError(
                    f"{run.device} ran out of memory; --batch 1 or a smaller --length takes less"
                ) from error
            except OSError as error:
                raise ExecuteError(f"{error.filename or adapter}: {error.strerror or error}") from error
            except FinetuneError:
                staging.discard()
                raise
            finally:
                if not staging.done:
                    staging.discard()
    return done


# ---------------------------------------------------------------------------------------- before the training


def _check_options(options: FinetuneOptions) -> None:
    at_least_one = ("rank", "epochs", "batch", "accumulate", "keep_length")
    checks = [(name, getattr(options, name) >= 1, "at least 1") for name in at_least_one]
    checks += [
        (name, 0 < getattr(options, name) < math.inf, "more than 0") for name in ("alpha", "learning_rate", "beta")
    ]
    checks += [
        (name, 0 <= getattr(options, name) < math.inf, "at least 0")
        for name in ("prefer_weight", "keep_weight", "patience")
    ]
    checks += [
        (name, 0 <= getattr(options, name) < 1, "at least 0 and less than 1")
        for name in ("dropout", "evaluation_share")
    ]
    checks += [
        ("length", options.length >= 2, "at least 2"),
        ("seed", 0 <= options.seed < 2**32, "at least 0 and less than 2^32"),
        ("targets", bool(options.targets), "auto or names of modules"),
    ]
    for name, fine, expected in checks:
        if not fine:
            raise UsageError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(options, name)}")
    kind, _, number = options.device.partition(":")
    if int(number or 0):
        raise UsageError(
            f"--device {options.device}: training takes the first GPU it sees; set CUDA_VISIBLE_DEVICES={number} and "
            f"use --device {kind}"
        )


def _open(model: Path) -> Checkpoint:
    checkpoint = open_folder(model, FinetuneError)
    if "quantization_config" in (checkpoint.config or {}):
        raise FinetuneError(
            f"{model}: its weights are quantised, and an adapter is trained on plain ones; train it on what "
            f"`ablate-shards dequantise {model} OUT` writes"
        )
    return checkpoint


def _check_adapter(checkpoint: Checkpoint, adapter: Path, *, overwrite: bool) -> None:
    check_out(checkpoint.path, files_of(checkpoint), adapter, overwrite=overwrite)
    if adapter.is_dir() and any(adapter.iterdir()) and not (adapter / TRAINING_NAME).is_file():
        raise ExecuteError(
            f"{adapter}: already exists and holds no {TRAINING_NAME}, so it is not replaced; name another"
        )


def _read_tokenizer(model: Path) -> Any:
    tokenizer = read_tokenizer(model, FinetuneError)
    if tokenizer.eos_token_id is None:
        raise FinetuneError(f"{model}: its tokenizer names no eos_token to end a response with; add it to its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _prepare(
    model: Path,
    adapter: Path,
    data: Sequence[Instruction],
    keep: Sequence[Question],
    options: FinetuneOptions,
    device: "torch.device",
) -> TrainingRun:
    config = read_config(model, FinetuneError)
    tokenizer = _read_tokenizer(model)
    skeleton = build_skeleton(model, config)
    trained, held = split(data, options.evaluation_share, options.seed)
    # What weighs nothing need not be computed.
    compared = {
        number: sample for number, sample in enumerate(data) if sample.rejected is not None and options.prefer_weight
    }
    others = [dataclasses.replace(sample, response=str(sample.rejected)) for sample in compared.values()]

    def encoded(samples: Sequence[Instruction]) -> list[EncodedSample]:
        return encode_instructions(
            model, config, tokenizer, samples, length=options.length, vocabulary=skeleton.vocabulary
        )

    return TrainingRun(
        model=model,
        adapter=adapter,
        data=data,
        options=options,
        device=device,
        config=config,
        tokenizer=tokenizer,
        skeleton=skeleton,
        chosen=choose(skeleton, options.targets),
        encoded=encoded(data),
        trained=trained,
        held=held,
        rejected=dict(zip(compared, encoded(others), strict=True)) if others else {},
        keep=keep,
        held_keep=draw(range(len(keep)), options.evaluation_share, f"{options.seed} {KEPT_KIND}"),
    )


def _report(run: TrainingRun, progress: Steps) -> None:
    """Says what will be trained and what not, and refuses what cannot fit."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(sample.kind for sample in run.data).items()))
    progress.note(f"{len(run.data)} samples ({kinds}): {len(run.trained)} to train on, {run.held_out} held out")
    if cut := run.truncated:
        progress.note(
            f"{len(cut)} of {len(run.data)} responses are cut, so that no sample has more than {run.options.length} "
            f"tokens: {', '.join(cut[:_MOST_NAMES])}{' …' if len(cut) > _MOST_NAMES else ''}; --length takes more"
        )
    if run.rejected:
        progress.note(f"{len(run.rejected)} samples have a rejected response, and are preferred to it")
    progress.note(f"adapters on {folded(run.chosen)}")
    if untouched := run.untouched:
        where = " of the linear-attention layers" if all(map(run.skeleton.is_in_linear_attention, untouched)) else ""
        progress.note(f"these targets leave modules{where} untouched: {folded(untouched)}; --targets auto adds them")
    if run.skeleton.fused:
        progress.note(f"untouched: {folded(run.skeleton.fused)}: fused experts, which are not linear modules")
    if run.skeleton.mistaken:
        progress.note(f"untouched: {folded(run.skeleton.mistaken)}: peft takes these names for those of the experts")
    hybrid = any(map(run.skeleton.is_in_linear_attention, run.skeleton.linear))
    if hybrid and run.device.type == "cuda" and importlib.util.find_spec("fla") is None:
        progress.note(
            "linear attention is computed without fast kernels; `pip install flash-linear-attention` has them"
        )
    _check_memory(run, progress)


def _check_memory(run: TrainingRun, progress: Steps) -> None:
    skeleton, options = run.skeleton, run.options
    item = 2 if run.bfloat16 else 4
    weights = skeleton.parameters * item
    adapters = _TRAINED_BYTES * options.rank * sum(sum(skeleton.linear[name]) for name in run.chosen)
    tokens = options.batch * max(len(sample.tokens) for sample in run.encoded)
    # What a layer keeps for its gradient is about the inputs and outputs of its linear modules.
    kept = tokens * item * sum(map(sum, skeleton.linear.values()))
    layers = skeleton.text.num_hidden_layers
    if run.recomputes:
        kept = kept // layers + tokens * item * layers * skeleton.text.hidden_size
    # The logits, the same in float32, and their gradient.
    kept += tokens * skeleton.vocabulary * (item + 8)
    needed, free = weights + adapters + kept, free_memory(run.device)
    amount = (
        f"about {size_text(needed)} on {run.device} ({size_text(weights)} weights, {size_text(adapters)} adapters, "
        f"{size_text(kept)} activations)"
    )
    if weights + adapters > free:
        raise FinetuneError(f"training takes {amount}, but {size_text(free)} are free; use a larger device")
    progress.note(f"training takes {amount}")
    if needed > free:
        progress.note(f"only {size_text(free)} are free; --batch 1 or a smaller --length takes less")


# ---------------------------------------------------------------------------------------- the folder


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {
        "ablate_shards": __version__,
        "peft": peft.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _identity(checkpoint: Checkpoint, run: TrainingRun) -> dict[str, str]:
    """Returns what must be equal for a resumed run to give the same bytes, by what to call it."""
    return {
        "the model": base_digest(checkpoint) or "",
        "the data": _digest([*map(dataclasses.asdict, run.data), *map(dataclasses.asdict, run.keep)]),
        "the options": _digest(run.settings),
        "the device or a version": _digest([run.device.type, _versions()]),
    }


def _losses(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns the training loss of every step, and where in the epochs it was."""
    return [
        {"step": entry["step"], "epoch": entry["epoch"], "loss": entry["loss"]} for entry in history if "loss" in entry
    ]


def _write(
    trainer: Any, run: TrainingRun, checkpoint: Checkpoint, folder: Path, identity: Mapping[str, str], resumed: int
) -> Finetuned:
    """Writes the adapter beside the trainer's checkpoints, durably, and removes those."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    config = trainer.model.peft_config["default"]
    base = checkpoint.identity
    described = config.to_dict() | {
        "base_model_name_or_path": base["name"],
        "revision": base.get("revision"),
        "inference_mode": True,
        # peft shortens the list to endings, which would match a vision tower's modules too.
        "target_modules": sorted(run.chosen),
    }
    state = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(state.items())}
    history = trainer.state.log_history
    epochs = epochs_of(history)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    training = {
        "format": _FORMAT,
        "base": {**base, "sha256": identity["the model"]},
        "data": {
            "sha256": identity["the data"],
            "training": dict(sorted(Counter(run.data[number].kind for number in run.trained).items())),
            "held_out": {kind: [run.data[number].id for number in numbers] for kind, numbers in run.held.items()}
            | ({KEPT_KIND: [run.keep[number].id for number in sorted(run.held_keep)]} if run.held_keep else {}),
            "truncated": run.truncated,
        },
        "options": run.settings,
        "device": run.device.type,
        "dtype": "bfloat16" if run.bfloat16 else "float32",
        "kept": len(run.keep),
        "rejected": len(run.rejected),
        "modules": len(run.chosen),
        "parameters": parameters,
        "untouched": [*run.untouched, *run.skeleton.fused, *run.skeleton.mistaken],
        "losses": _losses(history),
        "epochs": [dataclasses.asdict(epoch) for epoch in epochs],
        "versions": _versions(),
    }
    write_whole(folder / WEIGHTS_NAME, [save(tensors, {"format": "pt"})])
    for name, content in ((CONFIG_NAME, described), (TRAINING_NAME, training)):
        text = json.dumps(content, indent=1, sort_keys=name == CONFIG_NAME, ensure_ascii=False, default=sorted)
        write_whole(folder / name, [f"{text}\n".encode()])
    shutil.rmtree(folder / CHECKPOINTS)
    return Finetuned(
        adapter=run.adapter,
        modules=len(run.chosen),
        parameters=parameters,
        samples=len(run.trained),
        held_out=run.held_out,
        truncated=tuple(run.truncated),
        losses=tuple(entry["loss"] for entry in _losses(history)),
        epochs=epochs,
        resumed=resumed,
    )
