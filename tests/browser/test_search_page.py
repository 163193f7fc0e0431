"""The page of a search in a real browser."""

import pytest
from page_checks import CONTRAST, check_names, drawn, pixels
from search_runs import make_search

from ablate_shards.surgery.report.charts import chart_data
from ablate_shards.surgery.report.findings import ReportOptions, gather
from ablate_shards.surgery.report.page import render

pytestmark = pytest.mark.browser

CHARTS = ("front-0", "importance-0-0", "importance-0-1", "depth-0", "verdicts")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = make_search(tmp_path_factory.mktemp("search")).parent
    found = gather(folder, ReportOptions())
    page = folder / "report.html"
    page.write_text(render(found, chart_data(found)), encoding="utf-8")
    return page.as_uri()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_drawn_and_nothing_sticks_out(visit, scheme, width):
    page = visit(scheme, width)
    for chart in CHARTS:
        assert drawn(page, chart) > 0.002, f"{chart} is empty"
    assert (pixels(page)[5, 5].mean() > 128) == (scheme == "light")
    page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []


def test_trials_show_their_setting_and_each_kind_has_a_form_of_its_own(visit):
    page = visit()
    for chart, words in (("front-0", ("trial ", "kl ", "attention: peak ")), ("depth-0", ("layer ", "plain 1"))):
        place = page.locator(f"#{chart} svg")
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        page.wait_for_timeout(100)
        told = place.locator("[aria-label=tip]").text_content()
        assert all(word in told for word in words)
    marks = page.locator("#front-0 .key .mark").evaluate_all("all => all.map(each => each.className)")
    assert marks == [f"mark {form}" for form in ("circle", "diamond", "frame", "star", "times")]


def test_charts_and_controls_have_names(visit):
    check_names(visit(), CHARTS)


def test_it_fits_a_sheet_and_can_be_read_without_scripts(visit):
    page = visit("dark", width=43 * 16)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 43 * 16
    assert page.pdf().startswith(b"%PDF")
    plain = visit(java_script_enabled=False)
    assert plain.get_by_text("beats the plain one").first.is_visible()
