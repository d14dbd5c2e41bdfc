"""What slices were measured with, told as one."""

import pytest

from orchestrator.slices import merged_fallback, merged_software


def test_software_of_all_slices():
    one, other = {"torch": "2.12.0", "cann": "9.1.0"}, {"torch": "2.13.0"}
    assert merged_software([{"software": one}, {"software": one}]) == one
    assert merged_software([{"software": one}, {"software": other}]) == {"torch": "2.12.0, 2.13.0", "cann": "9.1.0"}
    assert merged_software([{"software": one}, {}]) is None  # kept by a version that did not tell


@pytest.mark.parametrize(
    ("told", "merged"),
    [([None, None], None), ([False, False], False), ([False, True], True), ([None, False], False)],
)
def test_a_fallback_in_one_slice_is_one_in_all(told, merged):
    assert merged_fallback([{"cpu_fallback": fallback} for fallback in told]) is merged
    assert merged_fallback([{}]) is None
