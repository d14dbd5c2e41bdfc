"""Hidden states by token trees against plain forwards, for every family with its own attention."""

import pytest
import torch

from evaluators import own_attention, tree_attention
from evaluators.head import split
from evaluators.prefix_tree import Cost, packs_of, segments_of
from evaluators.tree_attention import TreeRunner, cost_for, reason_against


@pytest.fixture(scope="module")
def sequences():
    """Nested sharing, chains, a sequence that is a prefix of others, and some on their own."""
    generator = torch.Generator().manual_seed(1)

    def draw(count):
        return tuple(torch.randint(3, 120, (count,), generator=generator).tolist())

    examples = draw(20)
    questions = [examples + draw(5 + i % 4) for i in range(5)]
    answers = [question + draw(1 + i) for question in questions for i in range(3)]
    return sorted({examples, *questions, *answers, *(draw(9) for _ in range(3)), draw(1)})


@pytest.mark.parametrize("wait", [0.0, 5.0, 1e9], ids=["keeps prefixes", "keeps long ones", "keeps none"])
@pytest.mark.parametrize("max_tokens", [1, 50, 1000])
@torch.inference_mode()
def test_equals_plain_forwards(any_model, sequences, wait, max_tokens):
    parts = split(any_model)
    before = any_model.config._attn_implementation
    segments = segments_of(sequences, [0] * len(sequences), Cost(pair=0.05, segment=0.1, wait=wait))
    assert any(segment.prefix for segment in segments) == (wait < 1e9)
    runner, found = TreeRunner(parts), {}
    for pack in packs_of(segments, max_tokens):
        hidden, start = runner.run(pack), 0
        for segment in pack:
            for scored in segment.scored:
                for position, node in enumerate(scored.nodes, start=scored.first):
                    found[scored.sequence, position] = hidden[start + node]
            start += len(segment)
    for index, tokens in enumerate(sequences):
        plain = any_model.get_decoder()(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        ours = torch.stack([found[index, position] for position in range(len(tokens))])
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert any_model.config._attn_implementation == before
    assert not runner._kept  # what nothing waits for is let go


def test_every_family_is_trusted(any_model):
    assert reason_against(split(any_model)) is None


@pytest.mark.parametrize("broken", ["mask", "prefix", "positions"])
def test_a_model_that_goes_another_way_is_found_out(small_model, monkeypatch, broken):
    if broken == "mask":
        monkeypatch.setattr(tree_attention._Placed, "mask_QK", lambda *_: None)
    elif broken == "prefix":
        original = tree_attention.mixed_by_mask

        def without_prefix(query, key, value, mask_QK, bends):
            size = query.shape[2]
            return original(query, key[:, :, -size:], value[:, :, -size:], None, bends)

        monkeypatch.setattr(tree_attention, "mixed_by_mask", without_prefix)
    else:
        inner = small_model.model.forward

        def without_positions(position_ids=None, **others):
            del position_ids
            return inner(**others)

        monkeypatch.setattr(small_model.model, "forward", without_positions)
    assert "hidden states differ" in reason_against(split(small_model))


def test_attention_with_something_unknown_is_refused_by_its_name(small_model, monkeypatch):
    original = own_attention._attend
    monkeypatch.setattr(own_attention, "_attend", lambda *args, **options: original(*args, s_aux=1, **options))
    assert reason_against(split(small_model)) == "TypeError: attention with s_aux"


def test_a_broken_model_is_measured_nonetheless(make_llama):
    model = make_llama(vocab_size=300)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    assert reason_against(split(model)) is None


def test_low_precision_is_trusted(make_llama):
    assert reason_against(split(make_llama(vocab_size=300).to(torch.bfloat16))) is None


def test_cost_follows_the_shape(make_llama):
    narrow = cost_for(split(make_llama(vocab_size=300)))
    wide = cost_for(split(make_llama(vocab_size=300, hidden_size=128, intermediate_size=256, head_dim=16)))
    assert narrow.pair > wide.pair > 0
