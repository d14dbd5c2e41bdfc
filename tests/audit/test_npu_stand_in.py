"""The stand-in keeps the rules of a device, and the audit can fail: each kind of finding is reported by name."""

import math

import pytest
import torch

from evaluators.perplexity import perplexity
from tests.audit.cases import WINDOWS, model_of
from tests.audit.findings import findings
from tests.audit.npu_stand_in import DEVICE, StandIn, registered_kernels


def on_device(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype).to(DEVICE)


def test_an_operator_without_a_kernel_is_named():
    with StandIn() as npu:
        on_device(3, 3).cholesky_inverse()
    (found,) = findings(npu.record)
    assert found.startswith("aten::cholesky_inverse(self: float32, ->: float32) has no kernel in torch_npu: ")
    assert "tests/audit/test_npu_stand_in.py" in found


def test_a_composed_operator_is_judged_by_its_parts():
    with StandIn() as npu:
        torch.linalg.cholesky_ex(torch.eye(3, device=DEVICE))
    assert "aten::linalg_cholesky_ex" in npu.record.composed
    (found,) = findings(npu.record)
    assert "aten::linalg_cholesky_ex.L(" in found
    with StandIn() as npu:
        torch.nn.functional.linear(on_device(2, 3), on_device(4, 3))
    assert "aten::linear" in npu.record.composed
    assert findings(npu.record) == []


def test_where_our_code_called_it_is_told():
    from quantizers.linalg import without_unseen

    with StandIn(registered_kernels() - {"aten::eq.Scalar", "aten::eq.Scalar_out"}) as npu:
        without_unseen(on_device(3, 3))
    (found,) = findings(npu.record)
    assert found.startswith("aten::eq.Scalar_out(self: float32, out: bool, ->: bool) has no kernel in torch_npu: ")
    assert "quantizers/linalg.py:" in found
    assert found.endswith(" without_unseen")


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: on_device(4, dtype=torch.bfloat16).sort(), "torch_npu documents no bfloat16 for sort"),
        (lambda: on_device(4, dtype=torch.bfloat16).cumsum(0), "torch_npu documents no bfloat16 for cumsum"),
        (lambda: on_device(4).double(), "is float64 on the device"),
        (lambda: on_device(4, dtype=torch.bfloat16).amin(0), "torch_npu documents no bfloat16 for amin"),
    ],
)
def test_dtypes_are_judged(run, words):
    with StandIn() as npu:
        run()
    assert any(words in found for found in findings(npu.record))


def test_a_host_tensor_among_device_tensors_is_refused_and_not_forgotten():
    with (
        StandIn() as npu,
        pytest.raises(RuntimeError, match=r"aten::add\.Tensor is given a host tensor of shape \(3,\)"),
    ):
        on_device(3) + torch.ones(3)
    assert len(findings(npu.record)) == 1


def test_a_host_scalar_may_join():
    with StandIn() as npu:
        assert (on_device(3) + torch.tensor(2.0)).tolist() == [3.0] * 3
    assert findings(npu.record) == []


def test_values_are_real_and_views_share_memory():
    with StandIn():
        matrix = torch.arange(6.0, device=DEVICE).reshape(2, 3)
        matrix[:, 1] = 7
        matrix[1].mul_(2)
        assert matrix.device == DEVICE
        assert matrix.cpu().tolist() == [[0, 7, 2], [6, 14, 10]]
        assert matrix.max().item() == 14
        total = torch.zeros((), device=DEVICE)
        total += matrix.sum()
        assert math.isclose(float(total), 39)


def test_a_model_computes_what_it_computes_on_the_host():
    model = model_of("Llama")
    expected = perplexity(model, WINDOWS).perplexity
    with StandIn():
        assert perplexity(model.to(DEVICE), WINDOWS).perplexity == pytest.approx(expected, rel=0.01)


def test_the_way_to_numpy_leads_over_the_host():
    with StandIn():
        with pytest.raises(RuntimeError, match="numpy"):
            on_device(2).numpy()
        assert on_device(2).cpu().numpy().tolist() == [1, 1]


def test_what_is_copied_to_the_host_stays_there():
    with StandIn() as npu:
        host = torch.empty(3)
        host.copy_(on_device(3))
        before = dict(npu.record.kernels)
        assert type(host) is torch.Tensor
        assert host.double().sum().item() == 3
        assert npu.record.kernels == before


def test_host_tensors_alone_are_left_alone():
    with StandIn() as npu:
        torch.ones(3, dtype=torch.float64).cumsum(0).sort()
    assert not npu.record.kernels
    assert not npu.record.missing


def test_a_device_tensor_is_of_no_use_outside():
    with StandIn():
        tensor = on_device(3)
    with pytest.raises(AssertionError, match="outside of its stand-in"):
        tensor.add(1)


def test_no_device_is_said_to_be_there():
    with StandIn():
        pass
    assert not torch.privateuseone.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
