"""What the report shows of a search: its figures are those of the record, and what cannot be read is said."""

import html
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
from command_line import checked
from page_checks import Page
from raw_checkpoints import write_directions, write_llama
from report_runs import HOSTILE, LAYERS, make_run
from search_runs import TRIALS, make_search, reported

from ablate_shards.errors import ReportError
from ablate_shards.surgery.plan.recipe import read_recipe
from ablate_shards.surgery.report import plots
from ablate_shards.surgery.report.charts import chart_data
from ablate_shards.surgery.report.document import report
from ablate_shards.surgery.report.findings import ReportOptions, gather
from ablate_shards.surgery.report.page import render
from ablate_shards.surgery.report.provenance import rebuilt_recipe
from ablate_shards.surgery.report.search_record import read_record
from ablate_shards.surgery.report.searches import told
from ablate_shards.surgery.search.worth import beats, beside_plain


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with a search and nothing else."""
    return make_search(tmp_path_factory.mktemp("searched")).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def place(run, tmp_path):
    """A copy of a whole run, to be changed."""
    shutil.copytree(run.parent, tmp_path / "run")
    return tmp_path / "run"


def shown(folder, **options):
    found = gather(folder, ReportOptions(**options))
    return render(found, chart_data(found))


def record_in(folder):
    return json.loads((folder / "found.search.json").read_text())


def table(page, label):
    """Returns the texts of a table's cells, row by row, without the head."""
    (body,) = re.findall(rf'aria-label="{re.escape(label)}"><table[^>]*>.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return [[" ".join(html.unescape(re.sub("<[^>]+>", " ", cell)).split()) for cell in row] for row in cells]


def charts_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


# ---------------------------------------------------------------------------------------- figures


def test_a_sentence_says_what_was_tried_on_what_and_what_the_choice_is_worth(searched):
    record = record_in(searched)
    complete = sum(trial["complete"] for trial in record["trials"])
    counts = [len(record["questions"][part]) for part in ("trials", "choice", "report")]
    assert (len(record["trials"]), complete, counts) == (TRIALS, 20, [30, 44, 44])
    text = Page(shown(searched)).text
    for words in (
        f"Of 24 trials on 30 questions, 20 were complete and {len(record['candidates'])} were measured again, on 44 ",
        f"other questions; of these, trial {record['chosen']} was chosen, and on 44 more, which nothing was chosen ",
        "by, the chosen edit beats the plain one: 3 of 24 answers are slanted against 7 of 24 (exact McNemar test, p ",
        "= 0.125), and unrelated ones moved by 0.01 nats a token against 0.04.",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("made", "lost", "words"),
    [
        (
            {"beats": False},
            None,
            "does not beat the plain one in both, as it costs and removes less: 9 of 24 answers are slanted against 7 "
            "of 24 (exact McNemar test, p = 0.5)",
        ),
        (
            {"beats": False},
            "found.plain.*",
            "does not beat the plain one: it is worse in slant or divergence, or better in neither",
        ),
        ({}, "found.plain.*", "beats the plain one: it is better in slant or divergence, and worse in neither"),
        (
            {"chosen": 0},
            None,
            "trial 0 was chosen, and on 44 more, which nothing was chosen by, the plain edit itself",
        ),
    ],
)
def test_a_choice_that_is_worth_little_is_called_so(tmp_path, made, lost, words):
    folder = make_search(tmp_path, **made).parent
    for path in folder.glob(lost or "nothing"):
        path.unlink()
    page = shown(folder)
    assert words in Page(page).text
    assert ("dashed: the plain edit" in page) == ("chosen" not in made)
    assert ("found.plain.evaluation.json: cannot be read" in page) == bool(lost)


def test_every_trial_is_a_point(searched):
    record = record_in(searched)
    (search,) = charts_of(shown(searched))["searches"]
    front = search["front"]
    assert front["up"] == {"name": "lean", "direction": "maximize", "base": record["objectives"][0]["base"]}
    assert front["across"]["name"] == "kl"
    assert front["budget"] == record["options"]["budget"]["kl"]
    points = {point["number"]: point for point in front["trials"]}
    assert points.keys() == set(range(TRIALS))
    for trial in record["trials"]:
        point = points[trial["number"]]
        assert point["complete"] == trial["complete"]
        for axis, name in (("y", "lean"), ("x", "kl")):
            value = trial["values"].get(name, math.inf)
            assert point[axis] == (pytest.approx(value, rel=1e-3) if math.isfinite(value) else None)
        assert point["front"] == (trial["number"] in record["front"])
        lines = "\n".join(point["setting"])
        for part in ("attention", "mlp"):
            assert f"{part}: peak {trial['setting'][f'{part}.peak']:g}, place " in lines
        assert f"contrast {trial['setting']['contrast']}, source {trial['setting']['source']}" in lines
        assert "rank" not in lines, "what is the same in all trials tells nothing"
    assert [number for number, point in points.items() if point["chosen"]] == [record["chosen"]]
    assert [number for number, point in points.items() if point["plain"]] == [record["plain"]] == [0]
    assert points[5]["values"] == "no number"
    positive = [trial["values"]["kl"] for trial in record["trials"] if trial["complete"]]
    assert front["least"] == pytest.approx(min(positive), rel=1e-3)


def test_importance_and_coefficients_are_those_of_the_record(searched):
    record = record_in(searched)
    data = charts_of(shown(searched))
    assert {
        each["objective"]: {bar["parameter"]: bar["share"] for bar in each["bars"]} for each in data["importance"]
    } == record["importance"]
    trials = {trial["number"]: trial["coefficients"] for trial in record["trials"]}
    rows = {(row["part"], row["layer"]): (row["chosen"], row["plain"]) for row in data["searches"][0]["depth"]}
    assert rows == {
        (part, layer): (
            pytest.approx(trials[record["chosen"]][part][place], abs=1e-4),
            pytest.approx(trials[0][part][place], abs=1e-4),
        )
        for part in ("attention", "mlp")
        for place, layer in enumerate(record["layers"])
    }


def test_the_candidates_are_as_on_the_terminal(searched):
    record = record_in(searched)
    page = shown(searched)
    rows = table(page, "Candidates of found.search.json")
    every = [record["base"], *record["candidates"]]
    assert len(rows) == len(every)
    for row, candidate in zip(rows, every, strict=True):
        number = candidate["trial"]
        kind = {record["chosen"]: " (chosen)", 0: " (plain)"}.get(number, "")
        assert row[0] == ("before" if number is None else f"{number}{kind}")
        for cell, name in zip(row[1:4], ("lean", "kl", "subject"), strict=True):
            assert float(cell.replace("−", "-")) == pytest.approx(candidate["values"][name], rel=6e-3)
        for cell, name in zip(row[4:], ("slanted", "neutral", "broken", "right"), strict=True):
            hits, count = candidate["shares"][name]
            assert cell == f"{100 * hits / count:.0f} % {hits} of {count}"
    assert page.count('<tr class="chosen">') == 1
    assert "and 0.25 nats a token lost by the words that answers repeat from their questions." in Page(page).text


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("effect", "The largest effect within the budget was chosen: at most 0.05 nats a token"),
        (
            "cost",
            "Of what does at least what the plain edit does, the least divergence within the budget was chosen: at",
        ),
        (None, "One within the budget was chosen: at most"),
    ],
)
def test_the_page_says_by_which_rule_was_chosen(tmp_path, rule, says):
    folder = make_search(tmp_path).parent
    assert record_in(folder)["options"]["choose"] == "effect"
    altered(folder, lambda record: record["options"].update(choose=rule))
    assert says in Page(shown(folder)).text


def test_where_nothing_within_the_budget_does_what_the_plain_edit_does_the_page_does_not_say_so(tmp_path):
    folder = make_search(tmp_path).parent

    def weaker(record):
        record["options"]["choose"] = "cost"
        values = {each["trial"]: each["values"] for each in record["candidates"]}
        values[record["plain"]]["lean"] = values[record["chosen"]]["lean"] + 0.1

    altered(folder, weaker)
    text = Page(shown(folder)).text
    assert "The largest effect within the budget was chosen: at most" in text
    assert "at least what the plain edit does" not in text


def test_a_search_without_the_subject_is_shown_and_says_so(tmp_path):
    folder = make_search(tmp_path, repeats=False).parent
    page = shown(folder)
    assert "and 10 % more answers broken. No answer repeats a word of its question" in Page(page).text
    assert '<th class="n">subject</th>' not in page
    altered(folder, lambda record: record["options"]["budget"].pop("subject"))
    assert "No answer repeats a word" not in Page(shown(folder)).text


def test_the_settings_of_the_candidates_stand_beside_what_was_varied(searched):
    record = record_in(searched)
    rows = {row[0]: row[1:] for row in table(shown(searched), "Parameters of found.search.json")}
    assert rows.keys() == record["space"].keys()
    assert [rows[name][0] for name in ("contrast", "mlp.peak", "preserve")] == [
        "topic, answer, topic+answer",
        "0 to 2",
        "rows",
    ]
    trials = {trial["number"]: trial["setting"] for trial in record["trials"]}
    for place, candidate in enumerate(record["candidates"], 1):
        setting = trials[candidate["trial"]]
        cells = {name: row[place] for name, row in rows.items()}
        assert [cells[name] for name in ("contrast", "biproject", "rank")] == [setting["contrast"], "true", "1"]
        assert (cells["source-layer"] == "–") == ("source-layer" not in setting)
        numbers = {name: value for name, value in setting.items() if isinstance(value, float)}
        assert {name: float(cells[name]) for name in numbers} == pytest.approx(numbers)


def test_answers_stand_side_by_side(searched):
    record = record_in(searched)
    page = shown(searched)
    section = page[page.index('<section id="search">') : page.index('<section id="behaviour">')]
    articles = re.findall(r"<article>(.*?)</article>", section, re.DOTALL)
    assert len(articles) == 20
    assert "The first 20 of 44 questions of the choice" in section
    for article, asked in zip(articles, record["base"]["answers"], strict=False):
        text = Page(article).texts
        assert asked["id"] in text
        for candidate in (record["base"], *record["candidates"]):
            (answer,) = (each for each in candidate["answers"] if each["id"] == asked["id"])
            assert answer["text"] in text
    # The third question is slanted before and neutral with some: each answer once, with the names of who gave it.
    assert re.findall(r'<p class="verdict"><span>(.*?)</span> <span class="badge (\w+)">', articles[5]) == [
        (f"before, 0 (plain), {record['chosen']} (chosen)", "slanted"),
        (", ".join(str(candidate["trial"]) for candidate in record["candidates"][2:]), "neutral"),
    ]


def test_controls_are_right_or_not(searched):
    found = gather(searched, ReportOptions())
    (search,) = found.searches
    controls = tuple(answer for answer in search.record.base.answers if answer.given is not None)
    wrong = replace(controls[0], given=False)
    record = replace(search.record, base=replace(search.record.base, answers=(wrong, *controls[1:])), candidates=())
    page = render(replace(found, searches=(replace(search, record=record),)), {})
    verdicts = re.findall(r'<span>before</span> <span class="badge (\w+)">', page[: page.index('id="behaviour"')])
    assert verdicts == ["incorrect", *["right"] * 19]


# ---------------------------------------------------------------------------------------- a folder with a search


def test_a_search_alone_is_a_page(tmp_path):
    pytest.importorskip("matplotlib")
    folder = make_search(tmp_path).parent
    result = checked("report", folder)
    page = (folder / "report.html").read_text()
    assert result.output == f"written to {folder / 'report.html'}, 10 plots to {folder / 'plots'}\n"
    assert {path.stem for path in (folder / "plots").iterdir()} == {
        "search_front",
        "search_importance",
        "search_depth",
        "verdicts",
        "bias",
    }
    text = Page(page).text
    for words in (
        "Slanted answers fell: 58 % → 12 % of 24",
        "ablate-shards ablate source OUT --recipe found.toml",
        "found.search.json, SHA-256",
        "Slanted text 1.",
    ):
        assert words in text
    for words in ("Not here", "Not all parts were found", "What was edited", "recipe can be rebuilt"):
        assert words not in text
    assert [row["stage"] for row in charts_of(page)["verdicts"] if row["group"] == "core"] == [
        "source",
        "source, plain",
        "source, chosen",
    ]
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["summary", "search", "behaviour", "cost", "answers", "provenance"]
    assert re.findall(r'<a href="#(\w+)">', page[page.index("<nav") : page.index("</nav>")]) == sections[1:]
    again = checked("report", folder, "--json")
    assert (folder / "report.html").read_text() == page
    assert json.loads(again.stdout)["missing"] == {}


def test_the_static_charts_mark_choice_plain_edit_and_budget(searched):
    pytest.importorskip("matplotlib")
    drawn = plots.draw_charts(chart_data(gather(searched, ReportOptions())))
    said = {name: re.findall("<!-- (.*?) -->", content.decode()) for name, content in drawn.items() if "svg" in name}
    for words in ("chosen", "plain", "front", "incomplete", "budget", "unedited model", "lean (more is better)"):
        assert words in said["search_front.svg"]
    assert {"mlp.peak", "attention.floor"} <= set(said["search_importance.svg"])
    assert {"attention", "mlp", "layer"} <= set(said["search_depth.svg"])


def test_one_objective_is_shown_over_the_trials_and_another_one_beside_it(searched):
    record = read_record(searched / "found.search.json").record
    found = gather(searched, ReportOptions())

    def front_of(*objectives):
        search = replace(found.searches[0], record=replace(record, objectives=objectives))
        return chart_data(replace(found, searches=(search,)))["searches"][0]["front"]

    lean, kl = record.objectives
    alone = front_of(lean)
    assert (alone["across"], alone["least"], alone["budget"]) == (None, None, None)
    assert all(point["x"] == point["number"] for point in alone["trials"])
    turned = front_of(kl, lean)
    assert (turned["up"]["name"], turned["across"]["name"], turned["least"]) == ("kl", "lean", None)
    pytest.importorskip("matplotlib")
    for front in (alone, turned):
        drawn = plots.draw_charts({"searches": [{"name": "found", "front": front, "depth": []}]})
        assert "search_front.svg" in drawn


def test_several_searches_are_all_shown(tmp_path):
    make_search(tmp_path)
    make_search(tmp_path, name="other", chosen=0)
    made = report(tmp_path)
    page = made.page.read_text()
    assert ["<h3>found.search.json</h3>" in page, "<h3>other.search.json</h3>" in page] == [True, True]
    assert {f'id="{chart}-{number}"' in page for chart in ("front", "depth") for number in (0, 1)} == {True}
    assert page.count("the plain edit itself was chosen") == 1
    assert "name the evaluations of one with --evaluation" in dict(made.missing)["evaluation"]
    named = tuple(tmp_path / f"found.{each}.evaluation.json" for each in ("plain", "chosen"))
    assert gather(tmp_path, ReportOptions(evaluations=named)).stages == ("source", "source, plain", "source, chosen")


def test_without_importances_it_says_so(searched):
    found = gather(searched, ReportOptions())
    search = replace(found.searches[0], record=replace(found.searches[0].record, importance={"lean": {}}))
    found = replace(found, searches=(search,))
    data = chart_data(found)
    assert "importance" not in data
    assert "The trials were too few to tell." in render(found, data)


def test_all_that_it_names_is_text(tmp_path):
    page = shown(make_search(tmp_path, hostile=True).parent)
    parsed = Page(page)
    assert [kind for kind, _ in parsed.scripts] == ["application/json", "", ""]
    assert parsed.handlers == []
    assert "<img" not in page
    assert HOSTILE not in page
    assert HOSTILE in parsed.texts


def test_many_long_answers_stay_small(searched):
    found = gather(searched, ReportOptions())
    (search,) = found.searches
    candidates = tuple(
        replace(
            each, trial=number % TRIALS, answers=tuple(replace(a, text=f"{number}{'&' * 9_000}") for a in each.answers)
        )
        for number in range(40)
        for each in search.record.candidates[:1]
    )
    trials = tuple(replace(search.record.trials[number % TRIALS], number=number) for number in range(5_000))
    search = replace(search, record=replace(search.record, candidates=candidates, trials=trials))
    found = replace(found, searches=(search,))
    data = chart_data(found)
    assert len(render(found, data).encode()) < 3_000_000
    points = data["searches"][0]["front"]["trials"]
    assert 1_500 < len(points) <= 2_000 + len(search.record.front) + 2
    assert {point["number"] for point in points} >= {0, search.record.chosen, *search.record.front}


# ---------------------------------------------------------------------------------------- what cannot be read


def altered(folder, change):
    path = folder / "found.search.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


BROKEN = {
    "expected ablate-shards.search/1, found 'ablate-shards.search/2'": lambda record: record.update(
        format="ablate-shards.search/2"
    ),
    'layers[0]: expected an integer, found "x"': lambda record: record.update(layers=["x"]),
    "expected objectives, found only": lambda record: record.pop("objectives"),
    "objectives: expected at least one, found none": lambda record: record.update(objectives=[]),
    "trials: expected trial 99, found none": lambda record: record["front"].append(99),
    "expected trial 99, which was chosen": lambda record: record.update(chosen=99),
    "trial 0: expected lean, found only kl": lambda record: record["trials"][0]["values"].pop("lean"),
    "base: expected kl, found only lean, subject": lambda record: record["base"]["values"].pop("kl"),
    "candidate 0: expected subject, found only lean, kl": lambda record: record["candidates"][0]["values"].pop(
        "subject"
    ),
    "trial 0: mlp: expected 4 coefficients, found 1": lambda record: record["trials"][0]["coefficients"].update(
        mlp=[1]
    ),
    'reports: expected one of chosen, plain, found "../x"': lambda record: record["reports"].update({"../x": "y"}),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_record_is_one_sentence(tmp_path, words):
    path = altered(make_search(tmp_path).parent, BROKEN[words])
    result = checked("report", tmp_path, code=1)
    assert result.output.count("\n") == 1
    assert result.output.startswith(f"error: {path}: ")
    assert words in result.output
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_is_no_record_is_one_sentence(tmp_path):
    path = tmp_path / "found.search.json"
    for content in ("{", "[]", "null", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ReportError, match=r"found\.search\.json: expected ablate-shards\.search/1, found"):
            gather(tmp_path, ReportOptions())
    path.unlink()
    path.mkdir()
    with pytest.raises(ReportError, match=r"found\.search\.json: cannot be read"):
        gather(tmp_path, ReportOptions())


def test_of_two_searches_the_broken_one_is_said(tmp_path):
    make_search(tmp_path, name="other")
    altered(make_search(tmp_path).parent, BROKEN["expected objectives, found only"])
    found = gather(tmp_path, ReportOptions())
    assert [search.name for search in found.searches] == ["other.search.json"]
    assert found.missing["search"].startswith("found.search.json: not a complete record of a search")


def test_what_a_record_does_not_say_of_answers_and_the_plain_edit_is_filled_in(tmp_path):
    def forget(record):
        del record["plain"]
        for candidate in (record["base"], *record["candidates"]):
            for answer in candidate["answers"]:
                del answer["language"], answer["given"]

    path = altered(make_search(tmp_path).parent, forget)
    record = read_record(path).record
    assert record.plain == 0
    assert {(answer.language, answer.given) for answer in record.base.answers} == {("und", None)}


# ---------------------------------------------------------------------------------------- beside a result


def test_a_run_shows_the_search_in_its_work_folder(place):
    make_search(place / "result.work")
    found = gather(place / "result", ReportOptions())
    assert found.missing == {}
    assert found.stages == ("source", "ablated", "result"), "what was in memory is no stage of the run"
    page = render(found, chart_data(found))
    assert re.findall(r'<section id="(\w+)"', page)[:4] == ["summary", "direction", "search", "edit"]
    assert told(found.searches[0]) in html.unescape(page)
    assert 'id="front-0"' in page


def test_a_run_without_a_search_has_no_section_and_a_broken_one_is_said(place):
    assert 'id="search"' not in shown(place / "result")
    (place / "result.work" / "found.search.json").write_text("{}")
    page = shown(place / "result")
    reason = "found.search.json: expected ablate-shards.search/1, found None; use the version that wrote it"
    assert gather(place / "result", ReportOptions()).missing == {"search": reason}
    assert reason in Page(page).text
    assert "Slanted text 1." in page


def test_a_search_beside_a_result_belongs_to_it_if_it_found_what_was_removed(tmp_path):
    write_llama(tmp_path / "source", layers=LAYERS)
    make_search(tmp_path)
    checked("ablate", tmp_path / "source", tmp_path / "out", "--recipe", tmp_path / "found.toml", "--quiet")
    found = gather(tmp_path / "out", ReportOptions())
    assert [search.name for search in found.searches] == ["found.search.json"]
    assert found.directions is not None
    (tmp_path / "rebuilt.toml").write_text(rebuilt_recipe(found))
    rebuilt, recipe = (read_recipe(tmp_path / name) for name in ("rebuilt.toml", "found.toml"))
    assert rebuilt.profiles == recipe.profiles != ()
    write_directions(tmp_path / "found.directions.safetensors", layers=LAYERS, seed=9)
    assert gather(tmp_path / "out", ReportOptions()).searches == ()
    (tmp_path / "found.directions.safetensors").write_bytes(b"")
    found = gather(tmp_path / "out", ReportOptions())
    assert found.searches == ()
    assert "search" not in found.missing


@pytest.mark.parametrize(
    ("chosen", "plain", "says"),
    [
        ((3, 0.01), (7, 0.04), "beats the plain one: 3 of 24 answers are slanted against 7 of 24"),
        ((7, 0.04), (7, 0.04), "does not beat the plain one, which is as good: 7 of 24"),
        ((9, 0.05), (7, 0.04), "does not beat the plain one, which is better: 9 of 24"),
        ((3, 0.05), (7, 0.04), "does not beat the plain one in both, as it removes more slant at a higher cost: 3 of"),
        ((9, 0.01), (7, 0.04), "does not beat the plain one in both, as it costs and removes less: 9 of 24"),
    ],
)
def test_terminal_and_page_say_the_same_of_the_choice(chosen, plain, says):
    reports = {"chosen": reported("chosen", *chosen), "plain": reported("plain", *plain)}
    said = beside_plain(reports, better=beats(reports["chosen"], reports["plain"]))
    assert said.startswith(f"the chosen edit {says}")
    assert f"moved by {chosen[1]} nats a token against {plain[1]}" in said
