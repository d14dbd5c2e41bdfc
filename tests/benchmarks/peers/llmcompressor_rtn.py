"""Run llm-compressor's round-to-nearest, in the peer's own environment on the CPU.

    .venv-bench/bin/python tests/benchmarks/peers/llmcompressor_rtn.py \
        --model DIR --tokens tokens.npy --out DIR

Weights only, asymmetric, in groups. The tokens are not looked at: llm-compressor itself sees that the recipe needs no
data. `--out` receives a dense checkpoint with the quantized values, and last `result.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompressor_common import parser, run

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier


def main() -> None:
    flags = parser("llm-compressor's round-to-nearest")
    flags.add_argument("--bits", type=int, default=4)
    flags.add_argument("--group-size", type=int, default=64)
    args = flags.parse_args()
    run(args, lambda: make_recipe(args.bits, args.group_size), lambda _: {})


def make_recipe(bits: int, group_size: int) -> list[Modifier]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return [QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])]


if __name__ == "__main__":
    main()
