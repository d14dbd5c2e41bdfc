"""The authors' released code: which commits the figures are of, and how to import it on a machine without CUDA.

None of it is in this repository. `bench_originals` takes a folder of clones, each at its commit here.
"""

import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A public repository at one commit.

    Attributes:
        folder: of it, which its modules are imported from.
        absent: modules that it imports and that nothing used here needs: CUDA kernels, slips.
    """

    owner: str
    name: str
    commit: str
    folder: str = "."
    absent: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"https://github.com/{self.owner}/{self.name}"


RELEASES = {
    release.name: release
    for release in (
        Release("IST-DASLab", "gptq", "2d65066eeb06a5c9ff5184d8cebdf33662c67faf"),
        Release(
            "mit-han-lab",
            "llm-awq",
            "d6e797a42b9ef7778de8ee2352116e0f48a78d61",
            absent=("awq_inference_engine", "tinychat", "tinychat.models"),
        ),
        Release("mit-han-lab", "smoothquant", "c61476d728e42ae0d8a35e7e78494edcac3237b5"),
        Release(
            "Intelligent-Computing-Lab-Yale",
            "GPTAQ",
            "883afc64f40ac061a59ef8cbe5bd794c01377e37",
            folder="fake_quant",
            absent=("fast_hadamard_transform",),
        ),
        Release("Aaronhuang-778", "SliM-LLM", "cfdf5ff9a1785ba93197761e47ea66b8786790f2", folder="slim-llm"),
        Release(
            "Aaronhuang-778",
            "BiLLM",
            "dc137ebbf62d4b31e8a82ba6bf9e18a51a298dcb",
            absent=("exceptiongroup", "pyparsing"),
        ),
    )
}


def check(sources: Path) -> None:
    """End with one sentence unless every release is in `sources` at its commit."""
    for release in RELEASES.values():
        clone = sources / release.name
        found = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if found.stdout.strip() != release.commit:
            raise SystemExit(
                f"{clone}: not at commit {release.commit[:7]}, which the comparison is with; "
                f"git clone {release.address} {clone} && git -C {clone} checkout {release.commit}"
            )


def make_importable(sources: Path, name: str) -> None:
    """Let a release's modules be imported, and its CUDA calls do nothing."""
    import torch

    release = RELEASES[name]
    sys.path.insert(0, str(sources / release.name / release.folder))
    for module in release.absent:
        sys.modules[module] = _Absent(module)
    for call in ("synchronize", "empty_cache"):
        setattr(torch.cuda, call, lambda *_, **__: None)
    torch.nn.Module.cuda = lambda module, *_: module
    torch.Tensor.cuda = lambda tensor, *_: tensor
    # On a GPU `.cpu()` copies, and llm-awq keeps what it will change that way.
    torch.Tensor.cpu = lambda tensor, *_: tensor.clone()


class _Absent(types.ModuleType):
    """Has whatever is imported from it."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
