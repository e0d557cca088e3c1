"""`vivace report` from a real store: the files, what they say, and what a wrong folder gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from vivace.cli.report import make_report, report
from vivace.core.errors import VivaceError
from vivace.evaluation.record import (
    Contender,
    Estimate,
    MetricRef,
    Model,
    Quality,
    Record,
    Samples,
    Spread,
    TaskRef,
    Timing,
)
from vivace.evaluation.store import Store

PROMPTS = 12
app = typer.Typer()
app.command()(report)


def record(
    name: str, kind: str, seconds: float, flops: float, clips: dict[str, str], level: float
) -> tuple[Record, Samples]:
    """A contender of a task of the user's own, with PSNR where it is not the reference."""
    rng = np.random.default_rng(len(name))
    column = tuple(level + rng.normal(size=PROMPTS))
    known = kind != "exact"
    psnr = Estimate(mean=level, low=level - 0.5, high=level + 0.5, prompts=PROMPTS, samples=PROMPTS)
    quality = Quality(
        fidelity={"psnr": psnr} if known else {},
        metrics=(MetricRef(name="psnr", version=1, group="fidelity", series=("psnr",)),) if known else (),
        reference="exact",
    )
    made = Record(
        created="2026-11-24T12:00:00+00:00",
        code={"version": "0.1.0", "commit": "0" * 40, "dirty": False},
        contender=Contender(name=name, kind=kind, group=name),  # type: ignore[arg-type]
        model=Model(name="mine", pipeline="WanPipeline", weights="random", dtype="float32"),
        task=TaskRef(name="mine@1", sha256="ab" * 32),
        environment={"cpu": "Example", "cores": 2, "versions": {"torch": "2.13.0"}, "fingerprint": "f" * 12},
        counts={"nfe": 20.0, "flops": flops},
        timing=Timing(
            stages={"total": Spread.of([seconds * f for f in (0.99, 1.0, 1.02, 0.98)])},
            batch=1,
            warmups=3,
            interleaved_with=("exact",),
        ),
        quality=quality,
        clips=clips,
        command=f"vivace bench --plan {name}",
    )
    place = tuple(range(PROMPTS))
    samples = Samples(
        ids=tuple(f"{i}.0" for i in place),
        prompt=place,
        k=(0,) * PROMPTS,
        seed=place,
        columns={"psnr": column} if known else {"count.nfe": (20.0,) * PROMPTS},
    )
    return made, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("bench")
    (home.parent / "secret.mp4").write_bytes(b"not of this store")
    store = Store(home)
    one, two = store.add_clip(b"clip one"), store.add_clip(b"clip two")
    store.add(*record("exact", "exact", 4.0, 1e12, {"0.0": one}, 0.0))
    store.add(
        *record(
            "fast", "plan", 1.0, 2e11, {"0.0": two, "1.0": "../secret.mp4", "2.0": "clips/gone.mp4"}, 31.0
        )
    )
    return home


def test_a_store_becomes_four_files(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "out" / "page.html"
    answer = CliRunner().invoke(app, [str(folder), "-o", str(page), "--title", "My <run>"])
    assert answer.exit_code == 0, answer.output
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "page.csv",
        "page.html",
        "page.md",
        "page.parquet",
    ]
    assert "2 contenders, 2 records" in answer.output
    html = page.read_text()
    assert "<title>My &lt;run&gt; | Vivace</title>" in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))  # type: ignore[union-attr]
    fast = next(m for m in data["methods"] if m["name"] == "fast")
    row = data["rows"][fast["rows"][0]]
    assert row["speed_up"]["value"] == pytest.approx(4.0, rel=0.02)
    assert row["work_share"]["value"] == pytest.approx(0.2)
    # Only files of the store itself go into the page, whatever a record names.
    assert list(row["clips"]) == ["0.0"]
    assert len(re.findall(r'id="clip-\d+"', html)) == 2
    words = page.with_suffix(".md").read_text()
    assert "My <run>" in words
    assert "31.0 [30.5, 31.5]" in words
    assert page.with_suffix(".csv").read_text().count(",psnr,dB,higher,31.0,30.5,31.5,12,") == 1


def test_the_page_lies_in_the_folder_by_default(folder: Path) -> None:
    _, files = make_report(folder)
    assert [f.relative_to(folder).as_posix() for f in files] == [
        "report.html", "report.md", "report.csv", "report.parquet",
    ]  # fmt: skip
    assert all(f.is_file() for f in files)


@pytest.mark.parametrize(
    ("place", "more", "says"),
    [
        ("nowhere", {}, "there is no folder"),
        (".", {}, "holds no records"),
        ("store", {"task": "other@1"}, "no task in this store is called 'other@1'"),
        ("store", {"output": Path("page.pdf")}, "must end in .html"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    folder: Path, tmp_path: Path, place: str, more: dict[str, str | Path], says: str
) -> None:
    target = folder if place == "store" else tmp_path / place
    with pytest.raises(VivaceError, match=says) as caught:
        make_report(target, **more)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
