"""What determines a run's outputs, its prompts and its paid replies; and whether a ledger fits a configuration."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipeline.ledger import Ledger
from data_pipeline.settings import ROLES, ChainSettings
from data_pipeline.tagging import definitions_text
from data_pipeline.wordings import Prompts
from tagpr.errors import StageError
from tagpr.runs import file_hash
from tagpr.tags import vocabulary_hash

# Where a model is and how fast it may be asked: nothing of what it says depends on it.
_ASIDE = frozenset({"concurrency", "timeout_s", "base_url", "key_variable", "key_file", "vllm", "mode"})


def fingerprint_of(config: DictConfig, settings: ChainSettings, examples: str, prompts: Prompts) -> str:
    """Hash of everything that determines the outputs, and of nothing that does not (concurrency, URLs).

    ``examples`` is the hash of the examples' file.
    """
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


def prompt_determinants(config: DictConfig, settings: ChainSettings, examples: str) -> str:
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


def paid_for(config: DictConfig, settings: ChainSettings, prompts: Prompts) -> dict[str, Any]:
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


def check_ledger(ledger: Ledger, now: dict[str, Any], settings: ChainSettings) -> None:
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
