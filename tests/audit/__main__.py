"""Audit everything and print what was seen: `python -m tests.audit`."""

from __future__ import annotations

import itertools

import torch

from tests.audit.cases import EVALUATIONS, FAMILIES, SCHEMES, evaluated, quantized
from tests.audit.findings import LET_PASS, findings, listed_dtypes, unlisted
from tests.audit.npu_stand_in import Record, registered_kernels


def main() -> None:
    """Print operators, counts and findings."""
    torch.set_num_threads(1)
    total = Record()
    runs = [lambda scheme=scheme: quantized("Llama", scheme) for scheme in SCHEMES]
    runs += [lambda pair=pair: evaluated(*pair) for pair in itertools.product(FAMILIES, EVALUATIONS)]
    for run in runs:
        record = run()
        for whole, part in ((total.kernels, record.kernels), (total.missing, record.missing)):
            whole.update({use: place for use, place in part.items() if use not in whole})
        total.composed |= record.composed
        total.strangers += record.strangers
    for use, place in sorted(total.kernels.items(), key=lambda item: str(item[0])):
        print(f"{use}  {place}")
    uses = [*total.kernels, *total.missing]
    passed = {pair for use in uses for pair in unlisted(use)} & set(LET_PASS)
    print(f"{len(runs)} runs; {len({use.operator for use in uses})} operators in {len(uses)} uses of dtypes")
    print(f"{len({use.operator for use in total.kernels})} of them with kernels, of {len(registered_kernels())}")
    names = {use.operator.removeprefix("aten::").partition(".")[0] for use in uses}
    print(f"{sum(listed_dtypes(name) is not None for name in names)} of {len(names)} functions have documented dtypes")
    print(f"{len(total.composed)} more that torch composes of others")
    print(f"{len(passed)} uses outside documented dtypes let pass: {sorted(passed)}")
    print(f"findings: {findings(total) or 'none'}")


if __name__ == "__main__":
    main()
