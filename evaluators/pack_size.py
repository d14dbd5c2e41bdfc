"""How many tokens one forward pass takes: fixed on CPUs, measured on accelerators.

In bfloat16 the pack moves the last bits of a score, so its size must not depend on what else is in memory at the
moment: it is a power of two that follows from the device's whole memory and from what the model takes of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from evaluators.prefix_tree import Segment
from evaluators.tree_attention import TreeRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from evaluators.head import SplitModel

# On one CPU core 512 to 4096 are equally fast (SmolLM2-135M) and 8192 is slower. Change `SCORER_VERSION` in `harness`
# with it.
PACK_TOKENS = 2048

# Accelerators are busy with fewer tokens than this; smaller than the least, prefixes would hardly fit.
_LARGEST, _SMALLEST = 16_384, 256

# Of what the model leaves free; the rest is for kept prefixes, the head's chunks, and allocators.
_SHARE = 0.25


class Meter(Protocol):
    """What `torch.cuda` and `torch.npu` both offer."""

    def reset_peak_memory_stats(self) -> None: ...  # noqa: D102
    def max_memory_allocated(self) -> int: ...  # noqa: D102
    def memory_allocated(self) -> int: ...  # noqa: D102
    def mem_get_info(self) -> tuple[int, int]: ...  # noqa: D102


def pack_tokens_for(model: SplitModel) -> int:
    """Most tokens of one forward pass of a model where it is: `PACK_TOKENS` on a CPU, measured elsewhere."""
    if model.device.type == "cpu":
        return PACK_TOKENS
    model_bytes = sum(weight.numel() * weight.element_size() for weight in model.decoder.parameters())
    meter = torch.get_device_module(model.device)
    return measured_pack_tokens(lambda tokens: _probe(model, tokens), meter, model_bytes)


def measured_pack_tokens(run: Callable[[int], None], meter: Meter, model_bytes: int) -> int:
    """The largest power of two whose forward pass takes a quarter of the memory that the model leaves.

    Args:
        run: a forward pass of so many tokens.
        meter: of the device's memory, in bytes.
        model_bytes: of the model's weights. Not what is allocated now: cells of one model are scored alike, whatever
            else a worker keeps.
    """
    run(_SMALLEST)  # what is allocated once and stays is no pack's
    before = meter.memory_allocated()
    meter.reset_peak_memory_stats()
    run(_SMALLEST)
    bytes_per_token = max(1, meter.max_memory_allocated() - before) / _SMALLEST
    _, total_bytes = meter.mem_get_info()
    affordable = _SHARE * (total_bytes - model_bytes) / bytes_per_token
    size = _SMALLEST
    while 2 * size <= min(affordable, _LARGEST):
        size *= 2
    return size


@torch.inference_mode()
def _probe(model: SplitModel, num_tokens: int) -> None:
    """A pack as tasks make them: chains of 64 tokens beside one another."""
    chain = 64
    segments = [
        Segment(
            prefix=None,
            start=0,
            tokens=[index % model.embeddings for index in range(chain)],
            depth=list(range(chain)),
            end=[chain] * chain,
        )
        for _ in range(num_tokens // chain)
    ]
    TreeRunner(model).run(segments)
