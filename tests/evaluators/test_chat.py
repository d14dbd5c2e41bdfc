"""Conversations: templates and thinking modes by their conventions, and whole tasks against lm-eval's HFLM."""

import copy
import json

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from evaluators.chat import CHAT_MODES, CONVENTIONS, THINKING_TOKENS, Chat, Thought
from evaluators.decoding import Decoding, decoding_of
from evaluators.errors import EvaluationError
from evaluators.generation import Generator
from evaluators.harness import chat_of, evaluate_task
from evaluators.head import split
from evaluators.merging import merge
from evaluators.packaged_task import load_task, quiet
from evaluators.scorer import Scorer
from evaluators.slices import Slice
from evaluators.suites import read_suite
from evaluators.tasks import TASKS, generates

# As openPangu-Embedded-7B V1.1 renders, from its description: an empty system turn, roles in Chinese.
OPENPANGU = (
    "{% set names = {'system': '系统', 'user': '用户', 'assistant': '助手'} %}"
    "{% if messages[0]['role'] != 'system' %}[unused9]系统：[unused10]{% endif %}"
    "{% for message in messages %}[unused9]{{ names[message['role']] }}：{{ message['content'] }}[unused10]{% endfor %}"
    "{% if add_generation_prompt %}[unused9]助手：{% endif %}"
)
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# As Qwen3 and SmolLM3 switch: an empty thought where none is wanted.
SWITCHED = (
    TURNS
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS = TURNS + "<think>\n{% endif %}{# until </think> #}"
TALK = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


def with_template(tokenizer, template, *marks):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    changed.add_tokens(list(marks))
    return changed


@pytest.fixture(scope="module")
def openpangu(tokenizer):
    return with_template(tokenizer, OPENPANGU, "[unused16]", "[unused17]")


@pytest.fixture(scope="module")
def switched(tokenizer):
    return with_template(tokenizer, SWITCHED, "<think>", "</think>")


@pytest.fixture(scope="module")
def always(tokenizer):
    return with_template(tokenizer, ALWAYS, "<think>", "</think>")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("default", ""), ("slow_think", ""), ("no_think", " /no_think"), ("auto_think", " /auto_think")],
)
def test_openpangu_takes_its_mode_at_the_end_of_the_last_user_turn(openpangu, mode, suffix):
    chat = Chat(openpangu, mode)
    assert chat.render(TALK) == (
        "[unused9]系统：[unused10][unused9]用户：1 + 1?[unused10][unused9]助手：2[unused10]"
        f"[unused9]用户：And 2 + 2?{suffix}[unused10][unused9]助手："
    )
    length = {} if mode == "no_think" else {"thinking_tokens": THINKING_TOKENS}
    assert chat.facts == {"chat": mode, "chat_template": "openPangu"} | length
    vocabulary = openpangu.get_vocab()
    assert chat.thought == Thought(opens=vocabulary["[unused16]"], closes=vocabulary["[unused17]"])
    assert TALK[-1]["content"] == "And 2 + 2?"  # what was given is left alone


def test_a_switch_of_the_template(switched):
    plain = Chat(switched, "default").render(TALK)
    assert plain.endswith("<|im_start|>assistant\n")
    assert Chat(switched, "slow_think").render(TALK) == plain
    assert Chat(switched, "no_think").render(TALK) == plain + "<think>\n\n</think>\n\n"
    with pytest.raises(EvaluationError, match=r"chat: auto_think is no mode .* knows default, no_think, slow_think"):
        Chat(switched, "auto_think")


def test_a_template_without_modes(tokenizer):
    chat = Chat(tokenizer, "default")
    assert chat.render(TALK) == tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert (chat.thinking_tokens, chat.thought) == (0, None)
    for mode in ("no_think", "slow_think"):
        with pytest.raises(
            EvaluationError, match=f"chat: {mode} is no mode .* 'without thinking modes', which knows default"
        ):
            Chat(tokenizer, mode)


def test_a_last_message_that_goes_on(tokenizer):
    talk = [*TALK, {"role": "assistant", "content": "It is"}]
    assert Chat(tokenizer, "default").render(talk, add_generation_prompt=False).endswith("assistant\nIt is")


def test_no_template_is_refused(tokenizer):
    with pytest.raises(EvaluationError, match=r"the model's tokenizer has none: leave chat out, or add"):
        Chat(with_template(tokenizer, None), "default")


def test_marks_that_are_no_tokens_are_refused(tokenizer):
    with pytest.raises(EvaluationError, match=r"marks thoughts by \[unused16\] and \[unused17\], which are no single"):
        Chat(with_template(tokenizer, OPENPANGU), "no_think")


def test_choices_are_not_scored_where_a_thought_comes_first(openpangu, switched, always, tokenizer):
    for thinking, mode, remedy in (
        (openpangu, "default", "set chat to no_think"),
        (openpangu, "auto_think", "set chat to no_think"),
        (switched, "slow_think", "set chat to no_think"),
        (always, "default", "leave chat out"),
    ):
        with pytest.raises(EvaluationError, match=f"chat: {mode} lets the model think .*: {remedy}"):
            Chat(thinking, mode).check_choices()
        assert chat_of(thinking, "gsm8k", mode, 7).thinking_tokens == 7
        with pytest.raises(EvaluationError, match="without a thought"):
            chat_of(thinking, "mmlu", mode, 7)
    for plain, mode in ((openpangu, "no_think"), (switched, "no_think"), (tokenizer, "default")):
        assert chat_of(plain, "mmlu", mode, 7).thinking_tokens == 0


def test_a_template_that_refuses_system_messages_goes_without_and_says_so(tokenizer):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chat = Chat(with_template(tokenizer, refusing + TURNS + "{% endif %}"), "default")
    without = chat.render(TALK)
    assert chat.facts == {"chat": "default"}
    assert chat.render([{"role": "system", "content": "Be brief."}, *TALK]) == without
    assert chat.facts == {"chat": "default", "system_messages": "left out"}
    long = "{% if messages|length > 1 %}{{ raise_exception('too long') }}{% endif %}"
    for talk in (TALK, [{"role": "system", "content": "Be brief."}, *TALK]):
        short = Chat(with_template(tokenizer, long), "default")
        with pytest.raises(EvaluationError, match="refuses the conversation: too long"):
            short.render(talk)
        assert short.facts == {"chat": "default"}


@pytest.mark.parametrize(
    ("template", "words"), [("{{ raise_exception('closed today') }}", "closed today"), ("{% if %}", "Expected an expr")]
)
def test_a_template_that_never_works_is_refused_at_once(tokenizer, template, words):
    with pytest.raises(EvaluationError, match=f"the model's chat template refuses the conversation: {words}"):
        Chat(with_template(tokenizer, template), "default")


def test_every_mode_belongs_to_a_convention():
    assert {mode for convention in CONVENTIONS for mode in convention.modes} == set(CHAT_MODES)
    assert CONVENTIONS[-1].reads == ()  # what fits no other


def test_identities_follow_template_mode_and_length(openpangu, switched, tokenizer):
    found = [
        Chat(openpangu, "no_think").identity,
        Chat(openpangu, "slow_think").identity,
        Chat(openpangu, "slow_think", thinking_tokens=200).identity,
        Chat(switched, "slow_think").identity,
        Chat(tokenizer, "default").identity,
    ]
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)
    assert Chat(openpangu, "no_think").identity == Chat(openpangu, "no_think", thinking_tokens=200).identity
    standard = Chat(openpangu, "slow_think", thinking_tokens=THINKING_TOKENS)
    assert Chat(openpangu, "slow_think").identity == standard.identity


@pytest.mark.parametrize(
    ("tokens", "is_open", "length"),
    [
        ([5, 6, 7], False, 0),
        ([], False, 0),
        ([1, 5, 2, 6], False, 3),
        ([1, 5, 2, 1, 6, 2, 7], False, 6),  # the last mark counts
        ([5, 2, 6], True, 2),
        ([5, 6], True, None),
        ([1, 5, 6], False, None),
        ([1, 2], False, 2),
    ],
)
def test_where_a_thought_ends(tokens, is_open, length):
    assert Thought(opens=1, closes=2).length(tokens, is_open=is_open) == length


def test_whether_a_context_ends_within_a_thought():
    thought = Thought(opens=1, closes=2)
    assert not thought.is_open_after([5, 6])
    assert thought.is_open_after([5, 1, 6])
    assert not thought.is_open_after([5, 1, 6, 2])
    assert thought.is_open_after([1, 6, 2, 1])


class Letters:
    """A tokenizer that spells each id as one character; a blank of its own."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(0x4E00 + int(token)) for token in ids)


CONTEXT = (5, 6, 7, 8, 9, 10, 11)


@pytest.fixture(scope="module")
def spoken(small_model):
    """What the model says after CONTEXT, as ids; no two of the first ten are equal."""
    (found,) = Generator(split(small_model), Letters(), set()).generate(
        [CONTEXT], Decoding(max_new_tokens=12), pack_tokens=64
    )
    assert len(set(found.tokens)) > 6
    return found.tokens


def said(model, decoding, context=CONTEXT):
    (found,) = Generator(split(model), Letters(), set()).generate([context], decoding, pack_tokens=64)
    return found


def test_a_thought_is_kept_apart_from_the_text(small_model, spoken):
    once = [index for index, token in enumerate(spoken) if spoken.count(token) == 1]
    opens, closes, in_text = spoken[once[0]], spoken[once[2]], spoken[once[3]]
    start, end = once[0], once[2]
    thought = Thought(opens=opens, closes=closes)
    found = said(small_model, Decoding(max_new_tokens=12, thought=thought))
    assert found.tokens == spoken
    assert found.text == Letters().decode(spoken[end + 1 :])
    assert found.thought == Letters().decode([token for token in spoken[: end + 1] if token not in (opens, closes)])
    # a stop string of the thought stops nothing, one of the text does
    in_thought = spoken[once[1]]
    assert start < once[1] < end
    stopped = said(
        small_model,
        Decoding(max_new_tokens=12, thought=thought, stop=(chr(0x4E00 + in_thought), chr(0x4E00 + in_text))),
    )
    assert stopped.ended_by == "stop string"
    assert stopped.tokens == spoken[: once[3] + 1]
    assert stopped.text == Letters().decode(spoken[end + 1 : once[3]])
    # without the marks it stops at once
    assert len(said(small_model, Decoding(max_new_tokens=12, stop=(chr(0x4E00 + in_thought),))).tokens) == once[1] + 1


def test_a_thought_that_does_not_end_has_no_answer(small_model, spoken):
    unfinished = said(small_model, Decoding(max_new_tokens=12, thought=Thought(opens=distinct_of(spoken), closes=299)))
    assert (unfinished.text, unfinished.ended_by) == ("", "length")
    assert unfinished.thought


def distinct_of(tokens):
    assert 299 not in tokens
    return next(token for token in tokens if tokens.count(token) == 1)


def test_a_context_may_open_the_thought(small_model):
    context = (*CONTEXT, 250)
    plain = said(small_model, Decoding(max_new_tokens=12), context)
    assert 250 not in plain.tokens
    closes = next(token for token in plain.tokens if plain.tokens.count(token) == 1)
    end = plain.tokens.index(closes)
    found = said(small_model, Decoding(max_new_tokens=12, thought=Thought(opens=250, closes=closes)), context)
    assert found.text == Letters().decode(plain.tokens[end + 1 :])
    assert found.thought == Letters().decode(plain.tokens[:end])


def test_blanks_after_a_thought_do_not_stop_the_answer():
    class Spaced(Letters):
        def decode(self, ids, skip_special_tokens=False):
            return "".join({3: "\n\n", 1: "<", 2: ">"}.get(int(token), str(int(token))) for token in ids)

    from evaluators.generation import _Text

    generator = Generator.__new__(Generator)
    generator._tokenizer, generator._end_tokens = Spaced(), frozenset()
    decoding = Decoding(max_new_tokens=50, stop=("\n\n",), thought=Thought(opens=1, closes=2))
    text = _Text(0, 0, None, None)
    ends = []
    for token in (1, 7, 3, 8, 2, 3, 4, 5, 3):
        text.tokens.append(token)
        ends.append(generator._ended_by(text, decoding))
    assert ends == [None] * 8 + ["stop string"]
    found = generator._generated(text, decoding)
    assert (found.text, found.thought) == ("45", "7\n\n8")


def test_thinking_tokens_come_on_top_of_a_tasks_own():
    assert decoding_of({"max_gen_toks": 10}, seed=0, thinking_tokens=90).max_new_tokens == 100
    assert decoding_of({}, seed=0, thinking_tokens=90).max_new_tokens == 346


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("starts_with_bos", [True, False])
def test_never_a_second_bos(model, tokenizer, bos_tokenizer, kind, starts_with_bos):
    given = bos_tokenizer if kind == "bos" else tokenizer
    template = ("{{ bos_token }}" if starts_with_bos else "") + "User: {{ messages[-1]['content'] }}\nBot:"
    given = with_template(given, template)
    ours = Scorer(model, given, chat=Chat(given, "default"))
    text = ours.apply_chat_template(TALK)
    tokens = ours.tok_encode(text)
    wanted = int(starts_with_bos or kind == "bos")
    assert tokens.count(given.bos_token_id) == wanted
    assert tokens[:1] == [given.bos_token_id] * wanted or not wanted
    context, _ = ours._encode_pair(text, " and")
    assert context.count(given.bos_token_id) == wanted
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(given), batch_size=2)
    assert tokens == theirs.tok_encode(text)
    assert ours._encode_pair(text, " and") == theirs._encode_pair(text, " and")


def by_hflm(model, tokenizer, name, *, num_fewshot, limit, **options):
    task = load_task(name, TASKS[name], num_fewshot=num_fewshot)
    task.set_fewshot_seed(seed=0)
    with quiet():
        theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4, **options)
        return evaluate(
            lm=theirs,
            task_dict={"tasks": {name: task}},
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )


@pytest.mark.parametrize(
    ("name", "num_fewshot", "limit"), [("arc_easy", 0, 12), ("winogrande", 0, 12), ("mmlu_virology", 2, 12)]
)
def test_choices_equal_hflm_in_conversations(model, tokenizer, no_network, name, num_fewshot, limit):
    result = evaluate_task(model, tokenizer, name, limit=limit, num_fewshot=num_fewshot, chat="default")
    theirs = by_hflm(model, tokenizer, name, num_fewshot=num_fewshot, limit=limit)
    for metric in result.metrics:
        assert metric.value == theirs["results"][name][f"{metric.name},none"]
    for item, sample in zip(result.items, theirs["samples"][name], strict=True):
        expected = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert "<|im_start|>user" in sample["arguments"][0][0]
    assert result.chat == {"chat": "default"}
    plain = evaluate_task(model, tokenizer, name, limit=limit, num_fewshot=num_fewshot)
    assert plain.chat == {}
    assert [item.log_likelihoods for item in plain.items] != [item.log_likelihoods for item in result.items]


def test_no_think_equals_hflm(make_llama, switched, no_network):
    model = make_llama(vocab_size=len(switched))
    result = evaluate_task(model, switched, "arc_easy", limit=8, chat="no_think")
    theirs = by_hflm(model, switched, "arc_easy", num_fewshot=None, limit=8, enable_thinking=False)
    assert all(
        sample["arguments"][0][0].endswith("<think>\n\n</think>\n\n") for sample in theirs["samples"]["arc_easy"]
    )
    for item, sample in zip(result.items, theirs["samples"]["arc_easy"], strict=True):
        expected = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-4)


def test_texts_equal_hflm_in_conversations(model, tokenizer, no_network, monkeypatch):
    shorter(monkeypatch)
    result = evaluate_task(model, tokenizer, "gsm8k_cot", limit=3, num_fewshot=2, chat="default")
    theirs = by_hflm(model, tokenizer, "gsm8k_cot", num_fewshot=2, limit=3)
    expected = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["gsm8k_cot"]}
    assert {item.doc_id: item.answer for item in result.items} == expected
    assert {item.thought for item in result.items} == {None}


def test_a_thought_reaches_items_and_no_filter(make_llama, always, no_network, monkeypatch):
    """A random model never ends the thought that the template opens: no answer, and the whole text is its thought."""
    shorter(monkeypatch)
    model = make_llama(vocab_size=len(always))
    parts = [
        evaluate_task(
            model, always, "gsm8k_cot", limit=128, num_fewshot=0, chat="slow_think", thinking_tokens=3, part=Slice(i, 2)
        )
        for i in (0, 1)
    ]
    result = merge(parts)
    assert result.chat == {"chat": "slow_think", "chat_template": "always thinking", "thinking_tokens": 3}
    assert len(result.items) == 128
    unfinished = [item for item in result.items if item.is_cut]
    assert len(unfinished) > 100
    for item in unfinished:
        assert (item.answer, item.answer_tokens, set(item.correct.values())) == ("", 15, {0.0})
        assert item.thought


def shorter(monkeypatch):
    """gsm8k_cot's 512 tokens would take minutes: 12 here, for both sides."""
    from evaluators.packaged_task import PackagedTask

    original = PackagedTask.construct_requests

    def construct(self, doc, ctx, **options):
        self.config.generation_kwargs["max_gen_toks"] = 12
        return original(self, doc, ctx, **options)

    monkeypatch.setattr(PackagedTask, "construct_requests", construct)


def test_which_tasks_generate_is_lm_evals():
    for name, source in TASKS.items():
        if source.splits and not name.startswith("mmlu_"):
            task = load_task(name, source)
            assert (task.OUTPUT_TYPE == "generate_until") == generates(name), name


def test_the_instruction_suite_is_a_conversation():
    assert [task.entry["chat"] for task in read_suite("instruction")] == ["default"]
    assert all("chat" not in task.entry for task in read_suite("openpangu-18"))
