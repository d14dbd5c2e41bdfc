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


def test_slices_are_no_part_of_a_task_s_identity(tiny_sweep):
    def found(**fields):
        sweep = tiny_sweep(evaluation={"tasks": [{"name": "piqa", "limit": 300, **fields}]})
        identities = prepare(sweep, "study.yaml").identities
        (evaluation,) = identities.evaluations.values()
        return evaluation, list(identities.units.values())

    (whole, none), (sliced, units) = found(), found(slices=3)
    assert sliced == whole
    assert (none, units) == ([], [5])  # 300 documents are 5 units of 64


def test_a_task_that_cannot_be_cut_is_refused_with_the_field(tiny_sweep, monkeypatch):
    from lm_eval.api.metrics import f1_score
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "aggregation", lambda _: {"f1": f1_score})
    sweep = tiny_sweep(evaluation={"tasks": [{"name": "piqa"}, {"name": "rte", "slices": 2}]})
    words = re.escape(
        "study.yaml: evaluation.tasks[1]: task rte cannot be cut into slices, because its metric f1 is not"
    )
    with pytest.raises(BitatlasError, match=words):
        prepare(sweep, "study.yaml")


def evaluation_hash(sweep):
    ((_, found),) = prepare(sweep, "study.yaml").identities.evaluations.items()
    return found


# Computed before there were recipes: what was measured then is not measured again.
HASHES = {
    "boolq-passages": "bc780dc1f439e756fe49eb4bb3a5c0315c3ab8da3b96d8c02f451fa3443dcac4",
    "lambada": "e10799a8b1867a6add6cc73c6a3d3102f1f639e857a0cfe59b360f3b9d7f32ad",
}
HASH_OF_TOKEN_IDS = "5d43a4b4ce0ddf7024f3ea5a5c0ce882fde0497186d63522f2de8e5d3889ed4c"


def test_the_default_recipe_has_the_identity_that_it_always_had(tiny_sweep, tmp_path):
    for corpus, expected in HASHES.items():
        entry = {"corpus": corpus, "sequence_length": 64, "max_windows": 2}
        assert evaluation_hash(tiny_sweep(evaluation={"perplexity": [entry]})) == expected
        written_out = entry | {"bos": "once", "joiner": "\n\n", "tail": "drop", "divergence": False}
        assert evaluation_hash(tiny_sweep(evaluation={"perplexity": [written_out]})) == expected
    np.save(tmp_path / "ids.npy", np.arange(128, dtype=np.int64).reshape(2, 64))
    entry = {"corpus": {"token_ids": str(tmp_path / "ids.npy")}, "sequence_length": 64}
    assert evaluation_hash(tiny_sweep(evaluation={"perplexity": [entry]})) == HASH_OF_TOKEN_IDS


def test_another_recipe_has_another_identity(tiny_sweep, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "The house by the sea. "}\n' * 60)
    entry = {"corpus": {"path": str(tmp_path / "own.jsonl"), "field": "text"}, "sequence_length": 64, "max_windows": 2}
    changes = [
        {},
        {"bos": "per_window"},
        {"bos": "never"},  # the same tokens, where the tokenizer adds none; but the rows say something else
        {"joiner": " "},
        {"tail": "keep"},
        {"divergence": True},
        {"sequence_length": 32},
        {"max_windows": 1},
    ]
    hashes = [evaluation_hash(tiny_sweep(evaluation={"perplexity": [entry | change]})) for change in changes]
    assert len(set(hashes)) == len(changes)


def test_a_published_recipe_that_is_not_there_is_refused_with_the_field(tiny_sweep, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    perplexity = {"corpus": "wikitext2", "sequence_length": 64}
    with pytest.raises(BitatlasError, match=r"study.yaml: evaluation.perplexity\[0\]: data set Salesforce/wikitext "):
        prepare(tiny_sweep(evaluation={"perplexity": [perplexity]}), "study.yaml")
    with pytest.raises(BitatlasError, match=r"study.yaml: calibration: data set allenai/c4 .*set HF_HOME to a cache"):
        prepare(tiny_sweep(calibration={"corpus": "c4", "samples": 2, "sequence_length": 64}), "study.yaml")


def test_a_published_recipe_calibrates_and_measures(tiny_sweep, monkeypatch):
    import datasets

    def load(_, __, *, split, **___):
        return datasets.Dataset.from_dict(
            {"text": [f"The {split} house number {n} by the sea. " * 9 for n in range(40)]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    sweep = tiny_sweep(
        calibration={"corpus": "c4", "samples": 3, "sequence_length": 64},
        evaluation={"perplexity": [{"corpus": "wikitext2", "sequence_length": 64, "max_windows": 2}]},
    )
    inputs = prepare(sweep, "study.yaml")
    assert inputs.calibrations["tiny", sweep.calibration[0].key].shape == (3, 64)
    assert evaluation_windows_of(inputs, "tiny", sweep.evaluation.perplexity[0]).shape == (2, 64)


def test_a_conversation_or_rounding_is_another_measurement_and_plain_text_what_it_was(
    tiny_sweep, tiny_checkpoint, tmp_path
):
    def ids(directory, **fields):
        grid, evaluation = [{"method": "rtn", "weight_bits": 4}], {"tasks": [{"name": "arc_easy", "limit": 3} | fields]}
        return set(ids_of(tiny_sweep(directory, grid=grid, evaluation=evaluation)).values())

    plain, talk = ids(tiny_checkpoint), ids(tiny_checkpoint, chat="default")
    assert len(plain - talk) == 2  # fp's and the cell's; what is quantized is the same
    # A length for thoughts is of no matter where none come.
    assert ids(tiny_checkpoint, chat="default", thinking_tokens=9) == talk
    assert ids(tiny_checkpoint, rounding="float32") == plain
    assert len(ids(tiny_checkpoint, rounding="hflm") - plain) == 2
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text("Q: {{ messages[-1]['content'] }}" + template.read_text())
    assert ids(other) == plain
    assert len(ids(other, chat="default") - talk) == 2


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
            {"evaluation": {"tasks": [{"name": "boolq"}, {"name": "piqa", "chat": "no_think"}]}},
            "evaluation.tasks[1]: chat: no_think is no mode of this model: its chat template is of the kind 'without "
            "thinking modes', which knows default",
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
