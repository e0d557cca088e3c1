"""What a distillation takes, told beforehand, against real updates: work, weights, gradients, activations."""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vivace.core.live_bytes import LiveBytes
from vivace.models import pruning
from vivace.models.describe import describe_pipeline
from vivace.models.loading import describe
from vivace.testing import models
from vivace.tiny.train.common import Processes
from vivace.training.data.samples import MemorySet
from vivace.training.distillation.estimate import Estimate, _built, estimate
from vivace.training.distillation.recipe import Recipe
from vivace.training.distillation.recipes import RECIPES
from vivace.training.distillation.team import assemble
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.losses.paths import distance

CPU = torch.device("cpu")
BATCH = 2


@pytest.fixture(scope="module")
def wan():
    return models.pipeline("wan2.1", layers=1)


def trainer_of(pipe, recipe, **options) -> DistillationTrainer:
    model = describe_pipeline(pipe)
    workload = model.workload(frames=9, height=32, width=32, text=16)
    call = model.adapter.dummy_call(model, workload, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    kinds = {"text": call["encoder_hidden_states"], "latents": call["hidden_states"]}
    kinds["noise"] = kinds["latents"]
    data = {k: torch.randn((4, *kinds[k].shape[1:]), generator=generator).bfloat16() for k in recipe.fields}
    anatomy = pruning.anatomy(model.adapter, pipe.transformer)
    team = assemble(
        pipe.transformer, anatomy.lists, recipe.roles,
        empty=kinds["text"][0], guidance=workload.guidance, shift=1.0, device=CPU, **options,
    )  # fmt: skip
    return DistillationTrainer(Processes(0, 1, CPU), team, recipe, MemorySet(data), batch=BATCH)


def told(pipe, recipe, **options) -> Estimate:
    model = describe_pipeline(pipe)
    workload = model.workload(frames=9, height=32, width=32, text=16)
    return estimate(model, recipe, workload, batch=BATCH, mixed=False, **options)


def counted(trainer: DistillationTrainer, updates: int) -> float:
    """FLOPs of an update as torch counts them, the mean over the first ones.

    With unfused attention, as torch counts none in the fused kernel of a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for update in range(1, updates + 1):
            trainer.update(update, 0.5)
    return counter.get_total_flops() / updates


LONG = ("dmd2", "rcm", "tdm", "adversarial")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG[1:] else n for n in RECIPES]
)
def test_flops_are_those_of_real_updates(wan, name: str) -> None:
    known = inspect.signature(RECIPES[name]).parameters
    small = {k: v for k, v in {"substeps": 2, "ratio": 2}.items() if k in known and name != "adversarial"}
    # Of two steps, so that a few updates see each of them about as often as the mean does.
    recipe = RECIPES[name](**small, **({} if name == "guidance" else {"steps": 2}))
    found = told(wan, recipe)
    updates = 2 * getattr(recipe, "ratio", 1) if "critic" in recipe.roles else 1
    real = counted(trainer_of(wan, recipe), updates)
    assert found.flops == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dmd2", {}), ("meanflow", {}), ("lcm", {"lora": 4}), ("lcm", {"checkpointing": True})],
)
def test_weights_gradients_and_optimizers_are_those_of_a_real_team(wan, name: str, options: dict) -> None:
    recipe = RECIPES[name](**({"ratio": 1} if name == "dmd2" else {}))
    found, trainer = told(wan, recipe, **options), trainer_of(wan, recipe, **options)
    trainer.update(1, 0.5)
    team, parts = trainer.team, dict(found.parts)
    activations = parts.pop("activations")
    own = [p for modules in trainer.learners.values() for m in modules for p in m.parameters()]
    moments = [v for o in trainer.optimizers.values() for s in o.state.values() for k, v in s.items()]
    gradients = sum(p.grad.nbytes for p in own if p.grad is not None)
    assert parts["gradients"] == gradients
    assert parts["optimizers"] == sum(v.nbytes for v in moments if v.ndim)
    assert parts["averaged weights"] == sum(v.nbytes for v in trainer.average.values)
    assert parts["teacher"] == weights([team.teacher.module])
    assert parts["student"] == weights([team.student.module, team.eager.module])
    assert parts.get("critic", 0) == weights(trainer.learners.get("critic", []))
    assert found.bytes == sum(parts.values()) + activations


def weights(modules) -> int:
    held = {
        t.data_ptr(): t.untyped_storage().nbytes()
        for m in modules
        for t in (*m.parameters(), *m.buffers())
        if t.numel()
    }
    return sum(held.values())


@dataclass
class Held:
    """What autograd keeps for the backward pass, by torch's own hooks: bytes of storages that are no parameters."""

    parameters: set[int]

    def __post_init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def test_activations_are_a_little_more_than_what_autograd_keeps(wan) -> None:
    recipe = RECIPES["reflow"]()
    trainer = trainer_of(wan, recipe)
    held = Held({p.untyped_storage().data_ptr() for p in trainer.team.student.module.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda t: t):
        trainer.update(1, 0.5)
    found = told(wan, recipe).parts["activations"]
    assert held.bytes < found < 1.35 * held.bytes


@pytest.mark.parametrize("name", ["lcm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("scm", "dmd2"))])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_the_live_tensors_of_a_real_turn(wan, name: str, checkpointing: bool) -> None:
    recipe = RECIPES[name](steps=2)
    options = {"checkpointing": checkpointing}
    trainer = trainer_of(wan, recipe, **options)
    for modules in trainer.learners.values():
        for p in (p for m in modules for p in m.parameters()):
            p.grad = torch.zeros_like(p)
    from vivace.training.chance import Chance
    from vivace.training.distillation.recipe import Turn

    batch, peaks = trainer.batches(1), []
    for role in trainer.learners:
        gc.collect()
        with LiveBytes() as live:
            loss, _ = getattr(recipe, role)(Turn(trainer.team, batch, Chance(CPU, 0, 1, role), 200, 0.5))
            loss.backward()
        peaks.append(live.peak)
    # The attention of a processor writes its output otherwise than the stand-in, so not to the byte.
    assert told(wan, recipe, **options).parts["activations"] == pytest.approx(max(peaks), rel=0.1)


@pytest.mark.slow
def test_deep_models_are_told_by_shallow_ones(monkeypatch) -> None:
    pipe, recipe = models.pipeline("wan2.1", layers=5), RECIPES["lcm"]()
    assert _built(describe_pipeline(pipe), recipe) == (2, 3)
    assert _built(describe_pipeline(pipe), RECIPES["dmd2"]()) == (3, 4)
    quick = told(pipe, recipe, checkpointing=True)
    monkeypatch.setattr("vivace.training.distillation.estimate.FEW", {False: (5,)})
    whole = told(pipe, recipe, checkpointing=True)
    assert quick.flops == pytest.approx(whole.flops, rel=1e-6)
    assert quick.forward_flops == pytest.approx(whole.forward_flops, rel=1e-6)
    assert quick.parts["activations"] == pytest.approx(whole.parts["activations"], rel=0.05)
    assert {k: v for k, v in quick.parts.items() if k != "activations"} == {
        k: v for k, v in whole.parts.items() if k != "activations"
    }


@pytest.mark.slow
def test_bf16_checkpointing_and_lora_change_what_they_should() -> None:
    model, recipe = describe("wan2.1-1.3b"), RECIPES["reflow"]()
    workload = model.workload(frames=17, height=240, width=416)
    plain = estimate(model, recipe, workload, batch=1, mixed=False)
    mixed = estimate(model, recipe, workload, batch=1)
    few = estimate(model, recipe, workload, batch=1, checkpointing=True, lora=16)
    assert mixed.flops == pytest.approx(plain.flops)
    assert (mixed.plain_flops, plain.plain_flops) == (pytest.approx(0, abs=1e-3 * plain.flops), plain.flops)
    assert mixed.parts["teacher"] < 0.51 * plain.parts["teacher"]
    assert 0.4 < mixed.parts["activations"] / plain.parts["activations"] < 1.0
    assert few.parts["activations"] < 0.5 * mixed.parts["activations"]
    assert few.parts["gradients"] < 0.05 * mixed.parts["gradients"]
    assert mixed.seconds(1e12, 1e12, 1.0) == pytest.approx(mixed.flops / 1e12)


def test_a_recipe_that_goes_by_values_is_refused(wan) -> None:
    class Choosy(Recipe):
        name = "choosy"
        paper = summary = ""

        def student(self, turn):
            x = turn.clean
            scale = turn.clean.mean().item()
            return distance(turn.velocity(x, turn.times()), scale * x).mean(), {}

    with pytest.raises(Exception, match="what choosy takes cannot be told before it runs"):
        told(wan, Choosy())
