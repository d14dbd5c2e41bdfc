"""Memory and disk of a plan, against sums by hand."""

import pytest

from evaluators.head import CHUNK_BYTES
from orchestrator.footprint import PROCESS_BYTES, decoder_bytes, footprint, peaks
from orchestrator.inputs import Inputs
from orchestrator.outline import outline
from orchestrator.plan import make_plan

GIGA = 1e9
# openPangu-Embedded-1B: 26 blocks; hidden 1536, intermediate 6144.
DECODER = 26 * (2 * 1536**2 + 2 * 768 * 1536 + 3 * 6144 * 1536)
FP = 2 * 1_155_912_192
PASS = 2048 * (3 * 6144 + 4 * 1536) * 2
LOGITS = 3 * CHUNK_BYTES
LARGEST, STAGE = 6144 * 1536, 2 * 6144 * 1536


@pytest.fixture
def planned(make_sweep):
    def make(*grid):
        sweep = make_sweep(
            models=[{"name": "m", "source": "./models/openPangu-Embedded-1B"}],
            grid=list(grid),
            calibration={"corpus": "lambada", "samples": 4, "sequence_length": 512},
            evaluation={"perplexity": [{"corpus": "wikitext2", "sequence_length": 2048}]},
        )
        inputs = outline(sweep, "study.yaml")
        return make_plan(sweep, inputs.identities).jobs, inputs

    return make


RTN = {"method": "rtn", "weight_bits": [8, 4], "group_size": 128}
GPTQ = {"method": "gptq", "weight_bits": 4, "group_size": 128}


def by_label(jobs, inputs, kind):
    found = peaks(jobs, inputs, kind)
    return {job.label.removeprefix("m "): found[job.id] for job in jobs}


def test_evaluating_on_a_device(planned):
    found = by_label(*planned(RTN), "npu")
    assert found["fp: wikitext2"] == FP + PASS + LOGITS
    assert found["rtn-w4-g128: wikitext2"] == FP + 2 * DECODER + 8 * 4 * LARGEST + PASS + LOGITS


def test_quantizing_on_a_device(planned):
    found = by_label(*planned(RTN), "npu")
    work = 2 * DECODER / 26 + 8 * 4 * STAGE
    assert found["rtn-w8-g128: quantize"] == pytest.approx(FP + work)
    assert found["rtn-w4-g128: quantize"] == pytest.approx(FP + work + 2 * DECODER)  # beside what was evaluated before


def test_hessians_and_calibration(planned):
    tokens = 4 * 512
    streams, one_pass = tokens * (1536 + 6144) * 2, tokens * (3 * 6144 + 4 * 1536) * 2
    work = 2 * DECODER / 26 + 8 * 4 * STAGE + streams + one_pass
    hessians, on_host = 2 * 4 * 6144**2, 3 * 8 * 6144**2
    assert by_label(*planned(GPTQ), "npu")["gptq-w4-g128: quantize"] == pytest.approx(FP + work + hessians)
    on_cpu = by_label(*planned(GPTQ), "cpu")["gptq-w4-g128: quantize"]
    assert on_cpu == pytest.approx(PROCESS_BYTES + FP + work + hessians + on_host)
    needs = footprint(*planned(GPTQ), "npu")
    assert needs.host_bytes == pytest.approx(PROCESS_BYTES + on_host)
    blocked = planned(GPTQ | {"options": {"factorization": "device"}})
    assert footprint(*blocked, "npu").host_bytes == PROCESS_BYTES
    (quantizing,) = [value for label, value in by_label(*blocked, "npu").items() if label.endswith("quantize")]
    assert quantizing == pytest.approx(FP + work + hessians + 2 * 4 * 6144**2)


def test_the_sweep_needs_what_its_largest_job_needs(planned):
    jobs, inputs = planned(RTN, GPTQ)
    found = peaks(jobs, inputs, "cpu")
    needs = footprint(jobs, inputs, "cpu")
    assert needs.device_bytes is None
    assert needs.host_bytes == max(found.values())
    assert found[next(job.id for job in jobs if job.label == needs.largest_job)] == needs.host_bytes


def test_disk(planned):
    jobs, inputs = planned(RTN, {"method": "awq", "weight_bits": [4, 3], "group_size": 128})
    needs = footprint(jobs, inputs, "cpu")
    bits = (8 + 24 / 128) + 2 * (4 + 20 / 128) + (3 + 19 / 128)  # code, float16 scale, zero in as many bits as a code
    assert needs.artifact_bytes == pytest.approx(DECODER * bits / 8, rel=0.01)
    # Ranges of every stage's inputs, once for both of AWQ's cells: least, largest, mean.
    assert needs.cache_bytes == 26 * 3 * 4 * (3 * 1536 + 6144)
    assert footprint(*planned(RTN), "cpu").cache_bytes == 0


def test_shapes(model_input, make_identities, make_sweep):
    inputs = Inputs(models={"tiny": model_input}, identities=make_identities(make_sweep()))
    shape = inputs.models["tiny"].shape
    assert decoder_bytes(shape) == 2 * (64 * 64 + 128 * 64)
