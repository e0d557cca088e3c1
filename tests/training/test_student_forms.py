"""Students in the form in which they run: attention against dense float64, deployment, rounding, files that add up."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from vivace import Plan, accelerate
from vivace.core.errors import ConfigError, ModelError, WeightsError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention import tiles
from vivace.kernels.block_attention.op import runner
from vivace.kernels.int8_linear.int_mm import quantise_rows
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.models.student import merge_students, save_student, student_tensors
from vivace.models.student_artifact import KEY, SPARSE, Artifact, Sampler
from vivace.techniques.attention.sla import SparseLinearAttention
from vivace.techniques.attention.vsa import VideoSparseAttention
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.techniques.distillation.student import plan_of
from vivace.testing import models
from vivace.tiny.train.common import Processes
from vivace.training.data.samples import MemorySet
from vivace.training.distillation import student_forms as forms
from vivace.training.distillation.recipes.regression import Guidance, Progressive
from vivace.training.distillation.team import assemble
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.distillation.weights import merged_state, tied
from vivace.training.losses.derivative import total_derivative

ALONE = Processes(0, 1, torch.device("cpu"))
CLIP = {"num_frames": 33, "height": 64, "width": 64}  # 9 x 4 x 4 tokens of Wan
GRID = TokenGrid(9, 4, 4)
METHODS = ("vsa", "sla", "block_topk")


def wan(**options):
    return models.pipeline("wan2.1", **{"layers": 3} | options)


def learner(pipe, seed=0):
    """A transformer that has learned something."""
    module = copy.deepcopy(pipe.transformer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.0 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def sparse(pipe, method, grid=GRID, *, density=0.3, seed=0):
    """A student whose trained tensors of attention are not where they began."""
    module = learner(pipe, seed)
    form = forms.attention(module, for_module(module), grid, method, density=density)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(pipe, batch=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    config = pipe.transformer.config
    return {
        "hidden_states": torch.randn(batch, config.in_channels, 9, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 400.0),
        "encoder_hidden_states": torch.randn(batch, 16, config.text_dim, generator=generator),
    }


def store(module, path, **told):
    """A student file with the weights in full precision."""
    state = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
    save_file(state, path, metadata={KEY: Artifact(**told | forms.told(module)).to_json()})
    return str(path)


@torch.no_grad()
def seen_calls(pipe, techniques, **call):
    """Arguments and results of the transformer in a session with techniques."""
    calls = []

    def keep(module, args, kwargs, out):
        calls.append(({k: v for k, v in kwargs.items() if k != "return_dict"}, out[0]))

    with accelerate(pipe, Plan(techniques)) as fast:
        handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        out = fast("a red ball", seed=3, output_type="latent", **call)
        handle.remove()
    return calls, out


def sparse_evaluations(receipt, name):
    """How often the transformer ran with a technique's sparse attention."""
    return next(t.effects["sparse_evaluations"] for t in receipt.techniques if t.name == name)


# -- attention by itself ----------------------------------------------------------------------------------------------


def by_hand(q, k, v, grid, block_slots, method, density, own, bias=None):
    """Sparse attention of (B, S, H, D) in float64: a dense softmax under a mask that is made block by block."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    first = grid.text if grid.text_first else 0
    parts = [[first + int(t) for t in row if t >= 0] for row in block_slots]
    mean = [torch.stack([x[:, :, p].mean(2) for p in parts], 2) for x in (q, k, v)]
    scores = mean[0] @ mean[1].transpose(-1, -2) * scale
    rank = scores.detach().argsort(-1, descending=True)
    n, top = len(parts), math.ceil(density * len(parts) - 1e-9)
    keep = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, rank[..., :top], True)
    drop = torch.zeros(scores.shape, dtype=torch.bool)
    drop.scatter_(-1, rank[..., n - int(0.1 * n) :], True)
    allowed = torch.ones(*scores.shape[:2], grid.tokens, grid.tokens, dtype=torch.bool)
    spread = torch.zeros_like(v)
    f = [torch.softmax(x, -1) for x in (q, k)]
    for i, rows in enumerate(parts):
        for j, keys in enumerate(parts):
            here = keep[:, :, i, j, None, None].expand(-1, -1, len(rows), len(keys))
            allowed[:, :, torch.tensor(rows)[:, None], torch.tensor(keys)] = here
        if method == "vsa":
            coarse = torch.softmax(scores[:, :, i], -1)[:, :, None] @ mean[2]
            spread[:, :, rows] = own["gate"].double()[:, None, None] * coarse
        if method == "sla":
            weights = f[0][:, :, rows] @ f[1].transpose(-1, -2)
            middle = torch.zeros(*scores.shape[:2], grid.tokens, dtype=torch.float64)
            for j, keys in enumerate(parts):
                middle[:, :, keys] = (~keep & ~drop)[:, :, i, j, None].double()
            weights = weights * middle[:, :, None]
            linear = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-30)
            spread[:, :, rows] = linear @ own["proj.weight"].double().T + own["proj.bias"].double()
    logits = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias.double()
    out = torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1) @ v + spread
    return out.transpose(1, 2)


def site_of(method, grid, density, heads, head_dim):
    """The form of one site alone, and its trained tensors by name."""
    adapter = for_module(wan(layers=1).transformer)
    form = forms.SparseAttention(adapter, {}, method, density, 64)
    own = form.add("transformer.blocks.0.attn1", heads, head_dim, torch.device("cpu"))
    form.layout = form.layout_of(grid, torch.device("cpu"))
    form.top = math.ceil(density * form.layout.video_blocks - 1e-9)
    form.choose = forms.select(forms.SELECT, device="cpu").run
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return form, own


@pytest.mark.parametrize("way", ["gather", "masked", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_attention_and_its_gradients_are_those_of_a_dense_mask_in_float64(method, way):
    """A clip that blocks do not divide, text in front, a key mask; gradients to q, k, v and what is trained."""
    grid = TokenGrid(5, 6, 7, text=20, text_first=True)
    form, own = site_of(method, grid, 0.3, 2, 8)
    form.plain = way == "plain"
    form.attend = runner("gather") if way == "gather" else None
    generator = torch.Generator().manual_seed(0)
    q, k, v, aim = (torch.randn(2, grid.tokens, 2, 8, generator=generator) for _ in range(4))
    mask = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    mask[1, ..., 3:9] = False
    given = [x.requires_grad_() for x in (q, k, v)]
    trained = dict(own.named_parameters())
    out = form(*given, mask, own)
    got = torch.autograd.grad((out * aim).sum(), [*given, *trained.values()])
    block = tiles.block_size(grid, 64)
    slots = tiles.in_rows(grid, block) if method == "sla" else tiles.in_tiles(grid, block)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    want = by_hand(*given, grid, slots, method, 0.3, trained, bias)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad((want * aim).sum(), [*given, *trained.values()])
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-4)


# -- in a transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan2.1", "hunyuan"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_runs(method, family, tmp_path):
    """The pipeline with the file's own plan does what the student did, to 1e-4; joint attention with text too."""
    pipe = wan() if family == "wan2.1" else models.pipeline(family, layers=1)
    call = models.call(family) | CLIP | {"num_inference_steps": 2}
    model = describe_pipeline(pipe, defaults={k: v for k, v in call.items() if isinstance(v, (int, float))})
    module = sparse(pipe, method, model.grid(model.workload()))
    plan = plan_of(store(module, tmp_path / "student.safetensors"))
    assert [t.card.name for t in plan] == ["student_checkpoint", forms.TECHNIQUE[method]]
    assert not [p for p in Plan(plan).problems(model) if p.kind != "untested"]
    calls, out = seen_calls(pipe, plan, **call)
    assert sparse_evaluations(out.receipt, plan[1].card.name) == len(calls)
    exact = learner(pipe)
    for given, got in calls:
        with torch.no_grad():
            want = module(**given, return_dict=False)[0]
            dense = exact(**given, return_dict=False)[0]
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-4 * float(want.abs().max()))
        assert (dense - want).norm() > 1e-2 * want.norm()


def test_a_student_begins_as_the_best_blocks_alone():
    pipe = wan()
    adapter = for_module(pipe.transformer)
    outs = []
    for method in ("vsa", "block_topk"):
        module = copy.deepcopy(pipe.transformer)
        forms.attention(module, adapter, GRID, method, density=0.3)
        outs.append(module(**inputs(pipe))[0])
    assert torch.equal(*outs)
    module = copy.deepcopy(pipe.transformer)
    forms.attention(module, adapter, GRID, "vsa", density=1.0)
    exact = pipe.transformer(**inputs(pipe))[0]
    torch.testing.assert_close(module(**inputs(pipe))[0], exact, rtol=1e-4, atol=1e-5)
    assert (outs[0] - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.parametrize("method", ["vsa", "sla"])
def test_extras_are_the_file_of_the_technique(method, tmp_path):
    pipe = wan()
    module = sparse(pipe, method)
    file = tmp_path / "own.safetensors"
    save_file(forms.extras(module), file)
    kind = {"vsa": VideoSparseAttention, "sla": SparseLinearAttention}[method]
    assert not [p for p in kind(file=str(file)).check(describe_pipeline(pipe)) if p.severity == "error"]
    assert not any(k.startswith(SPARSE) for k in forms.extras(module))
    assert forms.extras(sparse(pipe, "block_topk")) == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_twin_on_plain_operations_is_the_student(method, monkeypatch):
    """On its own parameters; the student goes on with kernels."""
    monkeypatch.setattr(forms, "MASKED", {})
    pipe = wan(layers=2)
    module = sparse(pipe, method)
    want = module(**inputs(pipe))[0]
    twin = forms.plain(tied(module))
    assert all(a is b for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    torch.testing.assert_close(twin(**inputs(pipe))[0], want, rtol=1e-4, atol=1e-4)
    assert module.sparse_attention.attend is not None
    assert twin.sparse_attention.attend is None


@pytest.mark.parametrize("method", METHODS)
def test_plain_operations_have_a_forward_mode(method):
    """Where no choice flips between them, differences agree."""
    grid = TokenGrid(5, 6, 7, text=20, text_first=True)
    form, own = site_of(method, grid, 0.3, 2, 8)
    form.plain = True
    generator = torch.Generator().manual_seed(2)
    q, k, v, *ways = (torch.randn(2, grid.tokens, 2, 8, generator=generator) for _ in range(6))

    def along(x, s):
        q, k, v = x
        return form(*(y + s.view(-1, 1, 1, 1) * w for y, w in zip((q, k, v), ways, strict=True)), None, own)

    x, s = torch.stack([q, k, v]), torch.full((2,), 0.4)
    slope = [
        total_derivative(lambda _, s: along(x, s), q, s, torch.zeros_like(q), derivative=d)
        for d in ("jvp", "difference")
    ]
    assert slope[1].abs().max() > 0.1
    torch.testing.assert_close(*slope, rtol=1e-2, atol=1e-2)


def test_blocks_that_are_computed_again_and_compiled_give_the_same(monkeypatch):
    monkeypatch.setattr(forms, "MASKED", {})
    pipe = wan(layers=1)
    given = inputs(pipe)
    grads = []
    for way in ("as it is", "checkpointed", "compiled"):
        module = sparse(pipe, "vsa").train()
        if way == "checkpointed":
            module.enable_gradient_checkpointing()
        if way == "compiled":
            module.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        module(**given)[0].square().sum().backward()
        grads.append([p.grad for p in module.sparse_attention.parameters()])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path):
    pipe = wan()
    adapter, module = for_module(pipe.transformer), learner(pipe)
    for words, grid, settings in (
        ("not radial with", GRID, {"method": "radial"}),
        ("density from 0.01 to 1", GRID, {"density": 0.0}),
        ("64 or 128", GRID, {"block": 32}),
        ("nothing to choose from", TokenGrid(1, 2, 2), {}),
    ):
        with pytest.raises(ConfigError, match=words):
            forms.attention(module, adapter, grid, **settings)
    forms.attention(module, adapter, GRID)
    with pytest.raises(ConfigError, match="already"):
        forms.attention(module, adapter, GRID)
    with pytest.raises(ModelError, match="other tokens"):
        module.sparse_attention(*torch.zeros(3, 1, 5, 2, 12), None, forms.Tensors("vsa", 2, 12, "cpu"))
    with pytest.raises(ConfigError, match="not int4"):
        forms.linears(module, adapter, "int4")
    lora = assembled(pipe, lora=2).student.module
    with pytest.raises(ConfigError, match="LoRA"):
        forms.linears(lora, adapter)
    file = tmp_path / "student.safetensors"
    for attention in ({"technique": "none"}, {"method": "vsa"}, {"technique": "vsa", "settings": {"to": 1}}):
        save_file({"a": torch.zeros(1)}, file, metadata={KEY: json.dumps({"attention": attention})})
        with pytest.raises(WeightsError, match="asks for a technique"):
            plan_of(str(file))


def test_a_plan_without_the_form_is_told_of_it(tmp_path):
    pipe = wan()
    module = sparse(pipe, "sla")
    forms.linears(module, for_module(module))
    checkpoint, *others = plan_of(store(module, tmp_path / "student.safetensors"))

    def told(*techniques):
        found = Plan([checkpoint, *techniques]).problems(describe_pipeline(pipe))
        return {p.kind: p.message for p in found if p.technique == "student_checkpoint"}

    assert "with sla attention" in told()["attention"]
    assert "with w8a8 linear layers" in told()["linears"]
    assert told(*others) == {}


# -- rounded linears --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int8-delta"])
@pytest.mark.parametrize("method", ["w8a8", "w8"])
def test_rounded_linears_run_as_they_were_trained(method, kind, tmp_path):
    """Stored as int8 the codes are those of training; a store of deltas moves some by one."""
    pipe = wan()
    module = learner(pipe)
    made = forms.linears(module, for_module(module), method)
    assert len(made) == len(for_module(module).expert("transformer", module).linears)
    state, base = module.state_dict(), pipe.transformer.state_dict()
    assert state.keys() == base.keys()
    file = save_student(tmp_path / "student.safetensors", state, base, Artifact(**forms.told(module)), kind)
    checkpoint, rounded = plan_of(str(file))
    assert rounded == Int8Linear(mode=forms.MODES[method])

    read = base | dict(student_tensors([file], base.__getitem__))
    trained, stored = (
        [
            quantise_rows(x[k])[0].int()
            for k in sorted(x)
            if k.endswith("weight") and "blocks" in k and x[k].ndim == 2
        ]
        for x in (state, read)
    )
    moved = torch.cat([(a - b).flatten().abs() for a, b in zip(trained, stored, strict=True)])
    assert moved.max() <= (kind != "int8")
    assert moved.float().mean() < 0.1

    module.load_state_dict(read)
    # On a CPU weights alone are rounded by torchao, which cuts their range finer.
    backend = "auto" if method == "w8a8" else "reference"
    call = CLIP | {"num_inference_steps": 2, "max_sequence_length": 16}
    calls, _ = seen_calls(pipe, [checkpoint, rounded.replace(backend=backend)], **call)
    exact = learner(pipe)
    for given, got in calls:
        with torch.no_grad():
            want = module(**given, return_dict=False)[0]
            unrounded = exact(**given, return_dict=False)[0]
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-4 * float(want.abs().max()))
        assert (unrounded - want).norm() > 1e-3 * want.norm()


def test_gradients_pass_rounding():
    """They are those of the exact layer at the rounded input and weight, on either kind of operations."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 16), torch.randn(3, 7, 24, requires_grad=True)
    layer = forms.RoundedLinear(linear, "w8a8")
    assert layer.weight is linear.weight
    aim = torch.randn(3, 7, 16)
    found = []
    for plain in (False, True):
        layer.plain = plain
        out = layer(x)
        found.append([out, *torch.autograd.grad((out * aim).sum(), [x, layer.weight, layer.bias])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    rounded = (linear.weight.detach() / step).round() * step
    torch.testing.assert_close(found[0][1], aim @ rounded, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0][0], linear(x), atol=1e-5)
    _, slope = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, torch.ones_like(x) @ rounded.T, rtol=1e-4, atol=1e-5)


# -- training and files -----------------------------------------------------------------------------------------------


def assembled(pipe, **settings):
    return assemble(
        pipe.transformer, {"blocks": pipe.transformer.blocks}, frozenset(),
        empty=torch.zeros(16, pipe.transformer.config.text_dim), guidance=2.0, shift=3.0,
        device=torch.device("cpu"), **settings,
    )  # fmt: skip


def trained(pipe, recipe, method="", updates=3, lora=0, linears=""):
    """A trainer after some updates."""
    team = assembled(pipe, lora=lora)
    adapter = for_module(pipe.transformer)
    if method:
        forms.attention(team.student.module, adapter, GRID, method, density=0.3)
    if linears:
        forms.linears(team.student.module, adapter, linears)
    given = inputs(pipe, batch=4)
    data = MemorySet({"latents": given["hidden_states"], "text": given["encoder_hidden_states"]})
    trainer = DistillationTrainer(ALONE, team, recipe, data, batch=2)
    for update in range(1, updates + 1):
        trainer.update(update, update / updates)
    return trainer


@pytest.mark.parametrize(("method", "lora", "linears"), [("vsa", 0, "w8a8"), ("sla", 2, "")])
def test_extra_tensors_learn_beside_the_weights(method, lora, linears):
    pipe = wan(layers=2)
    before = copy.deepcopy(pipe.transformer.state_dict())
    trainer = trained(pipe, Guidance(rate=1e-2, decay=0.5), method, lora=lora, linears=linears)
    module, teacher = trainer.team.student.module, trainer.team.teacher.module
    state = merged_state(module)
    own = {k for k in state if k.startswith(SPARSE)}
    assert own == {SPARSE + k for k in forms.extras(module)}
    assert state.keys() - own == before.keys()
    assert all(state[k].abs().max() > 0.0 for k in own)
    assert trainer.averaged().keys() == state.keys()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(isinstance(p, (forms.SparseAttention, forms.RoundedLinear)) for p in teacher.modules())
    again = trained(pipe, Guidance(rate=1e-2, decay=0.5), method, updates=0, lora=lora, linears=linears)
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for one in (trainer, again):
        one.update(4, 0.5)
    ends = [one.averaged() for one in (trainer, again)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in state)


@pytest.mark.parametrize("method", ["vsa", "sla"])
def test_a_sparse_student_and_a_fast_one_add_up(method, tmp_path):
    """TurboDiffusion's way (arXiv 2512.16093): trained apart from one base, they run together."""
    pipe = wan()
    base = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    files, states = [], []
    for name, recipe, form in (
        ("sparse", Guidance(rate=2e-3), method),
        ("fast", Progressive(steps=2, substeps=2, rate=2e-3), ""),
    ):
        trainer = trained(pipe, recipe, form)
        states.append(trainer.averaged())
        sampler = recipe.sampler(3.0) if name == "fast" else Sampler()
        artifact = Artifact(recipe=recipe.name, sampler=sampler, **forms.told(trainer.team.student.module))
        files.append(save_student(tmp_path / f"{name}.safetensors", states[-1], base, artifact))
    merged = merge_students(files, [1.0, 1.0], tmp_path / "merged.safetensors")
    plan = plan_of(str(merged))
    assert [t.card.name for t in plan] == ["student_checkpoint", "student_sampler", method]
    out = seen_calls(pipe, plan, max_sequence_length=16, **CLIP)
    receipt = out[1].receipt
    assert receipt.nfe == 2
    assert sparse_evaluations(receipt, method) == 2
    module = copy.deepcopy(pipe.transformer)
    forms.attention(module, for_module(module), GRID, method, density=0.3)
    total = {k: v + sum(s[k] - v for s in states) if k in base else v for k, v in (states[0] | base).items()}
    total |= {k: v for k, v in states[0].items() if k.startswith(SPARSE)}
    module.load_state_dict(total)
    given, got = out[0][0]
    with torch.no_grad():
        want = module(**given, return_dict=False)[0]
        exact = pipe.transformer(**given, return_dict=False)[0]
    # Deltas are stored in eight bits, twice.
    assert (got - want).norm() < 0.1 * (want - exact).norm()
