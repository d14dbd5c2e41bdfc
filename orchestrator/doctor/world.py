"""What the doctor looks at, described: made up in tests, gathered from the machine otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.machine import Machine
from cluster.survey import NodeReport


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor: what was looked at, what was found, and the remedy where something is wrong.

    Args:
        fatal: a sweep would fail.
    """

    subject: str
    found: str
    remedy: str = ""
    fatal: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The workers that a sweep asks for, as `workers` in its file."""

    device: str = "auto"
    count: int | str = "auto"
    threads: int = 1
    per_device: int = 1
    strict: bool = True


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running Ray cluster that was asked for.

    Args:
        address: HOST:PORT.
        nodes: those alive.
        trouble: why it could not be looked at.
    """

    address: str
    nodes: tuple[NodeReport, ...] = ()
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory in which a sweep writes.

    Args:
        what: how to name it.
        path: where it is, or is to be.
        free_bytes: on its disk; None where nobody can tell.
        trouble: why nothing can be written there.
    """

    what: str
    path: str
    free_bytes: int | None = None
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that a sweep reads.

    Args:
        what: "model tiny", "corpus lambada".
        found: where it is, or what is known of it.
        trouble: why a sweep would fail, with the remedy; empty where it would not.
        is_far: it is not on this machine, and a sweep would get it from the Hub.
    """

    what: str
    found: str
    trouble: str = ""
    is_far: bool = False


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything.

    Args:
        machine: this one.
        packages: that a sweep needs -> version; None where one is missing.
        packaged: the model and data of the embedded default -> whether it is installed.
        asked: workers; the defaults where no sweep was named.
        cluster: None where none was asked for.
        out: the directory of `--out`; None where none was.
        places: other directories that are written.
        needs: of the sweep.
    """

    machine: Machine
    packages: Mapping[str, str | None] = field(default_factory=dict)
    packaged: Mapping[str, bool] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)
    cluster: Cluster | None = None
    out: Place | None = None
    places: tuple[Place, ...] = ()
    needs: tuple[Need, ...] = ()

    @property
    def hosts(self) -> tuple[tuple[str, Machine], ...]:
        """Machines on which workers would run, with how findings name each: the cluster's nodes that answered, else
        this one."""
        if self.cluster is None:
            return (("", self.machine),)
        return tuple((node.name, node.machine) for node in self.cluster.nodes if node.machine is not None)
