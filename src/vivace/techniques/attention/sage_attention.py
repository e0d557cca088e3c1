"""SageAttention: dense attention with INT8 scores of smoothed keys and FP8 values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.kernels.low_bit_attention.spec import OP, PV, QK, choose
from vivace.models.adapter import Expert, ModelDescription, RootCall
from vivace.techniques.attention.placed import PlacedAttention, own_backend
from vivace.techniques.base import (
    Card,
    Cite,
    Need,
    Paradigm,
    Problem,
    Stage,
    Target,
    exclusive,
    knob,
)

if TYPE_CHECKING:
    import torch


class LowBitSite:
    """The kernel of one attention site: the model's own, or the low-bit one that the technique has set.

    A mask that is not one of keys alone goes to the model's own attention.
    """

    def __init__(self, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        from vivace.kernels.block_attention.layout import bias_of

        self._dispatch, self._backend, self._bias_of = dispatch_attention_fn, backend, bias_of
        self.attend: Callable[..., Any] | None = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        if self.attend is None or not of_keys(mask, len(q), k.shape[1]):
            return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)
        bias = None if mask is None else self._bias_of(mask).expand(len(q), -1)
        out, _ = self.attend(*(x.transpose(1, 2) for x in (q, k, v)), bias=bias)
        return out.transpose(1, 2)


def of_keys(mask: torch.Tensor | None, batch: int, keys: int) -> bool:
    """Whether a mask is none, or says the same of a key to every head and query: (B or 1, 1, 1, S)."""
    if mask is None:
        return True
    return mask.ndim == 4 and tuple(mask.shape[1:]) == (1, 1, keys) and mask.shape[0] in (1, batch)


@dataclass(frozen=True, kw_only=True)
class SageAttention(PlacedAttention):
    """All pairs are computed, in 8 bits (arXiv 2410.02367, 2411.10958; `vivace.kernels.low_bit_attention`).

    The mean of the keys, which no softmax notices, is subtracted first: it is what spoils their scales. First steps and
    layers can be left in the model's precision.
    """

    card: ClassVar[Card] = Card(
        name="sage_attention",
        paradigm=Paradigm.ATTENTION,
        summary="Dense attention with INT8 scores, after the keys have lost their mean, and FP8 values.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="SageAttention2: Efficient Attention with Thorough Outlier Smoothing and "
            "Per-thread INT4 Quantization",
            arxiv="2411.10958",
            code="https://github.com/thu-ml/SageAttention",
            differs="a kernel of our own in Triton: INT8 scores (no INT4), one scale for 32 rows instead of one for a "
            "thread of the tensor cores, queries are not smoothed; steps and layers that stay in full precision are "
            "the first ones, where the papers choose layers by calibration",
        ),
        needs=(Need.ATTENTION_SITES,),
        fidelity=0.1,
    )

    qk: str = knob("int8", choices=QK)
    """Of the scores: INT8, or the model's own precision."""
    pv: str = knob("fp8", choices=PV)
    """Of the product with the values: FP8 (compute capability 8.9 and above), or the model's own precision."""
    block: int = knob(128, choices=(64, 128))
    """Tokens that the kernel handles at a time."""
    dense_steps: int = knob(0, low=0, high=50)
    """First steps in the model's own precision."""
    dense_layers: int = knob(0, low=0, high=8)
    """Layers in the model's own precision, at the front."""
    backend: str = "auto"
    """Kernel by name (`vivace.kernels.low_bit_attention`), or `auto`. On a CPU the roundings are emulated."""

    # -- before anything is loaded ------------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        found = self.misplaced(model, OP, self.backend)
        if self.qk == self.pv == "bf16":
            found.append(
                self.problem("pointless", "qk and pv are both bf16: nothing is left to be done in 8 bits.")
            )
        return found

    # -- on a live pipeline -------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            placed = []
            for site in self._sites(expert):
                placed.append(LowBitSite(own_backend(site)))
                target.set_kernel(site, placed[-1])
            if placed:
                target.around_expert(expert, self._handler(target, expert, placed))
                target.report(self.card.name, "sites", len(placed))

    def _handler(self, target: Target, expert: Expert, placed: list[LowBitSite]) -> Callable[..., Any]:
        built: dict[Any, Callable[..., Any]] = {}

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            evaluation = target.clock.evaluation
            assert evaluation is not None  # around_expert calls handlers inside an evaluation only
            if target.clock.step < self.dense_steps:
                return run(call)
            device = call.values["hidden_states"].device
            if device not in built:
                built[device] = self._kernel(target, expert, device)
            evaluation.mark(self.card.name)
            target.report(self.card.name, "low_bit_evaluations", 1)
            for kernel in placed:
                kernel.attend = built[device]
            try:
                return run(call)
            finally:
                for kernel in placed:
                    kernel.attend = None

        return handler

    def _kernel(self, target: Target, expert: Expert, device: torch.device) -> Callable[..., Any]:
        """The kernel of a device; the receipt hears which, and whether it only emulates."""
        modes: dict[str, Any] = {"qk": self.qk, "pv": self.pv, "block": self.block}
        choice = choose(self.backend, device=device.type, head_dim=expert.attentions[0].head_dim, **modes)
        target.chosen(choice)

        def attend(*args: Any, **kwargs: Any) -> Any:
            return choice.run(*args, **modes, **kwargs)

        return attend
