"""One decoder block in four stages, so that each activation is computed once while weights change in between.

A plain forward cannot pause between a block's linears; hooks would need a whole forward per stage. Here the block's
own modules run, with a stage's output linear swapped for the identity while its inputs are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.apply import StoredLinear, install_matrix
from quantizers.block_source import BlockSource
from quantizers.errors import NumericalError
from quantizers.families import Family, blocks_of, linear_at

# Tokens that go through a block at once: large enough for efficient products, small enough for the cache.
_TOKENS_PER_BATCH = 4096

# A stage's linears, and an iterator over their shared inputs, one batch of windows at a time.
Stage = tuple[tuple[str, ...], Iterator[Tensor]]


def walk_block(
    block: nn.Module, family: Family, hidden: list[Tensor], arguments: Sequence[Mapping[str, Any]]
) -> Iterator[Stage]:
    """Run one block over all batches, in place, stopping before each stage's linears run.

    The caller may replace the weights of the stage it is given: what follows uses the new ones. Two walks can go in
    step (`zip`): the same block with float and with quantized weights. The block's output is in `hidden` once the
    iterator is exhausted.

    Args:
        hidden: residual stream, one [windows, tokens, hidden] tensor per batch; replaced by the block's output.
        arguments: the block's keyword arguments (mask, positions) per batch.
    """
    attention_norm = block.get_submodule(family.attention_norm)
    mlp_norm = block.get_submodule(family.mlp_norm)
    after_attention = _optional(block, family.after_attention)
    after_mlp = _optional(block, family.after_mlp)
    attention, mlp = block.get_submodule(family.attention), block.get_submodule(family.mlp)
    output, down = block.get_submodule(family.attention_output), block.get_submodule(family.mlp_output)
    attention_inputs, attention_output, mlp_inputs, mlp_output = family.stages

    seen: list[Tensor] = []
    yield attention_inputs, _noted((attention_norm(batch) for batch in hidden), seen)
    with _identity(block, family.attention_output):
        mixed = [
            attention(hidden_states=inputs, **extra)[0]
            for inputs, extra in zip(_again(seen, attention_norm, hidden), arguments, strict=True)
        ]
    yield attention_output, iter(mixed)
    for index, batch in enumerate(mixed):
        hidden[index] = hidden[index] + after_attention(output(batch))
    del mixed

    seen = []
    yield mlp_inputs, _noted((mlp_norm(batch) for batch in hidden), seen)
    with _identity(block, family.mlp_output):
        gated = [mlp(inputs) for inputs in _again(seen, mlp_norm, hidden)]
    yield mlp_output, iter(gated)
    for index, batch in enumerate(gated):
        hidden[index] = hidden[index] + after_mlp(down(batch))


def _noted(batches: Iterator[Tensor], seen: list[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        seen.append(batch)
        yield batch


def _again(seen: list[Tensor], norm: nn.Module, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """What a stage's linears see: as it was looked at, each batch let go as it is used, or computed now."""
    for batch in hidden:
        yield seen.pop(0) if seen else norm(batch)


def check_weights_finite(block: nn.Module, stage: Sequence[str], prefix: str) -> None:
    """To be asked before a stage runs: a broken weight would spoil, and so blame, the inputs of the next.

    Raises:
        QuantizationError: a weight of the stage holds NaN or infinity; `prefix` is the block's name with its dot.
    """
    for name in stage:
        if not torch.isfinite(linear_at(block, name).weight).all():
            raise NumericalError(f"{prefix}{name}.weight holds NaN or infinity")


def run_block(block: nn.Module, family: Family, hidden: list[Tensor], arguments: Sequence[Mapping[str, Any]]) -> None:
    """Run one block over all batches, in place: `walk_block` without looking."""
    for _ in walk_block(block, family, hidden, arguments):
        pass


def _optional(block: nn.Module, name: str | None) -> nn.Module:
    return block.get_submodule(name) if name else nn.Identity()


@contextmanager
def _identity(block: nn.Module, name: str) -> Iterator[None]:
    parent_name, _, child = name.rpartition(".")
    parent = block.get_submodule(parent_name)
    original = getattr(parent, child)
    setattr(parent, child, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, child, original)


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and hands the hidden states on."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = [original]  # in a list, so that it is no submodule
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._original[0], name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


@torch.inference_mode()
def record_inputs(
    model: nn.Module, family: Family, token_batches: list[Tensor]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """What the first block receives, and every block's keyword arguments, without running any block.

    Args:
        token_batches: int64 [windows, tokens] per batch.
    Returns:
        hidden: the first block's input per batch.
        arguments: [block][batch] keyword arguments.
    """
    blocks = blocks_of(model, family)
    originals = list(blocks)
    recorders = [_Recorder(block) for block in originals]
    hidden: list[Tensor] = []
    arguments: list[list[dict[str, Any]]] = [[] for _ in originals]
    decoder = model.get_submodule(family.blocks.rpartition(".")[0])
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        for tokens in token_batches:
            decoder(input_ids=tokens, use_cache=False)
            first = recorders[0].hidden
            if first is None:
                raise AssertionError("the decoder never called its first block")
            hidden.append(first)
            for index, recorder in enumerate(recorders):
                arguments[index].append(recorder.arguments)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    return hidden, arguments


def enter(
    source: BlockSource, windows: Tensor, embedding: StoredLinear | None = None
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """`record_inputs` for calibration windows [windows, tokens], cut into batches.

    Args:
        embedding: stands in the place of the model's own.
    """
    per_batch = max(1, _TOKENS_PER_BATCH // windows.shape[1])
    batches = list(torch.split(windows.to(source.device), per_batch))
    with source.shell() as model, ExitStack() as undo:
        if embedding is not None:
            install_matrix(model, embedding, undo)
        return record_inputs(model, source.family, batches)
