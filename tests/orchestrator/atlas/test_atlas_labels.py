"""Words and numbers."""

import pytest

from orchestrator.atlas import labels
from orchestrator.atlas.layer_figures import layer_place


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (22.614, "22.61"),
        (123.84, "123.8"),
        (8955.2, "8,955"),
        (202452.0, "2.0e5"),
        (0.0123, "0.0123"),
        (2e-5, "2.0e-05"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert labels.number(value) == text


@pytest.mark.parametrize(
    ("value", "reference", "percent", "text"),
    [
        (21.0, 20.0, False, "+5.0%"),
        (19.0, 20.0, False, "−5.0%"),
        (110.0, 20.0, False, "×5.5"),
        (600.0, 20.0, False, "×30"),
        (2000.0, 20.0, False, "×100"),
        (0.565, 0.585, True, "−2.0"),
        (0.5, 0.0, False, "+0.5"),
    ],
)
def test_difference(value: float, reference: float, percent: bool, text: str) -> None:
    assert labels.difference(value, reference, percent=percent) == text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (22.614, 0.2371, "22.61 ±0.24"),
        (22.614, 0.0003, "22.61 ±3.0e-04"),
        (22.614, 0.0, "22.61 ±0"),
        (684.31, 6.77, "684.3 ±6.8"),
        (8955.2, 1234.5, "8,955 ±1,234"),
        (202452.0, 31234.0, "2.0e5 ±31,234"),
        (0.0123, 0.00456, "0.0123 ±0.0046"),
        (22.614, None, "22.61"),
    ],
)
def test_an_error_has_the_decimals_of_its_value(value: float, stderr: float | None, text: str) -> None:
    assert labels.quality(value, stderr, percent=False) == text


def test_plain_takes_away_what_moves_a_cursor() -> None:
    assert labels.plain("a\x1b[2J\r\nb\tc") == "a [2J b c"


def test_natural_order() -> None:
    assert sorted(["g128", "g64", "per-channel"], key=labels.natural) == ["g64", "g128", "per-channel"]


def test_megabytes_and_duration() -> None:
    assert labels.megabytes(81_234_567) == "81.2"
    assert labels.megabytes(None) == "–"
    assert [labels.duration(value) for value in (2.44, 71.3, 600.0, 7200.0, None)] == [
        "2.4 s",
        "71 s",
        "10.0 min",
        "2.0 h",
        "–",
    ]


def test_failure_reason() -> None:
    assert labels.failure_reason("out_of_memory") == "failed: out of memory"
    assert labels.failure_reason("") == "failed"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("model.layers.12.mlp.experts.5.up_proj", (12, "mlp.experts.*.up_proj")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_layer_place(name: str, place: tuple[int | None, str]) -> None:
    assert layer_place(name) == place
