"""The report: what it says, that it says what is missing, that nothing in it runs but its own scripts."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from command_line import checked
from page_checks import Page
from raw_checkpoints import write_directions, write_dump, write_llama
from report_runs import HOSTILE, evaluation, make_ablated, make_run
from safetensors.numpy import load_file, save_file

from ablate_shards.errors import EvaluateError, ReportError
from ablate_shards.surgery.directions.activations import open_activations
from ablate_shards.surgery.evaluate.evaluation_file import write_evaluation
from ablate_shards.surgery.plan.recipe import read_recipe
from ablate_shards.surgery.report import plots
from ablate_shards.surgery.report.charts import chart_data
from ablate_shards.surgery.report.document import report
from ablate_shards.surgery.report.findings import Findings, ReportOptions, find_work, gather
from ablate_shards.surgery.report.page import render
from ablate_shards.surgery.report.projection import project_into_plane
from ablate_shards.surgery.report.provenance import rebuilt_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(whole, tmp_path):
    """A copy of a whole run, to be changed."""
    shutil.copytree(whole.parent, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("ablate_shards.surgery.report.document.draw_charts", lambda _: {})


def page_of(out, **options):
    found = gather(out, ReportOptions(**options))
    return Page(render(found, chart_data(found)))


# ---------------------------------------------------------------------------------------- a whole run


def test_the_page_says_what_was_done_and_what_it_did(whole):
    found = gather(whole, ReportOptions())
    assert found.missing == {}
    text = page_of(whole).text
    for words in (
        "Slanted answers fell: 58 % → 8 % of 24, p = 0.00049; 92 % are now neutral (42 % before)",
        "was taken out of 6 tensors in layers 1",
        "a LoRA adapter then changed 8 tensors",
        "0.02 nats per token on unrelated answers",
        "18 of 20 controls are answered right, 20 before",
        "Perplexity of neutral.txt",
        "Slanted text 1.",
        "Neutral text 3.",
        "model.layers.3.mlp.down_proj.weight",
    ):
        assert words in text


def test_whose_claims_and_what_decided_are_said(whole):
    text = page_of(whole).text
    for words in (
        "source 88 %: 81 % to the PRC's claims, 6 % to Taiwan's independence; ablated 25",
        "slanted to Taiwan's independence",
        "states as fact: “Slanted text 1”",
        "tells: “text 20”",
    ):
        assert words in text
    (core,) = (
        row
        for row in chart_data(gather(whole, ReportOptions()))["verdicts"]
        if row["stage"] == "result" and row["group"] == "core"
    )
    assert core["whose"] == "6\u202f% to the PRC's claims, 6\u202f% to Taiwan's independence"
    assert {"broken", "unclear"} < core.keys()


def test_lean_and_tasks_are_tables_where_they_were_measured(whole):
    text = page_of(whole).text
    assert re.search(r"the PRC's claims ?24 ?−0\.69 ?\+0\.31 ?\+0\.51 ?\+1\.20 ?\+1\.20 to \+1\.20 ?< 0\.0001", text)
    assert re.search(r"colours, acc ?20 ?1\.000 ?0\.950 ?0\.900 ?−0\.100 ?−0\.250 to 0\.000 ?0\.500", text)
    base = evaluation("source", 14, 20, measured=False)
    bare = Findings(name="result", evaluations=(base, evaluation("result", 2, 20, base, measured=False)))
    text = Page(render(bare, chart_data(bare))).text
    for words in ("Lean", "Tasks", "lm-evaluation-harness", "How it answers", "Broken answers"):
        assert words not in text
    assert "No answer is broken or cut off" in text


def test_one_evaluation_alone_has_lean_and_tasks_without_a_difference():
    alone = Findings(name="result", evaluations=(evaluation("result", 2, 18),))
    text = Page(render(alone, chart_data(alone))).text
    assert re.search(r"the PRC's claims, held-out ?8 ?\+0\.31 ?Taiwan", text)
    assert "Difference" not in text


def test_a_wrecked_model_does_not_look_like_success():
    base = evaluation("source", 14, 20)
    found = Findings(name="result", evaluations=(base, evaluation("result", 2, 18, base, broken=True)))
    page = render(found, chart_data(found))
    text = Page(page).text
    assert re.search(
        r'<p class="lead broken">The edit broke the model: 75 % of its answers are broken \(0 % before\)', page
    )
    assert "What it says of slant therefore means nothing." in text
    # "Slanted 0 %" never stands alone: what it became of stands beside it.
    assert page.index("Bias ratio: slanted answers") < page.index("Broken answers") < page.index("Neutral answers")
    assert "33 of 44, before 0 of 44" in text
    for words in ("How it answers", "loops: “of of of of”", "cut off", "detached"):
        assert words in text
    options = re.search(r'<select id="by-after">(.*?)</select>', page)[1]
    assert re.findall(r"<option>(\w+)</option>", options)[:6] == [
        "slanted",
        "neutral",
        "deflecting",
        "wrong",
        "broken",
        "unclear",
    ]
    # Broken answers to controls are found as such too.
    assert page.count('data-after="broken"') == 33
    good = Findings(name="result", evaluations=(base, evaluation("result", 2, 18, base)))
    assert "lead broken" not in render(good, chart_data(good))


def test_the_static_charts_of_a_wrecked_model_show_what_is_broken():
    pytest.importorskip("matplotlib")
    base = evaluation("source", 14, 20)
    drawn = {}
    for broken in (False, True):
        found = Findings(name="result", evaluations=(base, evaluation("result", 2, 18, base, broken=broken)))
        drawn[broken] = plots.draw_charts(chart_data(found))
    said = [
        re.findall(r"<!-- (\w+) -->", drawn[broken]["bias.svg"].decode()).count("broken") for broken in (False, True)
    ]
    assert said == [0, 2]
    assert "url(#h" in drawn[True]["verdicts.svg"].decode()
    assert all(f"<!-- {verdict} -->" in drawn[True]["verdicts.svg"].decode() for verdict in ("broken", "unclear"))


def test_evaluations_that_cannot_be_compared_are_still_shown():
    base, after = evaluation("source", 14, 20), evaluation("result", 2, 18)
    other = replace(after, tasks=(replace(after.tasks[0], documents="f" * 64),))
    found = Findings(name="result", evaluations=(base, other))
    text = Page(render(found, chart_data(found))).text
    assert "Of 24 answers to contested questions 92 % are neutral" in text
    assert re.search(r"colours, acc ?20 ?1\.000 ?0\.900", text)


def test_the_charts_show_what_the_receipts_say(whole):
    found = gather(whole, ReportOptions())
    data = chart_data(found)
    receipt = json.loads((whole.parent / "result.work" / "ablated" / "ablation.json").read_text())
    (tensor,) = (each for each in receipt["tensors"] if each["name"] == "model.layers.2.mlp.down_proj.weight")
    (cell,) = (each for each in data["edits"] if (each["layer"], each["component"]) == (2, "mlp"))
    assert cell["names"] == "mlp.down_proj"
    assert cell["before"] == pytest.approx(tensor["before"], rel=1e-3)
    assert cell["after"] == pytest.approx(tensor["after"], rel=1e-3)
    assert cell["after"] < cell["before"] / 4
    assert data["best"] == tensor["source_layer"]
    assert [row["layer"] for row in data["quality"]] == [0, 1, 2, 3]
    assert np.diag(data["cosines"]["values"]) == pytest.approx(np.ones(4), abs=1e-3)
    assert {row["name"] for row in data["updates"]} == {"self_attn.q_proj", "mlp.down_proj"}
    core = [row for row in data["verdicts"] if row["group"] == "core"]
    assert [(row["stage"], row["slanted"]) for row in core] == [
        ("source", [14, 16]),
        ("ablated", [4, 16]),
        ("result", [2, 16]),
    ]
    assert len(data["losses"]["steps"]) == 8


def test_the_same_run_gives_the_same_bytes(whole, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    made = []
    for name in ("here", "moved"):
        shutil.copytree(whole.parent, tmp_path / name)
        made.append(report(tmp_path / name / "result"))
        # Drawing takes seconds; two of the charts are enough to see that they do not change.
        monkeypatch.setattr(plots, "_CHARTS", {key: plots._CHARTS[key] for key in ("edits", "losses")})
    first, again = ({path.name: path.read_bytes() for path in (each.page, *each.plots)} for each in made)
    assert len(first) == 19
    assert len(again) == 5
    assert all(first[name] == content for name, content in again.items())
    assert all(content.startswith(b"\x89PNG") for name, content in first.items() if name.endswith(".png"))
    assert str(tmp_path).encode() not in b"".join(first.values())
    assert len(first["report.html"]) < 700_000


def test_the_recipe_can_be_run(whole, tmp_path):
    (tmp_path / "recipe.toml").write_text(rebuilt_recipe(gather(whole, ReportOptions())))
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert recipe.tables["ablate"]["layers"] == "1-3"
    assert recipe.tables["ablate"]["coefficient"] == 1.0
    assert recipe.tables["lora"]["learning-rate"] == 2e-4
    assert recipe.tables["evaluate"]["text"] == str(tmp_path / "neutral.txt")


def test_overrides_and_targets_are_in_the_recipe(place, tmp_path):
    found = gather(place / "result", ReportOptions())
    target = {"pattern": 'x\\.(?P<layer>\\d+)"', "component": "mlp", "axis": "out", "gain": None}
    found.ablation.content["recipe"]["override"] = [{"layers": [1, 2], "source_layer": 3, "coefficient": 2.0}]
    found.ablation.content["recipe"]["target"] = [target]
    (tmp_path / "recipe.toml").write_text(rebuilt_recipe(found))
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert (recipe.overrides[0].layers, recipe.overrides[0].source_layer) == (frozenset({1, 2}), 3)
    assert recipe.targets[0].pattern == target["pattern"]


# ---------------------------------------------------------------------------------------- safe, and small


def test_answers_are_text_and_nothing_else(whole):
    found = gather(whole, ReportOptions())
    text = render(found, chart_data(found))
    page = Page(text)
    assert HOSTILE not in text
    assert HOSTILE in page.texts
    assert [kind for kind, _ in page.scripts] == ["application/json", "", ""]
    assert page.handlers == []
    assert "<img" not in text


def test_names_of_tensors_and_models_are_text_too(place):
    path = place / "result.work" / "result.evaluation.json"
    content = json.loads(path.read_text())
    content["model"]["name"] = HOSTILE
    path.write_text(json.dumps(content))
    page = page_of(place / "result", evaluations=(path,))
    assert [kind for kind, _ in page.scripts] == ["application/json", "", ""]
    assert json.loads(page.scripts[0][1])["verdicts"][-1]["stage"] == HOSTILE
    assert "<" not in page.scripts[0][1]


def test_the_policy_lets_nothing_in_and_only_its_own_scripts_run(whole):
    page = page_of(whole)
    assert page.policy.startswith("default-src 'none';")
    for kind, script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert (f"'sha256-{digest}'" in page.policy) == (kind == "")
    assert all(link.startswith("#") or link == "data:," for link in page.links)


def test_many_long_answers_stay_small_and_it_says_so():
    base = evaluation("source", 14, 20)
    many = tuple(
        replace(answer, id=f"{answer.id}-{copy}", text="&" * 9_000) for copy in range(60) for answer in base.answers
    )
    big = replace(base, answers=many)
    after = replace(big, model=replace(big.model, name="result"))
    found = Findings(name="result", evaluations=(big, after))
    page = render(found, chart_data(found))
    assert len(page.encode()) < 3_000_000
    assert re.search(r"keeps to the first \d+; all 2640 are in", page)
    assert "Long answers are cut" in page


# ---------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("lost", "parts"),
    [
        ("result.work/directions.safetensors", set()),
        ("result.work/activations.safetensors", {"projection"}),
        ("result.work/[ad]*ions.safetensors", {"directions", "projection"}),
        ("result.work/ablated/ablation.json", {"ablation"}),
        ("result.work/adapter/training.json", {"training"}),
        ("result.work/*.evaluation.json", {"evaluation"}),
        ("result.work", {"ablation", "directions", "projection", "training", "evaluation"}),
    ],
)
def test_what_is_not_there_is_said(place, undrawn, lost, parts):
    for path in list(place.glob(lost)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    made = report(place / "result")
    assert dict(made.missing).keys() == parts
    text = Page(made.page.read_text()).text
    for _, reason in made.missing:
        assert " ".join(reason.split()) in text
        assert str(place) not in reason


@pytest.mark.parametrize("name", ["result/merge.json", "result.work/ablated/ablation.json"])
def test_a_receipt_of_a_newer_version_is_said(place, undrawn, name):
    path = place / name
    path.write_text(path.read_text().replace('/1"', '/2"', 1))
    made = report(place / "result")
    # Of several ablations in the work folder, only the one that the merge names by its digest counts.
    expected = "/2" if path.stem == "merge" else "was not found"
    assert expected in dict(made.missing)[path.stem]
    assert "It lacks the stage whose receipt could not be read" in Page(made.page.read_text()).text
    (place / "alone").mkdir()
    assert "It lacks" not in page_of(make_ablated(place / "alone")).text
    assert "Slanted text 1." in Page(made.page.read_text()).text


def test_without_a_receipt_that_can_be_read_there_is_no_recipe(tmp_path):
    out = make_ablated(tmp_path)
    (out / "ablation.json").write_text((out / "ablation.json").read_text().replace('/1"', '/2"', 1))
    assert "no recipe can be rebuilt" in page_of(out).text


@pytest.mark.parametrize("name", ["training.json", "result.evaluation.json", "activations.safetensors"])
def test_a_broken_file_is_said_and_the_rest_is_shown(place, undrawn, name):
    (path,) = place.glob(f"**/{name}")
    path.write_text('{"format": 3}')
    made = report(place / "result")
    (reason,) = dict(made.missing).values()
    text = Page(made.page.read_text()).text
    assert name in reason
    assert "Slanted text 1." in text
    # The evaluation before it takes its place, and it is said whose answers these are.
    assert ("Slanted answers fell: 58 % → 8 % of 24" in text) == (name != "result.evaluation.json")
    assert ("what is shown is of ablated" in reason) == (name == "result.evaluation.json")


def test_a_folder_without_a_receipt_is_one_sentence(tmp_path):
    (tmp_path / "model").mkdir()
    result = checked("report", tmp_path / "model", code=1)
    assert result.output.count("\n") == 1
    assert "holds no ablation.json and no merge.json" in result.output
    assert list((tmp_path / "model").iterdir()) == []


def test_what_is_named_must_be_there(place):
    with pytest.raises(ReportError, match="no such folder"):
        gather(place / "result", ReportOptions(work=place / "elsewhere"))
    with pytest.raises(EvaluateError, match=r"nothing\.json"):
        gather(place / "result", ReportOptions(evaluations=(place / "nothing.json",)))


# ---------------------------------------------------------------------------------------- what belongs together


def test_an_ablation_alone_finds_its_directions_beside_it(tmp_path):
    out = make_ablated(tmp_path)
    found = gather(out, ReportOptions())
    assert found.directions is not None
    assert len(found.projections) == 4
    assert found.missing.keys() == {"evaluation"}
    assert "A LoRA adapter" not in page_of(out).text


def test_directions_that_were_not_removed_are_not_shown(tmp_path):
    out = make_ablated(tmp_path)
    write_directions(tmp_path / "directions.safetensors", layers=4, seed=9)
    assert gather(out, ReportOptions()).directions is not None, "computed again from the activations"
    write_dump(tmp_path / "activations.safetensors", layers=4, seed=9)
    assert gather(out, ReportOptions()).directions is None


def test_of_several_kinds_of_pairs_the_dump_of_what_was_removed_is_shown(tmp_path):
    work = tmp_path / "result.work"
    work.mkdir()
    write_llama(tmp_path / "source", layers=4)
    other = write_directions(tmp_path / "other.safetensors", layers=4, seed=5)
    dumps = [work / f"activations-{name}.safetensors" for name in ("answer", "topic")]
    for seed, path in enumerate(dumps):
        arrays = load_file(write_dump(path, layers=4, seed=seed))
        save_file(arrays, path, {"format": "ablate-shards.activations/1", "inputs": path.stem})
    checked("directions", *dumps, work / "directions.safetensors", "--without", other, "--quiet")
    checked(tmp_path / "source", tmp_path / "result", "-d", work / "directions.safetensors", "--quiet")
    found = gather(tmp_path / "result", ReportOptions(work=work))
    removed = found.directions.metadata["inputs"]
    assert len(found.projections) == 4
    assert removed == found.directions.metadata["dump"]
    (work / f"{removed}.safetensors").unlink()
    assert "projection" in gather(tmp_path / "result", ReportOptions(work=work)).missing
    (tmp_path / "recipe.toml").write_text(rebuilt_recipe(found))
    assert read_recipe(tmp_path / "recipe.toml").tables["directions"]["without"] == (str(other),)


def test_the_work_folder_is_known_by_what_it_made(place):
    (place / "result.work").rename(place / "other")
    assert find_work(place / "result") is None
    digest = hashlib.sha256((place / "result" / "merge.json").read_bytes()).hexdigest()
    (place / "other" / "stages.json").write_text(json.dumps({"digests": {"gone/merge.json": [1, 2, digest]}}))
    assert find_work(place / "result") == place / "other"
    assert gather(place / "result", ReportOptions()).missing == {}
    (place / "other" / "stages.json").write_text(json.dumps({"digests": {"gone/merge.json": [1, 2, "0" * 64]}}))
    assert find_work(place / "result") is None


def test_evaluations_are_shown_in_the_order_given(place):
    work = place / "result.work"
    named = (work / "source.evaluation.json", work / "ablated.evaluation.json")
    found = gather(place / "result", ReportOptions(evaluations=named))
    assert found.stages == ("source", "ablated")
    assert "Slanted answers fell: 58 % → 17 % of 24" in page_of(place / "result", evaluations=named).text


def test_one_evaluation_is_after_and_two_of_one_name_are_told_apart(place):
    alone, same = place / "alone.json", place / "same.json"
    write_evaluation(evaluation("model", 3, 20), alone)
    text = page_of(place / "result", evaluations=(alone,)).text
    assert "Of 24 answers to contested questions 88 % are neutral and 12 % slanted" in text
    other = evaluation("model", 5, 20)
    write_evaluation(replace(other, model=replace(other.model, sha256="c" * 64)), same)
    found = gather(place / "result", ReportOptions(evaluations=(same, alone)))
    assert found.stages == ("model (1)", "model (2)")
    assert len({row["stage"] for row in chart_data(found)["verdicts"]}) == 2


def test_answers_to_other_questions_are_not_compared(place):
    other = place / "other.json"
    write_evaluation(evaluation("ablated", 9, 20, questions="z" * 64), other)
    work = place / "result.work"
    found = gather(place / "result", ReportOptions(evaluations=(other, work / "result.evaluation.json")))
    assert found.stages == ("source", "result")


# ---------------------------------------------------------------------------------------- projection and files


def test_the_projection_is_the_direction_and_what_spreads_most_beside_it(tmp_path):
    path = write_dump(tmp_path / "dump.safetensors", layers=1, hidden=32, prompts=40)
    dump = open_activations(path)
    rows = np.concatenate([next(dump.chunks(0, label)).copy() for label in ("positive", "negative")])
    rows -= rows.mean(axis=0)
    axis = rows[:40].mean(axis=0) / np.linalg.norm(rows[:40].mean(axis=0))
    (found,) = project_into_plane(dump, {0: axis[None]})
    plane = np.concatenate([found.positive, found.negative])
    assert plane[:, 0] == pytest.approx(rows @ axis)
    rest = rows - np.outer(rows @ axis, axis)
    _, values, right = np.linalg.svd(rest)
    assert np.abs(plane[:, 1]) == pytest.approx(np.abs(rest @ right[0]))
    assert found.share == pytest.approx(values[0] ** 2 / (values**2).sum())
    assert plane[:40, 0].min() > plane[40:, 0].max() - 6


def test_many_prompts_are_thinned_evenly(tmp_path):
    dump = open_activations(write_dump(tmp_path / "dump.safetensors", layers=1, prompts=1000))
    (found,) = project_into_plane(dump, {0: np.eye(1, 32)})
    assert found.positive.shape == found.negative.shape == (300, 2)


def test_charts_with_nothing_to_show_are_removed(place, monkeypatch):
    monkeypatch.setattr("ablate_shards.surgery.report.document.draw_charts", lambda _: {"losses.svg": b"new"})
    folder = place / "result" / "plots"
    folder.mkdir()
    for name in ("losses.svg", "verdicts.svg", "mine.svg"):
        (folder / name).write_bytes(b"old")
    made = report(place / "result")
    assert [path.name for path in made.plots] == ["losses.svg"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"losses.svg": b"new", "mine.svg": b"old"}


def test_without_matplotlib_the_page_is_made(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = checked("report", place / "result", "--json")
    made = json.loads(result.stdout)
    assert made["plots"] == []
    assert "ablate-shards[report]" in made["missing"]["plots"]
    assert not (place / "result" / "plots").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(place, undrawn, monkeypatch):
    page = report(place / "result").page
    page.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ablate_shards.surgery.machine.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        report(place / "result")
    assert page.read_text() == "old"
    assert not list((place / "result").glob(".*"))


def test_the_command_opens_the_page(place, undrawn, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    result = checked("report", place / "result", "--open", "--quiet")
    assert result.output == ""
    assert opened == [(place / "result" / "report.html").as_uri()]
