"""Every command line in README and docs is accepted, and does what it says wherever no network or GPU is needed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch
from coded_checkpoints import quantise
from command_line import checked, run
from raw_checkpoints import write_directions
from safetensors.torch import load_file, save_file

from ablate_shards.cli import cli
from ablate_shards.data.demo.__main__ import prepare_demo

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
GENERATED = ROOT / "docs" / "cli.md"
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {GENERATED, TUTORIAL})
NETWORK = "needs a network"
GPU = "needs a GPU"
RAY = "needs Ray: tests/test_ray.py"

_LINE = re.compile(r"^(?: {4,}|\t|\$ |)(?:\$ )?ablate-shards +(?P<words>.*)$")
_INLINE = re.compile(
    rf"`(?:ablate-shards +(?P<whole>[^` ]+ [^`]+)|(?P<short>(?:{'|'.join(cli.commands)}) [A-Z][^`]*))`"
)
_DESCRIBED = re.compile(r"\s{3,}|\s+#\s")
#: A word for an option's value that stands for any value.
_PLACEHOLDERS = {"N": "1", "I": "0", "LAYERS": "1", "$SLURM_CPUS_PER_TASK": "2"}


def written(text):
    """Yields the commands of a page: lines of code, and code inside a sentence that has arguments."""
    fenced = False
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif found := _LINE.match(line):
            if fenced or line.startswith(("    ", "\t")):
                yield _DESCRIBED.split(found["words"])[0].strip()
        elif not fenced:
            yield from (match["whole"] or match["short"] for match in _INLINE.finditer(line))


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in written(page.read_text())})


def words_of(line):
    """Returns the command's name and its other words, as the command line itself would tell them apart."""
    words = [word for word in shlex.split(line) if word != "[OPTIONS]"]
    first = next((word for word in words if not word.startswith("-")), None)
    if first in cli.commands:
        words.remove(first)
        return first, words
    return "ablate", words


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """One of everything that a command reads, made by the commands themselves, small enough to be read in no time."""
    folder = tmp_path_factory.mktemp("things")
    prepare_demo(folder / "demo")
    demo = folder / "demo"
    write_search_questions(demo)
    shorten(demo)
    (demo / "edit.toml").write_text(
        '[source]\nsource = "source"\nout = "by-recipe"\n[directions]\ndirections = "directions.safetensors"\n'
    )
    (demo / "CARD.md").write_text("# A card\n")
    for words in (
        ["capture", demo / "source", demo / "dump.safetensors", "--pairs", demo / "pairs.jsonl"],
        ["directions", demo / "dump.safetensors", demo / "directions.safetensors"],
        ["ablate", demo / "source", demo / "ablated", "-d", demo / "directions.safetensors"],
        ["finetune", demo / "ablated", demo / "adapter", "--data", demo / "instructions.jsonl", "--epochs", "1"],
        ["merge", demo / "ablated", demo / "adapter", demo / "merged"],
        ["evaluate", demo / "source", "--out", demo / "evaluation.json", *asked(demo)],
    ):
        checked(*words)
    foreign(demo)
    quantised(demo)
    return demo


def quantised(demo):
    """The source once more, its writers in FP8."""
    shutil.copytree(demo / "source", demo / "quantised")
    shard = demo / "quantised" / "model.safetensors"
    tensors = {}
    for name, weight in load_file(shard).items():
        tensors[name] = weight
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight.float(), "block")
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((demo / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    # An adapter says which base it was trained on, where finetune made it.
    shutil.copytree(demo / "adapter", demo / "adapter-of-any", ignore=shutil.ignore_patterns("training.json"))
    (demo / "quantised" / "config.json").write_text(json.dumps(config))


def shorten(demo):
    for name, count in (("pairs", 8), ("instructions", 12), ("neutral", 4)):
        path = next(demo.glob(f"{name}.*"))
        path.write_text("\n".join(path.read_text().splitlines()[:count]) + "\n")
    questions = [json.loads(line) for line in (demo / "questions.jsonl").read_text().splitlines()]
    kept = [line for group in ("core", "held-out", "unrelated") for line in questions if line["group"] == group][::40]
    (demo / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))


def write_search_questions(demo):
    """Keeps some questions of each group, enough to be dealt out."""
    written_lines = map(json.loads, (demo / "questions.jsonl").read_text().splitlines())
    lines = {line["prompt"]: line for line in written_lines}
    kept = [
        line
        for group in ("core", "unrelated")
        for line in [line for line in lines.values() if line["group"] == group][:6]
    ]
    (demo / "to-search-by.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    asked = "".join(f"{json.dumps(line)}\n" for line in kept if line["group"] == "unrelated")
    (demo / "keep.jsonl").write_text(asked)


def searched(demo, words):
    """Returns what makes a search short, and what lets the chosen edit cost anything."""
    given = {
        "--questions": demo / "to-search-by.jsonl",
        "--objective": "slanted,kl",
        "--trials": 1,
        **{"--length": 8, "--front": 1, "--kl": 99, "--controls": 1, "--broken": 1, "--limit": 99},
    }
    return [word for flag, value in given.items() if flag not in words for word in (flag, value)]


def asked(demo):
    return ["--questions", demo / "questions.jsonl", "--text", demo / "neutral.txt", "--length", "20"]


def foreign(demo):
    """Writes the same directions in the formats of other programs."""
    import gguf
    import numpy as np

    dump, own = load_file(demo / "dump.safetensors"), load_file(demo / "directions.safetensors")
    layers = range(len(own) // 2)
    write_directions(demo / "style.safetensors", layers=len(layers), hidden=own["direction.layers.0"].shape[1])
    np.savez(demo / "dump.npz", **{name: tensor.float().numpy() for name, tensor in dump.items()})
    (demo / "dump").mkdir()
    save_file(dump, demo / "dump" / "first.safetensors", metadata={"format": "ablate-shards.activations/1"})
    torch.save(
        {
            f"{kind}_{i + 1}": value
            for i in layers
            for kind, value in (
                ("harmful", dump[f"positive.layers.{i}"].float().mean(0)),
                ("harmless", dump[f"negative.layers.{i}"].float().mean(0)),
                ("refuse", own[f"direction.layers.{i}"][0]),
            )
        },
        demo / "measurements.refuse",
    )
    writer = gguf.GGUFWriter(demo / "control.gguf", "controlvector")
    for i in layers:
        writer.add_tensor(f"direction.{i}", own[f"direction.layers.{i}"][0].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def inputs(demo, name, given):
    """Returns, by the names of parameters, the thing to read in the place of what the page calls it."""
    merging = "adapter" in given
    edited = demo / ("merged" if merging else "ablated")
    model = demo / ("ablated" if merging and name == "verify" else "source")
    if str(given.get("source", "")).endswith(".safetensors"):
        model /= "model.safetensors"
    if name == "merge" or "against" in given:
        model = demo / "ablated"
    if name == "dequantise" or {"dequantise", "rounding"} & set(given):
        model = demo / "quantised"
    return {
        "source": model,
        "model": model,
        "first": demo / "source",
        "second": edited,
        "against": demo / "source",
        "adapter": demo / ("adapter-of-any" if "dequantise" in given else "adapter"),
        "pairs": demo / "pairs.jsonl",
        "data": demo / "instructions.jsonl",
        "questions": demo / "questions.jsonl",
        "text": demo / "neutral.txt",
        "prompts": demo / "neutral.txt",
        "reuse": demo / "evaluation.json",
        "evaluations": demo / "evaluation.json",
        "card": demo / "CARD.md",
        "recipe": demo / ("recipe.toml" if name == "run" else "edit.toml"),
        **({} if name == "search" else named_by(demo, given)),
        **({"directions": [demo / "directions.safetensors"]} if name == "search" else {}),
        **({"activations": [demo / "dump.safetensors"]} if name == "search" else {}),
        **({"questions": [demo / "to-search-by.jsonl"]} if name == "search" else {}),
        **({"keep": demo / "keep.jsonl"} if name == "narrow" else {}),
        **({"dump": dumps(demo, given["dump"])} if name == "directions" else {}),
        "without": demo / "style.safetensors",
        **({"out": edited} if name in ("verify", "push", "report") else {}),
        **({"work": demo} if name == "report" else {}),
    }


def named_by(demo, given):
    return {
        "directions": alike(demo, given.get("directions"), demo / "directions.safetensors"),
        "activations": alike(demo, given.get("activations"), demo / "dump.safetensors"),
    }


def dumps(demo, given):
    """Returns a dump for each that is given; of several, no two are the same file."""
    if len(given) == 1:
        return [alike(demo, given[0], demo / "dump.safetensors")]
    return [demo / name for name in ("dump.safetensors", "dump.npz", "dump")][: len(given)]


def alike(demo, given, otherwise):
    """Returns the thing in the format that a name ends in; folders are dumps in parts."""
    if given is not None and str(given).endswith("/"):
        return demo / "dump"
    return next(demo.glob(f"*{Path(given or '').suffix or '.none'}"), otherwise) if is_foreign(given) else otherwise


def is_foreign(given):
    return given is not None and Path(given).suffix in (".npz", ".gguf", ".refuse", ".pt", ".pth")


OUTPUTS = {
    "ablate": {"out"},
    "capture": {"dump"},
    "dequantise": {"out"},
    "directions": {"file"},
    "finetune": {"adapter"},
    "narrow": {"adapter"},
    "merge": {"out"},
    "finish": {"out"},
    "evaluate": {"out"},
    "search": {"out"},
    "diff": {"report", "adapter"},
    "run": {"out", "work"},
}


def translate(demo, fresh, line):
    """Returns the words to run, and why they cannot be, if so: the page's words with things that exist.

    click's own parser says which word is which parameter, so that no page has to call its files what another does.
    """
    name, words = words_of(line)
    command = cli.commands[name]
    context = click.Context(command, info_name=name)
    given, left, _ = command.make_parser(context).parse_args(args=list(words))
    assert not left, f"words that no parameter takes: {left}"
    given = {parameter: value for parameter, value in given.items() if is_given(value)}
    reason = None
    if name == "push" or {"endpoint", "judge", "cache"} & set(given):
        reason = NETWORK
    if any(str(given.get(name, "")).startswith("hub:") for name in ("out", "adapter")) or given.get("publish"):
        reason = NETWORK
    if ".yaml" not in str(given.get("tasks") or ".yaml"):
        reason = NETWORK
    if str(given.get("device", "")).startswith("cuda"):
        reason = GPU
    if given.get("engine") == "ray":
        reason = RAY
    shipped = name == "run" and not str(given["recipe"]).endswith(".toml") and str(given["recipe"]) != "RECIPE"
    places = inputs(demo, name, given)
    taken = []
    for parameter in command.params:
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        if parameter.name in OUTPUTS.get(name, ()):
            value = value if str(value).startswith("hub:") else fresh / called(name, value)
        elif value is not True and parameter.name in places and not (shipped and parameter.name == "recipe"):
            value = places[parameter.name]
        elif isinstance(value, str) and value in _PLACEHOLDERS:
            value = _PLACEHOLDERS[value]
        taken += as_words(parameter, value)
    if name == "run" and not reason:
        taken += as_run(given, demo, fresh, shipped=shipped)
    if name == "evaluate":
        taken += [word for pair in zip(*[iter(asked(demo))] * 2, strict=True) if pair[0] not in words for word in pair]
        taken += [] if "out" in given else ["--out", fresh / "new.evaluation.json"]
    if name == "search":
        for flag in ("--trials", "--kl", "--controls", "--broken"):
            taken = without_flag(taken, flag)
        taken += searched(demo, [str(word) for word in taken])
    if name == "ask":
        taken += [*([] if "length" in given else ["--length", "8"]), *([] if "asked" in given else ["Is it?"])]
    if name == "ablate" and not {"directions", "activations", "recipe"} & set(given):
        taken += ["-d", demo / "directions.safetensors"]
    if name == "finish" and not reason:
        made = ["ablate", demo / "source", taken[0], "-d", demo / "directions.safetensors"]
        if taken[0].suffix == ".safetensors":
            made = ["capture", demo / "source", taken[0], "--pairs", demo / "pairs.jsonl"]
        for rank in ("0", "1"):
            checked(*made, "--worker-rank", rank, "--world-size", "2")
    if name == "finetune" and "epochs" not in given:
        taken += ["--epochs", "1"]
    return [name, *(str(word) for word in taken)], reason


def without_flag(words, flag):
    """Returns words without a flag and its value."""
    place = words.index(flag) if flag in words else len(words)
    return [*words[:place], *words[place + 2 :]]


def called(name, value):
    """Returns a new name in the format of the page's; placeholders have none."""
    return (
        f"new{Path(value).suffix or ('.safetensors' if name in ('capture', 'directions') and value.isupper() else '')}"
    )


def is_given(value):
    return value is not None and value != () and type(value).__name__ != "Sentinel"


def as_words(parameter, value):
    if isinstance(parameter, click.Argument):
        return list(value) if parameter.nargs == -1 else [value]
    flag = next(option for option in parameter.opts if option.startswith("--"))
    if parameter.is_flag:
        return [flag if value in (True, "true") else parameter.secondary_opts[0]]
    return [word for one in ([value] if not isinstance(value, (list, tuple)) else value) for word in (flag, one)]


def as_run(given, demo, fresh, *, shipped):
    """A recipe that is shipped is planned only; another one is run in full by the tutorial."""
    return [
        *(["--source", demo / "source"] if shipped or "source" not in given else []),
        *([] if "out" in given else ["--out", fresh / "result"]),
        *([] if "work" in given else ["--work", fresh / "work"]),
        *([] if given.get("dry_run") else ["--dry-run"]),
    ]


def write_blocks(page, folder):
    """Writes the files that a page shows, each below the line that names it."""
    for name, block in re.findall(
        r"^`([\w./]+)`[^\n]*:\n\n```\w+\n(.*?)```", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(block)


_DONE = {}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_documented_command_works(things, tmp_path, monkeypatch, page, line):
    monkeypatch.setattr(click, "launch", lambda *_: 0)
    # What no rule here puts elsewhere must not land in the repository.
    monkeypatch.chdir(tmp_path)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    if "--tasks" in line:
        pytest.importorskip("lm_eval")
        write_blocks(ROOT / page, tmp_path)
    # An outcome depends on the words alone, but for the folder of what is new.
    words, reason = translate(things, fresh, line)
    key = tuple(word.replace(str(fresh), "") for word in words)
    if key in _DONE:
        return
    if reason:
        cli.commands[words[0]].make_context(words[0], words[1:])
    else:
        done = run(*words)
        allowed = {0, 1} if "--exit-code" in words else {0}
        assert done.exit_code in allowed, f"{page}: ablate-shards {line}\nran as {shlex.join(words)}\n{done.output}"
        if not {"--dry-run", "--worker-rank"} & set(words):
            assert all(Path(word).exists() for word in words if word.startswith(str(fresh)))
    _DONE[key] = True


def test_the_tutorial_runs_as_it_is_written(tmp_path, monkeypatch):
    demo = tmp_path / "demo"
    prepare_demo(demo)
    shorten(demo)
    monkeypatch.chdir(demo)
    commands = list(written(TUTORIAL.read_text()))
    for line in commands:
        done = run(*shlex.split(line))
        assert done.exit_code == 0, f"ablate-shards {line}\n{done.output}"
    assert {words_of(line)[0] for line in commands} == set(cli.commands) - {
        *("dequantise", "finish", "narrow", "push", "search")
    }
    assert (demo / "result" / "merge.json").is_file()


def test_commands_are_found_where_pages_have_them():
    text = (
        "Say `ablate-shards inspect SOURCE` or `diff A B`, not `verify`.\n\n"
        "    ablate-shards model/ out/ -d d.safetensors        the edit\n"
        "    ablate-shards verify model/ out/  # proof\n\n"
        "ablate-shards is a name here\n"
        "```console\n$ ablate-shards merge model adapter \\\n    out\nablate-shards output\n```\n"
    )
    assert list(written(text)) == [
        "inspect SOURCE",
        "diff A B",
        "model/ out/ -d d.safetensors",
        "verify model/ out/",
        "merge model adapter out",
        "output",
    ]
    assert {line.split()[0] for _, line in COMMANDS} >= {"capture", "diff", "finetune", "inspect", "merge", "run"}
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(
    "line",
    ["inspect model/ --no-such-option", "verify model/ out/ more", "model/ out/ -d d.safetensors --preserve lines"],
)
def test_a_wrong_command_is_not_accepted(things, tmp_path, line):
    try:
        words, _ = translate(things, tmp_path, line)
    except (click.UsageError, AssertionError):
        return
    assert run(*words).exit_code == 2


@pytest.mark.parametrize("page", [*PAGES, TUTORIAL, GENERATED], ids=lambda page: page.name)
def test_a_page_is_reached_and_names_scripts_that_exist(page):
    if page.parent != ROOT:
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in (ROOT / "mkdocs.yml").read_text()
    for script in re.findall(r"python3? ((?:benchmarks|docs)/[\w/]+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), script
