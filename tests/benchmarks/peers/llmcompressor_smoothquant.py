"""Run llm-compressor's SmoothQuant on given token windows, in the peer's own environment on the CPU.

    .venv-bench/bin/python tests/benchmarks/peers/llmcompressor_smoothquant.py \
        --model DIR --tokens tokens.npy --held-out held_out.npy --out DIR

Then W8A8, its preset, or that with fewer bits for the weights: rounded to nearest, symmetric, per output channel;
activations symmetric, per token, dynamic. `--out` receives a dense checkpoint with the smoothed and quantized weights,
and last `result.json`. The checkpoint does not quantize activations; the `perplexity` in `result.json` is of the model
that does. Whatever has no flag here is llm-compressor's default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompressor_common import parser, run

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier


def main() -> None:
    flags = parser("llm-compressor's SmoothQuant, then W8A8, on given token windows")
    flags.add_argument("--alpha", type=float, default=0.5, help="smoothing strength")
    flags.add_argument("--bits", type=int, default=8, help="of the weights")
    args = flags.parse_args()
    run(args, lambda: make_recipe(args.alpha, args.bits), settings)


def make_recipe(alpha: float, bits: int) -> list[Modifier]:
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SmoothQuantModifier

    scheme: QuantizationScheme = preset_name_to_scheme("W8A8", ["Linear"])
    scheme.weights.num_bits = bits
    return [
        SmoothQuantModifier(smoothing_strength=alpha),
        QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
    ]


def settings(recipe: list[Modifier]) -> dict[str, object]:
    smooth = recipe[0]
    return {
        "smoothing_strength": smooth.smoothing_strength,
        "mappings": [[layer, list(balanced)] for balanced, layer in smooth.mappings],
    }


if __name__ == "__main__":
    main()
