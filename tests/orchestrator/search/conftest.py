"""Made-up spaces: groups of random sizes with choices in rising order of bytes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from orchestrator.search.space import Choice, Group, Space

settings.register_profile("search", deadline=None, max_examples=80, derandomize=True)
settings.load_profile("search")


def space_of(sizes):
    """One group per list of bytes."""
    return Space(
        tuple(
            Group(
                linears=(f"model.layers.{index}.o_proj",),
                num_weights=max(rising) * 2,
                choices=tuple(
                    Choice(weight_bits=bits, group_size=64, stored_bytes=stored)
                    for bits, stored in enumerate(sorted(set(rising)), 1)
                ),
            )
            for index, rising in enumerate(sizes)
        )
    )


spaces = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), min_size=1, max_size=6).map(space_of)


@st.composite
def spaces_with_budgets(draw):
    """A space, and a budget between its least and its most."""
    space = draw(spaces)
    least, most = space.stored_bytes(space.least), space.stored_bytes(space.most)
    return space, draw(st.integers(least, most))


@pytest.fixture(scope="session")
def make_space_of():
    return space_of
