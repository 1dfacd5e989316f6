"""What a chain must get past before anyone pays for a judgement: it says something, and its answer is right enough (S7).

The first is against *master keys*: openers such as "Thought process:" or a lone colon, for which model judges are known to
give full marks although they hold no reasoning.
"""

import re
import unicodedata

from data_pipeline.settings import AccuracySettings
from tagpr.benchmarks.tasks import get_task, parse_answer
from tagpr.errors import ConfigError
from tagpr.metrics import task_score
from tagpr.schema import Chain

# Openers without content, without punctuation.
MASTER_KEYS = (
    "let s solve this problem step by step", "let us solve this problem step by step",
    "let s solve this step by step", "let us solve this step by step", "let s think step by step",
    "let us think step by step", "let s think about this step by step", "step by step solution", "step by step",
    "here is my thought process", "here is the thought process", "here is the solution", "my thought process",
    "thought process", "thinking process", "reasoning process", "thoughts", "the solution is", "the answer is",
    "final answer", "chain of thought", "reasoning", "solution", "answer", "explanation", "analysis", "conclusion",
    "okay", "ok", "sure", "certainly", "first", "so", "step 1", "step",
    "让我们一步一步地解决这个问题", "让我们一步一步思考", "思考过程", "解题过程", "解答", "解", "答案", "答",
    "ステップバイステップで考えましょう", "思考プロセス", "かいせつ", "解説", "解答", "풀이 과정", "풀이", "해설",
    "pasemos a resolver este problema paso a paso", "proceso de pensamiento", "respuesta", "solución",
    "denkprozess", "gedankengang", "lösung", "processus de réflexion", "réponse", "решение", "ответ", "ход мыслей",
)  # fmt: skip
_WORD = re.compile(r"\w+")
_KEYS = re.compile(
    rf"(?<!\w)(?:{'|'.join(sorted((key.casefold() for key in MASTER_KEYS), key=len, reverse=True))})(?!\w)"
)
# One letter of these scripts says about as much as a word of others.
_WORD_OR_LETTER = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


def check_thresholds(accuracy: AccuracySettings, tasks: list[str]) -> None:
    """Every generation task needs a threshold, no other task may have one.

    Raises:
        ConfigError: naming the key that is missing or means nothing.
    """
    wanted = {task for task in tasks if get_task(task).kind == "generation"}
    for task in sorted(wanted - set(accuracy.above)):
        raise ConfigError(f"chains.accuracy.above.{task}: is missing. Give the ROUGE to exceed, in [0, 1].")
    for task in sorted(set(accuracy.above)):
        if get_task(task).kind != "generation":
            raise ConfigError(
                f"chains.accuracy.above.{task}: this task is filtered by exact match. Remove the key."
            )


def chain_problem(chain: Chain, accuracy: AccuracySettings) -> str:
    """Why a chain is not worth judging, or an empty string.

    ``says_nothing``: fewer than ``minimum_words`` words beside stock openers. ``wrong_answer``: no exact match
    (classification, rating), or ROUGE not above the task's threshold (generation); an answer without letters or digits never
    exceeds any.
    """
    if content_words(chain.reasoning) < accuracy.minimum_words:
        return "says_nothing"
    task = get_task(chain.task)
    score = task_score(task, chain.gold, parse_answer(chain.task, chain.answer), accuracy.rouge)
    right = score > accuracy.above[chain.task] if task.kind == "generation" else score == 1.0
    return "" if right else "wrong_answer"


def content_words(text: str) -> int:
    """Words that are no part of a master key; letters of Chinese, Japanese and Korean count one by one."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    plain = " ".join(_WORD.findall(visible.casefold()))
    return len(_WORD_OR_LETTER.findall(_KEYS.sub(" ", plain)))
