"""The page of a comparison: what it says, what it draws, and where it is written."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import checked
from raw_checkpoints import write_directions
from report_runs import HOSTILE

from ablate_shards.data.demo import MODEL
from ablate_shards.surgery.diff.differences import Diff, TensorDiff
from ablate_shards.surgery.report import plots
from ablate_shards.surgery.report.comparison import comparison_data, render_comparison
from ablate_shards.surgery.report.plots import draw_charts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("comparison")
    write_directions(place / "d.safetensors", layers=8, hidden=128)
    checked(MODEL, place / "out", "-d", place / "d.safetensors", "--source-layer", 4, "-q")
    return place


def tensor(name="model.layers.1.mlp.down_proj.weight", **more):
    given = {"place": "1", "layer": 1, "component": "mlp", "writer": True, "kind": "low-rank", "relative": 0.1, **more}
    return TensorDiff(name, name, "BF16", "BF16", (8, 8), (8, 8), elements=64, changed=32, **given)


def difference(*tensors, **more):
    return Diff(
        "a", "b", "Llama", 3, tensors, **{"lost": (), "added": (), "fused": (), "metadata": (), "files": (), **more}
    )


def test_the_command_writes_the_page_and_its_charts(place):
    shown = checked("diff", MODEL, place / "out", "-d", place / "d.safetensors", "--report", place / "page")
    page = (place / "page" / "diff.html").read_text(encoding="utf-8")
    assert f"written to {place / 'page' / 'diff.html'}, 6 plots to" in shown.stdout
    names = sorted(path.name for path in (place / "page" / "plots").iterdir())
    assert names == sorted(f"{name}.{suffix}" for name in ("changes", "spectra", "fits") for suffix in ("png", "svg"))
    assert len(page.encode()) < 3_000_000
    assert not re.search(r"""(?:src|href)=["'](?!#|data:,)""", page)
    for words in (
        "Rank-1 edits of 16 residual writers in layers 0–7",
        "model.language_model.layers.3.mlp.down_proj.weight",
        "Files (1)",
    ):
        assert words in page
    again = place / "again"
    checked("diff", MODEL, place / "out", "-d", place / "d.safetensors", "--report", again, "--json")
    assert (again / "diff.html").read_bytes() == (place / "page" / "diff.html").read_bytes()


def test_the_charts_show_what_json_says(place):
    words = ("diff", MODEL, place / "out", "-d", place / "d.safetensors", "--json")
    told = {item["name"]: item for item in json.loads(checked(*words).stdout)["tensors"]}
    checked(*words[:-1], "--report", place / "shown", "-q")
    text = (place / "shown" / "diff.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    (cell,) = (cell for cell in data["changes"] if (cell["layer"], cell["component"]) == (2, "mlp"))
    one = told["model.language_model.layers.2.mlp.down_proj.weight"]
    assert cell["relative"] == pytest.approx(one["relative"], rel=1e-3)
    assert cell["kind"] == one["kind"] == "ablation"
    (fit,) = (row for row in data["fits"] if row["name"] == one["name"] and row["which"] == "closest direction")
    assert (fit["of"], fit["cosine"]) == (
        one["alignment"]["best_layer"],
        pytest.approx(one["alignment"]["best_cosine"], rel=1e-3),
    )
    (spectrum,) = (row for row in data["spectra"] if row["name"] == one["name"])
    assert spectrum["shares"] == pytest.approx(one["shares"], rel=1e-3)


def test_a_cell_is_of_the_largest_change():
    cells = comparison_data(difference(tensor(), tensor("model.layers.1.mlp.up_proj.weight", relative=0.3, rank=4)))
    assert cells["changes"] == [
        {
            "layer": 1,
            "component": "mlp",
            "names": "down_proj, up_proj",
            "count": 2,
            "relative": 0.3,
            "kind": "low-rank",
            "rank": "> 4",
        }
    ]


def test_nothing_to_draw_draws_nothing():
    same = difference(verdict=("no difference",))
    assert comparison_data(same) == {}
    assert draw_charts({}) == {}
    page = render_comparison(same, {})
    assert "No difference." in page
    assert "What changed" not in page
    assert "are the same" in page


def test_names_are_text_and_long_lists_end(place):
    many = difference(
        tensor(HOSTILE), lost=tuple(f"lost.{HOSTILE}.{number}" for number in range(700)), verdict=(HOSTILE,)
    )
    page = render_comparison(replace(many, first=HOSTILE), comparison_data(many), Path(HOSTILE))
    assert "<img" not in page
    assert page.count("<script") == 3
    assert "Only in A (700)" in page
    assert "and 200 more" in page
    many = difference(*(tensor(f"w{number}", layer=None) for number in range(1_700)))
    page = render_comparison(many, comparison_data(many))
    assert "200 more are in what --json prints" in page
    assert len(page.encode()) < 3_000_000


def test_a_page_needs_a_folder_and_its_option(place):
    (place / "file").write_text("")
    failed = checked("diff", MODEL, place / "out", "--report", place / "file", code=1)
    assert failed.stderr.splitlines()[-1].startswith(f"error: {place / 'file'}: ")
    assert "name a folder" in failed.stderr
    assert "--report FOLDER" in checked("diff", MODEL, place / "out", "--open", code=2).stderr


def test_without_jinja_one_sentence_says_what_to_install(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    failed = checked("diff", MODEL, place / "out", "--report", place / "none", code=1)
    assert "pip install 'ablate-shards[report]'" in failed.stderr
    assert not (place / "none").exists()


def test_the_page_is_opened(place, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    monkeypatch.setattr("ablate_shards.surgery.report.document.draw_charts", lambda _: {})
    checked("diff", MODEL, place / "out", "--report", place / "open", "--open", "-q")
    assert opened == [(place / "open" / "diff.html").as_uri()]
    assert "changes.svg" in plots.PLOT_NAMES
