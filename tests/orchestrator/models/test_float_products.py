"""Products of 16-bit tensors where the processor has none."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional

from orchestrator.models import float_products
from orchestrator.models.float_products import FloatProducts, fast_products, lacks_narrow_products


def pair(dtype, shape=(2, 3, 40, 64)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


PRODUCTS = {
    "linear": lambda a, b: functional.linear(a[0, 0], b[0, 0], b[0, 0, :, 0]),
    "matmul": lambda a, b: torch.matmul(a, b.mT),
    "method": lambda a, b: a.matmul(b.mT),
    "operator": lambda a, b: a @ b.mT,
    "bmm": lambda a, b: torch.bmm(a[0], b[0].mT),
    "mm": lambda a, b: torch.mm(a[0, 0], b[0, 0].mT),
    "attention": lambda a, b: functional.scaled_dot_product_attention(a, b, b, is_causal=True),
    "attention with a mask": lambda a, b: functional.scaled_dot_product_attention(a, b, b, attn_mask=b[..., :40]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_those_of_float32_rounded_once(product, dtype):
    a, b = pair(dtype)
    with FloatProducts():
        found = product(a, b)
    assert found.dtype == dtype
    assert torch.equal(found, product(a.float(), b.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_alone(dtype):
    a, b = pair(dtype)
    with FloatProducts():
        assert torch.equal(a @ b.mT, torch.matmul(a, b.mT))
        assert (a @ b.mT).dtype == dtype


def test_a_model_computes_what_it_did():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().bfloat16()
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        plain = model(tokens).logits
        with FloatProducts():
            found = model(tokens).logits
        exact = model.float()(tokens).logits
    off = (plain.float() - exact).norm()
    assert (found.float() - exact).norm() < 1.5 * off


def test_only_processors_without_them():
    assert lacks_narrow_products({"architecture": "x86_64", "avx2": True})
    assert lacks_narrow_products({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False})
    assert not lacks_narrow_products({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True})
    assert not lacks_narrow_products({"architecture": "aarch64"})


def test_what_torch_says_of_this_processor():
    capabilities = torch.cpu.get_capabilities()
    assert capabilities["architecture"]
    assert capabilities["architecture"] != "x86_64" or "avx512_bf16" in capabilities


@pytest.mark.parametrize(
    ("device", "lacks", "kind"),
    [
        ("cpu", True, FloatProducts),
        ("cpu", False, nullcontext),
        ("cuda:0", True, nullcontext),
        ("npu:0", True, nullcontext),
    ],
)
def test_by_device(monkeypatch, device, lacks, kind):
    monkeypatch.setattr(float_products, "lacks_narrow_products", lambda *_: lacks)
    assert isinstance(fast_products(device), kind)
