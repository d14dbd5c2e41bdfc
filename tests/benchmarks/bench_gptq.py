"""GPTQ W4 g64 asymmetric: ours against llm-compressor's; static act-order, damping 0.01, block size 128.

Differences that are left: the peer collects a block's Hessians before it quantizes any of it (ours is true-sequential
by default) and rounds scales to bfloat16 (ours to float16, the same size).
"""

from tests.benchmarks.harness import SEEDS, Comparison, compare

GPTQ = Comparison(
    name="gptq",
    title="GPTQ W4 g64 asymmetric",
    scheme={"method": "gptq", "weight_bits": 4, "group_size": 64},
    peer="llmcompressor_gptq.py",
    peer_flags=("--bits", "4", "--group-size", "64"),
    refuse=lambda settings: "the peer fell back to RTN on some layers" if settings["rtn_fallbacks"] else None,
)


def measure(root, seeds=SEEDS):
    return compare(root, GPTQ, seeds)
