"""A headless Chromium for tests of pages, tabs that note what goes wrong in them, and what axe-core finds."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HARMLESS = "Method not implemented."
"""Gradio 6.31 says so of its own where an image is removed or chosen; nothing is wrong then."""


def needs_chromium(*libraries: str) -> pytest.MarkDecorator:
    """Leave tests out where Chromium or a library is missing."""
    needed = (*libraries, "playwright", "axe_playwright_python")
    is_missing = CHROMIUM is None or any(importlib.util.find_spec(name) is None for name in needed)
    return pytest.mark.skipif(is_missing, reason=f"needs chromium, {', '.join(needed)}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    local = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", local])
        yield browser
        browser.close()


def opened(browser: Any, url: str, drawn: str, width: int, scheme: str) -> tuple[Any, list[str]]:
    """Return a tab once it has ``drawn``, and the list of its errors, warnings and requests to other addresses.

    Of a file the list has whatever it says.
    """
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    notes: list[str] = []

    def note(message: Any) -> None:
        if (message.type in ("error", "warning") or url.startswith("file:")) and message.text != HARMLESS:
            notes.append(message.text)

    tab.on("console", note)
    tab.on("pageerror", lambda error: notes.append(str(error)))
    own = (url if url.startswith("http") else "file:", "data:", "blob:")
    tab.on("request", lambda request: None if request.url.startswith(own) else notes.append(request.url))
    tab.set_default_timeout(120_000)  # many tests share two cores
    tab.goto(url)
    tab.wait_for_selector(drawn)
    return tab, notes


def serious(tab: Any) -> list[str]:
    """Return what axe-core finds on a page that is serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    tab.wait_for_function("!document.querySelector('.generating, .pending')")  # what waits is shown pale
    found = Axe().run(tab).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]
