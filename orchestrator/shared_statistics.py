"""Statistics of float models on disk, by content: computed by the first worker that needs them, read by all others.

They live in the node's cache, so sweeps share them too. A file lock makes the others wait; it is released by the
operating system when its holder dies, and what was not finished is not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import BitatlasError, reason

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from quantizers.statistics import InputStatistics

Make = Callable[[], Iterator[Sequence["InputStatistics"]]]


def statistics_key(model: Mapping[str, str], windows: NDArray[np.int64], *, hessians: bool) -> str:
    """Content hash of all that the statistics depend on.

    Args:
        model: its `digest` and `dtype`.
        windows: calibration tokens.
        hessians: whether Hessians are among them.
    """
    from quantizers.float_statistics import VERSION

    facts = f"{VERSION} {model['digest']} {model['dtype']} {hessians} {windows.shape} "
    return hashlib.sha256(facts.encode() + windows.tobytes()).hexdigest()[:32]


def shared_statistics(directory: Path, make: Make, device: torch.device) -> Callable[[int], Sequence[InputStatistics]]:
    """What `make` yields per block, from `directory` where it is there, else computed into it.

    Args:
        directory: named by `statistics_key`.
        make: computes them, block by block.
        device: where they are wanted.
    Raises:
        BitatlasError: on reading, where a file was damaged.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_suffix(".lock")):
        if not directory.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                for index, stages in enumerate(make()):
                    (scratch / _block_file(index)).write_bytes(_pack(stages))
                scratch.chmod(0o755)
                scratch.rename(directory)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return lambda index: _unpack(directory / _block_file(index), device)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="ascii") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _block_file(index: int) -> str:
    return f"block-{index:04d}.safetensors"


def _pack(stages: Sequence[InputStatistics]) -> bytes:
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for number, stage in enumerate(stages):
        if stage.ranges is None:
            raise AssertionError("statistics of the float model always have ranges")
        tensors |= {
            f"{number}.low": stage.ranges.low_I,
            f"{number}.high": stage.ranges.high_I,
            f"{number}.mean_abs": stage.ranges.mean_abs_I,
        }
        if stage.hessian_II is not None:
            tensors[f"{number}.hessian"] = stage.hessian_II
    packed: bytes = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return packed


def _unpack(file: Path, device: torch.device) -> list[InputStatistics]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from quantizers.statistics import InputRanges, InputStatistics

    try:
        tensors = {name: tensor.to(device) for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise BitatlasError(
            f"statistics {file} cannot be read ({reason(error)}); delete {file.parent} and run the same command again"
        ) from error
    stages = 1 + max(int(name.partition(".")[0]) for name in tensors)
    return [
        InputStatistics(
            ranges=InputRanges(
                low_I=tensors[f"{number}.low"],
                high_I=tensors[f"{number}.high"],
                mean_abs_I=tensors[f"{number}.mean_abs"],
            ),
            hessian_II=tensors.get(f"{number}.hessian"),
        )
        for number in range(stages)
    ]
