"""For each head, the order of the axes under which its attention map falls into the fewest blocks, and those blocks.

`AxisMass` watches exact runs (as `mask_search` does): sampled queries of every block, in each of the six orders of
(frame, height, width), give the probability that each block of keys gets. `pick` turns the means into an order and a
mask.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from vivace.calibration.artifact import Key
from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid
from vivace.models.adapter import ModelDescription
from vivace.techniques.attention.head_patterns import AXES, in_axis_order
from vivace.techniques.attention.mask_file import read, write
from vivace.techniques.attention.mask_search import AT_ONCE, Recorder, scores_of
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

NAME = "axis_mass"
FORMAT, VERSION = "vivace-orders", 1
COMMAND = (
    "`vivace calibrate --technique paro` or vivace.plans.mask_searching.search_orders(pipeline, prompts)"
)


@dataclass(frozen=True, kw_only=True)
class OrderFile:
    """Orders and masks, head by head.

    Attributes:
        key: of the exact runs; family, weights and shape bind.
        grid: (frames, height, width) in tokens.
        block: most tokens of a block; a small clip has smaller ones (`head_patterns.in_axis_order`).
        orders: expert -> [layer][head], a number into `head_patterns.AXES`.
        masks: expert -> [layer], bool (heads, N, N) packed as text (`packed`), video blocks in the head's order.
        mass: of the sampled probability that the masks hold, mean over heads.
        prompts, prompts_sha256, seed: what it was measured on.
        vivace: version that made it.
    """

    key: Key
    grid: tuple[int, int, int]
    block: int
    orders: Mapping[str, Sequence[Sequence[int]]]
    masks: Mapping[str, Sequence[str]]
    mass: float
    prompts: int
    prompts_sha256: str
    seed: int
    vivace: str

    def __post_init__(self) -> None:
        if {e: len(x) for e, x in self.orders.items()} != {e: len(x) for e, x in self.masks.items()}:
            raise ValueError("orders and masks are not for the same layers")
        if any(not 0 <= o < len(AXES) for layers in self.orders.values() for layer in layers for o in layer):
            raise ValueError(f"an order is a number from 0 to {len(AXES) - 1}")

    def mask(self, expert: str, layer: int) -> np.ndarray:
        """The mask of a layer, bool (heads, N, N).

        Raises:
            ConfigError: it has not the size that grid and block make.
        """
        blocks = len(in_axis_order(TokenGrid(*self.grid), AXES[0], self.block))
        try:
            return unpacked(self.masks[expert][layer], (len(self.orders[expert][layer]), blocks, blocks))
        except (ValueError, zlib.error) as error:
            raise ConfigError(
                f"a mask of {expert} is damaged ({error}); make the file again with {COMMAND}."
            ) from None

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        return write(path, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: there is no such file, or it is something else; the sentence says what to do.
        """
        data = read(path, "file of axis orders", FORMAT, VERSION, COMMAND)
        try:
            values = {k: v for k, v in data.items() if k not in ("format", "version")}
            values["key"] = Key(**values["key"])
            frames, height, width = (int(n) for n in values["grid"])
            values["grid"] = (frames, height, width)
            return cls(**values)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); make it again with {COMMAND}.") from None

    def shape(self) -> dict[str, list[int]]:
        """Expert -> number of heads of every layer."""
        return {expert: [len(layer) for layer in layers] for expert, layers in self.orders.items()}


def packed(mask: np.ndarray) -> str:
    """A bool array as text: bits, deflated, base64."""
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


def unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `packed`.

    Raises:
        ValueError: the text holds another number of bits, or is none of ours.
    """
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    size = int(np.prod(shape))
    if bits.size != -(-size // 8):
        raise ValueError(f"{bits.size} bytes for {size} bits")
    return np.unpackbits(bits, count=size).astype(bool).reshape(shape)


def pick(maps: np.ndarray, mass: float, density: float = 0.0) -> tuple[np.ndarray, np.ndarray, float]:
    """Order and mask of every head of a layer.

    Args:
        maps: float (orders, heads, N, N), probability that blocks of queries give to blocks of keys.
        mass: with `density` 0, the share of a head's probability that its mask must hold. The order that needs the
            fewest blocks for it is taken, the first of equals.
        density: above 0, the share of blocks that the mask has; the order that holds most probability in so many is
            taken.

    Returns:
        (numbers of orders int64 (heads,), bool (heads, N, N), mean probability held). A block always sees itself.
    """
    kinds, heads, n, _ = maps.shape
    flat = maps.reshape(kinds, heads, n * n).astype(np.float64)
    flat = flat / np.maximum(flat.sum(-1, keepdims=True), 1e-30)
    ranked = np.argsort(-flat, axis=-1, kind="stable")
    held = np.take_along_axis(flat, ranked, -1).cumsum(-1)
    if density > 0.0:
        number = np.full((kinds, heads), min(n * n, max(1, int(np.ceil(density * n * n - 1e-9)))))
        # Rounded, so that orders that hold the same are equals.
        order = np.take_along_axis(held, number[..., None] - 1, -1)[..., 0].round(9).argmax(0)
    else:
        number = np.minimum((held < mass - 1e-9).sum(-1) + 1, n * n)
        order = number.argmin(0)
    mask = np.zeros((heads, n * n), dtype=bool)
    for head, o in enumerate(order):
        mask[head, ranked[o, head, : number[o, head]]] = True
    mask = mask.reshape(heads, n, n) | np.eye(n, dtype=bool)
    kept = np.take_along_axis(flat, order[None, :, None], 0)[0] * mask.reshape(heads, -1)
    return order, mask, float(kept.sum(-1).mean())


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """One order on a device: sampled queries `rows` (R,) and the block of each (R,), and the block of every video token
    (video,) where it stands in the grid; `weight` (N,) real queries for each sampled one of a block."""

    rows: torch.Tensor
    of_row: torch.Tensor
    of_token: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AxisMass(Recorder):
    """Measures how much probability blocks of keys get from blocks of queries, in the six orders of the axes.

    It keeps six maps for each head in host memory.
    """

    abstract: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.ATTENTION,
        summary="Measures each head's attention by blocks, in the six orders of the axes; changes nothing.",
        objective="calibration",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        cite=Cite(title="PAROAttention", arxiv="2506.16054"),
        lossless=True,
    )

    rows: int = knob(2, low=1, high=128)
    """Queries of every block that are looked at, spread evenly over it."""

    def prepare(self, grid: TokenGrid, device: Any) -> tuple[TokenGrid, tuple[Ordered, ...]]:
        import torch

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        first, out = grid.text if grid.text_first else 0, []
        for axes in AXES:
            slots = in_axis_order(grid, axes, self.block)
            counts = (slots >= 0).sum(1)
            taken = np.minimum(self.rows, counts)
            rows = [
                s[(2 * np.arange(n) + 1) * c // (2 * n)] for s, c, n in zip(slots, counts, taken, strict=True)
            ]
            block, slot = np.nonzero(slots >= 0)
            of_token = np.empty(grid.video, dtype=np.int64)
            of_token[slots[block, slot]] = block
            of_row = np.repeat(np.arange(len(slots)), taken)
            out.append(
                Ordered(put(np.concatenate(rows) + first), put(of_row), put(of_token), put(counts / taken))
            )
        return grid, tuple(out)

    def measure(
        self, q: Any, k: Any, v: Any, mask: Any, prepared: tuple[TokenGrid, tuple[Ordered, ...]]
    ) -> torch.Tensor:
        """Probability in tokens, float32 (orders, H, N, N) on the host, mean over the batch; text keys left out."""
        import torch

        grid, orders = prepared
        b, s, h, _ = q.shape
        first = grid.text if grid.text_first else 0
        at_once = max(1, AT_ONCE // (b * h * s))
        out = []
        for order in orders:
            n = len(order.weight)
            total = torch.zeros(b, h, n, n, device=q.device)
            for start in range(0, len(order.rows), at_once):
                part = slice(start, start + at_once)
                p = torch.softmax(scores_of(q, k, mask, order.rows[part]), -1).nan_to_num(0.0)
                p = p[..., first : first + grid.video]
                by_key = torch.zeros(*p.shape[:-1], n, device=q.device).index_add_(-1, order.of_token, p)
                total.index_add_(2, order.of_row[part], by_key)
            out.append((total * order.weight.float()[:, None]).mean(0))
        return torch.stack(out).cpu()

    def file(
        self,
        model: ModelDescription,
        key: Key,
        prompts: int,
        prompts_sha256: str,
        seed: int,
        vivace: str,
        mass: float = 0.9,
        density: float = 0.0,
    ) -> OrderFile:
        """Orders and masks from what was measured; `mass` and `density` as for `pick`.

        Raises:
            ConfigError: nothing was seen.
        """
        layers = self.by_layer(model)
        grid = self.sink.grid
        assert grid is not None  # something was seen
        found = {e: [pick(x, mass, density) for x in each] for e, each in layers.items()}
        held = [layer[2] for each in found.values() for layer in each]
        return OrderFile(
            key=key,
            grid=(grid.frames, grid.height, grid.width),
            block=self.block,
            orders={e: [order.tolist() for order, _, _ in each] for e, each in found.items()},
            masks={e: [packed(mask) for _, mask, _ in each] for e, each in found.items()},
            mass=float(f"{np.mean(held):.5g}"),
            prompts=prompts,
            prompts_sha256=prompts_sha256,
            seed=seed,
            vivace=vivace,
        )
