"""Cells that quantize embedding and head too, or leave linears alone: from the sweep file to an exported checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cluster.pool import InlinePool
from evaluators.perplexity import perplexity
from orchestrator.artifacts import find_artifact
from orchestrator.errors import BitatlasError
from orchestrator.export.dense import export_dense
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.models.float_products import fast_products
from orchestrator.models.loading import load_model
from orchestrator.plan import make_plan
from orchestrator.plan_view import sizes_of
from orchestrator.schema import LAYERS, RESULTS
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView

GROUPS = {"weight_bits": 4, "group_size": 32}
GRIDS = {
    "tied": [
        {"method": "rtn", "weight_bits": 4, "group_size": 32},
        {"method": "rtn", "weight_bits": 4, "group_size": 32, "embedding": 8},
    ],
    "untied": [
        {
            "method": "rtn",
            "weight_bits": 4,
            "group_size": 32,
            "embedding": {"weight_bits": 4, "group_size": 64},
            "head": 6,
        },
    ],
    # A whole block and some of the other one.
    "untied, some left alone": [
        {
            "method": "rtn",
            "weight_bits": 4,
            "group_size": 32,
            "head": 8,
            "layers": {"model.layers.0.*": 16, "*.down_proj": 16},
        },
    ],
}
EVALUATION = {"perplexity": [{"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 2}]}


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, make_checkpoint, tmp_path_factory, packaged_gguf):
    untied = make_checkpoint(tmp_path_factory.mktemp("untied") / "untied", vocab_size=49152, tie_word_embeddings=False)
    AutoTokenizer.from_pretrained(packaged_gguf.parent, gguf_file=packaged_gguf.name).save_pretrained(untied)
    return {"tied": tiny_checkpoint, "untied": untied}


@pytest.fixture
def swept(request, checkpoints, make_sweep, tmp_path, monkeypatch):
    """The inputs, the plan and the output of a finished sweep."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep = make_sweep(
        models=[{"name": "tiny", "source": str(checkpoints[request.param.partition(",")[0]])}],
        grid=GRIDS[request.param],
        evaluation=EVALUATION,
        calibration=None,
    )
    inputs = prepare(sweep, "study.yaml")
    layout, plan = Layout(tmp_path / "out"), make_plan(sweep, inputs.identities)
    with Store(layout) as store:
        pool = InlinePool("orchestrator.worker:Worker")
        driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool)
        assert driver.run(QuietView()).failed == 0
    return inputs, plan, layout


@pytest.mark.parametrize("swept", GRIDS, indirect=True)
def test_what_is_evaluated_is_what_is_stored_counted_and_exported(swept, tmp_path):
    inputs, plan, layout = swept
    cell = plan.cells[-1]
    model, matrices = load_model(inputs.models["tiny"].directory), inputs.models["tiny"].shape.matrices
    artifact = find_artifact(layout.artifact(cell.key))
    decoded = {}
    for block in artifact.blocks():
        decoded |= {linear.name: linear.weight.decode() for linear in [*block.linears, *block.vocabulary]}
    roles = cell.scheme.vocabulary()
    assert {matrices[role].name for role in roles} == set(artifact.manifest["vocabulary"])
    state = model.state_dict()
    for name, weight in decoded.items():
        state[f"{name}.weight"].copy_(weight)

    rows = [row for row in read_table(layout.root, RESULTS).to_pylist() if row["cell_id"] == cell.id]
    (windows,) = inputs.windows.values()
    with fast_products("cpu"):  # as in a worker: processors without bfloat16 round otherwise outside it
        expected = perplexity(model, windows).perplexity
    assert rows[0]["value"] == pytest.approx(expected, rel=1e-6)

    exported = tmp_path / "exported"
    export_dense(layout, cell.id, exported)
    again = load_model(exported)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())

    stored = sum(
        tensor.nbytes for file in artifact.directory.glob("*.safetensors") for tensor in load_file(file).values()
    )
    parameters = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}  # tied ones once
    untouched = sum(
        parameter.nbytes for name, parameter in parameters.values() if name.removesuffix(".weight") not in decoded
    )
    assert rows[0]["checkpoint_bytes"] == stored + untouched == sizes_of(cell, inputs)["checkpoint_bytes"]
    layers = {row["layer"]: row for row in read_table(layout.root, LAYERS).to_pylist() if row["cell_id"] == cell.id}
    assert set(layers) == set(decoded)
    linears = inputs.models["tiny"].shape.linears
    alone = set(linears) - set(decoded)
    assert alone == {name for name in linears if cell.scheme.build().leaves_alone(name)}
    bits = 8 * sum(layers[name]["stored_bytes"] for name in set(linears) - alone)
    bits += 16 * sum(out * into for out, into in (linears[name] for name in alone))
    weights = sum(out * into for out, into in linears.values())
    assert rows[0]["decoder_bits_per_weight"] == bits / weights
    assert ("layers" in json.loads(rows[0]["options"])) == bool(alone)
    for role, grid in roles.items():
        assert 1 < layers[matrices[role].name]["weight_error"] * 4.0**grid.bits < 3  # (range / sigma)^2 / 12
        assert json.loads(rows[0]["options"])[role]["weight_bits"] == grid.bits


@pytest.mark.parametrize("swept", ["tied"], indirect=True)
def test_a_cell_that_leaves_them_alone_is_what_it_was(swept):
    inputs, plan, layout = swept
    plain, more = plan.cells[1:]
    assert "embedding" not in plain.scheme.as_entry()
    assert "vocabulary" not in find_artifact(layout.artifact(plain.key)).manifest
    assert more.id.startswith("tiny.rtn-w4-g32-e8.")
    (embedding,) = inputs.models["tiny"].shape.matrices.values()
    saved = sizes_of(plain, inputs)["checkpoint_bytes"] - sizes_of(more, inputs)["checkpoint_bytes"]
    words, width = embedding.shape
    # From bfloat16 to a byte per weight, with a float16 scale and a byte of zero per 32 of them.
    assert saved == words * (2 * width - (width + (width // 32) * 3))


def test_the_head_of_a_tied_model_is_refused(make_sweep, checkpoints):
    sweep = make_sweep(
        models=[{"name": "tied", "source": str(checkpoints["tied"])}],
        grid=[{"method": "rtn", "weight_bits": 4, "group_size": 32, "head": 8}],
        evaluation=EVALUATION,
        calibration=None,
    )
    with pytest.raises(BitatlasError, match=r"rtn-w4-g32-h8: head: the head of tied is its embedding \(tied weights\)"):
        prepare(sweep, "study.yaml")
