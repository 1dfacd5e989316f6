"""A small ``paths.chains`` as the pipeline leaves it, for the stages that come after it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tagpr.runs import file_hash, manifest, write_json_atomically
from tagpr.schema import Chain, Example, PreferencePair, ProfileItem
from tagpr.tags import format_response

TASKS = ("lamp1", "lamp3", "lamp4")
GOLD = {"lamp1": "[2]", "lamp3": "4", "lamp4": "The mayor opens"}
ITEM = {
    "lamp1": {"title": "A camera", "abstract": "x"}, "lamp3": {"text": "A fine book", "score": "4"},
    "lamp4": {"text": "The fair", "title": "The fair opens"},
}  # fmt: skip
FILES = ("chains.jsonl", "sft.parquet", "prp.jsonl", "pqp.jsonl", "funnel.json")


def write_finished(
    folder: Path, per_task: int = 4, text: str = "it is about a camera", pairs: int = 5, **notes: object
) -> list[Example]:
    """Two chains for each of ``per_task`` examples a task, every second one of them chosen for SFT."""
    folder.mkdir(parents=True, exist_ok=True)
    examples, chains = [], []
    for task in TASKS:
        for number in range(per_task):
            item = ProfileItem(id=f"p{number}", fields=ITEM[task])
            example = Example(
                id=f"{task}-{number}", task=task, split="train", user_id=f"u{number % 3}", query=f"question {number}",
                profile=(item,), gold=GOLD[task],
            )  # fmt: skip
            examples.append(example)
            tagged = (
                f"<analyze_input> {text} </analyze_input>\n<compare_entities> two {number} </compare_entities>\n"
                "<make_decision> this one </make_decision>"
            )
            chains += [
                Chain(
                    id=f"{example.id}-r{rollout}", example_id=example.id, task=task, user_id=example.user_id,
                    prompt=f"{example.query} {' '.join(ITEM[task].values())}", gold=example.gold, rollout=rollout,
                    reasoning=text, answer=example.gold, verifiable=1.0, judge_scores=(5, 4, 5, 4), tagged=tagged,
                )
                for rollout in range(2)
            ]  # fmt: skip
    (folder / "chains.jsonl").write_text("".join(f"{chain.model_dump_json()}\n" for chain in chains))
    rows = [
        {
            "id": chain.id, "task": chain.task, "user_id": chain.user_id, "prompt": chain.prompt,
            "response": format_response(chain.tagged or "", chain.answer),
        }
        for chain in chains
        if chain.rollout == 0
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "sft.parquet")
    made = [
        PreferencePair(
            id=f"{kind}/{row['id']}", kind=kind, task=row["task"], user_id=row["user_id"], prompt=row["prompt"],  # type: ignore[arg-type]
            chosen=row["response"], rejected=row["response"].replace("this one", "that one"), margin=None if kind == "prp" else 0.5,
        )
        for kind in ("prp", "pqp")
        for row in rows[:pairs]
    ]  # fmt: skip
    for kind in ("prp", "pqp"):
        lines = [f"{pair.model_dump_json()}\n" for pair in made if pair.kind == kind]
        (folder / f"{kind}.jsonl").write_text("".join(lines))
    stages = {
        name: {"what": what, "all": count * len(TASKS), **dict.fromkeys(TASKS, count)}
        for name, what, count in (
            ("rollouts", "chains asked of the teacher", 2 * per_task), ("judged", "past the judge (S8)", 2 * per_task),
            ("selected", "chosen for SFT (S14)", per_task),
        )
    }  # fmt: skip
    (folder / "funnel.json").write_text(
        json.dumps({"stages": stages, "dropped": {"judged": {"low_total": 3}}})
    )
    known = {
        "simulated": True,
        "fingerprint": "f" * 64,
        "benchmark": {"name": "minilamp", "synthetic": True, "profile_size": 8, "retriever": "recency"},
        "models": {"teacher": "simulated-teacher", "judge": "simulated-judge", "tagger": "simulated-tagger"},
        "prompts": {"judge": "0123456789abcdef", "restricted_tagging": "fedcba9876543210"},
        "settings": {
            "endpoint": "simulated", "instances_per_task": per_task, "rollouts": 2, "judge_minimum": 15, "size": 100,
            "accuracy": {"rouge": "rougeL", "above": {"lamp4": 0.55}, "minimum_words": 6},
            "teacher": {"model": "simulated-teacher", "base_url": "http://10.1.2.3:8000/v1", "temperature": 0.6},
        },
        "files": {name: file_hash(folder / name) for name in FILES},
        **notes,
    }  # fmt: skip
    write_json_atomically(folder / "manifest.json", manifest("build_chains", {}, 0, **known).model_dump())
    return examples
