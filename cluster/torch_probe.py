"""Run as a script in a process of its own: does torch load here, and which devices does it see?

Prints one line of JSON behind `MARK`. Loading torch may fail, print, hang or crash where an accelerator's software is
broken, and none of that may happen to the driver. Imports nothing of this project.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

MARK = "bitatlas-probe "


def main() -> None:
    """Print what was found."""
    print(MARK + json.dumps(look()), flush=True)


def look() -> dict[str, Any]:
    """Keys: `torch` (its own version), `devices` [{name, memory_bytes}], `torch_error` and `npu_error` (messages, the
    outermost first; empty where it loads)."""
    found: dict[str, Any] = {"torch": None, "cuda": None, "devices": [], "torch_error": [], "npu_error": []}
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return found | {"torch_error": list(_messages(error))}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        if error.name != "torch_npu":  # else it is not installed, which is no error
            found["npu_error"] = list(_messages(error))
    except Exception as error:
        found["npu_error"] = list(_messages(error))
    found["devices"] = [device for kind in ("npu", "cuda") for device in _devices(torch, kind)]
    return found


def _devices(torch: Any, kind: str) -> Iterator[dict[str, Any]]:
    module = getattr(torch, kind, None)  # `torch.npu` only where torch_npu is loaded; not run on hardware
    if module is None or not module.is_available():
        return
    for index in range(module.device_count()):
        properties = module.get_device_properties(index)
        yield {"name": str(module.get_device_name(index)), "memory_bytes": int(properties.total_memory)}


def _messages(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield f"{type(error).__name__}: {error}".strip()
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
