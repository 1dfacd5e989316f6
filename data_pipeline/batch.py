"""Looks at a ledger's batches, or collects what has ended, without a run.

python -m data_pipeline.batch status|collect key=value ...
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from data_pipeline import simulated
from data_pipeline.endpoint import read_key
from data_pipeline.ledger import Ledger
from data_pipeline.provider_batches import BatchAddress, Batches
from data_pipeline.settings import ROLES, ModelSettings, in_this_job, read_settings
from tagpr.chat.cost import Budget
from tagpr.configuration import main
from tagpr.errors import ConfigError, StageError

logger = logging.getLogger("data_pipeline.batch")


def show(command: str, config: DictConfig) -> None:
    """``status``: a line for each batch that is out; ``collect``: put what has ended into the ledger.

    Raises:
        ConfigError: no model of this configuration is in batch mode, or a key is not there.
        StageError: as :meth:`Batches.advance`.
    """
    settings = read_settings(config)
    models: dict[str, ModelSettings] = {
        role: getattr(settings, role)
        for role in ROLES
        if getattr(settings, role).mode == "batch" and not in_this_job(settings, role)
    }
    if not models:
        raise ConfigError(
            "chains.judge.mode=sync: no model is in batch mode. Set mode=batch as in the run itself."
        )
    if not Path(settings.ledger).is_file():
        raise StageError(
            f"{settings.ledger}: no such ledger. Start a run with `bash recipes/build_chains.sh`, or set chains.ledger."
        )

    async def work(ledger: Ledger, addresses: Mapping[str, BatchAddress]) -> None:
        batches = Batches(ledger, addresses, settings.batch, Budget(None, settings.prices), settings.retries)
        try:
            if command == "collect":
                progress = await batches.advance(submit=False)
                logger.info(
                    "collected %d replies (%d refused, %d without an answer); %d units wait in %d batches",
                    progress.collected, progress.refused, progress.failed, progress.open_units, progress.open_batches,
                )  # fmt: skip
            else:
                lines = await batches.statuses()
                for line in lines or ["no batch is out"]:
                    logger.info("%s", line)
        finally:
            await batches.close()

    with contextlib.ExitStack() as stack:
        if settings.endpoint == "simulated":
            url, key = stack.enter_context(simulated.running(settings))
            addresses = {role: BatchAddress(url, key, "the simulated endpoint") for role in models}
        else:
            addresses = {
                role: BatchAddress(
                    str(model.base_url),
                    read_key(f"chains.{role}", model.key_variable, model.key_file),
                    model.key_source,
                )
                for role, model in models.items()
            }
        ledger = stack.enter_context(Ledger(Path(settings.ledger)))
        asyncio.run(work(ledger, addresses))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("status", "collect"):
        sys.stderr.write("usage: python -m data_pipeline.batch status|collect [key=value ...]\n")
        sys.exit(2)
    main("build_chains", lambda config: show(sys.argv[1], config), sys.argv[2:])
