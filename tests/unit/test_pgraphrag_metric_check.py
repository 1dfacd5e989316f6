"""Published outputs of PGraphRAG score what their authors published (S37): ROUGE, and METEOR where NLTK has WordNet."""

import json
from pathlib import Path

import pytest

from tagpr.metrics import meteor, meteor_name, rouge

PUBLISHED = Path(__file__).parents[3] / "shared/data/pgraphrag/metric_check"
FILES = ("results_dev_all_k2.json", "results_dev_both_k3.json", "results_dev_user_k5.json")

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published outputs at {PUBLISHED}")


def published(name: str) -> dict[str, float]:
    entries = json.loads((PUBLISHED / "dev_evaluation_title.json").read_text(encoding="utf-8"))
    found: dict[str, float] = next(entry["result"] for entry in entries if entry["filename"] == name)
    return found


def pairs(name: str) -> list[tuple[str, str]]:
    """Gold and answer of the 2,500 users."""
    golds = json.loads((PUBLISHED / "amazon_title_generation_outputs_dev.json").read_text(encoding="utf-8"))
    rows = json.loads((PUBLISHED / name).read_text(encoding="utf-8"))
    answers = {row["user_id"]: cut(row["output"]) for row in rows}
    assert len(answers) == len(golds) == len(rows) == 2500
    return [(row["output"].replace("\n", ""), answers[row["id"]]) for row in golds]


def cut(output: str) -> str:
    """As those authors cut the answer out of these raw outputs; their prompts have changed since."""
    answer = output.partition("The title is: ")[2] if "The title is: " in output else output
    for end in ("The title is:", "The title", "The"):
        if end in answer:
            answer = answer.partition(end)[0]
            break
    return answer.replace("\n", "")


@pytest.mark.parametrize("name", FILES)
def test_rouge_is_what_was_published(name: str) -> None:
    scores = [rouge(gold, said) for gold, said in pairs(name)]
    assert sum(score[0] for score in scores) / 2500 == pytest.approx(published(name)["rouge-1"], abs=0.001)
    assert sum(score[1] for score in scores) / 2500 == pytest.approx(published(name)["rouge-L"], abs=0.001)


@pytest.mark.parametrize("name", FILES)
def test_meteor_is_what_was_published(name: str) -> None:
    if meteor_name() != "meteor":
        pytest.skip("NLTK has no WordNet here: python -m nltk.downloader wordnet")
    scores = [meteor(gold, said) for gold, said in pairs(name)]
    assert sum(scores) / 2500 == pytest.approx(published(name)["meteor"], abs=0.001)
