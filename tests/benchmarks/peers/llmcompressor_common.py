"""What llm-compressor's AWQ and SmoothQuant runs share; run by the peer's own Python, imports nothing of Bitatlas.

Unlike GPTQ, these leave float weights in the model and quantize them as they are used. So the model is first
evaluated as it stands (weights and, where the scheme has them, activations quantized by llm-compressor itself), and
then its weights are replaced by what they stand for and written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompressor_gptq import PACKAGES, save_dense
from process_memory import peak_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from llmcompressor.modifiers import Modifier
    from transformers import PreTrainedModel


def run(
    args: argparse.Namespace,
    make_recipe: Callable[[], list[Modifier]],
    settings: Callable[[list[Modifier]], dict[str, object]],
) -> None:
    """Quantize, evaluate, write the dense checkpoint and last `result.json`.

    Args:
        args: of `parser`.
        make_recipe: llm-compressor's modifiers, in order; called once its packages may be imported.
        settings: what the modifiers used, defaults included.
    """
    started_seconds = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the imports: llm-compressor moves to a GPU by itself

    import numpy as np
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    names = [name for name, _ in model.named_parameters()]  # a tied head is listed once, as in the file
    tokens_NT = torch.from_numpy(np.load(args.tokens))
    recipe = make_recipe()

    loaded_seconds, loaded_cpu_seconds = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        recipe=recipe,
        dataset=DataLoader([{"input_ids": window_T} for window_T in tokens_NT], batch_size=1),
        processor=object(),  # there is no text to tokenize; None would make it look for a tokenizer on disk
    )
    quantized_seconds, quantized_cpu_seconds = time.perf_counter(), time.process_time()
    peak_bytes = peak_rss_bytes()

    linears = quantized_linears(model)
    measured = perplexity(model, torch.from_numpy(np.load(args.held_out))) if args.held_out else None
    weights_in_place(linears)
    save_dense(model, names, args.model, args.out)
    result = {
        "quantization_seconds": quantized_seconds - loaded_seconds,
        "quantization_cpu_seconds": quantized_cpu_seconds - loaded_cpu_seconds,
        "total_seconds": time.perf_counter() - started_seconds,
        "peak_rss_bytes": peak_bytes,
        "num_windows": tokens_NT.shape[0],
        "window_tokens": tokens_NT.shape[1],
        "threads": args.threads,
        "dtype": args.dtype,
        "settings": scheme_settings(linears) | settings(recipe),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    if measured is not None:
        result["perplexity"] = measured
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that all of them have."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--model", type=Path, required=True, help="safetensors checkpoint directory")
    flags.add_argument("--tokens", type=Path, required=True, help="int64 .npy of shape [windows, tokens]")
    flags.add_argument("--out", type=Path, required=True, help="directory to write")
    flags.add_argument("--held-out", type=Path, help="int64 .npy as well: measure perplexity on it, as quantized")
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    flags.add_argument("--threads", type=int, default=1)
    return flags


def quantized_linears(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that llm-compressor quantizes as they are used."""
    found = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    if not found or not all(module.quantization_enabled for module in found):
        raise SystemExit("llm-compressor left no quantized linears: nothing to compare with")
    return found


def perplexity(model: PreTrainedModel, windows_WT: torch.Tensor) -> float:
    """exp of the mean over windows of the mean cross-entropy of T - 1 tokens; float32 loss, float64 means."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    with torch.no_grad():
        nlls = [
            cross_entropy(
                model(input_ids=window_T[None], use_cache=False).logits[0, :-1].float(), window_T[1:], reduction="none"
            )
            .double()
            .mean()
            for window_T in windows_WT
        ]
    return torch.stack(nlls).mean().exp().item()


def weights_in_place(linears: list[torch.nn.Module]) -> None:
    """Replace each weight by the values that it is quantized to."""
    import torch
    from compressed_tensors.quantization import forward_quantize

    with torch.no_grad():
        for module in linears:
            weight_OI = forward_quantize(module, module.weight.data, "weight", module.quantization_scheme.weights)
            module.weight.data = weight_OI.to(module.weight.dtype)


def scheme_settings(linears: list[torch.nn.Module]) -> dict[str, object]:
    """How weights and activations were quantized, defaults included."""
    scheme = linears[0].quantization_scheme
    activations = scheme.input_activations
    return {
        "num_linears": len(linears),
        "weights": scheme.weights.model_dump(mode="json"),
        "input_activations": activations and activations.model_dump(mode="json"),
        "scale_dtype": str(linears[0].weight_scale.dtype).removeprefix("torch."),
    }
