"""Stage ``build_chains``: ``python -m data_pipeline key=value ...`` (SPEC S5-S16). This process is the job's driver."""

import asyncio
import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from data_pipeline import cluster, cost, judge, simulated
from data_pipeline.batch import BatchAddress, Batches
from data_pipeline.cost import spent_dollars
from data_pipeline.endpoint import Endpoint, read_key
from data_pipeline.eta import FOR_PAIRS, TAGGING, outlook
from data_pipeline.filters import check_thresholds
from data_pipeline.flow import Flow, Models, no_chain_left
from data_pipeline.funnel import Funnel
from data_pipeline.ledger import Ledger
from data_pipeline.outputs import is_complete, write_outputs
from data_pipeline.preferences import Candidate
from data_pipeline.progress import Gauges, Progress
from data_pipeline.prompts import PromptTemplate
from data_pipeline.selection import draw_instances, shuffled
from data_pipeline.settings import ChainSettings, ModelSettings, in_this_job, read_settings
from data_pipeline.store import Instance, Label, Store, store_path
from data_pipeline.tagging import RestrictedTagging, definitions_text
from data_pipeline.workers import Address, Pool, http_pool
from tagpr.benchmarks.prompt import QueryTooLongError, build_prompt
from tagpr.benchmarks.storage import examples_file, iterate_examples
from tagpr.chat.asking import Asker
from tagpr.chat.cost import Budget
from tagpr.chat.limits import AdaptiveLimit
from tagpr.configuration import main
from tagpr.dense_retrieval import install
from tagpr.errors import ConfigError, StageError
from tagpr.runs import file_hash, manifest
from tagpr.schema import Example
from tagpr.tags import vocabulary_hash

logger = logging.getLogger("data_pipeline")

ROLES = ("teacher", "judge", "tagger")
# Exit status of a run that has to be continued when the provider has answered its batches.
WAITING_STATUS = 3


def run(config: DictConfig) -> None:
    """Make chains and preference pairs from the training examples; again with the same settings: do nothing.

    Raises:
        ConfigError: a setting is wrong, or an API key is not there.
        StageError: the examples are missing, or Ray, an endpoint, the ledger or the disk cannot be used.
        DataError: the examples are malformed.
    """
    started = time.monotonic()
    settings = read_settings(config)
    tasks = list(config.benchmark.tasks)
    check_thresholds(settings.accuracy, tasks)
    if settings.endpoint == "simulated":
        settings = _label_simulated(settings)
    if in_this_job(settings, "teacher"):
        settings = _own_teacher(settings)
    prompts = Prompts.load(settings)
    source = examples_file(config.paths.examples, "train")
    if not source.is_file():
        raise StageError(
            f"{source}: no such file. Make it with `bash recipes/prepare_data.sh`, or set paths.examples."
        )
    folder = Path(config.paths.chains)
    examples = file_hash(source)
    fingerprint = _fingerprint(config, settings, examples, prompts)
    if is_complete(folder, fingerprint):
        logger.info("%s: is complete and of these settings; nothing to do", folder)
        return

    keys = {role: _key(role, settings) for role in ROLES}
    with contextlib.ExitStack() as stack:
        path = Path(settings.ledger)
        ledger = stack.enter_context(Ledger(path))
        _check_ledger(ledger, _paid_for(config, settings, prompts), settings)
        store = stack.enter_context(Store(store_path(path)))
        draw = Draw(config, settings, tasks, source)
        store.fill(_prompt_determinants(config, settings, examples), draw.instances, draw.blank, draw.notes)
        cost.before_run(settings, store, ledger)
        if settings.endpoint == "simulated":
            addresses = dict.fromkeys(ROLES, stack.enter_context(simulated.running(settings)))
        else:
            addresses = {role: (getattr(settings, role).base_url, keys[role]) for role in ROLES}
        stack.enter_context(cluster.ray_running(settings.ray))
        job = Job(config, settings, prompts, folder, ledger, store, tasks, addresses)
        with asyncio.Runner(loop_factory=_fast_loop()) as runner:
            result = runner.run(job.run())
        if isinstance(result, Waiting):
            logger.warning("%s", result.line)
            sys.exit(WAITING_STATUS)
        if result is None:
            logger.info(
                "chains.stop_after=%s: ends here; the same command without it goes on", settings.stop_after
            )
            return
        flow, selected, candidates = result.flow, result.selected, result.candidates
        funnel = flow.funnel
        notes = {
            "simulated": settings.endpoint == "simulated",
            "fingerprint": fingerprint,
            "benchmark": OmegaConf.to_container(config.benchmark),
            "models": {role: getattr(settings, role).model for role in ROLES},
            "prompts": {
                "judge": prompts.judge.version,
                "restricted_tagging": prompts.tagging.template.version,
            },
            "settings": settings.model_dump(mode="json", exclude={"ledger", "ray", "workers"}),
            "dollars": spent_dollars(ledger.spent(), settings.prices),
            "ledger": ledger.totals(),
        }
        record = manifest("build_chains", {"examples": source}, config.run.seed, **notes)
        write_outputs(
            folder,
            store.all_chains("main"),
            store.chains(chain.id for chain in selected),
            lambda kind: flow.pairs([pair for pair in candidates if pair.kind == kind]),
            funnel,
            record,
        )
        for role, counts in job.counts.items():
            named = ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items()))
            logger.info("%s (%s): %s", role, getattr(settings, role).model, named or "nothing asked")
    # Everything in it is in the outputs now.
    store.remove()
    for line in funnel.table():
        logger.info("%s", line)
    logger.info(
        "%s: %d chains for SFT, %d preference pairs, in %.0f s%s",
        folder,
        len(selected),
        funnel.total("prp") + funnel.total("pqp"),
        time.monotonic() - started,
        " (SIMULATED teacher, judge and tagger)" if settings.endpoint == "simulated" else "",
    )


@dataclass(frozen=True)
class Prompts:
    """The wordings in use."""

    judge: PromptTemplate
    tagging: RestrictedTagging

    @classmethod
    def load(cls, settings: ChainSettings) -> "Prompts":
        """Read the files.

        Raises:
            ConfigError: one cannot be used.
        """
        return cls(
            PromptTemplate.load("chains.prompts.judge", settings.prompts.judge, judge.PROMPT_FIELDS),
            RestrictedTagging.load(
                settings.tagging.mode, settings.prompts, settings.minimum_segments, settings.tagger.structured
            ),
        )


class Draw:
    """The training examples that are drawn, with their prompts (S5)."""

    def __init__(self, config: DictConfig, settings: ChainSettings, tasks: list[str], source: Path) -> None:
        self._config = config
        self._settings = settings
        self._tasks = tasks
        self._source = source
        self._kept: list[_Row] = []
        self._dropped: Counter[str] = Counter()

    def instances(self) -> Iterator[Instance]:
        """In the order of the file, which is read twice: only ids are in memory.

        Raises:
            DataError: a row is malformed.
            StageError: no row is of one of the tasks.
        """
        seed = self._config.run.seed
        rows: list[_Row] = []
        others: Counter[str] = Counter()
        for example in iterate_examples(self._source):
            if example.task in self._tasks:
                rows.append(_Row(example.id, example.task, example.user_id))
            else:
                others[example.task] += 1
        if not rows:
            raise StageError(
                f"{self._source}: has no example of benchmark.tasks={self._tasks}. "
                "Make it with `bash recipes/prepare_data.sh`."
            )
        if others:
            # Left out on purpose, or a task's name with a slip in it.
            named = ", ".join(f"{task} {count:,}" for task, count in sorted(others.items()))
            logger.warning(
                "%s: rows of tasks that benchmark.tasks does not name are left out: %s", self._source, named
            )
        drawn = draw_instances(rows, self._tasks, self._settings.instances_per_task, seed)
        numbers = {row.id: number for number, row in enumerate(drawn)}
        del rows
        prompt_of = _prompt_builder(self._config, self._settings.tokenizer)
        for example in iterate_examples(self._source):
            if example.id not in numbers:
                continue
            try:
                prompt = prompt_of(example, True)
            except QueryTooLongError:
                self._dropped["query_too_long"] += 1
                continue
            self._kept.append(_Row(example.id, example.task, example.user_id))
            yield Instance(
                numbers[example.id], example.id, example.task, example.user_id, example.gold, prompt,
                prompt_of(example, False),
            )  # fmt: skip

    def blank(self) -> set[str]:
        """Those that are answered without the profile as well (S15): so many of each task."""
        preferences = self._settings.preferences
        left = dict.fromkeys(self._tasks, preferences.prp_instances_per_task if preferences.prp_pairs else 0)
        chosen = set()
        for row in shuffled(self._kept, lambda row: row.id, self._config.run.seed + 1):
            left[row.task] -= 1
            if left[row.task] >= 0:
                chosen.add(row.id)
        return chosen

    def notes(self) -> dict[str, Any]:
        """What became of the rows that were drawn."""
        return {"kept": dict(Counter(row.task for row in self._kept)), "dropped": dict(self._dropped)}


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    task: str
    user_id: str


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
        config: DictConfig,
        settings: ChainSettings,
        prompts: Prompts,
        folder: Path,
        ledger: Ledger,
        store: Store,
        tasks: list[str],
        addresses: dict[str, tuple[str, str]],
    ) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._seed = config.run.seed
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


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (uvicorn's and vLLM's extras bring it): a quarter less time per request."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    uvloop = importlib.import_module("uvloop")
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


def _label_simulated(settings: ChainSettings) -> ChainSettings:
    """The models behind the simulated endpoint under their simulated names, whatever the setting calls them."""
    names = {"teacher": simulated.TEACHER, "judge": simulated.JUDGE, "tagger": simulated.TAGGER}
    revision = simulated.revision(settings.simulated)
    return settings.model_copy(
        update={
            role: getattr(settings, role).model_copy(update={"model": name, "revision": revision})
            for role, name in names.items()
            if not in_this_job(settings, role)
        }
    )


def _own_teacher(settings: ChainSettings) -> ChainSettings:
    """With a vLLM teacher: its weights become part of what determines its replies."""
    # Slow to import (vLLM), and only there with a vLLM of one's own.
    from data_pipeline.replicas import check_request, weights_revision

    teacher = settings.teacher
    check_request(teacher, settings.preferences.extra_request)
    revision = " ".join(filter(None, (teacher.revision, weights_revision(teacher.model))))
    return settings.model_copy(update={"teacher": teacher.model_copy(update={"revision": revision})})


def _key(role: str, settings: ChainSettings) -> str:
    model: ModelSettings = getattr(settings, role)
    if settings.endpoint == "simulated" or in_this_job(settings, role):
        return ""
    return read_key(f"chains.{role}", model.key_variable, model.key_file)


# Where a model is and how fast it may be asked: nothing of what it says depends on it.
_ASIDE = frozenset({"concurrency", "timeout_s", "base_url", "key_variable", "key_file", "vllm", "mode"})


def _fingerprint(config: DictConfig, settings: ChainSettings, examples: str, prompts: Prompts) -> str:
    """Hash of everything that determines the outputs, and of nothing that does not (concurrency, URLs)."""
    aside: dict[str, Any] = dict.fromkeys(
        (
            "ledger",
            "extend_ledger",
            "stop_after",
            "workers",
            "ray",
            "retries",
            "prompts",
            "prices",
            "budget",
            "expected",
            "batch",
        ),
        True,
    )
    determinants = {
        "settings": settings.model_dump(mode="json", exclude=aside | {role: set(_ASIDE) for role in ROLES}),
        "prompts": [prompts.judge.version, prompts.tagging.template.version],
        "tags": vocabulary_hash(),
        "benchmark": OmegaConf.to_container(config.benchmark),
        "seed": config.run.seed,
        "examples": examples,
    }
    return _hash(determinants)


def _prompt_determinants(config: DictConfig, settings: ChainSettings, examples: str) -> str:
    """Hash of everything that the prompts in the results store depend on, our own code included."""
    root = Path(sys.modules["tagpr"].__file__ or "").parent
    sources = sorted([*root.glob("benchmarks/*.py"), root / "retrieval.py", root / "tags.py"])
    return _hash(
        {
            "examples": examples,
            "benchmark": OmegaConf.to_container(config.benchmark),
            "seed": config.run.seed,
            "tokenizer": settings.tokenizer,
            "instances": settings.instances_per_task,
            "preferences": [
                settings.preferences.prp_instances_per_task,
                settings.preferences.prp_pairs > 0,
            ],
            "code": [file_hash(path) for path in sources],
        }
    )


def _paid_for(config: DictConfig, settings: ChainSettings, prompts: Prompts) -> dict[str, Any]:
    """By role, everything that decides whether a reply in a ledger is one of this run's."""
    wordings = {
        "teacher": {
            "benchmark.profile_size": config.benchmark.profile_size,
            "benchmark.retriever": config.benchmark.retriever,
        },
        "judge": {"chains.prompts.judge": prompts.judge.version},
        "tagger": {
            "chains.tagging.mode": settings.tagging.mode,
            "chains.prompts": prompts.tagging.template.version,
            "tags.vocabulary": _hash(definitions_text()),
        },
    }
    return {
        role: {
            "run.seed": config.run.seed,
            **{
                f"chains.{role}.{name}": value
                for name, value in getattr(settings, role).model_dump(mode="json").items()
                if name not in _ASIDE | {"backend"}
            },
            **wordings[role],
        }
        for role in ROLES
    }


def _check_ledger(ledger: Ledger, now: dict[str, Any], settings: ChainSettings) -> None:
    """Refuse a ledger whose replies this run would have to pay for again.

    Raises:
        StageError: naming the key that differs.
    """
    noted = ledger.note("paid_for")
    before = {} if noted is None else json.loads(noted)
    replies = {row.kind.split("_")[0]: row.replies for row in ledger.spent()}
    if not settings.extend_ledger and settings.endpoint != "simulated":
        for role in ROLES:
            if not replies.get(role):
                continue
            for key in sorted(now[role].keys() & before.get(role, {}).keys()):
                if now[role][key] != before[role][key]:
                    raise StageError(
                        f"{ledger.path}: its {replies[role]:,} {role} replies were paid for with {key}={before[role][key]}, "
                        f"this run has {now[role][key]} and would pay again. Set {key} back, chains.ledger to a new file, or "
                        "chains.extend_ledger=true to pay."
                    )
    ledger.set_note("paid_for", json.dumps({**before, **now}))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _prompt_builder(config: DictConfig, tokenizer: str | None) -> Callable[[Example, bool], str]:
    benchmark = config.benchmark
    count_tokens = None if tokenizer is None else _token_counter(tokenizer)
    install(benchmark.retriever, benchmark.retriever_model)

    def prompt_of(example: Example, with_profile: bool) -> str:
        return build_prompt(
            example,
            benchmark.profile_size if with_profile else 0,
            benchmark.retriever,
            count_tokens,
            benchmark.max_prompt_tokens,
            seed=config.run.seed,
        ).text

    return prompt_of


# <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n in Qwen3's template, none of it split further.
TEMPLATE_TOKENS = 8


def _token_counter(name: str) -> Callable[[str], int]:
    """Tokens of a prompt in the policy's chat template: a folder with tokenizer.json, or a model on the hub.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # that is what the tokenizers library raises
        raise ConfigError(
            f"chains.tokenizer={name}: cannot be read ({type(error).__name__}). "
            "Give a folder with tokenizer.json, a model on the hub, or null for no limit."
        ) from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids) + TEMPLATE_TOKENS


if __name__ == "__main__":
    main("build_chains", run)
