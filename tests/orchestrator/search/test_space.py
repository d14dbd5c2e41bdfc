"""Groups, choices, bytes and budgets of a model."""

import pytest

from orchestrator.config import parse_sweep
from orchestrator.errors import BitatlasError
from orchestrator.outline import outline
from orchestrator.scheme import parse_scheme
from orchestrator.search.space import make_space
from quantizers.method import total_stored_bytes


def scheme(bits, group_size=16, **more):
    return parse_scheme({"method": "gptq", "weight_bits": bits, "group_size": group_size} | more, "choices")


LINEARS = {
    f"model.layers.{index}.{name}": shape
    for index in range(3)
    for name, shape in {
        "self_attn.q_proj": (48, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 48),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }.items()
}
CHOICES = [scheme(bits) for bits in (4, 2, 3, 8)]


def test_groups_are_what_servers_keep_in_one_matrix():
    space = make_space(LINEARS, CHOICES)
    assert len(space.groups) == 12
    assert space.groups[4].name == "model.layers.1.self_attn.q_proj+k_proj+v_proj"
    assert space.groups[6].linears == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert [choice.weight_bits for choice in space.groups[0].choices] == [2, 3, 4, 8]
    assert space.num_weights == sum(rows * columns for rows, columns in LINEARS.values())


@pytest.mark.parametrize("allocation", [(0,) * 12, (3,) * 12, (0, 1, 2, 3) * 3])
def test_bytes_are_those_of_the_cell_that_the_entry_makes(allocation):
    """What the search counts is what the quantized cell will store: the same functions, by another way."""
    space = make_space(LINEARS, CHOICES)
    base = scheme(4)
    cell = parse_scheme(space.entry(base, allocation), "grid[0]")
    assert total_stored_bytes(cell.build(), LINEARS) == space.stored_bytes(allocation)
    for group, choice in zip(space.groups, space.choices(allocation), strict=True):
        for name in group.linears:
            assert cell.build().of(name).grid.bits == choice.weight_bits


def test_group_sizes_are_choices_too():
    space = make_space(LINEARS, [scheme(3, 16), scheme(3, 8), scheme(3, "per_channel")])
    assert [choice.group_size for choice in space.groups[0].choices] == [0, 16, 8]
    entry = space.entry(scheme(3, 16), (0,) + (1,) * 11)
    assert entry["layers"]["model.layers.0.self_attn.q_proj"] == {"weight_bits": 3, "group_size": "per_channel"}
    assert len(entry["layers"]) == 3


def test_a_uniform_allocation_needs_no_layers():
    space = make_space(LINEARS, CHOICES)
    assert "layers" not in space.entry(scheme(3), (1,) * 12)


def test_pinned_layers_have_one_choice():
    space = make_space(LINEARS, CHOICES, {"*.0.*": scheme(8), "*.down_proj": scheme(4)})
    bits = [[choice.weight_bits for choice in group.choices] for group in space.groups]
    assert bits == [[8]] * 4 + [[2, 3, 4, 8], [2, 3, 4, 8], [2, 3, 4, 8], [4]] * 2


@pytest.mark.parametrize(
    ("pinned", "complaint"),
    [
        ({"*.down": 8}, r"pinned: '\*\.down' names no linear"),
        ({"*.q_proj": 8}, r"q_proj.*share their input and must share their choice; pin all of them or none"),
    ],
)
def test_pins_that_cannot_be(pinned, complaint):
    with pytest.raises(BitatlasError, match=complaint):
        make_space(LINEARS, CHOICES, {pattern: scheme(bits) for pattern, bits in pinned.items()})


def test_a_choice_that_does_not_fit_is_refused():
    with pytest.raises(BitatlasError, match=r"group_size = 24 does not divide the 32 inputs of model\.layers\.0"):
        make_space(LINEARS, [scheme(4), scheme(4, 24)])


def test_an_impossible_budget_names_the_least_possible():
    space = make_space(LINEARS, CHOICES)
    least = space.stored_bytes(space.least)
    assert space.check_budget(least, "budget") == least
    with pytest.raises(
        BitatlasError, match=rf"^budget of {least - 1} bytes .* is below the least possible: {least} byt"
    ):
        space.check_budget(least - 1, "budget")
    with pytest.raises(BitatlasError, match=r"budget_bits of \d+ bytes \(1\.000 bits per weight\) is below the least"):
        space.budget(1.0, "budget_bits")


def test_a_space_with_no_freedom_says_so():
    space = make_space(LINEARS, [scheme(4)])
    with pytest.raises(BitatlasError, match=r"every group of linears has one choice alone.*nothing to search"):
        space.check_budget(10**9, "budget")


def test_a_model_of_real_shape():
    document = {
        "name": "s",
        "models": [{"name": "m", "source": "./x/openPangu-Embedded-7B"}],
        "grid": [{"method": "gptq", "weight_bits": [2, 3, 4, 5, 6, 8], "group_size": 128}],
        "calibration": {"corpus": "c4"},
        "evaluation": {"perplexity": [{"corpus": "c4"}]},
    }
    sweep = parse_sweep(document, "s")
    space = make_space(outline(sweep, "s").models["m"].shape.linears, sweep.grid)
    assert len(space.groups) == 4 * 34
    assert space.bits_per_weight((2,) * 136) == pytest.approx(4 + 20 / 128)
