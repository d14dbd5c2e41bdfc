"""Make the table of ATen operators that torch_npu has kernels for, by asking torch's dispatcher. No NPU, no CANN.

    pip download torch-npu==2.13.0 --no-deps && python tests/audit/registered_kernels.py torch_npu-2.13.0-*.whl

The wheel's `libtorch_npu.so` registers its kernels when it is loaded. It needs CANN's libraries for that, of which it
calls nothing while loading: libraries of the same names, made here with gcc, whose every function ends the process,
are enough. Then each operator is looked up in the dispatch table for PrivateUse1, the key of NPU tensors. Needs gcc, nm
and the torch that the wheel was built for. The process that loads the library does nothing else and is then over.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
KEY = "PrivateUse1"
LIBRARY = "libtorch_npu.so"
FROM_WHEEL = (LIBRARY, "libtensorpipe.so", "libnpu_profiler.so")
FROM_CANN = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
CANN_SYMBOL = re.compile(r"(acl|Hccl|Msprof|rt[A-Z]|_ZNK?2ge)\w*")


def main(wheel: Path) -> None:
    """Write the table of a wheel beside this script."""
    version = re.match(r"torch_npu-([\d.]+)-", wheel.name)
    assert version, f"{wheel.name} is no torch_npu wheel"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(wheel) as files:
            for name in FROM_WHEEL:
                (folder / name).write_bytes(files.read(f"torch_npu/lib/{name}"))
            declared = declared_operators(files.read("torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"))
        write_stubs(folder)
        child = [sys.executable, str(Path(__file__)), "--load", scratch]
        asked = subprocess.run(child, check=True, capture_output=True, text=True)
    found = json.loads(asked.stdout)
    kernels = found.pop("kernels")
    table = {
        "source": {
            "wheel": wheel.name,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "read": f"torch's dispatch table for {KEY} after loading the wheel's {LIBRARY} over empty CANN libraries",
            "script": "tests/audit/registered_kernels.py",
            **found,
            "kernels": len(kernels),
            "kernels_also_declared_in_the_wheels_yaml": len(
                declared & {name.removeprefix("aten::") for name in kernels}
            ),
        },
        "kernels": kernels,
    }
    target = HERE / f"torch_npu-{version[1]}.json"
    target.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    print(f"{target}: {json.dumps(table['source'], indent=1)}")


def declared_operators(document: bytes) -> set[str]:
    """Names of the operators that torch_npu's own code generator was told to register: a second witness."""
    import yaml

    entries = yaml.safe_load(document)["supported"]
    names = [entry if isinstance(entry, str) else entry["func"] for entry in entries]
    return {name.partition("(")[0].strip() for name in names}


def write_stubs(folder: Path) -> None:
    """CANN's libraries, empty but for the functions that the wheel's libraries want."""
    wanted: set[str] = set()
    for name in FROM_WHEEL:
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", str(folder / name)], check=True, capture_output=True, text=True
        )
        symbols = [line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()]
        wanted |= {symbol for symbol in symbols if CANN_SYMBOL.fullmatch(symbol)}
    body = "".join(f".globl {name}\n.type {name},@function\n{name}: ud2\n" for name in sorted(wanted))
    end = '.section .note.GNU-stack,"",@progbits\n'
    for library in FROM_CANN:
        source, target = folder / f"{library}.s", folder / f"lib{library}.so"
        source.write_text(f".text\n{body}{end}" if library == FROM_CANN[0] else end, encoding="ascii")
        command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{target.name}", "-o", str(target), str(source)]
        subprocess.run(command, check=True)


def load_and_ask(folder: Path) -> None:
    """Print, as JSON, which of torch's own operators have a kernel under `KEY`, and how the others get theirs."""
    import torch

    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    for library in FROM_CANN:
        ctypes.CDLL(str(folder / f"lib{library}.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    ways: collections.Counter[str] = collections.Counter()
    kernels = []
    for name in sorted(ours):
        way = re.search(rf"^{KEY}: .* \[(.*)\]$", torch._C._dispatch_dump_table(name), re.MULTILINE)
        ways[way[1] if way else "nothing"] += 1
        if way and way[1] == "kernel":
            kernels.append(name)
    told = {"torch": torch.__version__, "operators_of_torch": len(ours), "ways": dict(ways), "kernels": kernels}
    print(json.dumps(told), flush=True)
    os._exit(0)  # the library's own end of process would call CANN


if __name__ == "__main__":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if sys.argv[1] == "--load":
        load_and_ask(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
