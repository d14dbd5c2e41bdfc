"""The damped factorization."""

import pytest
import torch

from quantizers.errors import QuantizationError
from quantizers.linalg import DAMPING_LADDER, FACTORIZATIONS, inverse_cholesky, quadratic_form


@pytest.mark.parametrize("size", [1, 2, 33, 96, 256, 300, 513])
@pytest.mark.parametrize("damping", [0.003, 0.01, 1.0])
@pytest.mark.parametrize(("factorization", "tolerance"), [("host", 1e-6), ("device", 1e-5)])
def test_is_the_factor_of_the_inverse(make_problem, size, damping, factorization, tolerance):
    _, hessian = make_problem(size, 1, size)
    factor, used = inverse_cholesky(hessian, damping, factorization)
    assert used == damping
    assert factor.dtype == torch.float32
    assert factor.is_contiguous()
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(size, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    product = factor.double().T @ factor.double()
    assert (product - inverse).norm() <= tolerance * inverse.norm()


def test_equals_the_route_of_the_paper(make_problem):
    """Invert, then factorize: the upper Cholesky factor of the inverse."""
    _, hessian = make_problem(1, 1, 40)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    factor, _ = inverse_cholesky(hessian, 0.01)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-5, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_does_not_change_its_input(make_problem, factorization):
    _, hessian = make_problem(2, 1, 8)
    before = hessian.clone()
    inverse_cholesky(hessian, 0.01, factorization)
    assert torch.equal(hessian, before)


def test_singular_matrix_needs_the_damping_only():
    column = torch.tensor([[1.0], [2.0], [3.0]])
    _, used = inverse_cholesky(column @ column.T, 0.01)
    assert used == 0.01


@pytest.mark.parametrize(
    ("lowest", "asked", "used"), [(-0.03, 0.01, 0.05), (-0.03, 0.04, 0.04), (-0.03, 0.001, 0.05), (-0.7, 0.3, 1.0)]
)
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_ladder_climbs_and_is_reported(lowest, asked, used, factorization):
    """With eigenvalues that average 1, the lowest sets the rung."""
    hessian = torch.diag(torch.tensor([1.0, 2.0 - lowest, lowest]))
    factor, rung = inverse_cholesky(hessian, asked, factorization)
    assert rung == used
    expected = torch.linalg.inv(hessian.double() + used * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close((factor.T @ factor).double(), expected, rtol=1e-5, atol=1e-7)


def test_hopeless_matrix_is_refused():
    hessian = torch.diag(torch.tensor([1.0, 6.0, -4.0]))
    with pytest.raises(QuantizationError, match=r"not positive definite even with damping 1\.0; use more calibration"):
        inverse_cholesky(hessian, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrix_that_is_not_finite_is_refused(value):
    hessian = torch.eye(3)
    hessian[0, 1] = hessian[1, 0] = value
    with pytest.raises(QuantizationError, match="the Hessian is not finite"):
        inverse_cholesky(hessian, 0.01)


def test_ladder_rises():
    assert list(DAMPING_LADDER) == sorted(set(DAMPING_LADDER))


@pytest.mark.parametrize("size", [1, 33, 256, 257, 600])
def test_quadratic_form_is_the_trace(make_problem, size):
    rows, symmetric = make_problem(3, 5, size)
    expected = torch.trace(rows.double() @ symmetric.double() @ rows.double().T)
    torch.testing.assert_close(quadratic_form(rows, symmetric).double(), expected, rtol=1e-5, atol=0)


def test_quadratic_form_reads_the_upper_triangle_across_panels(make_problem):
    rows, symmetric = make_problem(4, 2, 300)
    broken = symmetric.clone()
    broken[256:, :256] = torch.nan
    assert torch.equal(quadratic_form(rows, broken), quadratic_form(rows, symmetric))
