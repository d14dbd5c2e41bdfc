"""The search file: what it may say, and one sentence for what it may not."""

import copy

import pytest
import yaml

from orchestrator.errors import BitatlasError
from orchestrator.search.config import parse_search, read_search

GOOD = {
    "name": "s",
    "models": [{"name": "m", "source": "/nowhere"}],
    "calibration": {"corpus": "lambada", "samples": 8, "sequence_length": 128},
    "evaluation": {"perplexity": [{"corpus": "boolq-passages", "sequence_length": 128, "max_windows": 2}]},
    "search": {"bank": {"method": "gptq", "weight_bits": [2, 3, 4], "group_size": 64}, "budgets": [3.6]},
}


def with_search(**changes):
    document = copy.deepcopy(GOOD)
    document["search"] |= changes
    return document


def in_bytes(**changes):
    return with_search(budgets=[{"checkpoint_bytes": 10**6}], **changes)


def test_choices_of_embedding_and_head_are_on_the_bank_s_kind_of_grid():
    bank = {"method": "gptq", "weight_bits": [3, 4], "group_size": 64, "convention": "awq-asym"}
    head = {"weight_bits": [4, 16], "group_size": [32, "per_channel"]}
    search = parse_search(in_bytes(bank=bank, embedding=8, head=head), "s.yaml")
    found = {
        role: [None if grid is None else (grid.bits, grid.group_size, grid.convention) for grid in grids]
        for role, grids in search.matrices.items()
    }
    assert found == {"embedding": [(8, 64, "awq-asym")], "head": [(4, 32, "awq-asym"), (4, 0, "awq-asym"), None]}
    assert parse_search(in_bytes(), "s.yaml").matrices == {}


def test_a_short_file_says_everything():
    search = parse_search(copy.deepcopy(GOOD), "s.yaml")
    assert [(scheme.weight_bits, scheme.group_size) for scheme in search.schemes] == [(2, 64), (3, 64), (4, 64)]
    assert {scheme.build().path for scheme in search.bank} == {"float"}
    assert {scheme.build().path for scheme in search.schemes} == {"quantized"}
    assert [(stage.windows, stage.survivors) for stage in search.settings.all_stages] == [(2, 2), (16, 1)]
    assert search.sweep.grid == ()
    assert search.bank_sweep().grid == search.bank
    assert search.bank_sweep().name == "s-bank"


def test_a_bank_of_a_method_without_data_is_as_its_cells():
    search = parse_search(with_search(bank={"method": "rtn", "weight_bits": [3, 4]}), "s.yaml")
    assert search.bank == search.schemes


def test_a_path_that_the_file_names_is_left_alone():
    bank = {"method": "gptq", "weight_bits": [3, 4], "options": {"path": "float"}}
    search = parse_search(with_search(bank=bank), "s.yaml")
    assert search.bank == search.schemes


def test_pinned_groups_are_part_of_the_bank():
    search = parse_search(with_search(pinned={"*.0.*": 8, "*.1.*": {"weight_bits": 4, "group_size": 32}}), "s.yaml")
    assert [(scheme.weight_bits, scheme.group_size) for scheme in search.pinned.values()] == [(8, 64), (4, 32)]
    assert [(scheme.weight_bits, scheme.group_size) for scheme in search.bank_sweep().grid][-2:] == [(8, 64), (4, 32)]


def test_pinned_linears_that_are_left_alone_are_no_part_of_the_bank():
    search = parse_search(with_search(pinned={"*.0.*": 16}), "s.yaml")
    assert search.pinned == {"*.0.*": None}
    assert search.bank_sweep().grid == search.bank


def test_a_bundle_is_beside_the_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"data": "bundle"}))
    assert read_search(file).sweep.data == str(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (None, "s.yaml is empty; a search needs name, models, evaluation and search"),
        ([1], "s.yaml is a list, not a mapping"),
        ({key: value for key, value in GOOD.items() if key != "search"}, "search is missing"),
        (with_search(budget=[3.6]), "search: unknown key 'budget'; did you mean 'budgets'"),
        (with_search(budgets=[]), "search names neither budgets nor front"),
        (with_search(budgets=[0]), "search.budgets: bits per weight must be above 0"),
        (with_search(budgets=[{"bytes": 3}]), "search.budgets: a budget is a number of bits, or {checkpoint_bytes: N}"),
        (with_search(starts=False), "search.starts = false: level-switch begins with a start"),
        (with_search(corpus=["lambada", "lamda"]), "search.corpus[1]: "),
        (with_search(objective="task"), "search.objective = task and search.task belong together"),
        (with_search(task={"name": "copa"}), "search.objective = task and search.task belong together"),
        (
            with_search(objective="task", task={"name": "copa"}, corpus="lambada"),
            "search.corpus and search.sequence_length are of token windows",
        ),
        (
            with_search(objective="task", task={"name": "gsm8k"}),
            "search.task.name: the answers to gsm8k are texts, which have no loss",
        ),
        (with_search(objective="task", task={"name": "cola"}), "search.task.name"),
        (
            with_search(bank={"method": "slim_llm", "weight_bits": [3, 4], "group_size": 64}),
            "search.bank.method = 'slim_llm': its variants cannot stand beside each other",
        ),
        (
            with_search(bank={"method": "gtpq", "weight_bits": 4}),
            "search.bank.method = 'gtpq' is unknown; did you mean",
        ),
        (with_search(bank={"method": "gptq", "weight_bits": [3, 9]}), "search.bank.weight_bits = 9"),
        (
            with_search(bank={"method": ["gptq", "rtn"], "weight_bits": 4}),
            "search.bank: choices differ in weight_bits and group_size alone",
        ),
        (
            with_search(bank={"method": "gptq", "weight_bits": 4, "activation_bits": 8}),
            "search.bank.activation_bits: a search is of weights",
        ),
        (with_search(bank={"method": "gptq", "weight_bits": 4, "layers": {"*": 3}}), "search.bank.layers: linears get"),
        (with_search(sampler="cmaes"), "search.sampler = 'cmaes'"),
        (with_search(windows=4, stages=[{"windows": 2, "survivors": 1}]), "the last one all 4"),
        (
            with_search(windows=4, stages=[{"windows": 2, "survivors": 1}, {"windows": 4, "survivors": 3}]),
            "stages must have falling survivors",
        ),
        (
            with_search(embedding=[4, 8]),
            "search.embedding has choices, and budgets in bits are of the decoder's linears",
        ),
        (in_bytes(head=[]), "search.head.weight_bits"),
        (in_bytes(head={"bits": 8}), "search.head: unknown key 'bits'; the keys here are weight_bits, group_size"),
        (in_bytes(head=[8, 12]), "s.yaml: search.head.weight_bits = 12: must be a whole number from 1 to 8"),
        (in_bytes(embedding={"weight_bits": 4, "group_size": [64, 0.5]}), "search.embedding.group_size = 0.5: must be"),
        (
            in_bytes(bank={"method": "gptq", "weight_bits": [3, 4], "head": 8}),
            "search.bank.head: the head is no linear",
        ),
        (with_search(windows=1), "sensitivity.windows is more than the 1 search.windows"),
        (with_search(pinned={"*": {"bits": 3}}), "search.pinned['*']: unknown key 'bits'"),
        (
            with_search(pinned={"*": {"weight_bits": 16, "group_size": 64}}),
            "search.pinned['*'].group_size says nothing beside 16 bits",
        ),
        (with_search(pinned={"*": 99}), "search.pinned['*'].weight_bits = 99"),
        (
            GOOD | {"models": [*GOOD["models"], {"name": "n", "source": "/x"}]},
            "models names 2 models; a search is of one",
        ),
        (GOOD | {"calibration": [GOOD["calibration"]] * 2}, "calibration names 2 recipes"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(document, told):
    with pytest.raises(BitatlasError) as error:
        parse_search(copy.deepcopy(document), "s.yaml")
    assert told in str(error.value)
    assert str(error.value).startswith("s.yaml")
    assert "\n" not in str(error.value)


def test_without_calibration_a_corpus_must_be_named():
    document = with_search(bank={"method": "rtn", "weight_bits": [3, 4]})
    del document["calibration"]
    with pytest.raises(BitatlasError, match=r"search\.corpus is missing"):
        parse_search(document, "s.yaml")
