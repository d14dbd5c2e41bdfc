"""The size of packs: fixed on a CPU; elsewhere by what a forward pass takes of a device's memory."""

import pytest
import torch

from evaluators.head import split
from evaluators.pack_size import PACK_TOKENS, _probe, measured_pack_tokens, pack_tokens_for
from evaluators.scorer import Scorer


class Device:
    """Memory of a device on which a pass takes a fixed sum, kept from the first on, and so much per token."""

    def __init__(self, *, total, per_token, kept=0, resident=0):
        self.total, self.per_token, self.kept, self.resident = total, per_token, kept, resident
        self.peak = self.allocated = resident

    def run(self, tokens):
        self.allocated = self.resident + self.kept
        self.peak = max(self.peak, self.allocated + tokens * self.per_token)

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def max_memory_allocated(self):
        return self.peak

    def memory_allocated(self):
        return self.allocated

    def mem_get_info(self):
        return 0, self.total

    def pack(self, model_bytes=0):
        return measured_pack_tokens(self.run, self, model_bytes)


def test_a_quarter_of_what_the_model_leaves():
    assert Device(total=4 * 3000, per_token=1).pack() == 2048
    assert Device(total=4 * 3000 + 5000, per_token=1).pack(model_bytes=5000) == 2048
    assert Device(total=4 * 4096, per_token=1).pack() == 4096
    assert Device(total=4 * 4095, per_token=1).pack() == 2048


def test_bounds():
    assert Device(total=10**12, per_token=1).pack() == 16_384
    assert Device(total=1000, per_token=10**6).pack() == 256
    assert Device(total=10**12, per_token=0).pack() == 16_384


@pytest.mark.parametrize("other", [{"kept": 4000}, {"resident": 9000}, {"kept": 100, "resident": 100}])
def test_what_else_is_in_memory_does_not_matter(other):
    assert Device(total=4 * 3000, per_token=1, **other).pack() == 2048


def test_fixed_on_a_cpu(model, monkeypatch):
    monkeypatch.setattr("evaluators.pack_size.measured_pack_tokens", None)
    assert pack_tokens_for(split(model)) == PACK_TOKENS


def test_the_probe_runs_as_many_tokens_as_it_says(model):
    seen = []
    parts = split(model)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    _probe(parts, 256)
    hook.remove()
    assert seen == [torch.Size([1, 256])]


def test_rows_name_packs_of_another_size(model, tokenizer):
    assert Scorer(model, tokenizer).scoring == "token trees"
    assert Scorer(model, tokenizer, pack_tokens=4096).scoring == "token trees, packs of 4096 tokens"
