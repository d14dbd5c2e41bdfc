"""The factorization for devices without float64, and the methods that may ask for it."""

import pytest
import torch

from quantizers.blocked_cholesky import inverse_of_factor
from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.methods import method_class


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
def test_it_is_the_inverse_of_the_lower_factor(make_problem, size):
    _, hessian = make_problem(size, 1, size)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size)
    found = inverse_of_factor(hessian)
    factor = torch.linalg.cholesky(hessian.double())
    assert torch.equal(found, found.tril())
    assert (found.double() @ factor - torch.eye(size)).norm() < 1e-4 * size**0.5


@pytest.mark.parametrize("place", [0, 130, 199])
def test_a_matrix_that_is_not_positive_definite_is_seen_in_any_block(place):
    matrix = torch.eye(200)
    matrix[place, place] = -1.0
    assert inverse_of_factor(matrix) is None


def test_only_products_of_whole_blocks_run_on_the_device():
    """float64 and factorizations are for the host: the device gets products, sums and copies."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outcome = func(*args, **(kwargs or {}))
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            if any(value.dtype == torch.float64 and max(value.shape, default=0) > 128 for value in tensors):
                wide.append(str(func))
            return outcome

    wide = []
    with Log():
        inverse_of_factor(torch.eye(300) * 2)
    assert wide == []


@pytest.mark.parametrize("name", ["gptq", "gptaq", "billm", "slim_llm"])
def test_methods_refuse_another_word(name):
    cls = method_class(name)
    grid = Grid(bits=1 if name == "billm" else 4, group_size=0 if name == "billm" else 16)
    assert cls(grid=grid, factorization="device").factorization == "device"
    with pytest.raises(QuantizationError, match=r"options\.factorization = 'gpu' is none of host, device"):
        cls(grid=grid, factorization="gpu")
