"""What holds of AWQ's candidates, clipping and rewriting whatever the shapes, tail groups and options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantizers.awq import Awq, candidate_scales, clip
from quantizers.block_source import InMemory
from quantizers.families import Family, family_of
from quantizers.grid import CONVENTIONS, SCALE_DTYPES, Grid, round_to_grid
from quantizers.rescaling import Rescaling
from quantizers.rtn import round_to_nearest
from quantizers.stream import quantize_blocks
from tests.quantizers.conftest import MODELS, build, logits
from tests.reference import grids
from tests.reference import rescaling as reference

ANY_GRID = st.builds(
    Grid,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([0, 3, 7, 8]),  # 3 and 7 leave tails
    convention=st.sampled_from(CONVENTIONS),
    scale_dtype=st.sampled_from(list(SCALE_DTYPES)),
    tail_group=st.just(True),
)
MEANS = st.lists(st.sampled_from([0.0, 1e-30, 1e-6]) | st.floats(2**-10, 1e4, width=32), min_size=1, max_size=12)


def weights_of(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3


@given(MEANS, st.integers(1, 25), st.booleans(), st.integers(0, 10**6), st.sampled_from([0, 1, 3, 8]))
def test_candidates_equal_the_reference_and_are_centred(means, num_ratios, duo_scaling, seed, group_size):
    weights = [weights_of(seed, rows, len(means)) for rows in (4, 2)]
    weights[0][:, 0] = weights[1][:, 0] = 0.0  # a channel that nothing reads
    grid = Grid(bits=4, group_size=group_size, tail_group=True)
    options = Awq(grid=grid, num_ratios=num_ratios, duo_scaling=duo_scaling)
    candidates = candidate_scales(torch.tensor(means), weights, options)
    assert len(candidates) == num_ratios
    for step, scale in enumerate(candidates):
        ratio = step / num_ratios
        if duo_scaling:
            expected = reference.awq_duo_scale(means, [weight.tolist() for weight in weights], ratio, group_size)
        else:
            expected = reference.awq_scale(means, ratio)
        assert scale.tolist() == pytest.approx(expected, rel=1e-4)
        assert (scale > 0).all()
        assert (scale.max() * scale.min()).item() == pytest.approx(1, rel=1e-5)
        if not duo_scaling:  # louder channels are never shrunk more than quieter ones
            assert (scale[torch.tensor(means).argsort()].diff() >= 0).all()
    if not duo_scaling:
        assert torch.equal(candidates[0], torch.ones(len(means)))


def judged_errors(weight, target, inputs, grid):
    """Of each group and row: the squared change of its share of the output, over the tokens, and its magnitude."""
    change = (round_to_grid(target, grid) - weight).double()
    parts = grids.groups_of(weight.shape[1], grid.group_size)
    shares = [inputs[:, part].double() @ change[:, part].T for part in parts]
    sizes = [inputs[:, part].double().abs() @ change[:, part].abs().T for part in parts]
    return torch.stack([share.square().sum(0) for share in shares]), torch.stack([s.square().sum(0) for s in sizes])


@given(ANY_GRID, st.integers(1, 20), st.integers(1, 12), st.integers(1, 20), st.integers(0, 10**6))
def test_clipping_never_loses_and_stays_within_its_bounds(grid, columns, tokens, num_clips, seed):
    weight = weights_of(seed, 4, columns)
    weight[0] = 0.0
    weight[1, 0] = 30.0
    inputs = weights_of(seed + 1, tokens, columns)
    clipped = clip(weight, inputs, grid, num_clips)
    before, size = judged_errors(weight, weight, inputs, grid)
    after, _ = judged_errors(weight, clipped, inputs, grid)
    assert (after <= before + 1e-5 * size).all()  # float32, in which terms of this size cancel
    for part in grids.groups_of(columns, grid.group_size):
        reach = weight[:, part].abs().amax(1)
        bound = clipped[:, part].abs().amax(1)
        steps = torch.where(reach > 0, 20 * (1 - bound / reach), 0)
        assert ((steps - steps.round()).abs() < 1e-4).all()
        assert (steps.round() < num_clips).all()
        assert torch.equal(clipped[:, part], weight[:, part].clamp(-bound[:, None], bound[:, None]))


def test_clipping_helps_where_an_outlier_meets_silent_inputs():
    """The bound above must be able to bite: the outlier's channel is never active."""
    weight = torch.full((1, 8), 0.5)
    weight[0, 3:] = -0.35
    weight[0, 0] = 1.0
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = 0.0
    grid = Grid(bits=2, scale_dtype="float32")
    clipped = clip(weight, inputs, grid, 10)
    assert clipped[0, 0] < 1.0
    before, _ = judged_errors(weight, weight, inputs, grid)
    after, _ = judged_errors(weight, clipped, inputs, grid)
    assert after < 0.9 * before


@st.composite
def models(draw):
    """One block of any family and of shapes that no group size divides, with its calibration tokens."""
    case = draw(st.sampled_from(list(MODELS)))
    heads = draw(st.sampled_from([2, 4]))
    shapes = {
        "hidden_size": 8 * heads * draw(st.integers(1, 2)),
        "intermediate_size": draw(st.integers(9, 40)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([heads, heads // 2])),
        "head_dim": 8,
        "num_hidden_layers": 1,
    }
    if case == "gemma3_text":
        shapes["layer_types"] = ["full_attention"]
    if case == "qwen2":
        shapes["layer_types"] = None
    model = build(case, **shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return model, torch.randint(0, 96, (4, draw(st.integers(2, 10))), generator=generator)


@settings(max_examples=25)
@given(models(), ANY_GRID)
def test_ratio_zero_without_clipping_is_rtn_bit_for_bit(given_model, grid):
    model, windows = given_model
    (block,) = quantize_blocks(InMemory(model), Awq(grid=grid, num_ratios=1, clip=False), windows)
    for name, value in block.dense.items():
        assert torch.equal(value, model.get_parameter(name))
    assert len(block.linears) == 7
    for linear in block.linears:
        expected = round_to_nearest(model.get_submodule(linear.name).weight.detach(), grid).pack()
        packed = linear.weight.pack()
        assert packed.keys() == expected.keys()
        assert all(torch.equal(packed[name], expected[name]) for name in packed)


@settings(max_examples=25)
@given(models(), ANY_GRID, st.booleans(), st.sampled_from([0, 2]))
def test_the_rewritten_block_computes_the_same(given_model, grid, duo_scaling, search_windows):
    """Whatever ratios the search picks: with the references in place of the weights nothing is rounded."""
    model, windows = given_model
    kept = []

    class Watched(Awq):
        def transform(self, block):
            kept.append(super().transform(block))
            return kept[-1]

    method = Watched(grid=grid, duo_scaling=duo_scaling, search_windows=search_windows, num_ratios=4)
    list(quantize_blocks(InMemory(model), method, windows))
    (found,) = kept
    family = family_of(model)
    assert set(found.references) >= {*family.stages[0], *family.stages[2], *family.stages[3]}
    assert set(found.targets) == {name for stage in family.stages for name in stage} - set(family.stages[0][:2])
    expected = logits(model, windows)
    block = model.get_submodule(f"{family.blocks}.0")
    for name, value in [(f"{name}.weight", value) for name, value in found.references.items()] + [*found.dense.items()]:
        owner, _, field = name.rpartition(".")
        setattr(block.get_submodule(owner), field, nn.Parameter(value.clone(), requires_grad=False))
    assert (logits(model, windows) - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_s_bias_is_rescaled_too(dtype):
    """None of our families has one; a new row may."""
    generator = torch.Generator().manual_seed(0)
    block = nn.ModuleDict({"norm": nn.LayerNorm(8, dtype=dtype), "linear": nn.Linear(8, 5, dtype=dtype)})
    with torch.no_grad():
        block["norm"].weight.copy_(torch.randn(8, generator=generator))
        block["norm"].bias.copy_(torch.randn(8, generator=generator))
        rescaling = Rescaling(block, Family())
        rescaling.norm_to_linears("norm", ("linear",), torch.exp(torch.randn(8, generator=generator)))
        normed = nn.functional.layer_norm(torch.randn(50, 8, generator=generator), (8,)).double()
        norm, linear = block["norm"], block["linear"].weight
        expected = (normed * norm.weight.double() + norm.bias.double()) @ linear.double().T
        changed = normed * rescaling.dense["norm.weight"].double() + rescaling.dense["norm.bias"].double()
        found = changed @ rescaling.weights["linear"].double().T
    assert all(value.dtype == dtype for value in rescaling.dense.values())
    # The norm's weight as rounded is made up for; its bias is rounded to its own type.
    assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * expected.norm()
