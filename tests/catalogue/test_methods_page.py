"""The page of all methods: up to date, complete, its links hold, it asks for nothing, and it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vivace import catalogue
from vivace.catalogue.measured import DEFAULT_FOLDER
from vivace.catalogue.page import build

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)


class Parts(HTMLParser):
    """Ids, link targets, and everything that a browser would fetch by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        if tag == "a":
            self.links.append(str(named.get("href")))
        elif tag == "link":
            self.fetched.append(str(named.get("href")))
        if "src" in named:
            self.fetched.append(str(named["src"]))


@pytest.fixture(scope="module")
def text() -> str:
    return build()


@pytest.fixture(scope="module")
def parts(text: str) -> Parts:
    return Parts(text)


def test_the_committed_page_is_up_to_date(text: str):
    records = catalogue.read_records(ROOT / DEFAULT_FOLDER)
    assert PAGE.read_text(encoding="utf-8") == (build(records) if records else text), (
        "run `vivace methods page -o docs/methods.html` in the repository's root and commit the page"
    )


def test_every_method_is_there_with_its_links(text: str, parts: Parts):
    names = {m.name for m in catalogue.methods()}
    assert names <= set(parts.ids)
    assert len(parts.ids) == len(set(parts.ids))
    inner = {link[1:] for link in parts.links if link.startswith("#")}
    assert inner <= set(parts.ids)
    assert {m.paper for m in catalogue.methods() if m.paper} <= set(parts.links)
    for entry in catalogue.entries():
        assert f"<code>{entry.name}</code>" in text


def test_nothing_is_fetched(text: str, parts: Parts):
    assert set(parts.fetched) == {"data:,"}
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_measurements_stand_beside_claims(text: str):
    record = {
        "id": "cafe",
        "created": "2026-11-24T10:00:00",
        "contender": {"name": "diffusers.mag_cache@threshold=<b>", "kind": "peer"},
        "task": {"name": "world-short@1"},
        "counts": {"nfe": 62},
    }
    measured = build([record])
    assert "62 evaluations" in measured
    assert "threshold=&lt;b&gt;" in measured
    assert "record cafe" in measured
    assert measured.count("not measured here") == text.count("not measured here") - 1


class Browser:
    """As much of the WebDriver protocol as these tests need."""

    def __init__(self, port: str, profile: Path) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        flags = (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
            "disable-component-update disable-sync force-prefers-reduced-motion window-size=1280,900"
        )
        options = {
            "binary": CHROMIUM,
            "args": [*(f"--{f}" for f in flags.split()), f"--user-data-dir={profile}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._base += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def wait(self, script: str, seconds: float = 8.0) -> None:
        limit = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < limit, f"never became true: {script}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def browser(text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "methods.html").write_text(text, encoding="utf-8")
    assert DRIVER is not None
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert driver.stdout is not None
    try:
        found = (re.search(r"on port (\d+)\.", line) for line in driver.stdout)
        browser = Browser(next(match.group(1) for match in found if match), folder / "profile")
        try:
            browser.open((folder / "methods.html").as_uri())
            yield browser
        finally:
            browser.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=10)
        driver.stdout.close()


SHOWN = "return [...document.querySelectorAll('.method:not([hidden])')].map(m => m.id)"


def choose(browser: Browser, **values: str) -> list[str]:
    """What is listed after a reset and these values of the form's fields."""
    script = "document.getElementById('bar').reset();"
    for name, value in values.items():
        script += f"document.getElementById({name!r}).value = {value!r};"
    browser.run(script + "document.getElementById('bar').dispatchEvent(new Event('input'))")
    return browser.run(SHOWN)


@in_browser
def test_search_and_filters_agree_with_the_catalogue(browser: Browser):
    everything = {m.name for m in catalogue.methods()}
    assert set(choose(browser)) == everything
    shown = choose(browser, branch="D1")
    assert set(shown) == {m.name for m in catalogue.select(family="D1")}
    assert browser.run("return document.getElementById('count').textContent").startswith(f"{len(shown)} of ")
    assert set(choose(browser, training="calibration", branch="B")) == {
        m.name for m in catalogue.select(training="calibration", family="B")
    }
    assert choose(browser, words="magcache retention") == ["magcache"]
    assert choose(browser, words="zebra") == []
    assert browser.run("return !document.getElementById('empty').hidden")
    choose(browser)
    browser.run("document.querySelector('.chip[data-status=planned]').click()")
    assert set(browser.run(SHOWN)) == {m.name for m in catalogue.select(status="planned")}
    browser.run("document.getElementById('clear').click()")
    assert set(browser.run(SHOWN)) == everything


@in_browser
def test_a_link_opens_its_method_even_when_filtered_away(browser: Browser):
    assert "vsa" not in choose(browser, words="teacache")
    browser.run("location.hash = '#vsa'")
    browser.wait("return document.getElementById('vsa').open")
    assert browser.run("return !document.getElementById('vsa').hidden")
    browser.wait(
        "const b = document.getElementById('vsa').getBoundingClientRect(); return b.top >= 0 && b.top < innerHeight"
    )


@in_browser
@pytest.mark.parametrize("width", [1280, 700, 400])
def test_nothing_sticks_out_sideways(browser: Browser, width: int):
    choose(browser)
    browser.resize(width)
    browser.run("document.querySelectorAll('.method').forEach(m => { m.open = true })")
    assert browser.run("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
    over = (
        "return [...document.querySelectorAll('.method *')]"
        ".filter(n => n.getBoundingClientRect().right > document.documentElement.clientWidth)"
        ".map(n => n.className + ': ' + n.textContent.slice(0, 60))"
    )
    assert browser.run(over) == []
    browser.run("document.querySelectorAll('.method').forEach(m => { m.open = false })")


@in_browser
def test_no_request_and_no_error(browser: Browser):
    entries = browser.call("POST", "/se/log", {"type": "performance"})
    sent = [json.loads(e["message"])["message"] for e in entries]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    ours = [p["request"]["url"] for p in asked if p["documentURL"].startswith("file:")]
    assert ours
    assert [a for a in ours if not a.startswith(("file:", "data:"))] == []
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []
