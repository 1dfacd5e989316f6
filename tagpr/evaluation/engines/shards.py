"""Several vLLM engines as Ray actors: rows are dealt out as places become free, and dealt again when an actor dies."""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any

from tagpr.configuration import exported
from tagpr.errors import ConfigError, StageError, TagPRError
from tagpr.evaluation.engines import Completion, Completions, EngineSettings, Request, Sampling
from tagpr.evaluation.prompts import PromptSettings
from tagpr.local_ray import local_ray
from tagpr.ray_jobs import connected, forwarded

logger = logging.getLogger(__name__)

# One call of an actor: long enough to be cheap, short enough that finished rows are soon on the disk.
SLICE_S = 0.5
TICK_S = 1.0
# Rows taken from the source between two looks at the actors: rendering prompts must not hold them up.
DEALT_AT_ONCE = 32
# Starting an engine on a large model takes minutes; a call that lasts longer than this hangs.
START_DEADLINE_S, CALL_DEADLINE_S = 1800.0, 900.0
# Deaths of actors in a row without a finished row between them, for each replica.
DEATHS_IN_A_ROW = 3


class Replica:
    """The actor: one engine, worked in slices of time."""

    def __init__(
        self,
        model: str,
        settings: EngineSettings,
        prompts: PromptSettings,
        sampling: Sampling,
        thinking_tokens: int | None,
    ) -> None:
        from tagpr.evaluation.engines.offline import VllmEngine

        try:
            self.engine = VllmEngine(model, settings, prompts, sampling, thinking_tokens)
            self.problem = None
        except TagPRError as error:
            # An actor whose constructor raises is restarted in vain; said once, it stops the run.
            self.problem = error

    def start(self) -> tuple[int, TagPRError | None]:
        """Requests that keep this engine busy, and why it cannot work."""
        return (0, self.problem) if self.problem else (self.engine.room, None)

    def work(self, requests: list[Request]) -> tuple[list[Completion], int]:
        """Take these requests, decode for a while; what is finished, and how many more are wanted."""
        for request in requests:
            self.engine.add(request)
        done: list[Completion] = []
        until = time.monotonic() + SLICE_S
        while self.engine.in_flight and time.monotonic() < until:
            done += self.engine.step()
        return done, self.engine.room

    def abandon(self) -> None:
        """Drop what is unfinished."""
        self.engine.abandon()


class _Place:
    """One replica as the caller sees it: its actor, the call under way, and the rows that it has."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.call: Any = actor.start.remote()
        self.started = False
        self.since = time.monotonic()
        self.room = 0
        self.rows: dict[Any, Request] = {}


class _Source:
    """What is left to deal: rows of dead replicas first, then new ones, taken only when somebody wants them."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._new = iter(requests)
        self._again: deque[Request] = deque()
        self._exhausted = False

    @property
    def empty(self) -> bool:
        return self._exhausted and not self._again

    def take(self, most: int) -> list[Request]:
        chosen = [self._again.popleft() for _ in range(min(most, len(self._again)))]
        new = list(islice(self._new, most - len(chosen)))
        self._exhausted = self._exhausted or len(chosen) + len(new) < most
        return chosen + new

    def give_back(self, requests: Iterable[Request]) -> None:
        self._again.extend(requests)


class RayEngine:
    """``settings.replicas`` engines; as a context manager it ends its actors, and the Ray that it started itself.

    With ``RAY_ADDRESS`` the actors go to that cluster, each with ``tensor_parallel_size`` GPUs where it has any; else to a Ray of
    this machine's own on loopback. Greedy answers, and those with seeds, do not depend on who gives them.

    Raises:
        ConfigError: the cluster has fewer GPUs than the replicas want.
    """

    def __init__(
        self,
        model: str,
        settings: EngineSettings,
        prompts: PromptSettings,
        sampling: Sampling,
        thinking_tokens: int | None = None,
    ) -> None:
        self._arguments = (model, settings, prompts, sampling, thinking_tokens)
        self._replicas = settings.replicas
        self._stack = ExitStack()
        self._places: list[_Place] = []
        self._deaths = 0

    def __enter__(self) -> "RayEngine":
        settings = self._arguments[1]
        self._stack.enter_context(_ray(self._replicas))
        try:
            import ray

            gpus = ray.cluster_resources().get("GPU", 0)
            wanted = self._replicas * settings.tensor_parallel_size
            if 0 < gpus < wanted:
                raise ConfigError(
                    f"evaluate.engine.replicas={self._replicas}: of {settings.tensor_parallel_size} GPUs each are more than "
                    f"the {gpus:g} that Ray has. Lower one."
                )
            cpus = max(1, math.floor(ray.cluster_resources().get("CPU", 1) / self._replicas))
            self._options = {
                "num_gpus": settings.tensor_parallel_size if gpus else 0,
                "num_cpus": 1 if gpus else cpus,
                # Restarting is done here, where it is known which rows an actor had.
                "max_restarts": 0,
                "runtime_env": {"env_vars": exported()},
            }
            self._actor_class = ray.remote(Replica)
            self._places = [self._new_place() for _ in range(self._replicas)]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def complete(self, requests: Iterable[Request]) -> Completions:
        """See :class:`tagpr.evaluation.engines.Engine`.

        Raises:
            StageError: replicas die one after the other, or none can be started.
        """
        import ray

        source = _Source(requests)
        try:
            while True:
                self._deal(source)
                if source.empty and not any(place.rows for place in self._places):
                    return
                calls = [place.call for place in self._places if place.call is not None]
                ready, _ = ray.wait(calls, num_returns=1, timeout=TICK_S)
                finished: list[Completion] = []
                for place in self._places:
                    if place.call is not None and place.call in ready:
                        finished += self._collect(place, source)
                    elif place.call is not None:
                        self._check_deadline(place)
                yield from finished
                if not finished:
                    yield None
        finally:
            self._abandon()

    def _deal(self, source: "_Source") -> None:
        """Give every idle replica as much as it wants."""
        for place in self._places:
            if place.started and place.call is None:
                chosen = source.take(min(place.room, DEALT_AT_ONCE))
                if chosen or place.rows:
                    place.rows.update((request.key, request) for request in chosen)
                    place.call = place.actor.work.remote(chosen)
                    place.since = time.monotonic()

    def _collect(self, place: _Place, source: "_Source") -> list[Completion]:
        import ray

        call, place.call = place.call, None
        try:
            result = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, TagPRError) else error from None
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            self._replace(place, source, next(iter(str(error).splitlines()), type(error).__name__))
            return []
        if not place.started:
            place.room, problem = result
            if problem is not None:
                raise problem
            place.started = True
            return []
        finished, place.room = result
        for completion in finished:
            del place.rows[completion.key]
        if finished:
            self._deaths = 0
        return list(finished)

    def _check_deadline(self, place: _Place) -> None:
        lasted = time.monotonic() - place.since
        if not place.started and lasted > START_DEADLINE_S and not any(its.started for its in self._places):
            raise StageError(
                f"evaluate.engine.replicas={self._replicas}: none could be started in {START_DEADLINE_S:.0f} s. "
                "Does the cluster have the CPUs or GPUs for them?"
            )
        if place.started and lasted > CALL_DEADLINE_S:
            import ray

            logger.warning("a replica has not answered for %.0f s, and is ended", lasted)
            ray.kill(place.actor)
            place.since = time.monotonic()

    def _replace(self, place: _Place, source: "_Source", why: str) -> None:
        """A new actor in place of a dead one; its rows are dealt again, before any new ones."""
        import ray

        self._deaths += 1
        if self._deaths >= DEATHS_IN_A_ROW * self._replicas:
            raise StageError(
                f"evaluate.engine.replicas={self._replicas}: they died {self._deaths} times without a finished row between "
                f"({why}). Out of memory? Lower evaluate.engine.max_num_seqs or replicas, then run the same command again."
            )
        logger.warning("a replica died (%s): %d rows are dealt again", why, len(place.rows))
        source.give_back(place.rows.values())
        # Ray may only have lost sight of it.
        ray.kill(place.actor)
        self._places[self._places.index(place)] = self._new_place()

    def _new_place(self) -> _Place:
        return _Place(self._actor_class.options(**self._options).remote(*self._arguments))

    def _abandon(self) -> None:
        """After an early end: nobody waits for what is unfinished."""
        for place in self._places:
            if place.rows:
                place.rows.clear()
                place.actor.abandon.remote()
                place.call, place.started = place.actor.start.remote(), False

    def _stop(self) -> None:
        import ray

        for place in self._places:
            ray.kill(place.actor)
        self._places = []
        self._stack.close()


@contextmanager
def _ray(replicas: int) -> Iterator[None]:
    """The cluster at ``RAY_ADDRESS``, or a Ray of this process's own.

    Raises:
        StageError: it cannot be started or reached.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        with connected(address, forwarded(), key="RAY_ADDRESS", log_to_driver=False):
            yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(local_ray(max(replicas, os.cpu_count() or 1)))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StageError(
                f"evaluate.engine.replicas={replicas}: Ray cannot be started ({reason}). Mend it, or use 1 replica."
            ) from error
        yield
