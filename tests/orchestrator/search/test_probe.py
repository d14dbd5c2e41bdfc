"""Probes on the small trained openPangu: against the same allocations as artifacts; with prefix reuse and without."""

import functools
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from evaluators.corpora import Corpus, evaluation_windows
from evaluators.divergence import Comparison, Recorder
from evaluators.perplexity import perplexity, window_tokens
from orchestrator.models.loading import load_model, load_tokenizer
from orchestrator.scheme import parse_scheme
from orchestrator.search.mixtures import Mixtures
from orchestrator.search.probe import Probe
from orchestrator.search.space import make_space
from orchestrator.search.switches import random_allocation
from quantizers.apply import StoredBlock, installed
from quantizers.block_source import InMemory
from quantizers.stream import linears_of, quantize_blocks

TINY = Path(__file__).parents[2] / "assets" / "openpangu-tiny"
BITS = (2, 3, 4, 8)


class Case:
    def __init__(self):
        torch.set_num_threads(1)
        model = load_model(TINY)
        schemes = [parse_scheme({"method": "rtn", "weight_bits": bits, "group_size": 64}, "bank") for bits in BITS]
        self.space = make_space(linears_of(model), schemes)
        self.windows = evaluation_windows(
            Corpus(name="boolq-passages"), load_tokenizer(TINY), sequence_length=64, max_windows=6
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
        """(divergence, nll) of each window as a sweep measures them."""
        model, tokens, reference = load_model(TINY), window_tokens(windows), []
        perplexity(model, windows, observe=Recorder(tokens, lambda _, found: reference.append(found)))
        comparison = Comparison(tokens, reference.__getitem__)
        with installed(model, [self.block(allocation, places)]):
            result = perplexity(model, windows, observe=comparison)
        return list(zip(comparison.result().window_kls, result.window_nlls, strict=True))

    def probe(self, **settings):
        """With the float model's most likely tokens recorded."""
        model, reference = load_model(TINY), []
        recorder = Recorder(window_tokens(self.windows), lambda _, found: reference.append(found))
        perplexity(model, self.windows, observe=recorder)
        mixtures = Mixtures(model, self.space, self.variants)
        return Probe(mixtures, self.windows, reference.__getitem__, **settings)


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(scope="module")
def probe(case):
    return case.probe()


def drawn(case, seed):
    return random_allocation(case.space, case.space.budget(3.6, "budget"), Random(seed))


def test_it_measures_what_a_sweep_would(case, probe):
    everything = range(len(case.space.groups))
    for seed in range(2):
        allocation = drawn(case, seed)
        expected = case.by_artifact(allocation, everything, case.windows[2:4])
        np.testing.assert_allclose(probe.losses(allocation, range(2, 4)), expected, rtol=1e-5)


def test_one_group_alone_in_the_float_model(case, probe):
    alone = tuple(0 if place == 5 else None for place in range(len(case.space.groups)))
    expected = case.by_artifact(case.space.least, [5], case.windows[:2])
    np.testing.assert_allclose(probe.losses(alone, range(2)), expected, rtol=1e-5)
    nothing = (None,) * len(case.space.groups)
    assert all(loss.divergence == pytest.approx(0, abs=1e-6) for loss in probe.losses(nothing, range(2)))


@pytest.mark.parametrize("prefix_bytes", [1 << 30, 100_000, 0])
def test_blocks_that_a_base_has_run_already_change_nothing(case, probe, prefix_bytes):
    """To the bit: with all prefixes kept, with room for some windows alone, and with none."""
    reusing = case.probe(prefix_bytes=prefix_bytes)
    base = drawn(case, 0)
    for place in (0, 9, len(base) - 1):
        changed = (*base[:place], 3, *base[place + 1 :])
        assert reusing.losses(changed, range(4), base=base) == probe.losses(changed, range(4))
    assert reusing.losses(base, range(4), base=base) == probe.losses(base, range(4))
    other = drawn(case, 1)
    assert reusing.losses(base, range(4), base=other) == probe.losses(base, range(4))


def test_only_blocks_from_the_change_on_are_run(case):
    probe = case.probe()
    base = (None,) * len(case.space.groups)
    ran = []
    for number, block in enumerate(probe._blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    last = len(probe._blocks) - 1
    place = next(place for place, block in enumerate(probe._first_block) if block == last)
    probe.losses((*base[:place], 0, *base[place + 1 :]), [0], base=base)
    assert ran == [*range(last + 1), last]  # the base once, then the last block alone
    ran.clear()
    probe.losses((*base[:place], 1, *base[place + 1 :]), [0], base=base)
    assert ran == [last]


def test_the_model_is_given_back_as_it_was(case):
    probe = case.probe()
    before = probe.losses((None,) * len(case.space.groups), [0])
    probe.losses(case.space.least, [0], base=case.space.most)
    probe.close()
    assert probe.losses((None,) * len(case.space.groups), [0]) == before
    assert all("forward" not in vars(block) for block in probe._blocks)


def test_more_bits_are_nearer(case, probe):
    def mean(index):
        losses = probe.losses((index,) * len(case.space.groups), range(6))
        return sum(loss.divergence for loss in losses) / len(losses)

    two, three, four, eight = (mean(index) for index in range(4))
    assert 0 < eight < four < three < two
