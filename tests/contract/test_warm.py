"""Workers forked from the server that has imported everything: they are like workers started anew, or they are started anew."""

import inspect
import json
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tagpr.rl.warm import process
from tagpr.rl.warm.server import package, preloaded
from tagpr.rl.warm.setup_worker import environment_of
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.cuda.is_available(),
    reason="workers are forked on Linux, where there is no GPU",
)

RUN = """
import contextlib, json, os, sys, time
import psutil
os.environ.pop("LD_PRELOAD", None)
from tagpr.local_ray import local_ray, prepare_environment
prepare_environment()
from tagpr.rl.warm.process import ADDRESS
from tagpr.rl.warm.server import fork_server

with fork_server({"GIVEN": "to all"}) as ray_is_up:
    with local_ray(4, runtime_env={"env_vars": {"GIVEN": "to all"}}, _temp_dir=sys.argv[1]):
        ray_is_up()
        import ray

        from tagpr.rl.warm.server import preloaded
        from tests.contract import warm_child
        server = int(os.environ[ADDRESS].split(":")[0])
        actor = ray.remote(warm_child.Looking)
        warm, other = actor.remote(), actor.options(runtime_env={"env_vars": {"OWN": "alone"}}).remote()
        anew = actor.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "3"}}).remote()
        seen = ray.get([each.look.remote() for each in (warm, other, anew)])
        engine = ray.get(warm.child.remote(preloaded()))
        spawned = ray.get(other.child.remote("/nothing.so"))
        threads = [open(f"/proc/{server}/task/{task}/comm").read().strip() for task in os.listdir(f"/proc/{server}/task")]
        # A worker's child ends with it, a worker with what the raylet started for it.
        third = actor.remote()
        killed = [seen[1]["pid"], ray.get(other.linger.remote(preloaded())), ray.get(third.look.remote())["pid"]]
        os.kill(seen[1]["pid"], 9)
        try:
            ray.get(other.look.remote())
            ended = None
        except ray.exceptions.RayError as error:
            ended = type(error).__name__
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "warm/setup_worker.py" in " ".join(child.cmdline()):
                    child.kill()
        give_up = time.monotonic() + 60
        while set(killed) & set(psutil.pids()) and time.monotonic() < give_up:
            time.sleep(0.1)
        left = sorted(set(killed) & set(psutil.pids()))
print(json.dumps({
    "server": server, "seen": seen, "engine": engine, "spawned": spawned, "threads": threads, "ended": ended, "left": left,
    "address": os.environ.get(ADDRESS),
}))
"""


def test_workers_and_engine_are_forked_and_their_own(tmp_path: Path) -> None:
    """One Ray with a fork server: who is whose child, and what each of them finds around itself."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "VERL_PLATFORM": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:
        done = subprocess.run(
            [sys.executable, "-c", RUN, short], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    server = found["server"]
    first, second, anew = found["seen"]
    # 1. Forked, each with its own variables, beside what all have
    for worker in (first, second):
        assert worker["parent"] == server
        assert worker["imported"]
        assert worker["title"].startswith("ray::Looking.look")
        assert worker["argument"].endswith("ray/_private/workers/default_worker.py")
    assert [worker["given"] for worker in (first, second, anew)] == ["to all"] * 3
    assert [worker["own"] for worker in (first, second, anew)] == [None, "alone", None]
    assert first["preload"] is None
    assert first["directory"] == anew["directory"]
    # 2. Started anew for what a library reads when it is loaded
    assert anew["parent"] != server
    assert not anew["imported"]
    assert anew["threads"] == "3"
    # 3. No random numbers in common
    for name in ("pid", "random", "worker", "object", "random_id"):
        assert len({worker[name] for worker in (first, second, anew)}) == 3, name
    # 4. vLLM's engine: the server's child too, with what its parent has set; only with the libraries that vLLM wants preloaded
    assert found["engine"] == {
        "parent": server, "imported": True, "late": "set by the parent", "status": 7, "same": True, "output": True,
        "titled": True,
    }  # fmt: skip
    assert found["spawned"]["parent"] == second["pid"]
    assert found["spawned"]["late"] == "set by the parent"
    # 5. A fork needs one thread (jemalloc, which pyarrow brings, starts its own anew)
    assert len([name for name in found["threads"] if name != "jemalloc_bg_thd"]) == 1, found["threads"]
    # 6. Ray sees a worker end; all end with their run
    assert found["ended"] == "ActorDiedError"
    assert found["left"] == []
    assert found["address"] is None
    give_up = time.monotonic() + 60
    pids = [server, *(worker["pid"] for worker in found["seen"])]
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_runtime_environment_of_more_than_variables_is_rays() -> None:
    assert environment_of({"env_vars": {"A": "b"}, "py_executable": sys.executable}) == {"A": "b"}
    assert environment_of({}) == {}
    for unusual in (
        {"command_prefix": ["conda activate", "&&"]},
        {"py_executable": "/usr/bin/python3"},
        {"override_worker_entrypoint": "/elsewhere/default_worker.py"},
        {"env_vars": {"A": "$HOME/b"}},
    ):
        assert environment_of(unusual) is None
    from ray._private.runtime_env.context import RuntimeEnvContext

    assert set(inspect.signature(RuntimeEnvContext).parameters) == {
        "command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars",
    }, "Ray's runtime environments have become more: see tagpr/rl/warm/setup_worker.py"  # fmt: skip


def test_other_variables_for_libraries_are_no_servers_child(monkeypatch: pytest.MonkeyPatch) -> None:
    own = process.environment_at_start(os.getpid())
    for name in {*own, *os.environ}:
        if name in own:
            monkeypatch.setenv(name, own[name])
        else:
            monkeypatch.delenv(name)
    server = multiprocessing.forkserver._forkserver
    for name in ("_forkserver_address", "_forkserver_alive_fd"):
        monkeypatch.setattr(server, name, None)
    monkeypatch.setattr(server, "ensure_running", None)
    monkeypatch.delenv(process.ADDRESS, raising=False)
    assert not process.reach_server()
    monkeypatch.setenv(process.ADDRESS, f"{os.getpid()}:/nowhere")
    assert process.reach_server()
    monkeypatch.setenv("RANK", "17")
    assert process.reach_server()
    assert not process.reach_server(preload="/other.so")
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    assert not process.reach_server()


def test_ray_has_what_is_hooked() -> None:
    from ray._private import parameter, services
    from ray._private.workers import default_worker, setup_worker  # noqa: F401

    wanted = inspect.signature(parameter.RayParams).parameters
    assert {"setup_worker_path", "no_monitor"} <= set(wanted)
    # The raylet leaves the file out where there is no runtime environment, by its name.
    raylet = package("ray") / "core" / "src" / "ray" / "raylet" / "raylet"
    assert b"setup_worker.py" in raylet.read_bytes()
    assert "setup_worker_path,\n        ]" in inspect.getsource(services.start_raylet)


def test_vllm_has_what_is_hooked() -> None:
    source = (package("vllm") / "v1" / "engine" / "utils.py").read_text("utf-8")
    assert "from vllm.utils.system_utils import get_mp_context" in source
    assert "context = get_mp_context()" in source
    assert "context.Process(\n                    target=EngineCoreProc.run_engine_core," in source
    platform = (package("vllm") / "platforms" / "cpu.py").read_text("utf-8")
    for pattern in (
        '"libtcmalloc_minimal*.so*", "libtcmalloc.so*"',
        '"libgomp*.so*"',
        '"torch.libs"',
        'f"{tcmalloc_so}:{ld_preload_str}"',
    ):
        assert pattern in platform
    assert all(Path(each).exists() for each in preloaded().split(":"))


def test_verl_imports_vllm_when_it_is_asked_for_its_replicas() -> None:
    """Else importing ahead (tagpr/rl/launch.py) may go."""
    from verl.workers.rollout import llm_server, replica

    assert "vllm_async_server import vLLMReplica" in inspect.getsource(
        replica.RolloutReplicaRegistry._registry["vllm"]
    )
    assert "get_rollout_replica_class(" in inspect.getsource(llm_server.LLMServerManager.__init__)
