"""A checkpoint handed out block by block: only the block at work is in memory, however large the model is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import BitatlasError
from orchestrator.models.checkpoint import weight_files
from orchestrator.models.loading import empty_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantizers.families import Family


class StreamedModel:
    """A `quantizers.block_source.BlockSource` over safetensors files, memory-mapped only while a part is in use."""

    def __init__(self, directory: Path, dtype: str, device: str, where: str = "model") -> None:
        """Read the headers of the files.

        Raises:
            BitatlasError: the architecture is unknown to transformers.
            QuantizationError: it has no row in `quantizers/families.py`.
        """
        import torch
        from safetensors import safe_open

        from quantizers.families import blocks_of, family_of

        self._where = f"{where} = '{directory}'"
        self._skeleton = empty_model(directory, dtype, where)
        self._files: dict[str, Path] = {}
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
        self.device = torch.device(device)
        self.family: Family = family_of(self._skeleton)
        self._blocks = blocks_of(self._skeleton, self.family)

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self._blocks)

    def block(self, index: int) -> nn.Module:
        """A block with its weights, read now.

        Raises:
            BitatlasError: a tensor of it is missing or has another shape.
        """
        block = copy.deepcopy(self._blocks[index])
        self._fill(block, f"{self.family.blocks}.{index}.")
        return block

    @contextmanager
    def shell(self) -> Iterator[nn.Module]:
        """The model without the weights of its blocks and its head."""
        shell: nn.Module = copy.deepcopy(self._skeleton)
        decoder_name = self.family.blocks.rpartition(".")[0]
        for name, module in shell.get_submodule(decoder_name).named_children():
            prefix = f"{decoder_name}.{name}."
            if f"{decoder_name}.{name}" != self.family.blocks:
                self._fill(module, prefix)
        yield shell

    def vocabulary_matrix(self, role: str) -> tuple[str, torch.Tensor]:
        """The name and the weight [words, hidden size] of the embedding or the head, read now.

        Args:
            role: a key of `quantizers.vocabulary.matrices_of`.
        Raises:
            BitatlasError: the checkpoint lacks it.
        """
        from quantizers.vocabulary import matrices_of

        name = matrices_of(self._skeleton)[role].name
        wanted = self._skeleton.get_submodule(name).weight.dtype
        weight = self._read(f"{name}.", {"weight": wanted})["weight"]
        return name, weight.to(self.device, wanted)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module without memory its tensors, on the device."""
        wanted = {name: tensor.dtype for name, tensor in module.named_parameters()}
        state = {name: tensor.to(wanted[name]) for name, tensor in self._read(prefix, wanted).items()}
        try:
            module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise BitatlasError(f"{self._where}: {str(error).strip().splitlines()[-1].strip()}") from error
        module.requires_grad_(requires_grad=False)
        module.to(self.device)

    def _read(self, prefix: str, names: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        tensors: dict[str, torch.Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            full = prefix + name
            if full not in self._files:
                raise BitatlasError(f"{self._where}: the checkpoint lacks {full}")
            by_file.setdefault(self._files[full], []).append(name)
        for file, inside in by_file.items():
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(prefix + name) for name in inside}
        return tensors
