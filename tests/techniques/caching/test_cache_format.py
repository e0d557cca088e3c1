"""One format for what caches remember: bytes as told, values as the codec gives them, refused without a cache."""

from __future__ import annotations

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.kernels.cache_codec.reference import pack, unpack
from vivace.kernels.cache_codec.spec import FORMS
from vivace.models.describe import describe_pipeline
from vivace.plans.memory import exact, planned
from vivace.techniques.base import registry
from vivace.techniques.caching.cache_format import CacheFormat, depth_of
from vivace.techniques.caching.memory import Form, History, Memory, Stored
from vivace.testing.models import call, pipeline

CACHES = {
    "taylorseer": {"interval": 2, "warmup": 2},
    "pyramid_attention_broadcast": {"low": 0.0, "high": 1000.0, "cross_interval": 3},
    "teacache": {"threshold": 1.0, "warmup": 2},
    "optimal_schedule": {"share": 0.5},
    "bwcache": {},
    "toca": {},
}
STEPS = 8


@pytest.fixture(scope="module")
def wan():
    pipe = pipeline("wan2.1")
    model = describe_pipeline(pipe)
    workload = model.workload(frames=17, height=64, width=64, text=16, guidance=3.0)
    return pipe, model, workload, exact(model, workload, dtype="float32", vae_dtype="float32")


def generate(pipe, *techniques, **options):
    asked = call("wan2.1") | {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": STEPS}
    with accelerate(pipe, Plan(techniques)) as fast:
        out = fast("a", seed=1, output_type="latent", **asked | options)
        held = fast.store.form
    assert fast.store.form is None
    assert held is None or isinstance(held, Form)
    return out.raw.frames if hasattr(out.raw, "frames") else out.raw[0], out.receipt


def effects(receipt):
    return next(t.effects for t in receipt.techniques if t.name == "cache_format")


@pytest.mark.parametrize("name", CACHES)
def test_the_receipt_tells_what_is_held(wan, name):
    """Against the walk through the store: with and without differ by just what is told."""
    pipe = wan[0]
    cache = registry[name](**CACHES[name])
    whole = generate(pipe, cache)[1].cache_bytes
    for form in (CacheFormat(format="int8"), CacheFormat(format="int2", group=32, axis="channel")):
        receipt = generate(pipe, cache, form)[1]
        told = effects(receipt)
        assert 0 < told["bytes_held"] < told["bytes_without"] <= whole
        # Scores of the tokens' age and signals differ from run to run no more than in their values.
        assert whole - receipt.cache_bytes == told["bytes_without"] - told["bytes_held"]


def test_fewer_bits_hold_fewer_bytes_and_differ_more(wan):
    pipe, cache = wan[0], registry["taylorseer"](**CACHES["taylorseer"])
    full = generate(pipe, cache)[0]
    errors, sizes = {}, {}
    for form in FORMS:
        latents, receipt = generate(pipe, cache, CacheFormat(format=form, group=32))
        errors[form] = float((latents - full).norm() / full.norm())
        sizes[form] = effects(receipt)["bytes_held"]
    assert 0.0 < errors["int8"] < errors["fp8"] < errors["int4"] < errors["int2"]
    assert errors["int8"] < 0.02
    assert sizes["int8"] == sizes["fp8"] > sizes["int4"] > sizes["int2"]


def test_a_residual_of_the_whole_history_changes_nothing(wan):
    pipe, cache = wan[0], registry["taylorseer"](order=1, **CACHES["taylorseer"])
    latents, receipt = generate(pipe, cache)
    kept = CacheFormat(format="int2", residual=2)
    again, told = generate(pipe, cache, kept)
    assert again.equal(latents)
    assert told.cache_bytes == receipt.cache_bytes
    assert effects(told)["bytes_held"] == effects(told)["bytes_without"]
    assert depth_of(cache) == 2
    (warning,) = [p for p in Plan([cache, kept]).problems(wan[1]) if p.technique == "cache_format"]
    assert (warning.kind, warning.severity) == ("pointless", "warning")


@pytest.mark.parametrize("name", ["taylorseer", "pyramid_attention_broadcast", "fora", "optimal_schedule"])
@pytest.mark.parametrize(
    "form", [CacheFormat(), CacheFormat(format="int4", group=128, axis="channel", residual=1)]
)
def test_predicted_bytes_are_those_held(wan, name, form):
    pipe, model, workload, base = wan
    plan = Plan([registry[name](**CACHES.get(name, {})), form])
    told = effects(generate(pipe, *plan.techniques)[1])
    assert planned(model, workload, base, plan).kept == told["bytes_held"]
    assert planned(model, workload, base, Plan(plan.techniques[:1])).kept == told["bytes_without"]


def test_it_is_refused_without_a_cache(wan):
    pipe = wan[0]
    with pytest.raises(PlanError, match="add a cache"):
        accelerate(pipe, Plan([CacheFormat()]))
    with pytest.raises(PlanError, match="storage: same"):
        accelerate(pipe, Plan([CacheFormat(), registry["fora"](storage="fp8")]))
    # A cache at identity is no cache.
    with pytest.raises(PlanError, match="nothing to store"):
        accelerate(pipe, Plan([CacheFormat(), registry["taylorseer"](interval=1)]))


def heard():
    told: dict[str, float] = {}

    def report(effect, amount):
        told[effect] = told.get(effect, 0) + amount

    return told, report


@pytest.mark.parametrize(("axis", "along"), [("token", -1), ("channel", -2)])
def test_values_are_what_the_codec_gives(axis, along):
    told, report = heard()
    form = Form("int4", 32, axis, 1, report)
    values = [torch.randn(50, 48, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    history = History()
    for i, value in enumerate(values):
        history.push(float(i), (value, None), 3, "same", False, form)
    got = [e.values[0].get() for e in history.entries]
    assert got[0].equal(values[3])
    for i, value in ((1, values[2]), (2, values[1])):
        assert got[i].equal(unpack(pack(value, "int4", 32, along)))
    packed = pack(values[0], "int4", 32, along).nbytes
    assert told == {"bytes_held": values[0].nbytes + 2 * packed, "bytes_without": 3 * values[0].nbytes}
    assert history.combine([0.5, 0.5, 0.0])[0].equal(0.5 * got[0] + 0.5 * got[1])


@pytest.mark.parametrize("shape", [(16, 5, 8, 12), (2, 16, 5, 8, 12)])
def test_positions_of_latents_share_scales(shape):
    _, report = heard()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored = Stored.of(x, form=Form("int8", 64, "token", 0, report))
    want = unpack(pack(x.flatten(-3), "int8", 64)).view(shape)
    assert stored.get().equal(want)
    assert stored.nbytes < stored.full == x.nbytes


def test_what_is_replaced_is_taken_off():
    told, report = heard()
    memory = Memory(form=Form("int8", 64, "token", 0, report))
    x = torch.randn(10, 64)
    first = memory.keep(x, "same", False)
    memory.keep(x[:5], "same", False, first)
    assert told == {"bytes_held": 5 * (64 + 4), "bytes_without": 5 * 64 * 4}


@pytest.mark.parametrize("family", ["hunyuan", "wan2.2", "cogvideox"])
def test_other_families(family):
    """Two streams, two experts, fused guidance: held bytes stay a fraction of the whole ones."""
    pipe = pipeline(family)
    plan = Plan([registry["taylorseer"](**CACHES["taylorseer"]), CacheFormat(format="int4")])
    with accelerate(pipe, plan) as fast:
        out = fast("a", seed=1, output_type="latent", **call(family) | {"num_inference_steps": 6})
    told = effects(out.receipt)
    assert 0 < told["bytes_held"] < 0.4 * told["bytes_without"]
