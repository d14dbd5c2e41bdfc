"""Embedding and head as choices of their own: their bytes, their bits in a cell, and what a probe measures of them."""

import math
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.divergence import Comparison, Recorder
from evaluators.perplexity import perplexity, window_tokens
from orchestrator.errors import BitatlasError
from orchestrator.models.loading import load_model
from orchestrator.scheme import parse_scheme
from orchestrator.search.knapsack import solve
from orchestrator.search.mixtures import Mixtures
from orchestrator.search.probe import Probe
from orchestrator.search.records import space_as_json, space_from_json
from orchestrator.search.sensitivity import every_choice, is_of_base
from orchestrator.search.space import make_space, matrix_group
from orchestrator.search.starts import largest_uniform, uniform_allocations
from orchestrator.search.switches import fitted, mutated, random_allocation
from quantizers.apply import StoredBlock, StoredLinear, installed
from quantizers.grid import Grid
from quantizers.method import total_stored_bytes
from quantizers.rtn import round_to_nearest
from quantizers.stream import linears_of
from quantizers.vocabulary import PackedMatrix, VocabularyMatrix, matrices_of, quantize_matrix, vocabulary_bytes
from tests.orchestrator.search.test_probe import TINY

SCHEMES = [parse_scheme({"method": "rtn", "weight_bits": bits, "group_size": 64}, "bank") for bits in (3, 4)]
GRIDS = {"embedding": [Grid(bits=4, group_size=64), None], "head": [Grid(bits=8, group_size=32), Grid(bits=2), None]}
LINEARS = {f"model.layers.{block}.self_attn.o_proj": (64, 64) for block in range(3)}
MATRICES = {
    "embedding": VocabularyMatrix(name="model.embed_tokens", shape=(200, 64)),
    "head": VocabularyMatrix(name="lm_head", shape=(200, 64)),
}


def space_with(linears, matrices, bits_per_value=16, **more):
    groups = [matrix_group(role, matrices[role], GRIDS[role], bits_per_value) for role in matrices]
    return make_space(linears, SCHEMES, matrices=groups, **more)


def test_they_are_groups_after_the_linears_with_every_byte_counted():
    space = space_with(LINEARS, MATRICES)
    embedding, head = space.groups[-2:]
    assert (embedding.name, embedding.role, head.name, head.role) == (
        "model.embed_tokens",
        "embedding",
        "lm_head",
        "head",
    )
    assert [(one.weight_bits, one.group_size) for one in head.choices] == [(2, 0), (8, 32), (16, 0)]
    assert embedding.choices[-1].stored_bytes == 200 * 64 * 2
    assert head.choices[1].stored_bytes == vocabulary_bytes({"head": GRIDS["head"][0]}, MATRICES)
    assert space.num_weights == 3 * 64 * 64 + 2 * 200 * 64
    assert space_from_json(space_as_json(space)) == space


def test_the_cell_has_them():
    space = space_with(LINEARS, MATRICES)
    base = SCHEMES[1]
    left_alone = space.entry(base, (1, 1, 1, 1, 2))
    assert not {"embedding", "head", "layers"} & set(left_alone)
    cell = parse_scheme(space.entry(base, (1, 0, 1, 0, 1)), "grid[0]")
    assert {role: (grid.bits, grid.group_size) for role, grid in cell.vocabulary().items()} == {
        "embedding": (4, 64),
        "head": (8, 32),
    }
    assert list(space.entry(base, (1, 0, 1, 0, 1))["layers"]) == ["model.layers.1.self_attn.o_proj"]


def test_uniform_allocations_are_of_the_linears_with_every_choice_of_the_rest():
    space = space_with(LINEARS, {"embedding": MATRICES["embedding"]})
    found = uniform_allocations(space)
    assert [one.name for one in found] == [
        "uniform 3-g64, embedding 4-g64",
        "uniform 3-g64, embedding 16",
        "uniform 4-g64, embedding 4-g64",
        "uniform 4-g64, embedding 16",
    ]
    assert [one.allocation for one in found] == [(0, 0, 0, 0), (0, 0, 0, 1), (1, 1, 1, 0), (1, 1, 1, 1)]
    # More bits for the linears come first, though leaving the embedding alone would take more of the budget.
    budget = space.stored_bytes((1, 1, 1, 1)) - 1
    assert largest_uniform(space, budget).name == "uniform 4-g64, embedding 4-g64"


def test_linears_may_all_be_pinned():
    pinned = {"*": SCHEMES[0]}
    space = space_with(LINEARS, MATRICES, pinned=pinned)
    assert [one.name for one in uniform_allocations(space)][-1] == "uniform pinned, embedding 16, head 16"
    assert space.check_budget(space.stored_bytes(space.least), "x") == space.stored_bytes(space.least)


def test_pinned_linears_may_be_left_alone():
    space = space_with(LINEARS, {}, pinned={"*.0.*": None, "*.1.*": SCHEMES[0]})
    first, second, third = space.groups
    assert [(one.weight_bits, one.group_size, one.stored_bytes) for one in first.choices] == [(16, 0, 64 * 64 * 2)]
    assert (len(second.choices), len(third.choices)) == (1, 2)
    cell = parse_scheme(space.entry(SCHEMES[1], (0, 0, 1)), "grid[0]")
    method = cell.build()
    assert [method.leaves_alone(name) for name in LINEARS] == [True, False, False]
    stored = total_stored_bytes(method, LINEARS)
    assert space.stored_bytes((0, 0, 1)) == stored + 64 * 64 * 2
    assert [one.name for one in uniform_allocations(space)] == ["uniform 3-g64", "uniform 4-g64"]
    with pytest.raises(BitatlasError, match="pinned: every linear is left alone, so that nothing is quantized"):
        space_with(LINEARS, MATRICES, pinned={"*": None})


@pytest.mark.parametrize("seed", range(20))
def test_no_step_of_theirs_exceeds_the_budget(seed):
    space, chance = space_with(LINEARS, MATRICES), Random(seed)
    budget = chance.randint(space.stored_bytes(space.least), space.stored_bytes(space.most))
    allocation = random_allocation(space, budget, chance)
    for _ in range(20):
        assert space.stored_bytes(allocation) <= budget
        allocation = mutated(space, allocation, budget, chance)
    losses = [[chance.random() for _ in group.choices] for group in space.groups]
    assert space.stored_bytes(solve(space, losses, budget)) <= budget
    assert space.stored_bytes(fitted(space, space.most, budget, chance)) <= budget


def test_what_leaves_a_matrix_alone_is_the_float_model_s():
    space = space_with(LINEARS, MATRICES)
    fp = (None,) * 5
    measured = [place for place in every_choice(space) if not is_of_base(space, fp, place)]
    assert (3, 0) in measured
    assert not {(3, 1), (4, 2)} & set(measured)
    assert [place for place in every_choice(space) if is_of_base(space, (0, 0, 0, 1, 1), place)] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 1),
    ]


class Case:
    """The small trained openPangu, tied as it is or with a head of its own."""

    def __init__(self, *, tied):
        torch.set_num_threads(1)
        self.tied = tied
        model = self.model()
        self.windows = np.random.default_rng(0).integers(0, 300, (2, 48))
        self.matrices = matrices_of(model)
        self.space = space_with(linears_of(model), self.matrices, 8 * model.dtype.itemsize)
        self.weights = {
            name: {
                (scheme.weight_bits, 64): round_to_nearest(model.get_submodule(name).weight.float(), scheme.grid())
                for scheme in SCHEMES
            }
            for name in linears_of(model)
        }

    def model(self):
        model = load_model(TINY)
        if not self.tied:
            noise = 0.01 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
            model.lm_head.weight = nn.Parameter(model.lm_head.weight + noise.to(model.dtype), requires_grad=False)
        return model

    def probe(self):
        model, reference = self.model(), []
        recorder = Recorder(window_tokens(self.windows), lambda _, found: reference.append(found))
        perplexity(model, self.windows, observe=recorder)
        variants = {
            name: {key: (lambda weight=weight: weight) for key, weight in of.items()}
            for name, of in self.weights.items()
        }
        for role, matrix in self.matrices.items():
            weight = model.get_submodule(matrix.name).weight
            grids = [grid for grid in GRIDS[role] if grid is not None]
            variants[matrix.name] = {
                (grid.bits, grid.group_size): PackedMatrix(matrix.name, weight, grid) for grid in grids
            }
        return Probe(Mixtures(model, self.space, variants), self.windows, reference.__getitem__)

    def by_artifact(self, allocation):
        """(divergence, nll) of each window with everything installed, as a sweep measures them."""
        model, reference = self.model(), []
        tokens = window_tokens(self.windows)
        perplexity(model, self.windows, observe=Recorder(tokens, lambda _, found: reference.append(found)))
        linears, vocabulary = [], []
        for group, choice in zip(self.space.groups, self.space.choices(allocation), strict=True):
            key = (choice.weight_bits, choice.group_size)
            if not group.role:
                linears += [StoredLinear(name=name, weight=self.weights[name][key]) for name in group.linears]
            elif choice.weight_bits != 16:
                (name,), grid = group.linears, Grid(bits=choice.weight_bits, group_size=choice.group_size)
                vocabulary.append(quantize_matrix(name, model.get_submodule(name).weight, grid))
        comparison = Comparison(tokens, reference.__getitem__)
        with installed(model, [StoredBlock(linears=linears, vocabulary=vocabulary)]):
            result = perplexity(model, self.windows, observe=comparison)
        return list(zip(comparison.result().window_kls, result.window_nlls, strict=True))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request):
    return Case(tied=request.param)


def test_a_probe_measures_what_a_sweep_would(case):
    probe, matrices = case.probe(), len(case.matrices)
    linears = len(case.space.groups) - matrices
    losses = []
    for indices in ((0, 0), (1, 1), (0, 2))[: 3 if matrices == 2 else 2]:
        allocation = (*(place % 2 for place in range(linears)), *indices[:matrices])
        losses.append(probe.losses(allocation, range(2)))
        np.testing.assert_allclose(losses[-1], case.by_artifact(allocation), rtol=1e-5)
    assert losses[0] != losses[1]
    probe.close()
    assert probe.losses((None,) * len(case.space.groups), [0])[0].divergence == pytest.approx(0, abs=1e-6)


def test_prefixes_are_reused_behind_a_head_and_not_behind_an_embedding(case):
    probe, whole = case.probe(), case.probe()
    base = (None,) * len(case.space.groups)
    linears = len(base) - len(case.matrices)
    ran = []
    for number, block in enumerate(probe._blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    probe.losses((*base[: linears - 1], 0, *base[linears:]), [0], base=base)
    for place in range(linears, len(base)):
        mixture = (*base[:place], 0, *base[place + 1 :])
        ran.clear()
        assert probe.losses(mixture, [0], base=base) == whole.losses(mixture, [0])
        assert len(ran) == (0 if case.space.groups[place].role == "head" else len(probe._blocks))
        assert math.isfinite(whole.losses(mixture, [0])[0].divergence)
