"""Whose an output directory is."""

import pytest

from orchestrator.claim import claim_output, write_sweep
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.store import Store
from orchestrator.witness import left_witness


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "out")


def test_a_directory_of_this_sweep_is_claimed_again(make_sweep, layout):
    claim_output(layout, make_sweep())
    with Store(layout):
        write_sweep(layout, make_sweep())
    claim_output(layout, make_sweep())


def test_what_a_driver_killed_in_its_first_moment_leaves_is_no_obstacle(make_sweep, layout):
    with left_witness(layout.root) as witness:
        with Store(layout):  # folders and a lock, no sweep file yet
            content = {path.name for path in layout.root.iterdir()}
        assert len(content) > 2
        layout.sweep.with_name(".sweep.yaml.tmp").write_text("name: ti")
        claim_output(layout, make_sweep())
        (layout.table("results") / "part.parquet").write_bytes(b"someone's")
        with pytest.raises(BitatlasError, match="is no sweep's output"):
            claim_output(layout, make_sweep())
    assert witness.path.startswith(str(layout.root.resolve()))


@pytest.mark.parametrize("content", ["[1, 2]", "kind: something else", "\x00"])
def test_a_sweep_file_that_says_nothing(make_sweep, layout, content):
    layout.root.mkdir()
    layout.sweep.write_text(content)
    with pytest.raises(BitatlasError, match=r"sweep\.yaml is not readable; choose another --out, or mend that file"):
        claim_output(layout, make_sweep())


def test_simulated_and_native_results_are_not_put_together(make_sweep, layout):
    native = make_sweep(evaluation={"tasks": [{"name": "arc_easy"}], "execution": "native"})
    with Store(layout):
        write_sweep(layout, make_sweep())
    with pytest.raises(
        BitatlasError, match=r"holds simulated results, and evaluation\.execution is now native; choose"
    ):
        claim_output(layout, native)
    write_sweep(layout, native)
    claim_output(layout, native)
    layout.sweep.write_text("name: study\nevaluation: {}\n")  # as written before there was another execution
    claim_output(layout, make_sweep())
