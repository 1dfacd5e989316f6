"""Two vLLM engines as Ray actors share an evaluation, and one is killed at work; against one engine that nobody disturbs.

``python tests/faults/evaluation_replicas.py [--rows 240] [--kills 2] [--outputs FOLDER]``: greedy answers and answers with seeds
must be there once, and be those of the single engine. The last line is one JSON object of figures.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tagpr.benchmarks.storage import examples_file, read_examples
from tagpr.evaluation.engines import Completion, EngineSettings, Request, open_engine
from tagpr.evaluation.methods import Method
from tagpr.evaluation.prompts import PromptRenderer, PromptSettings
from tests.faults.evaluation_setup import environment, prepare

PROMPTS = PromptSettings(8, "recency", 160, 80, 0)


def engine_settings(**changes: Any) -> EngineSettings:
    """A small engine."""
    settings = {
        "dtype": "auto", "enforce_eager": None, "process_per_model": False, "write_every_s": 0.0, "max_num_seqs": 8,
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.5, "kv_cache_gib": 1, "replicas": 1,
    }  # fmt: skip
    return EngineSettings(**{**settings, **changes})


def requests(outputs: Path, number: int, seeds: Sequence[int | None]) -> list[Request]:
    """The first rows of MiniLaMP, greedily first, then with every seed."""
    rendering = PromptRenderer(str(outputs / "base" / "model"), PROMPTS)
    examples = read_examples(examples_file(outputs / "data" / "minilamp", "dev"))[:number]
    prompts = {example.id: rendering.render(example).token_ids for example in examples}
    return [Request((id_, seed), ids) for seed in seeds for id_, ids in prompts.items()]


def replicas_of(process: psutil.Process) -> list[psutil.Process]:
    """The actors below this process that are at work."""
    found = []
    for child in process.children(recursive=True):
        try:
            found += [child] if "Replica" in " ".join(child.cmdline()) else []
        except psutil.Error:
            continue
    return found


def with_kills(engine: Any, asked: Iterable[Request], kill_at: Sequence[int]) -> list[Completion]:
    """Complete, and kill one of the replicas each time so many rows are there."""
    done: list[Completion] = []
    left = list(kill_at)
    for completion in engine.complete(asked):
        if completion is not None:
            done.append(completion)
        if left and len(done) >= left[0]:
            left.pop(0)
            victim = replicas_of(psutil.Process())[0]
            os.kill(victim.pid, signal.SIGKILL)
    return done


def check(outputs: Path, number: int, kills: int) -> dict[str, Any]:
    """One engine, then two with so many deaths; figures."""
    os.environ.update(environment())
    method = Method("base", str(outputs / "base" / "model"))
    asked = requests(outputs, number, [None, 1])
    with open_engine(method, engine_settings(replicas=2), PROMPTS, 1.0) as engine:
        kill_at = [len(asked) * (n + 1) // (kills + 1) for n in range(kills)]
        done = with_kills(engine, asked, kill_at)
        # The same engine serves another condition after that.
        second = [each for each in engine.complete(asked[:20]) if each is not None]
    left = len(replicas_of(psutil.Process()))
    with open_engine(method, engine_settings(), PROMPTS, 1.0) as engine:
        expected = {each.key: each for each in engine.complete(asked) if each is not None}
    found = {each.key: each for each in done}
    return {
        "rows": len(asked),
        "kills": kills,
        "lost": len(expected.keys() - found.keys()),
        "double": len(done) - len(found),
        "greedy_equal": sum(found.get(key) == each for key, each in expected.items() if key[1] is None),
        "seeded_equal": sum(found.get(key) == each for key, each in expected.items() if key[1] is not None),
        "second_condition_equal": sum(expected[each.key] == each for each in second),
        "replicas_left_behind": left,
    }


def problems_of(figures: dict[str, Any]) -> list[str]:
    """What must not be."""
    found = [name for name in ("lost", "double", "replicas_left_behind") if figures[name]]
    half = figures["rows"] // 2
    wanted = {"greedy_equal": half, "seeded_equal": half, "second_condition_equal": 20}
    return found + [name for name, number in wanted.items() if figures[name] != number]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--outputs", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        outputs = (arguments.outputs or Path(folder)).resolve()
        prepare(outputs, ["minilamp"])
        figures = check(outputs, arguments.rows, arguments.kills)
    print(json.dumps({**figures, "problems": problems_of(figures)}))
    if problems_of(figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
