"""One group at a time."""

from orchestrator.search.sensitivity import sensitivities


def test_every_choice_of_every_group_that_has_one(make_space_of):
    space = make_space_of([[1, 2, 3], [5], [4, 6]])
    asked, told = [], []

    def measure(place, index):
        asked.append((place, index))
        return 10.0 * place + index

    table = sensitivities(space, measure, lambda done, total: told.append((done, total)))
    assert asked == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert table == [[0.0, 1.0, 2.0], [0.0], [20.0, 21.0]]
    assert told == [(done, 5) for done in range(1, 6)]
