"""Make the table of dtypes that torch_npu documents for torch's functions, from its own pages.

    git clone https://github.com/Ascend/pytorch && python tests/audit/documented_dtypes.py pytorch COMMIT

The pages (docs/zh/api/native_api/pytorch_2-13-0) state per function which dtypes of its first tensor were verified on
an NPU. A function stands in up to three pages, as `torch.add`, as `Tensor.add` and under `nn.functional`: what any of
them lists counts. Functions without a list are left out, functions that are said not to work on Atlas A2 have none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PAGES = "docs/zh/api/native_api/pytorch_2-13-0"
FILES = ("torch.md", "torch-Tensor.md", "torch-nn-functional.md", "torch-linalg.md", "torch-special.md")
TITLE = re.compile(r"^(?:#{2,6} .*?torch\.([\w.]+)|> <font size=\"3\">(\w+)(?:\(\))?</font>)$", re.MULTILINE)
LIMIT = re.compile(r"`(?:input|self|tensors|tensor)`仅支持([\w，, ]+)")
SUPPORT = re.compile(r"Atlas A2 训练系列产品</term>\s*(?:\||：)\s*(✔|✘|支持|不支持)")
NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    **{name: name for name in ("uint8", "int8", "int16", "int32", "int64", "bool", "complex64", "complex128")},
}
TABLE = Path(__file__).parent / "torch_npu-2.13.0-dtypes.json"


def main(clone: Path, commit: str) -> None:
    """Write the table beside this script."""
    listed: dict[str, set[str]] = {}
    for file in FILES:
        shown = ["git", "-C", str(clone), "show", f"{commit}:{PAGES}/{file}"]
        text = subprocess.run(shown, check=True, capture_output=True).stdout.decode()
        for name, dtypes in sections(text):
            listed.setdefault(name, set()).update(dtypes)
    source = {
        "repository": "https://github.com/Ascend/pytorch",
        "commit": commit,
        "pages": [f"{PAGES}/{file}" for file in FILES],
        "script": "tests/audit/documented_dtypes.py",
    }
    order = list(NAMES.values())
    rows = {name: sorted(dtypes, key=order.index) for name, dtypes in sorted(listed.items())}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(dtypes)}" for name, dtypes in rows.items())
    TABLE.write_text(f'{{"source": {json.dumps(source, indent=1)},\n"dtypes": {{\n{lines}\n}}}}\n', encoding="utf-8")
    print(f"{TABLE}: {len(rows)} functions")


def sections(text: str) -> list[tuple[str, set[str]]]:
    """The functions of a page that state dtypes, by their last name, or that do not work at all."""
    titles = list(TITLE.finditer(text))
    found = []
    for title, following in zip(titles, [*titles[1:], None], strict=True):
        body = text[title.end() : following.start() if following else len(text)]
        limit, support = LIMIT.search(body), SUPPORT.search(body)
        name = (title[1] or title[2]).rpartition(".")[2]
        if support and support[1] in {"✘", "不支持"}:
            found.append((name, set()))
        elif limit:
            found.append((name, {NAMES[word] for word in re.split(r"[，, ]+", limit[1].strip()) if word in NAMES}))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
