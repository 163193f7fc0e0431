"""Questions answered, a base that was evaluated before, and activations captured, each on a real chat model.

The model is that of ``benchmarks.real``; the questions and pairs are those of ``tw_civic``. Everything runs in this
process, and loading the model is part of each time. Against ours stands what anyone would write with transformers: a
batch of one size after another in the order of the file, padded on the left, ``generate``; hooks on the layers of a
forward pass. In bfloat16 near-ties are decided by what else is in a batch, so most answers have to be equal, not all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards.data import demo
from ablate_shards.data.tw_civic import PAIRS, QUESTIONS
from benchmarks import machine, real
from benchmarks.harness import Bench, BenchmarkError, Contender, Sample, case

if TYPE_CHECKING:
    from ablate_shards.surgery.evaluate.evaluation import Evaluation
    from ablate_shards.surgery.model.samples import Pair, Question

__all__: list[str] = []

BATCH = 16
OURS, GENERATE = "evaluate", "transformers, generate"
KNOWN, FRESH = "evaluate --against BASE", "with --fresh"
CAPTURE, HOOKS = "capture", "transformers, hooks"
#: How far activations may be from those of other batches in bfloat16, as a share of their norm.
ROUNDING = 0.03
AS_TEXT: Mapping[str, Any] = {"tokenize": False, "add_generation_prompt": True}
AS_TENSORS: Mapping[str, Any] = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}


@case("evaluate", runs=3, long=True)
def evaluate(bench: Bench) -> None:
    """Answers of a real model, against transformers' generate."""
    model, every, length = (demo.MODEL, 20, 8) if bench.tiny else (chat_model(), 3, 128)
    questions = questions_of(every)
    said: dict[str, list[str]] = {}

    def ours() -> None:
        found = evaluation(model, questions, length, lean=False, text=None)
        said[OURS] = [each.text for each in found.answers]

    def theirs() -> None:
        said[GENERATE] = generated(model, questions, length)

    def alike() -> str | None:
        equal = sum(one.strip() == other.strip() for one, other in zip(said[OURS], said[GENERATE], strict=True))
        words = f"{equal} of {len(questions)} answers are equal to the letter"
        bench.note(f"{words}; the others differ where rounding decided between two tokens.")
        return None if 2 * equal >= len(questions) else f"only {words}"

    bench.race(
        f"{len(questions)} questions, at most {length} tokens, {where()}",
        [timed(OURS, ours), timed(GENERATE, theirs, against=OURS, check=alike)],
    )


@case("evaluate-base", runs=3, long=True)
def evaluate_base(bench: Bench) -> None:
    """Evaluation of an edit of a real model whose base was evaluated before, against one that asks the base again."""
    model, every, length = (demo.MODEL, 40, 8) if bench.tiny else (chat_model(), 12, 128)
    questions = questions_of(every)
    base, edited = (bench.work / name for name in ("base", "edited"))
    for folder in (base, edited):
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).symlink_to(file)
    # Other bytes, and so another model, which answers the same.
    (edited / "config.json").unlink()
    (edited / "config.json").write_text((model / "config.json").read_text() + "\n")
    evaluation(base, questions, length, out=base.with_name("base.evaluation.json"))
    found: dict[str, Evaluation] = {}

    def run(name: str, *, fresh: bool) -> Callable[[], None]:
        return lambda: found.update({name: evaluation(edited, questions, length, against=base, fresh=fresh)})

    def same() -> str | None:
        return None if found[KNOWN] == found[FRESH] else "the evaluation is another"

    bench.race(
        f"{len(questions)} questions to an edit and its base, {where()}",
        [timed(KNOWN, run(KNOWN, fresh=False)), timed(FRESH, run(FRESH, fresh=True), against=KNOWN, check=same)],
    )


@case("capture-hooks", runs=3, long=True)
def capture_hooks(bench: Bench) -> None:
    """Capture from a real model, against a forward pass with hooks on its layers."""
    from ablate_shards.surgery.capture.forward import CaptureOptions, capture
    from ablate_shards.surgery.machine.progress import Silent
    from ablate_shards.surgery.model.samples import load_pairs

    model = demo.MODEL if bench.tiny else chat_model()
    pairs = load_pairs(PAIRS["answer"])[: 4 if bench.tiny else None]
    dump, plain = bench.work / "dump.safetensors", bench.work / "plain.safetensors"
    options = CaptureOptions(batch=BATCH, overwrite=True)
    bench.race(
        f"{2 * len(pairs)} prompts with responses, {where()}",
        [
            timed(CAPTURE, lambda: capture(model, dump, pairs, options, Silent())),
            timed(HOOKS, lambda: hooked(model, pairs, plain), against=CAPTURE, check=lambda: apart(dump, plain)),
        ],
    )


def chat_model() -> Path:
    """Returns the folder of the model, made unless it is there.

    Raises:
        BenchmarkError: It cannot be made.
    """
    try:
        return real.build("qwen")
    except real.NotHere as error:
        raise BenchmarkError(error.message) from error


def timed(
    name: str, run: Callable[[], object], *, against: str | None = None, check: Callable[[], str | None] = lambda: None
) -> Contender:
    """Returns a contender that runs in this process."""

    def timing() -> Sample:
        start = time.perf_counter()
        run()
        return Sample(time.perf_counter() - start)

    return Contender(name, timing, against, check)


def where() -> str:
    """Says what computes."""
    import torch

    threads = torch.get_num_threads()
    return machine.gpu() or f"{threads} thread{'s' if threads > 1 else ''}"


def device() -> str:
    """Returns the device that the commands choose by themselves."""
    return "cpu" if machine.gpu() is None else "cuda"


def questions_of(every: int) -> "Sequence[Question]":
    """Returns some of the questions of ``tw_civic``."""
    from ablate_shards.surgery.model.samples import load_questions

    return load_questions(QUESTIONS)[::every]


def evaluation(model: Path, questions: Sequence["Question"], length: int, **how: Any) -> "Evaluation":
    """Evaluates as the command does."""
    from ablate_shards.data.tw_civic import NEUTRAL_TEXT
    from ablate_shards.surgery.evaluate.interview import EvaluateOptions
    from ablate_shards.surgery.evaluate.interview import evaluate as ask
    from ablate_shards.surgery.machine.progress import Silent

    places = {name: how.pop(name) for name in ("against", "out") if name in how}
    options = EvaluateOptions(**{"length": length, "batch": BATCH, "text": NEUTRAL_TEXT, **how})
    return ask(model, questions, options, Silent(), **places)


def generated(model: Path, questions: Sequence["Question"], length: int) -> list[str]:
    """Answers questions as anyone would with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device())
    chats = [tokenizer.apply_chat_template(each.turn.messages(), **AS_TEXT) for each in questions]
    answers: list[str] = []
    for start in range(0, len(chats), BATCH):
        given = tokenizer(chats[start : start + BATCH], **AS_TENSORS).to(device())
        with torch.inference_mode():
            made = network.generate(**given, max_new_tokens=length, do_sample=False)
        answers += tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def hooked(model: Path, pairs: Sequence["Pair"], out: Path) -> None:
    """Captures the mean over each response as anyone would with transformers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device())
    layers = network.get_decoder().layers
    streams: list[Any] = [None] * len(layers)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _module, _given, output, number=number: streams.__setitem__(number, output))
    found: dict[str, list[torch.Tensor]] = {}
    for label in ("positive", "negative"):
        sides = [getattr(pair, label) for pair in pairs]
        before = [tokenizer.apply_chat_template(side.messages()[:-1], **AS_TEXT) for side in sides]
        for start in range(0, len(sides), BATCH):
            rows = range(start, min(start + BATCH, len(sides)))
            given = tokenizer([before[row] + sides[row].response for row in rows], **AS_TENSORS).to(device())
            with torch.inference_mode():
                network(**given, use_cache=False, logits_to_keep=1)
            for number, stream in enumerate(streams):
                for line, row in enumerate(rows):
                    first = len(tokenizer(before[row], add_special_tokens=False)["input_ids"])
                    last = int(given["attention_mask"][line].sum())
                    mean = stream[line, first:last].float().mean(0).cpu()
                    found.setdefault(f"{label}.layers.{number}", []).append(mean)
    save_file({name: torch.stack(rows) for name, rows in found.items()}, out)


def apart(dump: Path, plain: Path) -> str | None:
    """Says how far two dumps are from each other, None where no further than rounding in bfloat16."""
    from safetensors.torch import load_file

    ours, theirs = load_file(dump), load_file(plain)
    if ours.keys() != theirs.keys():
        return "the dumps have other tensors"
    far = max(float((ours[name].float() - each).norm() / each.norm()) for name, each in theirs.items())
    return None if far <= ROUNDING else f"activations differ by {far:.1%} of their norm"
