"""The accuracy filter: is the chain's answer right enough to learn from? (S7)"""

from collections.abc import Mapping

from tagpr.benchmarks.tasks import get_task, parse_answer
from tagpr.errors import ConfigError
from tagpr.metrics import rouge_score
from tagpr.schema import Chain


def check_thresholds(thresholds: Mapping[str, float], tasks: list[str]) -> None:
    """Every generation task needs a threshold, no other task may have one.

    Raises:
        ConfigError: naming the key that is missing or means nothing.
    """
    wanted = {task for task in tasks if get_task(task).kind == "generation"}
    for task in sorted(wanted - set(thresholds)):
        raise ConfigError(f"chains.rouge_l_above.{task}: is missing. Give the ROUGE-L to exceed, in [0, 1].")
    for task in sorted(set(thresholds)):
        if get_task(task).kind != "generation":
            raise ConfigError(
                f"chains.rouge_l_above.{task}: this task is filtered by exact match. Remove the key."
            )


def is_accurate(chain: Chain, thresholds: Mapping[str, float]) -> bool:
    """Exact match for classification and rating, ROUGE-L above the task's threshold for generation."""
    task = get_task(chain.task)
    if task.kind != "generation":
        return chain.verifiable == 1.0
    rouge_l = rouge_score(chain.gold, parse_answer(chain.task, chain.answer), "rougeL", task.rouge_tokens)
    return rouge_l > thresholds[chain.task]
