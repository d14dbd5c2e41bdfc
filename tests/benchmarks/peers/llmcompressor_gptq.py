"""Run llm-compressor's GPTQ on given token windows, in the peer's own environment on the CPU.

    .venv-bench/bin/python tests/benchmarks/peers/llmcompressor_gptq.py \
        --model DIR --tokens tokens.npy --out DIR

`--model` is a safetensors checkpoint; no tokenizer is needed. `--out` receives a dense checkpoint that holds
the quantized values and loads as the model that was given, and last `result.json`. Whatever has no flag here is
llm-compressor's default. This file imports nothing of Bitatlas.
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

from process_memory import peak_rss_bytes

if TYPE_CHECKING:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import PreTrainedModel

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def main() -> None:
    started_seconds = time.perf_counter()
    args = parse_args()
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
    gptq = make_gptq(args.bits, args.group_size)

    loaded_seconds, loaded_cpu_seconds = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        recipe=[gptq],
        dataset=DataLoader([{"input_ids": window_T} for window_T in tokens_NT], batch_size=1),
        processor=object(),  # there is no text to tokenize; None would make it look for a tokenizer on disk
    )
    quantized_seconds, quantized_cpu_seconds = time.perf_counter(), time.process_time()
    peak_bytes = peak_rss_bytes()

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
        "settings": resolved_settings(model, gptq),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llm-compressor's GPTQ on given token windows")
    parser.add_argument("--model", type=Path, required=True, help="safetensors checkpoint directory")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 .npy of shape [windows, tokens]")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_gptq(bits: int, group_size: int) -> GPTQModifier:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])


def save_dense(model: PreTrainedModel, names: list[str], source: Path, out: Path) -> None:
    """Write the quantized values under the names of the source checkpoint, with its config."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    out.mkdir(parents=True, exist_ok=True)
    weights = {name: model.get_parameter(name).detach().contiguous() for name in names}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(source)  # the model's own now says that it is quantized
    config.dtype = model.dtype
    config.save_pretrained(out)


def resolved_settings(model: PreTrainedModel, gptq: GPTQModifier) -> dict[str, object]:
    """What llm-compressor used, defaults included, so that the other side can be set to the same."""
    linears = [m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    return {
        "num_linears": len(linears),
        "weights": linears[0].quantization_scheme.weights.model_dump(mode="json"),
        "scale_dtype": str(linears[0].weight_scale.dtype).removeprefix("torch."),
        "block_size": gptq.block_size,
        "dampening_frac": gptq.dampening_frac,
        # Where the Hessian could not be factorized it rounds to nearest with a warning: that is not GPTQ.
        "rtn_fallbacks": gptq._rtn_fallback_module_names,
    }


if __name__ == "__main__":
    main()
