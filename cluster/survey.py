"""A running cluster, node by node: what each has, whether it sees a directory of the driver's, and what time it is."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.devices import CUDA_IDS, NPU_IDS
from cluster.machine import Machine, look_around
from cluster.placement import Node, name_hosts
from cluster.session import visit
from cluster.witness import Witness

_LOOK_SECONDS = 240.0  # a node may load torch from a slow disk
_CLOCK_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One node that Ray counts as alive.

    Args:
        name: as in the names of its workers.
        resources: Ray's: name -> how many.
        machine: what it found in itself; None where it did not answer.
        sees_witness: whether it sees the driver's directory; None where it was not asked.
        clock_off_seconds: how far its clock is ahead of the driver's (behind: negative) at least; None if not known.
        silence: why it did not answer.
    """

    name: str
    resources: Mapping[str, float] = field(default_factory=dict)
    machine: Machine | None = None
    sees_witness: bool | None = None
    clock_off_seconds: float | None = None
    silence: str = ""


def survey(address: str, witness: Witness | None = None) -> tuple[NodeReport, ...]:
    """Ask every node of a running cluster. Takes no core of it, so that a busy one answers too.

    Args:
        address: HOST:PORT.
        witness: what each is to look for.
    Raises:
        ClusterError: nobody answers there.
    """
    with visit(address):
        return _ask_all(witness)


def _ask_all(witness: Witness | None) -> tuple[NodeReport, ...]:
    import ray

    nodes = [
        Node(id=node["NodeID"], address=node["NodeManagerAddress"], resources=node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    hosts = name_hosts(nodes, {})
    asked = {node.id: _on(node, _look).remote(witness) for node in nodes}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LOOK_SECONDS)
    return tuple(_report(node, hosts[node.id], asked[node.id], asks_witness=witness is not None) for node in nodes)


def _report(node: Node, name: str, reference: Any, *, asks_witness: bool) -> NodeReport:
    import ray

    try:
        machine, sees = ray.get(reference, timeout=0)
    except ray.exceptions.RayError as error:
        is_late = isinstance(error, ray.exceptions.GetTimeoutError)
        told = f"no answer within {_LOOK_SECONDS:.0f} s" if is_late else _last_line(error)
        return NodeReport(name=name, resources=node.resources, silence=told)
    return NodeReport(
        name=name,
        resources=node.resources,
        machine=machine,
        sees_witness=sees if asks_witness else None,
        clock_off_seconds=_ask_clock(node),
    )


def _ask_clock(node: Node) -> float | None:
    """By a question of its own, whose answer is quick: the node has a process that is ready by now."""
    import ray

    before = time.time()
    try:
        told = ray.get(_on(node, _tell_time).remote(), timeout=_CLOCK_SECONDS)
    except ray.exceptions.RayError:
        return None
    return clock_off(told, before, time.time())


def clock_off(told: float, before: float, after: float) -> float:
    """By how many seconds another clock is ahead of ours, at least; negative if behind.

    Args:
        told: the other clock's time, read at some moment between `before` and `after` of ours.
        before: ours when asking.
        after: ours when the answer came.
    """
    if told > after:
        return told - after
    return min(told - before, 0.0)


def _on(node: Node, function: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(function)


def _look(witness: Witness | None) -> tuple[Machine, bool]:
    # Ray hides all devices from a task that asks for none, by an empty variable.
    environment = {name: value for name, value in os.environ.items() if value or name not in {NPU_IDS, CUDA_IDS}}
    return look_around(environment), witness is not None and witness.is_seen


def _tell_time() -> float:
    return time.time()


def _last_line(error: Exception) -> str:
    return (str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__])[-1]
