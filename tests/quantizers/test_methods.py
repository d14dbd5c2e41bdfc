"""The table of methods, and what each promises the engine."""

import dataclasses
import json

import pytest
import torch

from quantizers import methods
from quantizers.block_source import InMemory
from quantizers.encodings import ENCODINGS
from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.method import LinearGroup, Method, MethodOutcome
from quantizers.methods import METHODS, method_class, method_names
from quantizers.rtn import round_to_nearest
from quantizers.statistics import InputStatistics
from quantizers.stream import quantize_blocks
from tests.reference.grids import CONVENTION

# A grid that each method takes.
GRIDS = {name: Grid(bits=4) for name in METHODS} | {"billm": Grid(bits=1), "slim_llm": Grid(bits=3, group_size=16)}


@pytest.mark.parametrize("name", METHODS)
def test_names_and_versions_agree(name):
    method = METHODS[name](grid=GRIDS[name])
    assert method.name == name
    assert method.code_version.startswith(f"{name}/")
    assert {"corrected", "as_published"} <= set(method.presets)
    known = {item.name for item in dataclasses.fields(method)}
    for preset in method.presets.values():
        assert set(preset) <= known
        METHODS[name](grid=GRIDS[name], **preset)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_options_only(name):
    """Frozen, comparable and hashable, so that they can be part of a job's identity."""
    method = METHODS[name](grid=GRIDS[name])
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.grid = Grid(bits=3)
    assert method == METHODS[name](grid=GRIDS[name])
    assert hash(method) == hash(METHODS[name](grid=GRIDS[name]))
    assert method != METHODS[name](grid=dataclasses.replace(GRIDS[name], scale_dtype="float32"))
    with pytest.raises(TypeError):
        METHODS[name](GRIDS[name])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_every_method_keeps_the_contract(make_problem, name, bits, symmetric, group_size):
    weight, hessian = make_problem(0, 12, 48)
    grid = Grid(bits=bits, group_size=group_size, convention=CONVENTION[symmetric])
    try:
        method = METHODS[name](grid=grid)
    except QuantizationError:
        assert name in ("billm", "slim_llm"), "the others take every grid"
        return
    weights = [weight[:8], weight[8:]]
    before = [part.clone() for part in weights], hessian.clone()
    generator = torch.Generator().manual_seed(1)
    drift, sample = 0.1 * torch.randn(48, 48, generator=generator), torch.randn(20, 48, generator=generator)
    statistics = InputStatistics(
        hessian_II=hessian,
        drift_II=drift if method.needs.drift else None,
        sample_TI=sample if method.needs.sample else None,
    )
    outcome = method.quantize(LinearGroup.of(weights, statistics if method.needs.calibration else None))
    assert all(torch.equal(part, old) for part, old in zip(weights, before[0], strict=True))
    assert torch.equal(hessian, before[1])
    assert (outcome.damping is not None) == method.needs.hessian, name
    for part, quantized in zip(weights, outcome.weights, strict=True):
        decoded = quantized.decode()
        assert decoded.dtype == torch.float32
        assert quantized.shape == decoded.shape == part.shape
        # exact for uniform grids; allocated bits and salient columns move it by row padding and zeros alone
        planned = method.stored_bytes(*part.shape)
        slack = 0 if quantized.encoding == "uniform" else 3 * part.shape[0]
        assert abs(quantized.stored_bytes - planned) <= slack
        packed = quantized.pack()
        assert quantized.stored_bytes == sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        spec = json.loads(json.dumps(quantized.spec()))
        restored = ENCODINGS[quantized.encoding].unpack(packed, spec, quantized.shape)
        assert torch.equal(restored.decode(), decoded)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(QuantizationError, match="method 'gtpq' is unknown; did you mean 'gptq'"):
        method_class("gtpq")
    assert method_names()[: len(METHODS)] == tuple(METHODS)


class Halves(Method):
    """A method from outside: keeps every other bit of sense."""

    name = "halves"
    code_version = "halves/1"

    def quantize(self, group):
        return MethodOutcome(weights=[round_to_nearest(weight / 2, self.grid) for weight in group.weights])


@pytest.fixture
def installed_package(monkeypatch):
    """Entry points as an installed package would bring them."""
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint(name=name, value=f"{__name__}:{value}", group=methods.ENTRY_POINTS)
        for name, value in {"halves": "Halves", "other": "Halves", "nothing": "GRIDS", "gone": "NotThere"}.items()
    ]
    monkeypatch.setattr(methods, "entry_points", lambda group: points if group == methods.ENTRY_POINTS else [])
    method_names.cache_clear()
    method_class.cache_clear()
    yield
    method_names.cache_clear()
    method_class.cache_clear()


@pytest.mark.usefixtures("installed_package")
def test_a_method_from_outside_is_found_and_runs(llama):
    assert method_class("halves") is Halves
    assert "halves" in method_names()
    method = method_class("halves")(grid=Grid(bits=8))
    linear = next(quantize_blocks(InMemory(llama), method, None)).linears[0]
    weight = llama.get_submodule(linear.name).weight
    assert torch.allclose(linear.weight.decode(), weight / 2, atol=0.02)


@pytest.mark.usefixtures("installed_package")
@pytest.mark.parametrize(
    ("name", "message"),
    [("other", "calls itself 'halves'"), ("nothing", "not a subclass"), ("gone", "cannot be imported")],
)
def test_a_bad_entry_point_is_refused(name, message):
    with pytest.raises(QuantizationError, match=message):
        method_class(name)


@pytest.mark.usefixtures("installed_package")
def test_a_sweep_file_says_why_an_installed_method_is_refused():
    """Not that it is unknown."""
    from orchestrator.errors import BitatlasError
    from orchestrator.scheme import parse_scheme

    with pytest.raises(BitatlasError, match=r"grid\[0\]: method 'gone': .*NotThere cannot be imported"):
        parse_scheme({"method": "gone", "weight_bits": 4}, "grid[0]")
    assert parse_scheme({"method": "halves", "weight_bits": 4}, "x").label == "halves-w4-pc"
