"""What is compared with the original implementations: one row of the table each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALL_BLOCKS = 30
W4_G64 = {"weight_bits": 4, "group_size": 64}
AS_PUBLISHED = {"preset": "as_published"}
# Functions of methods.py that go linear by linear, so that ours can be given the same inputs; see in_step.py.
IN_STEP = ("gptq", "gptaq", "billm", "slim_llm")
GPTQ_SCRIPT = {"act_order": True, "static_groups": True}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting on both sides.

    Attributes:
        release: whose code, by its name in `releases.py`.
        function: of `methods.py`, with its settings.
        scheme: ours, as a grid entry of a sweep file.
        windows: how many of the calibration windows; None is all.
        blocks: how many decoder layers are quantized. With one, perplexity is left out.
        dtype: the original's; it matters to perplexity alone, errors are of float32.
    """

    release: str
    function: str
    given: Mapping[str, Any]
    scheme: Mapping[str, Any]
    windows: int | None = None
    blocks: int = ALL_BLOCKS
    dtype: str = "float32"


def _grouped(bits):
    return {"bits": bits, "group_size": 64}


def _gptq(bits, blocks=ALL_BLOCKS, **script):
    script = script or GPTQ_SCRIPT
    scheme = {"method": "gptq", "weight_bits": bits, "group_size": 64, "options": AS_PUBLISHED | script}
    return Setting(release="gptq", function="gptq", given=_grouped(bits) | script, scheme=scheme, blocks=blocks)


def _gptaq(bits, symmetric, blocks=ALL_BLOCKS):
    convention = "gptaq-sym" if symmetric else "gptq-asym"
    scheme = {"method": "gptaq", "weight_bits": bits, "group_size": 64, "convention": convention}
    return Setting(
        release="GPTAQ",
        function="gptaq",
        given=_grouped(bits) | {"symmetric": symmetric},
        scheme=scheme | {"options": AS_PUBLISHED | GPTQ_SCRIPT},
        blocks=blocks,
    )


def _rtn(release, function, convention, bits, blocks=ALL_BLOCKS):
    scheme = {"method": "rtn", "weight_bits": bits, "group_size": 64, "convention": convention}
    return Setting(release=release, function=function, given=_grouped(bits), scheme=scheme, blocks=blocks)


def _slim_llm(bits, blocks):
    scheme = {"method": "slim_llm", "weight_bits": bits, "group_size": 64, "options": AS_PUBLISHED}
    return Setting(release="SliM-LLM", function="slim_llm", given=_grouped(bits), scheme=scheme, blocks=blocks)


def _smoothquant(blocks, dtype):
    scheme = {"method": "smoothquant", "weight_bits": 8, "activation_bits": 8, "convention": "sq-sym"}
    return Setting(
        release="smoothquant",
        function="smoothquant",
        given={"alpha": 0.5},
        scheme=scheme | {"options": AS_PUBLISHED | {"alpha": 0.5}},
        blocks=blocks,
        dtype=dtype,
    )


SETTINGS = {
    "RTN W4, gptq-asym": _rtn("gptq", "rtn_gptq", "gptq-asym", 4),
    "RTN W4, awq-asym": _rtn("llm-awq", "rtn_awq", "awq-asym", 4),
    "GPTQ W4": _gptq(4),
    "GPTQ W3": _gptq(3),
    "AWQ W4": Setting(
        release="llm-awq",
        function="awq",
        given=_grouped(4),
        scheme={"method": "awq", **W4_G64, "options": AS_PUBLISHED},
        windows=8,
    ),
    "GPTAQ W4": _gptaq(4, symmetric=False),
    "SmoothQuant W8A8": _smoothquant(ALL_BLOCKS, "bfloat16"),
    "SliM-LLM W2, 3 blocks": _slim_llm(2, 3),
    "SliM-LLM W3": _slim_llm(3, ALL_BLOCKS),
    "SliM-LLM W4": _slim_llm(4, ALL_BLOCKS),
    "BiLLM": Setting(
        release="BiLLM",
        function="billm",
        given={},
        scheme={"method": "billm", "weight_bits": 1, "options": AS_PUBLISHED},
    ),
    "RTN W3, gptq-asym, first block": _rtn("gptq", "rtn_gptq", "gptq-asym", 3, blocks=1),
    "RTN W3, awq-asym, first block": _rtn("llm-awq", "rtn_awq", "awq-asym", 3, blocks=1),
    "GPTQ W4, dynamic groups, first block": _gptq(4, 1, act_order=False, static_groups=False),
    "GPTAQ W4, symmetric, first block": _gptaq(4, symmetric=True, blocks=1),
    "SmoothQuant W8A8, float32, first block": _smoothquant(1, "float32"),
}
