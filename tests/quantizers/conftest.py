"""Tiny random models of every family, and inputs with correlated channels; everything on one thread."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("quantizers", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("quantizers")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # times the heads is not the hidden size, so a mix-up shows
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
}

# Per case: the configuration class and what makes it awkward. Attention windows are shorter than the 24 tokens here.
MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama without groups": ("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"attention_bias": True}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_implementation": "eager"}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def build(case, **overrides):
    import transformers

    name, extra = MODELS[case]
    options = _SHAPE | extra | overrides
    if name == "Qwen2Config":  # has no head_dim field of its own in every release
        options["head_dim"] = options["hidden_size"] // options["num_attention_heads"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at 1 or 0 and biases at 0: move them all
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def make_model():
    """Build a tiny model of a case of `MODELS`."""
    return build


@pytest.fixture(params=MODELS)
def any_model(request):
    """A tiny model of every family, with biases and grouped queries."""
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def windows():
    """Calibration tokens: 6 windows of 24."""
    return torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(1))


def correlated(seed, rows, columns, tokens=None, dead=()):
    """A weight and the Hessian of inputs whose channels differ in size and depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    sizes = torch.exp(0.7 * torch.randn(columns, generator=generator))
    mixing = torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens or 3 * columns, columns, generator=generator) @ mixing * sizes
    inputs[:, list(dead)] = 0.0
    hessian = 2 / 8 * inputs.double().T @ inputs.double()
    hessian = (hessian + hessian.T) / 2
    return weight, hessian.float()


@pytest.fixture
def make_problem():
    """(seed, rows, columns, tokens, dead) -> weight and Hessian of a linear with correlated inputs."""
    return correlated


def logits(model, windows):
    with torch.no_grad():
        return model(windows).logits


def distance(model, windows, method):
    """Mean squared change of a model's logits when it is quantized."""
    from quantizers.apply import installed
    from quantizers.block_source import InMemory
    from quantizers.stream import quantize_blocks

    expected = logits(model, windows)
    with installed(model, list(quantize_blocks(InMemory(model), method, windows))):
        return (logits(model, windows) - expected).square().mean().item()
