"""What a bundle's manifest says and refuses, and how a sweep is pointed at it; no Hub."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from orchestrator.bundle.environment import offline_in
from orchestrator.bundle.gather import _needs
from orchestrator.bundle.manifest import MANIFEST, Manifest, read_manifest, verify, write_manifest
from orchestrator.bundle.use import use_bundle, with_copies
from orchestrator.config import read_sweep, resolved
from orchestrator.errors import BitatlasError
from orchestrator.models.source import is_local


@pytest.fixture
def bundle(tmp_path):
    """A blob that two snapshots lead to, and what a cache's readers leave behind."""
    directory = tmp_path / "bundle"
    for folder in ("blobs", "one", "two", ".no_exist"):
        (directory / folder).mkdir(parents=True)
    (directory / "blobs" / "b").write_text("weights")
    for folder in ("one", "two"):
        os.symlink("../blobs/b", directory / folder / "w")
    for name in ("a.lock", "blobs/c.incomplete", ".no_exist/x"):
        (directory / name).touch()
    return directory


def written(directory, **gathered):
    calls = []
    manifest = write_manifest(directory, Manifest(**gathered), lambda *done: calls.append(done))
    assert calls == [(n, 3) for n in (1, 2, 3)]
    return manifest


def test_every_file_is_listed_with_its_size_and_content(bundle):
    manifest = written(bundle, models={"a/b": "c" * 40}, local={"own.txt": "files/own.txt"})
    assert set(manifest.files) == {"blobs/b", "one/w", "two/w"}
    assert {entry["size"] for entry in manifest.files.values()} == {7}
    assert len({entry["sha256"] for entry in manifest.files.values()}) == 1
    assert manifest.size == 7
    assert read_manifest(bundle, "x") == manifest
    assert sorted(path.name for path in bundle.iterdir() if "tmp" in path.name) == []


def test_a_whole_bundle_is_verified_and_extra_files_do_not_matter(bundle, tmp_path):
    manifest = written(bundle)
    (bundle / "later.lock").touch()
    (bundle / "more").touch()
    verify(bundle, manifest, "x", tmp_path / "cache")
    verify(bundle, manifest, "x", tmp_path / "cache")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda blob: blob.unlink(), "blobs/b is missing (No such file or directory); copy the bundle again with"),
        (lambda blob: blob.write_text("weight"), "blobs/b has 6 bytes instead of 7; copy"),
        (lambda blob: blob.write_text("Weights"), "blobs/b has another content than was gathered; copy"),
    ],
)
def test_a_file_that_is_not_what_was_gathered(bundle, tmp_path, harm, words):
    manifest = written(bundle)
    verify(bundle, manifest, "x", tmp_path / "cache")
    harm(bundle / "blobs" / "b")
    with pytest.raises(BitatlasError) as caught:
        verify(bundle, manifest, "far.yaml: data", tmp_path / "cache")
    assert str(caught.value).startswith(f"far.yaml: data = '{bundle}': ")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "another"}', '{"format": "bitatlas-bundle/1", "x": 1}'])
def test_a_damaged_manifest(bundle, text):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BitatlasError, match=r"far\.yaml: data = .*bundle\.json is damaged; copy the bundle again"):
        read_manifest(bundle, "far.yaml: data")


def test_no_manifest_is_no_bundle(bundle):
    with pytest.raises(BitatlasError, match=r"holds no bundle\.json: give a directory that `bitatlas fetch` filled"):
        read_manifest(bundle, "far.yaml: data")


def test_what_two_fetches_gathered_is_one():
    both = Manifest(models={"a/b": "1"}, data={"race": "x"}).with_gathered(Manifest(models={"a/b": "2", "c/d": "3"}))
    assert both == Manifest(models={"a/b": "2", "c/d": "3"}, data={"race": "x"})


def test_paths_become_those_of_the_copies(make_sweep, tmp_path):
    sweep = make_sweep(
        models=[
            {"name": "hub", "source": "a/b"},
            {"name": "own", "source": "./mine"},
            {"name": "packaged", "source": "package://p/f.gguf"},
        ],
        calibration={"corpus": {"path": "c.jsonl", "field": "text"}, "samples": 2, "sequence_length": 64},
        evaluation={"perplexity": [{"corpus": {"token_ids": "ids.npy"}}, {"corpus": "lambada"}]},
    )
    local = {"./mine": "files/1/mine", "c.jsonl": "files/2/c.jsonl", "ids.npy": "files/3/ids.npy"}
    manifest = Manifest(models={"a/b": "c"}, local=local)
    found = with_copies(sweep, "far.yaml", manifest, tmp_path)
    assert [model.source for model in found.models] == ["a/b", f"{tmp_path}/files/1/mine", "package://p/f.gguf"]
    assert found.calibration[0].corpus == {"path": f"{tmp_path}/files/2/c.jsonl", "field": "text"}
    assert found.evaluation.perplexity[0].corpus == {"token_ids": f"{tmp_path}/files/3/ids.npy"}
    assert found.evaluation.perplexity[1] == sweep.evaluation.perplexity[1]
    assert with_copies(found, "far.yaml", manifest, tmp_path) == found
    for missing, field in (("./mine", "models[1].source"), ("c.jsonl", "calibration[0].corpus.path")):
        less = Manifest(models={"a/b": "c"}, local={key: path for key, path in local.items() if key != missing})
        with pytest.raises(BitatlasError) as caught:
            with_copies(sweep, "far.yaml", less, tmp_path)
        assert str(caught.value).startswith(f"far.yaml: {field} = {missing!r} is not in the bundle")


def test_data_is_beside_the_sweep_file(make_document, tmp_path):
    file = tmp_path / "far.yaml"
    file.write_text(json.dumps(make_document(data="bundle")))
    sweep = read_sweep(file)
    assert sweep.data == str(tmp_path / "bundle")
    assert f"data: {tmp_path}/bundle\n" in resolved(sweep)
    file.write_text(json.dumps(make_document()))
    assert "data:" not in resolved(read_sweep(file))
    assert use_bundle(read_sweep(file), "far.yaml") == (read_sweep(file), {})


@pytest.mark.parametrize("source", ["./a", "/a", "~/a", "a/b/c", "x" * 5000])
def test_what_is_a_path(source):
    assert is_local(source)


def test_a_directory_that_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local("somebody/tiny")
    (tmp_path / "somebody" / "tiny").mkdir(parents=True)
    assert is_local("somebody/tiny")


def test_the_readers_find_the_bundle(tmp_path):
    code = (
        "import orchestrator.bundle.environment as e, pathlib\n"
        f"e.enter(e.offline_in(pathlib.Path({str(tmp_path)!r})))\n"
        "import datasets, huggingface_hub.constants as h\n"
        "print(h.HF_HUB_CACHE, h.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_CACHE, datasets.config.HF_HUB_OFFLINE)\n"
        "try: e.enter({})\n"
        "except AssertionError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        f"{tmp_path}/hub True {tmp_path}/datasets True",
        "huggingface_hub was imported before its variables were set",
    ]
    assert offline_in(tmp_path)["HF_HOME"] == str(tmp_path)


@pytest.fixture
def mixed(make_sweep, tiny_checkpoint, tmp_path):
    """A sweep of packaged, local and Hub models and data; the local model has a pickle and code beside it."""
    own = tmp_path / "own"
    shutil.copytree(tiny_checkpoint, own)
    (own / "weights.bin").touch()
    (own / "code.py").touch()
    (tmp_path / "own.txt").write_text("text")
    return make_sweep(
        models=[
            {"name": "hub", "source": "a/b"},
            {"name": "own", "source": str(own)},
            {"name": "packaged", "source": "package://p/f.gguf"},
        ],
        calibration={"corpus": "c4", "samples": 2, "sequence_length": 64},
        evaluation={
            "perplexity": [
                {"corpus": "c4-new"},
                {"corpus": "lambada"},
                {"corpus": {"path": str(tmp_path / "own.txt")}},
            ],
            "tasks": [{"name": "race"}, {"name": "piqa", "num_fewshot": 5}],
        },
    )


def test_what_is_to_be_gathered(mixed, tmp_path):
    assert [need.label.replace(str(tmp_path), ".") for need in _needs(mixed, "far.yaml", tmp_path / "to")] == [
        "copy of ./own",
        "data set allenai/c4 en/c4-validation.00000-of-00008.json.gz",
        "copy of ./own.txt",
        "data set allenai/c4 en/c4-train.00000-of-01024.json.gz",
        "task race",
        "task piqa with 5 examples",
        "model a/b",
    ]


def test_copies_are_of_weights_and_texts_and_made_once(mixed, tmp_path, tiny_checkpoint):
    needs = {need.label: need for need in _needs(mixed, "far.yaml", tmp_path / "to")}
    for path in (tmp_path / "own", tmp_path / "own.txt"):
        ((source, kept),) = needs[f"copy of {path}"].get().local.items()
        assert (source, (tmp_path / "to" / kept).name) == (str(path), path.name)
        before = {file: file.stat().st_ino for file in (tmp_path / "to" / kept).rglob("*")}
        needs[f"copy of {path}"].get()
        assert {file: file.stat().st_ino for file in (tmp_path / "to" / kept).rglob("*")} == before
        if path.is_dir():
            assert {file.name for file in before} == {file.name for file in tiny_checkpoint.iterdir()}


def test_a_path_that_is_not_there(make_sweep, tmp_path):
    for source in ("./none", "~nobody/none"):
        with pytest.raises(BitatlasError, match=r"far\.yaml: models\[0\]\.source = '.*none' does not exist"):
            list(_needs(make_sweep(models=[{"name": "own", "source": source}]), "far.yaml", tmp_path))
