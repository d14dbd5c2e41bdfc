"""openPangu-Embedded without remote code: its configuration is that of a Llama with a bias on q, k, v and o.

The released classes derive from transformers' Llama ones and change nothing but the attention's `bias`. So the
published config.json is mapped in memory to a `LlamaConfig`; no file is rewritten, and the weights fit by name. Nothing
is defaulted: a field that is missing, and one that this mapping does not know, are refused by name.
Source: config.json and modelling files of openPangu-Embedded-7B V1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from transformers import LlamaConfig

MODEL_TYPE = "PanguEmbedded"
TOKENIZER_CLASS = "PanguTokenizer"
# What the model computes does not depend on these.
_IDLE = ("auto_map", "initializer_range", "transformers_version", "use_cache", "_name_or_path")


class PanguConfig(BaseModel):
    """The fields of a published config.json that say what the model computes; all must be there."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    architectures: list[Literal["PanguEmbeddedForCausalLM"]]
    model_type: Literal["PanguEmbedded"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    hidden_act: Literal["silu"]
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    bias: bool
    tie_word_embeddings: bool
    attention_dropout: float = Field(ge=0, lt=1)
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    torch_dtype: Literal["bfloat16", "float16", "float32"]


def is_openpangu(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is openPangu's."""
    return config.get("model_type") == MODEL_TYPE


def llama_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """The Llama configuration that computes what openPangu's does.

    Args:
        config: openPangu's config.json.
        where: what to put before a complaint.
    Raises:
        BitatlasError: a field is missing, unknown, or outside its rule; names it.
    """
    from transformers import LlamaConfig

    given = {name: value for name, value in config.items() if name not in _IDLE and value is not None}
    if "dtype" in given:  # newer writers' name of it
        given.setdefault("torch_dtype", given.pop("dtype"))
    try:
        pangu = PanguConfig.model_validate(given)
    except ValidationError as error:
        raise BitatlasError(f"{where}: {_complaint(error)}") from error
    heads, groups = pangu.num_attention_heads, pangu.num_key_value_heads
    for whole, part, names in (
        (pangu.hidden_size, heads, "num_attention_heads = {} does not divide hidden_size = {}"),
        (heads, groups, "num_key_value_heads = {} does not divide num_attention_heads = {}"),
    ):
        if whole % part:
            raise BitatlasError(f"{where}: config.json: {names.format(part, whole)}; copy the checkpoint again")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=pangu.vocab_size,
        hidden_size=pangu.hidden_size,
        intermediate_size=pangu.intermediate_size,
        num_hidden_layers=pangu.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=pangu.hidden_size // heads,
        hidden_act=pangu.hidden_act,
        max_position_embeddings=pangu.max_position_embeddings,
        rms_norm_eps=pangu.rms_norm_eps,
        rope_theta=pangu.rope_theta,
        attention_bias=pangu.bias,
        mlp_bias=False,
        attention_dropout=pangu.attention_dropout,
        tie_word_embeddings=pangu.tie_word_embeddings,
        bos_token_id=pangu.bos_token_id,
        eos_token_id=pangu.eos_token_id,
        pad_token_id=pangu.pad_token_id,
        dtype=pangu.torch_dtype,
    )


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"config.json lacks {field}, and openPangu's fields have no defaults here; copy the published file"
    if first["type"] == "extra_forbidden":
        return (
            f"config.json has {field} = {first['input']!r}, which the mapping of openPangu to Llama does not know: "
            "what it changes would be ignored"
        )
    return f"config.json: {field} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def check_tokenizer_files(directory: Path, where: str) -> None:
    """Raise unless openPangu's vocabulary is there.

    Raises:
        BitatlasError: tokenizer.model is missing or empty, or the pointer of a large file that was never fetched.
    """
    path = directory / "tokenizer.model"
    if not path.exists():
        raise BitatlasError(f"{where}: tokenizer.model is missing; copy the checkpoint again")
    with path.open("rb") as file:
        start = file.read(7)
    if not start:
        raise BitatlasError(f"{where}: tokenizer.model is empty; copy the checkpoint again")
    if start == b"version":
        raise BitatlasError(f"{where}: tokenizer.model is a Git LFS pointer, not the vocabulary; fetch it")
