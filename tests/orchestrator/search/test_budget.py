"""The search under a budget, with its guard; killed and gone on with."""

import json

import optuna
import pytest

from orchestrator.search.budget import SPENT, Budget, BudgetSearch
from orchestrator.search.config import SearchConfig
from orchestrator.search.starts import Start
from tests.orchestrator.search.made_up import FormulaCrew, KilledError, objective_of

optuna.logging.set_verbosity(optuna.logging.ERROR)
GROUPS = 10


@pytest.fixture
def space(make_space_of):
    return make_space_of([[20, 30, 40, 60]] * GROUPS)


@pytest.fixture
def starts():
    return [
        Start(name="knapsack fp", allocation=(0,) * 3 + (1,) * 4 + (2,) * 3),
        Start(name="uniform 2-g64", allocation=(1,) * GROUPS),
    ]


def searched(space, begun, directory, *, crew=None, budget=300, rows=None, about=lambda _: [], **settings):
    """A whole search; rows of the trials table are added to `rows`."""
    chosen = {"windows": 8, "guard_windows": 4, "evaluations": 60, "offspring": 8, "patience": 100} | settings
    config = SearchConfig.model_validate({"bank": {}, "budgets": (3.0,)} | chosen)
    objective = objective_of(crew or FormulaCrew())
    search = BudgetSearch(
        space=space,
        budget=Budget(name="3 bits", stored_bytes=budget),
        settings=config,
        objective=objective,
        record=(rows if rows is not None else []).extend,
        told=lambda _: None,
        about=about,
        offspring=2,
    )
    return search.run(directory / "study.journal", begun), objective


def test_it_is_better_than_every_start_on_the_guard(space, starts, tmp_path):
    rows = []
    found, _ = searched(space, starts, tmp_path, rows=rows)
    assert found["stored_bytes"] == space.stored_bytes(tuple(found["allocation"])) <= 300
    assert found["guard_loss"] < min(start["guard_loss"] for start in found["starts"])
    assert found["stopped"] == SPENT
    assert found["trials"] == len(rows) == len({row["trial"] for row in rows})
    complete = [row for row in rows if row["state"] == "complete"]
    assert {row["num_windows"] for row in complete} == {8}
    assert {row["num_windows"] for row in rows if row["state"] == "pruned"} == {1}
    assert all(space.stored_bytes(tuple(json.loads(row["allocation"]))) == row["stored_bytes"] <= 300 for row in rows)
    best = min(found["starts"], key=lambda start: start["loss"])
    assert complete[0]["allocation"] == json.dumps(best["allocation"])


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_on_its_own_chooses_among_its_own_trials(space, starts, tmp_path, sampler):
    rows = []
    found, _ = searched(space, [], tmp_path, rows=rows, sampler=sampler, starts=False, evaluations=20)
    assert found["study"] == f"3 bits, {sampler}, alone"
    assert found["starts"] == []
    assert json.dumps(found["allocation"]) in {row["allocation"] for row in rows}
    assert json.dumps(starts[0].allocation) not in {row["allocation"] for row in rows}


def test_it_costs_what_it_says(space, starts, tmp_path):
    rows = []
    found, objective = searched(space, starts, tmp_path, rows=rows, evaluations=30)
    assert found["window_forwards"] == objective.window_forwards == rows[-1]["window_forwards"]
    assert 30 * 8 <= found["window_forwards"] < 30 * 8 + 40  # it ends with the generation in which it has spent them
    spent = [row["window_forwards"] for row in rows]
    assert spent == sorted(spent)


def test_the_guard_ends_a_search_that_learns_only_its_own_tokens(space, starts, tmp_path):
    class Overfitted(FormulaCrew):
        """On guard windows, nothing is better than the first start."""

        def _one(self, mixture, window):
            divergence, nll = super()._one(mixture, window)
            return (1.0 + (mixture != starts[0].allocation), nll) if window >= 8 else (divergence, nll)

    found, _ = searched(space, starts, tmp_path, crew=Overfitted(), patience=3, evaluations=1000)
    assert found["stopped"] == "the guard has not improved for 3 generations"
    assert tuple(found["allocation"]) == starts[0].allocation
    assert found["window_forwards"] < 300


def test_a_killed_driver_goes_on_with_the_trials_it_had(space, starts, tmp_path):
    rows = []
    with pytest.raises(KilledError):
        searched(space, starts, tmp_path, crew=FormulaCrew(fails_after=16), rows=rows)
    before = len(rows)
    assert before > 5
    found, objective = searched(space, starts, tmp_path, rows=rows)
    assert len({row["trial"] for row in rows}) == len(rows) > before
    study = optuna.load_study(
        study_name="3 bits",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
        ),
    )
    assert found["trials"] == len(study.trials)
    told = {trial.number for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")}
    assert told == {row["trial"] for row in rows}
    # What the first session had run counts as well.
    assert found["window_forwards"] > objective.window_forwards
    assert found["guard_loss"] < min(start["guard_loss"] for start in found["starts"])


def test_a_search_that_is_done_asks_for_nothing_more(space, starts, tmp_path):
    first, _ = searched(space, starts, tmp_path)
    again, objective = searched(space, starts, tmp_path)
    assert again["trials"] == first["trials"]
    assert again["allocation"] == first["allocation"]
    assert objective.window_forwards == 2 * 12  # the starts


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_optunas_samplers_keep_the_budget_too(space, starts, tmp_path, sampler):
    rows = []
    found, _ = searched(space, starts, tmp_path, rows=rows, sampler=sampler, evaluations=16)
    assert {row["state"] for row in rows} == {"complete"}
    assert all(row["stored_bytes"] <= 300 for row in rows)
    assert all(row["sampler"] == sampler for row in rows)
    first = tuple(json.loads(rows[0]["allocation"]))
    assert (first == starts[1].allocation) == (sampler != "random")
    assert len({row["allocation"] for row in rows}) > len(rows) // 2
    assert found["stored_bytes"] <= 300


def test_it_begins_at_what_is_better_near_the_best_start(space, starts, tmp_path):
    asked, rows = [], []
    better = (0, *(1,) * 8, 2)

    def about(allocation):
        asked.append(allocation)
        return [Start(name="near", allocation=better), Start(name="worse", allocation=(0,) * GROUPS)]

    found, _ = searched(space, starts, tmp_path, rows=rows, about=about, sensitivity={"rounds": 3})
    names = [start["name"] for start in found["starts"]]
    assert names == ["knapsack fp", "uniform 2-g64", "near"]
    assert asked == [(1,) * GROUPS, better]  # the second round finds nothing better
    assert json.loads(rows[0]["allocation"]) == list(better)


def test_other_samplers_begin_without_it(space, starts, tmp_path):
    found, _ = searched(space, starts, tmp_path, about=None, sampler="tpe", evaluations=10)
    assert len(found["starts"]) == 2
