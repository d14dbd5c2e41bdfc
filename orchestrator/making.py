"""From a checkpoint to the parts of an artifact: what a worker does, and what the audit of NPU operators runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.artifacts import ArtifactWriter
    from orchestrator.models.streaming import StreamedModel
    from orchestrator.scheme import Scheme
    from quantizers.progress import Progress
    from quantizers.stream import SharedStatistics


def quantize_into(
    writer: ArtifactWriter,
    source: StreamedModel,
    scheme: Scheme,
    tokens: Tensor | None,
    *,
    shared: SharedStatistics | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> None:
    """Quantize embedding and head, where the scheme says so, and then block after block.

    Args:
        tokens: int64 [windows, tokens] of calibration; None where the method needs none.
        shared: statistics of the float model, where they are known already.
        report: takes one line on what is being done.
        progress: told of blocks.
    Raises:
        QuantizationError: something cannot be quantized; named.
        BitatlasError: the checkpoint lacks a tensor.
    """
    from quantizers.stream import quantize_blocks
    from quantizers.vocabulary import EMBEDDING, quantize_matrix

    embedding = None
    for role, grid in scheme.vocabulary().items():
        report(f"quantizing the {role}")
        matrix = quantize_matrix(*source.vocabulary_matrix(role), grid)
        writer.add_matrix(matrix)
        if role == EMBEDDING:
            embedding = matrix
    blocks = quantize_blocks(source, scheme.build(), tokens, shared=shared, embedding=embedding, progress=progress)
    for block in blocks:
        writer.add_block(block)
