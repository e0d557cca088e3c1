"""Who shares weights with whom, what precision is where, and that checkpointing and compiled blocks change nothing."""

from __future__ import annotations

import os

import pytest
import torch
from distilling import HERE, samples, team_of, trainer_of

from vivace.models import second_time
from vivace.tiny.build import build_pipeline
from vivace.training.distillation.sharding import clip
from vivace.training.distillation.weights import full_precision, lower, merged_state, wear
from vivace.training.losses.derivative import total_derivative

SECOND = frozenset({"second_time"})
JUDGED = frozenset({"critic", "head"})


def shared(team):
    """Whether every parameter of the eager network is the student's own."""
    own = dict(team.student.module.named_parameters())
    twin = dict(team.eager.module.named_parameters())
    return own.keys() == twin.keys() and all(own[k] is twin[k] for k in own)


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 4, generator=draw)
    return x, torch.tensor([0.8, 0.4]), torch.tensor([0.5, 0.1]), torch.randn(2, 4, 32, generator=draw)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_eager_student_is_tied_through_all_that_happens_to_weights(lora):
    trainer = trainer_of("meanflow", lora=lora)
    team = trainer.team
    assert shared(team)
    trainer.update(1, 0.5)
    assert shared(team)
    state = trainer.state_dict()
    trainer.average.store()
    assert shared(team)
    other = trainer_of("meanflow", lora=lora)
    other.load_state_dict(state)
    assert shared(other.team)
    wear(other.team.student.module, merged_state(team.student.module).items())
    assert shared(other.team)
    rows, s = samples().rows([0, 1]), torch.tensor([0.8, 0.4])
    for one in (trainer.team, other.team):
        pair = [
            n.flow_map(rows["text"].float())(rows["latents"].float(), s, 0.5 * s)
            for n in (one.student, one.eager)
        ]
        assert torch.equal(*pair)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_eager_student_has_a_gap_of_its_own_and_hands_gradients_on(lora, batch):
    x, s, r, text = batch
    team = team_of(SECOND, lora=lora)
    own, twin = (second_time.of(n.module) for n in (team.student, team.eager))
    assert own is not None
    assert twin is not None
    assert own is not twin
    embedder = team.eager.module.condition_embedder.time_embedder
    hooks = [getattr(h, "__self__", None) for h in embedder._forward_hooks.values()]
    assert hooks == [twin], "the hook of the copy must read the gap of the copy"
    with torch.no_grad():
        own.linear_2.weight.normal_(generator=torch.Generator().manual_seed(1))
    own.gap = torch.full((2,), 0.77)
    near, far = (team.eager.flow_map(text)(x, s, end) for end in (s, r))
    assert not torch.allclose(near, far, atol=1e-3)
    assert torch.equal(twin.gap, s - r)
    assert torch.equal(own.gap, torch.full((2,), 0.77)), "and leaves the student's alone"
    assert torch.equal(far, team.student.flow_map(text)(x, s, r))
    far.square().mean().backward()
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    if lora:
        block = team.student.module.blocks[0].attn1.to_q
        assert bool(block.lora_B["default"].weight.grad.any())
        assert block.base_layer.weight.grad is None


def test_a_derivative_sees_the_second_time(batch):
    x, s, r, text = batch
    team = team_of(SECOND)
    second = second_time.of(team.student.module)
    with torch.no_grad():
        second.linear_2.weight.normal_(generator=torch.Generator().manual_seed(1))
    found = team.eager.flow_map(text)
    exact, near = (
        total_derivative(lambda y, t: found(y, t, r), x, s, x.flip(0), derivative=kind)
        for kind in ("jvp", "difference")
    )
    assert float((exact - near).norm() / exact.norm()) < 0.02
    plain = team.eager.velocity(text)
    second.gap = second_time.of(team.eager.module).gap = 0.3
    still = total_derivative(plain, x, s, x.flip(0))
    assert float((exact - still).norm() / exact.norm()) > 0.02, "with the gap held still it is another one"


def test_differences_are_taken_in_float32_whatever_is_around(batch):
    """On a GPU the student computes in bf16 under autocast, and products use TF32; the eager network must not."""
    x, s, _, text = batch
    team = team_of(full=True)
    seen = []

    def look(module, args, kwargs):
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.cuda.matmul.allow_tf32))

    team.eager.module.register_forward_pre_hook(look, with_kwargs=True)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            around = team.eager.velocity(text)(x, s)
        assert torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(ZeroDivisionError), full_precision():
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == [(False, False)]
    assert torch.equal(around, team.eager.velocity(text)(x, s))
    assert next(team.eager.module.parameters()).dtype == torch.float32
    # Forward mode needs no such digits and keeps TF32.
    assert not team_of().eager.full


def test_the_teacher_is_lowered_as_diffusers_loads_it(small):
    from diffusers import WanTransformer3DModel

    loaded = WanTransformer3DModel.from_pretrained(small / "transformer", torch_dtype=torch.bfloat16)
    own = WanTransformer3DModel.from_pretrained(small / "transformer")
    lower(own)
    kinds = {k: v.dtype for k, v in loaded.state_dict().items()}
    assert kinds == {k: v.dtype for k, v in own.state_dict().items()}
    assert {torch.float32, torch.bfloat16} <= set(kinds.values())


def test_merged_lora_is_what_the_layers_compute(batch):
    x, s, _, text = batch
    torch.manual_seed(0)
    team = team_of(lora=3)
    assert team.student.module.blocks[0].ffn.net[2].scaling["default"] == 1.0
    with torch.no_grad():
        for name, parameter in team.student.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    merged = merged_state(team.student.module)
    plain = build_pipeline(0).transformer.__class__.from_config(team.teacher.module.config)
    plain.load_state_dict(merged)
    other = team_of()
    wear(other.student.module, merged.items())
    want = team.student.velocity(text)(x, s)
    assert torch.allclose(other.student.velocity(text)(x, s), want, atol=1e-5)
    assert not torch.allclose(team.teacher.velocity(text)(x, s), want, atol=1e-2)
    # Worn by the LoRA student itself, its layers are of no effect, and the weights are in.
    wear(team.student.module, merged.items())
    assert torch.allclose(team.student.velocity(text)(x, s), want, atol=1e-5)
    assert wear(team.student.module, [("no.such", torch.zeros(1))]) == {"no.such"}


def test_the_norm_of_gradients_is_of_all_of_them():
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    one.grad, two.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    assert float(clip([one, two, torch.nn.Parameter(torch.zeros(1))], 1.0)) == pytest.approx(5.0)
    assert torch.allclose(one.grad, torch.tensor([0.6, 0.0, 0.0]), atol=1e-5)


def gradients(name, settings, **more):
    """Of every learner, after the turns of an update, before any step."""
    trainer = trainer_of(name, settings, **more)
    for optimizer in trainer.optimizers.values():
        optimizer.step = lambda: None
    trainer.update(2, 0.5)
    return {
        f"{role}.{i}.{k}": p.grad
        for role, modules in trainer.learners.items()
        for i, m in enumerate(modules)
        for k, p in m.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize(("name", "settings"), [("lcm", {}), ("dmd2", {"ratio": 2})])
@pytest.mark.parametrize("lora", [0, 2])
def test_recomputed_blocks_have_the_same_gradients(name, settings, lora):
    """Also those that come through hidden states which a discriminator looks at."""
    plain = gradients(name, settings, lora=lora)
    again = gradients(name, settings, lora=lora, checkpointing=True)
    assert plain.keys() == again.keys()
    assert any(k.startswith("critic.1") for k in plain) == (name == "dmd2")
    for key, value in plain.items():
        assert torch.allclose(value, again[key], rtol=1e-4, atol=1e-7), key


def test_hidden_states_have_gradients_where_blocks_are_recomputed(batch):
    x, s, _, text = batch
    found = []
    for checkpointing in (False, True):
        team = team_of(JUDGED, checkpointing=checkpointing)
        calls = []
        team.critic.module.blocks[0].register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        y = x.clone().requires_grad_(True)
        velocity, logits = team.judge({"text": text})(y, s)
        assert logits.shape == (2, 1)
        logits.sum().backward()
        found.append((y.grad, team.critic.module.blocks[0].attn1.to_q.weight.grad))
        assert len(calls) == (2 if checkpointing else 1)
        assert velocity.grad_fn is not None
        blocks = team.critic.module.blocks
        assert not any(type(b).__name__ == "Tap" for b in blocks), "the blocks are as they were"
    assert bool(found[0][0].any())
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("VIVACE_COMPILE_TESTS"), reason="takes minutes; set VIVACE_COMPILE_TESTS=1"
)
@pytest.mark.parametrize(("name", "settings"), [("lcm", {}), ("dmd2", {"ratio": 2})])
def test_compiled_blocks_learn_the_same(name, settings):
    states = []
    for compiled in (False, True):
        torch._dynamo.reset()
        trainer = trainer_of(name, settings, compiled=compiled)
        if compiled:
            assert trainer.team.student.module.blocks[0]._compiled_call_impl is not None
            assert trainer.team.eager.module.blocks[0]._compiled_call_impl is None
        for update in (1, 2):
            trainer.update(update, 0.5)
        states.append(trainer.state_dict()["modules"])
    for role, modules in states[0].items():
        for one, two in zip(modules, states[1][role], strict=True):
            for key, value in one.items():
                assert torch.allclose(value, two[key], atol=2e-5), (role, key)
    assert HERE.world == 1
