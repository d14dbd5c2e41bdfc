"""A checkpoint directory -> a model whose weights are memory-mapped, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BitatlasError, reason
from orchestrator.models.checkpoint import read_config, weight_files
from orchestrator.models.openpangu import TOKENIZER_CLASS, check_tokenizer_files, is_openpangu, llama_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantizers.vocabulary import VocabularyMatrix

# Buffers that old checkpoints carry and today's classes compute themselves.
_STALE = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What planning needs to know of a model, without its weights.

    Args:
        linears: name -> (out_features, in_features) of every linear that quantization touches.
        fp_bytes: bytes of the unquantized checkpoint's tensors, tied ones once.
        bits_per_value: 16 or 32, by the checkpoint's dtype.
        max_positions: the longest context; None where the configuration names none.
        dtype: what it computes in.
        matrices: "embedding" and "head" -> the matrix; no head where it is the embedding.
    """

    linears: dict[str, tuple[int, int]]
    fp_bytes: int
    bits_per_value: int
    max_positions: int | None
    vocabulary: int
    dtype: str = "float32"
    matrices: dict[str, VocabularyMatrix] = field(default_factory=dict)


def empty_model(directory: Path, dtype: str, where: str) -> PreTrainedModel:
    """The structure of a checkpoint's model with no memory behind its weights (buffers are real).

    Raises:
        BitatlasError: transformers does not know the architecture, or knows it only through remote code.
    """
    subject = f"{where} = '{directory}'"
    published = read_config(directory, where)
    if is_openpangu(published):
        return _empty(configuration(published, subject), dtype, subject)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # whatever a configuration's values make transformers raise
        raise BitatlasError(f"{subject}: this architecture cannot be built ({reason(error)})") from error
    return _empty(config, dtype, subject)


def configuration(published: Mapping[str, Any], subject: str) -> Any:
    """The transformers configuration of a config.json; openPangu's as a Llama's.

    Args:
        subject: what to name in errors.
    Raises:
        BitatlasError: no such architecture, or a field is missing or wrong.
    """
    from transformers import AutoConfig

    if is_openpangu(published):
        return llama_config(published, subject)
    try:
        return AutoConfig.for_model(**published)
    except Exception as error:
        raise BitatlasError(f"{subject}: this architecture cannot be built ({reason(error)})") from error


def _empty(config: Any, dtype: str, subject: str) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=_dtype(config, dtype), attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:  # whatever a configuration's values make transformers raise
        raise BitatlasError(f"{subject}: this architecture cannot be built ({reason(error)})") from error
    model.tie_weights()
    return model.eval()


def _dtype(config: Any, dtype: str) -> torch.dtype:
    import torch

    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own)
    return own or torch.float32


def model_shape(directory: Path, dtype: str, where: str) -> ModelShape:
    """The shape of a checkpoint's model.

    Raises:
        BitatlasError: the architecture is unknown to transformers.
        QuantizationError: it has no row in `quantizers/families.py`.
    """
    return _shape(empty_model(directory, dtype, where))


def shape_of(config: Any, dtype: str, subject: str) -> ModelShape:
    """The shape of the model that a configuration describes; raises as `model_shape` does."""
    return _shape(_empty(config, dtype, subject))


def _shape(model: PreTrainedModel) -> ModelShape:
    from quantizers.stream import linears_of
    from quantizers.vocabulary import matrices_of

    parameters = {id(parameter): parameter for parameter in model.parameters()}  # tied ones once
    return ModelShape(
        linears=linears_of(model),
        fp_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()),
        bits_per_value=8 * model.dtype.itemsize,
        max_positions=getattr(model.config, "max_position_embeddings", None),
        vocabulary=model.config.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        matrices=matrices_of(model),
    )


def load_model(directory: Path, dtype: str = "auto", where: str = "model") -> PreTrainedModel:
    """The model in evaluation mode on the CPU, its weights memory-mapped: pages are shared between processes, and
    an in-place write stays private to this one.

    Raises:
        BitatlasError: a tensor is missing, has another shape, or is unknown to the architecture.
    """
    from safetensors.torch import load_file

    model = empty_model(directory, dtype, where)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        state.update(load_file(file))
    state = {name: tensor.to(model.dtype) for name, tensor in state.items() if not name.endswith(_STALE)}
    tied = _tied_names(model)
    try:
        outcome = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise BitatlasError(f"{where} = '{directory}': {str(error).strip().splitlines()[-1].strip()}") from error
    missing = sorted(set(outcome.missing_keys) - tied)
    if missing or outcome.unexpected_keys:
        what = f"lacks {missing[0]}" if missing else f"has the unknown tensor {outcome.unexpected_keys[0]}"
        others = len(missing or outcome.unexpected_keys) - 1
        raise BitatlasError(
            f"{where} = '{directory}': the checkpoint {what}" + (f" and {others} more" if others else "")
        )
    model.tie_weights()
    model.requires_grad_(requires_grad=False)
    return model


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names that the checkpoint may leave out because they are other tensors' twins."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


def load_tokenizer(directory: Path, where: str = "model") -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; never through remote code.

    Raises:
        BitatlasError: none is there, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        if _tokenizer_class(directory) == TOKENIZER_CLASS:
            check_tokenizer_files(directory, f"{where} = '{directory}'")
            from orchestrator.models.openpangu_tokenizer import PanguTokenizer

            tokenizer: PreTrainedTokenizerBase = PanguTokenizer.from_pretrained(directory, local_files_only=True)
            return tokenizer
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise BitatlasError(f"{where} = '{directory}': no usable tokenizer ({reason(error)})") from error


def _tokenizer_class(directory: Path) -> object:
    path = directory / "tokenizer_config.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return document.get("tokenizer_class") if isinstance(document, dict) else None


def verified_directory(model: Mapping[str, str], what: str) -> Path:
    """Where a model is on this node, once it is sure to be the one that was planned.

    Args:
        model: its `source` and `digest`.
        what: how to name it in errors.
    Raises:
        BitatlasError: it is not there, or is another one.
    """
    from orchestrator.models.checkpoint import checkpoint_digest
    from orchestrator.models.source import node_cache, resolve_model

    directory = resolve_model(model["source"], what)
    if checkpoint_digest(directory, node_cache()) != model["digest"]:
        raise BitatlasError(
            f"{what} ({model['source']}) is not the one that was planned: this node holds other weights, or they "
            "changed since; bring the old ones back, or run the sweep again"
        )
    return directory
