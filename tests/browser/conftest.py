"""One headless chromium for the tests of the page; without one they are skipped, and say so."""

import os
import shutil

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH, or its path in CHROMIUM")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page at the module's ``address``; whatever it complains of or asks the network for is a failure."""
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
            page.wait_for_selector(".chart svg")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("data:")] == []
