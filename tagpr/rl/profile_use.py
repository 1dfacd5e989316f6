"""Does the policy use *this* user's items? A lexical measure over one training batch, without asking any model (S43).

Of the words of a response that are not in its query, the share that stands in its own prompt (:func:`profile_use`: *own*), less
the share that stands in the prompts of other users with the same task in the same batch (*other*). Words of the template
and everyday words are in both and cancel; a response that would fit any user scores 0. It sees quoting only: a
paraphrase of the profile ("kind", for a list of high ratings) counts for nothing, so its level says little, and its change
over a run is what the monitor looks at. Asking the policy itself with profiles exchanged would see more, and would cost
another pass over the batch.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Scripts without spaces are read in pairs of characters.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]{{1,2}}|(?:(?![{_UNSPACED}])\w)+")
_MARKUP = re.compile(r"<[^<>\s]*>")


def words(text: str) -> frozenset[str]:
    """Distinct words of a text in lower case, tags left out."""
    return frozenset(_WORD.findall(_MARKUP.sub(" ", text).lower()))


def profile_use(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``profile/{own,other,use,use_sem}`` and ``<task>/profile/use`` of one batch; empty where nothing can be compared.

    Args:
        rows: per response ``group``, ``task``, ``user_id``, ``query``, ``prompt`` (the rendered one) and ``response``.

    Returns:
        ``use`` is the mean of own - other over prompts, each the mean over its responses, and ``use_sem`` its standard
        error. A task of which the batch has one user only cannot be judged and is left out, as are responses that say
        nothing beyond their query.
    """
    prompts: dict[str, frozenset[str]] = {}
    told: dict[str, tuple[str, str, frozenset[str]]] = {}
    for row in rows:
        if row["group"] not in prompts:
            prompts[row["group"]] = words(row["prompt"])
            told[row["group"]] = (row["task"], row["user_id"], words(row["query"]))
    # How many prompts hold a word: per task, and per user of a task. Set sizes, so linear in the text of a batch.
    of_task: dict[str, Counter[str]] = defaultdict(Counter)
    of_user: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    asked: Counter[str | tuple[str, str]] = Counter()
    for group, (task, user, _) in told.items():
        of_task[task].update(prompts[group])
        of_user[task, user].update(prompts[group])
        asked.update([task, (task, user)])

    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        task, user, query = told[row["group"]]
        others = asked[task] - asked[task, user]
        said = words(row["response"]) - query
        if not others or not said:
            continue
        own = len(said & prompts[row["group"]]) / len(said)
        everywhere, here = of_task[task], of_user[task, user]
        other = sum(everywhere[word] - here[word] for word in said) / (others * len(said))
        found[row["group"]].append((own, other))
    if not found:
        return {}
    means = {group: np.mean(pairs, axis=0) for group, pairs in found.items()}
    use = np.array([own - other for own, other in means.values()])
    metrics = {
        "profile/own": float(np.mean([own for own, _ in means.values()])),
        "profile/other": float(np.mean([other for _, other in means.values()])),
        "profile/use": float(use.mean()),
    }
    if len(use) > 1:
        metrics["profile/use_sem"] = float(use.std(ddof=1)) / math.sqrt(len(use))
    by_task: dict[str, list[float]] = defaultdict(list)
    for group, (own, other) in means.items():
        by_task[told[group][0]].append(own - other)
    return metrics | {f"{task}/profile/use": float(np.mean(each)) for task, each in by_task.items()}
