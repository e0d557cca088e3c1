"""The leaderboard in a real browser: it sorts, filters, plots, opens methods, plays clips, and requests nothing."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
from collections.abc import Iterator

import board_fixture as fixture
import numpy as np
import pytest
from PIL import Image
from test_browser import CHROMIUM, DRIVER, Browser

from vivace.report import leaderboard, units
from vivace.report.leaderboard_methods import methods
from vivace.report.leaderboard_values import text

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)
MAIN = "document.querySelector('.board[data-model=tiny] tbody:not(.pins)')"
NAMES = f"return [...{MAIN}.rows].map(r => r.dataset.method)"
READY = "return document.querySelectorAll('.board tbody tr').length > 0"
STILL = (
    "const v = document.querySelectorAll('.stage video')[%d], c = document.createElement('canvas');"
    "[c.width, c.height] = [v.videoWidth, v.videoHeight];"
    "c.getContext('2d').drawImage(v, 0, 0); return c.toDataURL()"
)
FRESH = """
if (!window.first) window.first = {...V.state, columns: [...V.state.columns]};
Object.assign(V.state, window.first, {columns: new Set(window.first.columns)});
V.drawToolbar();
if (location.hash.startsWith('#/m')) location.hash = '#/'; else V.update();
"""
TITLES = {method["id"]: method["title"] for method in methods(fixture.board())}
VIDEOS = "[...document.querySelectorAll('.stage video')]"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, str]]:
    folder = tmp_path_factory.mktemp("leaderboard")
    address = leaderboard.write(fixture.board(), fixture.clips(), folder / "report.html").as_uri()
    process = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        found = (re.search(r"on port (\d+)\.", line) for line in process.stdout)
        browser = Browser(next(match.group(1) for match in found if match), folder / "profile")
        try:
            browser.open(address)
            browser.wait(READY)
            yield browser, address
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=10)
        process.stdout.close()


@pytest.fixture
def browser(driver: tuple[Browser, str]) -> Browser:
    """The page as it is when it is opened; it is loaded once, and every test begins with its first state."""
    found = driver[0]
    found.run(FRESH)
    found.wait("return !document.getElementById('overview').hidden")
    return found


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"const s = document.getElementById({json.dumps(name)}); s.value = {json.dumps(value)};"
        "s.dispatchEvent(new Event(s.tagName === 'INPUT' ? 'input' : 'change', {bubbles: true}))"
    )


def go(browser: Browser, name: str) -> None:
    browser.run(f"location.hash = '#/method/' + encodeURIComponent({json.dumps(name)})")
    browser.wait("return !document.getElementById('method').hidden && document.querySelector('#method h1')")


def sort(browser: Browser, key: str) -> list[str]:
    browser.run(f"document.querySelector('th[data-key=\"{key}\"] button').click()")
    return browser.run(NAMES)


def speeds() -> dict[str, float]:
    rows = [
        r for r in fixture.board()["rows"] if r["environment"] == fixture.GPU and r["model"]["name"] == "tiny"
    ]
    return {r["contender"]["name"]: r["speed_up"]["value"] for r in rows if r["speed_up"]}


def test_it_sorts_by_number_and_keeps_the_anchors_on_top(browser: Browser) -> None:
    wanted = sorted(speeds(), key=lambda name: -speeds()[name])
    assert browser.run(NAMES) == wanted
    assert browser.run("return document.querySelector('th[data-key=speed_up]').ariaSort") == "descending"
    assert sort(browser, "speed_up") == wanted[::-1]
    by_seconds = sort(browser, "seconds")  # 401 ms lies before 1.04 s
    assert by_seconds == wanted
    assert browser.run("return document.querySelector('th[data-key=seconds]').ariaSort") == "ascending"
    unknown = sort(browser, "matched")[-3:]
    assert {"torchao.int8_dynamic", "fastvideo.vsa@keep=0.25"} & set(unknown)
    assert browser.run("return [...document.querySelector('.pins').rows].map(r => r.dataset.method)") == [
        "exact", "floor", "seed",
    ]  # fmt: skip


def test_filters_keep_what_fits(browser: Browser) -> None:
    choose(browser, "text", "mag THRESHOLD")
    assert {name.partition("@")[0] for name in browser.run(NAMES)} == {"diffusers.mag_cache"}
    choose(browser, "text", "")
    choose(browser, "family", "model compression")
    assert browser.run(NAMES) == ["torchao.int8_dynamic"]
    assert (
        browser.run("return document.querySelectorAll('.point:not(.off)').length") == 2
    )  # it and the exact run
    choose(browser, "kind", "plan")
    assert browser.run(NAMES) == []
    browser.run("document.getElementById('clear').click()")
    assert len(browser.run(NAMES)) == fixture.RIVALS


def test_hardware_changes_the_times_and_names_their_place(browser: Browser) -> None:
    first = "return document.querySelector('tr[data-method=fast] td:nth-of-type(2)').textContent"
    assert "ms" in browser.run(first)
    choose(browser, "hardware", fixture.CPU)
    assert browser.run(first).startswith("8.37")
    assert "2-core Example CPU" in browser.run("return document.querySelector('.groups').textContent")
    assert "0.920" in browser.run("return document.querySelector('tr[data-method=fast]').textContent")


def test_models_are_tables_of_their_own(browser: Browser) -> None:
    choose(browser, "model", "")
    assert browser.run("return [...document.querySelectorAll('.board')].map(b => b.dataset.model)") == [
        "tiny", "wan2.1-1.3b",
    ]  # fmt: skip
    choose(browser, "model", browser.run("return V.data.models[1].id"))
    assert browser.run("return document.querySelector('.board tbody:not(.pins)').rows.length") == 2
    assert browser.run("return document.getElementById('plot').closest('section').hidden")


def test_columns_can_be_added(browser: Browser) -> None:
    browser.run("document.querySelector('#columns input[value=lpips_alex]').click()")
    assert browser.run("return document.querySelector('th[data-key=\"quality.lpips_alex\"]') !== null")


def test_every_number_is_written_as_in_the_other_files(browser: Browser) -> None:
    values = [
        {"value": v, "low": v - h if h else None, "high": v + h if h else None}
        for v in (0.00123, 0.152, 1.0, 4.731, -0.0301, 43.3127, 1234.56, 8.0e5, -17.26)
        for h in (None, 0.00042, 0.0183, 0.37, 2.61, 141.0)
    ] + [
        {"value": "inf", "low": None, "high": None},
        {"value": 2.13, "low": "-inf", "high": 3.3},
        {"value": None},
    ]
    said = browser.run(f"return {json.dumps(values)}.map(v => [V.full(v, 'dB'), V.full(v, '', true)])")
    assert said == [[text(v, "dB"), text(v, signed=True)] for v in values]
    numbers = [0.0, 1.5, 999.0, 1023.0, 1024.0, 123456.0, 2.33e9, 7.5e13]
    script = f"return {json.dumps(numbers)}.map(v => [V.bytes(v), V.flops(v)])"
    for number, (size, work) in zip(numbers, browser.run(script), strict=True):
        assert size == units.size(number)
        assert work == (
            units.count(number, "FLOP") if number >= 1000 else f"{units.number(number)}{units.SPACE}FLOP"
        )


def test_the_plot_has_a_point_for_each_contender_and_marks_the_front(browser: Browser) -> None:
    count = "return document.querySelectorAll('.point').length"
    assert browser.run(count) == fixture.RIVALS + 1
    choose(browser, "plot-x", "flops")
    choose(browser, "plot-y", "psnr")
    assert browser.run(count) == fixture.RIVALS  # no PSNR of the exact run to itself
    known = fixture.board()["fronts"][0]["points"]
    owners = {r["id"]: r["contender"]["name"] for r in fixture.board()["rows"]}
    marked = browser.run(
        "return [...document.querySelectorAll('.point.on-front')].map(p => p.dataset.method)"
    )
    assert set(marked) == {owners[p["row"]] for p in known if p["front"]}
    assert "diffusers.mag_cache over fewer steps" in browser.run(
        "return document.getElementById('plot-notes').textContent"
    )
    spots = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('.point')].map(p => [p.dataset.method,"
        "p.querySelector('.dot').getAttribute('transform').match(/[-\\d.]+/g).map(Number)]))"
    )
    rows = {r["contender"]["name"]: r for r in fixture.board()["rows"] if r["quality"].get("psnr")}
    names = sorted(spots)
    x = np.array([spots[n][0] for n in names])
    y = np.array([spots[n][1] for n in names])
    work = np.array([math.log(rows[n]["counts"]["flops"]) for n in names])
    psnr = np.array([rows[n]["quality"]["psnr"]["value"] for n in names])
    assert np.corrcoef(x, work)[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.corrcoef(y, psnr)[0, 1] == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("cost", ["seconds", "nfe", "flops", "peak_bytes"])
def test_every_cost_draws_inside_the_frame(browser: Browser, cost: str) -> None:
    for series in ("attributes", "jod", "lpips_alex", "dynamic_degree"):
        choose(browser, "plot-x", cost)
        choose(browser, "plot-y", series)
        inside = browser.run(
            "const f = document.querySelector('#plot svg').getBoundingClientRect();"
            "return [...document.querySelectorAll('.point .dot')].every(d => { const b = d.getBoundingClientRect();"
            "return b.left >= f.left && b.right <= f.right && b.top >= f.top && b.bottom <= f.bottom; })"
        )
        assert inside, (cost, series)


def test_points_have_words_and_work_with_keys(browser: Browser) -> None:
    browser.run("document.querySelector('.point[data-method=fast]').focus()")
    said = browser.run("return document.querySelector('.point[data-method=fast]').getAttribute('aria-label')")
    assert said.startswith("fast (plan), Attribute accuracy 0.92")
    browser.key("\ue007")  # Enter
    browser.wait("return document.querySelector('#method h1')?.textContent === 'fast'")


def test_a_method_has_an_address(browser: Browser) -> None:
    name = "diffusers.taylorseer@interval=5"
    browser.run(f"document.querySelector('tr[data-method=\"{name}\"] a').click()")
    browser.wait("return !document.getElementById('method').hidden")
    words = browser.run("return document.getElementById('method').innerText")
    assert "%40interval%3D5" in browser.run("return location.hash")
    for part in (
        "taylorseer", "Same method", "The knob interval was swept", "Against exact, 18 steps", "Dynamic degree",
        f"vivace bench {fixture.QUALITY} --contender peer:{name} --out results", "Example GPU 80GB", "8 timed runs",
    ):  # fmt: skip
        assert part in words, part
    browser.run("history.back()")
    browser.wait("return !document.getElementById('overview').hidden")
    go(browser, "no such thing")
    assert "No such method" in browser.run("return document.getElementById('method').textContent")


def test_every_methods_page_draws(browser: Browser) -> None:
    for spec in fixture.CONTENDERS:
        go(browser, spec.name)
        browser.wait(f"return document.title.startsWith({json.dumps(TITLES.get(spec.name, ''))})")
        assert browser.run("return document.querySelectorAll('#method .panel').length") >= 4, spec.name
        assert browser.run("return document.querySelectorAll('.prompt-dot').length") == fixture.PROMPTS, (
            spec.name
        )


def test_players_keep_step_and_show_the_difference(browser: Browser) -> None:
    assert browser.run("return document.querySelectorAll('video').length") == 0  # made when they are wanted
    go(browser, "fast")
    browser.wait(f"return {VIDEOS}.length === 2 && {VIDEOS}.every(v => v.readyState >= 3 && !v.seeking)")
    browser.run("document.activeElement.blur()")
    for frame in (1, 2):
        browser.key("\ue014")  # right arrow
        browser.wait(f"return {VIDEOS}.every(v => !v.seeking)")
        times = browser.run(f"return {VIDEOS}.map(v => v.currentTime)")
        assert times == pytest.approx([(frame + 0.5) / 8] * 2, abs=1e-3)
    browser.key(" ")
    browser.wait("return document.querySelector('.stage video').currentTime > 1")
    browser.key(" ")
    browser.wait(f"return {VIDEOS}.every(v => v.paused && !v.seeking)")
    times = browser.run(f"return {VIDEOS}.map(v => v.currentTime)")
    assert times == pytest.approx([times[0]] * 2, abs=1e-3)
    shot = "const c = document.querySelector('canvas'); c.style.filter = 'none'; return c.toDataURL()"
    different = _pixels(browser.run(shot))
    assert different.max() > 8
    exact, other = (_pixels(browser.run(STILL % index)) for index in (0, 1))
    assert np.abs(different - np.abs(exact - other)).max() <= 1


def _pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_worst_prompts_come_first_and_jump_to_the_player(browser: Browser) -> None:
    go(browser, "near-exact")
    choose(browser, "prompt-series", "psnr")
    row = next(r for r in fixture.board()["rows"] if r["contender"]["name"] == "near-exact" and r["samples"])
    means = np.array(row["samples"]["columns"]["psnr"]).reshape(fixture.PROMPTS, -1).mean(axis=1)
    shown = browser.run(
        "return [...document.querySelectorAll('.worst tbody tr')].map(r => Number(r.dataset.key))"
    )
    assert means[shown] == pytest.approx(
        np.sort(means)[:12], abs=0.01
    )  # the page rounds, and may swap equals
    dot = "document.querySelector('.prompt-dot.has-clip[data-key=\"2\"]')"
    assert fixture.SHOWN[2] in browser.run(f"return {dot}.dataset.tip")
    browser.run(f"{dot}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    browser.wait(
        f"return document.querySelector('.viewer .now').textContent === {json.dumps(fixture.SHOWN[2])}"
    )
    assert browser.run("return document.querySelectorAll('.clip-button')[2].ariaPressed") == "true"


def test_leaving_a_method_lets_go_of_its_clips(browser: Browser) -> None:
    go(browser, "fast")
    browser.wait(f"return {VIDEOS}.length === 2 && {VIDEOS}.every(v => v.readyState >= 3)")
    browser.run("location.hash = '#/'")
    browser.wait("return !document.getElementById('overview').hidden")
    assert browser.run("return document.querySelectorAll('video').length") == 0


def test_text_of_others_is_shown_as_text(browser: Browser) -> None:
    go(browser, "fast")
    browser.run("document.querySelectorAll('.clip-button')[1].click()")
    assert browser.run("return document.querySelector('.viewer .now').textContent") == fixture.SHOWN[1]
    assert browser.run("return document.querySelector('.viewer b')") is None


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("route", ["#/", "#/method/fast"])
def test_no_sideways_scrolling(browser: Browser, width: int, route: str) -> None:
    browser.resize(width)
    try:
        browser.run(f"location.hash = '{route}'")
        browser.wait(f"return document.getElementById('method').hidden === {json.dumps(route == '#/')}")
        client, scroll = browser.run(
            "const e = document.documentElement; return [e.clientWidth, e.scrollWidth]"
        )
    finally:
        browser.resize(0)
    assert scroll == client <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_draws_in_both_schemes(browser: Browser, scheme: str) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": feature})
    browser.run("document.getElementById('plot').scrollIntoView()")
    pixels = _pixels("," + browser._call("GET", "/screenshot"))
    browser._call(
        "POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": []}}
    )
    corner = pixels[4, 4].mean()
    assert corner > 230 if scheme == "light" else corner < 40
    blue = (pixels[..., 2] > 150) & (pixels[..., 0] < 120)
    assert blue.sum() > 300  # the caching family is on the screen


def test_nothing_was_requested_and_nothing_complained(driver: tuple[Browser, str]) -> None:
    browser, address = driver
    assert browser.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    ours = [e["request"]["url"] for e in sent if e["documentURL"].startswith("file:")]
    assert any(url.startswith(address) for url in ours)
    assert {url.split(":")[0] for url in ours} <= {"file", "data", "blob"}
    assert {url.partition("#")[0] for url in ours if url.startswith("file:")} == {address}
