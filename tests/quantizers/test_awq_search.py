"""AWQ's search: each place's ratio against the losses of all candidates, from explicit float64 forwards of a block."""

import pytest
import torch

from quantizers.awq import Awq
from quantizers.block_source import InMemory
from quantizers.grid import Grid
from quantizers.stream import quantize_blocks
from tests.outliers import make_outliers
from tests.quantizers.conftest import build
from tests.reference import llama_block
from tests.reference import rescaling as reference

BITS, GROUP_SIZE = 3, 16
ROPE_THETA = 10000.0  # LlamaConfig's default


class Float64Search:
    """The losses of every candidate at the four places of a model's first block."""

    def __init__(self, model, windows, *, options):
        config, block = model.config, model.model.layers[0]
        self.options = options
        self.every = len(windows) // (options.search_windows or len(windows))
        self.attention, self.mlp = llama_block.linears_of(block.self_attn), llama_block.linears_of(block.mlp)
        self.shape = {
            "heads": config.num_attention_heads,
            "groups": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "theta": ROPE_THETA,
        }
        hidden = model.model.embed_tokens.weight.detach().double()[windows]
        norms = [norm.weight.detach().double() for norm in (block.input_layernorm, block.post_attention_layernorm)]
        self.attention_inputs = llama_block.rms_norm(hidden, norms[0], config.rms_norm_eps)
        self.mixed = llama_block.mixed(self.attention, self.attention_inputs, **self.shape)
        hidden = hidden + llama_block.apply(self.attention["o_proj"], self.mixed)
        self.mlp_inputs = llama_block.rms_norm(hidden, norms[1], config.rms_norm_eps)
        self.gated = llama_block.gated(self.mlp, self.mlp_inputs)
        self.output = hidden + llama_block.apply(self.mlp["down_proj"], self.gated)

    def scales(self, inputs):
        means = inputs.abs().reshape(-1, inputs.shape[-1]).mean(0).tolist()
        return [reference.awq_scale(means, step / self.options.num_ratios) for step in range(self.options.num_ratios)]

    def rounded(self, linears, names, scale):
        def one(weight):
            grid = self.options.grid
            values = reference.rounded(weight.tolist(), scale, grid.bits, grid.group_size, grid.convention)
            return torch.tensor(values, dtype=torch.float64)

        return linears | {name: (one(linears[name][0]), linears[name][1]) for name in names}

    def losses(self, linears, names, inputs, run):
        """Of each candidate: the squared change of what `run` makes of the judged windows."""
        judged = inputs[:: self.every]
        expected = run(linears, judged)
        return [
            (run(self.rounded(linears, names, scale), judged) - expected).square().sum().item()
            for scale in self.scales(inputs)
        ]

    def attention_losses(self):
        def run(linears, inputs):
            return llama_block.apply(linears["o_proj"], llama_block.mixed(linears, inputs, **self.shape))

        return self.losses(self.attention, ("q_proj", "k_proj", "v_proj"), self.attention_inputs, run)

    def mlp_losses(self):
        def run(linears, inputs):
            return llama_block.apply(linears["down_proj"], llama_block.gated(linears, inputs))

        return self.losses(self.mlp, ("gate_proj", "up_proj"), self.mlp_inputs, run)

    def linear_losses(self, linears, name, inputs):
        return self.losses(linears, (name,), inputs, lambda given, judged: llama_block.apply(given[name], judged))


def make(case, convention, search_windows):
    model = build(case, num_hidden_layers=1)
    make_outliers(model, channels=4, factor=20.0)
    grid = Grid(bits=BITS, group_size=GROUP_SIZE, convention=convention, scale_dtype="float32")
    return model, Awq(grid=grid, clip=False, search_windows=search_windows)


def chosen(scale, candidates):
    """Which candidate the search took, from what it did to the block's weights."""
    distances = [(scale.double() / torch.tensor(candidate) - 1).abs().max().item() for candidate in candidates]
    nearest = min(range(len(distances)), key=distances.__getitem__)
    assert distances[nearest] < 1e-4 < sorted(distances)[1]
    return nearest


def check(scale, candidates, losses, place):
    index = chosen(scale, candidates)
    assert losses[index] <= min(losses) * (1 + 1e-3), place
    assert sorted(losses)[len(losses) // 2] > min(losses) * (1 + 5e-3), f"{place}: nearly all candidates would do"


@pytest.mark.parametrize("case", ["llama", "llama with biases", "llama without groups"])
def test_the_float64_forward_is_the_model_s(windows, case):
    model, options = make(case, "gptq-asym", 0)
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model.double()(windows)
    found = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    expected = Float64Search(model, windows, options=options).output
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # rotations are computed in float32


@pytest.mark.parametrize(
    ("case", "convention", "search_windows"),
    [
        ("llama", "gptq-asym", 3),
        ("llama with biases", "awq-asym", 0),
        ("llama without groups", "sq-sym", 0),
        ("llama without groups", "awq-asym", 3),
    ],
)
def test_every_ratio_is_the_best_by_a_float64_forward(windows, case, convention, search_windows):
    """With search_windows = 3 of six, all are judged on every second window; mean magnitudes are always of all."""
    model, options = make(case, convention, search_windows)
    kept = []

    class Watched(Awq):
        def transform(self, block):
            kept.append(super().transform(block))
            return kept[-1]

    list(quantize_blocks(InMemory(model), Watched(**vars(options)), windows))
    scales = kept[0].input_scales
    search = Float64Search(model, windows, options=options)
    assert search.every == (2 if search_windows else 1)
    check(scales["self_attn.q_proj"], search.scales(search.attention_inputs), search.attention_losses(), "q, k, v")
    check(scales["mlp.gate_proj"], search.scales(search.mlp_inputs), search.mlp_losses(), "gate, up")
    losses = search.linear_losses(search.mlp, "down_proj", search.gated)
    check(scales["mlp.down_proj"], search.scales(search.gated), losses, "down")
    assert ("self_attn.o_proj" in scales) == (case == "llama without groups")
    if case == "llama without groups":
        losses = search.linear_losses(search.attention, "o_proj", search.mixed)
        check(scales["self_attn.o_proj"], search.scales(search.mixed), losses, "o")
