"""Planning from configurations alone, beside what the weights and the data say once they are there."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from orchestrator.config import read_sweep
from orchestrator.errors import BitatlasError
from orchestrator.inputs import prepare
from orchestrator.models.published import PUBLISHED
from orchestrator.outline import outline
from orchestrator.plan import make_plan
from orchestrator.work import works

STUDIES = ["openpangu-study", "openpangu-quick", "openpangu-seeds"]


def study(name):
    return read_sweep(Path(str(files("orchestrator"))) / "sweeps" / f"{name}.yaml")


@pytest.fixture
def configuration_alone(tiny_checkpoint, tmp_path):
    (tmp_path / "tiny").mkdir()
    text = (tiny_checkpoint / "config.json").read_text()
    (tmp_path / "tiny" / "config.json").write_text(text)
    return tmp_path / "tiny"


def test_it_plans_what_the_checkpoint_itself_would(make_sweep, tiny_checkpoint, configuration_alone):
    whole = make_sweep(models=[{"name": "tiny", "source": str(tiny_checkpoint)}])
    bare = make_sweep(models=[{"name": "tiny", "source": str(configuration_alone)}])
    found, sketched = prepare(whole, "study.yaml"), outline(bare, "study.yaml")
    assert sketched.models["tiny"].shape == found.models["tiny"].shape
    jobs, sketch = make_plan(whole, found.identities).jobs, make_plan(bare, sketched.identities).jobs
    assert [job.label for job in sketch] == [job.label for job in jobs]
    assert [*works(sketch, sketched).values()] == [*works(jobs, found).values()]
    assert not {job.id for job in sketch} & {job.id for job in jobs}, "nothing measured can be taken for an outline's"


def test_a_group_size_that_does_not_fit_is_refused(make_sweep, configuration_alone):
    models = [{"name": "tiny", "source": str(configuration_alone)}]
    sweep = make_sweep(models=models, grid=[{"method": "rtn", "weight_bits": 4, "group_size": 48}])
    with pytest.raises(BitatlasError, match=r"group_size = 48 does not divide the 64 inputs of model\.layers\.0"):
        outline(sweep, "study.yaml")


def test_a_model_of_which_nothing_is_known_is_refused(make_sweep):
    sweep = make_sweep(models=[{"name": "m", "source": "./nowhere/some-model"}])
    with pytest.raises(BitatlasError, match=r"^study.yaml: models\[0\]\.source = './nowhere/some-model' is not here"):
        outline(sweep, "study.yaml")


def test_a_configuration_with_a_field_missing_is_refused(make_sweep, tmp_path):
    config = {name: value for name, value in PUBLISHED["openPangu-Embedded-1B"].items() if name != "rms_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitatlasError, match=r"models\[0\]\.source = .*: config\.json lacks rms_norm_eps"):
        outline(make_sweep(models=[{"name": "m", "source": str(tmp_path)}]), "study.yaml")


@pytest.mark.parametrize(
    ("corpus", "windows"),
    [
        ({"corpus": "c4", "sequence_length": 2048}, 256),
        ({"corpus": "c4", "sequence_length": 2048, "max_windows": 10}, 10),
        ({"corpus": "wikitext2", "sequence_length": 2048}, 141),
        ({"corpus": {"path": "text.txt"}, "sequence_length": 100}, 20),
        ({"corpus": {"path": "absent.txt"}, "sequence_length": 100}, 1),
    ],
)
def test_windows_are_as_many_as_the_text_gives_about(make_sweep, configuration_alone, corpus, windows, monkeypatch):
    monkeypatch.chdir(configuration_alone)
    Path("text.txt").write_text("word" * 2000)
    sweep = make_sweep(
        models=[{"name": "tiny", "source": str(configuration_alone)}], evaluation={"perplexity": [corpus]}
    )
    (found,) = outline(sweep, "study.yaml").windows.values()
    assert found.shape == (windows, corpus["sequence_length"])


@pytest.mark.parametrize(("name", "parameters"), [("1B", 1_155_912_192), ("7B", 8_030_887_936)])
def test_published_configurations_give_the_published_sizes(make_sweep, name, parameters):
    models = [{"name": "m", "source": f"./models/openPangu-Embedded-{name}-V1.1"}]
    sweep = make_sweep(models=models, grid=[{"method": "rtn", "weight_bits": 4, "group_size": 128}])
    assert outline(sweep, "study.yaml").models["m"].shape.fp_bytes == 2 * parameters


def test_the_study_has_all_methods_bits_models_and_tasks():
    sweep = study("openpangu-study")
    methods = {scheme.method for scheme in sweep.grid}
    assert methods == {"rtn", "gptq", "awq", "smoothquant", "gptaq", "billm", "slim_llm"}
    for method in ("rtn", "gptq", "awq", "gptaq"):
        bits = {(scheme.weight_bits, scheme.group_size) for scheme in sweep.grid if scheme.method == method}
        assert bits == {(bits, size) for bits in range(1, 9) for size in (0, 128)}
    pairs = {(scheme.weight_bits, scheme.activation_bits) for scheme in sweep.grid if scheme.activation_bits < 16}
    assert pairs == {(8, 8), (6, 6), (4, 8), (4, 4)}
    assert len(sweep.evaluation.tasks) == 18
    assert {corpus.corpus for corpus in sweep.evaluation.perplexity} == {"wikitext2", "c4"}


@pytest.mark.parametrize("name", STUDIES)
def test_the_study_files_can_be_planned(name):
    sweep = study(name)
    inputs = outline(sweep, name)
    plan = make_plan(sweep, inputs.identities)
    assert {cell.model for cell in plan.cells} == {"openpangu-1b", "openpangu-7b"}
    assert all(work > 0 for work in works(plan.jobs, inputs).values())
