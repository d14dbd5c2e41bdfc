"""What a search leaves: rows that never change, small files whole or not at all."""

import json
import math
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

from orchestrator.errors import BitatlasError
from orchestrator.search.records import SENSITIVITY, TRIALS, Records, space_as_json, space_from_json


def row(loss):
    return {"search": "s", "base": "fp", "group": "g", "weight_bits": 2, "loss": loss, "at": datetime.now(UTC)}


def test_rows_come_back_in_their_order_over_sessions(tmp_path):
    Records(tmp_path).add(SENSITIVITY, [row(1.0), row(2.0)])
    second = Records(tmp_path)
    second.add(SENSITIVITY, [row(3.0)])
    second.add(SENSITIVITY, [])
    assert [found["loss"] for found in Records(tmp_path).rows(SENSITIVITY)] == [1.0, 2.0, 3.0]
    assert Records(tmp_path).rows(TRIALS) == []


def test_any_reader_can_read_the_tables(tmp_path):
    Records(tmp_path).add(SENSITIVITY, [row(1.0)])
    found = pq.read_table(tmp_path / "search" / "sensitivity")
    assert found.schema.equals(SENSITIVITY.arrow())
    assert found["loss"].to_pylist() == [1.0]


def test_a_space_survives(tmp_path, make_space_of):
    space, records = make_space_of([[1, 2], [5]]), Records(tmp_path)
    records.write_json(records.space, space_as_json(space))
    assert space_from_json(json.loads(records.space.read_text())) == space


def test_what_is_no_finite_number_is_null(tmp_path):
    records = Records(tmp_path)
    records.write_json(records.chosen, {"studies": [{"loss": math.nan, "guard_loss": -math.inf, "bits": (1.5, 2)}]})
    assert json.loads(records.chosen.read_text()) == {"studies": [{"loss": None, "guard_loss": None, "bits": [1.5, 2]}]}


def test_a_disk_that_refuses_is_told(tmp_path):
    (tmp_path / "search").write_text("in the way")
    records = Records(tmp_path)
    with pytest.raises(BitatlasError, match=r"cannot write to .*mend the disk and run the same command again"):
        records.add(SENSITIVITY, [row(1.0)])
    with pytest.raises(BitatlasError, match=r"cannot write .*space.json"):
        records.write_json(records.space, [])
