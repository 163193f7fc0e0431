"""The report in a real browser: it draws, answers to slider, filter and scheme, and can be read by everyone."""

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from report_runs import HOSTILE, make_run

from ablate_shards.surgery.charts import chart_data
from ablate_shards.surgery.findings import ReportOptions, gather
from ablate_shards.surgery.page import render

pytestmark = pytest.mark.browser

QUALITY = ("signal", "auc", "purity", "cosine")
CHARTS = (*QUALITY, "cosines", "projection", "edits", "drift", "losses", "updates", "verdicts")
SCHEMES = ("light", "dark")
WIDTHS = (1280, 390)
#: Contrast by WCAG 2: relative luminances of the text and of the first opaque background behind it.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((value) => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const node of document.body.querySelectorAll("*:not(svg *, option, script, i)")) {
    const said = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!said || !node.checkVisibility()) continue;
    const pair = [parse(getComputedStyle(node).color), behind(node)].map(luminance).sort((one, other) => other - one);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) bad.push(`${node.tagName} ${node.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return bad;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    found = gather(make_run(folder), ReportOptions())
    page = folder / "report.html"
    page.write_text(render(found, chart_data(found)), encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def visit(browser, address):
    """Opens the page; whatever it complains of or asks the network for is a failure."""
    contexts, complaints = [], []

    def open_page(scheme="light", width=1280, **more):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url == address else complaints.append(request.url))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(address)
        if more.get("java_script_enabled", True):
            page.wait_for_selector("#signal svg")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("data:")] == []


def pixels(page, selector=None):
    image = pytest.importorskip("PIL.Image")
    raw = page.locator(selector).screenshot() if selector else page.screenshot(full_page=True)
    return np.asarray(image.open(io.BytesIO(raw)).convert("RGB")).astype(int)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_is_drawn_and_nothing_sticks_out(visit, scheme, width):
    page = visit(scheme, width)
    for chart in CHARTS:
        shown = pixels(page, f"#{chart}")
        drawn = (np.abs(shown - shown[0, 0]).max(axis=2) > 40).mean()
        assert drawn > 0.002, f"{chart} is empty"
    whole = pixels(page)
    assert (whole[5, 5].mean() > 128) == (scheme == "light")
    assert whole.std() > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_empty_chart_would_be_seen(visit):
    page = visit()
    page.evaluate("document.querySelector('#signal').replaceChildren()")
    shown = pixels(page, "#signal")
    assert (np.abs(shown - shown[0, 0]).max(axis=2) > 40).mean() == 0


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
    page = visit()
    assert page.locator("html").get_attribute("lang") == "en"
    for chart in CHARTS:
        assert page.locator(f"#{chart} svg[role=img]").get_attribute("aria-label")
    for control in page.locator("input:visible, select:visible, button:visible").all():
        name = control.evaluate("node => node.labels?.[0]?.textContent || node.ariaLabel || node.textContent")
        assert re.search(r"\w", name)
    levels = [int(each.evaluate("node => node.tagName[1]")) for each in page.locator("h1, h2, h3").all()]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"


def test_hostile_answers_stay_text(visit):
    page = visit()
    assert page.title() == "result · ablate-shards"
    assert page.locator("article").first.locator(".said").first.inner_text().split() == HOSTILE.split()
    assert page.locator("#list img, #list script").count() == 0


def test_without_scripts_the_text_is_all_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("article:visible").count() == 44
    assert not page.locator("#filter").is_visible()
