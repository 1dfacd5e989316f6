"""verl's agent loop worker with less work around each response: what a small step spends most of its time on.

Things that verl 0.9.1 does per response and that can be done for many at once, or not at all, without a different result
(verl/trainer/ppo/v1/agent_loop_tq.py). ``tests/contract/test_verl_hooks.py`` checks the names that are used here.

- Each put into TransferQueue is four to six messages between processes, on sockets opened for the purpose. Puts that come while
  another is on its way wait for it and go together.
- vLLM hands out every response once a token, cumulatively, with its log-probabilities and text; only the last is looked at.
- Hydra builds an agent loop object for each response, out of the whole configuration; a single turn keeps nothing in it.
- A prompt is rendered and tokenized again for each response of its group.
- Where there is one rollout engine there is nothing to balance, and no process needed that does it.
- ``reward.num_workers: 0`` scores responses in the worker that asked for them, instead of sending each through Ray to a process
  of its own.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, agent_loop_tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient, LLMServerManager

from tagpr.rl.in_flight import GENERATED, SCORED, InFlight
from tagpr.rl.side_by_side import WATCH, take_rollout_worker

# vLLM: no text (the reward manager decodes the tokens itself), no output before the last.
QUIET = {"detokenize": False, "stream_interval": 2**30}


class GatheredPuts:
    """``transfer_queue`` for one worker: puts that come while another is on its way are sent together, in their order.

    Nothing is held back: a put that finds the queue idle goes at once. A put that fails fails for each of those that went with it.
    """

    def __init__(self, queue: Any = tq) -> None:
        self._queue = queue
        self._waiting: list[
            tuple[str, list[str], list[Mapping[str, Any]] | None, list[Any], asyncio.Future]
        ] = []
        self._sender: asyncio.Task | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def async_kv_put(self, key: str, partition_id: str, tag: Mapping[str, Any]) -> None:
        """Set the tag of one key."""
        await self._put(partition_id, [key], None, [tag])

    async def async_kv_batch_put(
        self, keys: Sequence[str], fields: Sequence[Mapping[str, Any]], tags: Sequence[Any], partition_id: str
    ) -> None:
        """Store rows (``fields``: one mapping a key, not yet a TensorDict) and their tags."""
        await self._put(partition_id, list(keys), list(fields), list(tags))

    async def _put(
        self, partition: str, keys: list[str], rows: list[Mapping[str, Any]] | None, tags: list[Any]
    ) -> None:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((partition, keys, rows, tags, done))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        await done

    async def _send(self) -> None:
        while self._waiting:
            # One kind at a time, the oldest first: rows of the same columns, or tags alone.
            kind = _kind(self._waiting[0])
            together = [put for put in self._waiting if _kind(put) == kind]
            self._waiting = [put for put in self._waiting if _kind(put) != kind]
            keys = [key for put in together for key in put[1]]
            rows = [row for put in together for row in put[2] or ()]
            tags = [tag for put in together for tag in put[3]]
            try:
                await self._queue.async_kv_batch_put(
                    keys=keys,
                    partition_id=together[0][0],
                    fields=list_of_dict_to_tensordict([dict(row) for row in rows]) if rows else None,
                    tags=tags,
                )
            except Exception as error:  # noqa: BLE001 - handed to every caller
                for put in together:
                    if not put[4].done():
                        put[4].set_exception(error)
            else:
                for put in together:
                    if not put[4].done():
                        put[4].set_result(None)


def _kind(put: tuple) -> tuple:
    partition, _, rows, _, _ = put
    return partition, None if rows is None else tuple(rows[0])


def in_place(compute_score: Callable[[Any], Any]) -> Any:
    """What looks like the handle of one of verl's reward workers and computes here."""
    return SimpleNamespace(compute_score=SimpleNamespace(remote=compute_score))


class OneServer:
    """Of a client (:class:`LLMServerClient`) where there is one rollout engine: no messages about which to take."""

    def __init__(self, *args: Any, server: tuple[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._server = server

    async def _acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:
        return self._server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        pass


class OneServerClient(OneServer, LLMServerClient):
    """For synchronous training."""


class OneServerResumingClient(OneServer, FullyAsyncLLMServerClient):
    """For asynchronous training: goes on with what an update of the weights interrupted."""


ONE_SERVER = {LLMServerClient: OneServerClient, FullyAsyncLLMServerClient: OneServerResumingClient}


class RolloutServers(LLMServerManager):
    """verl's manager of rollout engines, without the process that balances them where there is one engine."""

    async def _init_global_load_balancer(self) -> None:
        if len(self.server_handles) == 1:
            self.global_load_balancer = None
        else:
            await super()._init_global_load_balancer()

    def get_client(self, client_cls: type[LLMServerClient] | None = None, **kwargs: Any) -> LLMServerClient:
        """A client that balances, or one for the only engine; another class where one is asked for."""
        if self.global_load_balancer is not None:
            return super().get_client(client_cls, **kwargs)
        return ONE_SERVER[client_cls or LLMServerClient](
            config=self.config, server=(self.server_addresses[0], self.server_handles[0]), **kwargs
        )


class SingleTurn(SingleTurnAgentLoop):
    """A single turn, whose prompt is tokenized once for all that ask at the same time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokenizing: dict[tuple[tuple[str, str], ...], asyncio.Task[list[int]]] = {}

    async def ct_build_initial_tokens(self, messages: list[dict[str, Any]], **more: Any) -> list[int]:
        """Token ids of a prompt; ``more`` (tools, images, ...) as verl's."""
        plain = all(
            set(each) == {"role", "content"} and isinstance(each["content"], str) for each in messages
        )
        if any(more.values()) or not plain:
            return await super().ct_build_initial_tokens(messages, **more)
        key = tuple((each["role"], each["content"]) for each in messages)
        task = self._tokenizing.get(key)
        if task is None:
            task = asyncio.create_task(super().ct_build_initial_tokens(messages))
            self._tokenizing[key] = task
            task.add_done_callback(lambda _: self._tokenizing.pop(key))
        # Who is cancelled takes nothing from the others.
        return list(await asyncio.shield(task))


_Worker: Any = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


class RolloutWorker(_Worker):
    """See the head of this file."""

    reward_loop_worker_handles: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Both names are this process's alone: one worker, one process.
        agent_loop_tq.tq = GatheredPuts()
        agent_loop_tq.list_of_dict_to_tensordict = list
        if self.reward_loop_worker_handles == []:
            self.reward_loop_worker_handles = [in_place(RewardLoopWorker(self.config).compute_score)]
        self._single_turn: SingleTurn | None = None
        self._in_flight = InFlight()
        self._quiet = QUIET if self.config.actor_rollout_ref.rollout.name == "vllm" else {}

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        sampling_params = {**sampling_params, **self._quiet}
        if agent_name != "single_turn_agent" or trace:
            with self._in_flight.being(GENERATED):
                return await super()._run_agent_loop(
                    sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
                )
        if self._single_turn is None:
            self._single_turn = SingleTurn(
                trainer_config=DictConfigWrap(config=self.config),
                server_manager=self.llm_client,
                tokenizer=self.tokenizer,
                processor=self.processor,
                dataset_cls=self.dataset_cls,
                data_config=DictConfigWrap(self.config.data),
                hf_model_type=self.hf_model_type,
            )
        with self._in_flight.being(GENERATED):
            output = await self._single_turn.run(sampling_params, **kwargs)
        return await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)

    async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
        with self._in_flight.being(SCORED):
            await super()._compute_score(outputs, kwargs=kwargs)

    async def in_flight(self) -> dict[str, tuple[int, float]]:
        """For the watchdog, in its concurrency group (``WATCH``): see :meth:`InFlight.state`."""
        return self._in_flight.state()


class RolloutManager(AgentLoopManagerTQ):
    """verl's manager over :class:`RolloutWorker`, in a process that was started ahead where there is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(concurrency_groups=WATCH)(RolloutWorker)

    async def _init_agent_loop_workers(self) -> None:
        ready = take_rollout_worker() if self.rollout_config.agent.num_workers == 1 else None
        if ready is None:
            await super()._init_agent_loop_workers()
            return
        await ready.begin.remote(
            self.config, self.llm_client, self.teacher_client, self.reward_loop_worker_handles
        )
        self.agent_loop_workers = [ready]
