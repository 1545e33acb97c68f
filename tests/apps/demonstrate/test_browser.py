"""The page of each app in a headless Chromium that has no network: it is used, and answers with its experts."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from browsing import browser as browser, needs_chromium, opened, serious
from PIL import Image

pytestmark = needs_chromium("gradio")


@pytest.fixture(scope="module")
def reached() -> Iterator[list[Any]]:
    """The addresses outside this machine to which Python connects while the pages are served."""
    addresses: list[Any] = []
    own = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            addresses.append(address)
        own(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield addresses


@pytest.fixture(scope="module")
def served(tmp_path_factory, reached) -> Iterator[Callable[[str], str]]:
    """Serves the page of a run by its name, and returns its address."""
    from shown_runs import RUNS, shown

    from apps.base.ports import bound, url_of
    from apps.demonstrate.command import local_app, server_of
    from apps.demonstrate.page import appearance, build_page

    servers: list[tuple[Any, threading.Thread]] = []

    def serve(name: str) -> str:
        folder, images = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("images")
        _, exhibit = shown(RUNS[name](folder))
        app = local_app(build_page(exhibit, name, images), **appearance())
        listening, server = bound(0), server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append((server, thread))
        return url_of(listening)

    yield serve
    for server, _ in servers:
        server.should_exit = True
    for _, thread in servers:
        thread.join()


class Tab:
    """A tab with a page, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
        self.page, self.notes = opened(browser, url, "#answer .shown", width, scheme)

    def press(self, name: str) -> str:
        """Press a button whose answer is another than the last one, and return that as soon as it is whole."""
        self.page.locator("#answer .shown").evaluate("(shown) => { shown.dataset.old = 'yes'; }")
        self.page.get_by_role("button", name=name, exact=True).click()
        return self.page.locator("#answer .shown:not([data-old], .growing)").inner_text()

    def problem(self, name: str) -> str:
        """Press a button after wrong input, and return the line that the page shows."""
        self.press(name)
        assert self.page.locator("#experts").count() == 0 or not self.page.locator("#experts").is_visible()
        return self.page.locator("#answer [role=alert]").inner_text()

    def words(self) -> list[str]:
        """Return the words with the experts below them."""
        return [" ".join(text.split()) for text in self.page.locator("#experts .word").all_inner_texts()]

    def layer(self, name: str) -> None:
        """Choose a layer, and wait for its experts."""
        before = self.page.locator("#experts .shown").inner_html()
        self.page.get_by_role("radio", name=name, exact=True).check()
        self.page.wait_for_function(
            "(before) => document.querySelector('#experts .shown').innerHTML !== before", arg=before
        )

    def end(self) -> None:
        assert serious(self.page) == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert self.notes == []
        self.page.close()


@pytest.mark.slow
def test_an_image_its_class_and_the_experts_of_its_patches(browser, served, reached, tmp_path):
    url = served("digits")
    tab = Tab(browser, url)
    assert tab.page.locator("#answer .bars tr").count() == 5  # of the first example
    file = tmp_path / "own.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file)
    tab.page.get_by_role("button", name="Remove Image").click()
    tab.page.set_input_files("input[type=file]", file)
    tab.page.wait_for_selector(".picture img")
    answer = tab.press("Classify")
    assert answer.startswith("Likeliest classes")
    assert answer.count("%") == 5
    picture = tab.page.locator("#experts svg[aria-label^=Experts]")
    assert picture.locator("rect").count() == 4
    assert all(len(text.split()) == 2 for text in picture.locator("text").all_text_contents())
    (tmp_path / "wrong.png").write_text("no image")
    tab.page.get_by_role("button", name="Remove Image").click()
    tab.page.set_input_files("input[type=file]", tmp_path / "wrong.png")
    tab.page.wait_for_selector(".picture img")
    line = tab.problem("Classify")
    assert "wrong.png is corrupt" in line
    tab.page.get_by_role("button", name="Remove Image").click()
    tab.page.wait_for_selector(".picture input[type=file]", state="attached")
    assert tab.problem("Classify").startswith("Image: there is none yet")
    tab.end()
    assert reached == []

    # Only this machine is answered, and the browser is told to ask no other.
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "elsewhere.example"}))


def test_a_sentence_its_translation_and_the_experts_of_its_words(browser, served, reached):
    tab = Tab(browser, served("translator"), 390, "dark")
    tab.page.get_by_label("Sentence").fill("blue green red red")
    tab.page.get_by_label("Languages").fill("en-fr")
    tab.page.keyboard.press("Enter")
    assert tab.press("Translate").startswith("Translation, en-fr")
    tab.layer("encoder 0")
    words = tab.words()
    assert [word.split()[0] for word in words] == ["<2fr>", "blue", "green", "red", "red", "</s>"]
    assert all(len(word.split()) == 3 for word in words)  # each with its 2 experts
    tab.page.get_by_label("Sentence").fill("  ")
    assert tab.problem("Translate") == "Sentence is empty: type something first"
    tab.page.get_by_role("button", name="en-de: red red black black").click()
    tab.page.wait_for_selector("#experts .word")
    assert tab.page.get_by_label("Sentence").input_value() == "red red black black"
    tab.end()
    assert reached == []


@pytest.mark.slow  # as the others; without a browser it is tested in every run
def test_a_row_its_probabilities_and_the_weights_of_the_gates(browser, served):
    tab = Tab(browser, served("table"))
    tab.page.get_by_label("age").fill("33")
    assert tab.press("Predict").split("\n")[0] == "Probability of each task"
    gates = tab.page.locator("#experts .gates")
    assert gates.locator("thead th").all_inner_texts() == ["expert", "click", "like"]
    assert gates.locator("tbody th").all_inner_texts() == ["shared 0", "shared 1", "shared 2"]
    for column in (1, 2):
        texts = gates.locator(f"tbody tr > :nth-child({column + 1})").all_inner_texts()
        assert sum(float(text.rstrip(" %")) for text in texts) == pytest.approx(100, abs=0.2)
    tab.page.get_by_label("age").fill("old")
    assert tab.problem("Predict") == "age='old' is not a number"
    tab.page.get_by_label("age").fill("")
    tab.page.get_by_label("city").fill("Roma")
    tab.page.keyboard.press("Enter")
    known = "city='Roma' is none of the 3 values that the model knows; did you mean 'Rome'?"
    assert tab.problem("Predict") == known
    tab.end()


@pytest.mark.slow  # as the others; without a browser it is tested in every run
def test_a_history_and_the_next_items(browser, served):
    tab = Tab(browser, served("history"))
    history = tab.page.get_by_label("History, the oldest first")
    history.click()
    tab.page.get_by_role("option", name="Eraserhead").click()
    tab.page.keyboard.press("Escape")  # the list of items closes
    answer = tab.press("Recommend")
    assert [line.split()[0] for line in answer.split("\n")[2:]] == ["1.", "2.", "3."]
    assert [word.split()[0] for word in tab.words()] == ["Alien", "Brazil", "Casablanca", "Eraserhead"]
    tab.layer("block 0 mixing")
    assert all("attention" in word or "convolution" in word for word in tab.words())
    tab.page.get_by_role("button", name="Clear").click()
    assert tab.problem("Recommend") == "History, the oldest first is empty: choose an item first"
    tab.end()
