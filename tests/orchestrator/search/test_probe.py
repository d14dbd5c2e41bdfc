"""Probes on the small trained openPangu: against the same allocations as artifacts; and a whole search in small."""

import functools
from pathlib import Path
from random import Random

import optuna
import pytest
import torch

from evaluators.corpora import Corpus, evaluation_windows
from evaluators.divergence import Comparison, Recorder
from evaluators.perplexity import perplexity, window_tokens
from orchestrator.models.loading import load_model, load_tokenizer
from orchestrator.scheme import parse_scheme
from orchestrator.search.evolve import Stage, begin, generation
from orchestrator.search.knapsack import solve
from orchestrator.search.probe import Probe
from orchestrator.search.sampler import LevelSwitchSampler, allocation_of
from orchestrator.search.sensitivity import sensitivities
from orchestrator.search.space import make_space
from orchestrator.search.switches import random_allocation
from quantizers.apply import StoredBlock, installed
from quantizers.block_source import InMemory
from quantizers.stream import linears_of, quantize_blocks

TINY = Path(__file__).parents[2] / "assets" / "openpangu-tiny"
BITS = (2, 3, 4, 8)
optuna.logging.set_verbosity(optuna.logging.ERROR)


class Case:
    def __init__(self):
        torch.set_num_threads(1)
        model = load_model(TINY)
        schemes = [parse_scheme({"method": "rtn", "weight_bits": bits, "group_size": 64}, "bank") for bits in BITS]
        self.space = make_space(linears_of(model), schemes)
        self.windows = evaluation_windows(
            Corpus(name="boolq-passages"), load_tokenizer(TINY), sequence_length=128, max_windows=24
        )
        self.stored = {}
        for scheme in schemes:
            for block in quantize_blocks(InMemory(model), scheme.build(), None):
                for linear in block.linears:
                    self.stored.setdefault(linear.name, {})[scheme.weight_bits, 64] = linear

    @property
    def variants(self):
        return {
            name: {key: functools.partial(lambda linear: linear.weight, linear) for key, linear in of.items()}
            for name, of in self.stored.items()
        }

    def block(self, allocation, places):
        chosen = list(zip(self.space.groups, self.space.choices(allocation), strict=True))
        linears = [
            self.stored[name][chosen[place][1].weight_bits, 64] for place in places for name in chosen[place][0].linears
        ]
        return StoredBlock(linears=linears)

    def by_artifact(self, allocation, places, windows):
        """The divergence as a sweep measures it."""
        model, tokens, reference = load_model(TINY), window_tokens(windows), []
        perplexity(model, windows, observe=Recorder(tokens, lambda _, found: reference.append(found)))
        comparison = Comparison(tokens, reference.__getitem__)
        with installed(model, [self.block(allocation, places)]):
            perplexity(model, windows, observe=comparison)
        return comparison.result().kl_divergence


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(scope="module")
def probe(case):
    return Probe(load_model(TINY), case.space, case.variants, case.windows)


def test_it_measures_what_a_sweep_would(case, probe):
    for seed in range(2):
        allocation = random_allocation(case.space, case.space.budget(3.6, "budget"), Random(seed))
        everything = range(len(case.space.groups))
        assert probe.divergence(allocation) == case.by_artifact(allocation, everything, case.windows)
        assert probe.divergence(allocation, first=4, count=6) == case.by_artifact(
            allocation, everything, case.windows[4:10]
        )


def test_one_group_alone_and_on_top_of_others(case, probe):
    least = case.space.least
    assert probe.divergence_of_one(5, 0, None, count=4) == case.by_artifact(least, [5], case.windows[:4])
    fours = (2,) * len(least)
    changed = (*fours[:5], 0, *fours[6:])
    assert probe.divergence_of_one(5, 0, fours, count=4) == probe.divergence(changed, count=4)


def test_more_bits_are_nearer(case, probe):
    two, three, four, eight = (probe.divergence((index,) * len(case.space.groups)) for index in range(4))
    assert 0 < eight < four < three < two


def test_a_search_in_small(case, probe):
    """At the bytes of uniform 3 bits, on windows that the search did not see, both are better than uniform."""
    space, seen, unseen = case.space, 16, 8
    uniform = (1,) * len(space.groups)
    budget = space.stored_bytes(uniform)
    losses = sensitivities(space, lambda place, index: probe.divergence_of_one(place, index, None, count=4))
    start = solve(space, losses, budget)
    study = optuna.create_study(sampler=LevelSwitchSampler(space, budget, start=start))
    stages = [Stage(windows=4, survivors=2), Stage(windows=seen, survivors=1)]

    def measure(allocations, windows):
        return [probe.divergence(allocation, count=windows) for allocation in allocations]

    begin(study, space, measure, seen)
    for _ in range(6):
        generation(study, space, measure, offspring=6, stages=stages)
    found = allocation_of(space, study.best_params)
    assert space.stored_bytes(found) <= budget
    held_out = {
        name: probe.divergence(one, first=seen, count=unseen)
        for name, one in (("uniform", uniform), ("knapsack", start), ("search", found))
    }
    assert study.best_value < study.trials[0].value
    assert held_out["search"] < held_out["uniform"]
    assert held_out["knapsack"] < held_out["uniform"]
