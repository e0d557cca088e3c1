"""Quantised linear layers: every backend against the definition in float64, rotation, smoothing and branch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from vivace.core.errors import ConfigError
from vivace.kernels.api import select
from vivace.kernels.quant_linear import formats, int_mm, layer, reference, rotation, scaled_mm
from vivace.kernels.quant_linear.spec import ACTIVATIONS, OP, WEIGHTS, Recipe, emulated

INTEGER = [
    Recipe(weights=w, activations=a, group=g, rotate=r, low_rank=k)
    for w, a, g, (r, k) in itertools.product(
        ("int8", "int4"), ("int8", "int4"), (0, 32), ((False, 0), (True, 4))
    )
]


def linear(k: int = 96, n: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)


def book(
    x: torch.Tensor, old: nn.Linear, new: layer.QuantLinear, smooth: torch.Tensor | None
) -> torch.Tensor:
    """The definition in float64, from the formats, which have tests of their own."""
    recipe = new.recipe
    weight, rows = old.weight.double(), x.double().reshape(-1, x.shape[-1])
    if smooth is not None:
        weight, rows = weight * smooth.double(), rows / smooth.double()
    if recipe.rotate:
        size = rotation.block_of(old.in_features)
        eye = torch.eye(old.in_features // size, dtype=torch.float64)
        turn = rotation.signs(old.in_features).double()[:, None] * torch.kron(
            eye, rotation.hadamard(size).double()
        )
        weight, rows = weight @ turn, rows @ turn
    branch: torch.Tensor | float = 0.0
    if new.up is not None and new.down is not None:
        product = new.up.weight.double() @ new.down.weight.double()
        weight, branch = weight - product, rows @ product.T
    codes = formats.quantise(weight.float(), recipe.weights, recipe.group, tensor=recipe.weights == "nvfp4")
    weight = formats.dequantise(codes).double()
    if recipe.activations != "none":
        rows = formats.rounded(rows.float(), recipe.activations).double()
    out = rows @ weight.T + branch + (0.0 if old.bias is None else old.bias.double())
    return out.view(*x.shape[:-1], -1)


def close(got: torch.Tensor, want: torch.Tensor, most: float = 2e-3) -> None:
    """A value on the edge between two codes may fall to either side after a product in another order."""
    assert (got.double() - want).norm() / want.norm() < most


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_reference_is_the_definition(weights, activations) -> None:
    old, x = linear(), torch.randn(2, 7, 96)
    new = reference.quantise(old, Recipe(weights=weights, activations=activations))
    close(new(x), book(x, old, new, None), 1e-5)
    assert new.bias is old.bias


@pytest.mark.parametrize("recipe", INTEGER, ids=str)
def test_the_integer_product_is_the_definition(recipe) -> None:
    old, x = linear(), torch.randn(3, 100, 96)  # more rows than are converted at a time
    smooth = torch.rand(96) + 0.5
    new = int_mm.quantise(old, recipe, smooth)
    close(new(x), book(x, old, new, smooth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaled_product_is_the_definition(dtype) -> None:
    old, x = linear(dtype=dtype), torch.randn(2, 9, 96).to(dtype)
    new = scaled_mm.quantise(old, Recipe(weights="fp8", activations="fp8"))
    close(new(x), book(x, old, new, None), 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [24, 40, 50])
def test_any_width_and_no_bias(bias, columns) -> None:
    """Widths that are no multiple of a block, a group or two."""
    old, x = linear(columns, 20, bias), torch.randn(5, columns)
    for weights, group in [(w, 0) for w in WEIGHTS] + [("int4", 64), ("int8", 32)]:
        recipe = Recipe(weights=weights, activations="int8", group=group, rotate=True)
        new = reference.quantise(old, recipe)
        close(new(x), book(x, old, new, None))
        if recipe.integer:
            close(int_mm.quantise(old, recipe)(x), book(x, old, new, None))


@pytest.mark.parametrize("columns", [1, 24, 96, 1536, 8960, 2048])
def test_rotation_is_orthonormal_and_by_blocks(columns) -> None:
    turn = rotation.Rotation(columns)
    size = rotation.block_of(columns)
    assert columns % size == 0
    assert size == {1: 1, 24: 8, 96: 32, 1536: 512, 8960: 256, 2048: 1024}[columns]
    x = torch.randn(3, columns)
    y = turn(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    whole = rotation.hadamard(size).double()
    want = ((x * rotation.signs(columns)).double().view(3, -1, size) @ whole).view(3, -1)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    assert columns < 24 or 0.3 < (rotation.signs(columns) > 0).double().mean() < 0.7


def test_rotation_spreads_an_outlier_and_a_common_mean() -> None:
    turn = rotation.Rotation(1024)
    x = torch.randn(4, 1024)
    x[:, 7] = 100.0
    assert turn(x).abs().max() < 10
    assert turn(torch.ones(1, 1024)).abs().max() < 6  # without signs it would be 32


def test_outliers_need_a_remedy_and_each_is_one() -> None:
    """One strong input channel spoils 4-bit activations; rotation, smoothing and a branch each help."""
    old = linear(256, 64)
    x = torch.randn(64, 256)
    x[:, 5] *= 60.0
    exact = old(x)

    def error(**changes) -> float:
        smooth = changes.pop("smooth", None)
        new = reference.quantise(old, Recipe(weights="int4", activations="int4", group=64, **changes), smooth)
        return ((new(x) - exact).norm() / exact.norm()).item()

    plain = error()
    assert error(rotate=True) < 0.7 * plain
    assert error(smooth=layer.smoothing(x.abs().amax(0), old.weight, 0.5)) < 0.7 * plain


def test_smoothing_balances_both_sides() -> None:
    x, old = torch.rand(64) + 0.1, linear(64, 32)
    x[3] = 0.0
    for strength in (0.25, 0.5, 1.0):
        s = layer.smoothing(x, old.weight, strength)
        tops = old.weight.abs().amax(0)
        want = x**strength / tops ** (1 - strength)
        want[3] = 1.0
        torch.testing.assert_close(s, want)
    s = layer.smoothing(x, old.weight, 0.5)
    torch.testing.assert_close((x / s)[4:], (old.weight.abs().amax(0) * s)[4:])


@pytest.mark.parametrize("size", [(48, 96), (600, 640)])
def test_the_branch_is_the_nearest_of_its_rank(size) -> None:
    """Eckart and Young: the rest has the squared singular values beyond the rank; also when iterated."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*size, generator=generator) * torch.logspace(0, -2, size[1])
    left, right = layer.low_rank(weight, 8)
    rest = (weight - left @ right).norm() ** 2
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(rest, (values[8:] ** 2).sum(), rtol=2e-3, atol=0)


def test_a_branch_makes_four_bits_better_and_is_stored_in_16() -> None:
    torch.manual_seed(0)
    old = linear(256, 128)
    old.weight += 3 * torch.randn(128, 4) @ torch.randn(4, 256) / 16
    x = torch.randn(32, 256)
    exact = old(x)
    errors = []
    for rank in (0, 8, 32):
        new = reference.quantise(old, Recipe(weights="int4", low_rank=rank))
        errors.append((new(x) - exact).norm() / exact.norm())
        extra = 2 * rank * (256 + 128)
        assert new.nbytes == 128 * 128 + 128 * 4 + extra
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < errors[1]
    assert reference.quantise(linear(6, 20), Recipe(low_rank=64)).down.out_features == 3


def test_bfloat16_in_bfloat16_out_and_originals_alone() -> None:
    old, x = linear(dtype=torch.bfloat16), torch.randn(2, 5, 96, dtype=torch.bfloat16)
    before = old.weight.clone()
    for recipe in (
        Recipe(),
        Recipe(activations="int8"),
        Recipe(weights="int4", group=32, rotate=True, low_rank=4),
    ):
        for module in (reference, int_mm):
            if module is int_mm and not recipe.integer:
                continue
            new = module.quantise(old, recipe)
            assert new(x).dtype == torch.bfloat16
            close(new(x), old(x).double(), 0.2)
    assert torch.equal(old.weight, before)


def test_a_full_layer_is_the_original() -> None:
    old, x = linear(), torch.randn(4, 96)
    new = reference.quantise(old, Recipe(weights="int4"))
    new.full = True
    assert not torch.equal(new(x), old(x))  # there is no original yet
    new.original = old.weight
    assert torch.equal(new(x), old(x))
    new.full = False
    assert not torch.equal(new(x), old(x))


@pytest.mark.parametrize(
    "recipe", [INTEGER[0], INTEGER[5], Recipe(weights="nvfp4", activations="nvfp4")], ids=str
)
def test_a_token_does_not_depend_on_the_others(recipe) -> None:
    module = int_mm if recipe.integer else reference
    new = module.quantise(linear(64, 32), recipe)
    x = torch.randn(4, 10, 64)
    alone = new(x[:1])
    x[1:] *= 1e4
    torch.testing.assert_close(new(x)[:1], alone, rtol=1e-5, atol=1e-5)


def test_zeros_stay_zeros() -> None:
    old = linear(64, 32, bias=False)
    for activations in ACTIVATIONS:
        assert not reference.quantise(old, Recipe(activations=activations, rotate=True))(
            torch.zeros(3, 64)
        ).any()


@pytest.mark.parametrize(
    "recipe", [INTEGER[1], INTEGER[7], Recipe(weights="mxfp4", activations="mxfp8")], ids=str
)
def test_one_graph(recipe) -> None:
    module = int_mm if recipe.integer else reference
    new, x = module.quantise(linear(), recipe), torch.randn(20, 96)
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    close(compiled(x), new(x).double(), 1e-4)
    torch._dynamo.reset()


def test_recipes_and_choices() -> None:
    for wrong in (
        {"weights": "int7"},
        {"activations": "mxfp4"},
        {"group": 16},
        {"weights": "fp8", "group": 64},
    ):
        with pytest.raises(ValueError, match=r"recipe|blocks"):
            Recipe(**wrong)
    with pytest.raises(ValueError, match="rank"):
        Recipe(low_rank=-1)
    recipe = Recipe(weights="int4", activations="int8", group=64, rotate=True, low_rank=8)
    assert Recipe(**recipe.to_dict()) == recipe
    choice = select(OP, device="cpu", recipe=recipe, features=64)
    assert choice.name == "int_mm"
    assert not emulated(choice, recipe)
    recipe = Recipe(weights="nvfp4", activations="nvfp4")
    choice = select(OP, device="cpu", recipe=recipe, features=64)
    assert emulated(choice, recipe)
    assert "integer product needs" in choice.why
    assert not emulated(choice, Recipe(weights="nvfp4"))
    recipe = Recipe(weights="fp8", activations="fp8")
    assert select(OP, device="cpu", recipe=recipe, features=64).name == "reference"
    assert select(OP, "scaled_mm", device="cpu", recipe=recipe, features=64).name == "scaled_mm"
    with pytest.raises(ConfigError, match="multiples of 16"):
        select(OP, "scaled_mm", device="cpu", recipe=recipe, features=24)
    with pytest.raises(ConfigError, match="multiples of 8"):
        select(OP, "int_mm", device="cuda", recipe=INTEGER[0], features=12)
    for module in (int_mm, scaled_mm):
        with pytest.raises(ValueError, match="needs"):
            module.quantise(linear(), Recipe())
