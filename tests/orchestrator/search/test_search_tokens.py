"""A search's tokens are not those of calibration."""

from pathlib import Path

import numpy as np
import pytest

from evaluators.corpora import Corpus, calibration_windows
from orchestrator.errors import BitatlasError
from orchestrator.inputs import prepare
from orchestrator.models.loading import load_tokenizer
from orchestrator.search.config import parse_search
from orchestrator.search.tokens import search_windows

TINY = Path(__file__).parents[2] / "assets" / "openpangu-tiny"


@pytest.fixture(scope="module")
def case():
    def of(calibration_length=128, **settings):
        document = {
            "name": "s",
            "models": [{"name": "m", "source": str(TINY)}],
            "calibration": {"corpus": "lambada", "samples": 6, "sequence_length": calibration_length, "seed": 3},
            "evaluation": {"perplexity": [{"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 1}]},
            "search": {
                "bank": {"method": "rtn", "weight_bits": [3, 4]},
                "budgets": [4.0],
                "sequence_length": 128,
                "windows": 5,
                "guard_windows": 3,
            }
            | settings,
        }
        search = parse_search(document, "s.yaml")
        return search, prepare(search.sweep.model_copy(update={"grid": search.bank}), "s.yaml").models["m"]

    return of


def stream(samples):
    corpus = Corpus(name="lambada")
    return calibration_windows(corpus, load_tokenizer(TINY), samples=samples, sequence_length=128, seed=3)


def test_they_follow_the_calibrations(case):
    found = search_windows(*case(), "s.yaml")
    assert found.shape == (8, 128)
    np.testing.assert_array_equal(found, stream(14)[6:])


def test_other_lengths_leave_no_token_in_both(case):
    """6 windows of 100 tokens end within the fifth one of 128."""
    found = search_windows(*case(calibration_length=100), "s.yaml")
    np.testing.assert_array_equal(found, stream(13)[5:])


def test_windows_of_several_corpora_take_turns(case):
    """Of the calibration's corpus what comes after it, of the others any; the guard's go on in turn."""
    found = search_windows(*case(corpus=["lambada", "boolq-passages", "coqa-stories"]), "s.yaml")
    assert found.shape == (8, 128)
    np.testing.assert_array_equal(found[::3], stream(9)[6:])
    alone = search_windows(*case(corpus="boolq-passages"), "s.yaml")
    np.testing.assert_array_equal(found[1::3], alone[:3])


def test_another_corpus_is_drawn_by_the_searchs_own_seed(case):
    first, again, other = (search_windows(*case(corpus="boolq-passages", seed=seed), "s.yaml") for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_corpus_that_is_too_small_is_told(case):
    with pytest.raises(BitatlasError, match=r"s.yaml: search: corpus lambada gives .* \(6 of them for calibration\)"):
        search_windows(*case(windows=100_000), "s.yaml")


def test_windows_longer_than_the_context_are_told(case):
    with pytest.raises(BitatlasError, match=r"search\.sequence_length = 1000000 is longer than the model's context"):
        search_windows(*case(sequence_length=1_000_000), "s.yaml")
