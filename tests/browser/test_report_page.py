"""The report in a real browser: it draws, answers to slider, filter and scheme, and can be read by everyone."""

import numpy as np
import pytest
from page_checks import CONTRAST, check_names, drawn, pixels
from report_runs import HOSTILE, make_run

from ablate_shards.surgery.report.charts import chart_data
from ablate_shards.surgery.report.findings import ReportOptions, gather
from ablate_shards.surgery.report.page import render

pytestmark = pytest.mark.browser

QUALITY = ("signal", "auc", "purity", "cosine")
CHARTS = (*QUALITY, "cosines", "projection", "edits", "drift", "losses", "updates", "verdicts")
SCHEMES = ("light", "dark")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    found = gather(make_run(folder), ReportOptions())
    page = folder / "report.html"
    page.write_text(render(found, chart_data(found)), encoding="utf-8")
    return page.as_uri()


@pytest.fixture(scope="module")
def wreck(tmp_path_factory):
    """The page of a model that an edit broke."""
    folder = tmp_path_factory.mktemp("wreck")
    found = gather(make_run(folder, broken=True), ReportOptions())
    page = folder / "report.html"
    page.write_text(render(found, chart_data(found)), encoding="utf-8")
    return page.as_uri()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_is_drawn_and_nothing_sticks_out(visit, scheme, width):
    page = visit(scheme, width)
    for chart in CHARTS:
        assert drawn(page, chart) > 0.002, f"{chart} is empty"
    whole = pixels(page)
    assert (whole[5, 5].mean() > 128) == (scheme == "light")
    assert whole.std() > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_empty_chart_would_be_seen(visit):
    page = visit()
    page.evaluate("document.querySelector('#signal').replaceChildren()")
    assert drawn(page, "signal") == 0


def test_the_slider_moves_through_the_layers_by_keyboard(visit):
    page = visit()
    slider = page.get_by_role("slider", name="Layer")
    slider.focus()
    page.keyboard.press("Home")
    first = page.locator("#projection svg").inner_html()
    assert page.locator("#layer-told").inner_text().startswith("layer 0 · AUC")
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-told").inner_text().startswith("layer 1 · AUC")
    assert slider.get_attribute("aria-valuetext").startswith("layer 1")
    assert page.locator("#projection svg").inner_html() != first
    assert page.locator("#projection [aria-label=dot] path").count() == 24


def test_the_filter_finds_answers(visit):
    page = visit()
    shown = page.locator("article:visible")
    count = page.locator("#count")
    assert shown.count() == 20
    assert count.inner_text() == "44 of 44 questions, the first 20 shown"
    page.locator("#more").click()
    assert shown.count() == 44
    page.get_by_role("combobox", name="Before").select_option("slanted")
    assert count.inner_text() == "14 of 44 questions"
    page.get_by_role("combobox", name="Now").select_option("slanted")
    assert shown.count() == 2
    page.get_by_role("combobox", name="Now").select_option("")
    page.get_by_role("checkbox").check()
    assert shown.count() == 12
    page.get_by_role("searchbox").fill("SLANTED TEXT 7")
    assert shown.count() == 1
    assert shown.locator(".said").all_inner_texts() == ["Slanted text 7.", "Neutral text 7."]
    page.get_by_role("searchbox").fill("")
    page.get_by_role("combobox", name="Before").select_option("")
    page.get_by_role("combobox", name="Group").select_option("unrelated")
    assert count.inner_text() == "2 of 44 questions"
    page.get_by_role("searchbox").fill("nothing like it")
    assert shown.count() == 0
    assert count.inner_text() == "0 of 44 questions"


def test_hovering_shows_values(visit):
    page = visit()
    for chart, words in (
        ("signal", "signal to noise"),
        ("edits", "before"),
        ("cosines", "cosine"),
        ("verdicts", ", 100.0 %"),
    ):
        place = page.locator(f"#{chart} svg")
        place.scroll_into_view_if_needed()
        page.mouse.move(0, 0)
        page.wait_for_timeout(100)
        box = place.bounding_box()
        assert words not in place.locator("[aria-label=tip]").text_content()
        page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.6)
        page.wait_for_timeout(100)
        assert words in place.locator("[aria-label=tip]").text_content()


def test_the_scheme_can_be_switched_and_paper_is_light(visit):
    page = visit("dark")
    background = "getComputedStyle(document.body).backgroundColor"
    colour = (
        "document.querySelector('#signal [aria-label=line] path, #signal [aria-label=line]').getAttribute('stroke')"
    )
    dark, line = page.evaluate(background), page.evaluate(colour)
    page.get_by_role("button", name="Use light colours").click()
    assert page.evaluate(background) != dark
    assert page.evaluate(colour) != line
    page.get_by_role("button", name="Use dark colours").click()
    assert page.evaluate(background) == dark
    page.emulate_media(media="print")
    assert page.evaluate(background) != dark
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_can_be_read(visit, scheme):
    page = visit(scheme)
    page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true; })")
    assert page.evaluate(CONTRAST) == []
    page.add_style_tag(content=".note { color: rgb(128 128 128 / 1) !important; background: rgb(140 140 140) }")
    assert page.evaluate(CONTRAST) != []


def test_charts_and_controls_have_names(visit):
    check_names(visit(), CHARTS)


def test_hostile_answers_stay_text(visit):
    page = visit()
    assert page.title() == "result · ablate-shards"
    assert page.locator("article").first.locator(".said").first.inner_text().split() == HOSTILE.split()
    assert page.locator("#list img, #list script").count() == 0


def test_without_scripts_the_text_is_all_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("article:visible").count() == 44
    assert not page.locator("#filter").is_visible()


def test_paper_has_all_that_is_folded_and_keeps_its_colours(visit):
    page = visit("dark")
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0
    assert page.get_by_text("model.layers.3.mlp.down_proj.weight").is_visible()
    assert page.locator("#count").inner_text() == "44 of 44 questions, the first 20 shown"
    assert not page.locator("#filter, #more, nav").first.is_visible()
    mark = page.locator(".mark.slanted").first
    assert mark.evaluate("node => getComputedStyle(node).printColorAdjust") == "exact"
    # Charts are drawn as wide as a sheet, not drawn for a screen and shrunk.
    assert page.locator("#edits svg").evaluate("node => Number(node.getAttribute('width'))") <= 42 * 16
    page.set_viewport_size({"width": 43 * 16, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 43 * 16, "a table is wider than a sheet"
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.locator("#edits svg").evaluate("node => Number(node.getAttribute('width'))") > 42 * 16


def test_maps_without_room_for_figures_have_a_scale_and_keys_show_the_marks(visit):
    wide, narrow = visit(), visit(width=290)
    assert wide.locator("#edits .ramp").count() == 0
    assert narrow.locator("#edits .ramp").inner_text().split() == ["0", "%", most(narrow), "%"]
    for page in (wide, narrow):
        assert page.locator("#drift .key .mark").evaluate_all("all => all.map(each => each.className)") == [
            "mark circle",
            "mark diamond",
        ]


def most(page):
    cells = page.evaluate("JSON.parse(document.getElementById('data').textContent).edits")
    return f"{100 * max(max(cell['before'], cell['after']) for cell in cells):.1f}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrecked_model_looks_like_one(browser, wreck, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(wreck)
    page.wait_for_selector("#verdicts svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    labels = page.locator(".figures dt")
    assert labels.all_inner_texts()[:2] == ["Bias ratio: slanted answers", "Broken answers"]
    slanted, broken = (labels.nth(place).bounding_box() for place in range(2))
    assert abs(slanted["y"] - broken["y"]) < 1, "one is not beside the other"
    assert page.locator(".lead.broken").bounding_box()["y"] < slanted["y"]
    # Stripes tell broken answers from slanted ones where the colour does not.
    stripes = "#verdicts [fill='url(#broken-stripes)'] rect"
    assert page.locator(stripes).count() == 2
    shown = pixels(page, f"{stripes} >> nth=0").mean(axis=2)
    line = shown[len(shown) // 2, 4:-4]
    assert np.count_nonzero(np.diff(line > (line.min() + line.max()) / 2)) > 10
    page.get_by_role("combobox", name="Now").select_option("broken")
    assert page.locator("#count").inner_text() == "33 of 44 questions, the first 20 shown"
    page.get_by_role("combobox", name="Now").select_option("neutral")
    assert page.locator("#count").inner_text() == "0 of 44 questions"
    assert page.evaluate(CONTRAST) == []
    context.close()
