"""Losses among the choices of documents."""

import math

import pytest

from evaluators.harness import Item
from orchestrator.search.task_probe import choices_loss


def item(log_likelihoods, target):
    return Item(doc_id=0, subtask=None, log_likelihoods=log_likelihoods, target=target, correct={})


def test_it_is_the_cross_entropy_of_the_right_choice():
    sure, even, wrong = item([-1.0, -1000.0], 0), item([-5.0, -5.0], 1), item([-2.0, -2.0 - math.log(3)], 1)
    found = choices_loss([sure, even, wrong])
    assert found == pytest.approx((0 + math.log(2) + math.log(4)) / 3)


def test_what_is_no_number_is_none():
    assert math.isnan(choices_loss([item([math.nan, -1.0], 0)]))
