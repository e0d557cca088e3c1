"""The page in a real browser: it draws, the clips play in step, the keyboard works, nothing is requested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vivace.report.compare_page import ComparePage, write

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
    "--window-size=1200,1400",
)


class Browser:
    """As much of the WebDriver protocol as these tests need."""

    def __init__(self, port: str, profile: Path) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._base += "/" + self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def key(self, value: str) -> None:
        strokes = [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def resize(self, width: int) -> None:
        """Emulates a viewport of this width; 0 goes back to the window's own."""
        size = {"width": width, "height": 900 if width else 0, "deviceScaleFactor": 1, "mobile": False}
        body = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self._call("POST", "/goog/cdp/execute", body)

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("POST", "/se/log", {"type": kind})

    def wait(self, script: str, seconds: float = 8.0) -> None:
        limit = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < limit, f"never became true: {script}"
            time.sleep(0.05)

    def close(self) -> None:
        self._call("DELETE", "")


@pytest.fixture(scope="module")
def browser(page: ComparePage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert driver.stdout is not None
    try:
        found = (re.search(r"on port (\d+)\.", line) for line in driver.stdout)
        port = next(match.group(1) for match in found if match)
        browser = Browser(port, folder / "profile")
        try:
            browser.open(write(page, folder / "compare.html").as_uri())
            browser.wait("return [...document.querySelectorAll('video')].every(v => v.readyState >= 3)")
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(timeout=10)
        driver.stdout.close()


TIMES = "return [...document.querySelectorAll('video')].map(v => v.currentTime)"
SETTLED = "return [...document.querySelectorAll('video')].every(v => !v.seeking)"


def test_keys_step_all_clips_together(browser: Browser, page: ComparePage) -> None:
    browser.key("\ue011")  # Home
    browser.wait(SETTLED)
    for frame in (1, 2, 3):
        browser.key("\ue014")  # right arrow
        browser.wait(SETTLED)
        assert browser.run(TIMES) == pytest.approx([(frame + 0.5) / page.fps] * 3, abs=1e-3)
    browser.key("\ue012")  # left arrow
    assert browser.run("return document.getElementById('where').textContent").startswith("3 / 29")
    browser.key("\ue010")  # End
    assert browser.run("return document.getElementById('scrub').value") == "28"
    head = browser.run("return Number(document.querySelector('.playhead').getAttribute('x1'))")
    assert head == pytest.approx(504)


def test_space_plays_in_step_and_pauses(browser: Browser, page: ComparePage) -> None:
    browser.key("\ue011")
    browser.wait(SETTLED)
    browser.key(" ")
    assert browser.run("return document.getElementById('play').getAttribute('aria-label')") == "Pause"
    browser.wait("return document.querySelector('video').currentTime > 0.8")
    browser.key(" ")
    browser.wait(SETTLED)
    times = browser.run(TIMES)
    assert times == pytest.approx([times[0]] * 3, abs=1e-3)
    assert browser.run("return [...document.querySelectorAll('video')].every(v => v.paused)")


def test_a_chart_shows_values_and_seeks(browser: Browser) -> None:
    browser.run(
        "const p = document.querySelector('[data-chart]'), b = p.getBoundingClientRect();"
        "const at = {clientX: b.left + b.width * 279 / 520, clientY: b.top + 20, bubbles: true};"
        "p.dispatchEvent(new PointerEvent('pointermove', at)); p.dispatchEvent(new MouseEvent('click', at));"
    )
    assert browser.run("return document.getElementById('tip').textContent").startswith("frame 15\nPSNR ")
    assert browser.run("return document.getElementById('where').textContent").startswith("15 / 29")


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_no_sideways_scrolling(browser: Browser, width: int) -> None:
    browser.resize(width)
    client, scroll = browser.run("const e = document.documentElement; return [e.clientWidth, e.scrollWidth]")
    browser.resize(0)
    assert scroll == client <= width


def test_nothing_was_requested_and_nothing_complained(browser: Browser) -> None:
    assert browser.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    ours = [e["request"]["url"] for e in sent if e["documentURL"].startswith("file:")]
    assert ours
    assert {address.split(":")[0] for address in ours} <= {"file", "data"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_draws_in_both_schemes(page: ComparePage, tmp_path: Path, scheme: str) -> None:
    address, picture = write(page, tmp_path / "compare.html").as_uri(), tmp_path / "shot.png"
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", address,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    corner = pixels[4, 4].mean()
    assert corner > 230 if scheme == "light" else corner < 40
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
    assert red.sum() > 5000  # the sphere of the clips is on the screen
