"""Which kernels serve the layers of `fused_linear`, by size, measured on the GPU at hand and told to the receipt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vivace.core.errors import ConfigError
from vivace.kernels.api import AUTO, Choice, candidates, measured, select, timed
from vivace.kernels.quantise_rows.spec import OP as ROUNDING
from vivace.kernels.scaled_matmul.spec import OP

if TYPE_CHECKING:
    import torch

    from vivace.models.fused_parts import Kernels
    from vivace.techniques.base import Target

ROWS, ROWS_CPU = 16_384, 64
"""Tokens that are measured with, at most: enough for every multiprocessor of a GPU to have several tiles."""
SECONDS = 2.0
"""After so many no further round of a size is measured."""


class Size(NamedTuple):
    """K inputs and N outputs of a layer."""

    columns: int
    features: int

    def __str__(self) -> str:
        return f"{self.columns} -> {self.features}"


class Chooser:
    """The kernels of one plan: by size of layer, device and type of the input."""

    def __init__(self, kind: str, backend: str, target: Target) -> None:
        self.kind, self.backend, self.target = kind, backend, target
        grid = target.model.grid(target.model.workload())
        self.tokens = ROWS if grid is None else grid.tokens
        self._sizes: dict[Size, Kernels] = {}
        self._waiting: list[tuple[Size, Choice]] | None = []

    def kernels(self, size: Size, device: str, dtype: torch.dtype) -> Kernels:
        """Those of a size, chosen for a device and type now, and for others when they come (offloaded weights).

        Raises:
            ConfigError: none takes this size here, or not the one that is asked for.
        """
        from vivace.models.fused_parts import Kernels

        if size not in self._sizes:
            new = Kernels(lambda d, t: self._choose(size, d, t))
            new.serving(device, dtype)
            self._sizes[size] = new
        return self._sizes[size]

    def tell(self) -> None:
        """Tell the receipt: every kernel once, with the reason for every size that it serves."""
        reasons: dict[tuple[str, str], dict[str, list[Size]]] = {}
        runs: dict[tuple[str, str], Choice] = {}
        for size, choice in self._waiting or ():
            key = choice.op, choice.name
            runs[key] = choice
            reasons.setdefault(key, {}).setdefault(choice.why, []).append(size)
        for key, choice in runs.items():
            found = reasons[key]
            told = [f"{', '.join(map(str, sizes))}: {why}" for why, sizes in found.items()]
            self.target.chosen(
                Choice(*key, " | ".join(told) if len(found) > 1 else next(iter(found)), choice.run)
            )
        self._waiting = None

    def _choose(self, size: Size, device: str, dtype: torch.dtype) -> tuple[str, str]:
        context = {"device": device, "kind": self.kind, "columns": size.columns, "features": size.features}
        known = [c.name for c in candidates(ROUNDING)]
        rounding = select(ROUNDING, self.backend if self.backend in known else AUTO, **context)
        product = self._product(size, rounding, device, dtype, context)
        for choice in (rounding, product):
            if self._waiting is None:
                self.target.chosen(choice)
            else:
                self._waiting.append((size, choice))
        return rounding.name, product.name

    def _product(
        self, size: Size, rounding: Choice, device: str, dtype: torch.dtype, context: dict[str, Any]
    ) -> Choice:
        if self.backend == "hopper" and not _half(dtype):
            raise ConfigError(
                f"kernel hopper gives bfloat16 or float16, and the layers are {dtype}; set backend: triton."
            )
        if self.backend != AUTO:
            return select(OP, self.backend, **context)
        able = [c.name for c in candidates(OP) if not c.refuse(context) and not c.avoid(context)]
        able = [name for name in able if _half(dtype) or name != "hopper"]
        if able:
            return self._fastest(size, rounding, able, dtype, context)
        if device == "cuda":
            return select(OP, **context)
        choice = select(OP, "reference", **context)
        why = f"EMULATED (no units here multiply {self.kind}: right numbers, slower than the layers they replace)"
        return Choice(OP, choice.name, why, choice.run)

    def _fastest(
        self, size: Size, rounding: Choice, able: list[str], dtype: torch.dtype, context: dict[str, Any]
    ) -> Choice:
        """By the clock, with how the whole layer compares to what it replaces.

        Raises:
            ConfigError: all fail, or none is able.
        """
        import torch

        device = context["device"]
        rows = min(self.tokens, ROWS_CPU if device == "cpu" else ROWS)
        with torch.no_grad():
            make = torch.Generator(device).manual_seed(0)
            x, weight = (
                torch.randn(n, size.columns, generator=make, device=device).to(dtype)
                for n in (rows, size.features)
            )
            bias = weight.new_zeros(size.features)
            round_rows: Callable[..., Any] = rounding.run
            (a, a_scale), (b, b_scale) = (round_rows(t[None], self.kind) for t in (x, weight))
            call = (a[0], a_scale[0], b[0], b_scale[0], bias, None, dtype)
            table = measured(OP, [call], context, names=able, budget=SECONDS)
            if not table.ranking:
                raise ConfigError(
                    f"no kernel for {OP} runs here: {'; '.join(f'{n}: {w}' for n, w in table.left_out.items())}."
                )
            choice = select(OP, measured=table, **context)
            rivals: dict[str, Callable[[], Any]] = {
                "was": lambda: torch.nn.functional.linear(x, weight, bias),
                "is": lambda: choice.run(*_rounded(round_rows, x, self.kind), *call[2:]),
            }
            timed(rivals, device, 1)
            times = timed(rivals, device, 5, budget=SECONDS)
        was, now = (sorted(times[name])[len(times[name]) // 2] for name in ("was", "is"))
        beside = f"with rounding {was / now:.2f} times as fast as the layer it replaces"
        if now > was:
            beside = f"SLOWER: {beside}"
        return Choice(OP, choice.name, f"{beside} ({rows:,} tokens); {choice.why}", choice.run)


def _rounded(run: Callable[..., Any], x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = run(x[None], kind)
    return codes[0], scale[0]


def _half(dtype: torch.dtype) -> bool:
    return str(dtype) in ("torch.bfloat16", "torch.float16")
