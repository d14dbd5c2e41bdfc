"""Native execution: what is planned, what is refused and when, and what a worker does."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import yaml

from cluster.devices import KINDS, Claim
from cluster.failures import Failure
from orchestrator.cli import main
from orchestrator.errors import BitatlasError
from orchestrator.execution import check_device, check_native, installed_for
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.models.loading import ModelShape
from orchestrator.plan import make_plan
from orchestrator.rows import failure_row
from orchestrator.work import kind_of
from orchestrator.worker import Worker, payload_of
from quantizers.errors import NoKernelError
from quantizers.native import NativeLinear
from tests.reference.npu_operators import registered

SHAPE = ModelShape(
    linears={"q": (64, 64), "down": (64, 128)},
    fp_bytes=1,
    bits_per_value=16,
    max_positions=None,
    vocabulary=8,
    dtype="bfloat16",
)
NPU, CPU = Claim(torch_device="npu:0", name="Ascend910B1"), Claim(torch_device="cpu", name="a processor")
W4 = {"method": "rtn", "weight_bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}
W8A8 = {"method": "smoothquant", "weight_bits": 8, "activation_bits": 8}


@pytest.fixture
def native_sweep(make_sweep):
    def make(*grid, workers=None, **evaluation):
        evaluation = {"tasks": [{"name": "arc_easy", "limit": 4}], "execution": "native"} | evaluation
        return make_sweep(grid=list(grid or [W4]), evaluation=evaluation, workers=workers or {})

    return make


def test_execution_is_simulated_unless_asked(make_sweep, plan_of):
    assert {job.execution for job in plan_of(make_sweep()).jobs} == {"simulated"}
    with pytest.raises(BitatlasError, match=r"evaluation\.execution = 'real'"):
        make_sweep(evaluation={"tasks": [{"name": "arc_easy"}], "execution": "real"})


def test_native_is_part_of_an_evaluation_s_identity_and_of_no_artifact_s(native_sweep, plan_of):
    evaluation = {"tasks": [{"name": "arc_easy", "limit": 4, "slices": 1}]}
    simulated = plan_of(native_sweep(execution="simulated", **evaluation))
    native = plan_of(native_sweep(**evaluation))
    assert [cell.key for cell in native.cells] == [cell.key for cell in simulated.cells]
    by_label = {job.label: job for job in simulated.jobs}
    same = {job.label for job in native.jobs if job.id == by_label[job.label].id}
    assert same == {"tiny fp: arc_easy", "tiny rtn-w4-g32: quantize"}
    (changed,) = [job for job in native.jobs if job.label not in same]
    assert (changed.execution, changed.whole.execution) == ("native", "native")
    assert {job.execution for job in native.jobs if job.label in same} == {"simulated"}


def test_rows_and_rates_tell_them_apart(native_sweep, plan_of):
    *_, native = plan_of(native_sweep()).jobs
    simulated = dataclasses.replace(native, execution="simulated")
    assert (kind_of(native), kind_of(simulated)) == ("native task arc_easy", "task arc_easy")
    rows = [
        failure_row(
            "study", job, Failure(kind="error", message="made up"), worker=None, started_at=None, finished_at=None
        )
        for job in (native, simulated)
    ]
    assert [row["execution"] for row in rows] == ["native", "simulated"]


@pytest.mark.parametrize(
    "entry",
    [
        W4,
        W8A8,
        W4 | {"method": "gptq"},
        W4 | {"method": "awq", "weight_bits": 8, "group_size": "per_channel"},
        {"method": "rtn", "weight_bits": 8, "activation_bits": 8, "symmetric": True, "group_size": "per_channel"},
    ],
)
def test_cells_with_a_kernel(native_sweep, entry):
    check_native(native_sweep(entry), "tiny", SHAPE, "study.yaml")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (W4 | {"weight_bits": 3}, r"rtn-w3-g32 cannot run natively: weight_bits = 3 has no kernel; use 8 or 4 \(q of"),
        (W4 | {"scale_dtype": "float16"}, "set scale_dtype: bfloat16"),
        (W4 | {"group_size": 16}, "group_size = 16 has no kernel"),
        (W8A8 | {"group_size": 64}, r"group_size = 64 has no kernel with .* \(down of tiny\)"),  # one group in q
        (W8A8 | {"symmetric": False}, "set symmetric: true"),
        (W8A8 | {"activation_granularity": "per_tensor"}, "per token and symmetrically"),
        (W8A8 | {"options": {"preset": "as_published"}}, "leave quantize_qkv_outputs out"),
        ({"method": "billm", "weight_bits": 1}, "weights in the binarized encoding have no kernel"),
        ({"method": "slim_llm", "weight_bits": 4, "group_size": 32}, "weights in the mixed encoding have no kernel"),
        (W4 | {"method": "gptq", "options": {"static_groups": False}}, "set static_groups: true"),
    ],
)
def test_cells_without_one_are_refused_by_name(native_sweep, entry, reason):
    with pytest.raises(BitatlasError, match=r"study\.yaml: grid entry .* cannot run natively") as told:
        check_native(native_sweep(W4, entry), "tiny", SHAPE, "study.yaml")
    assert told.match(reason)
    check_native(native_sweep(W4, entry, execution="simulated"), "tiny", SHAPE, "study.yaml")


def test_a_float32_model_is_refused(native_sweep):
    with pytest.raises(BitatlasError, match="a model in float32 has no kernel"):
        check_native(native_sweep(), "tiny", dataclasses.replace(SHAPE, dtype="float32"), "study.yaml")


@pytest.mark.parametrize("device", ["cpu", "cuda", "simulated-npu"])
def test_other_devices_are_refused(native_sweep, device):
    with pytest.raises(BitatlasError, match=f"runs on NPUs, and these are {device} workers; set workers.device: npu"):
        check_native(native_sweep(workers={"device": device}), "tiny", SHAPE, "study.yaml")
    with pytest.raises(BitatlasError, match="runs on NPUs"):
        check_device("native", device)
    check_device("simulated", device)
    check_device("native", "npu")
    check_native(native_sweep(workers={"device": "npu"}), "tiny", SHAPE, "study.yaml")


@pytest.fixture
def prepared(tmp_path, tiny_checkpoint, make_sweep, monkeypatch):
    """(execution, grid entry) -> the payloads of the quantizing and the evaluating job, by kind, and the jobs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "own.txt"
    text.write_text("The house by the sea stood empty, and nobody came. " * 30)

    def make(execution, entry):
        corpus = {"corpus": {"path": str(text)}, "sequence_length": 64, "max_windows": 2}
        sweep = make_sweep(
            models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
            grid=[entry],
            evaluation={"perplexity": [corpus], "execution": execution},
        )
        inputs = prepare(sweep, "study.yaml")
        jobs = {job.kind: job for job in make_plan(sweep, inputs.identities).jobs if job.cell.scheme}
        return {kind: payload_of(job, inputs, Layout(tmp_path / "out")) for kind, job in jobs.items()}, jobs, inputs

    return make


def test_prepare_refuses_before_anything_runs(prepared):
    with pytest.raises(BitatlasError, match=r"rtn-w2-g32 cannot run natively: .* \(model\.layers\.0\..* of tiny\)"):
        prepared("native", W4 | {"weight_bits": 2})


def test_where_auto_finds_no_npu_nothing_starts(make_document, tiny_checkpoint, tmp_path, monkeypatch, capfd):
    made = make_document(
        models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
        grid=[W4],
        calibration=None,
        evaluation={"tasks": [{"name": "arc_easy", "limit": 4}], "execution": "native"},
    )
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made))
    asked = []

    @contextmanager
    def a_session_of_cores(**wanted):
        asked.append(wanted["device"])
        yield SimpleNamespace(kind=KINDS["cpu"])

    monkeypatch.setattr("cluster.session.ray_session", a_session_of_cores)
    monkeypatch.setattr("sys.argv", ["bitatlas", "run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, asked) == (2, ["auto"])
    assert "runs on NPUs, and these are cpu workers" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entry", [W4, W4 | {"weight_bits": 8}, W8A8 | {"method": "rtn", "symmetric": True}])
def test_a_worker_executes_both_ways_by_turns(prepared, monkeypatch, entry):
    """With modelled operators on the CPU: the same artifact, values that differ little, and none left in the model."""
    monkeypatch.setattr("orchestrator.execution.check_device", lambda *_: None)
    payloads = {execution: prepared(execution, entry)[0] for execution in ("simulated", "native")}
    assert prepared("native", entry)[2].models["tiny"].shape.dtype == "bfloat16"
    assert payloads["native"]["quantize"]["artifact"] == payloads["simulated"]["quantize"]["artifact"]
    worker = Worker(device=CPU, threads=1, report=[].append)
    worker.run(payloads["native"]["quantize"])

    calls = []
    real = NativeLinear.__call__
    monkeypatch.setattr(NativeLinear, "__call__", lambda self, inputs: calls.append(self) or real(self, inputs))

    def perplexity(execution):
        calls.clear()
        (metric,) = worker.run(payloads[execution]["evaluate"])["metrics"]
        assert len(set(calls)) == (14 if execution == "native" else 0)  # linears of the two blocks
        return metric["value"]

    with registered():
        native, simulated, again, once_more = map(perplexity, ("native", "simulated", "native", "simulated"))
    assert (again, once_more) == (native, simulated)
    assert native == pytest.approx(simulated, rel=2e-3)


def test_a_worker_that_is_no_npu_fails_and_says_so(prepared):
    payloads, _, _ = prepared("native", W4)
    worker = Worker(device=CPU, threads=1, report=[].append)
    worker.run(payloads["quantize"])
    with pytest.raises(BitatlasError, match="runs on NPUs, and these are cpu workers"):
        worker.run(payloads["evaluate"])


def test_a_worker_refuses_what_it_cannot_do():
    with pytest.raises(BitatlasError, match="runs on NPUs, and these are cpu workers"):
        installed_for("native", CPU, torch.nn.Linear(2, 2), [])
    if hasattr(torch.ops.npu, "npu_quant_matmul"):
        pytest.skip("torch_npu is loaded")
    with pytest.raises(NoKernelError, match=r"torch\.ops\.npu\.npu_dynamic_quant is not there"):
        installed_for("native", NPU, torch.nn.Linear(2, 2), [])
