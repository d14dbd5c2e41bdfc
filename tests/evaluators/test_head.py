import pytest
import torch

from evaluators.errors import EvaluationError
from evaluators.head import hidden_states, split, token_log_probabilities


def log_probabilities(model, ids, **options):
    parts = split(model)
    with torch.inference_mode():
        hidden = hidden_states(parts, ids[None])[0, :-1]
        return token_log_probabilities(parts, hidden, ids[1:], **options)


def plain(model, ids):
    with torch.inference_mode():
        table = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    return table.gather(1, ids[1:, None])[:, 0], table.argmax(1) == ids[1:]


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 300 * 7, 2**26])
def test_log_probabilities_and_greedy_do_not_depend_on_the_chunk(small_model, chunk_bytes):
    ids = torch.arange(40) * 7 % 300
    with torch.inference_mode():
        ids[20] = small_model(input_ids=ids[None, :20]).logits[0, -1].argmax()  # one greedy token
    found, greedy = log_probabilities(small_model, ids, chunk_bytes=chunk_bytes)
    expected, expected_greedy = plain(small_model, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert greedy.tolist() == expected_greedy.tolist()
    assert greedy[19]


def test_soft_cap_is_honoured(make_tiny):
    # wide weights, so that the cap of 2 does bend the logits
    model = make_tiny("Gemma2", final_logit_softcapping=2.0, initializer_range=0.5)
    assert split(model).softcap == 2.0
    ids = torch.arange(3, 60)
    torch.testing.assert_close(log_probabilities(model, ids)[0], plain(model, ids)[0], atol=1e-5, rtol=0)


def test_a_head_that_scales_its_logits_is_refused(make_tiny):
    with pytest.raises(EvaluationError, match="GraniteForCausalLM changes its logits after the head"):
        split(make_tiny("Granite", logits_scaling=8.0))


def test_a_broken_model_is_not_refused(make_llama):
    model = make_llama(vocab_size=300)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    assert log_probabilities(model, torch.arange(9))[0].isnan().all()


def test_training_mode_is_refused(make_llama):
    with pytest.raises(EvaluationError, match=r"call model\.eval\(\)"):
        split(make_llama(vocab_size=300).train())


def test_a_model_without_a_head_is_refused(small_model):
    with pytest.raises(EvaluationError, match="no separate decoder and output head"):
        split(small_model.model)
