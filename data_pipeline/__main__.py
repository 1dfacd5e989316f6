"""Stage ``build_chains``: ``python -m data_pipeline key=value ...`` (SPEC S5-S16). This process is the job's driver."""

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from data_pipeline import cluster, cost, simulated
from data_pipeline.cost import spent_dollars
from data_pipeline.determinants import check_ledger, fingerprint_of, paid_for, prompt_determinants
from data_pipeline.draw import Draw
from data_pipeline.endpoint import read_key
from data_pipeline.filters import check_thresholds
from data_pipeline.job import Job, Waiting
from data_pipeline.ledger import Ledger
from data_pipeline.outputs import is_complete, write_outputs
from data_pipeline.settings import ROLES, ChainSettings, ModelSettings, in_this_job, read_settings
from data_pipeline.store import Store, store_path
from data_pipeline.wordings import Prompts
from tagpr.benchmarks.storage import examples_file
from tagpr.configuration import main
from tagpr.errors import StageError
from tagpr.runs import file_hash, manifest

logger = logging.getLogger("data_pipeline")

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
    fingerprint = fingerprint_of(config, settings, examples, prompts)
    if is_complete(folder, fingerprint):
        logger.info("%s: is complete and of these settings; nothing to do", folder)
        return

    keys = {role: _key(role, settings) for role in ROLES}
    with contextlib.ExitStack() as stack:
        path = Path(settings.ledger)
        ledger = stack.enter_context(Ledger(path))
        check_ledger(ledger, paid_for(config, settings, prompts), settings)
        store = stack.enter_context(Store(store_path(path)))
        draw = Draw(config, settings, tasks, source)
        store.fill(prompt_determinants(config, settings, examples), draw.instances, draw.blank, draw.notes)
        cost.before_run(settings, store, ledger)
        if settings.endpoint == "simulated":
            addresses = dict.fromkeys(ROLES, stack.enter_context(simulated.running(settings)))
        else:
            addresses = {role: (getattr(settings, role).base_url, keys[role]) for role in ROLES}
        stack.enter_context(cluster.ray_running(settings.ray))
        job = Job(config.run.seed, settings, prompts, folder, ledger, store, tasks, addresses)
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


if __name__ == "__main__":
    main("build_chains", run)
