"Fixtures for every test: a JupyterLab and a browser's page (see tests/browser.py)."
import re

import pytest


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A running JupyterLab with an empty folder."
    from browser import Lab

    running = Lab(tmp_path_factory.mktemp("lab")).start()
    yield running
    running.stop()


# Per module: while it lives, Playwright keeps an event loop in this thread, which nbclient would stumble over in other modules' tests.
@pytest.fixture(scope="module")
def browser_window():
    "The system's Chromium, without a window to see."
    from browser import QUIET, chromium
    from playwright.sync_api import expect, sync_playwright

    where = chromium()
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=where, headless=True, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def page(browser_window, lab, request):
    "An empty page; page.errors gathers what goes wrong on it. Its last look goes to out/browser/."
    from browser import SLOW, gather_errors, shot

    page = browser_window.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(SLOW)
    gather_errors(page)
    yield page
    shot(page, re.sub(r"\W+", "-", request.node.name).strip("-"))
    page.close()
    lab.stop_kernels()
