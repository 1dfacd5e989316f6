"""What travels to a cluster and what does not, and that a job's exit status is the launcher's."""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tagpr import ray_jobs
from tagpr.configuration import compose
from tagpr.errors import ConfigError, StageError
from tagpr.ray_jobs import absolute_overrides, forwarded, is_secret, ship_sources, submit


def test_only_sources_travel_with_their_plugins(tmp_path: Path) -> None:
    size = ship_sources(tmp_path)
    assert (tmp_path / "tagpr" / "config" / "guided_rl.yaml").is_file()
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".dist-info")} == set(
        ray_jobs.PACKAGES
    )
    (declared,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert "[verl.plugins]" in declared.read_text()
    assert "[vllm.general_plugins]" in declared.read_text()
    for path in tmp_path.rglob("*"):
        assert "__pycache__" not in path.parts
        assert not path.is_file() or path.suffix in ray_jobs.SOURCE_SUFFIXES or path.parent == declared.parent
    assert 100_000 < size < ray_jobs.LARGEST_SOURCES_BYTES


def test_data_and_models_among_the_sources_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "clone"
    for name in ray_jobs.PACKAGES:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    left = [
        "tagpr/model.safetensors",
        "tagpr/train.parquet",
        "tagpr/.env",
        "tagpr/outputs/a.json",
        "tagpr/checkpoints/b.py",
    ]
    for name in left:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    (root / "tagpr" / "link.py").symlink_to("/etc/hostname")
    monkeypatch.setattr(ray_jobs.tagpr, "__file__", str(root / "tagpr" / "__init__.py"))
    ship_sources(tmp_path / "shipped")
    shipped = {str(path.relative_to(tmp_path / "shipped")) for path in (tmp_path / "shipped").rglob("*.*")}
    assert {name for name in shipped if "dist-info" not in name} == {
        f"{p}/__init__.py" for p in ray_jobs.PACKAGES
    }

    (root / "tagpr" / "large.json").write_text("x" * 2000)
    monkeypatch.setattr(ray_jobs, "LARGEST_SOURCES_BYTES", 1000)
    with pytest.raises(StageError, match=r"tagpr/large\.json: the sources that travel"):
        ship_sources(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("WANDB_API_KEY", "x", True),
        ("HF_TOKEN", "x", True),
        ("TAGPR_PRMU_TOKEN", "x", True),
        ("RAY_AUTH_TOKEN", "x", True),
        ("HF_ENDPOINT", "https://me:pass@host", True),
        ("HF_ENDPOINT", "https://host", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("VLLM_CPU_KVCACHE_SPACE", "1", False),
    ],
)
def test_what_looks_like_a_secret(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_variables_of_our_libraries_travel_and_secrets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGPR_TAGS", "/shared/tags.yaml")
    environ = {
        "VERL_USE_EXTERNAL_MODULES": "a", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": "s", "WANDB_API_KEY": "s",
        "HOME": "/root", "MINE": "1", "AWS_SECRET_ACCESS_KEY": "s", "TAGPR_PYTHON": "python3.11",
    }  # fmt: skip
    assert forwarded(["MINE"], environ) == {
        "VERL_USE_EXTERNAL_MODULES": "a",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "MINE": "1",
        "TAGPR_TAGS": "/shared/tags.yaml",
    }
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY looks like a secret"):
        forwarded(["AWS_SECRET_ACCESS_KEY"], environ)
    with pytest.raises(ConfigError, match="NOT_THERE is not set"):
        forwarded(["NOT_THERE"], environ)


def test_paths_become_absolute_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    config = compose(
        "guided_rl", ["setting=paper", "paths.sft=mine/model", "prmu_client.token_file=mine/token"]
    )
    made = dict(override.split("=", 1) for override in absolute_overrides(config))
    assert json.loads(made.pop("run.outputs")) == str(tmp_path / "outputs")
    assert json.loads(made.pop("paths.sft")) == str(tmp_path / "mine" / "model")
    assert json.loads(made.pop("prmu_client.token_file")) == str(tmp_path / "mine" / "token")
    # paths.base is Qwen/Qwen3-8B; everything else follows run.outputs
    assert "paths.base" not in made
    assert set(made) <= {"benchmark.dir"}
    # What comes out goes in again, and then nothing is left to do.
    again = compose("guided_rl", ["setting=paper", *absolute_overrides(config)])
    assert absolute_overrides(again) == []


def test_paths_of_models_to_compare_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    asked = ["+evaluate.models.mine=other", "+evaluate.models.hub=org/name"]
    made = absolute_overrides(compose("evaluate", asked))
    assert f'evaluate.models.mine="{tmp_path}/other"' in made
    assert not any("hub" in override for override in made)
    assert compose("evaluate", [*asked, *made]).evaluate.models.mine == f"{tmp_path}/other"


class Cluster:
    """Stands for Ray's client of jobs."""

    def __init__(
        self, status: str = "SUCCEEDED", code: int | None = 0, chunks: tuple[Any, ...] = ("one\n", "two\n")
    ):
        self.status, self.code, self.chunks = status, code, chunks
        self.submitted: dict[str, Any] = {}
        self.files: set[str] = set()

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        root = Path(job["runtime_env"]["working_dir"])
        self.files = {str(path.relative_to(root)) for path in root.rglob("*.py")}
        return "raysubmit_1"

    async def tail_job_logs(self, job: str) -> Any:
        for chunk in self.chunks:
            if isinstance(chunk, BaseException):
                self.chunks = ("one\ntw", "o\n")
                raise chunk
            yield chunk

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(
            status=SimpleNamespace(value=self.status), driver_exit_code=self.code, message="why"
        )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    import ray.job_submission

    made = Cluster()
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda url: made)
    return made


def go(cluster: Cluster, *overrides: str) -> tuple[int, str]:
    said: list[str] = []
    status = submit("http://h:8265", "sft", overrides, environment={"VLLM_X": "1"}, gpus=8, say=said.append)
    return status, "".join(said)


def test_a_job_carries_sources_variables_and_the_command(cluster: Cluster) -> None:
    assert go(cluster, "optim.lr=1e-3", 'run.outputs="/a b"') == (0, "one\ntwo\n")
    assert cluster.submitted["entrypoint"] == """python -m tagpr sft optim.lr=1e-3 'run.outputs="/a b"'"""
    assert cluster.submitted["runtime_env"]["env_vars"] == {"PYTHONUNBUFFERED": "1", "VLLM_X": "1"}
    assert cluster.submitted["entrypoint_num_gpus"] == 8
    assert "tagpr/stages.py" in cluster.files


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 1)],
)
def test_the_exit_status_is_the_jobs(cluster: Cluster, status: str, code: int | None, exits: int) -> None:
    cluster.status, cluster.code = status, code
    assert go(cluster)[0] == exits


def test_a_dropped_connection_loses_and_repeats_no_line(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(ray_jobs.asyncio, "sleep", at_once)
    cluster.chunks = ("one\n", ConnectionError("gone"))
    assert go(cluster) == (0, "one\ntwo\n")


def test_ctrl_c_leaves_the_job(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.chunks = ("one\n", KeyboardInterrupt())
    with caplog.at_level("INFO", logger="tagpr"):
        status, said = go(cluster)
    assert (status, said) == (130, "one\n")
    assert "ray job stop raysubmit_1 --address http://h:8265" in caplog.messages[-1]


@pytest.mark.parametrize("override", ["+x.api_key=sk-1", "x.token=1", "prmu_client.url=http://me:pw@host"])
def test_no_secret_in_a_jobs_command(cluster: Cluster, override: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        go(cluster, override)
    assert "sk-1" not in str(caught.value)
    assert "pw" not in str(caught.value)
    assert not cluster.submitted


def test_no_cluster_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from tagpr.stages import main

    assert main(["sft", "launch.submit=head:8265"]) == 2
    assert "is no URL of a Ray dashboard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "gpus", "chosen_one"),
    [
        ([], 0, []),
        ([], 1, ["rl_hardware=gpu"]),
        (["setting=paper"], 8, ["rl_hardware=gpu8"]),
        (["setting=paper"], 4, ["rl_hardware=gpu"]),
        (["setting=paper", "rl_hardware=cpu"], 8, []),
    ],
)
def test_hardware_is_chosen_by_itself(overrides: list[str], gpus: int, chosen_one: list[str]) -> None:
    from tagpr.rl.hardware import chosen

    assert chosen(overrides, gpus) == chosen_one


def test_launching_needs_no_ray_and_no_torch_before_it_is_asked_to() -> None:
    import subprocess

    code = "import sys, tagpr.stages; print([m for m in ('torch', 'ray', 'verl') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_a_stage_in_a_job_is_not_taken_for_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    monkeypatch.setenv(variable, "1")
    monkeypatch.delenv(ray_jobs.IN_A_JOB, raising=False)
    ray_jobs.be_no_actor()
    assert variable in os.environ
    monkeypatch.setenv(ray_jobs.IN_A_JOB, "{}")
    ray_jobs.be_no_actor()
    assert variable not in os.environ


LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@pytest.mark.parametrize(
    ("address", "open_to_others", "stays"),
    [
        ("127.0.0.1:6379", False, True),
        ("localhost:6379", False, True),
        # A head on the outward address, of which Ray finds out by itself.
        ("127.0.0.1:6379", True, False),
        ("10.0.0.5:6379", False, False),
        ("auto", False, False),
        ("ray://127.0.0.1", False, False),
    ],
)
def test_a_head_on_loopback_is_looked_for_there(
    address: str, open_to_others: bool, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOOPBACK_ONLY, "")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray_jobs, "_open_to_others", lambda port: open_to_others)
    ray_jobs.prepare_to_connect(address)
    assert (os.environ[LOOPBACK_ONLY] == "0") == stays


def test_what_listens_on_loopback_alone_is_not_open_to_others() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not ray_jobs._open_to_others(listener.getsockname()[1])


def test_where_nobody_listens_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LOOPBACK_ONLY, "RAY_AUTH_MODE"):  # put back afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(
            StageError, match=rf"^RAY_ADDRESS={address}: nobody listens there \(Connection refused\)"
        ):
            with ray_jobs.connected(address, {}, key="RAY_ADDRESS"):
                pytest.fail("connected")
