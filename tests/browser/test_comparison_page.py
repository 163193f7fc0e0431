"""The page of a comparison in a real browser."""

import pytest
from command_line import checked
from page_checks import CONTRAST, check_names, drawn, pixels
from raw_checkpoints import write_directions

from ablate_shards.data.demo import MODEL

pytestmark = pytest.mark.browser

CHARTS = ("changes", "spectra", "fits")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    place = tmp_path_factory.mktemp("comparison")
    write_directions(place / "d.safetensors", layers=8, hidden=128)
    checked(MODEL, place / "out", "-d", place / "d.safetensors", "--source-layer", 4, "-q")
    checked("diff", MODEL, place / "out", "-d", place / "d.safetensors", "--report", place / "page", "-q")
    return (place / "page" / "diff.html").as_uri()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_drawn_and_nothing_sticks_out(visit, scheme, width):
    page = visit(scheme, width)
    for chart in CHARTS:
        assert drawn(page, chart) > 0.002, f"{chart} is empty"
    assert (pixels(page)[5, 5].mean() > 128) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []


def test_it_says_what_differs_and_shows_values(visit):
    page = visit()
    assert page.locator(".lead").first.inner_text().startswith("Rank-1 edits of 16 residual writers in layers 0–7")
    place = page.locator("#changes svg")
    box = place.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.3)
    page.wait_for_timeout(100)
    assert "relative size" in place.locator("[aria-label=tip]").text_content()
    page.get_by_text("Every changed tensor").click()
    assert page.locator("#changed tbody tr:visible").count() == 16
    check_names(visit(), CHARTS)


def test_it_fits_a_sheet(visit):
    page = visit("dark", width=43 * 16)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("#changed tbody tr:visible").count() == 16
    assert page.evaluate("document.documentElement.scrollWidth") <= 43 * 16
    assert page.pdf().startswith(b"%PDF")
