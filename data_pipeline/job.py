"""The asynchronous part of ``build_chains``: workers, endpoints, batches, and passes until nothing is left waiting."""

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from data_pipeline.cost import spent_dollars
from data_pipeline.endpoint import Endpoint
from data_pipeline.eta import FOR_PAIRS, TAGGING, outlook
from data_pipeline.flow import Flow, Models, no_chain_left
from data_pipeline.funnel import Funnel
from data_pipeline.ledger import Ledger
from data_pipeline.preferences import Candidate
from data_pipeline.progress import Gauges, Progress
from data_pipeline.provider_batches import BatchAddress, Batches
from data_pipeline.settings import ROLES, ChainSettings, ModelSettings, in_this_job
from data_pipeline.store import Label, Store
from data_pipeline.wordings import Prompts
from data_pipeline.workers import Address, Pool, http_pool
from tagpr.chat.asking import Asker
from tagpr.chat.cost import Budget
from tagpr.chat.limits import AdaptiveLimit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """A pass in which nothing was left waiting."""

    flow: Flow
    selected: list[Label]
    candidates: list[Candidate]


@dataclass(frozen=True)
class Waiting:
    """Units wait in batches; ``line`` says so."""

    line: str


class Job:
    """The asynchronous part: workers, endpoints, passes."""

    def __init__(
        self,
        seed: int,
        settings: ChainSettings,
        prompts: Prompts,
        folder: Path,
        ledger: Ledger,
        store: Store,
        tasks: list[str],
        addresses: dict[str, tuple[str, str]],
    ) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._seed = seed
        self._settings = settings
        self._prompts = prompts
        self._folder = folder
        self._ledger = ledger
        self._store = store
        self._tasks = tasks
        self._addresses = addresses

    async def run(self) -> "Made | Waiting | None":
        """Passes over everything until no unit waits in a batch; None where ``chains.stop_after`` ends it before."""
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            over_http = {
                role: Address(
                    base_url=self._addresses[role][0],
                    api_key=self._addresses[role][1],
                    timeout_s=self._model(role).timeout_s,
                    connections=self._model(role).concurrency,
                )
                for role in ROLES
                if not in_this_job(settings, role)
            }
            http = await stack.enter_async_context(http_pool("chains.workers", settings.workers, over_http))
            pools = dict.fromkeys(over_http, http)
            if in_this_job(settings, "teacher"):
                from data_pipeline.replicas import vllm_pool

                pools["teacher"] = await stack.enter_async_context(vllm_pool(settings.teacher))
            budget = Budget(
                settings.budget.dollars,
                settings.prices,
                spent=spent_dollars(self._ledger.spent(), settings.prices),
            )
            batches = None
            later = {role: self._addresses[role] for role in over_http if self._model(role).mode == "batch"}
            if later:
                batches = Batches(
                    self._ledger,
                    {
                        role: BatchAddress(url, key, self._model(role).key_source)
                        for role, (url, key) in later.items()
                    },
                    settings.batch,
                    budget,
                    settings.retries,
                )
                stack.push_async_callback(batches.close)
            models = self._models(pools, budget, batches)

            while True:
                self._store.clear()
                funnel = Funnel(self._tasks)
                progress = Progress(self._store, funnel, self._gauges(models, budget))
                flow = Flow(self._store, settings, models, funnel, progress, self._seed)
                made = await self._pass(flow)
                if batches is None or not flow.pending:
                    return made
                while True:
                    moved = await batches.advance()
                    if moved.collected or moved.refused:
                        break
                    if settings.batch.poll_s is None:
                        return Waiting(str(moved))
                    logger.info("%s", moved)
                    await asyncio.sleep(settings.batch.poll_s)

    def _gauges(self, models: Models, budget: Budget) -> Gauges:
        endpoints = (models.teacher, models.judge, models.tagger, models.explorer)
        before: Counter[str] = Counter()

        def seen() -> Counter[str]:
            return sum((endpoint.seen for endpoint in endpoints), Counter()) - before

        def latency() -> dict[str, float]:
            return {
                endpoint.role: endpoint.asker.answering_s / endpoint.counts["asked"]
                for endpoint in endpoints
                if endpoint.counts["asked"]
            }

        before = seen()
        return Gauges(
            details=lambda: f"${budget.spent:.2f} spent" if budget.spent else "",
            seen=seen,
            latency=latency,
            outlook=lambda position: outlook(self._settings, position, self._ledger.paces()),
        )

    async def _pass(self, flow: Flow) -> "Made | None":
        store, settings = self._store, self._settings
        await flow.chains()
        if settings.stop_after == "judge":
            return None
        if settings.exploratory.chains and not flow.pending:
            await flow.explore(self._folder)
        if settings.stop_after == "exploratory":
            return None
        await flow.tag([chain.id for chain in store.labels("main", judged=True)], TAGGING, "tagged")
        if flow.pending:
            return None
        selected = flow.select()
        if not selected:
            raise no_chain_left(flow.funnel)
        candidates = flow.candidates()
        await flow.tag(flow.untagged(candidates), FOR_PAIRS, "tagged_for_pairs")
        return Made(flow, selected, candidates)

    def _models(self, pools: dict[str, Pool], budget: Budget, batches: Batches | None) -> Models:
        endpoints, now = {}, {}
        for role in ROLES:
            model = self._model(role)
            asker = Asker(
                f"chains.{role}",
                pools[role].attempt(role),
                base_url=self._addresses[role][0],
                key_variable=model.key_source,
                retries=self._settings.retries,
                # As many again wait in the worker, so that the endpoint never waits for the driver.
                limit=AdaptiveLimit(model.concurrency, ahead=model.concurrency),
                budget=budget,
            )
            self.counts[role] = asker.counts
            later = batches if model.mode == "batch" and not in_this_job(self._settings, role) else None
            endpoints[role] = Endpoint(role, model, self._ledger, self._seed, asker, later)
            now[role] = Endpoint(role, model, self._ledger, self._seed, asker)
        return Models(
            **endpoints,
            explorer=now["tagger"],
            judge_prompt=self._prompts.judge,
            tagging=self._prompts.tagging,
        )

    def _model(self, role: str) -> ModelSettings:
        return cast("ModelSettings", getattr(self._settings, role))
