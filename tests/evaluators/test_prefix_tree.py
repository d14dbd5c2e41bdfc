"""Cutting token tries into segments: nothing lost, nothing twice, prefixes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.prefix_tree import Cost, num_distinct_tokens, packs_of, segments_of

COSTS = [
    Cost(pair=0.001),
    Cost(pair=0.001, segment=0.0, wait=0.0),
    Cost(pair=1.0, segment=0.0, wait=0.0),
    Cost(pair=1.0, segment=0.0, wait=1e9),
    Cost(pair=0.0, segment=0.0, wait=0.0),
]

# Few ids, so that prefixes are shared; some sequences are prefixes of others.
sequence_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=30)


def ancestors(segment, node):
    """Nodes from the segment's root to a node, itself included, by the definition of `end`."""
    return [other for other in range(node + 1) if node < segment.end[other]]


def whole_path(segment, node):
    """A node's sequence from its first token on, through all prefixes."""
    own = [segment.tokens[other] for other in ancestors(segment, node)]
    if segment.prefix is None:
        return tuple(own)
    return whole_path(segment.prefix, len(segment.prefix) - 1) + tuple(own)


@given(sequence_lists, st.sampled_from(COSTS), st.randoms(use_true_random=False))
def test_every_wanted_position_is_there_once_with_its_own_past(found, cost, random):
    sequences = sorted(set(found))
    scored_from = [random.randrange(len(tokens)) for tokens in sequences]
    segments = segments_of(sequences, scored_from, cost)
    seen = []
    for number, segment in enumerate(segments):
        assert len(segment) == len(segment.depth) == len(segment.end) > 0
        assert segment.prefix is None or segment.prefix in segments[:number]
        assert segment.start == (0 if segment.prefix is None else segment.prefix.start + len(segment.prefix))
        for scored in segment.scored:
            for position, node in enumerate(scored.nodes, start=scored.first):
                seen.append((scored.sequence, position))
                assert segment.depth[node] == position
                assert whole_path(segment, node) == sequences[scored.sequence][: position + 1]
    wanted = [
        (index, position)
        for index, tokens in enumerate(sequences)
        for position in range(scored_from[index], len(tokens))
    ]
    assert sorted(seen) == wanted
    assert sum(segment.num_finished for segment in segments) == len(sequences)
    children = [segment.prefix for segment in segments if segment.prefix is not None]
    assert all(segment.num_children == children.count(segment) for segment in segments)


@given(sequence_lists, st.sampled_from(COSTS))
def test_no_fewer_tokens_than_the_trie_has(found, cost):
    sequences = sorted(set(found))
    nodes = {tokens[: length + 1] for tokens in sequences for length in range(len(tokens))}
    assert num_distinct_tokens(sequences) == len(nodes)
    computed = sum(map(len, segments_of(sequences, [0] * len(sequences), cost)))
    assert len(nodes) <= computed <= sum(map(len, sequences))
    if cost.wait == 0:  # nothing is worth repeating
        assert computed == len(nodes)


@given(sequence_lists, st.sampled_from(COSTS), st.integers(1, 40))
def test_packs_keep_the_order_and_wait_for_prefixes(found, cost, max_tokens):
    sequences = sorted(set(found))
    segments = segments_of(sequences, [0] * len(sequences), cost)
    packs = list(packs_of(segments, max_tokens))
    assert [segment for pack in packs for segment in pack] == segments
    for pack in packs:
        assert len(pack) == 1 or sum(map(len, pack)) <= max_tokens
        assert not any(segment.prefix in pack for segment in pack if segment.prefix is not None)


def test_a_document_with_its_answers_is_one_segment():
    context = tuple(range(80))
    sequences = sorted(context + (100 + answer,) * 25 for answer in range(4))
    (segment,) = segments_of(sequences, [80] * 4, Cost(pair=0.001))
    assert len(segment) == 80 + 4 * 25
    assert not segment.is_chain


def test_examples_shared_by_many_questions_are_kept():
    examples = tuple(range(600))
    sequences = sorted((*examples, 1000 + question, *range(2000, 2060)) for question in range(50))
    prefix, *questions = segments_of(sequences, [600] * 50, Cost(pair=0.001))
    assert (len(prefix), prefix.num_children, prefix.is_chain, prefix.scored) == (600, 50, True, [])
    assert all(segment.prefix is prefix and segment.is_chain and len(segment) == 61 for segment in questions)


def test_two_words_shared_by_all_are_repeated():
    sequences = sorted((1, 2, 1000 + document, *range(60)) for document in range(20))
    segments = segments_of(sequences, [2] * 20, Cost(pair=0.001))
    assert [len(segment) for segment in segments] == [63] * 20


def test_short_answers_to_one_question_stay_together():
    sequences = sorted((*range(50), answer) for answer in range(100, 140))
    assert len(segments_of(sequences, [49] * 40, Cost(pair=0.001))) == 1


def test_nothing_gives_nothing():
    assert segments_of([], [], Cost(pair=0.001)) == []
    assert list(packs_of([], 10)) == []
    assert num_distinct_tokens([]) == 0


def test_thousands_of_nested_sequences_do_not_exhaust_the_stack():
    sequences = [tuple(range(length)) for length in range(1, 3000)]
    segments = segments_of(sequences, [0] * len(sequences), Cost(pair=1.0, segment=0.0, wait=0.0))
    assert sum(map(len, segments)) == 2999


@pytest.mark.parametrize("size", [1, 7])
def test_cost_counts_every_pair(size):
    assert Cost(pair=0.5, segment=3.0).of(size, 10) == size + 0.5 * size * (10 + size) + 3.0
