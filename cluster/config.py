"""The configuration: one frozen tree, from a YAML file and `--set a.b=c`.

Its keys equal the chart's `config:` keys. This file is the only reader of the environment.
"""

import difflib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.errors import ConfigError

Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
LinkCount = Annotated[int, Field(ge=1, le=128)]  # no process has more links
Seconds = Annotated[float, Field(gt=0)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`; an empty one is every address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("unix")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Give what an older program has pickled the keys that it did not know."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(name, field.get_default(call_default_factory=True))


class ModelConfigSection(_Section):
    """Which model is served."""

    path: str = "demo"
    """A directory with a published checkpoint, or `demo` for the one that is shipped."""
    name: str = ""
    """The name that clients use; the directory's name when empty."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in: auto is bfloat16 where gateways or experts have a GPU, else float32."""


class ProcessSection(_Section):
    """What one process of a role asks of its node."""

    num_cpus: Annotated[float, Field(ge=0)] = 0.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    resources: dict[str, float] = {}
    threads: PositiveCount = 1


class GatewaySection(ProcessSection):
    """Gateways: attention, state and the schedule of steps."""

    count: PositiveCount = 1
    cell_ranks: LinkCount = 128
    """Most gateway ranks of a cell: as many links as an expert worker may have."""
    standby: Count = 0
    """Warm gateways more, with their weights, that take the place of lost ones."""
    tensor_parallel: PositiveCount = 1
    max_sequences: PositiveCount = 32
    max_waiting: Count = 1024
    step_tokens: PositiveCount = 512
    """Token rows that one step may compute, prefill and decode together."""
    block_tokens: PositiveCount = 16
    kv_blocks: Count = 0
    """KV blocks a rank; 0 takes what max_sequences need at a quarter of the context."""
    context_tokens: Count = 0
    """Longest prompt and completion together; 0 takes the model's."""
    micro_batches: Annotated[int, Field(ge=0, le=2)] = 0
    """1 or 2; 0 takes 2 on GPUs with expert workers, else 1: shared cores overlap nothing."""
    drain_s: Seconds = 600.0
    """How long a gateway that leaves may take to finish its sequences, or to hand them over."""
    snapshot_tokens: Count = 64
    """Tokens from one snapshot of a sequence to the next, which another gateway keeps; 0 takes
    none. A gateway that dies then costs each sequence fewer tokens again than that, and those of
    the steps in which a snapshot travels."""
    snapshot_token_bytes: Count = 0
    """Most bytes of recurrent state that snapshots may cost a rank for each token; where
    `snapshot_tokens` would cost more, they are taken more rarely. 0 sets no bound."""
    snapshot_store_bytes: PositiveCount = 2**30
    """Most bytes of snapshots that a gateway keeps for others, in host memory."""
    max_resume_window_s: Seconds = 600.0
    """The longest time for which a request is kept without its client, whatever it asks for."""
    max_deaths: PositiveCount = 3
    """Deaths of gateways in a row with the same request, each less than 8 tokens after the one
    before, after which it is taken for their cause and failed; before the last of them it runs
    beside no other such one."""
    sibling_silence_s: Seconds = 3.0
    """Silence of a rank after which the others give the gateway up."""
    prefix_cache: bool = True
    """Keep prompts' KV and states for later requests of the same tenant that begin alike."""
    prefix_kv_bytes: Count = 0
    """KV a rank that is kept beside what running sequences hold; 0 is all that these leave free."""
    prefix_state_bytes: Count = 0
    """Recurrent states a rank that are kept; 0 takes room for as many as max_sequences."""
    prefix_states_on_host: bool = False
    """Keep these states in host memory instead of the GPU's."""
    prefix_fetch_tokens: Count = 1024
    """Fetch what another gateway keeps of a prompt where that spares more tokens than this, which
    stands for the cost of fetching: the tokens that a gateway computes in the time it takes to get
    one state and its KV. 0 fetches nothing; nor is anything fetched in bit-stable mode."""


class ExpertSection(ProcessSection):
    """Expert workers."""

    workers: Count = 2
    """How many; 0 runs the experts in the gateway's processes."""
    floor: Count = 0
    """Copies wanted of every expert, on distinct workers; 0 takes 2 where two copies of all experts
    fit into half of this machine's memory, else 1; on GPUs 1."""
    slots: Count = 0
    """Slots a worker; 0 takes an even share among `min` workers and spare ones for coverage."""
    pool_slots: dict[str, PositiveCount] = {}
    """Slots of a worker by the pool of its node, where GPUs differ: by the value of the Ray node's
    label `expertmesh/pool`. On other nodes it has `slots`, which must be set then."""
    min: Count = 0
    """Fewest workers, for which slots are sized; 0 takes `workers`."""
    standby: Count = 0
    """Warm workers more, without experts, that take the place of lost ones."""
    max: LinkCount = 128
    """Most workers of a cell: as many links as a gateway rank may have."""

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        if self.pool_slots and not self.slots:
            raise ValueError(
                "pool_slots needs slots, for workers on nodes of other pools: an even share does "
                "not know how many come to which pool"
            )
        return self


class TlsSection(_Section):
    """Transport security of the front doors; PEM files, read again when they change."""

    cert: str = ""
    """The certificate that clients are shown, followed by its chain; empty is cleartext."""
    key: str = ""
    """Its private key."""
    client_ca: str = ""
    """Whom clients' certificates must come from (mTLS): the first name in a certificate, or its
    common name, is the caller's tenant. Empty asks for no certificate."""

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if bool(self.cert) != bool(self.key) or (self.client_ca and not self.cert):
            raise ValueError("set cert and key together; client_ca needs both")
        return self


class FrontDoorSection(ProcessSection):
    """Front doors: what clients connect to."""

    count: PositiveCount = 1
    listen: str = "127.0.0.1:50051"
    """HOST:PORT; port 0 takes a free one. On one machine further front doors take free ports; on a
    Ray cluster all of them take this one, each on its node."""
    health_listen: str = ""
    """HOST:PORT of a cleartext port that answers grpc.health.v1 alone, for probes that speak no
    TLS; taken as `listen` is. Empty opens none."""
    tls: TlsSection = TlsSection()
    api_keys_file: str = ""
    """Who may call: lines of `TENANT: SHA-256 of a key, in hex`, read again when the file changes.
    A tenant may have several. Empty asks for no key."""
    operators: tuple[str, ...] = ()
    """Tenants that may also read the cluster's state, scale and drain; where callers are not
    authenticated, everybody may."""
    insecure: bool = False
    """Listen beyond loopback without keys and without clients' certificates."""

    @model_validator(mode="after")
    def _check_security(self) -> Self:
        """Refuse to serve the world without knowing who calls."""
        host = self.listen.rpartition(":")[0]
        if not (is_loopback(host) or self.api_keys_file or self.tls.client_ca or self.insecure):
            raise ValueError(
                f"{self.listen} is reached from beyond this machine, and anybody could call: set "
                "front_doors.api_keys_file or front_doors.tls.client_ca (with cert and key), "
                "listen on 127.0.0.1, or say --insecure (front_doors.insecure) if you mean it"
            )
        return self

    max_requests: PositiveCount = 1024
    """Requests in flight before new ones are refused."""
    max_waiting: PositiveCount = 256
    """Those of them without a token yet."""
    gateway_wait_s: Seconds = 60.0
    """How long a request waits when no gateway can take it."""
    gateway_silence_s: Seconds = 2.0
    """Silence after which a gateway's requests go on elsewhere."""
    max_message_bytes: PositiveCount = 16 * 2**20
    drain_s: Seconds = 30.0


class DispatchSection(_Section):
    """Links between gateway ranks and expert workers."""

    transport: Literal["gloo", "nccl"] = "gloo"
    """What carries the rows: Gloo over host memory (pinned on GPUs), or NCCL between GPUs."""
    bit_stable: bool = False
    """Tokens independent, to the bit, of batch and placement; slower."""
    capacity_rows: PositiveCount = 512
    """Rows that one message may hold; more rows take several messages."""
    first_deadline_s: Seconds = 2.0
    """Deadline of a call while nothing is known of any worker, and the longest for a new one."""


class ControlSection(_Section):
    """The controller."""

    journal: str = ""
    """Directory on durable storage; when empty, a temporary one that no later cluster reads."""
    cells: PositiveCount = 1
    """Cells: gateways are shared out among them, and so are expert workers, which hold every expert
    in each; gateways call the workers of their cell, and others for what these have lost."""
    pulse_s: Seconds = 0.5
    silence_s: Seconds = 3.0
    """Silence after which what a worker alone holds is loaded elsewhere."""
    lost_s: Seconds = 15.0
    """Silence after which a member is given up, if others hold what it holds."""
    restore_s: Seconds = 20.0
    """How long a missing copy waits for a worker that is on its way, while another copy exists."""
    rebalance_s: Annotated[float, Field(ge=0)] = 0.0
    """How often experts are placed anew by load, while requests run; 0 for never."""
    rebalance_gain: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the busiest workers' experts that a new placement must save to be taken."""
    rebalance_moves: PositiveCount = 1024
    """Replicas that one new placement may load."""
    rebalance_always: bool = False
    """Place for another imagined load each time; for tests."""
    allow_chaos: bool = False
    """Whether faults may be injected; for tests."""
    resources: dict[str, float] = {}
    """What the controller asks of its node, such as a resource of the nodes that mount `journal`;
    when empty it runs where it was started from."""
    start_timeout_s: Seconds = 600.0


class PoolScalingSection(_Section):
    """How the number of one role's members follows load."""

    min: PositiveCount = 1
    """Fewest members; never fewer than hold every expert."""
    max: Count = 0
    """Most members; 0 leaves their number to this file and to `expertmesh scale`."""
    up_s: Annotated[float, Field(ge=0)] = 2.0
    """For how long more must have been needed before they are added."""
    down_s: Annotated[float, Field(ge=0)] = 120.0
    """For how long fewer must have sufficed before one in ten leaves, and one at least."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max and self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class ExpertScalingSection(PoolScalingSection):
    """Expert workers, by what is seen at them."""

    target: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The share of time in which each worker is to compute."""
    queue_s: Seconds = 0.25
    """Wait of a call at a worker above which more are added."""
    waiting: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of its steps' time that a gateway may wait for experts while a worker is above the
    target, before more are added."""


class GatewayScalingSection(PoolScalingSection):
    """Gateways, by the room that is left in them."""

    target: Annotated[float, Field(gt=0, le=1)] = 0.7
    """The share of a gateway's KV or state blocks, of whichever fills first, that is to be held."""
    step_s: Annotated[float, Field(ge=0)] = 0.0
    """Time of a gateway's step above which more are added; 0 sets none."""


class KubeRaySection(_Section):
    """The RayCluster whose `replicas` are written where nobody else does; with actuator kuberay."""

    cluster: str = ""
    """Its name."""
    namespace: str = "default"
    experts: str = "expert"
    """Its worker group for expert workers."""
    gateways: str = "gateway"
    front_doors: str = "frontdoor"


class AutoscalerSection(_Section):
    """How many members there are, by load, and whence their nodes come."""

    experts: ExpertScalingSection = ExpertScalingSection()
    gateways: GatewayScalingSection = GatewayScalingSection()
    period_s: Seconds = 1.0
    """How often load is looked at."""
    ahead_s: Annotated[float, Field(ge=0)] = 20.0
    """How long before it is there a rising load is met: about what a new member takes to serve."""
    actuator: Literal["ray", "kuberay"] = "ray"
    """Who brings and takes nodes: Ray's autoscaler, by what waiting processes ask for, or the
    controller itself, which then writes a RayCluster's `replicas`. With ray, nodes may be fixed."""
    kuberay: KubeRaySection = KubeRaySection()

    @model_validator(mode="after")
    def _check_actuator(self) -> Self:
        if self.actuator == "kuberay" and not self.kuberay.cluster:
            raise ValueError("actuator kuberay needs kuberay.cluster, the RayCluster's name")
        return self


class TelemetrySection(_Section):
    """Logs and metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    logs_to_console: bool = False
    """Forward every process's log to the command's standard error."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Count = 0
    """Port of the first front door's page, on a Ray cluster of every member's, each on its node. 0
    takes a free one, as other processes do, and as happens where the port is taken."""


class ClusterConfig(_Section):
    """Everything that can be set."""

    model: ModelConfigSection = ModelConfigSection()
    gateways: GatewaySection = GatewaySection()
    experts: ExpertSection = ExpertSection()
    front_doors: FrontDoorSection = FrontDoorSection()
    dispatch: DispatchSection = DispatchSection()
    control: ControlSection = ControlSection()
    autoscaler: AutoscalerSection = AutoscalerSection()
    telemetry: TelemetrySection = TelemetrySection()

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of weights and rows, the same in all processes: links carry no other."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.gateways.num_gpus or self.experts.num_gpus else "float32"

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        cells = self.control.cells
        workers = cells * self.experts.max
        gateways = cells * (self.gateways.cell_ranks // self.gateways.tensor_parallel)
        for key, count, most, limit in (
            ("experts.workers", self.experts.workers, workers, "experts.max"),
            ("autoscaler.experts.max", self.autoscaler.experts.max, workers, "experts.max"),
            ("gateways.count", self.gateways.count, gateways, "gateways.cell_ranks"),
            (
                "autoscaler.gateways.max",
                self.autoscaler.gateways.max,
                gateways,
                "gateways.cell_ranks",
            ),
        ):
            if count > most and self.experts.workers:
                raise ValueError(
                    f"{key}: {count} is above {most}, for which the links of a process suffice "
                    f"({limit}, times control.cells, which is {cells})"
                )
        for key, count in (
            ("experts.workers", self.experts.workers or cells),
            ("experts.min", self.experts.min or cells),
            ("gateways.count", self.gateways.count),
        ):
            if count < cells:
                raise ValueError(f"{key}: {count} is too few for {cells} cells (control.cells)")
        return self

    @model_validator(mode="after")
    def _check_transport(self) -> Self:
        if self.dispatch.transport == "nccl" and not (
            self.gateways.num_gpus and self.experts.num_gpus
        ):
            raise ValueError("dispatch.transport: nccl needs num_gpus of gateways and of experts")
        return self


def load_config(
    path: Path | None = None,
    settings: Iterable[str] = (),
    given: Mapping[str, object] = MappingProxyType({}),
) -> ClusterConfig:
    """Read the YAML file, lay `given` values and `a.b=value` settings over it and validate it all.

    Values of settings are read as YAML, so `experts.workers=3` is a number.

    Raises:
        ConfigError: The file cannot be read, or keys or values are wrong; all of them are listed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} must hold a mapping at its top, not {type(tree).__name__}")
    for key, value in given.items():
        _put(tree, key, value)
    for setting in settings:
        _apply(tree, setting)
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> ClusterConfig:
    """Return the validated configuration of a plain tree of values.

    Raises:
        ConfigError: Keys or values are wrong; all of them are listed with their paths.
    """
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(dict(e)) for e in error.errors()]
        raise ConfigError("the configuration is wrong:\n  " + "\n  ".join(problems)) from error


def build_name() -> str:
    """Return what this program is called where it was built, such as its image's tag."""
    return os.environ.get("EXPERTMESH_BUILD", "")


def ray_environment() -> dict[str, str]:
    """Switch off what Ray would do unasked, before it is imported: reports of use, token files.

    A value that the user has set stays.
    """
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRPC_VERBOSITY": "ERROR",
        # torch's stores look their own address up; a silent name server must not stall them.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    return {key: os.environ[key] for key in quiet}


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {setting}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not YAML: {error}") from error
    _put(tree, key, value)


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.split(".")
    node = tree
    for part in path:
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{key}: {part} is a value, not a section")
        node = below
    node[last] = value


def _problem(error: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # a rule over several keys, which names them
        return f"{path}{': ' if path else ''}{error['ctx']['error']}"
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['msg']} (got {error['input']!r})"
    known = _keys_of(error["loc"][:-1])
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"
    return f"{path}: unknown key; {hint}"


def _keys_of(path: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] = ClusterConfig
    for part in path:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
