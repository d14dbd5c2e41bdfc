"""What a sweep needs besides its file: found, checked and hashed before anything starts."""

import re
import shutil

import numpy as np
import pytest

from orchestrator.errors import BitatlasError
from orchestrator.inputs import evaluation_windows_of, prepare
from orchestrator.plan import make_plan


@pytest.fixture
def tiny_sweep(make_sweep, tiny_checkpoint):
    def make(source=tiny_checkpoint, **changes):
        return make_sweep(models=[{"name": "tiny", "source": str(source)}], **changes)

    return make


def ids_of(sweep):
    return {job.label: job.id for job in make_plan(sweep, prepare(sweep, "study.yaml").identities).jobs}


def test_models_windows_and_identities(tiny_sweep, tiny_checkpoint):
    sweep = tiny_sweep()
    inputs = prepare(sweep, "study.yaml")
    model = inputs.models["tiny"]
    assert model.directory == tiny_checkpoint.resolve()
    assert len(model.shape.linears) == 14
    calibration = inputs.calibrations["tiny", sweep.calibration[0].key]
    assert (calibration.shape, calibration.dtype) == ((2, 64), np.int64)
    (corpus,), (task,) = sweep.evaluation.perplexity, sweep.evaluation.tasks
    assert evaluation_windows_of(inputs, "tiny", corpus).shape == (2, 64)
    assert evaluation_windows_of(inputs, "tiny", task) is None
    assert inputs.identities.models == {"tiny": model.digest}
    assert set(inputs.identities.evaluations) == {("tiny", corpus.key), ("tiny", task.key)}


def test_nothing_is_calibrated_that_needs_no_data(tiny_sweep):
    inputs = prepare(tiny_sweep(grid=[{"method": "rtn", "weight_bits": 4}]), "study.yaml")
    assert inputs.calibrations == {}
    assert inputs.identities.calibrations == {}


def test_ids_depend_on_contents_and_not_on_places(tiny_sweep, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere")
    before = ids_of(tiny_sweep())
    assert ids_of(tiny_sweep(copy)) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert not set(ids_of(tiny_sweep(copy)).values()) & set(before.values())


def test_ids_depend_on_a_corpus_file_s_text(tiny_sweep, tmp_path):
    file = tmp_path / "own.txt"
    evaluation = {"perplexity": [{"corpus": {"path": str(file)}, "sequence_length": 64}]}
    file.write_text("The house by the sea. " * 60)
    before = ids_of(tiny_sweep(evaluation=evaluation))
    assert ids_of(tiny_sweep(evaluation=evaluation)) == before
    file.write_text("The house by the lake. " * 60)
    after = ids_of(tiny_sweep(evaluation=evaluation))
    assert {label for label in before if before[label] != after[label]} == {
        label for label in before if label.endswith(": own")
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"grid": [{"method": "rtn", "weight_bits": 4, "group_size": 96}]},
            "grid entry rtn-w4-g96: group_size = 96 is larger than the 64 inputs of model.layers.0.self_attn.q_proj",
        ),
        (
            {"calibration": [{"corpus": "lambada"}, {"corpus": "lambada", "sequence_length": 2049}]},
            "calibration[1].sequence_length = 2049 is longer than the model's context of 2048 tokens",
        ),
        (
            {"evaluation": {"perplexity": [{"corpus": "lambada", "sequence_length": 2049}]}},
            "evaluation.perplexity[0].sequence_length = 2049 is longer",
        ),
        (
            {"calibration": {"corpus": {"path": "no-such.txt"}}},
            "calibration: no-such.txt cannot be read (No such file or directory)",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_the_field(tiny_sweep, changes, words):
    with pytest.raises(BitatlasError, match=re.escape(words)) as caught:
        prepare(tiny_sweep(**changes), "study.yaml")
    assert str(caught.value).startswith("study.yaml: ")


def test_token_ids_outside_the_vocabulary_are_refused(tiny_sweep, tmp_path):
    np.save(tmp_path / "ids.npy", np.full((2, 64), 49152, dtype=np.int64))
    corpus = {"corpus": {"token_ids": str(tmp_path / "ids.npy")}, "sequence_length": 64}
    with pytest.raises(BitatlasError, match=r"evaluation.perplexity\[0\]: corpus ids has token id 49152, outside"):
        prepare(tiny_sweep(evaluation={"perplexity": [corpus]}), "study.yaml")


def test_an_architecture_without_a_row_is_refused(tiny_sweep, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(BitatlasError, match=r"study.yaml: models\[0\].source = .* 'gpt2' has no row"):
        prepare(tiny_sweep(tmp_path), "study.yaml")
