"""Every operator that quantizing and evaluating run on an NPU has a kernel there, in dtypes documented for it.

Nothing here was run on hardware: see npu_stand_in.py for what is proved and what is not.
"""

import pytest

from quantizers.methods import METHODS
from tests.audit.cases import EVALUATIONS, FAMILIES, SCHEMES, evaluated, quantized
from tests.audit.findings import findings


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing(scheme):
    record = quantized("Llama", scheme)
    assert len(record.kernels) > 40
    assert findings(record) == []


def test_every_method_and_preset_is_audited():
    assert {scheme["method"] for scheme in SCHEMES.values()} == set(METHODS)
    published = {scheme["method"] for scheme in SCHEMES.values() if "preset" in scheme.get("options", {})}
    assert published == {name for name, method in METHODS.items() if method.presets["as_published"]}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_evaluating(evaluation):
    record = evaluated("Llama", evaluation)
    assert len(record.kernels) > 25
    assert findings(record) == []


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Llama"])
def test_families(family):
    record = evaluated(family, "scores by token trees")
    assert len(record.kernels) > 25
    assert findings(record) == []
