"""What is looked at in a page: what it holds, and in a browser pixels, contrast, the names of what can be used."""

import io
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

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


class Page(HTMLParser):
    """Reads a page: its scripts, its links, and the text in it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.scripts, self.links, self.texts, self.handlers, self.policy = [], [], [], [], ""
        self._inside = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.handlers += [name for name in found if name.startswith("on")]
        self.links += [value for name, value in found.items() if name in ("src", "href", "action", "srcset")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag in ("script", "style"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append([found.get("type", ""), ""])

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if self._inside == ["script"]:
            self.scripts[-1][1] += data
        elif not self._inside and data.strip():
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def pixels(page, selector=None):
    image = pytest.importorskip("PIL.Image")
    raw = page.locator(selector).screenshot() if selector else page.screenshot(full_page=True)
    return np.asarray(image.open(io.BytesIO(raw)).convert("RGB")).astype(int)


def drawn(page, chart):
    """Returns the share of a chart's pixels that differ from its corner."""
    shown = pixels(page, f"#{chart}")
    return (np.abs(shown - shown[0, 0]).max(axis=2) > 40).mean()


def check_names(page, charts):
    """Checks that charts and controls have names, headings descend in steps, and Tab starts at the skip link."""
    assert page.locator("html").get_attribute("lang") == "en"
    for chart in charts:
        assert page.locator(f"#{chart} svg[role=img]").get_attribute("aria-label")
    for control in page.locator("input:visible, select:visible, button:visible").all():
        name = control.evaluate("node => node.labels?.[0]?.textContent || node.ariaLabel || node.textContent")
        assert re.search(r"\w", name)
    levels = [int(each.evaluate("node => node.tagName[1]")) for each in page.locator("h1, h2, h3").all()]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
