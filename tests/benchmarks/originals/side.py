"""One side of a setting, in a process of its own: `original` or `ours`.

Writes `result.json` (perplexity, choices, and with an original our method in step with it) and `first.safetensors`,
the first block's weights as they act on the float model's inputs.
"""

import argparse
import json
from pathlib import Path

from tests.benchmarks.originals.layers import ALL_AT_ONCE, torch_windows
from tests.benchmarks.originals.settings import IN_STEP, SETTINGS

FLOAT32_SCALES = {"scale_dtype": "float32"}


def original(setting, args):
    import torch
    from transformers import AutoModelForCausalLM

    from orchestrator.scheme import parse_scheme
    from tests.benchmarks.originals import methods
    from tests.benchmarks.originals.in_step import InStep
    from tests.benchmarks.originals.releases import make_importable

    ours = InStep(parse_scheme(setting.scheme | FLOAT32_SCALES, "benchmark").build())
    watched = {"watch": ours.watch} if setting.function in IN_STEP else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, setting.dtype)).eval()
    make_importable(args.sources, setting.release)
    with torch.no_grad():
        weights, choices = getattr(methods, setting.function)(
            model, torch_windows(args.tokens)[: setting.windows], setting.blocks, **watched, **setting.given
        )
        return _perplexity(model, setting, args), weights, choices, ours.records


def ours(setting, args):
    """In the model's own dtype with float16 scales; or in float32 with float32 scales, the first block alone."""
    from itertools import islice

    import torch

    from orchestrator.models.float_products import fast_products
    from orchestrator.models.loading import load_model
    from orchestrator.scheme import parse_scheme
    from quantizers.block_source import InMemory
    from quantizers.rescaling import RestoredWeight
    from quantizers.stream import quantize_blocks
    from tests.benchmarks.ours import ours_installed

    model, scheme = load_model(args.model), dict(setting.scheme)
    if args.float32:
        model, scheme = model.float(), scheme | FLOAT32_SCALES
    windows = torch_windows(args.tokens)[: setting.windows]
    with fast_products("cpu"):
        made = quantize_blocks(InMemory(model), parse_scheme(scheme, "benchmark").build(), windows)
        blocks = list(islice(made, 1 if args.float32 else setting.blocks))
    weights = {}
    for linear in blocks[0].linears:
        restored = RestoredWeight(
            weight=linear.weight, input_scale_I=linear.input_scale_I, output_scale_O=linear.output_scale_O
        )
        weights[linear.name.removeprefix("model.layers.0.")] = restored.decode().contiguous()
    if args.float32:
        return None, weights, _choices(blocks), []
    with torch.inference_mode(), ours_installed(model, blocks):
        return _perplexity(model, setting, args), weights, _choices(blocks), []


def _perplexity(model, setting, args):
    from evaluators.perplexity import perplexity
    from orchestrator.models.float_products import fast_products

    if setting.blocks == 1:
        return None
    import numpy as np

    with fast_products("cpu"):
        return perplexity(model, np.load(args.held_out)).perplexity


def _choices(blocks):
    """Bits of groups or counts of salient columns, block by block in the order of the releases."""
    chosen = []
    for block in blocks:
        by_name = {linear.name.split(".", 3)[3]: linear.weight for linear in block.linears}
        for name in ALL_AT_ONCE[0]:
            weight = by_name[name]
            if hasattr(weight, "group_bits"):
                chosen.extend(int(bits) for bits in weight.group_bits)
            elif hasattr(weight, "blocks"):
                chosen.extend(int(each.salient_B.sum()) for each in weight.blocks)
    return chosen


def main():
    import torch
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.originals.side", description=__doc__)
    parser.add_argument("side", choices=("original", "ours"))
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="int64 .npy of shape [windows, tokens]")
    parser.add_argument("--held-out", type=Path, required=True, help="int64 .npy as well")
    parser.add_argument("--float32", action="store_true", help="ours: model and scales in float32, one block")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = {"original": original, "ours": ours}[args.side]
    perplexity, weights, choices, in_step = run(SETTINGS[args.setting], args)
    args.out.mkdir(parents=True)
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, args.out / "first.safetensors")
    (args.out / "result.json").write_text(
        json.dumps({"perplexity": perplexity, "choices": choices, "in_step": in_step})
    )


if __name__ == "__main__":
    main()
