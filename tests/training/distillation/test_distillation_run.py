"""A run's file, record, curve and sheets; what is written is what was validated, and is sampled as it was trained."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from distilling import choices, distil, samples, team_of
from PIL import Image

from vivace.core.errors import ConfigError, WeightsError
from vivace.models.student import student_tensors
from vivace.models.student_artifact import Artifact
from vivace.models.student_scheduler import StudentScheduler
from vivace.tiny.build import build_pipeline
from vivace.tiny.train.clips import ClipShape
from vivace.training.data.encoding import Encoder
from vivace.training.distillation import run as module
from vivace.training.distillation import validation, watch
from vivace.training.distillation.recipe import sample
from vivace.training.distillation.recipes import find
from vivace.training.distillation.team import Network
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.distillation.validation import Validation
from vivace.training.distillation.weights import merged_state
from vivace.training.subject import load_model

TIMES = {"prepared_seconds", "seconds", "curve"}
STORES = {
    "bf16": 0.005,
    "int8": 0.005,
    "int8-delta": 0.006,
    "lora:64": 0.006,
    "int8-lora:64": 0.009,
    "lora:3": None,
}
"""How far weights may be from the averages, over the largest of a tensor; None where the rank does not say."""


# -- derivatives ------------------------------------------------------------------------------------------------------


def test_a_network_that_drops_derivatives_is_refused(small, tmp_path, monkeypatch):
    """Values pass and derivatives do not, as with a custom operation that nobody gave a rule."""
    right = Network._call

    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, x):
            return torch.zeros_like(x)

    monkeypatch.setattr(
        Network, "_call", lambda self, x, s, text: right(self, Dropped.apply(x), Dropped.apply(s), text)
    )
    with pytest.raises(ConfigError, match="ask for derivative=difference"):
        distil("meanflow", small, tmp_path / "a.safetensors", 1)
    with pytest.raises(ConfigError, match="ask for derivative=difference"):
        distil("scm", small, tmp_path / "b.safetensors", 1)


def test_the_gap_of_derivatives_is_told_and_small(small, tmp_path):
    record = distil("scm", small, tmp_path / "s.safetensors", steps=1)
    assert 0.0 <= record["derivative_gap"] < 0.05
    settings = {"derivative": "difference"}
    assert (
        distil("scm", small, tmp_path / "d.safetensors", settings=settings, steps=1)["derivative_gap"] is None
    )


# -- early stop, record, curve, sheets --------------------------------------------------------------------------------


def test_a_run_stops_where_it_no_longer_gets_better(small, tmp_path, monkeypatch):
    answers = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])
    monkeypatch.setattr(Validation, "__call__", lambda *a: {"accuracy": next(answers)})
    record = distil("lcm", small, tmp_path / "s.safetensors", steps=20, patience=3, validate_every=1e-9)
    # The second is the best; three more that are no better, of which one is as good.
    assert record["steps"] == 5
    assert record["finished"]
    assert [v["accuracy"] for v in record["validations"]] == [0.2, 0.5, 0.4, 0.5, 0.3]
    assert record["validation"] == {"accuracy": 0.9}


def test_a_run_that_had_enough_has_nothing_to_add_when_it_is_taken_up(small, tmp_path, monkeypatch):
    answers = iter([0.5, 0.1, 0.7])
    monkeypatch.setattr(Validation, "__call__", lambda *a: {"accuracy": next(answers)})
    right, out = module.save_student, tmp_path / "s.safetensors"
    monkeypatch.setattr(module, "save_student", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    more: dict[str, Any] = {"steps": 20, "patience": 1, "validate_every": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        distil("lcm", small, out, **more)
    monkeypatch.setattr(module, "save_student", right)
    record = distil("lcm", small, out, **more)
    assert record["steps"] == 2
    assert record["validation"] == {"accuracy": 0.7}


def test_a_run_says_everything_and_says_it_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "CURVE_EVERY", 0.0)
    records, curves = [], []
    for name in ("one", "two"):
        out = tmp_path / name / "student.safetensors"
        torch.manual_seed(len(name) + len(records))
        distil("dmd2", small, out, steps=4, settings={"ratio": 2}, validate_every=1e-9, init=None)
        files = {f.name for f in out.parent.iterdir() if f.is_file()}
        sheets = {f"student.{i}.png" for i in (1, 2, 3, 4)}
        assert files == {"student.safetensors", "student.json", "student.curve.jsonl", "student.png"} | sheets
        with Image.open(out.with_suffix(".png")) as sheet:
            assert sheet.width == 8 * 32
            assert sheet.height > 3 * 64
            assert len(set(sheet.convert("L").tobytes())) > 10
        records.append(json.loads(out.with_suffix(".json").read_text()))
        curves.append(out.with_suffix(".curve.jsonl").read_text())
    one, two = ({k: v for k, v in r.items() if k not in TIMES} for r in records)
    assert one == two
    assert curves[0] == curves[1]
    lines = [json.loads(line) for line in curves[0].splitlines()]
    assert [line["update"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {"critic.loss", "critic.gradient", "critic.discriminator"} <= set(lines[0])
    assert {"student.loss", "student.fooled", "student.normaliser"} <= set(lines[2])
    assert lines[1].keys() == {"update", "validation.accuracy"}
    wanted = {"recipe", "paper", "settings", "choices", "teacher", "data", "sampler", "weights", "validation"}
    assert wanted <= set(one)
    assert one["settings"]["ratio"] == 2
    assert one["choices"]["batch"] == 2
    assert one["sampler"]["solver"] == "consistency"
    assert str(small) not in json.dumps(one), "a record says nothing of folders"


def test_tensorboard_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert watch.board(tmp_path) is None


def test_choices_that_cannot_be_are_refused_at_once(small, tmp_path):
    out = tmp_path / "s.safetensors"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"store": "lora:many"}, "stored as"),
        ({"store": "int8-delta:2"}, "stored as"),
        ({"batch": 0}, "nothing to train"),
        ({"patience": 2}, "patience counts"),
        ({"captions": -1}, "0 or more"),
        ({"captions": 0, "validate_every": 1.0}, "need captions"),
        ({"lora": -1}, "0 or more"),
    ]
    for more, what in wrong:
        with pytest.raises(ConfigError, match=what):
            choices(small, out, **more)
    with pytest.raises(ConfigError, match="safetensors"):
        choices(small, tmp_path / "s.pt")


# -- the file is what was validated -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "lora"),
    [
        ("bf16", 0),
        ("int8", 0),
        ("int8-delta", 0),
        ("int8-delta", 2),
        ("lora:64", 0),
        ("int8-lora:64", 0),
        ("lora:3", 2),
    ],
)
def test_what_is_written_is_the_average_and_is_what_is_validated(small, tmp_path, monkeypatch, store, lora):
    kept: dict[str, Any] = {}
    right, averaged = Validation.__call__, DistillationTrainer.averaged

    def look(self, team, recipe, sheet=None):
        module = team.student.module
        kept["seen"] = {k: v.clone() for k, v in merged_state(module).items()}
        return right(self, team, recipe, sheet)

    def remember(self):
        kept["average"] = averaged(self)
        kept["raw"] = {k: v.clone() for k, v in merged_state(self.team.student.module).items()}
        return kept["average"]

    monkeypatch.setattr(Validation, "__call__", look)
    monkeypatch.setattr(DistillationTrainer, "averaged", remember)
    out = tmp_path / "s.safetensors"
    distil("meanflow", small, out, steps=5, settings={"rate": 3e-3}, store=store, lora=lora)
    base = load_model(str(small))[0].transformer.state_dict()
    written = base | dict(student_tensors([out], lambda name: base[name]))
    assert written.keys() == kept["seen"].keys() == kept["average"].keys()
    for name, value in written.items():
        assert torch.equal(value.float(), kept["seen"][name]), name
        if (share := STORES[store]) is not None:
            error = (value.float() - kept["average"][name]).abs().max()
            assert float(error) <= share * float(kept["average"][name].abs().max()) + 1e-6, name
    moved = [k for k in written if not torch.allclose(kept["raw"][k], kept["average"][k], atol=1e-5)]
    assert moved, "averages and last weights are the same, so this says nothing"
    assert any(k.startswith("second_time.") for k in written)


def test_a_run_starts_from_a_student_with_and_without_lora(small, tmp_path):
    first = tmp_path / "first.safetensors"
    distil("pcm", small, first, steps=3, settings={"rate": 3e-3}, store="bf16")
    base = load_model(str(small))[0].transformer.state_dict()
    want = dict(student_tensors([first], lambda name: base[name]))
    for lora in (0, 2):
        # Nearly no learning: what is written is where it started.
        out = tmp_path / f"next{lora}.safetensors"
        record = distil(
            "lcm", small, out, steps=1, settings={"rate": 1e-9}, init=first, lora=lora, store="bf16"
        )
        found = dict(student_tensors([out], lambda name: base[name]))
        # LoRA layers take up the difference, and are added to the weights again.
        close = 2.0**-8 if lora else 0.0
        assert all(torch.allclose(v, want[k], rtol=close, atol=1e-6) for k, v in found.items())
        assert record["init"]["file"] == "first.safetensors"
        assert len(record["init"]["sha256"]) == 64
    flow = tmp_path / "flow.safetensors"
    distil("anystep", small, flow, steps=1)
    with pytest.raises(WeightsError, match="flow map"):
        distil("lcm", small, tmp_path / "other.safetensors", init=flow)


def test_a_student_of_a_rank_learns_on_within_it(small, tmp_path, monkeypatch):
    """What is written at the rank of the layers is what was trained, also from another student of that rank."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    common: dict[str, Any] = {"lora": 3, "store": "lora:3", "captions": 0, "steps": 4}
    distil("pcm", small, first, settings={"rate": 3e-2}, **common)
    kept: dict[str, Any] = {}
    averaged = DistillationTrainer.averaged

    def remember(self):
        kept["average"] = averaged(self)
        return kept["average"]

    monkeypatch.setattr(DistillationTrainer, "averaged", remember)
    distil("lcm", small, second, settings={"rate": 3e-2}, init=first, **common)
    base = load_model(str(small))[0].transformer.state_dict()
    one, two = (dict(student_tensors([f], lambda name: base[name])) for f in (first, second))
    moved = 0
    for name, value in two.items():
        delta = kept["average"][name] - base[name]
        # What rounding to bf16 leaves.
        assert (value - kept["average"][name]).norm() <= 0.01 * delta.norm() + 1e-6, name
        moved += bool((value - one[name]).norm() > 0.05 * (one[name] - base[name]).norm() > 0.0)
    assert moved > 5, "the second run changed nothing, so this says nothing"


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"), [("pcm", 3), ("lcm", 1), ("lcm", 4), ("meanflow", 2), ("dmd2", 4)]
)
def test_validation_samples_as_the_pipeline_will(name, steps):
    """The recipe's sampling against diffusers' own loop with the scheduler that the file's sampler asks for."""
    recipe = find(name)(steps=steps)
    team, rows = team_of(recipe.roles), samples()
    if "second_time" in recipe.roles:
        with torch.no_grad():
            team.student.module.second_time.linear_2.weight.normal_(
                generator=torch.Generator().manual_seed(1)
            )
    noise = torch.randn(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    text = rows.rows([0, 1, 2])["text"].float()
    found = sample(team, recipe, noise, text)
    # As it is read from a file: through JSON.
    told = Artifact.from_json(Artifact(sampler=recipe.sampler(3.0)).to_json()).sampler
    assert told.solver is not None
    assert told.steps == steps
    scheduler = StudentScheduler(solver=told.solver, levels=told.levels())
    if told.solver != "flow_map":
        pipeline: Any = build_pipeline(0)
        pipeline.register_modules(transformer=team.student.module.eval(), scheduler=scheduler)
        with torch.no_grad():
            want = pipeline(
                prompt_embeds=text, latents=noise, guidance_scale=1.0, num_inference_steps=steps, output_type="latent",
                num_frames=9, height=32, width=32,
            ).frames  # fmt: skip
        assert torch.equal(found, want)
    else:
        # Sessions tell the gap as one number, training as one for each sample: another product, and another rounding.
        for count in (3, 1):
            scheduler.set_timesteps(steps)
            x = noise
            for i, time in enumerate(scheduler.timesteps):
                gap = scheduler.sigmas[i] - scheduler.sigmas[i + 1]
                team.student.module.second_time.gap = gap.expand(count)
                with torch.no_grad():
                    v = team.student.module(x, time.expand(3), text, return_dict=False)[0]
                x = scheduler.step(v, time, x, return_dict=False)[0]
            assert torch.equal(found, x) if count == 3 else torch.allclose(found, x, atol=1e-4)
    # A sample is its own: others in the batch do not change it, but for the order of sums.
    alone = sample(team, recipe, noise[1:2], text[1:2])
    assert torch.allclose(alone, found[1:2], atol=1e-4)


def test_validation_is_the_same_whatever_is_made_at_a_time(small, monkeypatch):
    pipeline, _ = load_model(str(small))
    recipe, team = find("lcm")(), team_of()
    right: Any = Validation.decode
    kept: list[Any] = []
    made = []

    def decode(self, latents):
        kept.append(latents)
        return right(self, latents)

    monkeypatch.setattr(Validation, "decode", decode)
    for portion in (16, 2):
        kept.clear()
        monkeypatch.setattr(validation, "PORTION", portion)
        torch.manual_seed(portion)
        check = Validation(
            Encoder(pipeline, torch.device("cpu")), ClipShape(frames=9, height=32, width=32), 5
        )
        said = [check(team, recipe) for _ in range(2)]
        assert said[0] == said[1]
        latents = torch.cat(kept)
        assert torch.equal(latents[:5], latents[5:])
        made.append((latents[:5], said[0]))
    assert torch.allclose(made[0][0], made[1][0], atol=1e-4)
    assert made[0][1] == made[1][1]
