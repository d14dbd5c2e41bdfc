from evaluators.errors import EvaluationError, unknown_name


def test_unknown_name_suggests_the_nearest():
    error = unknown_name("task", "hellaswagg", ["piqa", "hellaswag"])
    assert isinstance(error, EvaluationError)
    assert isinstance(error, ValueError)
    assert str(error) == "unknown task 'hellaswagg': did you mean 'hellaswag'?"


def test_unknown_name_far_from_all_lists_them():
    assert str(unknown_name("task", "zzz", ["piqa", "boolq"])) == "unknown task 'zzz': known are boolq, piqa"
