"""R_v: is the answer the one this user would give? (eq. 6, S23)."""

from tagpr.benchmarks.tasks import get_task, parse_answer
from tagpr.errors import DataError
from tagpr.metrics import RougeKind, task_score
from tagpr.tags import Response


def verifiable_reward(task: str, gold: str, response: Response, rouge: RougeKind = "mean") -> float:
    """R_v in [0, 1]: exact match (LaMP-1, -2, -3) or ROUGE (LaMP-4, -5, -7) of the parsed answer.

    0 where the response breaks the format: what is not in the answer's place is no answer. Eq. 5 and 11
    multiply by R_f anyway, so this only decides what is logged.

    Raises:
        ConfigError: unknown task or ROUGE.
        DataError: the gold answer is empty, so that nothing could ever be right.
    """
    spec = get_task(task)
    if not gold.strip():
        raise DataError(f"{task}: a gold answer is empty. Drop the row or mend the outputs file.")
    if response.problem:
        return 0.0
    return task_score(spec, gold, parse_answer(task, response.answer), rouge)
