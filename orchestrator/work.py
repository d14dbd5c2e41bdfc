"""How much work a job is, from shapes alone: floating-point operations, a multiply-add counted as two. Pure.

A few terms each, the ones that profiles show. What they leave out (starts, loading, a device's habits) is the business
of the observed rates in `cost.py`. Letters: I in_features, O out_features, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import TYPE_CHECKING

from evaluators.chat import THINKING_TOKENS
from orchestrator.config import PerplexityConfig, TaskConfig
from orchestrator.execution import SIMULATED

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.models.loading import ModelShape
    from orchestrator.plan import Job
    from quantizers.method import Method

# Raise when the same job counts otherwise: what was observed per operation is then no longer comparable.
VERSION = 2
# Rounding one weight moves memory instead of multiplying; operations that a product would do in that time. From RTN,
# SliM-LLM and BiLLM of SmolLM2-135M on one core: 15 to 19 ns per weight and candidate.
ROUNDING = 400
# Text is generated token by token, with weights read again for each: how many prompt tokens one is worth in a batch.
DECODING = 8
# float64 on the host takes twice the time of float32: (1/3 + 1/3) I^3 for the factor and its inverse, twice.
_FACTORIZATION = 4 / 3
_MSE_STEPS = 80  # shrunk ranges that `mse_search` tries
_BILLM_SPLITS = 81


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """What a document of a task typically is; rough.

    Args:
        documents: in the scored split, over all subtasks.
        tokens: per document that are run once, shared contexts counted once, without examples.
        generated: tokens of an answer that is a text; 0 where choices are scored.
        subtasks: of a group; `limit` holds for each.
        shares_examples: its examples are the same for every document, so that they are run once per pack.
    """

    documents: int = 1000
    tokens: int = 150
    generated: int = 0
    subtasks: int = 1
    shares_examples: bool = False


_ROWS = 3.0  # what rows of their own take beside token trees: HFLM's time over ours is 1.6 to 6

TASK_SIZES: dict[str, TaskSize] = {
    "arc_challenge": TaskSize(documents=1172, tokens=70),
    "arc_easy": TaskSize(documents=2376, tokens=55),
    "boolq": TaskSize(documents=3270, tokens=140),
    "ceval-valid": TaskSize(documents=1346, tokens=90, subtasks=52, shares_examples=True),
    "cmmlu": TaskSize(documents=11582, tokens=80, subtasks=67, shares_examples=True),
    "commonsense_qa": TaskSize(documents=1221, tokens=60),
    "copa": TaskSize(documents=100, tokens=30),
    "gsm8k": TaskSize(documents=1319, tokens=70, generated=150),
    "gsm8k_cot": TaskSize(documents=1319, tokens=70, generated=150, shares_examples=True),
    "hellaswag": TaskSize(documents=10042, tokens=160),
    "humaneval": TaskSize(documents=164, tokens=150, generated=300),
    "ifeval": TaskSize(documents=541, tokens=60, generated=500),
    "mbpp": TaskSize(documents=500, tokens=120, generated=200, shares_examples=True),
    "minerva_math500": TaskSize(documents=500, tokens=120, generated=300, shares_examples=True),
    "mmlu": TaskSize(documents=14042, tokens=100, subtasks=57, shares_examples=True),
    "openbookqa": TaskSize(documents=500, tokens=40),
    "piqa": TaskSize(documents=1838, tokens=60),
    "race": TaskSize(documents=1045, tokens=400),
    "rte": TaskSize(documents=277, tokens=75),
    "sciq": TaskSize(documents=1000, tokens=120),
    "social_iqa": TaskSize(documents=1954, tokens=55),
    "truthfulqa_mc1": TaskSize(documents=817, tokens=250),
    "truthfulqa_mc2": TaskSize(documents=817, tokens=350),
    "winogrande": TaskSize(documents=1267, tokens=45),
}


def works(jobs: Iterable[Job], inputs: Inputs, *, host_cost: float = 1.0) -> dict[str, float]:
    """Job id -> floating-point operations.

    Args:
        jobs: all of a plan, in its order: of jobs that share statistics of the float model, the first one collects
            them.
        inputs: the models' shapes and the token windows.
        host_cost: how many operations the device does in the time of one on its host, where factorizations run.
    """
    found: dict[str, float] = {}
    collected: set[tuple[str, str, bool]] = set()
    alike: dict[Hashable, float] = {}  # a plan has hundreds of thousands of jobs, and few that differ in their work
    shares: dict[int, bool | None] = {}
    for job in jobs:
        cell, shape = job.cell, inputs.models[job.cell.model].shape
        kind: Hashable
        if job.evaluation is not None:
            count = None if job.slice is None else job.slice.count
            kind = (cell.model, id(job.evaluation), count, cell.scheme is None)
            if kind not in alike:
                windows = inputs.windows.get((cell.model, job.evaluation.key))
                size = (0, 0) if windows is None else (len(windows), windows.shape[1])
                alike[kind] = evaluate_work(shape, job, size)
            found[job.id] = alike[kind]
        elif cell.scheme is not None:
            calibration = cell.calibration
            windows = inputs.calibrations[cell.model, calibration.key] if calibration else None
            size = (0, 0) if windows is None else (len(windows), windows.shape[1])
            kind = (cell.model, id(cell.scheme), size)
            if kind not in alike:
                method = cell.scheme.build()
                alike[kind] = quantize_work(shape, method, *size, host_cost=host_cost)
                shares[id(cell.scheme)] = _shared_statistics(method)
            found[job.id] = alike[kind]
            shared = shares[id(cell.scheme)]
            if shared is not None and calibration is not None:
                key = (cell.model, calibration.key, shared)
                if key not in collected:
                    collected.add(key)
                    found[job.id] += statistics_work(shape, *size, hessians=shared)
    return found


def forward_work(shape: ModelShape, sequences: float, length: int, *, head: bool) -> float:
    """A forward pass: 2 x weights x T of the decoder's linears, causal attention, and the head where it is read."""
    tokens = sequences * length
    hidden = hidden_size(shape)
    linears = 2.0 * decoder_weights(shape) * tokens
    attention = 2.0 * hidden * length * tokens * num_blocks(shape)  # Q K^T and A V: 4 x hidden x length, half of it
    return linears + attention + (2.0 * hidden * shape.vocabulary * tokens if head else 0.0)


def quantize_work(shape: ModelShape, method: Method, samples: int, length: int, *, host_cost: float = 1.0) -> float:
    """Quantizing a whole model, without statistics of the float model that cells share.

    Args:
        samples: calibration windows.
        length: tokens of each.
        host_cost: as in `works`.
    """
    from quantizers.stream import walks

    needs, tokens, looked_at = method.needs, samples * length, windows_looked_at(method, samples)
    work = float(rounding_passes(method) * ROUNDING * decoder_weights(shape))
    if samples and walks(method):
        passes = 1 + needs.drift + (method.path != "float" and not method.true_sequential)
        work += passes * forward_work(shape, looked_at, length, head=False)
        if method.path != "float":
            work += hessian_work(shape, tokens) * (1 + 2 * needs.drift)  # the drift is no symmetric product
    if needs.hessian:
        cubes = sum(inputs**3 for inputs in stage_inputs(shape))
        columns = sum(out * inputs**2 for out, inputs in shape.linears.values())  # corrections of columns to come
        factor = _FACTORIZATION * (host_cost if getattr(method, "factorization", "host") == "host" else 1.0)
        # With drift: two more products of I x I matrices, and a second correction.
        work += cubes * (factor + 4 * needs.drift) + columns * (1 + needs.drift)
    return work + _search_work(shape, method, looked_at, length)


def windows_looked_at(method: Method, samples: int) -> int:
    """How many of so many calibration windows a method's own walk looks at."""
    return len(range(0, samples, method.needs.stride(samples) if method.path == "float" else 1))


def statistics_work(shape: ModelShape, samples: int, length: int, *, hessians: bool) -> float:
    """Statistics of the float model: one forward pass, and Hessians where they are asked for."""
    forward = forward_work(shape, samples, length, head=False)
    return forward + (hessian_work(shape, samples * length) if hessians else 0.0)


def hessian_work(shape: ModelShape, tokens: int) -> float:
    """X^T X of every stage's inputs; half of 2 I^2 T, as it is symmetric."""
    return float(sum(inputs**2 for inputs in stage_inputs(shape)) * tokens)


def rounding_passes(method: Method) -> int:
    """How often each weight is rounded: once, and once per candidate of the method's element-wise search."""
    from quantizers.awq import Awq
    from quantizers.billm import Billm
    from quantizers.slim_llm import SlimLlm

    passes = _MSE_STEPS if method.grid.mse_search else 1
    if isinstance(method, Awq):
        passes += method.num_ratios + (method.num_clips if method.clip else 0)
    elif isinstance(method, SlimLlm):
        passes += 2 * method.search_steps
    elif isinstance(method, Billm):
        passes += _BILLM_SPLITS + min(method.max_salient, method.block_size)
    return passes


def _search_work(shape: ModelShape, method: Method, looked_at: int, length: int) -> float:
    """Products of a search's candidates."""
    from quantizers.awq import Awq
    from quantizers.slim_llm import SlimLlm

    if isinstance(method, Awq):  # each ratio runs attention and MLP again
        return method.num_ratios * forward_work(shape, looked_at, length, head=False)
    if isinstance(method, SlimLlm) and method.bit_allocation:  # outputs by float weights, by rounded ones, and changes
        tokens = min(method.allocation_tokens or looked_at * length, looked_at * length)
        return 3 * 2.0 * decoder_weights(shape) * tokens
    return 0.0


def evaluate_work(shape: ModelShape, job: Job, windows: tuple[int, int]) -> float:
    """Measuring one cell, with the decoding of its artifact.

    Args:
        windows: number and length of a perplexity's windows.
    """
    decoding = ROUNDING * decoder_weights(shape) if job.cell.scheme else 0.0
    if isinstance(job.evaluation, PerplexityConfig):
        return decoding + forward_work(shape, *windows, head=True)
    if not isinstance(job.evaluation, TaskConfig):
        raise AssertionError("an evaluate job has an evaluation")
    share = 1.0 if job.slice is None else 1 / job.slice.count
    return decoding + share * task_work(shape, job.evaluation)


def task_work(shape: ModelShape, task: TaskConfig) -> float:
    """All documents of a task: what is run of each, and a head only where a text is generated."""
    size = task_size(task.name)
    documents = size.documents
    if task.limit is not None:
        documents = min(documents, task.limit * size.subtasks)
    shots = 0 if size.shares_examples else task.num_fewshot or 0
    prompt = forward_work(shape, documents, size.tokens * (1 + shots), head=False)
    if task.rounding == "hflm":
        prompt *= _ROWS
    generated = size.generated
    if generated and task.chat in ("auto_think", "slow_think"):  # whether "default" thinks is the template's to say
        generated += (task.thinking_tokens or THINKING_TOKENS) // 2
    # A generated token costs what it would in a prompt of its length, times DECODING.
    return prompt + DECODING * forward_work(shape, documents, generated, head=True)


def task_size(name: str) -> TaskSize:
    """The size of a task; a subject (`mmlu_anatomy`) is an even part of its group, and an unknown task is a guess."""
    if name in TASK_SIZES:
        return TASK_SIZES[name]
    for group, size in TASK_SIZES.items():
        if size.subtasks > 1 and name.startswith(f"{group}_"):
            return TaskSize(
                documents=ceil(size.documents / size.subtasks),
                tokens=size.tokens,
                shares_examples=size.shares_examples,
            )
    return TaskSize()


def num_blocks(shape: ModelShape) -> int:
    """Decoder blocks, told by the numbers in the linears' names."""
    return _num_blocks(tuple(shape.linears))


@cache
def _num_blocks(names: tuple[str, ...]) -> int:
    return len({_block_of(name) for name in names})


def stage_inputs(shape: ModelShape) -> list[int]:
    """in_features of every stage: linears that share their input are one."""
    return [shape.linears[name][1] for name in _first_of_stages(tuple(shape.linears))]


@cache
def _first_of_stages(names: tuple[str, ...]) -> list[str]:
    """Of every stage the first linear. Asked for each scheme of a model, of which a sweep may have thousands."""
    from quantizers.families import fused_groups

    return [group[0] for group in fused_groups(names)]


def _block_of(name: str) -> str:
    return next((part for part in name.split(".") if part.isdecimal()), "")


def hidden_size(shape: ModelShape) -> int:
    """The hidden size: what most linears read."""
    return Counter(inputs for _, inputs in shape.linears.values()).most_common(1)[0][0]


def decoder_weights(shape: ModelShape) -> int:
    """Weights of the linears of all blocks."""
    return sum(out * inputs for out, inputs in shape.linears.values())


def _shared_statistics(method: Method) -> bool | None:
    """Whether the shared statistics of the float model include Hessians; None where the scheme wants none."""
    from quantizers.stream import needs_shared, shares_hessians

    return shares_hessians(method) if needs_shared(method) else None


def kind_of(job: Job) -> str:
    """What a rate is fitted for: `quantize gptq`, `perplexity`, `task arc_easy`, `native task arc_easy`."""
    if job.evaluation is None:
        return f"quantize {job.cell.method}"
    kind = "perplexity" if isinstance(job.evaluation, PerplexityConfig) else f"task {job.evaluation.name}"
    return kind if job.execution == SIMULATED else f"{job.execution} {kind}"
