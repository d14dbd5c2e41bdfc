"""Which workers a cluster has room for, and how they are called. Pure: nodes in, places out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from cluster.devices import DeviceKind


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster that is alive.

    Args:
        id: Ray's.
        address: its IP address.
        resources: name -> how many it has in all, whoever uses them.
    """

    id: str
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one worker lives, for as long as its node does.

    Args:
        name: unique among live nodes, and the worker's: `npu-0@10.0.0.1`, or `npu-0.1@10.0.0.1` where devices are
            shared. The number counts a node's devices; which of them Ray hands out, the worker itself knows.
        node_id: Ray's.
    """

    name: str
    node_id: str


def places(
    nodes: Iterable[Node],
    hosts: Mapping[str, str],
    kind: DeviceKind,
    *,
    threads: int = 1,
    per_device: int = 1,
    limit: int | None = None,
) -> list[Place]:
    """A place per device (CPU: per `threads` cores), node by node in their order.

    Args:
        nodes: that are alive.
        hosts: as `name_hosts` has them.
        threads: CPU cores of each worker.
        per_device: workers that share a device; 1 on CPUs.
        limit: most places; None is all there is room for.
    """
    found = (
        Place(name=f"{kind.name}-{slot}@{hosts[node.id]}", node_id=node.id)
        for node in nodes
        for slot in _slots(node, kind, threads, per_device)
    )
    return list(islice(found, limit))


def name_hosts(nodes: Iterable[Node], known: Mapping[str, str]) -> dict[str, str]:
    """Node id -> what its workers' names call it, which stays for as long as the node is alive.

    The address; with the beginning of the node's id where another has that address already, as simulated nodes do.

    Args:
        nodes: that are alive.
        known: what this gave before.
    """
    alive = list(nodes)
    hosts = {node.id: known[node.id] for node in alive if node.id in known}
    for node in alive:
        if node.id not in hosts:
            taken = node.address in hosts.values()
            hosts[node.id] = f"{node.address}-{node.id[:6]}" if taken else node.address
    return hosts


def _slots(node: Node, kind: DeviceKind, threads: int, per_device: int) -> Iterable[str]:
    cores = int(node.resources.get("CPU", 0)) // threads  # a worker takes its cores beside its device
    if kind.resource == "CPU":
        return map(str, range(cores))
    devices = range(int(node.resources.get(kind.resource, 0)))
    if per_device == 1:
        return islice(map(str, devices), cores)
    return islice((f"{device}.{part}" for device in devices for part in range(per_device)), cores)
