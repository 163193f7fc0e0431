"""Runs transformers' Trainer over an adapted model, and keeps track of its complete epochs."""

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ablate_shards.errors import FinetuneError
from ablate_shards.surgery.finetune.foreign import take_loss_as_mean, use_one_device
from ablate_shards.surgery.finetune.objective import CHOSEN, KEPT, LEARNT, REJECTED, Weights, objective
from ablate_shards.surgery.finetune.responses import IGNORED, EncodedSample, prompt_of
from ablate_shards.surgery.finetune.targets import SEVEN, Skeleton, Targets, folded
from ablate_shards.surgery.machine.devices import computes_bfloat16
from ablate_shards.surgery.machine.files import fsync_files
from ablate_shards.surgery.machine.progress import Steps
from ablate_shards.surgery.machine.staging import Staging
from ablate_shards.surgery.model.generation import greedy_answers
from ablate_shards.surgery.model.loading import end_tokens, load_model
from ablate_shards.surgery.model.samples import Instruction, Question

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHECKPOINTS",
    "KEPT_KIND",
    "Epoch",
    "FinetuneOptions",
    "TrainingRun",
    "deterministic",
    "epochs_of",
    "train",
]

#: Prompts that the model answers at a time before it is trained.
_AT_ONCE = 16
#: The folder of the trainer's own checkpoints, inside the staged adapter.
CHECKPOINTS = "trainer"
#: What the held-out losses of kept prompts are called by.
KEPT_KIND = "kept"

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """What to train, and how.

    Attributes:
        rank: Rank of each adapter.
        alpha: Its scale: the change is ``alpha / rank`` times ``B A``.
        dropout: Share of an adapter's inputs that are dropped in training.
        targets: Linear modules of the decoder layers by the end of their name, with or without ``_proj``;
            ``auto`` takes all but the routers.
        epochs: Times that each sample is seen.
        learning_rate: At the first step; it falls linearly to zero.
        length: Most tokens of a sample; longer responses are cut.
        batch: Samples computed at a time.
        accumulate: Batches per step.
        seed: Of the split, the order, the adapters' first values and dropout.
        evaluation_share: Share of each kind of sample that is not trained on.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (rank-stabilised LoRA).
        gradient_checkpointing: Compute activations twice to keep fewer of them; on a GPU if None.
        beta: How sharply a response is distinguished from the rejected one, where a sample has one.
        prefer_weight: Weight of that beside the response's likelihood; 0 leaves the rejected ones out.
        keep_weight: Weight of the divergence from the start on the prompts that are kept.
        keep_length: Most tokens of the model's own answer to such a prompt.
        patience: Epochs without a smaller held-out loss after which the training ends, and goes back to the best; 0
            trains to the end.
        dtype: What to compute in; ``auto``: bfloat16 where the device has instructions for it, else float32.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``.
        resume: Go on with an interrupted run.
        overwrite: Replace an adapter that an earlier run made.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: Targets = SEVEN
    epochs: int = 3
    learning_rate: float = 2e-4
    length: int = 512
    batch: int = 2
    accumulate: int = 4
    seed: int = 0
    evaluation_share: float = 0.1
    rslora: bool = False
    gradient_checkpointing: bool | None = None
    beta: float = 2.0
    prefer_weight: float = 0.1
    keep_weight: float = 2.0
    keep_length: int = 96
    patience: int = 0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Epoch:
    """The losses around one pass over the data, in nats per token.

    Attributes:
        number: Which pass; 0 is before the first step.
        training: Mean over the steps of the pass, None before the first.
        evaluation: Mean over the samples held out, by kind; how far the answers to kept prompts moved, as ``kept``.
    """

    number: int
    training: float | None
    evaluation: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """All that a training needs, checked.

    Attributes:
        model: The checkpoint folder.
        adapter: The folder to make.
        data: The samples.
        options: What to train, and how.
        device: Where.
        config: The model's configuration.
        tokenizer: Its tokenizer.
        skeleton: Its modules.
        chosen: The linear modules that get an adapter.
        encoded: The tokens of each sample.
        trained: Which samples are trained on.
        held: By kind, which are held out.
        rejected: The tokens of the rejected responses, by sample.
        keep: Prompts on which the model is to stay as it is.
        held_keep: Which of them are held out.
    """

    model: Path
    adapter: Path
    data: Sequence[Instruction]
    options: FinetuneOptions
    device: "torch.device"
    config: Any
    tokenizer: Any
    skeleton: Skeleton
    chosen: tuple[str, ...]
    encoded: Sequence[EncodedSample]
    trained: Sequence[int]
    held: Mapping[str, Sequence[int]]
    rejected: Mapping[int, EncodedSample] = field(default_factory=dict)
    keep: Sequence[Question] = ()
    held_keep: Sequence[int] = ()

    @property
    def plain(self) -> bool:
        """Whether the loss is that of the responses alone."""
        return not self.rejected and not self.keep

    @property
    def untouched(self) -> list[str]:
        """The linear modules that get no adapter."""
        chosen = set(self.chosen)
        return [name for name in self.skeleton.linear if name not in chosen]

    @property
    def truncated(self) -> list[str]:
        """The samples whose response is cut."""
        return [sample.id for sample, encoded in zip(self.data, self.encoded, strict=True) if encoded.cut]

    @property
    def held_out(self) -> int:
        """How many samples are held out."""
        return sum(map(len, self.held.values()))

    def parts(self, features: Sequence[_Item]) -> tuple[list[_Item], dict[str, list[_Item]]]:
        """Returns, of what belongs to the samples and then to what is kept, what to train on and what is held out."""
        kept = range(len(self.data), len(features))
        out = {kept[number] for number in self.held_keep}
        held = {kind: [features[number] for number in numbers] for kind, numbers in self.held.items()}
        if out:
            held[KEPT_KIND] = [features[number] for number in sorted(out)]
        return [features[number] for number in (*self.trained, *kept) if number not in out], held

    @property
    def bfloat16(self) -> bool:
        """Whether the device computes in bfloat16."""
        if self.options.dtype != "auto":
            return self.options.dtype == "bfloat16"
        return computes_bfloat16(self.device)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed twice; on a processor, time is scarcer than memory."""
        chosen = self.options.gradient_checkpointing
        return self.device.type != "cpu" if chosen is None else chosen

    @property
    def alpha(self) -> float:
        """Alpha as peft writes it, without a fraction where it has none."""
        alpha = self.options.alpha
        return int(alpha) if alpha == int(alpha) else alpha

    @property
    def settings(self) -> dict[str, Any]:
        """The options that change the result, as they turned out."""
        settings = dataclasses.asdict(self.options) | {
            "alpha": self.alpha,
            "gradient_checkpointing": self.recomputes,
        }
        return {name: value for name, value in settings.items() if name not in ("device", "resume", "overwrite")}


def train(run: TrainingRun, staging: Staging, progress: Steps) -> tuple[Any, int]:
    """Trains, or goes on training, and returns the trainer and the steps that were done before.

    Raises:
        FinetuneError: The model cannot be loaded or adapted, or the loss is no number.
        OutOfMemoryError: The device's memory does not suffice.
    """
    from transformers import (
        DataCollatorForSeq2Seq,
        EarlyStoppingCallback,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    options = run.options
    set_seed(options.seed)
    model = _with_adapters(run)
    training, held = run.parts(_features(run, model, progress))
    patient = bool(options.patience and held)
    arguments = TrainingArguments(
        output_dir=str(staging.folder / CHECKPOINTS),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=run.recomputes,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=run.bfloat16,
        use_cpu=run.device.type == "cpu",
        seed=options.seed,
        eval_strategy="epoch" if held else "no",
        eval_on_start=bool(held),
        prediction_loss_only=True,
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=patient,
        metric_for_best_model=f"eval_{_watched(held)}_loss" if patient else None,
        greater_is_better=False if patient else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=run.device.type == "cuda",
    )
    use_one_device(arguments)
    padded = DataCollatorForSeq2Seq(run.tokenizer, label_pad_token_id=IGNORED)
    trainer = (Trainer if run.plain else _preferring(run))(
        model=model,
        args=arguments,
        data_collator=padded if run.plain else _flattened(padded),
        train_dataset=training,
        eval_dataset=held or None,
        callbacks=[
            _callback(staging, progress),
            *([EarlyStoppingCallback(early_stopping_patience=options.patience)] if patient else []),
        ],
    )
    if not run.plain:
        take_loss_as_mean(trainer)
    trainer.remove_callback(PrinterCallback)
    name = max(staging.done, key=lambda name: int(staging.done[name]["step"]), default=None)
    step = int(staging.done[name]["step"]) if name else 0
    if name:
        progress.note(f"going on after step {step}")
    trainer.train(resume_from_checkpoint=str((staging.folder / name).parent) if name else None)
    return trainer, step


def _watched(held: Mapping[str, Sequence[Any]]) -> str:
    """Returns the kind of sample whose held-out loss tells when to stop: what is to be learnt, if there is any."""
    return "contested" if "contested" in held else next(iter(held))


def _features(run: TrainingRun, model: Any, progress: Steps) -> list[Any]:
    """Returns what the trainer is given: a row for each sample, or the rows of what is compared and kept."""
    types = run.skeleton.token_types
    if run.plain:
        return [sample.features(token_types=types) for sample in run.encoded]
    items = []
    for number, sample in enumerate(run.encoded):
        other = run.rejected.get(number)
        rows = [sample.features(token_types=types) | {"role": LEARNT if other is None else CHOSEN}]
        items.append(rows if other is None else [*rows, other.features(token_types=types) | {"role": REJECTED}])
    for sample in _own_answers(run, model, progress):
        items.append([sample.features(token_types=types) | {"role": KEPT}])
    return items


def _own_answers(run: TrainingRun, model: Any, progress: Steps) -> Iterator[EncodedSample]:
    """Yields the prompts that are kept, each with the answer that the model gives before it is trained."""
    import torch

    if run.keep:
        progress.note(f"{len(run.keep)} prompts are answered by the model itself, to be kept")
    model.eval()
    prompts = [prompt_of(run.tokenizer, question) for question in run.keep]
    # Of one length, as far as possible.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with torch.no_grad(), model.disable_adapter():
        made = greedy_answers(
            model.get_base_model(),
            [prompts[number] for number in order],
            [run.options.keep_length] * len(order),
            at_once=_AT_ONCE,
            ends=end_tokens(model.generation_config.eos_token_id, run.tokenizer.eos_token_id),
            pad=run.tokenizer.pad_token_id,
        )
    answers = dict(zip(order, made, strict=True))
    for number, prompt in enumerate(prompts):
        yield EncodedSample([*prompt, *answers[number]], len(prompt), cut=False)
    model.train()


def _flattened(padded: Any) -> Any:
    """Returns a collator that lays out the rows of all items, the rejected ones in the order of their chosen ones."""
    import torch

    def collate(items: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        rows = [dict(row) for item in items for row in item]
        roles = [row.pop("role") for row in rows]
        return {**padded(rows), "roles": torch.tensor(roles)}

    return collate


def _preferring(run: TrainingRun) -> Any:
    from transformers import Trainer

    weights = Weights(run.options.beta, run.options.prefer_weight, run.options.keep_weight)

    class Preferring(Trainer):  # type: ignore[misc]  # transformers is not followed
        """A trainer whose loss is that of ``objective``."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: Any = None, **_: Any) -> Any:
            roles = inputs.pop("roles")
            # Held-out losses are in nats: how likely the responses are, and how far the kept answers moved.
            parts = weights if model.training else Weights(weights.beta, prefer=0.0, keep=1.0)
            loss = objective(self.accelerator.unwrap_model(model), inputs, roles, parts)
            return (loss, {}) if return_outputs else loss

    return Preferring


def _with_adapters(run: TrainingRun) -> Any:
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    model = _load(run, torch.bfloat16 if run.bfloat16 else torch.float32)
    model.config.use_cache = False
    config = LoraConfig(
        r=run.options.rank,
        lora_alpha=run.alpha,
        lora_dropout=run.options.dropout,
        use_rslora=run.options.rslora,
        target_modules=list(run.chosen),
        fan_in_fan_out=bool(run.skeleton.conv & set(run.chosen)),
        task_type=TaskType.CAUSAL_LM,
    )
    adapted = get_peft_model(model, config)
    found = {name.removeprefix("base_model.model.") for name in adapted.base_model.targeted_module_names}
    if found != set(run.chosen):
        missed = found ^ set(run.chosen)
        raise FinetuneError(f"peft put adapters elsewhere than asked: {folded(sorted(missed))}; use --targets auto")
    return adapted


def _load(run: TrainingRun, dtype: "torch.dtype") -> Any:
    model, missing = load_model(run.model, run.skeleton.auto, FinetuneError, config=run.config, dtype=dtype)
    if missing:
        raise FinetuneError(
            f"{run.model}: no weights for {folded(missing)}, which would be random; complete the checkpoint first"
        )
    return model


def _callback(staging: Staging, progress: Steps) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        """Passes on how far the trainer is, and writes down which of its checkpoints are complete."""

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            progress.count(state.global_step, state.max_steps)

        def on_log(self, _args: Any, state: Any, _control: Any, **given: Any) -> None:
            losses = {name: value for name, value in given["logs"].items() if name.endswith("loss")}
            if not all(map(math.isfinite, losses.values())):
                raise FinetuneError(
                    f"the loss is not finite at step {state.global_step}; lower --learning-rate, and check that "
                    "the model answers a prompt"
                )

        def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            fsync_files(folder)
            name = (folder / "trainer_state.json").relative_to(staging.folder).as_posix()
            staging.record(name, {"step": state.global_step})
            last = epochs_of(state.log_history)[-1]
            losses = {"training": last.training, **last.evaluation}
            shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
            progress.note(f"epoch {last.number} of {args.num_train_epochs:g}: loss {shown}")

    return Reporter()


def epochs_of(history: Sequence[Mapping[str, Any]]) -> tuple[Epoch, ...]:
    """Returns the losses around every epoch from the trainer's log."""
    training: dict[int, list[float]] = defaultdict(list)
    evaluation: dict[int, dict[str, float]] = defaultdict(dict)
    for entry in history:
        if "loss" in entry:
            training[math.ceil(entry["epoch"] - 1e-6)].append(entry["loss"])
        for name, value in entry.items():
            if match := re.fullmatch(r"eval_(\w+)_loss", name):
                evaluation[round(entry["epoch"])][match[1]] = value
    return tuple(
        Epoch(number, sum(losses) / len(losses) if (losses := training.get(number)) else None, evaluation[number])
        for number in sorted(training.keys() | evaluation.keys())
    )


@contextmanager
def deterministic() -> Iterator[None]:
    """Asks torch for operations that give the same bits each time, wherever it has them."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
