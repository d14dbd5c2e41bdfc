"""Run llm-compressor's AWQ on given token windows, in the peer's own environment on the CPU.

    .venv-bench/bin/python tests/benchmarks/peers/llmcompressor_awq.py \
        --model DIR --tokens tokens.npy --out DIR

Weights only, asymmetric, in groups. `--out` receives a dense checkpoint that holds the quantized values and loads as
the model that was given (the scales went into norms and weights), and last `result.json`. Whatever has no flag here
is llm-compressor's default.

llm-compressor 0.14.0.1 cannot run AWQ without an accelerator: it pins cached activations, which torch refuses then.
Pinning is left out here (it speeds copies to an accelerator and changes no number); `settings.patches` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompressor_common import parser, run

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier


def main() -> None:
    flags = parser("llm-compressor's AWQ on given token windows")
    flags.add_argument("--bits", type=int, default=4)
    flags.add_argument("--group-size", type=int, default=64)
    args = flags.parse_args()
    run(args, lambda: make_recipe(args.bits, args.group_size), settings)


def leave_out_pinning() -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_, **__: None


def make_recipe(bits: int, group_size: int) -> list[Modifier]:
    leave_out_pinning()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return [AWQModifier(), QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])]


def settings(recipe: list[Modifier]) -> dict[str, object]:
    awq = recipe[0]
    return {
        "patches": ["IntermediatesCache.pin_memory does nothing"],
        "duo_scaling": awq.duo_scaling,
        "n_grid": awq.n_grid,
        # As matched by name; v_proj -> o_proj is skipped where their shapes differ (grouped-query attention).
        "mappings": [[mapping.smooth_layer, list(mapping.balance_layers)] for mapping in awq.mappings],
    }


if __name__ == "__main__":
    main()
