"""Predicting the peak memory of a run from configurations alone: no weights, no arithmetic, no download.

The components are built on the meta device and called there once, while every tensor that they make is counted
(`vivace.core.live_bytes`): the transformer with two blocks of each kind, whose live set is that of all of them, the
text encoders and the VAE's decoder whole. Attention is counted as fused kernels take memory for it. What the pipeline
holds beside a call (latents, predictions, the solver's past, embeddings) follows from the shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vivace.core.context import FUSED
from vivace.core.errors import ModelError
from vivace.core.footprint import DECODE, DENOISE, TEXT, Footprint, LinearSize, Part
from vivace.core.shapes import Workload
from vivace.models.adapter import Adapter, ExpertDescription, Guidance, ModelDescription
from vivace.plans.dry_run import BUILT, CannotTell, branches_of, dry_run

if TYPE_CHECKING:
    import torch

    from vivace.plans.plan import Plan
    from vivace.techniques.base import Technique

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
FILLED = 2
"""Chunks after which the caches of a decoder that goes chunk by chunk are full."""


def predict(
    model: ModelDescription,
    workload: Workload | None = None,
    plan: Plan | None = None,
    *,
    dtype: str = "bfloat16",
    vae_dtype: str = "",
) -> Footprint:
    """The memory of one generation, in bytes by component and stage.

    Args:
        model: a description; only its configurations are used.
        workload: clip, guidance and batch; the model's usual one when left out.
        plan: techniques that change weights, placement, decoding, or keep tensors; none when left out.
        dtype: torch's name of the type of weights and activations.
        vae_dtype: the VAE's, where it differs; pipelines often keep it in float32.

    Raises:
        ModelError: the model has no adapter, so that its transformer cannot be called without its pipeline.
    """
    workload = workload or model.workload()
    base = exact(model, workload, dtype=dtype, vae_dtype=vae_dtype or dtype)
    return base if plan is None else planned(model, workload, base, plan)


def planned(model: ModelDescription, workload: Workload, base: Footprint, plan: Plan) -> Footprint:
    """The exact run's footprint with a plan's techniques added, in their order."""
    techniques = plan.fitted(model).ordered()
    for technique in techniques:
        base = technique.memory(model, workload, base)
    if dry := [t for t in techniques if t.dry]:
        base = _dried(model, workload, base, dry)
    return base


def _dried(
    model: ModelDescription, workload: Workload, base: Footprint, techniques: list[Technique]
) -> Footprint:
    """With what techniques make inside the transformers, counted where they run without numbers."""
    import torch

    dtype = torch.float32 if base.size == 4 else torch.bfloat16
    kept = 0
    for expert in model.experts:
        try:
            taken = dry_run(model, expert, workload, techniques, dtype)
        except CannotTell:
            # As before these techniques: they hold less at a time, and tables beside it that nobody has counted.
            continue
        working = max(taken.working, _solver(model, workload, base.output // base.size))
        base = base.with_part(replace(base.part(expert.name), working=working))
        kept += taken.kept
    return replace(base, kept=base.kept + kept)


def exact(
    model: ModelDescription, workload: Workload, *, dtype: str = "bfloat16", vae_dtype: str = "bfloat16"
) -> Footprint:
    """As `predict`, of the exact run: everything on the device, chunked decoding."""
    import torch

    if model.adapter is None:
        raise ModelError(
            f"{model.pipeline_class} has no adapter, so its memory is not known before it has run; run it once."
        )
    kind, vae_kind = getattr(torch, dtype), getattr(torch, vae_dtype)
    with torch.no_grad():
        parts = [_encoder(model, name, workload, kind) for name in ENCODERS if name in model.configs]
        parts += [_expert(model.adapter, model, e, workload, kind) for e in model.experts]
        decodes: dict[str, int] = {}
        if "vae" in model.components:
            part, decodes = _vae(model.adapter, model, workload, vae_kind)
            parts.append(part)
    latents, text, tokens, channels, positions = _sizes(model.adapter, model, workload)
    rows = workload.batch * (workload.branches if model.guidance is not Guidance.NONE else 1)
    size = kind.itemsize
    # Where latents are large beside the network (tiny models), the solver's step is the worst moment.
    step = _solver(model, workload, latents)
    parts = [replace(p, working=max(p.working, step)) if p.stage == DENOISE else p for p in parts]
    return Footprint(
        parts=tuple(parts),
        held=_held(model, workload, latents, text, size, vae_kind.itemsize),
        stream=tokens * channels * size,
        channels=channels,
        output=latents * size,
        positions=positions,
        size=size,
        rows=rows,
        decodes=decodes,
    )


def _sizes(adapter: Adapter, model: ModelDescription, workload: Workload) -> tuple[int, int, int, int, int]:
    """Of one sample: elements of latents and of text embeddings, tokens and channels of the streams between two blocks,
    positions of a latent channel."""
    frames, height, width = adapter.latent(model, workload)
    config = model.experts[0].config
    latents = config.get("out_channels") or config["in_channels"]
    if adapter.guidance is Guidance.FUSED and config.get("patch_size") == 1:
        latents = config["in_channels"]
    grid = adapter.grid(model, workload)
    tokens = grid.tokens if any(x.text for x in adapter.layouts.values()) else grid.video
    call = adapter.dummy_call(model, workload, "meta", None)
    text = call["encoder_hidden_states"].numel() // workload.batch
    heads, head_dim = adapter.head_shape(config)
    positions = frames * height * width
    return latents * positions, text, tokens, heads * head_dim, positions


def _held(
    model: ModelDescription, workload: Workload, latents: int, text: int, size: int, vae_size: int
) -> dict[str, int]:
    """Bytes that live in the pipeline's own variables beside a call, by stage.

    Latents are float32. In a step: the latents, their copy for the network, what it gave last time for every branch,
    and the solver's past; in the decoding also the latents scaled for the decoder.
    """
    batch, branches = workload.batch, workload.branches if model.guidance is not Guidance.NONE else 1
    past = _past(model)
    embeddings = text * size * batch * branches
    loop = batch * latents * (4 * (1 + past) + size * (1 + branches))
    return {
        TEXT: embeddings,
        DENOISE: loop + embeddings,
        DECODE: loop + embeddings + batch * latents * vae_size,
    }


_STEP = {"UniPC": 7, "": 4}
"""Float32 tensors of the latents' size that a solver makes and drops in one step, counted with `LiveBytes`."""


def _solver(model: ModelDescription, workload: Workload, latents: int) -> int:
    """Bytes that a solver makes in one step; `latents`: elements of one sample."""
    return workload.batch * latents * 4 * _STEP["UniPC" if "UniPC" in model.scheduler_class else ""]


def _past(model: ModelDescription) -> int:
    """Tensors of the latents' size that the solver remembers from earlier steps."""
    name, order = model.scheduler_class, int(model.scheduler.get("solver_order") or 1)
    if "UniPC" in name:
        return order + 1  # predictions, and the last sample for the corrector
    if "DPMSolver" in name:
        return order
    return 0


# -- components ---------------------------------------------------------------------------------------------------


def _expert(
    adapter: Adapter,
    model: ModelDescription,
    description: ExpertDescription,
    workload: Workload,
    dtype: torch.dtype,
) -> Part:
    """A transformer: its weights counted on two blocks of each kind, and the live set of one call."""
    import diffusers
    import torch

    depths = {a: int(description.config.get(key, 0)) for a, key in adapter.depth_keys.items()}
    shallow = {key: min(depths[a], BUILT) for a, key in adapter.depth_keys.items() if depths[a]}
    with torch.device("meta"):
        build = getattr(diffusers, description.class_name)
        module = build.from_config({**description.config, **shallow}).eval()
    _convert(module, dtype)
    expert = adapter.expert(description.name, module)
    first = {a: next((b for b in expert.blocks if b.site.endswith(f".{a}.0")), None) for a in depths}
    sizes = {a: _bytes(b.module) if b is not None else 0 for a, b in first.items()}
    built = sum(sizes[a] * min(depths[a], BUILT) for a in depths)
    blocks: list[int] = []
    linears: list[LinearSize] = []
    for attribute, depth in depths.items():
        block = first[attribute]
        for i in range(depth):
            if block is not None:
                linears += [
                    _linear(site, f"{description.name}.{attribute}.{i}", len(blocks))
                    for site in expert.linears
                    if site.block == block.index
                ]
            blocks.append(sizes[attribute])
    working = 0
    for branch in branches_of(model, workload):
        rows = workload.batch * (2 if branch == FUSED else 1)
        call = adapter.dummy_call(model, workload.with_(batch=rows), "meta", dtype, branch)
        working = max(working, _peak(lambda c=call: module(**c, return_dict=False)))
    return Part(
        description.name, DENOISE, _bytes(module) - built, tuple(blocks), working, linears=tuple(linears)
    )


def _linear(site: Any, home: str, block: int) -> LinearSize:
    module = site.module
    path = site.site.split(".", 3)[3]
    return LinearSize(
        f"{home}.{path}", block, site.role, module.in_features, module.out_features, module.weight.nbytes
    )


def _encoder(model: ModelDescription, name: str, workload: Workload, dtype: torch.dtype) -> Part:
    """A text encoder: its weights, and the live set of one prompt's encoding."""
    import torch
    import transformers

    build = getattr(transformers, model.components[name])
    with torch.device("meta"):
        module = build(build.config_class.from_dict(dict(model.configs[name]))).eval().to(dtype)
    adapter, first = model.adapter, name == ENCODERS[0]
    assert adapter is not None
    # CLIP's text models have a length of their own.
    length = min(workload.text + adapter.template_tokens * first, _most_tokens(module.config))
    ids = torch.zeros(workload.batch, length, dtype=torch.int64, device="meta")
    more = {"output_hidden_states": True} if first and adapter.all_hidden_states else {}
    working = 0
    # A picture's encoder takes no tokens, and a mask that depends on values cannot be had on the meta device: weights
    # only.
    if module.main_input_name == "input_ids":
        with contextlib.suppress(RuntimeError):
            working = _peak(lambda: module(input_ids=ids, **more))
    blocks = _longest_list(module)
    linears = tuple(
        LinearSize(f"{name}.{path}", block, "other", m.in_features, m.out_features, m.weight.nbytes)
        for path, m, block in _linears_of(module, blocks)
    )
    sizes = tuple(_bytes(b) for b in blocks)
    return Part(name, TEXT, _bytes(module) - sum(sizes), sizes, working, linears)


def _most_tokens(config: Any) -> int:
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else 2**31


def _longest_list(module: Any) -> list[Any]:
    """The blocks of a text encoder: its longest list of modules."""
    from torch import nn

    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _linears_of(module: Any, blocks: list[Any]) -> list[tuple[str, Any, int]]:
    from torch import nn

    home = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
    return [(p, m, home.get(id(m), -1)) for p, m in module.named_modules() if isinstance(m, nn.Linear)]


def _vae(
    adapter: Adapter, model: ModelDescription, workload: Workload, dtype: torch.dtype
) -> tuple[Part, dict[str, int]]:
    """The VAE: its weights, and the live set of the decoding, in chunks and in one pass where there is one."""
    import diffusers
    import torch

    config = model.configs["vae"]
    with torch.device("meta"):
        vae = getattr(diffusers, model.components["vae"]).from_config(_listed(config)).eval().to(dtype)
    channels = int(config.get("z_dim") or config["latent_channels"])
    frames, height, width = adapter.latent(model, workload)
    more: dict[str, Any] = {"return_dict": False}
    if config.get("timestep_conditioning"):
        more["temb"] = torch.zeros(workload.batch, dtype=dtype, device="meta")

    def peak(decode: Callable[[Any], Any], count: int) -> int:
        shape = (workload.batch, channels, count, height, width)
        return _peak(lambda: decode(torch.empty(shape, dtype=dtype, device="meta")))

    def chunked(z: torch.Tensor) -> Any:
        return vae.decode(z, **more)

    peaks = {"chunked": _over_frames(lambda count: peak(chunked, count), frames, adapter.decode_chunk)}
    if (whole := adapter.whole_clip_decoder(vae)) is not None:
        peaks["whole"] = peak(whole, frames)
    return Part("vae", DECODE, _bytes(vae), working=peaks["chunked"]), peaks


def _over_frames(peak: Callable[[int], int], frames: int, chunk: int) -> int:
    """The peak at `frames`; with a decoder that goes chunk by chunk, from two short clips.

    Once its caches are full, every chunk adds its own frames to the output and nothing else.
    """
    short = (frames - 1) % chunk + 1 + FILLED * chunk if chunk else frames
    if short + chunk >= frames:
        return peak(frames)
    first, second = peak(short), peak(short + chunk)
    return second + (frames - short - chunk) // chunk * (second - first)


# -- counting -----------------------------------------------------------------------------------------------------


def _peak(call: Callable[[], Any]) -> int:
    from vivace.core.live_bytes import FusedAttention, LiveBytes

    with FusedAttention(), LiveBytes() as live:
        call()
    return live.peak


def _bytes(module: Any) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _listed(value: Any) -> Any:
    """Plain JSON data: the constructors want lists where a configuration in Python has tuples."""
    if isinstance(value, Mapping):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _convert(module: Any, dtype: torch.dtype) -> None:
    """Give the weights a type as loading does: what the class says stays in float32 does."""
    import torch

    stay = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    module.to(dtype)
    for path, parameter in module.named_parameters():
        if any(part in stay for part in path.split(".")):
            parameter.data = parameter.data.to(torch.float32)


# -- what would fit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan with what it takes, and in which order of cost it stands."""

    label: str
    plan: Plan
    footprint: Footprint


_SHRINKING: tuple[tuple[str, ...], ...] = (
    (),
    ("chunked decoding",),
    ("model_offload",),
    ("model_offload", "chunked decoding"),
    ("int8_linear",),
    ("int8_linear", "text_quantization"),
    ("int8_linear", "model_offload"),
    ("group_offload",),
    ("group_offload", "chunked decoding"),
)
"""Ways to need less, cheapest first: nothing lost, a few copies a clip, rounded weights, copies in every step."""
_NEED_ACCELERATOR = {"model_offload", "group_offload"}


def proposals(
    model: ModelDescription, workload: Workload, base: Footprint, plan: Plan, *, accelerator: bool
) -> list[Proposal]:
    """Variants of a plan that need less and less memory at more and more cost, the plan itself first.

    Args:
        model, workload: as for `predict`.
        base: the exact run's footprint (`exact`).
        plan: what is to run.
        accelerator: whether there is a device beside the host, so that weights can wait there.
    """
    from vivace.plans.plan import Plan as Made
    from vivace.techniques.base import registry

    mine = {t.card.name for t in plan.fitted(model).ordered()}
    out: list[Proposal] = []
    for steps in _SHRINKING:
        names = [s for s in steps if s != "chunked decoding"]
        if set(names) & mine or any(n not in registry for n in names):
            continue
        if not accelerator and set(names) & _NEED_ACCELERATOR:
            continue
        kept = plan.techniques
        if "chunked decoding" in steps:
            kept = tuple(t for t in kept if not any(c.resource == "vae.decode" for c in t.card.claims))
            if len(kept) == len(plan.techniques):
                continue
        made = Made(
            (*kept, *(registry[n]() for n in names)),
            plan.name,
            plan.summary,
            plan.optional,
            plan.unless,
            plan.beside,
        )
        if any(p.severity == "error" and p.kind != "device" for p in made.problems(model)):
            continue
        found = planned(model, workload, base, made)
        out.append(Proposal(" + ".join(steps) or "as planned", made, found))
    return out
