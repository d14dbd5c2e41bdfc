"""What a record of operators says against a program: no kernel, a dtype outside the documented ones, a stray tensor."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tests.audit.npu_stand_in import Record, Use

TABLE = Path(__file__).parent / "torch_npu-2.13.0-dtypes.json"

# Arguments that the pages speak of when they say `input`, `self` or `tensors`.
_LISTED_ARGUMENTS = frozenset({"self", "input", "tensors"})

# Uses outside the documented lists that are let pass, each with its reason.
_CANN = "https://www.hiascend.com/document/detail/zh/canncommercial/80RC3/apiref/aolapi/context/"
LET_PASS = {
    ("addmm", "bfloat16"): f"linears with a bias; CANN takes it on Atlas A2: {_CANN}aclnnAddmm&aclnnInplaceAddmm.md",
    **{
        ("index_put_", dtype): "CANN takes all dtypes but complex ones: "
        "https://www.hiascend.com/document/detail/zh/canncommercial/80RC2/apiref/appdevgapi/context/aclnnIndexPutImpl.md"
        for dtype in ("bfloat16", "float32", "int32", "uint8")
    },
    ("silu", "bfloat16"): "part of every bfloat16 Llama and openPangu, which are published for NPUs",
}


@cache
def documented_dtypes() -> dict[str, frozenset[str]]:
    """By function, as `documented_dtypes.py` found them."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["dtypes"]
    return {name: frozenset(dtypes) for name, dtypes in table.items()}


def listed_dtypes(name: str) -> frozenset[str] | None:
    """Of an operator without its overload; of `add` for `add_` where that has no list of its own."""
    known = documented_dtypes()
    return next((known[function] for function in (name, name.strip("_")) if function in known), None)


def unlisted(use: Use) -> list[tuple[str, str]]:
    """(function, dtype) of what an operator was given outside the list of its function; none where there is no list."""
    name = use.operator.removeprefix("aten::").partition(".")[0]
    listed = listed_dtypes(name)
    given = [dtype for argument, dtype in use.dtypes if argument in _LISTED_ARGUMENTS]
    return [(name, dtype) for dtype in given if listed is not None and dtype not in listed]


def findings(record: Record) -> list[str]:
    """One sentence for each; none for a program that runs on an NPU as far as can be told without one."""
    found = [f"{use} has no kernel in torch_npu: {place}" for use, place in record.missing.items()]
    for use, place in record.kernels.items():
        if any(dtype == "float64" for _, dtype in use.dtypes):
            found.append(f"{use} is float64 on the device, where it belongs on the host: {place}")
        found += [
            f"{use}: torch_npu documents no {dtype} for {name}: {place}"
            for name, dtype in unlisted(use)
            if (name, dtype) not in LET_PASS and dtype != "float64"
        ]
    return found + record.strangers
