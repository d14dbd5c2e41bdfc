"""AWQ W4 g64 asymmetric: ours against llm-compressor's, each with its default settings.

Differences that are left: the peer searches 20 points, the identity among them, with duo scaling (weights count as
well as activations), measures losses in bfloat16, rounds scales to bfloat16 (ours to float16, the same size), and does
not search for clipping. Both leave v_proj -> o_proj out, since grouped-query attention makes their shapes differ.
"""

from tests.benchmarks.harness import SEEDS, Comparison, compare

AWQ = Comparison(
    name="awq",
    title="AWQ W4 g64 asymmetric",
    scheme={"method": "awq", "weight_bits": 4, "group_size": 64},
    peer="llmcompressor_awq.py",
    peer_flags=("--bits", "4", "--group-size", "64"),
)


def measure(root, seeds=SEEDS):
    return compare(root, AWQ, seeds)
