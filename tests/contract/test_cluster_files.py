"""Images, cluster descriptions and launch scripts: well-formed, closed to strangers, and of settings that a run would accept.

Nothing here starts a container, a Kubernetes cluster, Slurm or a cloud.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tagpr.configuration import compose, resolve
from tagpr.dry_run import dry_run
from tagpr.prmu.wire import HEALTH_PATH
from tagpr.rl.checks import check

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "recipes" / "cluster"
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
KUBERAY = sorted(CLUSTER.glob("kuberay_*.yaml"))
SCRIPTS = sorted(CLUSTER.glob("*.sh"))

INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "USER", "WORKDIR", "COPY", "CMD"}
GPU_HARDWARE = {"gpu8": (1, 8), "gpu16": (2, 8), "gpu32": (4, 8), "gpu1_lora": (1, 1)}


# images


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continuation lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_made_by_setup_and_runs_as_nobody_special(path: Path) -> None:
    steps = instructions(path)
    assert {name for name, _ in steps} <= INSTRUCTIONS
    assert steps[0][0] == "FROM"
    assert ":" in steps[0][1]
    assert not steps[0][1].endswith(":latest")
    names = [name for name, _ in steps]
    assert [text for name, text in steps if name == "USER"] == ["tagpr"]
    hardware = path.suffix[1:]
    (setup,) = [
        n for n, (name, text) in enumerate(steps) if name == "RUN" and f"recipes/setup.sh {hardware}" in text
    ]
    assert names.index("USER") < setup
    # Pins live in pyproject.toml alone.
    assert not any("pip install" in text for _, text in steps)
    copied = {text.split()[-2] for name, text in steps[:setup] if name == "COPY"}
    assert {f"{package}/__init__.py" for package in ("tagpr", "reward_server", "data_pipeline")} <= copied
    for name, text in steps:
        if name == "COPY":
            for source in [part for part in text.split()[:-1] if not part.startswith("--")]:
                assert (ROOT / source).exists(), source
        if name in ("ENV", "ARG"):
            assert not re.search(r"(?i)(token|secret|password|_key)\w*=", text)
        if name == "RUN":
            done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_the_gpu_image_has_the_cuda_that_torch_is_built_with() -> None:
    # torch 2.11.0's own requirements name cuda-toolkit 13.0.2; flash-attn is compiled against it.
    assert 'gpu = ["torch==2.11.0"' in (ROOT / "pyproject.toml").read_text()
    assert instructions(ROOT / "docker" / "Dockerfile.gpu")[0][1].startswith("nvidia/cuda:13.0.2-devel-")


def test_images_hold_no_data_no_history_and_no_token() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert {".git", ".venv", "outputs", "**/*.safetensors", "**/.env", "**/token"} <= set(ignored)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_dry_run_that_ends_an_image_passes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = [text for name, text in instructions(path) if name == "RUN" and "--dry-run" in text]
    _, _, module, stage, *overrides = shlex.split(command)
    assert module == "tagpr"
    assert dry_run(stage, [override for override in overrides if override != "--dry-run"])


# hardware


@pytest.mark.parametrize("stage", ["guided_rl", "exploratory_rl"])
@pytest.mark.parametrize("hardware", GPU_HARDWARE)
def test_the_tested_hardware_composes_and_verl_takes_it(stage: str, hardware: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = resolve(
        compose(stage, ["setting=paper", f"rl_hardware={hardware}", "prmu_client.url=http://prmu:8200"])
    )
    check(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == GPU_HARDWARE[hardware]
    assert config.trainer.device == "cuda"
    # The batch is the paper's on all of them: the number of GPUs changes nothing that is learned.
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (128, 5, 32)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (3e-4, 4e-4)
    # Adapters take the base model's type: at these rates updates in bf16 are rounded away.
    assert actor.fsdp_config.model_dtype == "fp32"
    lora = config.actor_rollout_ref.model.lora_rank
    assert (lora > 0) == (hardware == "gpu1_lora")
    # vLLM is sent the adapters alone, so that it has to read the base model itself.
    assert (rollout.load_format == "safetensors") == (lora > 0)


# Kubernetes


def documents(path: Path) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def cluster_of(path: Path) -> dict[str, Any]:
    found = documents(path)
    spec: dict[str, Any] = (
        found["RayCluster"]["spec"] if "RayCluster" in found else found["RayJob"]["spec"]["rayClusterSpec"]
    )
    return spec


def pods(path: Path) -> dict[str, Any]:
    spec = cluster_of(path)
    found = {"head": spec["headGroupSpec"]["template"]["spec"]}
    found |= {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    found["prmu"] = documents(path)["Deployment"]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_clusters_want_a_token_and_place_their_pools(path: Path) -> None:
    found, spec = documents(path), cluster_of(path)
    kind = next(iter(found))
    assert found[kind]["apiVersion"] == "ray.io/v1"
    known = {
        "RayCluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"},
        "RayJob": {
            "entrypoint",
            "backoffLimit",
            "shutdownAfterJobFinishes",
            "ttlSecondsAfterFinished",
            "rayClusterSpec",
        },
    }
    assert set(found[kind]["spec"]) == known[kind]
    assert set(spec) == known["RayCluster"]
    assert spec["authOptions"] == {"mode": "token"}
    (pinned,) = re.findall(r'"ray\[default\]==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert spec["rayVersion"] == pinned
    # rayStartParams are a map of strings.
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpus = {
        name: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0")
        for name, pod in pods(path).items()
    }
    assert gpus == {"head": "0", "policy": "8", "prmu": "1"}


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kubernetes_pods_are_confined_and_complete(path: Path) -> None:
    for name, pod in pods(path).items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits["memory"] == requests["memory"]
            assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")
            for variable in container["env"]:
                secret = re.search(r"TOKEN|KEY|SECRET", variable["name"])
                assert bool(secret) == ("valueFrom" in variable), variable["name"]
    found = documents(path)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert (
        found["Service"]["spec"]["selector"]
        == labels
        == found["Deployment"]["spec"]["selector"]["matchLabels"]
    )
    port = found["Service"]["spec"]["ports"][0]["port"]
    (container,) = pods(path)["prmu"]["containers"]
    assert f"server.port={port}" in container["args"]
    assert [each["containerPort"] for each in container["ports"]] == [port]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": HEALTH_PATH, "port": "http"}
    # One GPU more is not there for a second copy.
    assert found["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    assert f"http://{found['Service']['metadata']['name']}:{port}" in path.read_text()


# commands


def commands() -> list[tuple[str, list[str]]]:
    """Stages with the overrides that the files give them."""
    job = documents(CLUSTER / "kuberay_rayjob.yaml")["RayJob"]["spec"]["entrypoint"]
    sky = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    prmu = documents(CLUSTER / "kuberay_raycluster.yaml")["Deployment"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    usage = re.search(r"sbatch --nodes=2 recipes/cluster/slurm\.sh (.*)", (CLUSTER / "slurm.sh").read_text())
    assert usage
    return [
        (job.split()[3], job.split()[4:]),
        (sky["envs"]["STAGE"], [*sky["envs"]["OVERRIDES"].split(), "prmu_client.url=http://head:8200"]),
        (prmu["command"][3], prmu["args"]),
        (usage[1].split()[0], [*usage[1].split()[1:], "prmu_client.url=http://head:8200"]),
    ]


@pytest.mark.parametrize(("stage", "overrides"), commands())
def test_the_commands_in_the_files_pass_a_dry_run(
    stage: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dry_run(stage, overrides)


def test_skypilot_task_is_of_known_fields_and_keeps_its_secrets() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    known = {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "volumes", "setup", "run"}
    assert set(task) == known
    image = instructions(ROOT / "docker" / "Dockerfile.gpu")[0][1]
    assert task["resources"]["image_id"] == f"docker:{image}"
    assert list(task["volumes"]) == ["/shared"]
    # Given on the command line, never here.
    assert set(task["secrets"].values()) == {None}
    assert "RAY_AUTH_MODE=token" in task["run"]
    assert "ray stop" not in task["run"]


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilot_scripts_are_shell(part: str) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    subprocess.run(["bash", "-n", "-c", task[part]], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no role"),
        (["tail"], "tail is no role"),
        (["worker"], "no address"),
        (["worker", "h:1"], "no token there"),
    ],
)
def test_a_node_without_a_role_or_token_does_not_start(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(CLUSTER / "ray_node.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_slurm_wants_a_stage() -> None:
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no stage" in done.stderr


# What slurm.sh calls, on two nodes: each notes what it was asked; what would go on for ever sleeps until it is ended.
SLURM = {
    "scontrol": "echo gpu1; echo gpu2",
    "sleep": "exit 0",
    "srun": """
while [[ $1 == -* ]]; do if [[ $1 == -w ]]; then node=$2; shift; fi; shift; done
if [[ $1 == bash && $2 == -c ]]; then echo "10.0.0.${node#gpu}"; exit; fi
echo "$node $SRUN_CPUS_PER_TASK ${TAGPR_NODE_IP:-} $(cat "$RAY_AUTH_TOKEN_PATH" | wc -c) $*" >>calls
exec -a stands_for_a_node /bin/sleep 600
""",
    "python": """
if [[ $1 == -c ]]; then echo 2; exit; fi
echo "driver $RAY_ADDRESS $*" >>calls
exit 75
""",
}


@pytest.mark.parametrize("placement", ["shared", "separate"])
def test_slurm_starts_nodes_and_prmu_then_the_stage_and_ends_all(placement: str, tmp_path: Path) -> None:
    commands, clone = tmp_path / "bin", tmp_path / "clone"
    for name, body in SLURM.items():
        path = (clone / ".venv" / "bin" if name == "python" else commands) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {
        "PATH": f"{commands}:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(clone),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_CPUS_PER_TASK": "96", "TAGPR_PRMU": placement,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh"), "guided_rl", "setting=paper"],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    calls = (clone / "calls").read_text().splitlines()
    started = sorted(line for line in calls if "ray_node.sh" in line)
    wanted = ["gpu1 96 10.0.0.1 64 bash recipes/cluster/ray_node.sh head --port=6379"]
    if placement == "shared":
        wanted.append("gpu2 96 10.0.0.2 64 bash recipes/cluster/ray_node.sh worker 10.0.0.1:6379")
    assert started == wanted
    (prmu,) = [line for line in calls if "serve_prmu" in line]
    at = "10.0.0.1" if placement == "shared" else "10.0.0.2"
    assert prmu.startswith("gpu1 " if placement == "shared" else "gpu2 ")
    assert f"server.host={at} server.port=8200" in prmu
    (driver,) = [line for line in calls if line.startswith("driver")]
    assert driver.startswith("driver 10.0.0.1:6379 -m tagpr guided_rl setting=paper ")
    assert f"prmu_client.url=http://{at}:8200" in driver
    # The tokens are gone, and so is what was started.
    assert list((clone / "outputs").iterdir()) == []
