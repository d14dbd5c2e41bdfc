"""One point of the grid: every field's rule, and its label."""

import json
import re

import pytest

from orchestrator.errors import BitatlasError
from orchestrator.scheme import option_defaults, parse_scheme
from quantizers.methods import METHODS

RTN = {"method": "rtn", "weight_bits": 4}
GPTQ = {"method": "gptq", "weight_bits": 4}
ONE = {"scale_dtype": "float32"}
GROUP = {"billm": "per_channel", "slim_llm": 32}

REFUSED = [
    *[(RTN | {"weight_bits": bits}, f".weight_bits = {bits!r}: must be a whole number from 1 to 8")
      for bits in (0, 9, -1, 2.5, 4.0, "4", True, None)],
    *[(RTN | {"group_size": size}, f".group_size = {size!r}: must be a positive whole number of input columns")
      for size in (0, -64, 2.5, "64", "channel", True, None)],
    *[(RTN | {"activation_bits": bits}, f".activation_bits = {bits!r}: must be a whole number from 2 to 8, or 16")
      for bits in (1, 9, True, None, "16")],
    (RTN | {"activation_symmetric": False}, ".activation_symmetric says nothing without activation_bits below 16"),
    (RTN | {"activation_bits": 8, "activation_granularity": "per_row"}, "'per_row' is none of"),
    (RTN | {"activation_bits": 8, "activation_clip_ratio": 0}, "activation_clip_ratio = 0.0 must be above 0"),
    (RTN | {"convention": "gptq-assym"}, "convention = 'gptq-assym' is none of"),
    (RTN | {"convention": "sq-sym", "symmetric": False}, ".symmetric = False contradicts convention = 'sq-sym'"),
    (RTN | {"weight_bits": 1, "mse_search": True}, "mse_search has no range to shrink at 1 bit"),
    (GPTQ | {"options": {"preset": "as_publishd"}}, ".preset = 'as_publishd' is unknown; did you mean 'as_published'?"),
    *[(RTN | {"symmetric": value}, f".symmetric = {value!r}: must be true or false") for value in ("yes", 1, None)],
    *[(RTN | {"tail_group": value}, f".tail_group = {value!r}: must be true or false") for value in ("yes", 0)],
    (RTN | {"scale_dtype": 16}, ".scale_dtype = 16: must be text"),
    (RTN | {"scale_dtype": "fp16"}, "scale_dtype = 'fp16' is none of float16, bfloat16, float32"),
    (RTN | {"groupsize": 64}, ": unknown key 'groupsize'; did you mean 'group_size'?; the keys here are method, "),
    ({"weight_bits": 4}, ".method is missing; known methods: rtn, gptq"),
    ({"method": "rtn"}, ".weight_bits is missing; give 1 to 8"),
    (RTN | {"method": "gtpq"}, ".method = 'gtpq' is unknown; did you mean 'gptq'?; known methods: rtn, gptq"),
    (RTN | {"method": 3}, ".method = 3 is unknown"),
    (RTN | {"method": {"name": "rtn"}}, ".method = {'name': 'rtn'} is unknown"),
    (RTN | {"embedding": 9}, ".embedding.weight_bits = 9: must be a whole number from 1 to 8"),
    (RTN | {"head": {"bits": 8}}, ".head: unknown key 'bits'; the keys here are weight_bits, group_size"),
    (RTN | {"head": {"group_size": 0}}, ".head.group_size = 0: must be a positive whole number"),
    (RTN | {"head": {"weight_bits": 16, "group_size": 64}}, ".head.group_size says nothing beside 16 bits"),
    (RTN | {"layers": {"*.o_proj": {"weight_bits": 16, "group_size": 64}}}, ".group_size says nothing beside 16 bits"),
    (RTN | {"mse_search": True, "head": 1}, "mse_search has no range to shrink at 1 bit"),
    (RTN | {"options": 3}, ".options = 3: must be a mapping of the method's options"),
    (RTN | {"options": None}, ".options = None: must be a mapping of the method's options"),
    (
        RTN | {"options": {"act_order": True}},
        ".options: unknown option 'act_order'; this method's options: preset, fold, fold_damping, path",
    ),
    (GPTQ | {"options": {"act_ordr": True}}, ".options: unknown option 'act_ordr'; did you mean 'act_order'?; "),
    (GPTQ | {"options": {1: 2}}, ".options: unknown option 1; this method's options: preset, fold, "),
    (GPTQ | {"options": {"act_order": 1}}, ".options.act_order = 1: must be true or false"),
    (GPTQ | {"options": {"damping": "a"}}, ".options.damping = 'a': must be a number"),
    (GPTQ | {"options": {"damping": True}}, ".options.damping = True: must be a number"),
    (GPTQ | {"options": {"damping": 0}}, "options.damping = 0.0 must be above 0 and at most 1"),
    (GPTQ | {"options": {"damping": float("nan")}}, "options.damping = nan must be above 0 and at most 1"),
    (GPTQ | {"options": {"block_size": 2.5}}, ".options.block_size = 2.5: must be a whole number"),
    (GPTQ | {"options": {"block_size": True}}, ".options.block_size = True: must be a whole number"),
    (GPTQ | {"options": {"block_size": 0}}, "options.block_size = 0 must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_refused_with_the_field_and_the_rule(fields, words):
    with pytest.raises(BitatlasError, match=re.escape(words)) as caught:
        parse_scheme(fields, "study.yaml: grid[3]")
    assert str(caught.value).startswith("study.yaml: grid[3]")


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        (RTN, "rtn-w4-pc"),
        (RTN | {"group_size": "per_channel"}, "rtn-w4-pc"),
        (RTN | {"group_size": 64, "activation_bits": 16}, "rtn-w4-g64"),
        (GPTQ | {"symmetric": True, "group_size": 32}, "gptq-w4-g32-sym"),
        (RTN | {"activation_bits": 8}, "rtn-w4a8-pc"),
        (RTN | {"convention": "awq-asym", "mse_search": True}, "rtn-w4-pc-awq-asym-mse"),
        (GPTQ | {"options": {"preset": "as_published"}}, "gptq-w4-pc-as_published"),
        (GPTQ | {"embedding": 8, "head": {"weight_bits": 6, "group_size": 32}}, "gptq-w4-pc-e8-h6"),
        (GPTQ | {"embedding": 16, "head": None}, "gptq-w4-pc"),
    ],
)
def test_label(fields, label):
    assert parse_scheme(fields, "x").label == label


def test_an_option_left_out_is_the_method_s_default():
    short = parse_scheme(GPTQ, "x")
    written_out = parse_scheme(GPTQ | {"options": option_defaults(METHODS["gptq"])}, "x")
    assert short == written_out
    assert short != parse_scheme(GPTQ | {"options": {"act_order": False}}, "x")


def test_whole_numbers_are_numbers():
    one, point = (parse_scheme(GPTQ | {"options": {"damping": value}}, "x") for value in (1, 1.0))
    assert one == point
    assert one.options == point.options


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_method_builds_what_it_says(method, bits):
    fields = {"method": method, "weight_bits": bits, "group_size": 32, "symmetric": True, "scale_dtype": "float32"}
    if bits not in METHODS[method].weight_bits:
        with pytest.raises(BitatlasError, match=f"weight_bits = {bits}: {method} is defined for"):
            parse_scheme(fields, "x")
        return
    if method in ("billm", "slim_llm"):
        assert parse_scheme(ONE | {"method": method, "weight_bits": bits, "group_size": GROUP[method]}, "x").build()
        return
    scheme = parse_scheme(fields, "x")
    built = scheme.build()
    assert (built.grid.bits, built.grid.group_size, built.grid.symmetric, built.grid.scale_dtype) == (
        bits,
        32,
        True,
        "float32",
    )
    assert scheme.needs_calibration == built.needs.calibration
    assert parse_scheme(scheme.as_entry(), "x") == scheme


def test_a_layer_that_is_left_alone_is_written_out_and_read_again():
    scheme = parse_scheme(GPTQ | {"layers": {"*.o_proj": 16, "*.down_proj": {"weight_bits": 8}}}, "x")
    assert parse_scheme(scheme.as_entry(), "x") == scheme


def test_a_preset_sets_options_and_an_option_beats_it():
    published = parse_scheme({"method": "gptaq", "weight_bits": 4, "options": {"preset": "as_published"}}, "x")
    assert published.build().carry == "q"
    assert '"preset": "as_published"' in published.options
    mixed = parse_scheme(
        {"method": "gptaq", "weight_bits": 4, "options": {"preset": "as_published", "carry": "w"}}, "x"
    )
    assert mixed.build().carry == "w"
    assert mixed.build().stale_groups


def test_quantized_activations():
    fields = RTN | {"activation_bits": 8, "activation_granularity": "per_tensor", "activation_symmetric": False}
    scheme = parse_scheme(fields, "x")
    grid = scheme.build().activations
    assert (grid.bits, grid.granularity, grid.symmetric, grid.clip_ratio) == (8, "per_tensor", False, 1.0)
    assert scheme.needs_calibration
    assert '"activation_granularity": "per_tensor"' in scheme.row_options
    assert "activation" not in parse_scheme(RTN, "x").row_options
    assert parse_scheme(scheme.as_entry(), "x") == scheme


def test_embedding_and_head_take_what_the_entry_says_where_they_say_nothing():
    fields = GPTQ | {"group_size": 64, "convention": "awq-asym", "embedding": 8, "head": {"group_size": 32}}
    scheme = parse_scheme(fields, "x")
    grids = scheme.vocabulary()
    assert {role: (grid.bits, grid.group_size, grid.convention) for role, grid in grids.items()} == {
        "embedding": (8, 64, "awq-asym"),
        "head": (4, 32, "awq-asym"),
    }
    assert parse_scheme(scheme.as_entry(), "again") == scheme
    assert json.loads(scheme.row_options)["embedding"] == {"weight_bits": 8, "group_size": 64}
    assert scheme.code_version.startswith(scheme.build().code_version + ", vocabulary by rtn/")
    plain = parse_scheme(GPTQ, "x")
    assert plain.code_version == plain.build().code_version
    assert not {"embedding", "head"} & set(plain.as_entry())


MIXED = {
    "method": "gptq",
    "weight_bits": 4,
    "group_size": 64,
    "layers": {"*.down_proj": 6, "*.0.*": {"group_size": 32}},
}


def test_layers_with_bits_of_their_own():
    scheme = parse_scheme(MIXED, "grid[0]")
    method = scheme.build()
    grids = {
        name: method.of(f"model.layers.{name}").grid for name in ("1.mlp.down_proj", "0.mlp.up_proj", "1.mlp.up_proj")
    }
    assert [(grid.bits, grid.group_size) for grid in grids.values()] == [(6, 64), (4, 32), (4, 64)]
    assert scheme.label == "gptq-w4-g64-mixed"
    assert json.loads(scheme.row_options)["layers"]["*.down_proj"] == {"weight_bits": 6, "group_size": 64}
    assert parse_scheme(scheme.as_entry(), "again") == scheme


def test_a_scheme_without_them_is_written_as_before():
    plain = parse_scheme({key: value for key, value in MIXED.items() if key != "layers"}, "grid[0]")
    assert "layers" not in plain.as_entry()
    assert "layers" not in json.loads(plain.row_options)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([8], r"grid\[0\]\.layers = \[8\]: must be a mapping such as"),
        (
            {"*.down_proj": 9},
            r"grid\[0\]\.layers\['\*\.down_proj'\]\.weight_bits = 9: must be a whole number from 1 to 8",
        ),
        ({"*.down_proj": {"bits": 8}}, r"unknown key 'bits'; the keys here are weight_bits, group_size"),
        ({"": 8}, r"grid\[0\]\.layers\[''\]: the pattern must be text"),
        ({"*.down_proj": {"group_size": 0}}, r"\.group_size = 0: must be a positive whole number"),
    ],
)
def test_layers_that_mean_nothing(layers, complaint):
    with pytest.raises(BitatlasError, match=complaint):
        parse_scheme(MIXED | {"layers": layers}, "grid[0]")
