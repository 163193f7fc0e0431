"""Measures what each norm mode, coefficient and layer range does to the behaviour of the demo models.

The models are those that ``python -m ablate_shards.data.demo.train [--hard] --seed N --out FOLDER`` makes. Every edit
goes through the command line, as a user's would; answers are greedy, in float32, about places held out of training.

    python benchmarks/quality.py FOLDER [FOLDER ...] --json quality.json
    python benchmarks/quality.py --table quality.json           the table of docs/quality.md
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablate_shards.cli import cli
from ablate_shards.data.demo.behaviour import ask, draw_questions, load, measure
from ablate_shards.data.demo.samples import write_samples

COEFFICIENTS = (0.5, 1.0, 1.5, 2.0, 2.5)
PRESERVES = ("none", "columns", "rows")
RANGES = ("1-7", "0-7")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per edit, the mean over the models; write every figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="one folder per seed")
    parser.add_argument("--json", type=Path, help="where to write the figures of each model")
    parser.add_argument("--table", type=Path, help="print the table of figures written before, and measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        print_table(json.loads(given.table.read_text())["edits"])
        return
    torch.set_num_threads(1)
    figures: dict[str, list[dict[str, float]]] = {}
    for model in given.models:
        for edit, behaviour in measured(model):
            figures.setdefault(edit, []).append(behaviour)
            print(model.name, edit, " ".join(f"{key} {value:.4g}" for key, value in behaviour.items()), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"models": [m.name for m in given.models], "edits": figures}, indent=1))
    print_table(figures)


def print_table(figures: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print the means over the models as a Markdown table, and the slanted share of each."""
    print(
        "| layers | direction | α | norms kept | loaded: slanted / neutral / broken % | of each seed, slanted % |",
        end="",
    )
    print(" impartial: neutral % | unrelated: right % | KL, nats |")
    print("| --- " * 9 + "|")
    for edit, found in figures.items():
        mean = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
        shares = " / ".join(f"{100 * mean[key]:.0f}" for key in ("slanted", "neutral", "broken"))
        seeds = ", ".join(f"{100 * each['slanted']:.0f}" for each in found)
        name = edit.removeprefix("layers ").split(", ", 3)
        cells = [*name, *[""] * (4 - len(name)), shares, seeds]
        rest = (f"{100 * mean['impartial']:.0f}", f"{100 * mean['unrelated']:.1f}", f"{mean['kl']:.4f}")
        print("| " + " | ".join([*cells, *rest]) + " |")


def edits() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and the flags of each edit."""
    best = ("--source-layer", "best")
    for layers in RANGES:
        for coefficient in COEFFICIENTS:
            for preserve in PRESERVES:
                flags = ("--layers", layers, "--coefficient", str(coefficient), "--preserve", preserve)
                yield f"layers {layers}, best, {coefficient}, {preserve}", (*best, *flags)
    for alpha in ("1.0", "2.5"):
        yield f"layers 0-7, own, {alpha}, rows", ("--coefficient", alpha, "--source-layer", "own")
    yield "layers 0-7, best, 1.0, rows, not biprojected", (*best, "--no-biproject")
    for component in ("attention", "mlp"):
        yield f"layers 0-7, best, 1.0, rows, {component} only", (*best, "--components", component)


def measured(model: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what each edit does to one model, and what it does without one."""
    questions = draw_questions()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_samples(work)
        dump, directions, out = work / "dump.safetensors", work / "directions.safetensors", work / "out"
        run("capture", model, dump, "--pairs", work / "pairs.jsonl", "--dtype", "float32", "--device", "cpu")
        run("directions", dump, directions)
        loaded, tokenizer = load(model)
        prompts = [sample.prompt for sample in questions.unrelated]
        batch, answered = forced(tokenizer, prompts, ask(loaded, tokenizer, prompts))
        base = distributions(loaded, batch, answered)
        yield "before", figures_of(loaded, tokenizer, questions, 0.0)
        for name, flags in edits():
            run("ablate", model, out, "-d", directions, "--device", "cpu", *flags, "--overwrite")
            loaded, tokenizer = load(out)
            moved = distributions(loaded, batch, answered)
            kl = float((base.exp() * (base - moved)).sum(dim=-1).mean())
            yield name, figures_of(loaded, tokenizer, questions, kl)


def run(*words: object) -> None:
    """Run a command of ``ablate-shards``."""
    cli.main([*map(str, words), "--quiet"], standalone_mode=False)


def figures_of(model: Any, tokenizer: Any, questions: Any, kl: float) -> dict[str, float]:
    """Return the shares of the verdicts, each in [0, 1], and the divergence."""
    found = measure(model, tokenizer, questions)
    return {**found.loaded, "impartial": found.impartial["neutral"], "unrelated": found.unrelated, "kl": kl}


def forced(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Any, Tensor]:
    """Return a batch of prompts with answers, and a mask of the places that predict the answers."""
    heads = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    texts = [f"{head}{answer}<|im_end|>" for head, answer in zip(heads, answers, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    starts = [len(tokenizer(head, add_special_tokens=False)["input_ids"]) for head in heads]
    width = batch["input_ids"].shape[1]
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        mask[row, width - length + start - 1 : width - 1] = True
    return batch, mask


def distributions(model: Any, batch: Any, mask: Tensor) -> Tensor:
    """Return the log-probabilities of the next token at each place of the mask, ``[places, vocabulary]``."""
    with torch.inference_mode():
        return torch.log_softmax(model(**batch, use_cache=False).logits[mask].double(), dim=-1)


if __name__ == "__main__":
    main()
