"""Stage ``build_chains``: ``python -m data_pipeline key=value ...`` (SPEC S5-S16)."""

import asyncio
import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from data_pipeline import judge, simulated
from data_pipeline.build import Built, Models, build
from data_pipeline.endpoint import Endpoint, read_key
from data_pipeline.filters import check_thresholds
from data_pipeline.funnel import Funnel
from data_pipeline.ledger import Ledger
from data_pipeline.outputs import is_complete, write_outputs
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import ChainSettings, ModelSettings, read_settings
from data_pipeline.tagging import RestrictedTagging
from tagpr.benchmarks.prompt import build_prompt
from tagpr.benchmarks.storage import examples_file, read_examples
from tagpr.configuration import main
from tagpr.errors import ConfigError, StageError
from tagpr.runs import file_hash, manifest
from tagpr.schema import Example
from tagpr.tags import vocabulary_hash

logger = logging.getLogger("data_pipeline")

ROLES = ("teacher", "judge", "tagger")


def run(config: DictConfig) -> None:
    """Make chains and preference pairs from the training examples; again with the same settings: do nothing.

    Raises:
        ConfigError: a setting is wrong, or the variable with an API key is not set.
        StageError: the examples are missing, or an endpoint or the ledger cannot be used.
        DataError: the examples are malformed.
    """
    started = time.monotonic()
    settings = read_settings(config)
    tasks = list(config.benchmark.tasks)
    check_thresholds(settings.accuracy, tasks)
    if settings.endpoint == "simulated":
        settings = _label_simulated(settings)
    judge_prompt = PromptTemplate.load("chains.prompts.judge", settings.prompts.judge, judge.PROMPT_FIELDS)
    tagging = RestrictedTagging.load(settings.tagging.mode, settings.prompts, settings.minimum_segments)
    source = examples_file(config.paths.examples, "train")
    if not source.is_file():
        raise StageError(
            f"{source}: no such file. Make it with `bash recipes/prepare_data.sh`, or set paths.examples."
        )
    folder = Path(config.paths.chains)
    fingerprint = _fingerprint(config, settings, file_hash(source), judge_prompt, tagging.template)
    if is_complete(folder, fingerprint):
        logger.info("%s: is complete and of these settings; nothing to do", folder)
        return

    keys = {role: _key(role, settings) for role in ROLES}
    examples = [example for example in read_examples(source) if example.task in tasks]
    if not examples:
        raise StageError(
            f"{source}: has no example of benchmark.tasks={tasks}. Make it with `bash recipes/prepare_data.sh`."
        )
    prompt_of = _prompt_builder(config, settings.tokenizer)
    funnel = Funnel(tasks)

    async def work(
        ledger: Ledger, addresses: dict[str, tuple[str, str]]
    ) -> tuple[Built, dict[str, dict[str, int]]]:
        endpoints = {}
        for role in ROLES:
            model: ModelSettings = getattr(settings, role)
            base_url, key = addresses[role]
            endpoints[role] = Endpoint(
                f"chains.{role}", model, ledger, config.run.seed, settings.retries, base_url, key
            )
        models = Models(**endpoints, judge_prompt=judge_prompt, tagging=tagging)
        try:
            built = await build(examples, tasks, prompt_of, settings, models, funnel, config.run.seed)
        finally:
            for endpoint in endpoints.values():
                await endpoint.close()
        return built, {role: dict(endpoint.counts) for role, endpoint in endpoints.items()}

    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(Path(settings.ledger)))
        if settings.endpoint == "simulated":
            addresses = dict.fromkeys(ROLES, stack.enter_context(simulated.running(settings)))
        else:
            addresses = {role: (getattr(settings, role).base_url, keys[role]) for role in ROLES}
        with asyncio.Runner(loop_factory=_fast_loop()) as runner:
            built, counts = runner.run(work(ledger, addresses))
        totals = ledger.totals()
    if not built.selected:
        for line in funnel.table():
            logger.info("%s", line)
        raise StageError(
            "chains: no chain passed every filter. The funnel above says where they went; "
            "loosen chains.accuracy.above or chains.judge_minimum, or look at the teacher's replies."
        )

    notes = {
        "simulated": settings.endpoint == "simulated",
        "fingerprint": fingerprint,
        "models": {role: getattr(settings, role).model for role in ROLES},
        "prompts": {"judge": judge_prompt.version, "restricted_tagging": tagging.template.version},
        "settings": settings.model_dump(mode="json", exclude={"ledger"}),
        "ledger": totals,
    }
    write_outputs(
        folder, built, funnel, manifest("build_chains", {"examples": source}, config.run.seed, **notes)
    )
    for role, count in counts.items():
        named = ", ".join(f"{name} {number:,}" for name, number in sorted(count.items()))
        logger.info("%s (%s): %s", role, getattr(settings, role).model, named or "nothing asked")
    for line in funnel.table():
        logger.info("%s", line)
    logger.info(
        "%s: %d chains for SFT, %d preference pairs, in %.0f s%s",
        folder,
        len(built.selected),
        len(built.pairs),
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
    """The three models under their simulated names, whatever the setting calls them."""
    names = {"teacher": simulated.TEACHER, "judge": simulated.JUDGE, "tagger": simulated.TAGGER}
    revision = simulated.revision(settings.simulated)
    return settings.model_copy(
        update={
            role: getattr(settings, role).model_copy(update={"model": name, "revision": revision})
            for role, name in names.items()
        }
    )


def _key(role: str, settings: ChainSettings) -> str:
    model: ModelSettings = getattr(settings, role)
    if settings.endpoint == "simulated":
        return ""
    assert model.key_variable is not None, "read_settings checks it"
    return read_key(f"chains.{role}", model.key_variable)


def _fingerprint(
    config: DictConfig,
    settings: ChainSettings,
    examples: str,
    judge_prompt: PromptTemplate,
    tagging_prompt: PromptTemplate,
) -> str:
    """Hash of everything that determines the outputs, and of nothing that does not (concurrency, URLs)."""
    aside = {"concurrency", "timeout_s", "base_url", "key_variable"}
    determinants = {
        "settings": settings.model_dump(
            mode="json",
            exclude={"ledger": True, "retries": True, "prompts": True} | dict.fromkeys(ROLES, aside),
        ),
        "prompts": [judge_prompt.version, tagging_prompt.version],
        "tags": vocabulary_hash(),
        "benchmark": OmegaConf.to_container(config.benchmark),
        "seed": config.run.seed,
        "examples": examples,
    }
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()


def _prompt_builder(config: DictConfig, tokenizer: str | None) -> Callable[[Example, bool], str]:
    benchmark = config.benchmark
    count_tokens = None if tokenizer is None else _token_counter(tokenizer)

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
