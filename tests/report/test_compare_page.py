"""The page as HTML: self-contained, complete, escaped, tolerant of thin receipts."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vivace.core.errors import ConfigError, OutputError
from vivace.report.compare_page import ComparePage, QualityCurve, render, write

VOID = {"meta", "link", "input", "img", "br", "hr"}


class Document(HTMLParser):
    """Collects elements and text, and notices tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += f" {data} "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def document(page: ComparePage) -> Document:
    return Document(render(page))


def test_nothing_is_fetched(page: ComparePage, document: Document) -> None:
    html = re.sub(r"data:video/mp4;base64,[A-Za-z0-9+/=]+", "data:", render(page))
    anchors = {attributes["href"] for attributes in document.all("a")}
    assert all(address.startswith("https://arxiv.org/abs/") for address in anchors)
    assert set(re.findall(r"(?:https?:)?//[a-z][^\s\"'<>)]+", html, re.IGNORECASE)) <= anchors
    for tag, attributes in document.elements:
        for key in ("src", "srcset", "href", "poster", "action"):
            value = attributes.get(key, "data:")
            assert tag == "a" or value.startswith(("data:", "#")), (tag, key, value[:60])
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(m for m in document.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none';")


def test_videos_are_inside(page: ComparePage, document: Document) -> None:
    sources = [video["src"] for video in document.all("video")]
    clips = [page.exact_video, page.fast_video, page.difference_video]
    assert [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in sources] == clips
    assert len(Document(render(replace(page, difference_video=None))).all("video")) == 2


def test_everything_is_said(page: ComparePage, document: Document) -> None:
    said = " ".join(document.text.split())
    for wanted in [
        page.prompt, "Seed 7", "Model tiny", "29 frames, 128\u00d7128, 16 fps", "Difference \u00d78",
        "Speed-up", "NFE", "FLOPs share", "PSNR", "5 / 6", "LPIPS skipped: no backbone weights were given",
        "fast run: the cache threshold was calibrated at 50 steps", "first block cache", "branches skipped 7",
        "no GPU: the fused kernel needs CUDA", "Example CPU", page.command, '"name": "fast"', "orange",
    ]:  # fmt: skip
        assert wanted in said, wanted
    assert document.all("a")[0]["href"] == "https://arxiv.org/abs/2411.19108"


def test_it_is_accessible(document: Document) -> None:
    for tag in ("button", "input", "video"):
        assert all(a.get("aria-label") or a.get("id") == "copy" for a in document.all(tag)), tag
    for figure in document.all("svg"):
        assert figure.get("aria-hidden") == "true" or (
            figure.get("role") == "img" and figure.get("aria-label")
        )
    identifiers = [a["id"] for _, a in document.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert len(document.all("h1")) == 1
    assert document.all("html")[0]["lang"] == "en"


def test_the_script_gets_finite_json(page: ComparePage) -> None:
    values = (float("inf"),) * page.frames
    curve = QualityCurve(
        name="psnr",
        version="v",
        unit="dB",
        higher_is_better=True,
        per_frame=values,
        pooled=values[0],
        worst=0,
    )
    html = render(replace(page, quality=[curve]))
    raw = html.split('id="data">')[1].split("</script>")[0]
    data = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (data["fps"], data["frames"]) == (16, 29)
    assert data["charts"][0]["texts"][0] == "identical"
    assert "identical" in html


def test_foreign_text_is_escaped(page: ComparePage) -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    receipt = {
        "techniques": [{"name": evil, "effects": {evil: evil}, "cite": f"javascript:alert(1) {evil}"}],
        "kernels": [{"op": evil, "choice": evil, "why": evil}],
        "environment": {evil: evil},
        "plan": {"name": evil},
        "warnings": [evil],
        "steps": [{"index": 0, "branches": [{"branch": evil, "action": "computed", "by": evil}]}],
    }
    curve = QualityCurve(name=evil, version=evil, unit=evil, higher_is_better=True, skipped=evil)
    html = render(replace(page, prompt=evil, command=evil, plan=evil, fast_receipt=receipt, quality=[curve]))
    document = Document(html)
    assert len(document.all("script")) == 2
    assert document.all("img") == []
    assert document.all("a") == []


@pytest.mark.parametrize("steps", [[], [{}], [{"branches": None}, {"seconds": 0.5}], [{"branches": [{}]}]])
def test_thin_receipts_still_make_a_page(page: ComparePage, steps: list) -> None:
    thin = replace(page, exact_receipt={}, fast_receipt={"steps": steps}, quality=(), attributes=())
    said = Document(render(thin)).text
    assert "Plan fast beside the exact run." in said
    assert "Speed-up" not in said


def test_cites_may_be_data(page: ComparePage) -> None:
    cite = {"title": "A cache", "arxiv": "2411.19108", "code": "https://example.org/a"}
    html = render(replace(page, fast_receipt={"techniques": [{"name": "a", "cite": cite}]}))
    assert '<a href="https://arxiv.org/abs/2411.19108"' in html
    html = render(
        replace(page, fast_receipt={"techniques": [{"name": "a", "cite": "see https://example.org/a."}]})
    )
    assert '<a href="https://example.org/a"' in html


def test_slower_is_called_slower(page: ComparePage) -> None:
    swapped = replace(page, exact_receipt=page.fast_receipt, fast_receipt=page.exact_receipt)
    assert "4.26\u00d7 slower than exact" in render(swapped)


def test_values_must_match_the_frames(page: ComparePage) -> None:
    with pytest.raises(ConfigError, match="psnr has 29 values for 28 frames"):
        replace(page, frames=28)
    with pytest.raises(ConfigError, match="fps above 0"):
        replace(page, fps=0)


def test_write_is_all_or_nothing(page: ComparePage, tmp_path: Path) -> None:
    target = write(page, tmp_path / "deep" / "compare.html")
    assert target.read_text(encoding="utf-8") == render(page)
    assert [item.name for item in target.parent.iterdir()] == ["compare.html"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write .*; free some space or choose another folder"):
        write(page, tmp_path / "file" / "compare.html")
    with pytest.raises(OutputError):
        write(page, tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["deep", "file"]


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, vivace.report.compare_page as page;"
        "print([m for m in ('torch', 'diffusers', 'av', 'vivace.evaluation') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
