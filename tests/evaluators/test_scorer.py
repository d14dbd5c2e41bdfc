"""The scorer against lm-eval's own HFLM, on requests made to be awkward."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evaluators import scorer as scorer_module
from evaluators import slices
from evaluators.errors import EvaluationError
from evaluators.scorer import Scorer

PAIRS = [
    ("The sun rises in the", " east"),
    ("The sun rises in the", " west"),
    ("The sun rises in the", " far east of the land"),
    ("A trailing space ", "stays with the answer"),
    ("Two of them  \n", "x"),
    ("", "nothing before it"),
    ("<|im_start|>user", " has written BOS itself"),
    ("The sun rises in the", " east"),
    ("caf\u00e9 na\u00efve \u4f60", "\u597d"),
    ("Question: why?\nAnswer:", " because" * 20),
]


def requests(pairs):
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def assert_same(ours, theirs):
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.fixture(scope="module")
def both_tokenizers(tokenizer, bos_tokenizer):
    return {"plain": tokenizer, "bos": bos_tokenizer}


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_equals_hflm(model, both_tokenizers, kind):
    tokenizer = both_tokenizers[kind]
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    ours = Scorer(model, tokenizer)
    assert ours.prefix_token_id == theirs.prefix_token_id
    for context, continuation in PAIRS:
        if context:
            assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
    assert_same(ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS), disable_tqdm=True))


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_as_hflm_equals_it_in_float32_too(model, both_tokenizers, kind):
    tokenizer = both_tokenizers[kind]
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    ours = Scorer(model, tokenizer, as_hflm=True)
    assert_same(ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS), disable_tqdm=True))


def test_texts_are_not_written_as_hflm(model, tokenizer):
    asked = Instance(request_type="generate_until", doc={}, arguments=("Once", {"until": ["."]}), idx=0)
    with pytest.raises(EvaluationError, match="only choices are scored with HFLM's rounding"):
        Scorer(model, tokenizer, as_hflm=True).generate_until([asked])


def test_a_greedy_continuation_is_recognised(model, tokenizer):
    import torch

    ids = tokenizer("Once upon a")["input_ids"]
    with torch.inference_mode():
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    pairs = [(("Once upon a", "?"), ids, [token]), (("Once upon a", "!"), ids, [token + 1])]
    scores = Scorer(model, tokenizer)._loglikelihood_tokens(pairs)
    assert [greedy for _, greedy in scores] == [True, False]


def test_truncates_on_the_left_as_hflm_does(make_llama, tokenizer):
    short = make_llama(max_position_embeddings=24)
    pairs = [("word " * 60 + "end", " and the answer"), ("one two three", " four"), ("w " * 22 + "x", " yes")]
    ours = Scorer(short, tokenizer)
    theirs = HFLM(pretrained=short, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    assert ours._max_length == theirs.max_length == 24
    assert_same(ours.loglikelihood(requests(pairs)), theirs.loglikelihood(requests(pairs), disable_tqdm=True))
    assert ours.num_truncated == 1


def test_a_continuation_longer_than_the_model_is_refused(make_llama, tokenizer):
    with pytest.raises(EvaluationError, match="it must make 1 to 24"):
        Scorer(make_llama(max_position_embeddings=24), tokenizer).loglikelihood(requests([("a", " b" * 30)]))


@pytest.mark.parametrize("pack_tokens", [1, 40, 10_000])
def test_the_pack_does_not_matter(model, tokenizer, pack_tokens):
    assert_same(
        Scorer(model, tokenizer, pack_tokens=pack_tokens).loglikelihood(requests(PAIRS)),
        Scorer(model, tokenizer).loglikelihood(requests(PAIRS)),
    )


def test_the_order_of_requests_does_not_matter_at_all(model, tokenizer):
    forward = Scorer(model, tokenizer).loglikelihood(requests(PAIRS))
    backward = Scorer(model, tokenizer).loglikelihood(requests(PAIRS[::-1]))
    assert forward == backward[::-1]


def test_shared_tokens_run_once(model, tokenizer):
    scorer = Scorer(model, tokenizer)
    pairs = [("yes or", " no"), ("yes or", " maybe"), ("yes or", " no"), ("yes or", " no way"), ("yes", " or no")]
    scorer.loglikelihood(requests(pairs))
    yes_or_no = [tokenizer(text)["input_ids"] for text in ("yes", " or", " no")]
    assert [len(ids) for ids in yes_or_no] == [1, 1, 1]
    assert scorer.work.computed_tokens == scorer.work.distinct_tokens == 3  # yes, or, no
    assert scorer.work.requested_tokens == 2 + 2 + 2 + 3 + 2
    assert scorer.work.scored_positions == 3


def test_a_long_shared_prefix_runs_once(model, tokenizer):
    examples = "An example of a question and its answer.\n" * 30
    pairs = [(f"{examples}Question {i}:", answer) for i in range(9) for answer in (" yes", " no", " not now")]
    scorer = Scorer(model, tokenizer, pack_tokens=64)
    ours = scorer.loglikelihood(requests(pairs))
    assert scorer.work.computed_tokens == scorer.work.distinct_tokens < scorer.work.requested_tokens / 10
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    assert_same(ours, theirs.loglikelihood(requests(pairs), disable_tqdm=True))


def test_activations_quantized_per_token_do_not_see_the_packing(make_llama, tokenizer, monkeypatch):
    # In float64, where rounding is no different however tokens are batched.
    model = make_llama().double()

    def quantize(_, inputs):
        scale = inputs[0].abs().amax(-1, keepdim=True) / 7
        return ((inputs[0] / scale).round() * scale,)

    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(quantize)
    packed = Scorer(model, tokenizer).loglikelihood(requests(PAIRS))
    monkeypatch.setattr(scorer_module, "reason_against", lambda _: "unpacked")
    alone = Scorer(model, tokenizer, pack_tokens=1).loglikelihood(requests(PAIRS))
    assert [score for score, _ in packed] == pytest.approx([score for score, _ in alone], abs=1e-5)
    plain = Scorer(make_llama().double(), tokenizer).loglikelihood(requests(PAIRS))
    assert max(abs(one - two) for (one, _), (two, _) in zip(packed, plain, strict=True)) > 0.1  # it does quantize


def test_padded_rows_by_name_where_trees_cannot_be_trusted(model, tokenizer, monkeypatch):
    expected = Scorer(model, tokenizer).loglikelihood(requests(PAIRS))
    monkeypatch.setattr(scorer_module, "reason_against", lambda _: "attention with sinks")
    scorer = Scorer(model, tokenizer, pack_tokens=40)
    assert scorer.scoring == "padded rows (attention with sinks), packs of 40 tokens"
    assert_same(scorer.loglikelihood(requests(PAIRS)), expected)
    assert scorer.work.computed_tokens > scorer.work.distinct_tokens


def test_progress(model, tokenizer):
    calls = []
    scorer = Scorer(model, tokenizer, pack_tokens=40, progress=lambda done, total: calls.append((done, total)))
    scorer.loglikelihood(requests(PAIRS))
    assert [total for _, total in calls] == [len(PAIRS)] * len(calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (10, 10)


def of_documents(pairs, task, first=0):
    """Requests as lm-eval makes them of documents: of one task, numbered."""
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=(task, first + number, 1))
        for number, pair in enumerate(pairs)
    ]


def test_units_are_scored_as_if_each_were_alone(make_llama, tokenizer, monkeypatch):
    import torch

    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 3)
    model = make_llama().to(torch.bfloat16)
    one, other = of_documents(PAIRS, "one"), of_documents(PAIRS[:4], "other")
    calls = []
    scorer = Scorer(model, tokenizer, progress=lambda done, total: calls.append((done, total)))
    mixed = [request for pair in zip(one[:4], other, strict=True) for request in pair] + one[4:]
    found = dict(zip(map(id, mixed), scorer.loglikelihood(mixed), strict=True))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {14}
    assert calls[-1] == (14, 14)
    for requests_of_task in (one, other):
        for start in range(0, len(requests_of_task), 3):
            unit = requests_of_task[start : start + 3]
            assert [found[id(request)] for request in unit] == Scorer(model, tokenizer).loglikelihood(unit)


def test_texts_are_drawn_otherwise_in_each_unit(model, tokenizer, monkeypatch):
    """And as if each unit were alone."""
    asked = generation_requests(["The sun rises"] * 4, max_gen_toks=12, temperature=1.0)
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 2)
    texts = Scorer(model, tokenizer).generate_until(asked)
    assert len(set(texts)) == 4
    assert texts[2:] == Scorer(model, tokenizer).generate_until(asked[2:])


def test_rolling_requests_are_refused(model, tokenizer):
    with pytest.raises(EvaluationError, match="rolling log-likelihood tasks are not supported yet"):
        Scorer(model, tokenizer).loglikelihood_rolling([])


def test_a_tokenizer_without_bos_and_eos_is_refused(model):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(EvaluationError, match="Bare has neither a BOS nor an EOS token"):
        Scorer(model, Bare())


def generation_requests(contexts, **arguments):
    return [
        Instance(
            request_type="generate_until", doc={}, arguments=(context, arguments), idx=0, metadata=("a task", i, 1)
        )
        for i, context in enumerate(contexts)
    ]


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_generates_what_hflm_does(model, both_tokenizers, kind):
    tokenizer = both_tokenizers[kind]
    contexts = [
        "The sun rises in the",
        "Question: why?\nAnswer:",
        "The sun rises in the west, or",
        "The sun rises in the",
    ]
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    ours = Scorer(model, tokenizer)
    whole = theirs.generate_until(generation_requests(contexts, max_gen_toks=16), disable_tqdm=True)
    assert ours.generate_until(generation_requests(contexts, max_gen_toks=16)) == whole
    stop = whole[1][5:9]
    options = {"max_gen_toks": 16, "until": [stop], "do_sample": False}
    cut = ours.generate_until(generation_requests(contexts, **options))
    assert cut == theirs.generate_until(generation_requests(contexts, **options), disable_tqdm=True)
    assert cut[1] == whole[1][: whole[1].index(stop)]
    first, second = ours.generated["a task", 1]
    assert (first.text, first.ended_by, second.text, second.ended_by) == (whole[1], "length", cut[1], "stop string")


def test_a_long_context_leaves_room_for_its_continuation(make_llama, tokenizer):
    short = make_llama(max_position_embeddings=24)
    theirs = HFLM(pretrained=short, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    ours = Scorer(short, tokenizer)
    asked = generation_requests(["word " * 60 + "end"], max_gen_toks=8)
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    assert ours.num_truncated == 1
    with pytest.raises(EvaluationError, match="max_gen_toks = 24 leaves no room for a prompt"):
        ours.generate_until(generation_requests(["word"], max_gen_toks=24))
