"""Students that train in the form in which they will run: with sparse attention, with rounded linear layers, or both.

Teacher and critic stay dense and exact. `attention` puts trained sparse attention into a student: VSA (arXiv
2505.13389) with its gates, SLA (arXiv 2509.24006) with its projection, or the best blocks and nothing beside them
(`block_topk`, which runs as `vsa` without gates). Blocks are chosen by means of queries and keys, without gradient
through the choice; what they give has gradients to q, k, v and the trained tensors. `linears` rounds the blocks' linear
layers and takes rounding for the identity in the backward pass (arXiv 1308.3432).

What is trained is what the techniques `vsa`, `sla` and `int8_linear` run. Convention of the student file:

* Trained tensors of attention stand beside the weights as `sparse_attention.<address of the site>.<name>`, as they do
  in the student's own state dict. `extras` gives them without the prefix: the content of a file of `vsa` or `sla`.
* Weights behind rounded layers keep their names and are exact. Stored as int8 they are the codes that `int8_linear`
  makes of them; a store of deltas rounds them once more.
* `told` gives the fields of the artefact that name the techniques, so that `plan_of` of the file adds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.core.errors import ConfigError, ModelError
from vivace.core.shapes import TokenGrid
from vivace.core.surgery import Surgery
from vivace.kernels.api import select
from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_attention.spec import OP as ATTEND
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.block_attention.tiles import block_size, in_rows, with_text
from vivace.kernels.block_select.spec import OP as SELECT
from vivace.kernels.int8_linear.int_mm import quantise_rows
from vivace.kernels.trained_sparse import SKIPPED, coarse_branch, cubes, linear_branch, middling
from vivace.models.adapter import Adapter, RootCall
from vivace.models.student_artifact import SPARSE

M = TypeVar("M", bound=nn.Module)
NAME = SPARSE.removesuffix(".")
KINDS = ("self", "joint")
"""Kinds of attention in which video tokens see each other."""
TECHNIQUE = {"vsa": "vsa", "sla": "sla", "block_topk": "vsa"}
"""Method of training -> the technique that runs it."""
MODES = {"w8a8": "dynamic", "w8": "weight_only"}
"""Form of rounded linears -> mode of `int8_linear`."""
MASKED = {"cpu": 256, "cuda": 2048}
"""Tokens up to which dense attention under a mask is taken, as lists are not faster there: measured on a CPU (forward
and backward pass at densities of 12.5 and 25 %), and chosen without a measurement on a GPU."""


# -- sparse attention -------------------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    adapter: Adapter,
    grid: TokenGrid,
    method: str = "vsa",
    *,
    density: float = 0.25,
    block: int = 64,
    expert: str = "transformer",
) -> SparseAttention:
    """Put trained sparse attention into a transformer that learns, at all its self- and joint-attention sites.

    Args:
        grid: of the training clips; VSA's number of cubes is a share of this one's.
        method: `vsa`, `sla` or `block_topk`.
        density: share of the video's key blocks that every block of queries sees exactly; at least one block.
        block: most tokens of a block, 64 or 128; small clips have smaller ones.
        expert: how a plan calls this transformer.

    Raises:
        ConfigError: a setting is none, the transformer has such attention already, or nothing to choose from.
    """
    if method not in TECHNIQUE or block not in (64, 128) or not 0.01 <= density <= 1.0:
        raise ConfigError(
            f"sparse attention of a student is one of {', '.join(TECHNIQUE)} with a density from 0.01 to 1 and "
            f"blocks of 64 or 128 tokens, not {method} with {density} and {block}."
        )
    if NAME in module._modules:
        raise ConfigError("this student has sparse attention already.")
    sites = [site for site in adapter.expert(expert, module).attentions if site.kind in KINDS]
    if not sites:
        raise ConfigError(f"{type(module).__name__} has no attention among video tokens.")
    form = SparseAttention(adapter, module.config, method, density, block)  # type: ignore[arg-type]
    blocks = form.layout_of(grid, torch.device("cpu")).video_blocks
    if blocks < 2:
        raise ConfigError(f"a clip of {grid} tokens is one block; there is nothing to choose from.")
    form.top = min(512, max(1, math.ceil(density * blocks - 1e-9)))
    device = next(module.parameters()).device
    edit = Surgery()
    for site in sites:
        own = form.add(site.site, site.heads, site.head_dim, device)
        edit.set(site.module, "processor", adapter.processor(site, SparseSite(form, own)))
    module.register_forward_pre_hook(form.before, with_kwargs=True)
    module.add_module(NAME, form)
    return form


class Tensors(nn.Module):
    """Trained tensors of one site; both start so that the exact blocks are all there is."""

    def __init__(self, method: str, heads: int, head_dim: int, device: torch.device) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(heads, device=device)) if method == "vsa" else None
        self.proj = None
        if method == "sla":
            self.proj = nn.Linear(head_dim, head_dim, device=device)
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)


class SparseAttention(nn.Module):
    """Registered on a transformer: the trained tensors at the addresses of their sites, and where tokens stand.

    Attributes:
        layout: of the call that runs, with `choose` and `attend`, the kernels for it (None: dense under a mask). A
            backward pass that computes a block again must be of the last call's shape.
        top: VSA's number of cubes.
        plain: run on plain operations, which have a forward mode.
    """

    def __init__(
        self, adapter: Adapter, config: Mapping[str, Any], method: str, density: float, block: int
    ) -> None:
        super().__init__()
        self.adapter, self.config = adapter, config
        self.method, self.density, self.block = method, density, block
        self.top, self.plain = 1, False
        self.layout: Layout | None = None
        self.choose: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.attend: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._layouts: dict[tuple[TokenGrid, torch.device], Layout] = {}

    def told(self) -> dict[str, Any]:
        """What the artefact says of it."""
        settings: dict[str, Any] = {"block": self.block}
        if self.method == "sla":
            settings |= {"critical": self.density, "skipped": SKIPPED}
        else:
            settings |= {"top": self.top}
        return {
            "method": self.method,
            "density": self.density,
            "block": self.block,
            "technique": TECHNIQUE[self.method],
            "settings": settings,
            "trained": any(True for _ in self.parameters()),
        }

    def add(self, address: str, heads: int, head_dim: int, device: torch.device) -> Tensors:
        """Trained tensors at an address, e.g. `transformer.blocks.3.attn1`."""
        place: nn.Module = self
        *path, last = address.split(".")
        for name in path:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        with torch.random.fork_rng(devices=[]):  # first values are zero
            own = Tensors(self.method, heads, head_dim, device)
        place.add_module(last, own)
        return own

    def layout_of(self, grid: TokenGrid, device: torch.device) -> Layout:
        """The blocks of a grid."""
        if (grid, device) not in self._layouts:
            size = block_size(grid, self.block)
            slots = in_rows(grid, size) if self.method == "sla" else cubes(grid, size)
            layout = self._layouts[grid, device] = Layout(*with_text(grid, slots), device)
            # Worked out here: the lock of a cached property is nothing for a compiled graph (Python 3.11).
            _ = layout.sizes
        return self._layouts[grid, device]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the shape of a transformer's call; a hook, outside of what is compiled."""
        values = RootCall.bind(module, args, kwargs).values
        grid, hidden = self.adapter.grid_of_call(self.config, values), values["hidden_states"]
        layout, kind = self.layout_of(grid, hidden.device), hidden.device.type
        dtype = str(_computed(hidden)).removeprefix("torch.")
        head_dim = self.adapter.head_shape(self.config)[1]
        context = {"device": kind, "block": layout.block, "head_dim": head_dim, "dtype": dtype}
        self.layout = layout
        self.choose = select(SELECT, **context, blocks=layout.blocks).run
        masked = self.plain or layout.tokens <= MASKED.get(kind, 0)
        self.attend = None if masked else select(ATTEND, **context).run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Tensors) -> Tensor:
        """Attention of one site: q, k, v and result (B, S, H, D)."""
        layout, choose = self.layout, self.choose
        if layout is None or choose is None or q.shape[1] != layout.tokens or k.shape[1] != layout.tokens:
            raise ModelError(
                "sparse attention was called with other tokens than the transformer's input has."
            )
        # As a network in 16 bits would have them, also behind norms that autocast keeps in float32.
        dtype = _computed(q)
        with torch.autocast(q.device.type, enabled=False):
            bias = layout.key_bias(mask, len(q))
            q, k, v = (self._arranged(x.to(dtype), layout) for x in (q, k, v))
            n, c, scale = layout.video_blocks, layout.block, q.shape[-1] ** -0.5
            mq, mk = (self._means(x, layout)[:, :, :n] for x in (q, k))
            scores = (mq * scale) @ mk.transpose(-1, -2)
            index, count = choose(scores.detach(), self._number(n), 0.0, None, layout.text_blocks)
            routes = Routes(index, count, layout.sizes, c)
            if self.attend is None:
                out = masked_attention(q, k, v, routes, scale, bias)
            else:
                out = self.attend(q, k, v, routes, scale, bias)[0]
            beside = None
            if own.gate is not None:
                gate = own.gate.to(out.dtype)[:, None, None]
                beside = coarse_branch(scores, self._means(v, layout)[:, :, :n], gate, c)
            elif own.proj is not None:
                seen = middling(scores, routes.mask(layout.blocks)[:, :, :n, :n], SKIPPED)
                qs, ks, vs = (x[:, :, : n * c].unflatten(2, (n, c)) for x in (q, k, v))
                linear = linear_branch(qs, ks, vs, seen, layout.gone.view(-1, c)[:n])
                beside = F.linear(linear, own.proj.weight.to(out.dtype), own.proj.bias.to(out.dtype))
            if beside is not None:
                out = torch.cat([out[:, :, : n * c] + beside.to(out.dtype), out[:, :, n * c :]], 2)
            if self.plain:
                return out.index_select(2, layout.back).transpose(1, 2)
            return layout.restore(out)

    def _arranged(self, x: Tensor, layout: Layout) -> Tensor:
        if not self.plain:
            return layout.arrange(x)
        return x.transpose(1, 2).index_select(2, layout.order).masked_fill(layout.gone[:, None], 0.0)

    def _means(self, x: Tensor, layout: Layout) -> Tensor:
        if not self.plain:
            return layout.mean(x)
        sums = x.unflatten(2, (layout.blocks, layout.block)).float().sum(3)
        return sums / layout.counts[:, None].clamp(min=1)

    def _number(self, blocks: int) -> int:
        """Key blocks of a row, of so many."""
        if self.method == "sla":
            return max(1, math.ceil(self.density * blocks - 1e-9))
        return min(self.top, blocks)


class SparseSite:
    """The kernel of one attention site while training."""

    def __init__(self, form: SparseAttention, own: Tensors) -> None:
        self.form, self.own = form, own

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.form(q, k, v, mask, self.own)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Routes, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Dense attention under the mask of block lists; arguments and result as `block_attention`'s."""
    block, keys = routes.block, k.shape[2]
    allowed = routes.mask(keys // block).repeat_interleave(block, 2).repeat_interleave(block, 3)
    if routes.sizes is not None:
        slot = torch.arange(block, device=k.device)
        allowed = allowed & (slot < routes.sizes[..., None]).flatten(2)[:, :, None]
    if bias is not None:
        seen = torch.zeros((), dtype=q.dtype, device=q.device) + bias[:, None, None].to(q.dtype)
        allowed = seen.masked_fill(~allowed, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


# -- rounded linears --------------------------------------------------------------------------------------------------


class RoundedProduct(torch.autograd.Function):
    """Q(x) Q(w)^T + b of float32 x (M, K), w (N, K), b (N,) or None; gradients as if nothing were rounded.

    Integers up to 2^24 are exact in float32 and codes in TF32, so the numbers are those of an integer product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, both: bool, low: torch.dtype) -> Tensor:  # type: ignore[override]
        """Float32 (M, N). `both`: round x too. `low`: type of the products of the backward pass."""
        codes, scale = quantise_rows(weight)
        tokens, size = quantise_rows(x) if both else (x, None)
        ctx.save_for_backward(tokens, size, codes, scale)
        ctx.low, ctx.biased = low, bias is not None
        if size is None:
            return F.linear(tokens, codes * scale, bias)
        product = F.linear(tokens.float(), codes.float()) * size
        return product * scale[:, 0] if bias is None else torch.addcmul(bias, product, scale[:, 0])

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        tokens, size, codes, scale = ctx.saved_tensors
        seen = tokens if size is None else tokens * size
        low = gradient.to(ctx.low)
        to_input = (low @ (codes * scale).to(ctx.low)).float()
        to_weight = (low.t() @ seen.to(ctx.low)).float()
        return to_input, to_weight, gradient.sum(0) if ctx.biased else None, None, None


def straight(x: Tensor) -> Tensor:
    """Rows of x rounded to int8 and back, with the identity's derivative in both modes."""
    codes, scale = quantise_rows(x.detach())
    # r + (x - x) is r without rounding: x + (r - x) would not be.
    return codes * scale + (x - x.detach())


class RoundedLinear(nn.Linear):
    """A linear layer that rounds as `int8_linear` will, on the weights of another, and learns through the rounding."""

    def __init__(self, linear: nn.Linear, method: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.method, self.plain = method, False

    def forward(self, input: Tensor) -> Tensor:
        low, both = _computed(input), self.method == "w8a8"
        with torch.autocast(input.device.type, enabled=False):
            # As the layer of a model in 16 bits would get it.
            x = input.reshape(-1, self.in_features).to(low).float()
            if self.plain:
                out = F.linear(straight(x) if both else x, straight(self.weight), self.bias)
            else:
                out = RoundedProduct.apply(x, self.weight, self.bias, both, low)
            return out.to(low).view(*input.shape[:-1], self.out_features)


def linears(
    module: nn.Module, adapter: Adapter, method: str = "w8a8", *, expert: str = "transformer"
) -> list[RoundedLinear]:
    """Round the blocks' linear layers that `int8_linear` takes, in a transformer that learns in float32.

    Args:
        method: `w8a8` rounds weights and activations, `w8` weights alone.

    Raises:
        ConfigError: there is no such method, the student has LoRA layers, or no layer has a role.
    """
    if method not in MODES:
        raise ConfigError(f"linear layers of a student are rounded as {' or '.join(MODES)}, not {method}.")
    if any("lora_" in name for name, _ in module.named_parameters()):
        raise ConfigError("LoRA layers add to exact weights; train whole weights, or leave linears exact.")
    sites = [site for site in adapter.expert(expert, module).linears if site.role != "other"]
    if not sites:
        raise ConfigError(f"{type(module).__name__} has no linear layer with a role.")
    edit, made = Surgery(), []
    for site in sites:
        made.append(RoundedLinear(site.module, method))  # type: ignore[arg-type]
        edit.swap(site.parent, site.name, made[-1])
    return made


def _computed(x: Tensor) -> torch.dtype:
    """The type that a product of x is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# -- both -------------------------------------------------------------------------------------------------------------


def plain(module: M) -> M:
    """Run a module's forms on operations that have a forward mode (custom ones would give derivatives of 0)."""
    for part in module.modules():
        if isinstance(part, (SparseAttention, RoundedLinear)):
            part.plain = True
    return module


def extras(module: nn.Module) -> dict[str, Tensor]:
    """Trained tensors of attention, on the CPU: the content of a file for `vsa(file=)` or `sla(file=)`."""
    state = module.state_dict()
    return {
        k.removeprefix(SPARSE): v.detach().cpu().clone() for k, v in state.items() if k.startswith(SPARSE)
    }


def told(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Fields of the artefact that name what a student was trained with; empty for a dense and exact one."""
    out: dict[str, dict[str, Any]] = {}
    for part in module.modules():
        if isinstance(part, SparseAttention):
            out["attention"] = part.told()
        elif isinstance(part, RoundedLinear):
            mode = MODES[part.method]
            out["linears"] = {"method": part.method, "technique": "int8_linear", "settings": {"mode": mode}}
    return out
