import pytest

from evaluators.decoding import Decoding, decoding_of
from evaluators.errors import EvaluationError


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_options_refused(options):
    with pytest.raises(EvaluationError, match="must be"):
        Decoding(**{"max_new_tokens": 4} | options)
    with pytest.raises(EvaluationError, match="must be"):
        Decoding(max_new_tokens=4, temperature=float("nan"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"max_new_tokens": 256}),
        ({"until": "\n", "max_gen_toks": 10}, {"max_new_tokens": 10, "stop": ("\n",)}),
        ({"until": ["a", "b"], "do_sample": False, "temperature": 0.7}, {"stop": ("a", "b")}),
        ({"temperature": 0.0}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 5},
            {"temperature": 0.2, "top_p": 0.9, "top_k": 5},
        ),
        ({"max_tokens": 7, "max_new_tokens": 8}, {"max_new_tokens": 8}),
    ],
)
def test_lm_evals_arguments(arguments, expected):
    assert decoding_of(arguments, seed=5) == Decoding(**{"max_new_tokens": 256, "seed": 5} | expected)


def test_an_unknown_argument_is_refused_by_name():
    with pytest.raises(EvaluationError, match="unknown generation argument 'num_beams'"):
        decoding_of({"num_beams": 4}, seed=0)
