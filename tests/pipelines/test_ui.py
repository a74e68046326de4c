"""The page of `dit-accel ui`: what it computes, and the whole in a browser."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest

from dit_accel.pipelines.ui import Studio, steps_drawn
from dit_accel.when import Mode

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def call(step: int, mode: str, rows: float = 1.0, computed: int = 0) -> Any:
    return SimpleNamespace(step=step, mode=Mode(mode), rows=rows, tokens_computed=computed)


def kinds(*calls: Any) -> list[str]:
    return re.findall(r'data-kind="(\w+)"', steps_drawn(SimpleNamespace(calls=calls)))


def test_steps_are_drawn_by_what_was_computed():
    assert kinds(call(0, "full"), call(1, "partial", 0.0), call(2, "full", 0.5)) == ["full", "none", "conditional"]
    assert kinds(call(0, "full"), call(1, "partial", 1.0, 12)) == ["full", "tokens"]
    both = (
        call(0, "full"),
        call(0, "full"),
        call(1, "full"),
        call(1, "partial", 0.0),
        call(2, "partial", 0.0),
        call(2, "partial", 0.0),
    )
    assert kinds(*both) == ["full", "conditional", "none"], "of guidance in two calls"
    drawn = steps_drawn(SimpleNamespace(calls=[call(0, "full"), call(1, "partial", 0.0), call(2, "partial", 0.0)]))
    assert "forecast: 2<" in drawn and "computed: 1<" in drawn and "step 3: forecast" in drawn


def test_a_picture_is_made_in_full_once_for_all_speeds(flux_path):
    studio, told = Studio([str(flux_path)], ("auto", "auto", "none")), []
    name, progress = str(flux_path), lambda done, **_: told.append(done)
    with pytest.warns(UserWarning):
        full, faster, said, report = studio.make(name, "red", 2, 3, progress)
    steps = told[-1][1]
    assert told == [(i + 1, steps) for i in range(steps)] * 2
    told.clear()
    again = studio.make(name, "red", 3, 3, progress)
    assert again[0] is full and len(told) == steps, "the uncached picture is kept"
    assert studio.make(name, "blue", 3, 3, progress)[0] is not full
    assert studio.make(name, "red", 3, 4, progress)[0].seed == 4
    assert "No recipe" in said and len({c.step for c in report.calls}) == steps
    assert not hasattr(studio.pipe(name).transformer, "_dit_accel"), "nothing stays applied"


@pytest.fixture(scope="module")
def address() -> Any:
    """The page of the command, served by a process of its own."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dit_accel.pipelines", "ui", "--no-browser", "--port", str(port)]
    served = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        assert served.stderr is not None
        line = next((line for line in served.stderr if "shows the page" in line), "")
        assert f"http://127.0.0.1:{port}/" in line, "the page is not served"
        yield f"http://127.0.0.1:{port}/"
    finally:
        served.terminate()
        served.wait(30)


@pytest.mark.slow
def test_only_this_machine_is_served(address):
    port = int(address.rsplit(":", 1)[1].strip("/"))
    assert urllib.request.urlopen(address).status == 200
    others = [own[4][0] for own in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET) if own[4][0] != "127.0.0.1"]
    for other in {*others, "127.0.0.2"}:
        with pytest.raises(OSError):
            socket.create_connection((other, port), 5).close()


@pytest.mark.slow
def test_a_picture_is_compared_in_a_browser(address, tmp_path):
    if not CHROMIUM:
        pytest.skip("no chromium on the path: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        loaded, errors = [], []
        tab.on("request", lambda request: loaded.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.fill("#prompt textarea", "crab, flat style")
        tab.click("#make")
        tab.wait_for_selector("#steps .dit-steps", timeout=120_000)
        tab.wait_for_function("document.querySelectorAll('#both img').length >= 2")
        sizes = tab.evaluate("[...document.querySelectorAll('#both img')].map(i => [i.naturalWidth, i.naturalHeight])")
        assert sizes[:2] == [[128, 128]] * 2
        places = tab.evaluate("[...document.querySelectorAll('#both img')].map(i => JSON.stringify(i.getBoundingClientRect()))")
        assert places[0] == places[1], "one picture lies over the other"
        facts = tab.inner_text("#facts")
        assert re.search(r"\d\.\d\dx as fast", facts) and "dB" in facts and "recipe of emoji-flux for 3x" in facts
        assert tab.locator("#steps [data-kind=full]").count() == 9 and tab.locator("#steps [data-kind]").count() == 28
        tab.screenshot(path=tmp_path / "page.png")
        tab.fill("#prompt textarea", " ")
        tab.click("#make")
        tab.wait_for_selector("text=Write what to draw.", timeout=20_000)
        assert not errors
        local = (address, "data:", "blob:")
        assert [url for url in loaded if not url.startswith(local)] == [], "something is loaded from elsewhere"
        browser.close()
