"""The public contract of an adapter: what it says about a pipeline's architecture is put beside a live run.

    check_adapter("cogvideox").raise_for_failures()               # one of the tiny pipelines
    check_adapter(my_pipeline, call={"num_frames": 9, ...}).raise_for_failures()

Use a small pipeline: every check makes a few generations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid, Workload
from vivace.core.surgery import Surgery
from vivace.models.adapter import EXPERTS, Adapter, AttentionSite, Block, Expert, ModelDescription, RootCall
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.costs import baseline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.testing import models
from vivace.testing.case import ContractViolation, expect
from vivace.testing.contract import Report, Result, Verdict
from vivace.testing.fingerprints import differences, fingerprint

PROMPT = "a red ball"
ROWS = 1e-4
"""Relative L2 difference that another batch size of the same kernels may make."""
_ROLES = {"attention.q", "attention.k", "attention.v", "ffn.in", "ffn.out"}
AdapterCheck = Callable[["AdapterCase"], None]


@dataclass(slots=True)
class Recording:
    """Arguments and results of one evaluation: of the transformer, its blocks in order, its attention modules."""

    root: RootCall
    order: list[str] = field(default_factory=list)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=dict)


class AdapterCase:
    """A pipeline with its adapter and a call that makes a small clip.

    Raises:
        ConfigError: the pipeline's transformer has no adapter.
    """

    def __init__(self, subject: str | Any, call: Mapping[str, Any] | None = None) -> None:
        named = isinstance(subject, str)
        self.name = subject if named else type(subject).__name__
        self.pipeline = models.pipeline(subject) if named else subject
        self.call = dict(models.call(subject) if named and call is None else call or models.CALL)
        modules = {e: m for e in EXPERTS if (m := getattr(self.pipeline, e, None)) is not None}
        adapter = for_module(next(iter(modules.values()))) if modules else None
        if adapter is None:
            raise ConfigError(f"{self.name} has no adapter: derive one from vivace.models.adapter.Adapter.")
        self.adapter: Adapter = adapter
        self.experts: list[Expert] = [adapter.expert(name, module) for name, module in modules.items()]
        self.model: ModelDescription = describe_pipeline(self.pipeline)

    def run(self, pipeline: Any = None, **changes: Any) -> torch.Tensor:
        """Latents of the pipeline, called directly."""
        generator = torch.Generator().manual_seed(7)
        arguments = {"prompt": PROMPT, "generator": generator, **self.call, **changes}
        return (pipeline or self.pipeline)(**arguments, output_type="latent", return_dict=False)[0]

    def workload(self, **changes: Any) -> Workload:
        """The workload of the call; what it leaves out comes from the pipeline's own signature."""
        signature = inspect.signature(type(self.pipeline).__call__).parameters
        own = {n: p.default for n, p in signature.items() if isinstance(p.default, (int, float))}
        call = {**own, **self.call, **changes}
        return self.model.workload(
            frames=call["num_frames"],
            height=call["height"],
            width=call["width"],
            steps=call["num_inference_steps"],
            guidance=call.get(self.adapter.guidance_argument),
            text=call.get("max_sequence_length"),
        )

    def other_shape(self) -> dict[str, Any]:
        """Another clip that the pixel rules allow: one step up in every direction, and no square."""
        pixels = self.model.pixels
        if pixels is None:
            raise ContractViolation("the adapter gives no pixel rules")
        shape = {
            "num_frames": self.call["num_frames"] + pixels.temporal,
            "height": self.call["height"] + pixels.spatial,
            "width": self.call["width"] + 2 * pixels.spatial,
        }
        if "image" in self.call:
            shape["image"] = models.picture(shape["width"], shape["height"])
        return shape

    @cached_property
    def recordings(self) -> dict[str, Recording]:
        """By expert, its first evaluation in a run of the pipeline."""
        return self.record(self.run)

    def record(self, run: Callable[[], Any]) -> dict[str, Recording]:
        """By expert, the first evaluation while `run()` lasts."""
        found: dict[str, Recording] = {}
        edit = Surgery()
        try:
            for expert in self.experts:
                _record_expert(edit, expert, found)
            run()
        finally:
            edit.close()
        return found


def _record_expert(edit: Surgery, expert: Expert, found: dict[str, Recording]) -> None:
    done: list[bool] = []

    def root(old: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if expert.name not in found:
                found[expert.name] = Recording(RootCall.bind(expert.module, args, kwargs))
            try:
                return old(*args, **kwargs)
            finally:
                done.append(True)

        return forward

    def part(old: Callable[..., Any], site: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = old(*args, **kwargs)
            if not done:
                found[expert.name].order.append(site)
                found[expert.name].calls[site] = (args, dict(kwargs), out)
            return out

        return forward

    edit.wrap(expert.module, root)
    for piece in (*expert.blocks, *expert.attentions):
        edit.wrap(piece.module, lambda old, s=piece.site: part(old, s))


@contextmanager
def _processor(case: AdapterCase, site: AttentionSite, kernel: Callable[..., Any]) -> Iterator[None]:
    edit = Surgery()
    edit.set(site.module, "processor", case.adapter.processor(site, kernel))
    try:
        yield
    finally:
        edit.close()


def dense_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The attention of diffusers' own processors; q, k, v and the result are (B, S, H, D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)


# -- the checks -----------------------------------------------------------------------------------------------


def check_sites_are_found(case: AdapterCase) -> None:
    """Blocks, attention and linears are all there, have true addresses, and the blocks run once each, in order."""
    for expert, described in zip(case.experts, case.model.experts, strict=True):
        blocks = [b.site for b in expert.blocks]
        expect(blocks, f"{expert.name} has no blocks")
        expect(
            tuple(blocks) == described.block_sites, "the description lists other blocks than the live model"
        )
        attentions = tuple(a.site for a in expert.attentions)
        expect(attentions == described.attention_sites, "the description lists other attention sites")
        for name, child in expert.module.named_children():
            if isinstance(child, torch.nn.ModuleList) and name not in case.adapter.layouts:
                linears = any(isinstance(m, torch.nn.Linear) for m in child.modules())
                expect(
                    not linears, f"{expert.name}.{name} is a list of blocks that the adapter does not know"
                )
        ran = [s for s in case.recordings[expert.name].order if s in set(blocks)]
        expect(ran == blocks, f"{expert.name} runs its blocks in another order than listed: {ran[:3]} ...")
        for piece in (*expert.blocks, *expert.attentions, *expert.feed_forwards, *expert.linears):
            owner, _, path = piece.site.partition(".")
            found = getattr(case.pipeline, owner).get_submodule(path)
            expect(found is piece.module, f"{piece.site} is the address of another module")
        for block in expert.blocks:
            sites = [x for x in expert.linears if x.block == block.index]
            inside = [m for m in block.module.modules() if isinstance(m, torch.nn.Linear)]
            expect(
                len(sites) == len(inside), f"{len(inside) - len(sites)} linears of {block.site} are missing"
            )
            missing = _ROLES - {x.role for x in sites}
            expect(not missing, f"no linear of {block.site} has the role {', '.join(sorted(missing))}")


@torch.no_grad()
def check_processors_are_exact(case: AdapterCase) -> None:
    """Around the dense kernel every processor equals the model's own bit for bit, and counts the pairs it visits."""
    for expert in case.experts:
        for site in expert.attentions:
            args, kwargs, expected = case.recordings[expert.name].calls[site.site]
            pairs: list[int] = []

            def kernel(q: Any, k: Any, v: Any, mask: Any, pairs: list[int] = pairs) -> Any:
                pairs.append(q.shape[0] * q.shape[1] * k.shape[1])
                return dense_kernel(q, k, v, mask)

            with _processor(case, site, kernel):
                got = site.module(*args, **kwargs)
            same = all(torch.equal(a, b) for a, b in zip(_tensors(got), _tensors(expected), strict=True))
            expect(same, f"the processor of {site.site} differs from the model's own")
            rows, queries, keys = site.lengths(args, kwargs)
            expect(
                sum(pairs) == rows * queries * keys, f"{site.site} visits other pairs than it is counted with"
            )
            heads = (case.model.experts[0].heads, case.model.experts[0].head_dim)
            expect((site.heads, site.head_dim) == heads, f"{site.site} and the description differ in heads")


def check_grids_agree(case: AdapterCase) -> None:
    """The token grid from configurations is that of the live call, for two shapes, and fits the blocks' streams."""
    for shape in ({}, case.other_shape()):
        recordings = case.record(lambda s=shape: case.run(**s, num_inference_steps=2))
        told = case.model.grid(case.workload(**shape))
        for expert in case.experts:
            if (recording := recordings.get(expert.name)) is None:
                continue  # two steps need not reach both experts
            seen = case.adapter.grid_of_call(expert.config, recording.root.values)
            expect(told == seen, f"the description says {told}, the live call has {seen}")
            for block in expert.blocks:
                args, kwargs, _ = recording.calls[block.site]
                call = block.bind(args, kwargs)
                expect(
                    call.hidden.shape[1] == seen.video,
                    f"{block.site} has {call.hidden.shape[1]} video tokens",
                )
                if seen.text:
                    text = call.text.shape[1] if call.text is not None else 0
                    expect(text == seen.text, f"{block.site} has {text} text tokens, the grid {seen.text}")


@torch.no_grad()
def check_text_stands_where_told(case: AdapterCase) -> None:
    """In joint attention, text tokens are on the side of the queries that the grid says."""
    for expert in case.experts:
        recording = case.recordings[expert.name]
        grid: TokenGrid = case.adapter.grid_of_call(expert.config, recording.root.values)
        for site in (s for s in expert.attentions if s.kind == "joint"):
            args, kwargs, _ = recording.calls[site.site]
            seen: list[torch.Tensor] = []

            def kernel(q: Any, k: Any, v: Any, mask: Any, seen: list[torch.Tensor] = seen) -> Any:
                seen.append(q.clone())
                return dense_kernel(q, k, v, mask)

            with _processor(case, site, kernel):
                site.module(*args, **kwargs)
                site.module(
                    *args, **kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] + 1.0}
                )
            moved = (seen[0] != seen[1]).any(-1).any(-1).any(0)
            expected = torch.zeros(grid.tokens, dtype=torch.bool)
            expected[slice(0, grid.text) if grid.text_first else slice(grid.video, None)] = True
            expect(torch.equal(moved, expected), f"text does not stand where the grid says in {site.site}")


@torch.no_grad()
def check_block_calls_bind(case: AdapterCase) -> None:
    """A block call is understood by position and by name, and run, split and join lose nothing."""
    for expert in case.experts:
        for block in expert.blocks:
            args, kwargs, expected = case.recordings[expert.name].calls[block.site]
            call = block.bind(args, kwargs)
            again = block.bind((), call.values) if call.signature is None else block.bind(args, kwargs)
            for form in (call, again):
                hidden, text = form.run(block.module)
                expect(hasattr(hidden, "shape"), f"{block.site} returns two streams, its layout has one")
                got = _tensors(form.join(hidden, text))
                same = all(torch.equal(a, b) for a, b in zip(got, _tensors(expected), strict=True))
                expect(same, f"{block.site}: a bound call gives another result")
            expect(
                (call.text is None) == (call.layout.text is None), f"{block.site}: the text stream is lost"
            )


@torch.no_grad()
def check_rows_are_independent(case: AdapterCase) -> None:
    """Some rows of a batch, chosen from a call of a transformer or a block, give what they give in the batch."""
    for expert in case.experts:
        double = _doubled(case.recordings[expert.name].root)
        recording = case.record(lambda e=expert, d=double: e.module(**d.values))[expert.name]
        whole = expert.module(**double.values)[0]
        for start, stop in ((0, 1), (1, double.rows)):
            part = expert.module(**double.select(start, stop).values)[0]
            expect(
                _close(part, whole[start:stop]),
                f"rows {start} to {stop} of {expert.name} depend on the others",
            )
        index = torch.tensor([double.rows - 1, 0])
        for block in expert.blocks:
            args, kwargs, out = recording.calls[block.site]
            _expect_rows(block, args, kwargs, out, index)


def _expect_rows(block: Block, args: Any, kwargs: Any, out: Any, index: torch.Tensor) -> None:
    call = block.bind(args, kwargs).rows(index)
    try:
        got = _tensors(call.run(block.module))
    except RuntimeError as error:
        raise ContractViolation(
            f"{block.site} cannot run for some rows ({error}): `batched` lacks a name"
        ) from None
    for a, b in zip(got, _tensors(out), strict=True):
        expect(_close(a, b.index_select(0, index)), f"rows of {block.site} depend on the others")


def _doubled(call: RootCall) -> RootCall:
    """The call with a second, different half of the batch; `return_dict` is off."""
    generator = torch.Generator().manual_seed(3)
    values: dict[str, Any] = {}
    for name, value in call.values.items():
        if hasattr(value, "shape") and value.ndim and value.shape[0] == call.rows:
            other = value
            if value.is_floating_point() and name in ("hidden_states", "encoder_hidden_states"):
                other = value + torch.randn(value.shape, generator=generator).to(value.dtype)
            value = torch.cat([value, other])
        values[name] = value
    return RootCall(values | {"return_dict": False}, 2 * call.rows)


@torch.no_grad()
def check_dummy_calls_run(case: AdapterCase) -> None:
    """Inputs made from the description have the live call's shapes, and the transformer takes them."""
    for expert in case.experts:
        live = case.recordings[expert.name].root
        workload = case.workload().with_(batch=live.rows)
        call = case.adapter.dummy_call(case.model, workload, "cpu", torch.float32)
        expect(RootCall(call, live.rows).key == live.key, "inputs from the description have other shapes")
        shapes = {n: tuple(v.shape) for n, v in call.items() if hasattr(v, "shape")}
        wrong = [n for n, s in shapes.items() if tuple(getattr(live.values.get(n), "shape", ())) != s]
        expect(not wrong, f"inputs from the description and the live call differ in {', '.join(wrong)}")
        out = expert.module(**call, return_dict=False)[0]
        expect(torch.isfinite(out).all(), "the transformer gives no finite numbers for them")


def check_counts_are_the_baseline(case: AdapterCase) -> None:
    """What the exact run is predicted to cost is what a session counts, in another shape too."""
    for shape in ({}, {**case.other_shape(), "num_inference_steps": 3}):
        with accelerate(case.pipeline, Plan(), model=case.model) as session:
            case.run(session.pipeline, **shape)
            receipt = session.receipt()
        wrong = baseline(case.model, case.workload(**shape)).problems(receipt.counts, slack=1e-9)
        expect(not wrong, "; ".join(wrong))
        expect(receipt.flops == receipt.flops_dense, "the exact run is said to have saved FLOPs")
        expect(receipt.attention_pairs == receipt.attention_pairs_dense, "... to have saved attention pairs")
        expect(
            receipt.completed and receipt.samples == 1, "the generation is not told as one complete sample"
        )


def check_empty_plan_is_invisible(case: AdapterCase) -> None:
    """An empty plan changes no bit, whoever calls the pipeline, and the pipeline comes back as it was."""
    before, plain = fingerprint(case.pipeline), case.run()
    with accelerate(case.pipeline, Plan(), model=case.model) as session:
        direct, told = case.run(), session.receipt().counts
        out = session(PROMPT, seed=7, output_type="latent", **case.call)
    latents = out.raw.frames[0] if isinstance(out.raw.frames, tuple) else out.raw.frames
    expect(torch.equal(plain, direct), "an empty plan changes what the pipeline gives")
    expect(torch.equal(plain, latents), "a session's own call gives something else than the pipeline")
    expect(told == out.receipt.counts, "the pipeline called directly has another receipt")
    expect(torch.equal(plain, case.run()), "after the session the pipeline gives something else")
    changed = differences(before, fingerprint(case.pipeline))
    expect(not changed, f"the session left traces: {changed}")


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(v for v in value if v is not None) if isinstance(value, tuple) else (value,)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm() / b.norm().clamp_min(1e-12)) <= ROWS


ADAPTER_CHECKS: tuple[AdapterCheck, ...] = (
    check_sites_are_found,
    check_processors_are_exact,
    check_grids_agree,
    check_text_stands_where_told,
    check_block_calls_bind,
    check_rows_are_independent,
    check_dummy_calls_run,
    check_counts_are_the_baseline,
    check_empty_plan_is_invisible,
)


def check_adapter(subject: str | Any, *, call: Mapping[str, Any] | None = None) -> Report:
    """Put an adapter through its contract on a live pipeline.

    Args:
        subject: the name of a tiny pipeline (`vivace.testing.models.BUILDERS`) or a small pipeline of your own.
        call: its arguments but the prompt; `num_frames`, `height`, `width` and `num_inference_steps` among them.

    Raises:
        ConfigError: the pipeline's transformer has no adapter.
    """
    case = AdapterCase(subject, call)
    results = []
    for check in ADAPTER_CHECKS:
        try:
            check(case)
            results.append(Result(check.__name__, Verdict.PASSED))
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            results.append(Result(check.__name__, Verdict.FAILED, kind + str(error)))
    return Report(f"the adapter of {case.name}", tuple(results))
