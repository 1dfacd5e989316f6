"""Less work around each response, and the same result: what is hooked in verl, Ray and TransferQueue is still there."""

import asyncio
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.trainer.constants_ppo import PPO_RAY_RUNTIME_ENV, get_ppo_ray_runtime_env
from verl.trainer.ppo.v1 import agent_loop_tq, trainer_base
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient, LLMServerManager

from tagpr.configuration import compose, resolve
from tagpr.rl import rollouts
from tagpr.rl.asynchronous import TagPRAsyncTrainer
from tagpr.rl.checks import check
from tagpr.rl.launch import CPU_RUNTIME_ENV, verl_runtime_env
from tagpr.rl.replay_buffer import (
    FailClosedReplayBuffer,
    FailClosedReplayBufferAsync,
    RolloutFailure,
    fail_closed_replay_buffer,
)
from tagpr.rl.trainer import TagPRTrainer, trainer_class


class Queue:
    """A transfer queue that takes its time and remembers each put."""

    def __init__(self, fail: str | None = None) -> None:
        self.puts: list[tuple[str, list[str], Any, list[Any]]] = []
        self.fail = fail

    def kv_list(self) -> str:
        return "asked"

    async def async_kv_batch_put(
        self, keys: list[str], partition_id: str, fields: Any, tags: list[Any]
    ) -> None:
        await asyncio.sleep(0.02)
        if self.fail in keys:
            raise RuntimeError("the queue is gone")
        self.puts.append((partition_id, keys, fields, tags))


def row(length: int) -> dict[str, Any]:
    return {"responses": torch.arange(length), "num_turns": 2, "extra": {"score": length}}


async def respond(puts: rollouts.GatheredPuts, group: str, size: int = 3) -> None:
    """What verl's worker does for one prompt."""

    async def one(index: int) -> None:
        await puts.async_kv_batch_put(
            keys=[f"{group}_{index}_0"],
            fields=[row(index + 1)],
            tags=[{"status": "success"}],
            partition_id="train",
        )

    await puts.async_kv_put(key=group, partition_id="train", tag={"status": "running"})
    await asyncio.gather(*[one(index) for index in range(size)])
    await puts.async_kv_put(key=group, partition_id="train", tag={"status": "finished"})


def test_puts_go_together_and_in_order() -> None:
    queue = Queue()

    async def main() -> None:
        puts = rollouts.GatheredPuts(queue)
        await asyncio.gather(*[respond(puts, f"g{number}") for number in range(8)])

    asyncio.run(main())
    order = {
        (key, tag["status"]): at
        for at, put in enumerate(queue.puts)
        for key, tag in zip(put[1], put[3], strict=True)
    }
    # 8 x (running, 3 rows, finished) = 40 puts of verl's
    assert len(order) == 40
    assert len(queue.puts) <= 8
    for number in range(8):
        rows = [order[f"g{number}_{index}_0", "success"] for index in range(3)]
        assert order[f"g{number}", "running"] <= min(rows)
        assert max(rows) < order[f"g{number}", "finished"], "a finished group whose rows are not there yet"
    stored = {
        key: value
        for _, keys, fields, _ in queue.puts
        if fields is not None
        for key, value in zip(keys, fields, strict=True)
    }
    assert len(stored) == 24
    for key, value in stored.items():
        assert value["responses"].tolist() == list(range(int(key.split("_")[1]) + 1))
        assert value["extra"]["score"] == len(value["responses"])


def test_partitions_and_columns_do_not_mix() -> None:
    queue = Queue()

    async def main() -> None:
        puts = rollouts.GatheredPuts(queue)
        await asyncio.gather(
            puts.async_kv_batch_put(keys=["a"], fields=[row(1)], tags=[{}], partition_id="train"),
            puts.async_kv_batch_put(keys=["b"], fields=[row(2)], tags=[{}], partition_id="val"),
            puts.async_kv_batch_put(
                keys=["c"], fields=[{"other": torch.ones(2)}], tags=[{}], partition_id="train"
            ),
        )

    asyncio.run(main())
    assert sorted((partition, keys) for partition, keys, _, _ in queue.puts) == [
        ("train", ["a"]), ("train", ["c"]), ("val", ["b"]),
    ]  # fmt: skip


def test_a_put_that_fails_fails_for_its_caller() -> None:
    queue = Queue(fail="bad_0_0")

    async def main() -> list[Any]:
        puts = rollouts.GatheredPuts(queue)
        await puts.async_kv_put(key="good", partition_id="train", tag={})
        results = await asyncio.gather(respond(puts, "bad", size=1), return_exceptions=True)
        # The next one is sent again.
        await respond(puts, "later", size=1)
        return results

    (error,) = asyncio.run(main())
    assert isinstance(error, RuntimeError)
    assert rollouts.GatheredPuts(queue).kv_list() == "asked"


def test_rows_are_stored_alike_together_and_alone() -> None:
    """A row of a put for many equals the row of a put for one, whatever the other lengths are."""
    together = list_of_dict_to_tensordict([row(3), row(5), row(5)])
    same = list_of_dict_to_tensordict([row(5), row(5)])
    alone = list_of_dict_to_tensordict([row(5)])
    assert (
        together["responses"].unbind()[1].tolist()
        == alone["responses"][0].tolist()
        == same["responses"][1].tolist()
    )


def test_verl_has_what_the_worker_hooks() -> None:
    source = inspect.getsource(agent_loop_tq)
    assert "await tq.async_kv_put(key=uid, partition_id=partition_id, tag=" in source
    assert "fields=list_of_dict_to_tensordict(fields)," in source
    assert "selected_reward_loop_worker_handle.compute_score.remote(data)" in inspect.getsource(
        AgentLoopWorker._compute_score
    )
    for name in ("_run_agent_loop", "_compute_score"):
        ours, theirs = (
            inspect.signature(getattr(worker, name)).parameters
            for worker in (rollouts.RolloutWorker, AgentLoopWorker)
        )
        # Ray adds one of its own to the methods of an actor.
        assert set(ours) == set(theirs) - {"_ray_trace_ctx"}
    assert issubclass(
        rollouts.RolloutWorker, agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class.__mro__[1]
    )


def test_a_prompt_is_tokenized_once_for_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def tokenize(self: Any, messages: list[dict[str, Any]], **more: Any) -> list[int]:
        asked.append((messages[-1]["content"], more))
        number = len(asked)
        await asyncio.sleep(0.01)
        if messages[-1]["content"] == "bad":
            raise ValueError("no tokens")
        return [1, 2, number]

    monkeypatch.setattr(rollouts.SingleTurnAgentLoop, "ct_build_initial_tokens", tokenize)
    loop = object.__new__(rollouts.SingleTurn)
    loop._tokenizing = {}

    def prompt(text: Any) -> list[dict[str, Any]]:
        return [{"role": "system", "content": "s"}, {"role": "user", "content": text}]

    async def work() -> None:
        made = await asyncio.gather(
            *(loop.ct_build_initial_tokens(prompt(text), images=None) for text in "aaabba")
        )
        assert [text for text, _ in asked] == ["a", "b"]
        assert made == [[1, 2, 1]] * 3 + [[1, 2, 2]] * 2 + [[1, 2, 1]]
        made[0].append(9)
        assert made[1] == [1, 2, 1], "each has a list of its own"
        assert not loop._tokenizing
        failed = await asyncio.gather(
            *(loop.ct_build_initial_tokens(prompt("bad")) for _ in range(3)), return_exceptions=True
        )
        assert [str(each) for each in failed] == ["no tokens"] * 3
        # Whoever is cancelled takes nothing from the others.
        first, second = (asyncio.create_task(loop.ct_build_initial_tokens(prompt("c"))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second)[:2] == [1, 2]
        asked.clear()
        pictures = await asyncio.gather(
            *(loop.ct_build_initial_tokens(prompt("p"), images=["i"]) for _ in range(2))
        )
        assert len(asked) == len(pictures) == 2
        assert asked[0] == ("p", {"images": ["i"]})

    asyncio.run(work())


def test_trap_verl_builds_a_loop_for_each_response() -> None:
    assert "hydra.utils.instantiate" in inspect.getsource(AgentLoopWorker._run_agent_loop), (
        "verl keeps its agent loops now: RolloutWorker._run_agent_loop may go"
    )


def test_vllm_knows_the_quiet_parameters() -> None:
    from vllm.sampling_params import SamplingParams

    made = SamplingParams(max_tokens=4, logprobs=0, **rollouts.QUIET)
    assert (made.detokenize, made.stream_interval) == (False, 2**30)


def test_servers_are_created_where_ours_take_their_place() -> None:
    assert "LLMServerManager.create(" in inspect.getsource(trainer_base.PPOTrainer._setup)
    for name in ("_init_global_load_balancer", "get_client"):
        ours, theirs = (
            inspect.signature(getattr(kind, name)).parameters
            for kind in (rollouts.RolloutServers, LLMServerManager)
        )
        assert list(ours) == list(theirs)
    for name in ("_acquire_server", "_release_server"):
        for kind in (LLMServerClient, FullyAsyncLLMServerClient):
            assert hasattr(kind, name)


@pytest.mark.parametrize("kind", [LLMServerClient, FullyAsyncLLMServerClient])
def test_one_engine_is_asked_directly(kind: type) -> None:
    servers = rollouts.RolloutServers.__new__(rollouts.RolloutServers)
    servers.config = OmegaConf.create({})
    servers.global_load_balancer, servers.server_addresses, servers.server_handles = (
        None,
        ["here:1"],
        ["handle"],
    )
    client = servers.get_client(client_cls=kind)
    assert isinstance(client, kind)
    assert asyncio.run(client._acquire_server("request")) == ("here:1", "handle")
    assert client._release_server("here:1", request_id="request") is None


def test_the_runtime_environment_of_a_cpu_is_verls() -> None:
    config = compose("guided_rl")
    wanted = get_ppo_ray_runtime_env(config)["env_vars"]
    of_accelerators = {name for name in wanted if name.startswith(("HCCL_", "NCCL_", "HSA_"))}
    # The launcher says false.
    of_accelerators.add("TOKENIZERS_PARALLELISM")
    assert {name: value for name, value in wanted.items() if name not in of_accelerators} == {
        name: value for name, value in verl_runtime_env(config)["env_vars"].items() if name in wanted
    }
    assert set(PPO_RAY_RUNTIME_ENV["env_vars"]) - of_accelerators <= set(CPU_RUNTIME_ENV)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the CPU platform stands aside")
def test_a_driver_does_not_import_vllm() -> None:
    code = "import sys, tagpr.rl.trainer, tagpr.rl.rollouts; print('vllm' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "VERL_PLATFORM": "cpu"},
    )  # fmt: skip
    assert done.stdout.split()[-1:] == ["False"], done.stderr[-2000:]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.v1.trainer_mode=colocate_async"],
        ["actor_rollout_ref.model.use_remove_padding=true"],
        ["actor_rollout_ref.actor.use_dynamic_bsz=false", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
         "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8"],
        ["reward.num_workers=2"],
        ["trainer.v1.trainer_mode=colocate_async", "actor_rollout_ref.model.use_remove_padding=true"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("hardware", ["cpu", "gpu8"])
def test_options_of_throughput_compose(overrides: list[str], hardware: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = resolve(compose("exploratory_rl", [f"rl_hardware={hardware}", *overrides]))
    check(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)


def test_async_adds_to_sync_what_verls_does() -> None:
    assert trainer_class("sync") is TagPRTrainer
    assert trainer_class("colocate_async") is TagPRAsyncTrainer
    assert issubclass(TagPRAsyncTrainer, PPOTrainerColocateAsync)

    def calls(method: Any) -> list[str]:
        return [
            line.strip() for line in inspect.getsource(method).splitlines() if "checkpoint_manager." in line
        ]

    # Ours: abort, then all of the synchronous one; all of the synchronous one, then resume.
    assert calls(PPOTrainerColocateAsync.on_sample_end) == [
        "self.checkpoint_manager.abort_replicas()", *calls(PPOTrainerSync.on_sample_end),
    ]  # fmt: skip
    assert calls(PPOTrainerColocateAsync.on_step_end) == [
        *calls(PPOTrainerSync.on_step_end), "self.checkpoint_manager.resume_generation_replicas()",
    ]  # fmt: skip
    assert calls(PPOTrainerColocateAsync.on_init_end) == calls(PPOTrainerSync.on_init_end)


@pytest.mark.parametrize(
    ("mode", "kind"), [("sync", FailClosedReplayBuffer), ("colocate_async", FailClosedReplayBufferAsync)]
)
def test_the_replay_buffer_fits_the_mode(mode: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1 import replay_buffer

    buffer = fail_closed_replay_buffer(
        trainer_mode=mode, trainer_config={}, max_off_policy_threshold=None, max_off_policy_strategy="drop", sampler_kwargs={},
    )  # fmt: skip
    assert type(buffer) is kind
    rows = {"b": {"is_prompt": True, "status": "failure", "global_steps": 1}}
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda *_: {"train": rows})
    with pytest.raises(RolloutFailure):
        buffer.sample(global_steps=1, partition_id="train", batch_size=1)


def test_trap_prefix_sharing_is_not_in_v1() -> None:
    """When this fails, verl shares prompts in the update: let checks.py allow actor.use_prefix_grouper."""
    from verl.trainer.ppo import v1
    from verl.workers import engine, engine_workers

    sources = [
        Path(engine_workers.__file__),
        *Path(v1.__file__).parent.rglob("*.py"),
        *Path(engine.__file__).parent.rglob("*.py"),
    ]
    assert not [path for path in sources if "prefix_grouper" in path.read_text("utf-8")]


def test_the_early_worker_does_what_the_manager_asks_of_one() -> None:
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ

    from tagpr.rl.side_by_side import EarlyRolloutWorker

    asked = re.findall(r"worker\.(\w+)\.remote", inspect.getsource(AgentLoopManagerTQ))
    assert set(asked) <= set(dir(EarlyRolloutWorker))
    taken = list(inspect.signature(AgentLoopWorker.__init__).parameters)
    assert [name for name in taken if not name.startswith("_")][1:] == [
        "config", "llm_client", "teacher_client", "reward_loop_worker_handles",
    ]  # fmt: skip
