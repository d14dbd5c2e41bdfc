"""Versions out of files, pairs that go together, and what to do where torch_npu does not load."""

import re

import pytest

from cluster.ascend import (
    CANN_OF,
    backend_trouble,
    load_remedy,
    mismatch,
    parse_cann,
    parse_driver,
    release,
    two_allocators,
    unknown_pair,
)

INSTALL_INFO = """package_name=Ascend-cann-toolkit
version=8.1.RC1
innerversion=V100R001C21SPC001B238
compatible_version=[V100R001C15],[V100R001C18]
arch=aarch64
"""
VERSION_CFG = """# version: 1.0
runtime_running_version=[7.6.0.1.220:8.0.0]
compiler_running_version=[7.6.0.1.220:8.0.0]
"""
VERSION_INFO = """Version=24.1.rc1
ascendhal_version=7.35.19
Innerversion=V100R001C15SPC006B220
"""
NPU_SMI = """+-----------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2               |
+---------------------------+---------------+---------------------+
"""


@pytest.mark.parametrize(
    ("info", "cfg", "version"),
    [
        (INSTALL_INFO, None, "8.1.RC1"),
        (INSTALL_INFO, VERSION_CFG, "8.1.RC1"),
        (None, VERSION_CFG, "8.0.0"),
        (None, "runtime_running_version=[1.83.T8.0.B128:CANN-1.83]", "1.83"),
        ("innerversion=V100", None, None),
        (None, "# version: 1.0", None),
        (None, None, None),
    ],
)
def test_cann_s_version(info, cfg, version):
    assert parse_cann(info, cfg) == version


@pytest.mark.parametrize(
    ("info", "smi", "version"),
    [
        (VERSION_INFO, None, "24.1.rc1"),
        (VERSION_INFO, NPU_SMI, "24.1.rc1"),
        (None, NPU_SMI, "24.1.rc2"),
        ("ascendhal_version=7.35.19\nInnerversion=V100", None, None),
        (None, "command not found", None),
        (None, None, None),
    ],
)
def test_the_driver_s_version(info, smi, version):
    assert parse_driver(info, smi) == version


@pytest.mark.parametrize(
    ("version", "told"), [("2.13.0+cpu", "2.13"), ("2.10.0.post4", "2.10"), ("2.7.1", "2.7"), ("2.1.0.dev1", "2.1")]
)
def test_a_release_is_two_numbers(version, told):
    assert release(version) == told


def test_torch_and_torch_npu_are_of_one_release():
    assert mismatch("2.13.0+cpu", "2.13.0") is None
    assert mismatch("2.10.0", "2.10.0.post4") is None
    assert mismatch(None, "2.13.0") is None
    assert mismatch("2.13.0", None) is None
    assert mismatch("2.13.0+cpu", "2.1.0") == "torch_npu 2.1.0 needs torch 2.1, and torch 2.13.0+cpu is installed"


def test_a_pair_with_cann_is_known_or_not():
    assert unknown_pair("2.12.0", "9.1.0") is None
    assert unknown_pair("2.8.0", "8.3.rc1") is None  # cased as it likes
    assert (
        unknown_pair("2.12.0", "8.5.0") == "torch_npu 2.12.0 was released for CANN 9.1.0, and CANN 8.5.0 is installed"
    )
    assert unknown_pair("2.99.0", "9.1.0") == "torch_npu 2.99.0 is not in the list of known pairs"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+(\.RC\d+)?|\d+\.\d+\.RC\d+", cann) for cann in CANN_OF.values())
    assert all(tuple(map(int, release(version).split("."))) >= (2, 7) for version in CANN_OF)


def test_two_allocator_variables_are_one_too_many():
    one, other = {"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_NPU_ALLOC_CONF": "b"}
    assert two_allocators({}) is two_allocators(one) is two_allocators(other) is None
    assert two_allocators(one | {"PYTORCH_NPU_ALLOC_CONF": ""}) is None
    assert two_allocators(one | other) == (
        "both PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are set, and torch_npu aborts then: unset one of them"
    )


EXTENSION = "RuntimeError: Failed to load the backend extension: torch_npu. You can disable extension auto-loading"
LIBRARY = "ImportError: libhccl.so: cannot open shared object file"


@pytest.mark.parametrize(
    ("causes", "known", "remedy"),
    [
        ([EXTENSION, LIBRARY], {}, "on a machine without NPUs `pip uninstall torch-npu`"),
        ([EXTENSION, LIBRARY], {"unsourced": "/opt/cann"}, "source /opt/cann/set_env.sh before this command"),
        ([EXTENSION, LIBRARY], {"cann": "8.5.0"}, "CANN 8.5.0 does not fit this torch_npu"),
        ([EXTENSION, "ModuleNotFoundError: No module named 'yaml'"], {}, "pip install pyyaml, which torch_npu needs"),
        (["ModuleNotFoundError: No module named 'numpy'"], {}, "pip install numpy"),
        (["ImportError: numpy.core failed"], {}, "run `python -c 'import torch'` and mend what it says"),
    ],
)
def test_each_cause_has_its_remedy(causes, known, remedy):
    assert load_remedy(causes, **{"cann": None, "unsourced": None} | known).startswith(remedy)


def test_a_backend_that_does_not_load_is_one_sentence():
    error = RuntimeError("Failed to load the backend extension: torch_npu. You can disable ...")
    error.__cause__ = ImportError("libhccl.so: cannot open shared object file")
    told = backend_trouble(error)
    assert told.startswith(
        "torch does not load, because torch_npu does not (libhccl.so: cannot open shared object file)"
    )
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in told
    assert "\n" not in told
    outer = ImportError("cannot import a model")
    outer.__context__ = error
    assert backend_trouble(outer) == told
    assert backend_trouble(RuntimeError("another")) is None
    assert backend_trouble(ValueError("Failed to load the backend extension: torch_npu")) is None
