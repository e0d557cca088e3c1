"""Training aware of quantisation: numbers as deployed, gradients through rounding, ranks that go, files that fit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from vivace import Plan, accelerate
from vivace.calibration.artifact import model_hash
from vivace.core.errors import ConfigError, PlanError
from vivace.kernels.quant_linear import formats, int_mm, reference
from vivace.kernels.quant_linear.spec import Recipe
from vivace.models.quantized import TrainedLinears
from vivace.techniques.compression.quantized_linear import QuantizedLinear
from vivace.tiny.build import TinyConfig, build_pipeline
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Budget, Processes
from vivace.tiny.train.latents import LatentSet, encode_clips
from vivace.training import quantization as training
from vivace.training.quantization_layers import RankSchedule, StudentLinear, rounded_tokens, rounded_weight
from vivace.training.quantization_loss import DistillationLoss
from vivace.training.quantization_trainer import Choices, QuantizationTrainer, deployed, fit

ALONE = Processes(0, 1, torch.device("cpu"))
W4A4 = Recipe(weights="int4", activations="int4", group=32, rotate=True, low_rank=4)
SMALL = TinyConfig(heads=2, head_dim=32, layers=3, ffn_dim=128, text_dim=32, text_layers=1, vae_dim=8,
                   latent_channels=8)  # fmt: skip
SETTINGS = {"weights": "int4", "activations": "int4", "group": 32, "rotate": "hadamard", "low_rank": 4}


def pipeline():
    pipe = build_pipeline(3, SMALL)
    torch.manual_seed(7)
    with torch.no_grad():  # an output that all blocks have a part in
        for parameter in pipe.transformer.blocks.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    return pipe


def latents(pipe, count=4) -> LatentSet:
    shape = ClipShape(frames=5, height=32, width=32, supersample=1)
    return encode_clips(pipe.vae, pipe.tokenizer, ALONE, shape, count=count, stream=1, portion=2)


def trainer(pipe=None, **changes) -> QuantizationTrainer:
    choices = Choices(**({"recipe": W4A4, "schedule": RankSchedule(rank=8), "rate": 1e-3} | changes))
    return QuantizationTrainer(ALONE, pipe or pipeline(), choices)


def layer(columns=64, rows=48, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    out = nn.Linear(columns, rows)
    with torch.no_grad():
        out.weight[:, 5] *= 8.0
    return out


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize(
    ("name", "group"), [("int4", 0), ("int4", 32), ("int8", 0), ("int8", 32), ("nvfp4", 0), ("mxfp4", 0)]
)
def test_weights_round_as_the_formats_say(name, group, columns):
    weight = layer(columns).weight.detach().clone()
    weight[3] = 0.0
    codes = formats.quantise(weight, name, group, tensor=name == "nvfp4")
    assert torch.equal(rounded_weight(weight, Recipe(weights=name, group=group)), formats.dequantise(codes))


@pytest.mark.parametrize("columns", [64, 50])
def test_tokens_round_as_nvfp4_says(columns):
    x = torch.randn(40, columns)
    x[3], x[4, :16] = 0.0, 1e-12
    grid = torch.tensor(
        [0.0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -2.5, -5.0, -0.75, -1.75, -6.0, 4.0]
    )
    x[5, :16] = grid
    want = formats.rounded(x, "nvfp4")
    assert torch.equal(rounded_tokens(x, "nvfp4")[0], want)
    assert want[5, 6] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(weights="int4", activations="int4"),
        W4A4,
        Recipe(weights="int4", activations="int8", group=32, low_rank=4),
        Recipe(weights="int4", activations="none", group=32),
        Recipe(weights="nvfp4", activations="nvfp4", rotate=True),
    ],
)
def test_a_student_without_training_is_the_quantised_layer(recipe, dtype):
    """Another code path, the same numbers: rotation, scales, codes, branch and bias."""
    linear = layer().to(dtype)
    smooth = torch.linspace(0.5, 2.0, 64)
    x = torch.randn(2, 9, 64).to(dtype)
    student = StudentLinear(linear, recipe, smooth=smooth)
    want = reference.quantise(linear, recipe, smooth)(x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    torch.testing.assert_close(student(x), want, **tolerance)


@pytest.mark.parametrize("recipe", [W4A4, Recipe(weights="nvfp4", activations="nvfp4", rotate=True)])
def test_mixed_precision_trains_the_network_that_runs_in_16_bits(recipe):
    """Under autocast, as on a GPU: float32 weights inside, the rounding and the branch of a bf16 layer."""
    linear, x = layer(), torch.randn(9, 64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(parameter.bfloat16().float())
    student = StudentLinear(linear, recipe)
    with torch.autocast("cpu", torch.bfloat16):
        got = student(x)
    want = reference.quantise(linear.bfloat16(), recipe)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-2)
    got.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in student.parameters())


def test_hidden_states_can_be_learnt_too():
    pipe = pipeline()
    choices = Choices(recipe=W4A4, schedule=RankSchedule(rank=4))
    data = latents(pipe, 2)
    losses = {}
    for hidden in (0.0, 1.0):
        run = QuantizationTrainer(ALONE, pipe, choices, loss=DistillationLoss(hidden=hidden))
        losses[hidden] = float(run.step(data, 2, 0.0))
        assert not run.student.blocks[0]._forward_hooks
    assert losses[1.0] > losses[0.0]


def test_gradients_are_those_of_the_product_that_was_rounded():
    linear, x = layer(), torch.randn(7, 64)
    student = StudentLinear(linear, Recipe(weights="int4", activations="int4", group=32))
    given, gradient = x.clone().requires_grad_(), torch.randn(7, 48)
    student(given).backward(gradient)
    weight = rounded_weight(linear.weight.detach(), student.recipe)
    torch.testing.assert_close(given.grad, gradient @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        student.weight.grad, gradient.T @ formats.rounded(x, "int4"), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(student.bias.grad, gradient.sum(0))


def test_the_branch_starts_as_the_error_of_rounding_and_leaves_rank_by_rank():
    linear, x = layer(), torch.randn(200, 64)
    recipe = Recipe(weights="int4", activations="none", group=0, low_rank=4)
    exact = linear(x)
    errors = {}
    for auxiliary in (0, 6, 20):
        student = StudentLinear(linear, recipe, auxiliary=auxiliary)
        errors[auxiliary] = float((student(x) - exact).detach().norm())
    assert errors[20] < 0.6 * errors[0]
    assert errors[20] < errors[6] < errors[0]
    whole = student(x)
    student.sort_branch(20)
    torch.testing.assert_close(student(x), whole, rtol=1e-2, atol=2e-2)  # bf16 factors, other ones
    student.set_gain(20, 10, 0.5)
    assert student.gain.tolist() == [1.0] * 14 + [0.5] * 10
    with pytest.raises(ValueError, match="still there"):
        student.trained()
    for ranks in (10, 5, 0):
        student.sort_branch(ranks)
        assert torch.linalg.matrix_rank(student.up @ student.down) == 4 + ranks
    assert set(student.trained()) == {"weight", "scale", "down", "up", "bias"}
    assert student.trained()["down"].shape == (4, 64)


def test_the_schedule_halves_ranks_and_ends_before_the_run():
    schedule = RankSchedule(rank=8, start=0.2, stop=0.6)
    assert schedule.ranks == [8, 4, 2, 1, 0]
    assert schedule.at(0.0) == (0, 8, 4, 1.0)
    assert schedule.at(0.25) == (0, 8, 4, pytest.approx(0.5))
    assert schedule.at(0.31)[:3] == (1, 4, 2)
    assert schedule.at(0.6) == schedule.at(1.0) == (4, 0, 0, 0.0)
    weights = [schedule.at(0.2 + 0.0099 * i)[3] for i in range(11)]
    assert weights == sorted(weights, reverse=True)
    assert RankSchedule(rank=0).at(0.0) == (0, 0, 0, 0.0)
    with pytest.raises(ValueError, match="no schedule"):
        RankSchedule(start=0.7, stop=0.6)


@pytest.mark.parametrize("changes", [{}, {"lora": 8, "rate": 1e-3}])
def test_training_brings_the_deployed_network_nearer_to_the_exact_one(changes):
    pipe = pipeline()
    run = trainer(pipe, **changes)
    data = latents(pipe)
    torch.manual_seed(0)
    held = [run.pairs(data, 4) for _ in range(2)]

    def error(network) -> float:
        with torch.no_grad():
            return sum(float((p.run(network) - p.run(run.exact)).norm()) for p in held)

    before = error(deployed(run.exact, run.choices, None, None))
    frozen = {k: v.clone() for k, v in run.exact.state_dict().items()}
    for step in range(60):
        run.step(data, 4, step / 60)
    run.anneal(1.0)
    network = deployed(run.exact, run.choices, run.trained_linears("", {}), None)
    assert error(network) < 0.8 * before
    # What is deployed is what was trained. Products in another order may put an activation on the other side of a
    # border between two of its few codes, so a few values differ by more than roundings.
    for pairs in held:
        with torch.no_grad():
            found, wanted = pairs.run(network), pairs.run(run.student)
        assert ((found - wanted).abs() > 1e-3 + 1e-3 * wanted.abs()).float().mean() < 0.02
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    for name, value in run.exact.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    if changes:
        fixed = StudentLinear(dict(run.exact.named_modules())["blocks.0.attn1.to_q"], W4A4)
        assert torch.equal(run.layers["transformer.blocks.0.attn1.to_q"].weight, fixed.weight)


def test_a_run_taken_up_again_is_the_same_run(tmp_path):
    options = {"batch": 2, "kept": {"clips": 4, "settings": "s"}}
    pipe = pipeline()
    data = latents(pipe)
    whole = trainer(pipe)
    fit(whole, data, Budget(None, 8), tmp_path / "whole.ckpt", **options)
    part = trainer(pipe)
    # A stage of the auxiliary branch ends before the interruption and others after it.
    fit(part, data, Budget(None, 8), tmp_path / "part.ckpt", stop_after=3, **options)
    torch.manual_seed(99)
    again = trainer(pipe)
    state = training.taken_up(tmp_path / "part.ckpt", "s", ALONE)
    found = fit(again, data, Budget(None, 8), tmp_path / "part.ckpt", state=state, **options)
    assert found["steps"] == 8
    for name, value in whole.parts.state_dict().items():
        assert torch.equal(again.parts.state_dict()[name], value), name
    for a, b in zip(again.average.values, whole.average.values, strict=True):
        assert torch.equal(a, b)
    assert part.parts.state_dict()["0.gain"].tolist() != whole.parts.state_dict()["0.gain"].tolist()
    with pytest.raises(ConfigError, match="other settings"):
        training.taken_up(tmp_path / "part.ckpt", "t", ALONE)


def test_the_loss_weighs_what_guidance_multiplies_and_objects():
    exact, mask = torch.randn(2, 3, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[:, :, :, :2] = 1.0
    same = exact + 0.1
    apart = exact + 0.1 * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    loss = DistillationLoss(guided=1.0, guidance=4.0)
    assert loss(exact, exact, mask) == 0.0
    assert loss(same, exact, mask) == pytest.approx(0.02, rel=1e-4)  # 0.01 + 0.1 ** 2
    assert loss(apart, exact, mask) == pytest.approx(0.01 + 0.7**2, rel=1e-4)
    inside = torch.where(mask.bool(), exact + 0.1, exact)
    outside = torch.where(mask.bool(), exact, exact + 0.1)
    assert loss(inside, exact, mask) == pytest.approx(2.0 * float(loss(outside, exact, mask)), rel=1e-4)
    blocks = [torch.ones(2, 3), torch.ones(2, 3)]
    hidden = DistillationLoss(hidden=2.0)
    assert hidden.of_blocks([b + 0.5 for b in blocks], blocks) == pytest.approx(0.5)


def trained_file(pipe, path, **changes) -> TrainedLinears:
    run = trainer(pipe)
    data = latents(pipe, 2)
    for step in range(2):
        run.step(data, 2, step / 2)
    run.anneal(1.0)
    file = run.trained_linears(model_hash(pipe), {"steps": 2})
    file.save(path)
    return file


CALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


def clip(pipe, techniques):
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red sphere", seed=1, **CALL)


def test_the_technique_runs_the_trained_codes_and_undoes_them(tmp_path):
    pipe = pipeline()
    path = tmp_path / "trained.safetensors"
    file = trained_file(pipe, path)
    modules, biases = dict(pipe.transformer.named_modules()), dict(pipe.transformer.named_parameters())
    exact = clip(pipe, ()).raw.frames
    technique = QuantizedLinear(**SETTINGS, trained=str(path))
    with accelerate(pipe, Plan([technique])):
        q = pipe.transformer.blocks[1].attn1.to_q
        assert isinstance(q, int_mm.IntMatmulLinear)
        parts = file.layers["transformer.blocks.1.attn1.to_q"]
        for part, value in (("weight", q.weight), ("scale", q.scale), ("bias", q.bias), ("up", q.up.weight)):
            assert torch.equal(value, parts[part]), part
    out = clip(pipe, [technique])
    effects = out.receipt.techniques[0].effects
    assert effects["linears_trained"] == effects["linears"] == 30
    assert effects["bytes_trained"] == effects["bytes_after"]
    untrained = clip(pipe, [technique.replace(trained="")]).raw.frames
    assert not torch.equal(out.raw.frames, untrained)
    assert dict(pipe.transformer.named_modules()) == modules
    assert all(biases[name] is p for name, p in pipe.transformer.named_parameters())
    assert torch.equal(clip(pipe, ()).raw.frames, exact)
    # Full steps have the old weights and the old biases too.
    full = clip(pipe, [technique.replace(full_first=2)])
    assert torch.equal(full.raw.frames, exact)


def test_files_that_do_not_fit_are_refused_with_a_sentence(tmp_path):
    pipe = pipeline()
    path = tmp_path / "trained.safetensors"
    file = trained_file(pipe, path)
    (tmp_path / "bad.safetensors").write_text("nothing")
    foreign = TrainedLinears(family="ltx", model_hash="", recipe=file.recipe, layers=file.layers)
    other = TrainedLinears(family="wan", model_hash="0" * 16, recipe=file.recipe, layers=file.layers)
    some = dict(list(file.layers.items())[1:])
    fewer = TrainedLinears(family="wan", model_hash="", recipe=file.recipe, layers=some)
    cases = {
        "there is no file of trained": {"trained": str(tmp_path / "x")},
        "cannot be read": {"trained": str(tmp_path / "bad.safetensors")},
        "trained with group 32 and not 64": {"group": 64},
        "trained with low_rank 4 and not 0": {"low_rank": 0},
        "smooth 0.0 and not 0.5": {"smooth": 0.5},
        "leave mixed and maxima out": {"mixed": "m.json"},
        "these settings leave alone": {"skip_blocks": 1},
        "family ltx": {"trained": str(foreign.save(tmp_path / "foreign.safetensors"))},
        "made for other weights": {"trained": str(other.save(tmp_path / "other.safetensors"))},
        "no trained layer transformer.blocks.0": {"trained": str(fewer.save(tmp_path / "few.safetensors"))},
        "not to be quantised here": {"roles": "attention"},
    }
    for sentence, changes in cases.items():
        technique = QuantizedLinear(**(SETTINGS | {"trained": str(path)} | changes))
        with pytest.raises((PlanError, ConfigError), match=sentence):
            clip(pipe, [technique])
    assert not hasattr(pipe.transformer.blocks[0].attn1.to_q, "recipe")


def test_the_command_writes_layers_and_a_record(tmp_path, capsys):
    pipeline().save_pretrained(tmp_path / "model")
    out = tmp_path / "w4a4.safetensors"
    given = (
        f"--model {tmp_path / 'model'} --group 32 --rotate hadamard --low-rank 4 --smooth 0.5 --auxiliary 4 "
    )
    given += (
        f"--steps 2 --batch 1 --clips 2 --portion 2 --eval-clips 2 --size 5 32 32 --device cpu --out {out}"
    )
    record = training.main(given.split())
    assert json.loads(out.with_suffix(".json").read_text())["steps"] == 2
    assert set(record["errors"]) == {"post_training", "last", "averaged"}
    assert record["bytes"] == out.stat().st_size
    assert "post-training quantisation: error" in capsys.readouterr().out
    file = TrainedLinears.load(out)
    assert (file.smooth, file.told["steps"]) == (0.5, 2)
    from vivace.models.loading import load

    pipe = load(tmp_path / "model", dtype=torch.float32)
    assert file.model_hash == model_hash(pipe)
    settings = SETTINGS | {"smooth": 0.5, "trained": str(out)}
    assert clip(pipe, [QuantizedLinear(**settings)]).receipt.techniques[0].effects["linears_trained"] == 30


def test_wrong_commands_are_refused(tmp_path):
    given = ["--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(ConfigError, match="has blocks of its own"):
        training.main([*given, "--weights", "nvfp4", "--group", "32"])
    with pytest.raises(ConfigError, match="no schedule"):
        training.main([*given, "--anneal", "0.9", "0.1"])
    with pytest.raises(SystemExit):
        training.main([*given, "--minutes", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            training.main([*given, "--device", "cuda"])
