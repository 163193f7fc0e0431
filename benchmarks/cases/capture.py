"""A capture with weights loaded and with weights streamed a layer at a time, against reading the shards once.

The model is a Llama with random bf16 weights, 71 MB a layer, and has the demo's tokenizer; 8 pairs of about 60 tokens
a side, on the CPU. A model of one small layer shows what starting up takes. Both ways must give the same bytes.
"""

import json
import shutil
from pathlib import Path

from ablate_shards.data import demo
from benchmarks.checkpoints import Layout, llama, shards, write
from benchmarks.harness import Bench, amount, case
from benchmarks.processes import TOOL, reading, writing

__all__: list[str] = []

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LOADED, STREAMED = "weights loaded", "weights streamed"


@case("capture", runs=3, long=True)
def capture(bench: Bench) -> None:
    """Capture from models of 0.6 and 1 GB with weights loaded and streamed: peak memory and time."""
    pairs, dump = bench.work / "pairs.jsonl", bench.work / "dump.safetensors"
    write_pairs(pairs, 8)
    smallest = build(llama(1, tiny=True), bench.work / "smallest")
    for layers in (2,) if bench.tiny else (5, 11):
        model = build(llama(layers, tiny=bench.tiny), bench.work / f"layers-{layers}")
        size = sum(shard.stat().st_size for shard in shards(model))
        activations: list[bytes] = []

        def loaded(activations: list[bytes] = activations) -> None:
            activations.append(dump.read_bytes())

        def streamed(activations: list[bytes] = activations) -> str | None:
            return None if dump.read_bytes() in activations else "the activations are not those of loaded weights"

        bench.race(
            f"{amount(size)} of weights, {layers} layers",
            [
                writing(LOADED, command(model, dump, pairs, "never"), dump, against=STREAMED, check=loaded),
                writing(STREAMED, command(model, dump, pairs, "always"), dump, check=streamed),
                writing("start-up: 1 small layer", command(smallest, dump, pairs, "always"), dump, against=STREAMED),
                reading(shards(model), against=STREAMED),
            ],
            size=size,
        )
        shutil.rmtree(model)


def command(model: Path, dump: Path, pairs: Path, offload: str) -> list[str | Path]:
    """Returns the command that captures."""
    return [*TOOL, "capture", model, dump, "--pairs", pairs, "--offload", offload, "--device", "cpu", "--quiet"]


def build(layout: Layout, folder: Path) -> Path:
    """Writes a checkpoint that transformers can run, with the demo's tokenizer."""
    write(layout, folder)
    for name in TOKENIZER:
        shutil.copy(demo.MODEL / name, folder)
    return folder


def write_pairs(path: Path, count: int) -> None:
    """Writes pairs of about 60 tokens a side."""
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(WORDS[(number + step) % len(WORDS)] for step in range(12))
            file.write(json.dumps({"positive": f"{text} yes", "negative": f"{text} no"}) + "\n")
