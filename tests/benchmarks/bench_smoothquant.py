"""SmoothQuant, alpha 0.5, then W8A8: ours against llm-compressor's. Weights symmetric per output channel, rounded to
nearest; activations symmetric per token, dynamic; perplexity with activations quantized.

Differences that are left: the peer takes max - min of an activation channel against twice max |w| (the paper: max |x|
against max |w|), divides ranges by 127.5 (ours, of activations, by 127), and rounds scales to bfloat16, those of
activations too.
"""

from tests.benchmarks.harness import SEEDS, Comparison, compare


def refuse(settings):
    activations = settings["input_activations"]
    wanted = activations and activations["num_bits"] == 8 and activations["strategy"] == "token"
    return None if wanted and activations["dynamic"] else "the peer did not quantize activations per token"


SMOOTHQUANT = Comparison(
    name="smoothquant",
    title="SmoothQuant W8A8",
    scheme={
        "method": "smoothquant",
        "weight_bits": 8,
        "activation_bits": 8,
        "symmetric": True,
        "options": {"alpha": 0.5},
    },
    peer="llmcompressor_smoothquant.py",
    peer_flags=("--alpha", "0.5"),
    activations=True,
    refuse=refuse,
)


def measure(root, seeds=SEEDS):
    return compare(root, SMOOTHQUANT, seeds)
