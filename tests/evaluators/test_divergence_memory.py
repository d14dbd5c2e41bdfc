"""What scoring adds to a process, for the widest vocabulary that is planned for."""

import subprocess
import sys
from pathlib import Path

import pytest

VOCABULARY, TOKENS, ALLOWED_MIB = 153_376, 2048, 1024

SCORE_ONE_WINDOW = f"""
import numpy as np, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from evaluators.divergence import Comparison, Recorder
from evaluators.perplexity import perplexity, window_tokens

def peak_mib():  # of this process: ru_maxrss would begin with the parent's, which is whatever the tests before left
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

torch.set_num_threads(1)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(vocab_size={VOCABULARY}, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
                     num_attention_heads=8, max_position_embeddings={TOKENS})
model = LlamaForCausalLM(config).eval()
windows = np.random.default_rng(0).integers(0, {VOCABULARY}, size=(1, {TOKENS}))
perplexity(model, windows[:, :16])  # whatever is set up once
reference, tokens, peaks = {{}}, window_tokens(windows), [peak_mib()]
for observe in (Recorder(tokens, reference.__setitem__), Comparison(tokens, reference.__getitem__)):
    perplexity(model, windows, observe=observe)
    peaks.append(peak_mib())
print(*peaks)
"""


@pytest.mark.slow
def test_a_long_window_over_a_wide_vocabulary_adds_at_most_a_gigabyte(capsys):
    done = subprocess.run(
        [sys.executable, "-c", SCORE_ONE_WINDOW],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=280,
    )
    before, recorded, compared = map(float, done.stdout.split())
    with capsys.disabled():
        print(
            f"\npeak over {before:.0f} MiB: perplexity with recording +{recorded - before:.0f} MiB, with comparing "
            f"+{compared - before:.0f} MiB"
        )
    assert compared - before < ALLOWED_MIB
    assert compared - before > 64  # else the peak was reached before, and nothing was measured
