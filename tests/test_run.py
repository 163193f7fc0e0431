"""The stages of a recipe: what runs, what is skipped, what a failure leaves."""

import json
from pathlib import Path

import pytest
from command_line import checked

from ablate_shards.cli import cli
from ablate_shards.errors import AblateError, ExecuteError, RecipeError
from ablate_shards.names import STATE_NAME
from ablate_shards.surgery.plan.recipe import read_recipe
from ablate_shards.surgery.run.stages import plan_stages, run_stages, status_of

WHOLE = """
[directions]
pairs = "pairs.jsonl"
position = "mean"
estimator = "svd"
rank = 2

[ablate]
coefficient = 1.0

[lora]
data = "instructions.jsonl"
epochs = 1
targets = ["q", "v"]
gradient-checkpointing = false
scale = 0.5

[evaluate]
questions = "questions.jsonl"
"""


@pytest.fixture
def place(tmp_path):
    for name in ("pairs.jsonl", "instructions.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def planned(place, text=WHOLE):
    (place / "recipe.toml").write_text(text)
    path = place / "recipe.toml"
    return plan_stages(read_recipe(path), path, place / "source", place / "out", place / "work")


class Tool:
    """Stands for the commands: each writes a file that depends on what it reads, and remembers its name."""

    def __init__(self, stages, fails=()):
        self.stages = {(*stage.command, *stage.flags): stage for stage in stages}
        self.fails = fails
        self.called = []

    def __call__(self, words):
        stage = self.stages[tuple(words)]
        self.called.append(stage.name)
        if stage.name in self.fails:
            raise AblateError(f"{stage.name} failed")
        read = [str(sorted(content(path).items())) for path in stage.inputs]
        folder = stage.output.suffix == ""
        target = stage.output / "made" if folder else stage.output
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(" ".join([stage.kind, *read])[:5000] if stage.name != "directions" else "same")


def content(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.name: file.read_text() for file in files}


def go(stages, place, tool, check=lambda stage: None):
    told = []

    def tell(number, stage, status):
        told.append((number, stage.name, status))

    run_stages(stages, place / "work", tool, tell, check)
    return told


def test_each_table_adds_its_stages(place):
    names = [stage.name for stage in planned(place)]
    assert names == [
        "evaluate source",
        "capture",
        "directions",
        "ablate",
        "evaluate ablated",
        "finetune",
        "merge",
        "evaluate result",
    ]
    second = planned(place, '[lora]\ndata = "instructions.jsonl"\n[evaluate]\nquestions = "questions.jsonl"\n')
    assert [stage.name for stage in second] == ["evaluate source", "finetune", "merge", "evaluate result"]
    assert second[1].inputs[0] == second[2].inputs[0] == place / "source"
    alone = planned(place, '[directions]\nactivations = "dump.safetensors"\n')
    assert [stage.name for stage in alone] == ["directions", "ablate"]
    assert alone[-1].output == place / "out"


ADAPTER = """
[directions]
directions = "directions.safetensors"

[ablate]
adapter = true
adapter-rank = 8
"""


def test_the_edit_may_be_an_adapter(place):
    [alone] = planned(place, ADAPTER)
    assert (alone.output, alone.makes_checkpoint) == (place / "out", False)
    assert alone.command[-3:] == ("--adapter", "--adapter-rank", "8")
    source, ablate, merge, evaluate = planned(place, ADAPTER + '[evaluate]\nquestions = "questions.jsonl"\n')
    assert [source.name, ablate.name, merge.name, evaluate.name] == [
        "evaluate source",
        "ablate",
        "merge",
        "evaluate ablated",
    ]
    assert ablate.output == merge.adapter == place / "out"
    assert (merge.model, merge.output, merge.makes_checkpoint) == (place / "source", place / "work" / "ablated", True)
    assert (evaluate.model, evaluate.gated) == (merge.output, "ablate")
    searched = planned(place, ADAPTER + '[search]\nquestions = "questions.jsonl"\n')
    assert "--adapter-rank" in searched[-1].command
    with pytest.raises(RecipeError, match="remove one of the two"):
        planned(place, ADAPTER + '[lora]\ndata = "instructions.jsonl"\n')


def test_a_recipe_makes_an_adapter(tmp_path):
    from raw_checkpoints import write_directions, write_llama

    write_llama(tmp_path / "source")
    write_directions(tmp_path / "directions.safetensors")
    recipe = ADAPTER + 'source-layer = 1\n[source]\nsource = "source"\nout = "out"\n[publish]\nrepo = "me/adapter"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    shown = checked("run", tmp_path / "recipe.toml").output
    assert "an adapter of 6 modules" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "ablate-shards report" not in shown
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert "done before" in checked("run", tmp_path / "recipe.toml").output
    flags = checked("ablate", tmp_path / "source", tmp_path / "again", "--recipe", tmp_path / "recipe.toml", "--quiet")
    assert not flags.output
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (
        tmp_path / "out" / "adapter_config.json"
    ).read_bytes()


def test_keys_become_flags_of_the_command_they_belong_to(place):
    commands = {stage.name: " ".join(stage.command) for stage in planned(place)}
    assert "--position mean" in commands["capture"]
    assert "--estimator" not in commands["capture"]
    assert commands["directions"].endswith("--estimator svd --rank 2")
    assert "--no-gradient-checkpointing" in commands["finetune"]
    assert "--targets q,v" in commands["finetune"]
    assert "--scale" not in commands["finetune"]
    assert commands["merge"].endswith("--scale 0.5")


def test_the_stages_are_the_commands_they_always_were(place):
    """Their names, words and inputs are what a former run is recognised by."""
    source, out, work = place / "source", place / "out", place / "work"
    ablated, adapter, questions = work / "ablated", work / "adapter", place / "questions.jsonl"
    dump, directions = work / "activations.safetensors", work / "directions.safetensors"
    pairs, data, recipe = place / "pairs.jsonl", place / "instructions.jsonl", place / "recipe.toml"
    files = {name: work / f"{name}.evaluation.json" for name in ("source", "ablated", "result")}
    asked = f"--questions {questions}"
    trained = f"--data {data} --epochs 1 --targets q,v --no-gradient-checkpointing"
    reused, resumed, fresh = f"--reuse {files['source']} --overwrite", "--resume --overwrite", "--overwrite"
    expected = [
        ("evaluate source", f"evaluate {source} --out {files['source']} {asked}", fresh, {source, questions}),
        ("capture", f"capture {source} {dump} --pairs {pairs} --position mean", resumed, {source, pairs}),
        ("directions", f"directions {dump} {directions} --estimator svd --rank 2", fresh, {dump}),
        (
            "ablate",
            f"ablate {source} {ablated} --recipe {recipe} --directions {directions}",
            resumed,
            {source, recipe, directions},
        ),
        (
            "evaluate ablated",
            f"evaluate {ablated} --against {source} --out {files['ablated']} {asked}",
            reused,
            {ablated, source, questions},
        ),
        ("finetune", f"finetune {ablated} {adapter} {trained}", resumed, {ablated, data}),
        ("merge", f"merge {ablated} {adapter} {out} --scale 0.5", resumed, {ablated, adapter}),
        (
            "evaluate result",
            f"evaluate {out} --against {source} --out {files['result']} {asked}",
            reused,
            {out, source, questions},
        ),
    ]
    found = [
        (stage.name, " ".join(stage.command), " ".join(stage.flags), set(stage.inputs)) for stage in planned(place)
    ]
    assert found == expected
    assert [stage.gated for stage in planned(place) if stage.kind == "evaluate"] == [None, "ablate", "finetune"]


KINDS = """
[directions]
position = "last"
pairs = ["topic.jsonl", "pairs.jsonl"]
estimator = "svd"
without = ["style.safetensors", "other.gguf"]
"""


def test_each_kind_of_pairs_is_captured_and_all_are_compared(place):
    stages = planned(place, KINDS)
    assert [stage.name for stage in stages] == ["capture topic", "capture pairs", "directions", "ablate"]
    topic, pairs, directions, _ = stages
    work = place / "work"
    assert topic.output == work / "activations-topic.safetensors"
    for stage, name in ((topic, "topic"), (pairs, "pairs")):
        words = ("--position", "last", "--pairs", str(place / f"{name}.jsonl"))
        assert stage.command == ("capture", str(place / "source"), str(stage.output), *words)
        assert stage.inputs == (place / "source", place / f"{name}.jsonl")
    others = [str(place / name) for name in ("style.safetensors", "other.gguf")]
    assert directions.command == (
        *("directions", str(topic.output), str(pairs.output), str(work / "directions.safetensors")),
        *("--estimator", "svd", "--without", others[0], "--without", others[1]),
    )
    assert list(map(str, directions.inputs)) == [str(topic.output), str(pairs.output), *others]


def test_a_changed_kind_of_pairs_is_captured_alone(place):
    for name in ("topic.jsonl", "style.safetensors", "other.gguf"):
        (place / name).write_text("{}\n")
    stages = planned(place, KINDS)
    go(stages, place, Tool(stages))
    (place / "topic.jsonl").write_text('{"new": 1}\n')
    tool = Tool(stages)
    go(stages, place, tool)
    assert tool.called == ["capture topic", "directions"]
    (place / "style.safetensors").write_text("new")
    tool = Tool(stages)
    go(stages, place, tool)
    assert tool.called == ["directions"]


@pytest.mark.parametrize("pairs", ['"pairs.jsonl"', '["pairs.jsonl"]'])
def test_one_file_of_pairs_is_the_stage_it_always_was(place, pairs):
    """Its words and their order are what a former run is recognised by."""
    capture, directions, _ = planned(place, f'[directions]\nposition = "mean"\npairs = {pairs}\nbatch = 4\nrank = 1\n')
    dump, file = str(place / "work" / "activations.safetensors"), str(place / "work" / "directions.safetensors")
    assert capture.name == "capture"
    options = ("--position", "mean", "--pairs", str(place / "pairs.jsonl"), "--batch", "4")
    assert capture.command == ("capture", str(place / "source"), dump, *options)
    assert directions.command == ("directions", dump, file, "--rank", "1")


def test_a_second_run_skips_everything(place):
    stages = planned(place)
    tool = Tool(stages)
    assert {status for *_, status in go(stages, place, tool)} == {"missing"}
    assert tool.called == [stage.name for stage in stages]
    assert {status for *_, status in go(stages, place, tool)} == {"done"}
    assert len(tool.called) == len(stages)


def test_a_changed_input_runs_what_depends_on_it_alone(place):
    stages = planned(place)
    go(stages, place, Tool(stages))
    (place / "instructions.jsonl").write_text('{"new": 1}\n')
    assert [
        stage.name for stage, status in zip(stages, status_of(stages, place / "work"), strict=True) if status != "done"
    ] == [
        "finetune",
        "merge",
        "evaluate result",
    ]
    tool = Tool(stages)
    go(stages, place, tool)
    assert tool.called == ["finetune", "merge", "evaluate result"]


def test_a_stage_whose_output_came_out_the_same_runs_nothing_after_it(place):
    stages = planned(place)
    go(stages, place, Tool(stages))
    (place / "pairs.jsonl").write_text('{"new": 1}\n')
    tool = Tool(stages)
    go(stages, place, tool)
    assert tool.called == ["capture", "directions"]


def test_a_changed_output_is_made_again(place):
    stages = planned(place)
    go(stages, place, Tool(stages))
    (place / "out" / "made").write_text("tampered")
    tool = Tool(stages)
    go(stages, place, tool)
    assert tool.called == ["merge"]


def test_completed_stages_are_kept_when_a_later_one_fails(place):
    stages = planned(place)
    tool = Tool(stages, fails=("finetune",))
    with pytest.raises(AblateError, match="finetune failed"):
        go(stages, place, tool)
    again = Tool(stages)
    go(stages, place, again)
    assert again.called == ["finetune", "merge", "evaluate result"]


def test_a_stage_that_makes_nothing_is_an_error(place):
    stages = planned(place)
    with pytest.raises(ExecuteError, match="evaluate source ended without making it"):
        go(stages, place, lambda _words: None)


def test_a_state_that_cannot_be_read_is_an_error(place):
    stages = planned(place)
    (place / "work").mkdir()
    (place / "work" / STATE_NAME).write_text(json.dumps({"format": "ablate-shards.stages/99"}))
    with pytest.raises(ExecuteError, match=r"stages\.json: expected the stages of a former run"):
        go(stages, place, Tool(stages))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[directions]\nrank = 1\n", "needs pairs, activations or directions"),
        ('[directions]\npairs = "pairs.jsonl"\n[lora]\nrank = 4\n', r"\[lora\] needs data"),
        ('[directions]\npairs = ["a/topic.jsonl", "b/Topic.jsonl"]\n', "two files are called topic"),
        ('[directions]\npairs = ["topic.jsonl", "topic.jsonl"]\n', "pairs: names a file twice"),
        ("[directions]\npairs = []\n", r"pairs: expected a path or a list of paths, found \[\]"),
        ('[directions]\npairs = ["a.jsonl", 1]\n', r"\[directions\] pairs\[1\]: expected a path, found 1"),
        ('[directions]\ndirections = "d.gguf"\nwithout = "o.gguf"\n', "without is about pairs or activations"),
        ("[lora]\nrnak = 4\n", "the nearest known one is 'rank'"),
    ],
)
def test_a_recipe_that_lacks_something_is_one_sentence(place, text, message):
    with pytest.raises(RecipeError, match=message):
        planned(place, text)


@pytest.mark.parametrize(
    ("file", "line", "name"),
    [
        ("pairs.jsonl", {"id": "p1", "positive": {"prompt": "Who is  right?"}, "negative": "b"}, "p1"),
        ("instructions.jsonl", {"prompt": "who is RIGHT", "response": "b"}, "1"),
        ("kept.jsonl", {"id": "k", "prompt": "Who is right?"}, "k"),
    ],
)
def test_a_question_of_the_evaluation_may_not_be_learnt_from(place, file, line, name):
    lines = {
        "pairs.jsonl": {"positive": "a", "negative": "b"},
        "instructions.jsonl": {"prompt": "a", "response": "b"},
        "kept.jsonl": {"prompt": "a"},
        "questions.jsonl": {"id": "q", "prompt": "Who is right?"},
    }
    for each, content in lines.items():
        (place / each).write_text(json.dumps(content) + "\n")
    (place / "source" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    path = place / "recipe.toml"
    path.write_text(WHOLE.replace("epochs = 1", 'keep = "kept.jsonl"'))
    words = ["run", path, "--source", place / "source", "--dry-run"]
    checked(*words)
    (place / file).write_text(json.dumps(line) + "\n")
    result = checked(*words, code=2)
    assert f"{file} holds under {name} what questions.jsonl asks as q" in result.output
    # Without an evaluation nothing is asked.
    path.write_text(path.read_text().partition("[evaluate]")[0])
    checked(*words)


@pytest.mark.parametrize("name", ["tw_civic", "tw_civic_exact"])
def test_the_shipped_recipes_name_files_that_are_shipped(place, name):
    path = Path(cli.commands["run"].callback.__code__.co_filename).parents[1] / "data" / "recipes" / f"{name}.toml"
    recipe = read_recipe(path)
    stages = plan_stages(recipe, path, place / "source", place / "out", place / "work")
    assert len(stages) == 8
    read = {file for stage in stages for file in stage.inputs if file.suffix in (".jsonl", ".txt", ".toml")}
    assert len(read) == (6 if name == "tw_civic_exact" else 5)
    assert all(file.is_file() for file in read)
    assert recipe.tables["source"]["source"] == "huihui-ai/Huihui-Qwen3.5-0.8B-abliterated"


def test_an_unknown_recipe_names_the_shipped_ones():
    result = checked("run", "nothing", code=2)
    assert "tw_civic, tw_civic_exact" in result.output


@pytest.mark.parametrize(
    ("table", "adapter"),
    [
        ('[directions]\nactivations = "dump.safetensors"\n', None),
        ('[lora]\ndata = "instructions.jsonl"\n', "out.work/adapter"),
    ],
)
def test_a_result_is_published_with_what_it_was_made_of(place, monkeypatch, table, adapter):
    published = {}
    monkeypatch.setattr(cli.commands["push"], "callback", lambda **given: published.update(given))
    monkeypatch.setattr("ablate_shards.surgery.run.stages.run_stages", lambda *_: None)
    (place / "source" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    recipe = place / "recipe.toml"
    recipe.write_text(
        f'[source]\nsource = "source"\nout = "out"\n{table}[publish]\nrepo = "me/model"\nprivate = true\n'
    )
    cli.main(["run", str(recipe), "--push"], standalone_mode=False)
    assert (published["out"], published["repo"], published["private"]) == (place / "out", "me/model", True)
    assert str(published["source"]) == str(place / "source")
    assert published["adapter"] == (adapter and place / adapter)


def test_a_report_beside_the_result_changes_nothing(place):
    stages = planned(place)
    go(stages, place, Tool(stages))
    (place / "out" / "plots").mkdir()
    (place / "out" / "plots" / "norms.svg").write_text("<svg/>")
    (place / "out" / "report.html").write_text("<html/>")
    assert set(status_of(stages, place / "work")) == {"done"}
