"""What `bitatlas status` says of a search."""

from orchestrator.search.records import SENSITIVITY, TRIALS, Records
from orchestrator.search.told import search_lines


def trial(number, loss, state="complete", guard=None):
    return {
        "study": "3.6 bits",
        "trial": number,
        "state": state,
        "loss": loss,
        "guard_loss": guard,
        "window_forwards": 10 * (number + 1),
    }


def test_a_sweep_without_a_search_has_no_lines(tmp_path):
    assert search_lines(tmp_path) == []


def test_it_tells_how_far_it_is(tmp_path):
    records = Records(tmp_path)
    records.write_json(records.space, [])
    assert search_lines(tmp_path) == ["search: its bank is being made"]
    records.add(SENSITIVITY, [{"group": "g", "loss": 1.0}] * 3)
    assert search_lines(tmp_path) == ["search: 3 choices measured alone"]
    records.add(TRIALS, [trial(0, 0.5, guard=0.6), trial(1, 0.1, "pruned"), trial(2, 0.4, guard=0.45)])
    assert search_lines(tmp_path)[1:] == ["search: 3.6 bits: 3 allocations tried on 30 windows, best 0.4 (guard 0.45)"]
    records.write_json(records.chosen, {})
    assert search_lines(tmp_path)[-1] == "search: allocations are chosen"
