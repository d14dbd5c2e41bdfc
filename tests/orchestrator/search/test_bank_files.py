"""A bank on disk: each linear as it acts in the float model, whatever its own artifact rescaled."""

from pathlib import Path

import pytest
import torch

from evaluators.corpora import Corpus, calibration_windows
from orchestrator.artifacts import ArtifactWriter
from orchestrator.errors import DamagedFileError
from orchestrator.models.loading import load_model, load_tokenizer
from orchestrator.scheme import parse_scheme
from orchestrator.search.bank_files import variants_of
from quantizers.apply import installed
from quantizers.bank import Bank
from quantizers.block_source import InMemory
from quantizers.stream import quantize_blocks

TINY = Path(__file__).parents[2] / "assets" / "openpangu-tiny"


@pytest.fixture(scope="module")
def windows():
    found = calibration_windows(Corpus(name="lambada"), load_tokenizer(TINY), samples=4, sequence_length=64, seed=0)
    return torch.tensor(found)


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return load_model(TINY).float()


def stored(model, windows, directory, **entry):
    scheme = parse_scheme({"weight_bits": 3, "group_size": 64} | entry, "bank")
    writer = ArtifactWriter(directory)
    for block in quantize_blocks(InMemory(model), scheme.build(), windows):
        writer.add_block(block)
    return writer.finish(cell="bank")


@torch.inference_mode()
def logits_of(model, windows):
    return model(input_ids=windows).logits


def test_awqs_linears_compute_in_the_float_model_what_they_do_in_its_own(model, windows, tmp_path):
    """All of them at once, so that nothing but rounding may differ: its scales, biases and norms are accounted for."""
    artifact = stored(model, windows, tmp_path / "artifact", method="awq")
    kinds = {tuple(facts["rescaled"]) for facts in artifact.manifest["linears"].values()}
    assert ("input_scale_I", "output_scale_O") in kinds  # up: of its norm, and for down
    before = logits_of(model, windows)
    with installed(model, artifact.blocks()):
        expected = logits_of(model, windows)
    bank = Bank(model, variants_of({(3, 64): str(artifact.directory)}))
    bank.apply(dict.fromkeys(artifact.manifest["linears"], (3, 64)))
    found = logits_of(model, windows)
    assert (expected - before).norm() > 0.05 * before.norm()
    assert (found - expected).norm() < 1e-4 * expected.norm()
    bank.apply({})
    assert torch.equal(logits_of(model, windows), before)


def test_a_linear_that_nothing_rescaled_is_as_it_lies_there(model, windows, tmp_path):
    artifact = stored(model, windows, tmp_path / "artifact", method="rtn")
    name, facts = next(iter(artifact.manifest["linears"].items()))
    assert facts["rescaled"] == []
    (block,) = (block for block in artifact.blocks() if any(one.name == name for one in block.linears))
    (linear,) = (one for one in block.linears if one.name == name)
    variant = variants_of({(3, 64): str(artifact.directory)})[name][3, 64]
    assert torch.equal(variant().decode(), linear.weight.decode())


def test_an_artifact_that_was_changed_is_set_aside(model, windows, tmp_path):
    artifact = stored(model, windows, tmp_path / "artifacts" / "key" / "artifact", method="rtn")
    file = artifact.directory / next(iter(artifact.manifest["files"]))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="was changed after it was written; run the same command again"):
        variants_of({(3, 64): str(artifact.directory)})
    assert not artifact.directory.exists()
