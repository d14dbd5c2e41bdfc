"""The sweep file: what is refused and in which words, and what a valid one expands to."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.atlas.expected import expected_tasks
from orchestrator.config import parse_sweep, read_sweep, resolved
from orchestrator.errors import BitatlasError
from orchestrator.search.config import read_search

MODEL = {"name": "tiny", "source": "somewhere/tiny"}
RTN = {"method": "rtn", "weight_bits": 4}

REFUSED = [
    ({"name": None}, "name is missing"),
    ({"name": "../up"}, "name = '../up': "),
    ({"name": 3}, "name = 3: must be a valid string"),
    ({"models": None}, "models is missing"),
    ({"models": []}, "models is empty; give at least one"),
    ({"models": MODEL}, "models = {'name': 'tiny', 'source': 'somewhere/tiny'}: must be a list"),
    ({"models": [3]}, "models[0] = 3: must be a mapping of its fields"),
    ({"models": [{"name": "tiny"}]}, "models[0].source is missing"),
    ({"models": [MODEL | {"source": ""}]}, "models[0].source = '': "),
    ({"models": [MODEL | {"surce": "x"}]}, "models[0]: unknown key 'surce'; did you mean 'source'"),
    ({"models": [MODEL | {"name": "a/b"}]}, "models[0].name = 'a/b': "),
    ({"models": [MODEL | {"dtype": "int8"}]}, "models[0].dtype = 'int8': must be 'auto', 'bfloat16'"),
    ({"models": [MODEL, MODEL]}, "models[1].name = 'tiny' is used twice; give each model its own name"),
    ({"grid": None}, "grid is missing"),
    ({"grid": []}, "grid is empty; give at least one"),
    ({"grid": RTN}, "grid = {'method': 'rtn', 'weight_bits': 4}: must be a list"),
    ({"grid": [3]}, "grid[0] is 3; a grid entry is a mapping such as {method: rtn, weight_bits: 4}"),
    ({"grid": [RTN, RTN | {"weight_bits": []}]}, "grid[1].weight_bits is an empty list; give at least one value"),
    ({"grid": [RTN | {"options": {"x": []}}]}, "grid[0].options.x is an empty list"),
    ({"calibration": None}, "calibration is missing and gptq needs data; add a calibration section"),
    ({"calibration": []}, "calibration is missing and gptq needs data"),
    ({"calibration": 3}, "calibration[0] = 3: "),
    ({"calibration": {}}, "calibration[0].corpus is missing"),
    ({"calibration": {"corpus": "lambda"}}, "calibration[0].corpus: unknown corpus 'lambda': did you mean 'lambada'?"),
    ({"calibration": {"corpus": "lambada", "samples": 0}}, "calibration[0].samples = 0: "),
    ({"calibration": {"corpus": "lambada", "samples": "64"}}, "calibration[0].samples = '64': must be a valid integer"),
    ({"calibration": {"corpus": "lambada", "samples": True}}, "calibration[0].samples = True: must be a valid integer"),
    ({"calibration": {"corpus": "lambada", "seed": -1}}, "calibration[0].seed = -1: "),
    ({"calibration": [{"corpus": "lambada"}, {"corpus": 3}]}, "calibration[1].corpus: corpus 3 must be a name"),
    ({"evaluation": None}, "evaluation is missing"),
    ({"evaluation": {}}, "evaluation: names neither perplexity corpora nor tasks; give at least one"),
    ({"evaluation": {"tasks": []}}, "evaluation: names neither perplexity corpora nor tasks"),
    ({"evaluation": {"task": []}}, "evaluation: unknown key 'task'; did you mean 'tasks'"),
    ({"evaluation": {"tasks": "arc_easy"}}, "evaluation.tasks = 'arc_easy': must be a list"),
    (
        {"evaluation": {"tasks": [{"name": "arc_esy"}]}},
        "tasks[0].name: unknown task 'arc_esy': did you mean 'arc_easy'",
    ),
    ({"evaluation": {"tasks": [{"name": {}}]}}, "evaluation.tasks[0].name: unknown task '{}'"),
    ({"evaluation": {"tasks": [{"limit": 3}]}}, "evaluation.tasks[0].name is missing"),
    ({"evaluation": {"tasks": [{"name": "piqa", "limit": 0}]}}, "evaluation.tasks[0].limit = 0: "),
    ({"evaluation": {"tasks": [{"name": "piqa", "num_fewshot": -1}]}}, "evaluation.tasks[0].num_fewshot = -1: "),
    (
        {"evaluation": {"tasks": [{"name": "piqa", "chat": "nothink"}]}},
        "evaluation.tasks[0].chat = 'nothink': must be ",
    ),
    (
        {"evaluation": {"tasks": [{"name": "piqa", "thinking_tokens": 9}]}},
        "evaluation.tasks[0]: thinking_tokens is given without chat; name the thinking mode with it",
    ),
    (
        {"evaluation": {"tasks": [{"name": "gsm8k", "rounding": "hflm"}]}},
        "evaluation.tasks[0]: rounding: hflm is of tasks that score choices; this one writes texts, so leave it out",
    ),
    (
        {"evaluation": {"tasks": [{"name": "piqa", "rounding": "bfloat16"}]}},
        "evaluation.tasks[0].rounding = 'bfloat16': ",
    ),
    (
        {"evaluation": {"tasks": [{"name": "piqa", "chat": "default", "thinking_tokens": 0}]}},
        "evaluation.tasks[0].thinking_tokens = 0: ",
    ),
    (
        {"evaluation": {"tasks": [{"name": "piqa"}, {"name": "mbpp"}]}},
        "evaluation: tasks[1]: task mbpp runs programs that the model wrote, in a sandbox, and only where",
    ),
    ({"evaluation": {"tasks": [{"name": "piqa", "slices": 0}]}}, "evaluation.tasks[0].slices = 0: must be"),
    ({"evaluation": {"tasks": [{"name": "piqa", "slices": "auto"}]}}, "evaluation.tasks[0].slices = 'auto': must be"),
    ({"evaluation": {"perplexity": [{}]}}, "evaluation.perplexity[0].corpus is missing"),
    ({"evaluation": {"perplexity": [{"corpus": {"path": "x.md"}}]}}, "corpus path x.md must end in .txt or .jsonl"),
    ({"evaluation": {"perplexity": [{"corpus": {"pth": "x"}}]}}, "unknown corpus key 'pth': did you mean 'path'?"),
    ({"evaluation": {"perplexity": [{"corpus": "lambada", "sequence_length": 1}]}}, "sequence_length = 1: "),
    ({"evaluation": {"perplexity": [{"corpus": "lambada", "max_windows": 0}]}}, "max_windows = 0: "),
    ({"evaluation": {"perplexity": [{"corpus": "c4-nw"}]}}, "unknown corpus 'c4-nw': did you mean 'c4-new'?"),
    ({"evaluation": {"perplexity": [{"corpus": "lambada", "bos": True}]}}, "perplexity[0].bos = True: must be 'once'"),
    ({"evaluation": {"perplexity": [{"corpus": "lambada", "tail": "kept"}]}}, "tail = 'kept': must be 'drop' or"),
    ({"evaluation": {"perplexity": [{"corpus": "lambada", "joiner": 3}]}}, "joiner = 3: must be a valid string"),
    ({"evaluation": {"perplexity": [{"corpus": "lambada", "divergence": 1}]}}, "divergence = 1: must be a valid bool"),
    (
        {"evaluation": {"perplexity": [{"corpus": "c4", "tail": "keep"}]}},
        "evaluation.perplexity[0]: `joiner` and `tail` mean nothing for corpus c4, because its windows are drawn from",
    ),
    (
        {"evaluation": {"perplexity": [{"corpus": {"token_ids": "a.npy"}, "bos": "never"}]}},
        "evaluation.perplexity[0]: `bos`, `joiner` and `tail` mean nothing for corpus a, because its windows are given",
    ),
    ({"workers": {"device": "gpu"}}, "workers.device = 'gpu': must be 'auto', 'cpu', 'cuda', 'npu' or 'simulated-npu'"),
    ({"workers": {"count": 0}}, "workers.count = 0: must be at least 1, or auto"),
    ({"workers": {"count": True}}, "workers.count = True: "),
    ({"workers": {"threads": 0}}, "workers.threads = 0: "),
    ({"workers": {"devices": "cpu"}}, "workers: unknown key 'devices'; did you mean 'device'"),
    ({"grids": 1}, "unknown key 'grids'; did you mean 'grid'"),
    ({1: 2}, "unknown key 1; the keys here are name, models, grid, calibration, evaluation, workers"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_refused_with_the_field_and_the_rule(make_document, changes, words):
    document = make_document() | changes
    document = {key: value for key, value in document.items() if value is not None}
    with pytest.raises(BitatlasError, match=re.escape(words)) as caught:
        parse_sweep(document, "study.yaml")
    assert str(caught.value).startswith("study.yaml: ")
    assert "\n" not in str(caught.value)


FILES = [
    (b"", "is empty; a sweep needs name, models, grid and evaluation"),
    (b"# nothing\n", "is empty"),
    (b"- a\n- b\n", "holds a list, not a mapping"),
    (b"just words\n", "holds a str, not a mapping"),
    (b"name: [\n", "not valid YAML at line 2, column 1"),
    (b"name: a\nname: b\n", "not valid YAML at line 2, column 1: the key 'name' is given twice"),
    (b"models:\n  - {name: a, name: b}\n", "line 2, column 15: the key 'name' is given twice"),
    (b"name: a\n---\nname: b\n", "not valid YAML"),
    (b"name: *nobody\n", "not valid YAML at line 1, column 7"),
    (b"name: !!python/object:os.system x\n", "not valid YAML at line 1"),
    (b"name: \xff\xfe\n", "cannot be read as text"),
    (b"name: \x00\n", "not valid YAML"),
    (b"? [a, b]\n: c\n", "not valid YAML at line 1, column 3"),
    (b"{a: 1}: c\n", "not valid YAML at line 1, column 1"),
    (b"name: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
    (b"name: !!int x\n", "not valid YAML: invalid literal"),
    (b"[" * 2000, "not valid YAML: nested too deeply"),
]


@pytest.mark.parametrize(("content", "words"), FILES, ids=[words[-40:] for _, words in FILES])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, content, words):
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(BitatlasError, match=re.escape(words)) as caught:
        read_sweep(file)
    assert str(caught.value).startswith(str(file))


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(BitatlasError, match=r"no.yaml does not exist; give the path of a sweep file"):
        read_sweep(tmp_path / "no.yaml")
    with pytest.raises(BitatlasError, match="cannot be read as text"):
        read_sweep(tmp_path)


def test_lists_expand_in_written_order(make_sweep):
    sweep = make_sweep(
        grid=[
            {"method": "rtn", "weight_bits": [8, 3], "group_size": [64, "per_channel"], "symmetric": [True, False]},
            {"weight_bits": [4, 2], "method": "gptq", "options": {"damping": [0.1, 0.01], "act_order": [True, False]}},
        ]
    )
    assert [scheme.label for scheme in sweep.grid[:8]] == [
        "rtn-w8-g64-sym",
        "rtn-w8-g64",
        "rtn-w8-pc-sym",
        "rtn-w8-pc",
        "rtn-w3-g64-sym",
        "rtn-w3-g64",
        "rtn-w3-pc-sym",
        "rtn-w3-pc",
    ]
    options = [(s.weight_bits, s.build().damping, s.build().act_order) for s in sweep.grid[8:]]
    assert options == [(bits, damping, order) for bits in (4, 2) for damping in (0.1, 0.01) for order in (True, False)]


def test_calibration_is_one_or_a_list(make_sweep):
    one = {"corpus": "lambada", "seed": 1}
    assert make_sweep(calibration=one) == make_sweep(calibration=[one])
    assert [c.seed for c in make_sweep(calibration=[one, one | {"seed": 2}]).calibration] == [1, 2]


def test_data_free_sweep_needs_no_calibration(make_sweep):
    assert make_sweep(grid=[RTN], calibration=None).calibration == ()


def test_equal_sections_have_equal_keys(make_sweep):
    short = make_sweep(calibration={"corpus": "lambada"}).calibration[0]
    written_out = make_sweep(
        calibration={"seed": 0, "sequence_length": 2048, "samples": 128, "corpus": "lambada"}
    ).calibration[0]
    assert short.key == written_out.key
    assert short.key != make_sweep(calibration={"corpus": "lambada", "seed": 1}).calibration[0].key


def test_what_a_perplexity_entry_says_of_its_windows(make_sweep):
    def said(**entry):
        return make_sweep(evaluation={"perplexity": [entry]}).evaluation.perplexity[0].protocol

    assert said(corpus="lambada") == said(corpus="lambada", joiner="\n\n", tail="drop", divergence=True) == {}
    assert said(corpus="lambada", bos="never", joiner="") == {"bos": "never", "joiner": ""}
    assert said(corpus="ptb-new", tail="keep") == said(corpus="ptb-new", tail="keep", joiner=" ")
    assert said(corpus="ptb-new", tail="keep")["tail"] == "keep"


def one_or_more(values):
    return st.one_of(st.sampled_from(values), st.lists(st.sampled_from(values), min_size=1, max_size=3))


ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"method": st.just("rtn"), "weight_bits": one_or_more(range(1, 9))},
        optional={
            "group_size": one_or_more([8, 64, "per_channel"]),
            "symmetric": one_or_more([True, False]),
            "scale_dtype": one_or_more(["float16", "bfloat16", "float32"]),
            "tail_group": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {"method": st.just("gptq"), "weight_bits": one_or_more(range(1, 9))},
        optional={
            "group_size": one_or_more([8, 64, "per_channel"]),
            "options": st.fixed_dictionaries(
                {},
                optional={"damping": one_or_more([0.01, 0.5, 1]), "act_order": one_or_more([True, False])},
            ),
        },
    ),
)
PERPLEXITY = st.fixed_dictionaries(
    {"corpus": st.sampled_from(["lambada", "wikitext2", {"path": "a.txt"}])},
    optional={
        "bos": st.sampled_from(["once", "per_window", "never"]),
        "joiner": st.text(max_size=3),
        "tail": st.sampled_from(["drop", "keep"]),
        "divergence": st.booleans(),
    },
)
CORPUS = st.sampled_from(["lambada", {"path": "a.txt"}, {"path": "a.jsonl", "field": "text"}, {"token_ids": "a.npy"}])
CALIBRATION = st.fixed_dictionaries({"corpus": CORPUS}, optional={"samples": st.integers(1, 9), "seed": st.integers(0)})
SWEEPS = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "models": st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True).map(
            lambda names: [{"name": name, "source": f"models/{name}"} for name in names]
        ),
        "grid": st.lists(ENTRIES, min_size=1, max_size=3),
        "calibration": st.one_of(CALIBRATION, st.lists(CALIBRATION, min_size=1, max_size=2)),
        "evaluation": st.fixed_dictionaries(
            {"tasks": st.sampled_from([[{"name": "piqa", "limit": 3}], [{"name": "rte", "slices": 3}]])},
            optional={"perplexity": st.lists(PERPLEXITY | st.fixed_dictionaries({"corpus": CORPUS}), max_size=2)},
        ),
    },
    optional={"workers": st.sampled_from([{"count": 2}, {"count": "auto", "device": "cpu"}])},
)


@settings(max_examples=60)
@given(SWEEPS)
def test_the_resolved_sweep_read_again_is_the_sweep(document):
    sweep = parse_sweep(document, "study.yaml")
    text = resolved(sweep)
    assert parse_sweep(yaml.safe_load(text), "resolved.yaml") == sweep
    assert resolved(parse_sweep(yaml.safe_load(text), "resolved.yaml")) == text


def test_the_packaged_sweeps_are_valid():
    from pathlib import Path

    import orchestrator

    files = sorted((Path(orchestrator.__file__).parent / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        if file.name.startswith("search-"):
            assert read_search(file).settings.budgets
        else:
            read_sweep(file)


def test_a_search_file_is_pointed_to_its_command(make_sweep):
    with pytest.raises(BitatlasError, match=r"is a search file .* run it with `bitatlas search`"):
        make_sweep(search={"bank": {}})


def test_a_suite_stands_for_its_tasks(make_sweep):
    sweep = make_sweep(evaluation={"suite": "smoke"})
    assert [(task.name, task.limit, task.num_fewshot) for task in sweep.evaluation.tasks] == [
        ("arc_easy", 32, 0),
        ("winogrande", 32, 0),
        ("gsm8k_cot", 4, 8),
    ]
    written = yaml.safe_load(resolved(sweep))
    assert "suite" not in written["evaluation"]
    assert parse_sweep(written, "sweep.yaml") == sweep
    corpora, tasks = expected_tasks(written)
    assert (corpora, tasks) == ([], ["arc_easy", "winogrande", "gsm8k_cot"])


def test_a_task_beside_a_suite_overrides_the_suites(make_sweep):
    own = [{"name": "piqa", "limit": 5}, {"name": "arc_easy", "limit": 7}]
    sweep = make_sweep(evaluation={"suite": "smoke", "tasks": own})
    assert [(task.name, task.limit) for task in sweep.evaluation.tasks] == [
        ("winogrande", 32),
        ("gsm8k_cot", 4),
        ("piqa", 5),
        ("arc_easy", 7),
    ]


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"suite": "ofline"}, "evaluation: suite: unknown suite 'ofline': did you mean 'offline'?"),
        ({"suite": 3}, "evaluation: suite: unknown suite 3"),
        ({"suite": "smoke", "tasks": "piqa"}, "evaluation.tasks = 'piqa': must be a list"),
        ({"suite": "smoke", "tasks": [{"name": "piqq"}]}, "unknown task 'piqq'"),
        ({"suite": "openpangu-18"}, "task humaneval runs programs that the model wrote, in a sandbox, and only where"),
        ({"suit": "smoke"}, "unknown key 'suit'; did you mean 'suite'"),
    ],
)
def test_suites_refused(make_document, evaluation, words):
    with pytest.raises(BitatlasError) as caught:
        parse_sweep(make_document(evaluation=evaluation), "study.yaml")
    assert words in str(caught.value)


def test_a_suite_that_runs_programs_may_where_it_is_allowed(make_sweep):
    assert len(make_sweep(evaluation={"suite": "openpangu-18", "allow_code_execution": True}).evaluation.tasks) == 18
