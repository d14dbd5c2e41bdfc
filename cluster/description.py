"""The description of a cluster: one strict document, from which every deployment file is rendered. No Ray, no IO here.

What ends up in shell commands and YAML is held to plain characters, so that templates may write it as it is.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cluster.errors import ClusterError

# What an Ascend chip is called in the tags of CANN's images.
CHIPS = {"Ascend910B1": "910b", "Ascend910B2": "910b", "Ascend910B3": "910b", "Ascend910B4": "910b"}


def _told(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("told", "{sentence}", {"sentence": sentence})


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise _told(f"= {path!r} is not absolute; give the path that every node sees, such as /shared")
    return path


def _word(text: str) -> str:
    if text in {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}:
        raise _told(f"= {text!r} is a word that YAML takes for something else; choose another")
    return text


def _address(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError as error:
        raise _told(
            f"= {text!r} is no IPv4 address; Ray's launcher compares addresses, so give one, not a name"
        ) from error


_PLAIN = r"^[A-Za-z0-9._/~+-]+$"
Label = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=40), AfterValidator(_word)]
Path = Annotated[str, Field(pattern=_PLAIN, max_length=200), AfterValidator(_absolute)]
KeyPath = Annotated[str, Field(pattern=r"^[~/]" + _PLAIN[1:], max_length=200)]
Address = Annotated[str, AfterValidator(_address)]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:-]*(:[A-Za-z0-9._-]+|@sha256:[0-9a-f]{64})$")]
Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9A-Za-z]+)*$")]
Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]*(Gi|Mi|Ti)$")]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1024, le=65535)]
Qualified = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        for key in value:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), list(cls.model_fields), 1)
                hint = f"; did you mean {near[0]!r}" if near else ""
                raise _told(f"unknown key {key!r}{hint}; the keys here are {', '.join(cls.model_fields)}")
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


class Versions(_Strict):
    """What the image holds, and what every host has; the Python is the base image's.

    torch and torch-npu are a pair that CANN's version decides: https://github.com/Ascend/pytorch, COMPATIBILITY.md.
    """

    python: Annotated[str, Field(pattern=r"^3\.(1[1-9]|[2-9][0-9])$")] = "3.11"
    ray: Version = "2.60.0"
    cann: Version = "9.1.0"
    torch: Version = "2.12.0"
    torch_npu: Version = "2.12.0.post3"  # the first of 2.12 whose fallback to the CPU can be switched off

    @model_validator(mode="after")
    def _fit(self) -> Versions:
        if self.torch_npu.split(".")[:2] != self.torch.split(".")[:2]:
            raise _told(
                f"torch_npu {self.torch_npu} is made for torch {'.'.join(self.torch_npu.split('.')[:2])}.*, not "
                f"{self.torch}; give a pair that goes with CANN {self.cann}"
            )
        if tuple(int(part) for part in self.ray.split(".")[:2] if part.isdecimal()) < (2, 55):
            raise _told(f"ray {self.ray} is too old; Bitatlas needs 2.55 or newer")
        return self


class Token(_Strict):
    """Where the cluster's token is; never the token.

    Args:
        file: on every host, readable by the user who starts Ray alone; by default secret/ray-token in the shared
            directory. Pods have no use for it.
        secret: the Kubernetes Secret that holds it under `auth_token`; by default it is called as the cluster is.
    """

    file: Path | None = None
    secret: Label | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_token(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise _told(
                "is a text; a description holds no token: give {file: PATH} or {secret: NAME}, where it is kept"
            )
        if isinstance(value, Mapping):
            for key in {"value", "token", "auth_token", "text"} & {str(key) for key in value}:
                raise _told(f"{key} is given; a description holds no token: give file or secret, where it is kept")
        return value


class Ports(_Strict):
    """Ports on each node."""

    gcs: Port = 6379
    dashboard: Port = 8265
    metrics: Port = 8080
    npu_exporter: Port = 8082

    @model_validator(mode="after")
    def _differ(self) -> Ports:
        seen: dict[int, str] = {}
        for name, port in self:
            if port in seen:
                raise _told(f"{seen[port]} and {name} are both {port}; give each its own")
            seen[port] = name
        return self


class Node(_Strict):
    """One host with NPUs."""

    address: Address
    npus: Count


class BareMetal(_Strict):
    """Hosts that `ray up` reaches by ssh; the first is the head, and works too.

    Args:
        ssh_user: the same on every host.
        ssh_key: the private key that opens them; `ray up` copies it to the head, which starts the others.
        environment: the virtual environment with Bitatlas, at the same place on every host.
    """

    nodes: tuple[Node, ...] = Field(min_length=1)
    ssh_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]*$"), AfterValidator(_word)]
    ssh_key: KeyPath = "~/.ssh/id_ed25519"
    environment: Path = "/opt/bitatlas"

    @field_validator("nodes")
    @classmethod
    def _once(cls, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        seen: dict[str, int] = {}
        for index, node in enumerate(nodes):
            if node.address in seen:
                raise _told(
                    f"[{index}].address = {node.address} is nodes[{seen[node.address]}] too; name each host once"
                )
            seen[node.address] = index
        return nodes


class Head(_Strict):
    """The head pod: the driver and Ray's own services, no NPU."""

    cpus: Count = 8
    memory: Quantity = "32Gi"


class WorkerGroup(_Strict):
    """Pods alike: each takes `npus` of one server."""

    name: Label = "npu"
    replicas: Count
    npus: Count
    cpus: Count
    memory: Quantity


class Kubernetes(_Strict):
    """Pods that KubeRay makes.

    Args:
        npu_resource: what Ascend's device plugin calls an NPU.
        shared_claim: a PersistentVolumeClaim that many nodes may write (ReadWriteMany); by default NAME-shared.
        scheduler: schedulerName of the pods, such as volcano; none: Kubernetes' own.
        node_selector: labels of the servers that worker pods may go to.
        mount_driver: mount the hosts' /usr/local/Ascend/driver into worker pods.
    """

    workers: tuple[WorkerGroup, ...] = Field(min_length=1)
    namespace: Label = "default"
    head: Head = Head()
    npu_resource: Qualified = "huawei.com/Ascend910"
    shared_claim: Label | None = None
    scheduler: Label | None = None
    node_selector: dict[Qualified, Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]] = {}
    mount_driver: bool = True

    @field_validator("workers")
    @classmethod
    def _once(cls, workers: tuple[WorkerGroup, ...]) -> tuple[WorkerGroup, ...]:
        names = [group.name for group in workers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _told(f"[{index}].name = {name!r} is used twice; give each group its own name")
        return workers


class Description(_Strict):
    """A whole cluster: on hosts (`bare_metal`), in Kubernetes, or the same one in both."""

    name: Label
    device: str = "Ascend910B1"
    image: Image | None = None
    base_image: Image | None = None
    versions: Versions = Versions()
    set_env: Path = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
    shared_directory: Path
    token: Token = Token()
    dashboard_host: Literal["127.0.0.1", "0.0.0.0"] = "127.0.0.1"
    ports: Ports = Ports()
    monitoring: bool = True
    bare_metal: BareMetal | None = None
    kubernetes: Kubernetes | None = None

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if device not in CHIPS:
            raise _told(f"= {device!r} is not known; use one of {', '.join(CHIPS)}")
        return device

    @model_validator(mode="after")
    def _whole(self) -> Description:
        if self.bare_metal is None and self.kubernetes is None:
            raise _told("it names neither bare_metal nor kubernetes; say where the cluster is to run")
        if self.kubernetes is not None and self.image is None:
            raise _told(
                "image is missing; pods need one: give the name that the Dockerfile's image gets in your registry"
            )
        return self

    @property
    def base(self) -> str:
        """The image that the Dockerfile starts from: CANN's own for this chip, CANN and Python, if none is named."""
        versions = self.versions
        tag = f"{versions.cann.lower()}-{CHIPS[self.device]}-ubuntu22.04-py{versions.python}"
        return self.base_image or f"quay.io/ascend/cann:{tag}"

    @property
    def token_file(self) -> str:
        """The file with the token on every host."""
        return self.token.file or f"{self.shared_directory.rstrip('/')}/secret/ray-token"

    @property
    def secret(self) -> str:
        """The Secret with the token."""
        return self.token.secret or self.name

    @property
    def claim(self) -> str:
        """The claim of the shared directory."""
        given = self.kubernetes.shared_claim if self.kubernetes else None
        return given or f"{self.name}-shared"

    @property
    def is_dashboard_local(self) -> bool:
        """Whether nobody beyond the head's own host (or pod) reaches the dashboard."""
        return self.dashboard_host == "127.0.0.1"


def parse_description(document: Any, file: str) -> Description:
    """Check a description.

    Args:
        document: what the YAML holds.
        file: the name to put before every complaint.
    Raises:
        ClusterError: one sentence that names the field and the rule.
    """
    if not isinstance(document, dict):
        held = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise ClusterError(
            f"{file} {held}; a cluster description is a mapping of {', '.join(Description.model_fields)}"
        )
    try:
        return Description.model_validate(document)
    except ValidationError as error:
        raise ClusterError(f"{file}: {_describe(error)}") from error


_RULES = {
    "name": "a DNS label: at most 40 lowercase letters, digits and hyphens, a letter first",
    "image": "an image with its tag or digest, such as registry.local/bitatlas:0.1.0",
    "memory": "a whole number of Mi, Gi or Ti, such as 512Gi",
    "python": "3.11 or newer, as '3.11' in quotes",
    "token file": "an absolute path of letters, digits and . _ - + /",
    "token secret": "the name of a Secret, a DNS label",
    "path": "made of letters, digits and . _ - + /, at most 200 of them",
}
_RULE_OF = dict.fromkeys(("name", "secret", "namespace", "shared_claim", "scheduler"), "name") | {
    "image": "image",
    "base_image": "image",
    "memory": "memory",
    "python": "python",
    **dict.fromkeys(("file", "shared_directory", "set_env", "environment", "ssh_key"), "path"),
}

_ABSENT = {"missing": "missing", "too_short": "empty; give at least one"}
_TYPES = {
    "model_type": "a mapping of its fields",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "a text; put it in quotes",
    "int_type": "a whole number",
    "bool_type": "true or false",
}


def _describe(error: ValidationError) -> str:
    """The first complaint as one line: field, value and rule."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    message, kind, value = first["msg"], first["type"], first["input"]
    if kind == "told" and not path.startswith("token."):
        joint = "" if not path or message.startswith("[") else " " if message.startswith(("= ", "is ")) else ": "
        return f"{path}{joint}{message}"
    if kind in _ABSENT:
        return f"{path} is {_ABSENT[kind]}"
    if path.startswith("token."):  # not its value: somebody may have put the token itself there
        return f"{path} must be {_RULES['token ' + path.removeprefix('token.')]}; the token itself is never given here"
    field = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "")
    if kind in {"string_pattern_mismatch", "string_too_long"} and field in _RULE_OF:
        return f"{path} = {value!r} must be {_RULES[_RULE_OF[field]]}"
    if kind in _TYPES:
        return f"{path} = {value!r} must be {_TYPES[kind]}"
    return f"{path} = {value!r} {message.replace('Input should be', 'must be').replace('String should', 'must')}"
