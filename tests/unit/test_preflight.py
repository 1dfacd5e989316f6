"""Each check of a node names what is wrong and what mends it; a cluster that lacks something is refused in seconds."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tagpr.errors import StageError
from tagpr.rl import preflight as module
from tagpr.rl.preflight import Answer, Fault, Wanted, examine, preflight
from tagpr.runs import file_hash, installed_versions


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"a": np.zeros(3, np.float32)}, model / "model.safetensors")
    tags = tmp_path / "tags.yaml"
    tags.write_text("a: b\n")
    shared = tmp_path / "run"
    shared.mkdir()
    made = Wanted(
        versions=installed_versions(), device="cuda", gpus=0, shared=[str(shared)], nonce="n" * 32,
        models={"actor_rollout_ref.model.path": str(model)}, files={str(tags): file_hash(tags)}, reward=None,
        memory_gib=0.01, disk_gib=0.001,
    )  # fmt: skip
    (shared / made.nonce_file).write_text(made.nonce)
    return made


def only(wanted: Wanted) -> Fault:
    (fault,) = examine(wanted, "here").faults
    return fault


def test_a_node_that_has_everything(wanted: Wanted) -> None:
    answer = examine(wanted, "here")
    assert answer.faults == ()
    assert answer.node == "here"
    assert abs(answer.clock - time.time()) < 5
    # It leaves nothing of its own behind.
    assert [path.name for path in Path(wanted.shared[0]).iterdir()] == [wanted.nonce_file]


def test_another_version(wanted: Wanted) -> None:
    fault = only(replace(wanted, versions={**wanted.versions, "ray": "1.0", "tagpr": "9"}))
    assert fault.what == f"ray {wanted.versions['ray']}, the driver has 1.0"
    assert "is not installed" in only(replace(wanted, versions={"vllm": "9"})).what


def test_a_folder_that_is_not_shared(wanted: Wanted, tmp_path: Path) -> None:
    (Path(wanted.shared[0]) / wanted.nonce_file).unlink()
    assert "is not the driver's folder" in only(wanted).what
    assert "shared storage" in only(wanted).remedy
    other = replace(wanted, shared=[str(tmp_path / "model")])
    (tmp_path / "model" / wanted.nonce_file).write_text("an older run's")
    assert "it holds something else" in only(other).what


def test_a_folder_that_cannot_be_written(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "cannot be written (No space left on device)" in only(wanted).what


def test_a_model_that_is_not_there_or_torn(wanted: Wanted) -> None:
    (folder,) = wanted.models.values()
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "has" in only(wanted).what
    weights.unlink()
    assert "it has no *.safetensors" in only(wanted).what
    (Path(folder) / "config.json").unlink()
    assert "No such file" in only(wanted).what


def test_a_vocabulary_that_differs(wanted: Wanted) -> None:
    (path,) = wanted.files
    Path(path).write_text("c: d\n")
    assert "differs from the driver's" in only(wanted).what
    Path(path).unlink()
    assert "cannot be read" in only(wanted).what


def test_too_little_memory_or_disk(wanted: Wanted) -> None:
    assert "GiB of memory free, 1e+06 wanted" in only(replace(wanted, memory_gib=1e6)).what
    assert "free in" in only(replace(wanted, disk_gib=1e9)).what


def test_a_reward_server_that_is_gone_or_another(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"model_version": "other", "engine": "x", "users": 1, "max_tokens": 9}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert "serves PRMU other, expected mine" in only(replace(wanted, reward=(url, None, "mine"))).what
        assert examine(replace(wanted, reward=(url, None, "other")), "here").faults == ()
        server.shutdown()
    import tagpr.prmu.client

    original = tagpr.prmu.client.check_server
    monkeypatch.setattr(
        tagpr.prmu.client, "check_server", lambda *a, deadline_s: original(*a, deadline_s=0.2)
    )
    assert "no reward server" in only(replace(wanted, reward=(url, None, "mine"))).what
    assert "cannot be read as a token file" in only(replace(wanted, reward=(url, "/none", "mine"))).what


def test_gpus_that_are_not_there(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "local_gpus", lambda: [80.0] * 4)
    assert only(replace(wanted, gpus=8)).what.startswith("4 NVIDIA GPUs, 8 wanted")


class Ray:
    """Stands for Ray: tasks run here, at once, on nodes that are made up."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, nodes: list[dict[str, Any]], late: int = 0) -> None:
        self._nodes, self._late = nodes, late
        self.cancelled: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, **_: Any) -> Any:
        def wrap(function: Any) -> Any:
            class Task:
                def options(self, **_: Any) -> "Task":
                    return self

                def remote(self, *arguments: Any) -> Any:
                    return partial(function, *arguments)

            return Task()

        return wrap

    def wait(self, asked: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return asked[: len(asked) - self._late], asked[len(asked) - self._late :]

    def get(self, task: Any) -> Any:
        return task()

    def cancel(self, task: Any, force: bool) -> None:
        self.cancelled.append(task)


def node(number: int, **resources: float) -> dict[str, Any]:
    return {
        "Alive": True, "NodeID": f"{number:032d}", "NodeManagerHostname": f"n{number}",
        "NodeManagerAddress": f"10.0.0.{number}", "Resources": resources,
    }  # fmt: skip


def on(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "ray", ray)
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)


def well(wanted: Wanted, name: str) -> Answer:
    # The driver's file is there while nodes look.
    assert (Path(wanted.shared[0]) / wanted.nonce_file).read_text() == wanted.nonce
    return Answer(name, time.time(), 0.1, ())


def test_every_node_is_asked_and_nothing_stays_behind(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, Ray([node(1, GPU=1), node(2, GPU=1), {**node(3, GPU=1), "Alive": False}]))
    answers = preflight(replace(wanted, device="cpu", gpus=1), nodes=2, check=well)
    assert [answer.node.split()[0] for answer in answers] == ["n1", "n2"]
    assert list(Path(wanted.shared[0]).iterdir()) == []


def test_a_head_without_gpus_need_not_have_any(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Ray([node(1), node(2, GPU=8), node(3, GPU=8)]))
    assert len(preflight(replace(wanted, gpus=8), nodes=2, check=well)) == 2


@pytest.mark.parametrize(
    ("nodes", "late", "says"),
    [
        ([node(1, GPU=8)], 0, r"trainer\.nnodes=2: the cluster has 1 nodes with 8 GPUs, of 1"),
        ([node(1, GPU=8), node(2, GPU=8)], 1, r"node n2 \(10\.0\.0\.2, 00000000\): no answer within"),
        ([], 0, "no living node"),
    ],
)
def test_a_cluster_that_is_too_small_or_silent(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch, nodes: list[Any], late: int, says: str
) -> None:
    ray = Ray(nodes, late)
    on(monkeypatch, ray)
    with pytest.raises(StageError, match=says) as caught:
        preflight(replace(wanted, gpus=8), nodes=2, check=well)
    assert "\n" not in str(caught.value)
    assert len(ray.cancelled) == late
    assert not list(Path(wanted.shared[0]).glob(".preflight-*-*")) or nodes == []


def test_gpus_of_a_cluster_that_would_stay_idle(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Ray([node(1, GPU=8, **{"accelerator_type:H100": 1.0})]))
    with pytest.raises(StageError, match=r"the cluster has H100 GPUs\. Name the hardware"):
        preflight(replace(wanted, device="cpu", gpus=1), nodes=1, check=well)


def test_faults_and_clocks_are_named_with_their_node(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, Ray([node(1), node(2)]))

    def ill(_: Wanted, name: str) -> Answer:
        faults = (Fault("no memory", "buy some"),) if name.startswith("n1") else ()
        return Answer(name, time.time() - (100 if name.startswith("n2") else 0), 0.1, faults)

    with pytest.raises(StageError, match=r"preflight: node n1 .*: no memory \(1 more above\)\. Buy some\."):
        preflight(wanted, nodes=1, check=ill)
    assert "its clock is 100 s off the driver's" in caplog.text


def test_a_node_that_cannot_run_a_task(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Ray([node(1)]))

    def dies(_: Wanted, __: str) -> Answer:
        raise Ray.exceptions.RayError("worker crashed\nlong story")

    with pytest.raises(StageError, match=r"cannot run a task \(long story\)"):
        preflight(wanted, nodes=1, check=dies)
