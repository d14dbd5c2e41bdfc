"""The tables of kernels and of dtypes: what they were made of, and that nobody has edited them."""

import json
from collections import Counter

import pytest

from tests.audit import documented_dtypes
from tests.audit.npu_stand_in import _COMPOSITES, HERE, registered_kernels
from tests.audit.registered_kernels import declared_operators


@pytest.fixture(scope="module")
def table():
    return json.loads((HERE / "torch_npu-2.13.0.json").read_text(encoding="utf-8"))


def test_two_witnesses_agree(table):
    """Every kernel that the library registers for an operator of torch is one its code generator was told of."""
    source = table["source"]
    assert source["kernels"] == source["kernels_also_declared_in_the_wheels_yaml"] == len(table["kernels"])
    assert sum(source["ways"].values()) == source["operators_of_torch"]
    assert source["ways"]["kernel"] == source["kernels"]


def test_kernels_are_sorted_and_known_to_torch(table):
    import torch

    assert table["kernels"] == sorted(set(table["kernels"]))
    known = set(torch._C._dispatch_get_all_op_names())
    unknown = registered_kernels() - known
    assert not unknown or not torch.__version__.startswith("2.13")


def test_the_stand_in_goes_the_dispatchers_ways(table):
    """By its rule as many operators have each way as the dispatcher told, with torch_npu in the process."""
    import torch

    if torch.__version__ != table["source"]["torch"]:
        pytest.skip(f"the table was made with torch {table['source']['torch']}")
    has, found = torch._C._dispatch_has_kernel_for_dispatch_key, Counter()
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::"):
            continue
        composite = next((key.name for key in _COMPOSITES if has(name, key)), "none")
        found["kernel" if name in registered_kernels() else composite] += 1
    ways = table["source"]["ways"]
    assert found["kernel"] == ways["kernel"]
    assert found["CompositeImplicitAutograd"] == ways["math kernel"]
    assert (
        found["CompositeExplicitAutograd"] + found["CompositeExplicitAutogradNonFunctional"]
        == ways["default backend kernel"]
    )
    assert found["none"] == ways["backend fallback"]


def test_known_gaps():
    kernels = registered_kernels()
    assert {"aten::mm", "aten::linalg_cholesky", "aten::scaled_dot_product_attention"} <= kernels
    for missing in ("linalg_cholesky_ex.L", "cholesky_inverse", "quantile", "linalg_eigh", "cummax", "cummin"):
        assert f"aten::{missing}" not in kernels


def test_the_yaml_is_read():
    document = b"supported:\n- aa.out\n- func: bb_(Tensor(a!) self) -> Tensor(a!)\n- func: cc\n  op_api: true\n"
    assert declared_operators(document) == {"aa.out", "bb_", "cc"}


PAGE = """### torch.sort

- <term>Atlas A2 \u8bad\u7ec3\u7cfb\u5217\u4ea7\u54c1</term>\uff1a\u652f\u6301

**\u9650\u5236\u4e0e\u8bf4\u660e**\uff1a `input`\u4ec5\u652f\u6301fp16\uff0cfp32

### torch.quantile

| <term>Atlas A2 \u8bad\u7ec3\u7cfb\u5217\u4ea7\u54c1</term> | \u2718 |

> <font size="3">add_()</font>

| <term>Atlas A2 \u8bad\u7ec3\u7cfb\u5217\u4ea7\u54c1</term> | \u2714 |

- `self`\u4ec5\u652f\u6301bf16\uff0cint64\uff0cbool

### torch.abs
"""


def test_pages_are_read():
    assert documented_dtypes.sections(PAGE) == [
        ("sort", {"float16", "float32"}),
        ("quantile", set()),
        ("add_", {"bfloat16", "int64", "bool"}),
    ]
