"""Operations of jobs, against figures computed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from evaluators.slices import Slice
from evaluators.tasks import GROUPS, TASKS, generates
from orchestrator.config import TaskConfig
from orchestrator.models.loading import ModelShape
from orchestrator.scheme import parse_scheme
from orchestrator.work import (
    DECODING,
    ROUNDING,
    TASK_SIZES,
    forward_work,
    hessian_work,
    kind_of,
    num_blocks,
    quantize_work,
    rounding_passes,
    stage_inputs,
    statistics_work,
    task_size,
    task_work,
    works,
)

# Two blocks of hidden size 4 with grouped queries, intermediate size 8.
BLOCK = {
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (2, 4),
    "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4),
    "mlp.gate_proj": (8, 4),
    "mlp.up_proj": (8, 4),
    "mlp.down_proj": (4, 8),
}
WEIGHTS = 2 * (16 + 8 + 8 + 16 + 32 + 32 + 32)
SHAPE = ModelShape(
    linears={f"model.layers.{block}.{name}": size for block in range(2) for name, size in BLOCK.items()},
    fp_bytes=0,
    bits_per_value=16,
    max_positions=None,
    vocabulary=10,
)
ROUND_ALL = ROUNDING * WEIGHTS


def method(name, **fields):
    return parse_scheme({"method": name, "weight_bits": 4, "group_size": 4} | fields, "grid").build()


def test_shapes():
    assert num_blocks(SHAPE) == 2
    assert stage_inputs(SHAPE) == [4, 4, 4, 8, 4, 4, 4, 8]  # qkv, o, gate and up, down


def test_a_forward_pass():
    linears, attention, head = 2 * 288 * 15, 2 * 4 * 5 * 15 * 2, 2 * 4 * 10 * 15  # 3 sequences of 5 tokens
    assert WEIGHTS == 288
    assert forward_work(SHAPE, 3, 5, head=False) == linears + attention
    assert forward_work(SHAPE, 3, 5, head=True) == linears + attention + head


def test_hessians_and_statistics():
    hessians = 2 * (3 * 16 + 64) * 15
    assert hessian_work(SHAPE, 15) == hessians
    forward = forward_work(SHAPE, 3, 5, head=False)
    assert statistics_work(SHAPE, 3, 5, hessians=False) == forward
    assert statistics_work(SHAPE, 3, 5, hessians=True) == forward + hessians


CUBES = 2 * (3 * 64 + 512)
COLUMNS = 2 * ((4 + 2 + 2 + 4 + 8 + 8) * 16 + 4 * 64)


def test_methods():
    forward, hessians = forward_work(SHAPE, 3, 5, head=False), hessian_work(SHAPE, 15)
    assert quantize_work(SHAPE, method("rtn"), 0, 0) == ROUND_ALL
    gptq = forward + hessians + CUBES * 4 / 3 + COLUMNS + ROUND_ALL
    assert quantize_work(SHAPE, method("gptq"), 3, 5) == pytest.approx(gptq)
    at_once = method("gptq", options={"true_sequential": False})  # a second pass gives the quantized block's output
    assert quantize_work(SHAPE, at_once, 3, 5) == pytest.approx(gptq + forward)
    gptaq = 2 * forward + 3 * hessians + CUBES * (4 / 3 + 4) + 2 * COLUMNS + ROUND_ALL
    assert quantize_work(SHAPE, method("gptaq"), 3, 5) == pytest.approx(gptaq)
    # Of 9 windows, every fourth is searched on: 3 of them, 20 times and once before.
    awq = 21 * forward_work(SHAPE, 3, 5, head=False) + 31 * ROUND_ALL
    assert quantize_work(SHAPE, method("awq"), 9, 5) == pytest.approx(awq)
    assert quantize_work(SHAPE, method("smoothquant"), 9, 5) == ROUND_ALL


def test_what_runs_on_an_accelerator_s_host():
    on_device = method("gptq", options={"factorization": "device"})
    plain = quantize_work(SHAPE, method("gptq"), 3, 5)
    assert quantize_work(SHAPE, method("gptq"), 3, 5, host_cost=10.0) == pytest.approx(plain + 9 * CUBES * 4 / 3)
    assert quantize_work(SHAPE, on_device, 3, 5, host_cost=10.0) == pytest.approx(plain)
    assert quantize_work(SHAPE, method("rtn"), 0, 0, host_cost=10.0) == ROUND_ALL


def test_candidates():
    assert rounding_passes(method("rtn")) == 1
    assert rounding_passes(method("rtn", mse_search=True)) == 80
    assert rounding_passes(method("awq", options={"clip": False})) == 21
    assert rounding_passes(method("slim_llm", options={"search_steps": 10})) == 21
    binary = {"weight_bits": 1, "group_size": "per_channel"}
    assert rounding_passes(method("billm", options={"max_salient": 4}, **binary)) == 1 + 81 + 4


def test_tasks():
    arc = TASK_SIZES["arc_easy"]
    assert task_work(SHAPE, TaskConfig(name="arc_easy")) == forward_work(SHAPE, arc.documents, arc.tokens, head=False)
    assert task_work(SHAPE, TaskConfig(name="arc_easy", limit=7)) == forward_work(SHAPE, 7, arc.tokens, head=False)
    in_rows = task_work(SHAPE, TaskConfig(name="arc_easy", limit=7, rounding="hflm"))
    assert in_rows == 3 * task_work(SHAPE, TaskConfig(name="arc_easy", limit=7))
    shots = task_work(SHAPE, TaskConfig(name="arc_easy", limit=7, num_fewshot=2))
    assert shots == forward_work(SHAPE, 7, 3 * arc.tokens, head=False)
    gsm = TASK_SIZES["gsm8k_cot"]  # its eight examples are the same for all, and run once
    generated = forward_work(SHAPE, 4, gsm.tokens, head=False) + DECODING * forward_work(SHAPE, 4, 150, head=True)
    assert task_work(SHAPE, TaskConfig(name="gsm8k_cot", limit=4, num_fewshot=8)) == generated
    talk = TaskConfig(name="gsm8k_cot", limit=4, chat="default")
    assert task_work(SHAPE, talk) == generated
    assert task_work(SHAPE, talk.model_copy(update={"chat": "slow_think"})) > 2 * generated


def test_tasks_that_generate_are_counted_as_such():
    assert {name for name in TASKS if task_size(name).generated} == {name for name in TASKS if generates(name)}


def test_groups_and_tasks_that_are_not_known():
    mmlu = TASK_SIZES["mmlu"]
    assert task_work(SHAPE, TaskConfig(name="mmlu", limit=3)) == forward_work(SHAPE, 3 * 57, mmlu.tokens, head=False)
    assert task_size("mmlu_anatomy").documents == 247  # 14042 / 57, up
    assert task_size("something_else").documents == 1000


def test_every_task_has_a_size_of_its_own():
    assert set(TASK_SIZES) <= {*TASKS, *GROUPS}
    unknown = [name for name in (*TASKS, *GROUPS) if task_size(name) == task_size("something_else")]
    assert not unknown


def test_all_jobs_of_a_plan(make_sweep, plan_of, model_input):
    from dataclasses import replace

    sweep = make_sweep(
        grid=[
            {"method": "smoothquant", "weight_bits": [8, 4], "group_size": 4},
            {"method": "rtn", "weight_bits": 4, "group_size": 4},
        ]
    )
    (calibration,), (corpus,) = sweep.calibration, sweep.evaluation.perplexity
    inputs = SimpleNamespace(
        models={"tiny": SimpleNamespace(shape=SHAPE)},
        calibrations={("tiny", calibration.key): np.zeros((3, 5), np.int64)},
        windows={("tiny", corpus.key): np.zeros((6, 7), np.int64)},
    )
    jobs = plan_of(sweep).jobs
    found = works(jobs, inputs)
    by_label = {job.label: found[job.id] for job in jobs}
    forward = forward_work(SHAPE, 3, 5, head=False)
    perplexity = forward_work(SHAPE, 6, 7, head=True)
    assert set(found) == {job.id for job in jobs}
    # The first of two cells collects the statistics that both need.
    assert by_label["tiny smoothquant-w8-g4: quantize"] == ROUND_ALL + forward
    assert by_label["tiny smoothquant-w4-g4: quantize"] == ROUND_ALL
    assert by_label["tiny rtn-w4-g4: quantize"] == ROUND_ALL
    assert by_label["tiny fp: boolq-passages"] == perplexity
    assert by_label["tiny rtn-w4-g4: boolq-passages"] == perplexity + ROUND_ALL  # decoding
    assert {kind_of(job) for job in jobs} == {"perplexity", "task arc_easy", "quantize smoothquant", "quantize rtn"}

    whole = next(job for job in jobs if job.label == "tiny fp: arc_easy")
    part = replace(whole, id="part", slice=Slice(0, 4), whole_id=whole.id)
    assert works([part], inputs)["part"] == found[whole.id] / 4


def test_shapes_of_another_kind(model_input):
    assert num_blocks(model_input.shape) == 1
    assert stage_inputs(model_input.shape) == [64, 64]
