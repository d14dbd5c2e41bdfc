"""Activation grids against plain float64 loops: every width, convention and granularity, ties and ends by hand."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.activations import GRANULARITIES, ActivationGrid, ActivationQuantizer
from tests.reference import activations as reference

KINDS = {
    "normal": lambda noise: noise,
    "zero": torch.zeros_like,
    "positive": torch.abs,
    "negative": lambda noise: -noise.abs(),
    "constant": lambda noise: noise[:1].expand_as(noise),
    "outlier": lambda noise: torch.cat([1e4 * noise[:1], noise[1:]]),
    "below the smallest step": lambda noise: 1e-6 * noise,
    "large": lambda noise: 1e4 * noise,
}
GRIDS = st.builds(
    ActivationGrid,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    clip_ratio=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
)


@st.composite
def values(draw):
    """Tokens of any kind, in any float type."""
    channels = draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5))
    rows = [KINDS[kind](torch.randn(channels, generator=generator)) for kind in kinds]
    return torch.stack(rows).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def close_to_a_tie(steps):
    """Whether float32 may round it to the other side."""
    return abs(steps % 1 - 0.5) <= 1e-4 + 1e-6 * abs(steps)


def check_token(found, token, low, high, grid):
    """Every value of one token whose grid was fitted to the range from low to high."""
    step, zero_steps = reference.fit(low, high, grid.bits, grid.symmetric, grid.clip_ratio)
    least, largest = reference.ends(grid.bits, grid.symmetric, zero_steps)
    for one, value in zip(found.tolist(), token.tolist(), strict=True):
        steps = reference.rounded(value, step, least, largest)
        # Near a tie either neighbour will do; where the zero is near one, the ends may lie one step off.
        unsure = close_to_a_tie(value / step) or (steps in (least, largest) and close_to_a_tie(zero_steps))
        slack = abs(steps * step) * (torch.finfo(found.dtype).eps + 1e-6)
        assert abs(one - steps * step) <= slack + (1.01 * step if unsure else 0)


@given(values(), GRIDS, st.integers(0, 10**6))
def test_equals_the_reference(tokens, grid, seed):
    """Static grids are calibrated on other tokens, half as large, so that many values lie outside."""
    if grid.static:
        calibration = 0.5 * torch.randn(20, tokens.shape[1], generator=torch.Generator().manual_seed(seed))
        quantizer = ActivationQuantizer.calibrated(grid, calibration.amin(0), calibration.amax(0))
        ranges = [(calibration.min().item(), calibration.max().item())] * len(tokens)
    else:
        quantizer = ActivationQuantizer.calibrated(grid, torch.zeros(1), torch.zeros(1))
        assert quantizer.scale is None
        ranges = [(token.min().item(), token.max().item()) for token in tokens]
    found = quantizer(tokens)
    assert found.dtype == tokens.dtype
    for one, token, (low, high) in zip(found, tokens, ranges, strict=True):
        check_token(one, token, low, high, grid)
    assert torch.equal(found[tokens == 0], tokens[tokens == 0])


@given(values(), GRIDS)
def test_nothing_is_further_off_than_half_a_step(tokens, grid):
    """On its own range, unclipped; the asymmetric zero is rounded, which costs the ends up to another half."""
    tokens = tokens.float()
    grid = ActivationGrid(bits=grid.bits, symmetric=grid.symmetric, granularity=grid.granularity)
    low, high = tokens.amin(-1, keepdim=True), tokens.amax(-1, keepdim=True)
    if grid.static:
        low, high = low.amin(), high.amax()
    levels = 2 ** (grid.bits - 1) - 1 if grid.symmetric else 2**grid.bits - 1
    reach = torch.maximum(-low, high) if grid.symmetric else high.clamp(min=0) - low.clamp(max=0)
    step = (reach / levels).clamp(min=1e-5)
    found = ActivationQuantizer.calibrated(grid, low, high)(tokens)
    assert ((found - tokens).abs() <= step * ((0.5 if grid.symmetric else 1.0) + 1e-4)).all()
    assert all(len(row.unique()) <= 2**grid.bits for row in found)


@given(values(), GRIDS)
def test_tokens_do_not_look_at_one_another(tokens, grid):
    quantizer = ActivationQuantizer.calibrated(grid, torch.tensor([-0.7]), torch.tensor([1.1]))
    assert torch.equal(quantizer(tokens), torch.stack([quantizer(token) for token in tokens]))


@given(values(), GRIDS)
def test_the_spec_is_the_quantizer(tokens, grid):
    quantizer = ActivationQuantizer.calibrated(grid, torch.tensor([-0.7, -0.1]), torch.tensor([1.1, 0.3]))
    restored = ActivationQuantizer.from_spec(json.loads(json.dumps(quantizer.spec())))
    assert restored.grid == grid
    assert (restored.scale is None) == (not grid.static)
    assert torch.equal(restored(tokens), quantizer(tokens))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("options", "given_values", "expected"),
    [
        # A step of 1: halves go to even, on both sides of zero.
        ({"bits": 4}, [7, 0.5, 1.5, 2.5, 6.5, -0.5, -1.5, -2.5], [7, 0, 2, 2, 6, 0, -2, -2]),
        ({"bits": 4, "symmetric": False}, [-4, 11, 0.5, 1.5, 2.5, -0.5, -1.5, -3.5], [-4, 11, 0, 2, 2, 0, -2, -4]),
        # A zero at 7.5 goes to 8, which cuts half a step off the top and adds it below.
        ({"bits": 4, "symmetric": False}, [-7.5, 7.5, 6.6, 6.4, 0], [-8, 7, 7, 6, 0]),
        # One sign: from zero on.
        ({"bits": 2, "symmetric": False}, [3, 1, 0.6, 1.4], [3, 1, 1, 1]),
        ({"bits": 2, "symmetric": False}, [-3, -1, -0.6, -1.4], [-3, -1, -1, -1]),
        ({"bits": 2}, [3, 1, 1.4, 1.6], [3, 0, 0, 3]),
        # Half the range: what lies outside is at its ends.
        ({"bits": 4, "clip_ratio": 0.5}, [14, -14, 7.4, -7.6, 8, 3.4], [7, -7, 7, -7, 7, 3]),
        ({"bits": 4, "symmetric": False, "clip_ratio": 0.5}, [-8, 22, 11.4, -4.4, 3.4], [-4, 11, 11, -4, 3]),
        # No step is below 1e-5.
        ({"bits": 8}, [4e-6, -4e-6, 1.4e-5], [0, 0, 1e-5]),
        ({"bits": 8, "symmetric": False}, [4e-6, -2.6e-5, 1.4e-5], [0, -3e-5, 1e-5]),
    ],
)
def test_ties_and_ends_by_hand(granularity, options, given_values, expected):
    tokens = torch.tensor([given_values], dtype=torch.float32)
    grid = ActivationGrid(granularity=granularity, **options)
    found = ActivationQuantizer.calibrated(grid, tokens.amin(0), tokens.amax(0))(tokens)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_stay_so_and_spoil_no_other(symmetric, value):
    tokens = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(grid=ActivationGrid(bits=8, symmetric=symmetric))
    expected = quantizer(tokens)
    tokens[1, 2] = value
    found = quantizer(tokens)
    assert not torch.isfinite(found[1, 2])
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf")],
)
def test_static_grids_hide_no_value_that_is_not_finite(symmetric, value):
    grid = ActivationGrid(bits=8, symmetric=symmetric, granularity="per_tensor")
    quantizer = ActivationQuantizer.calibrated(grid, torch.tensor([-1.0]), torch.tensor([2.0]))
    assert not torch.isfinite(quantizer(torch.tensor([0.5, value]))[1])
