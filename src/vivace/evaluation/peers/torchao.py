"""torchao's quantised linears in the blocks. They execute the same products in fewer bits: FLOPs stay, bytes fall."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vivace.core.errors import NoEffectError
from vivace.core.quiet import quiet
from vivace.core.receipt import Receipt
from vivace.evaluation.peers.base import Installed, Peer, PeerCard, experts
from vivace.techniques.base import Cite, Paradigm

_CITE = Cite(
    title="TorchAO: PyTorch-Native Training-to-Serving Model Optimization",
    arxiv="2507.16099",
    code="https://github.com/pytorch/ao",
)
_EAGER = (
    "torchao is made for torch.compile; run eagerly it is slower than the original model. Timed runs should compile "
    "the blocks (`compile_backend`)."
)
_ONE_POINT = "No knob trades quality for speed: it is one point, not a curve."


_COMPILER = (
    "coordinate_descent_tuning",
    "coordinate_descent_check_all_directions",
    "force_fuse_int_mm_with_mul",
    "fx_graph_cache",
)


class _Quantised(Peer):
    """What the three have in common."""

    abstract = True
    multiple: ClassVar[int] = 8
    """Sides of a linear must be multiples of this for the GPU's kernels; others stay as they are."""

    def config(self) -> Any:
        """torchao's configuration object."""
        raise TypeError(f"{type(self).__name__} gives no configuration")

    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        from torch import nn

        linears = 0

        def chosen(module: Any, path: str) -> bool:
            nonlocal linears
            fits = isinstance(module, nn.Linear) and "blocks" in path
            fits = fits and not (module.in_features % self.multiple or module.out_features % self.multiple)
            linears += fits
            return fits

        put_back = _remember_compiler_settings()
        try:
            with quiet():
                from torchao.quantization import quantize_

                for transformer in experts(pipeline):
                    quantize_(transformer, self.config(), filter_fn=chosen)
        except BaseException:
            put_back()
            raise
        if not linears:
            put_back()
            raise NoEffectError(f"{self.name} found no linear to convert in {type(pipeline).__name__}.")
        # The session's snapshot puts the original weights back: the same tensors.
        return Installed(put_back, effects={"linears": float(linears)})

    def acted(self, receipt: Receipt) -> bool:
        return any(t.name == self.name and t.effects.get("linears", 0) > 0 for t in receipt.techniques)


class Int8WeightOnly(_Quantised):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="torchao.int8_weight_only",
        package="torchao",
        family=Paradigm.COMPRESSION,
        summary="Weights of the blocks' linears in int8, products in the model's own type.",
        knob="",
        sweep=(),
        default={},
        notes=(_ONE_POINT, _EAGER, "Saves memory; the products themselves are not faster."),
        cite=_CITE,
    )

    def config(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()


class Int8Dynamic(_Quantised):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="torchao.int8_dynamic",
        package="torchao",
        family=Paradigm.COMPRESSION,
        summary="Weights and activations of the blocks' linears in int8, activations scaled token by token.",
        knob="",
        sweep=(),
        default={},
        notes=(_ONE_POINT, _EAGER),
        cite=_CITE,
    )

    def config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()


class Float8Dynamic(_Quantised):
    """See the card."""

    abstract = False
    multiple = 16
    card: ClassVar[PeerCard] = PeerCard(
        name="torchao.float8_dynamic",
        package="torchao",
        family=Paradigm.COMPRESSION,
        summary="Weights and activations of the blocks' linears in float8, scaled row by row.",
        knob="",
        sweep=(),
        default={},
        notes=(
            _ONE_POINT,
            _EAGER,
            "Scales are per row: one scale for a whole tensor would couple the clips of a batch.",
        ),
        cite=_CITE,
        needs_cuda=True,
    )

    def missing(self) -> str:
        if reason := super().missing():
            return reason
        import torch

        if torch.cuda.get_device_capability() < (8, 9):
            return f"{self.name} needs a GPU of compute capability 8.9 or later (Ada, Hopper)."
        return ""

    def config(self) -> Any:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _remember_compiler_settings() -> Callable[[], None]:
    """torchao sets the compiler up for the whole process when it converts; returns what puts that back."""
    from torch._inductor import config

    before = {name: getattr(config, name) for name in _COMPILER}
    names_before = config.triton.unique_kernel_names

    def put_back() -> None:
        for name, value in before.items():
            setattr(config, name, value)
        setattr(config.triton, "unique_kernel_names", names_before)  # noqa: B010

    return put_back
